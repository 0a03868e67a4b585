"""What the operator sees: totals, gauges and windows, as Redis holds them.

Only reads. The scripts write these hashes, so every process shows the same figures.
"""

from datetime import UTC, datetime, timedelta

from relay.outcomes import Hold, Outcome
from relay.queue import Queue
from relay.replay import last_progress, told_progress

GAUGES = (
    "queued",
    "in_flight",
    "delayed",
    "dead",
    "spooled",
    "unaccounted",
    "oldest_age_ms",
    "eta_s",
    "eta_s_high",
    "eta_s_normal",
    "eta_s_low",
    "budget_per_s",
    "hold",
    "updated_at_ms",
)


async def stats(queue: Queue, *, minutes: int = 5, days: int = 2) -> dict[str, object]:
    """Totals since ever, the gauges, the hold if there is one, and the last minutes.

    `{"totals": {…}, "gauges": {…}, "hold": {…} | null, "plan": [{…}],
    "forecast": {…} | null, "replay": {…} | null, "minutes": {"<stamp>": {…}},
    "browser": {"<day>": {"<family>": {…}}}}`, counts as numbers, times in the unit of
    the field's name; `replay` is the last one.
    """
    totals = await queue.hash("totals")
    gauges = await queue.hash("gauges")
    flow = await queue.hash("flow")
    progress = await last_progress(queue)
    now = await queue.now()
    last = [f"{now - timedelta(minutes=n):%Y%m%d%H%M}" for n in range(minutes)]
    return {
        "totals": {
            name: int(totals.get(name, 0))
            for name in ("received", *(str(outcome) for outcome in Outcome))
        },
        "gauges": {name: _number(gauges.get(name, "")) for name in GAUGES},
        "hold": _hold(flow),
        "plan": _plan(await queue.hash(f"plan:{queue.egress}")),
        "forecast": _forecast(await queue.hash("pace")),
        "replay": told_progress(progress) if progress else None,
        "minutes": {
            stamp: {
                name: int(value)
                for name, value in sorted((await queue.hash(f"minute:{stamp}")).items())
            }
            for stamp in last
        },
        "browser": {
            day: _by_family(await queue.hash(f"browser:{day}"))
            for day in (f"{now - timedelta(days=n):%Y%m%d}" for n in range(days))
        },
    }


def _by_family(fields: dict[str, str]) -> dict[str, dict[str, int]]:
    """What snippets reported: families, the one with the most events first."""
    families: dict[str, dict[str, int]] = {}
    for field, value in fields.items():
        family, _, kind = field.partition(":")
        families.setdefault(family, {})[kind] = int(value)
    return dict(sorted(families.items(), key=lambda item: -item[1].get("called", 0)))


def _hold(flow: dict[str, str]) -> dict[str, object] | None:
    """What holds delivery. Behind a hold by hand may be an automatic one."""
    if Hold.BY_HAND in flow:
        return {
            "hold": str(Hold.BY_HAND),
            "reason": flow[Hold.BY_HAND],
            "since": _time(flow.get("by_hand_since_ms")),
            "next_probe": None,
            "ends": None,
            "automatic": _automatic(flow),
        }
    return _automatic(flow)


def _plan(fields: dict[str, str]) -> list[dict[str, object]]:
    """What Voucherify's headers said, a window each, the shortest first.

    `others` fades; the scripts let it, and count it as it is at that moment.
    """
    periods = sorted(int(f[6:]) for f in fields if f.startswith("limit:"))
    return [
        {
            "window_s": ms // 1000,
            "limit": int(fields[f"limit:{ms}"]),
            "others": round(float(fields[f"others:{ms}"])),
            "heard": _time(fields[f"heard:{ms}"]),
        }
        for ms in periods
    ]


def _forecast(pace: dict[str, str]) -> dict[str, object] | None:
    """When a cycle's calls end as things go; None while they last."""
    if not int(pace.get("ends_ms") or 0):
        return None
    return {
        "calls_end": _time(pace["ends_ms"]),
        "calls_come_back": _time(pace["back_ms"]),
        "window_s": int(pace["window_ms"]) // 1000,
        "normal_every_s": int(pace["normal_ms"]) / 1000,
        "low_every_s": int(pace["low_ms"]) / 1000,
    }


def _automatic(flow: dict[str, str]) -> dict[str, object] | None:
    if "hold" not in flow:
        return None
    return {
        "hold": flow["hold"],
        "reason": flow.get("hold_reason", ""),
        "since": _time(flow.get("since_ms")),
        "next_probe": _time(flow.get("probe_at_ms")),
        "ends": _time(flow.get("ends_ms")),
    }


def _time(ms: str | None) -> str | None:
    return time_of(int(ms)) if ms else None


def time_of(ms: int) -> str:
    """A time as the operator reads it everywhere: UTC, to the second."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")


def _number(text: str) -> int | float | str | None:
    """A gauge as a number; `hold` is text, and what was never written is None."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text or None
