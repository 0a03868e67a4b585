"""Rate limits, upstream budgets and durations: their grammar and their arithmetic.

A limit is a GCRA: each key has one number, its theoretical arrival time (TAT), in
whole microseconds on one clock. `Gcra` is the reference for what the Lua scripts
do; it keeps no state and reads no clock. An error names the part that is wrong by
its position and never repeats the text, so it may go into any log.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

DIMENSIONS = ("ip", "customer", "site")
DEFAULT_LIMITS = "ip=120/1m burst 60, customer=60/1m burst 30, site=20000/1m burst 5000"

UNIT_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
MAX_WINDOW_S = 366 * 86_400

# Rounding the emission up to whole microseconds costs at most a tenth of the quota
# at this rate, and more above it.
MAX_PER_SECOND = 100_000

# Every use of an event's limit is kept as a time stamp, for it is counted exactly.
MAX_EVENT_QUOTA = 1_000

# After a failover the server's clock may be behind the one that wrote a TAT. Beyond
# this much a TAT is cut, so that a step back blocks nobody for longer.
CLOCK_SLACK_US = 5_000_000

_LIMIT_FORM = 'write it like "ip=120/1m burst 60"'
_WINDOW_FORM = 'write it like "90/1m"'
_EVENT_LIMIT_FORM = 'write it like "3/1d" or "3/1d dry_run"'
_DURATION_FORM = 'write it like "30s", "10m", "24h" or "7d"'

_SPAN = re.compile(r"([0-9]{1,9})([a-z]?)")
_NUMBER = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """At most `quota` events a window on average, `burst` of them at once."""

    dimension: str  # "ip", "customer" or "site"
    quota: int
    window_s: int
    burst: int
    dry_run: bool = False  # counted as `would_refuse`, not enforced

    def __post_init__(self) -> None:
        if self.dimension not in DIMENSIONS:
            raise ValueError("the dimension must be ip, customer or site")
        _check_rate(self.quota, self.window_s)
        if self.burst < 1:
            raise ValueError("the burst must be at least 1")
        if self.tolerance_us > MAX_WINDOW_S * 1_000_000:
            raise ValueError("the burst must not hold more than 366 days of quota")

    @property
    def emission_us(self) -> int:
        """Microseconds that one event costs; rounded up: never faster than told."""
        return -(-self.window_s * 1_000_000 // self.quota)

    @property
    def tolerance_us(self) -> int:
        """How far a TAT may run ahead of the clock: a whole burst."""
        return self.burst * self.emission_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """At most `quota` calls in any `period_ms`."""

    quota: int
    period_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of one event, and the arrival times to store afterwards."""

    admitted: bool
    tats: tuple[int, ...]  # as they came when refused: nothing is charged
    wait_us: int  # 0 when admitted; until it would pass, were nothing else to come
    dimension: str | None  # the enforced limit that asks for this wait
    would_refuse: tuple[str, ...]  # dry-run limits that are over


class Gcra:
    """The generic cell rate algorithm over several limits at once.

    An event that any enforced limit refuses is charged to none of them; only times that
    a clock which stepped back left too far ahead are cut, then, too. A dry-run
    limit is charged as if it were enforced alone, so that its count of would-be
    refusals is what enforcing it would give.
    """

    def __init__(self, limits: Sequence[Limit]) -> None:
        self._limits = tuple(limits)

    def check(self, tats: Sequence[int], now: int, costs: Sequence[int]) -> Verdict:
        """Decide on one event; `tats` and `costs` run along the limits.

        A cost of 0 leaves its limit out. A cost above the burst never passes,
        whatever `wait_us` says.
        """
        wait_us, dimension = 0, None
        would_refuse: list[str] = []
        kept = [
            min(tat, _latest(now, limit)) if cost else tat
            for limit, tat, cost in zip(self._limits, tats, costs, strict=True)
        ]
        charged = list(kept)
        triples = zip(self._limits, kept, costs, strict=True)
        for index, (limit, tat, cost) in enumerate(triples):
            if cost == 0:
                continue
            charge = max(now, tat) + cost * limit.emission_us
            over_us = charge - now - limit.tolerance_us
            if over_us <= 0:
                charged[index] = charge
            elif limit.dry_run:
                would_refuse.append(limit.dimension)
            elif over_us > wait_us:
                wait_us, dimension = over_us, limit.dimension
        return Verdict(
            admitted=not wait_us,
            tats=tuple(kept if wait_us else charged),
            wait_us=wait_us,
            dimension=dimension,
            would_refuse=tuple(would_refuse),
        )


def parse_limits(text: str) -> tuple[Limit, ...]:
    """Read `ip=120/1m burst 60 dry_run, site=20000/1m`; `off` or nothing is none."""
    if text.strip().lower() in ("", "off"):
        return ()
    limits: list[Limit] = []
    for position, part in enumerate(text.split(","), start=1):
        try:
            limit = _parse_limit(part)
            if any(limit.dimension == other.dimension for other in limits):
                raise ValueError("this dimension already has a limit: keep one")
        except ValueError as error:
            msg = f"limit {position}: {error}; {_LIMIT_FORM}"
            raise ValueError(msg) from None
        limits.append(limit)
    return tuple(limits)


def parse_budget(text: str) -> tuple[Window, ...]:
    """Read `4/5s, 90/1m, 95000/30d`, all of them to be kept; `off` is no budget."""
    if text.strip().lower() in ("", "off", "unlimited"):
        return ()
    windows: list[Window] = []
    for position, part in enumerate(text.split(","), start=1):
        try:
            quota, window_s = _parse_rate(part.strip())
            _check_rate(quota, window_s)
            if any(window.period_ms == window_s * 1000 for window in windows):
                raise ValueError("this window is already there: keep the smaller quota")
        except ValueError as error:
            msg = f"window {position}: {error}; {_WINDOW_FORM}"
            raise ValueError(msg) from None
        windows.append(Window(quota=quota, period_ms=window_s * 1000))
    return tuple(windows)


def parse_event_limit(text: str) -> tuple[Window, bool]:
    """Read `3/1d` or `3/1d dry_run`: how often one customer may send one event."""
    rate, *rest = text.split() or [""]
    try:
        quota, window_s = _parse_rate(rate)
        if rest not in ([], ["dry_run"]):
            raise ValueError("after the rate only `dry_run` may follow")
        if not 1 <= quota <= MAX_EVENT_QUOTA:
            msg = f"the quota must be from 1 to {MAX_EVENT_QUOTA}: each use is kept"
            raise ValueError(msg)
        _check_rate(quota, window_s)
    except ValueError as error:
        msg = f"{error}; {_EVENT_LIMIT_FORM}"
        raise ValueError(msg) from None
    return Window(quota=quota, period_ms=window_s * 1000), bool(rest)


def parse_duration(text: str) -> int:
    """Read `30s`, `10m`, `24h` or `7d`; the answer is in seconds."""
    try:
        return _parse_span(text.strip())
    except ValueError as error:
        msg = f"{error}; {_DURATION_FORM}"
        raise ValueError(msg) from None


def most_calls(budget: Sequence[Window], period_ms: int) -> int | None:
    """How many calls all windows together let through in any `period_ms`."""
    if not budget:
        return None
    return min(w.quota * max(1, -(-period_ms // w.period_ms)) for w in budget)


def calls_a_day(budget: Sequence[Window]) -> int | None:
    """How many calls a day all windows together allow for ever.

    A month's quota may go in one day, but then nothing more does for the rest of it.
    """
    if not budget:
        return None
    return min(w.quota * UNIT_S["d"] * 1000 // w.period_ms for w in budget)


def policy_header(limits: Sequence[Limit]) -> str:
    """Give the `RateLimit-Policy` field; empty when no limit is enforced.

    Policies as in draft-ietf-httpapi-ratelimit-headers-11: `q` is what may come at
    once, `w` the seconds until all of it is there again. A dry-run limit refuses
    nobody, so a client is not told of it.
    """
    return ", ".join(
        f'"{limit.dimension}";q={limit.burst};w={-(-limit.tolerance_us // 1_000_000)}'
        for limit in limits
        if not limit.dry_run
    )


def _latest(now: int, limit: Limit) -> int:
    return now + limit.tolerance_us + CLOCK_SLACK_US


def _parse_limit(part: str) -> Limit:
    dimension, equals, rest = part.partition("=")
    if not equals:
        raise ValueError("it has no dimension")
    words = rest.split()
    if not words:
        raise ValueError("it has no rate")
    quota, window_s = _parse_rate(words.pop(0))
    burst, dry_run = quota, False
    if words[:1] == ["burst"]:
        if len(words) < 2 or not _NUMBER.fullmatch(words[1]):
            raise ValueError("the burst must be a whole number")
        burst = int(words[1])
        words = words[2:]
    if words[:1] == ["dry_run"]:
        dry_run = True
        words = words[1:]
    if words:
        raise ValueError("after the rate only `burst N` and then `dry_run` may follow")
    return Limit(
        dimension=dimension.strip(),
        quota=quota,
        window_s=window_s,
        burst=burst,
        dry_run=dry_run,
    )


def _parse_rate(text: str) -> tuple[int, int]:
    quota, slash, span = text.partition("/")
    if not slash:
        raise ValueError("it has no window")
    if not _NUMBER.fullmatch(quota):
        raise ValueError("the quota must be a whole number")
    return int(quota), _parse_span(span)


def _parse_span(text: str) -> int:
    match = _SPAN.fullmatch(text)
    if not match:
        raise ValueError("the time must be a whole number and a unit")
    count, unit = match.groups()
    if unit not in UNIT_S:
        raise ValueError("the unit of time must be s, m, h or d")
    return int(count) * UNIT_S[unit]


def _check_rate(quota: int, window_s: int) -> None:
    if quota < 1:
        raise ValueError("the quota must be at least 1 (for no limit at all: off)")
    if not 1 <= window_s <= MAX_WINDOW_S:
        raise ValueError("the window must be from 1 second to 366 days")
    if quota > MAX_PER_SECOND * window_s:
        raise ValueError("the quota must be at most 100000 a second")
