"""Voucherify's two kinds of limit: per source address, and of the plan.

A refused call spends nothing. Times are handed in: the window per address runs on a
monotonic clock, the plan's periods on the wall clock, since they begin on the minute
and on the hour ("API access is blocked for the rest of the period", Fair Use Policy).
"""

import math
from collections import deque
from dataclasses import dataclass

from relay.sandbox.config import SandboxConfig

MAX_ADDRESSES = 10_000  # more than that and the quiet ones are forgotten


class SlidingWindow:
    """At most `calls` in any `seconds`, for each key; exact, not approximated."""

    def __init__(self) -> None:
        self._stamps: dict[str, deque[float]] = {}

    def take(self, key: str, now: float, *, calls: int, seconds: float) -> float:
        """Take one call: 0.0 if it is allowed, else the seconds until one is."""
        stamps = self._stamps.get(key)
        if stamps is None:
            self._forget_quiet(now - seconds)
            stamps = self._stamps[key] = deque()
        # A call counts for `seconds`: at exactly that age it is out of the window.
        while stamps and now - stamps[0] >= seconds:
            stamps.popleft()
        if len(stamps) >= calls:
            # `calls` may have been lowered while running: wait for enough to leave.
            return seconds - (now - stamps[len(stamps) - calls])
        stamps.append(now)
        return 0.0

    def _forget_quiet(self, before: float) -> None:
        if len(self._stamps) < MAX_ADDRESSES:
            return
        for key in [k for k, s in self._stamps.items() if not s or s[-1] <= before]:
            del self._stamps[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanState:
    """What the plan says of one call; `refused` tells whether it was taken."""

    refused: bool
    limit: int
    remaining: int
    resets_at: float  # Unix seconds
    type: str

    def headers(self, now: float) -> tuple[tuple[str, str], ...]:
        """Return the documented headers, the optional ones once a limit is reached."""
        next_call = now if self.remaining else self.resets_at
        usual = (
            ("X-Rate-Limit-Limit", str(self.limit)),
            ("X-Rate-Limit-Remaining", str(self.remaining)),
            ("X-Rate-Limit-Retry", str(math.ceil(next_call))),
        )
        if not self.refused:
            return usual
        wait = max(1, math.ceil(self.resets_at - now))
        return (
            *usual,
            ("Retry-After", str(wait)),
            ("X-Rate-Limit-Type", self.type),
        )


class Plan:
    """The plan's calls per minute, hour and cycle: all are charged, or none."""

    def __init__(self, *, cycle_start: float) -> None:
        self._cycle_start = cycle_start
        self._used: dict[str, tuple[float, int]] = {}  # period's end, calls in it

    def take(self, now: float, config: SandboxConfig) -> PlanState | None:
        """Take one call from every period; None where the plan has no limit."""
        windows = self._windows(now, config)
        if not windows:
            return None
        used = {name: self._used_of(name, end) for name, _, end in windows}
        spent = [w for w in windows if used[w[0]] >= w[1]]
        if spent:
            # Several may be spent: the one that lasts longest decides.
            name, limit, end = max(spent, key=lambda window: window[2])
            return _state(name, limit, end, remaining=0, refused=True)
        for name, _, end in windows:
            used[name] += 1
            self._used[name] = (end, used[name])
        name, limit, end = min(windows, key=lambda w: w[1] - used[w[0]])
        return _state(name, limit, end, remaining=limit - used[name], refused=False)

    def _windows(
        self, now: float, config: SandboxConfig
    ) -> list[tuple[str, int, float]]:
        periods = (
            ("minute", config.per_minute, 60.0, 0.0),
            ("hour", config.per_hour, 3600.0, 0.0),
            ("cycle", config.per_cycle, config.cycle_seconds, self._cycle_start),
        )
        return [
            (name, limit, start + (math.floor((now - start) / span) + 1) * span)
            for name, limit, span, start in periods
            if limit is not None
        ]

    def _used_of(self, name: str, end: float) -> int:
        known_end, used = self._used.get(name, (end, 0))
        return used if known_end == end else 0


def _state(
    name: str, limit: int, end: float, *, remaining: int, refused: bool
) -> PlanState:
    kind = "api_calls_cycle" if name == "cycle" else "api_calls"
    return PlanState(
        refused=refused, limit=limit, remaining=remaining, resets_at=end, type=kind
    )


def client_limit_headers(
    limit: int, wait: float, now: float
) -> tuple[tuple[str, str], ...]:
    """Return the headers of the per-address 429; no documented type names it."""
    return (
        ("X-Rate-Limit-Limit", str(limit)),
        ("X-Rate-Limit-Remaining", "0"),
        ("X-Rate-Limit-Retry", str(math.ceil(now + wait))),
        ("Retry-After", str(max(1, math.ceil(wait)))),
    )
