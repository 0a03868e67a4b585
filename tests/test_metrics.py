"""The figures in Prometheus' words, read back with its own parser."""

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as open_metrics,
)
from prometheus_client.parser import text_string_to_metric_families as prometheus

from relay.counters import GAUGES as SHOWN
from relay.metrics import GAUGES, exposition
from relay.outcomes import Hold, Outcome

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"

Samples = dict[tuple[str, str], float]


def shown(**parts: object) -> dict[str, object]:
    return {
        "totals": {"received": 9, **dict.fromkeys(map(str, Outcome), 0)},
        "gauges": dict.fromkeys(SHOWN),
        "plan": [],
        "forecast": None,
    } | parts


def read(figures: dict[str, object], accept: str = "") -> Samples:
    text, media_type = exposition(figures, accept)
    parse = open_metrics if "openmetrics" in media_type else prometheus
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in parse(text.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize("accept", ["", "text/plain", OPEN_METRICS])
def test_every_figure_is_there_in_its_unit(accept: str) -> None:
    gauges = {
        "queued": 4,
        "in_flight": 1,
        "delayed": 2,
        "spooled": 0,
        "dead": 3,
        "eta_s_high": 0,
        "eta_s_normal": 60,
        "eta_s_low": 90,
        "eta_s": 90,
        "unaccounted": 0,
        "oldest_age_ms": 1500,
        "budget_per_s": 0.8,
        "updated_at_ms": 1_800_000_000_500,
        "hold": "plan_hold",
    }
    totals = {"received": 9, **dict.fromkeys(map(str, Outcome), 0), "delivered": 2}
    plan = [{"window_s": 60, "limit": 100, "others": 40, "heard": "x"}]
    forecast = {"calls_end": "2026-11-19T00:00:00+00:00"}
    found = read(
        shown(gauges=gauges, totals=totals, plan=plan, forecast=forecast), accept
    )
    assert found["relay_received_events_total", ""] == 9
    assert found["relay_outcome_events_total", "delivered"] == 2
    assert found["relay_events", "queued"] == 4
    assert found["relay_backlog_eta_seconds", "low"] == 90
    assert found["relay_dead_letters", ""] == 3
    assert found["relay_oldest_event_age_seconds", ""] == 1.5
    assert found["relay_budget_calls_per_second", ""] == 0.8
    assert found["relay_gauges_timestamp_seconds", ""] == 1_800_000_000.5
    assert found["relay_hold", "plan_hold"] == 1
    assert found["relay_plan_others_calls", "60"] == 40
    assert found["relay_plan_limit_calls", "60"] == 100
    assert found["relay_cycle_calls_end_timestamp_seconds", ""] == 1_795_046_400


def test_what_was_never_written_is_left_out() -> None:
    found = read(shown())
    names = {name for name, _ in found}
    assert names == {
        *("relay_received_events_total", "relay_outcome_events_total"),
        "relay_hold",
    }
    assert {label for name, label in found if name == "relay_hold"} == {
        str(hold) for hold in Hold
    }
    assert not any(found["relay_hold", str(hold)] for hold in Hold)


def test_it_shows_gauges_that_there_are() -> None:
    assert {gauge for gauge, _, _ in GAUGES.values()} <= set(SHOWN)
