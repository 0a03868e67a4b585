"""What `relay stats` shows, in the words of Prometheus and OpenMetrics.

Pure: figures in, text out. They come from Redis, so every process reports the same
totals: scrape one of them, or all and take the `max`.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from relay.forecast import LANES
from relay.outcomes import Hold, Outcome

# The gauge of counters.py behind each metric, and by how much it is divided.
GAUGES = {
    "relay_dead_letters": ("dead", 1, "Dead letters; they wait for an operator."),
    "relay_unaccounted_events": ("unaccounted", 1, "Not 0: a fault of the relay."),
    "relay_oldest_event_age_seconds": (
        *("oldest_age_ms", 1000),
        "Age of the oldest event that is queued or in flight.",
    ),
    "relay_budget_calls_per_second": (
        *("budget_per_s", 1),
        "Calls that the budget and the plan allow; 0: no limit.",
    ),
    "relay_gauges_timestamp_seconds": (
        *("updated_at_ms", 1000),
        "When the gauges were written.",
    ),
}
STATES = ("queued", "in_flight", "delayed", "spooled")


class _Shown(Collector):
    def __init__(self, shown: Mapping[str, object]) -> None:
        self._shown = shown

    def collect(self) -> Iterator[Metric]:
        gauges = _part(self._shown, "gauges")
        yield from _totals(_part(self._shown, "totals"))
        yield _by_label(
            "relay_events",
            "Events that have no outcome yet, by where they are.",
            "state",
            {state: gauges.get(state) for state in STATES},
        )
        yield _by_label(
            "relay_backlog_eta_seconds",
            "Time until what waits in a lane is sent or has expired.",
            "lane",
            {lane: gauges.get(f"eta_s_{lane}") for lane in LANES},
        )
        for name, (gauge, divisor, said) in GAUGES.items():
            value = gauges.get(gauge)
            if isinstance(value, int | float):
                yield GaugeMetricFamily(name, said, value / divisor)
        held = gauges.get("hold")
        yield _by_label(
            "relay_hold",
            "1 for what holds delivery.",
            "hold",
            {str(hold): int(held == hold) for hold in Hold},
        )
        yield from _plan(self._shown)


def exposition(shown: Mapping[str, object], accept: str) -> tuple[bytes, str]:
    """Text for a scraper that takes these media types, and its own media type.

    `shown` is what `counters.stats` gives. What was never written is left out.
    """
    registry = CollectorRegistry()
    registry.register(_Shown(shown))
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


def _totals(totals: Mapping[str, object]) -> Iterator[Metric]:
    received = CounterMetricFamily("relay_received_events", "Events received.")
    received.add_metric([], _number(totals["received"]))
    yield received
    ended = CounterMetricFamily(
        "relay_outcome_events", "What became of events.", labels=["outcome"]
    )
    for outcome in Outcome:
        ended.add_metric([str(outcome)], _number(totals[str(outcome)]))
    yield ended


def _plan(shown: Mapping[str, object]) -> Iterator[Metric]:
    plan = shown["plan"]
    windows = plan if isinstance(plan, list) else []
    for field, said in (
        ("limit", "Calls that Voucherify's plan allows in a window."),
        ("others", "Calls that others were seen to make in a window."),
    ):
        values = {str(window["window_s"]): window[field] for window in windows}
        yield _by_label(f"relay_plan_{field}_calls", said, "window_seconds", values)
    forecast = shown["forecast"]
    if isinstance(forecast, dict):
        ends = datetime.fromisoformat(str(forecast["calls_end"])).timestamp()
        yield GaugeMetricFamily(
            "relay_cycle_calls_end_timestamp_seconds",
            "When the calls of a cycle end as things go; absent while they last.",
            ends,
        )


def _by_label(
    name: str, said: str, label: str, values: Mapping[str, object]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, said, labels=[label])
    for key, value in values.items():
        if isinstance(value, int | float):
            family.add_metric([key], value)
    return family


def _part(shown: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = shown[name]
    assert isinstance(part, dict)  # noqa: S101  # as counters.stats makes it
    return part


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
