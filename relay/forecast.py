"""How long what waits will take, and whether a long window's calls will last.

Pure: what one look at the queue found goes in, seconds come out. The queue is seen as
water: lanes that fill, drain by their shares, and lose what expires.
"""

import math
from collections.abc import Iterator, Sequence

import msgspec

LANES = ("high", "normal", "low")
# As tick.lua takes turns: the share of the calls, and who is asked first in it.
TURNS = ((0.8, (0, 1, 2)), (0.1, (1, 0, 2)), (0.1, (2, 0, 1)))
RETRY_SHARE = 0.5  # of the calls, while one is due
LONGEST_S = 31 * 86_400
STEP = 0.03  # of the time that has passed: steps grow, and stay as exact in proportion
FIRST_STEP_S = 0.5
# A window as long as this is a plan's cycle: spending it at once would leave days
# without a call. The rates of arrival look back a day.
CYCLE_MS = 86_400_000
HIGH_MARGIN = 1.1  # what the high lane will want may be more than it was
LEAST_PACE = 0.02  # of what is left, for each lower lane: else nothing there expires


class Lane(msgspec.Struct, array_like=True):
    """What waits in a lane. Rates are events a second, moments ms since 1970."""

    waiting: int
    soon: float  # how many come, by the last hour
    long: float  # the same, by the last day
    first_end_ms: float  # when the oldest expires
    last_end_ms: float


class Spent(msgspec.Struct, array_like=True):
    """A window of the budget, and the calls in it."""

    calls: int
    period_ms: int
    used: int
    oldest_ms: int  # when the oldest of them was made; now, without one


class Facts(msgspec.Struct, array_like=True):
    """One look at the queue, as reap.lua gives it."""

    now_ms: int
    wait_ms: int  # until Voucherify may be called at all
    retrying: list[float]  # by lane, from a sample
    due_ms: float  # when nearly all of those are due
    lanes: list[Lane]
    windows: list[Spent]


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What the lower lanes are held to while a long window would run out."""

    normal_ms: int = 0  # between two of its calls; 0: as fast as it goes
    low_ms: int = 0
    ends_ms: int = 0  # when the calls would end as things go; 0: they last
    window_ms: int = 0  # of which window
    back_ms: int = 0  # when the first of its calls comes back


def pace(facts: Facts) -> Pace:
    """See whether a cycle's calls last, and slow the low lanes down first if not."""
    for window in sorted(facts.windows, key=lambda w: -w.period_ms):
        if window.period_ms >= CYCLE_MS and (found := _pace(facts, window)):
            return found
    return Pace()


def _pace(facts: Facts, window: Spent) -> Pace | None:
    oldest_ms = min(window.oldest_ms, facts.now_ms)
    back_ms = oldest_ms + window.period_ms
    ahead_s = max(1.0, (back_ms - facts.now_ms) / 1000)
    left = window.calls - window.used
    waiting = [lane.waiting for lane in facts.lanes]
    coming = [lane.long for lane in facts.lanes]
    spare = left - sum(waiting) - sum(facts.retrying)
    if spare >= sum(coming) * ahead_s:
        return None
    lasts_s = spare / sum(coming) if spare > 0 else 0.0
    supply = max(0.0, left - waiting[0] - sum(facts.retrying)) / ahead_s
    least = max(supply * LEAST_PACE, 1 / ahead_s)
    high = coming[0] * HIGH_MARGIN
    normal = max(supply - high, least)
    low = max(supply - high - coming[1], least)
    return Pace(
        # What a lane has never reached is no bound to be told of.
        normal_ms=math.ceil(1000 / normal) if normal < coming[1] else 0,
        low_ms=math.ceil(1000 / low),
        ends_ms=facts.now_ms + int(lasts_s * 1000),
        window_ms=window.period_ms,
        back_ms=back_ms,
    )


def etas_s(facts: Facts, held: Pace | None = None) -> list[int] | None:
    """Seconds until what waits now is gone, by lane; None without a budget.

    Gone is sent or expired. What arrives meanwhile counts where it goes first.
    """
    if not facts.windows:
        return None
    held = held or Pace()
    gaps_s = [0.0, held.normal_ms / 1000, held.low_ms / 1000]
    there = [float(lane.waiting) for lane in facts.lanes]  # newcomers included
    old = list(there)  # of those, what waits now
    retrying = whole = sum(facts.retrying)
    due_s = max(0.0, facts.due_ms - facts.now_ms) / 1000
    both = zip(old, facts.retrying, strict=True)
    gone: list[int | None] = [None if sum(pair) else 0 for pair in both]
    before_s, done = 0.0, 0.0
    for now_s in _steps(facts.wait_ms / 1000):
        if None not in gone:
            break
        step_s, before_s = now_s - before_s, now_s
        able = _calls(facts, now_s) - done
        for i, lane in enumerate(facts.lanes):
            there[i] += lane.soon * step_s
        not_due = whole * max(0.0, 1 - now_s / due_s) if due_s else 0.0
        tried = min(max(0.0, retrying - not_due), able * RETRY_SHARE)
        most = [step_s / gap if gap else math.inf for gap in gaps_s]
        wanted = [min(*pair) for pair in zip(there, most, strict=True)]
        served = _served(wanted, able - tried)
        tried += min(max(0.0, retrying - tried - not_due), able - tried - sum(served))
        retrying -= tried
        done += tried + sum(served)
        for i, lane in enumerate(facts.lanes):
            left = max(0.0, old[i] - served[i])  # the oldest go first
            old[i] = min(left, lane.waiting * _alive(lane, facts, now_s))
            there[i] -= served[i] + left - old[i]
            again = facts.retrying[i] * retrying / whole if whole else 0.0
            if facts.retrying[i] and now_s < due_s:
                again = max(again, 1.0)  # the last of them
            if gone[i] is None and old[i] + again < 0.5:
                gone[i] = min(math.ceil(now_s), LONGEST_S)
    return [LONGEST_S if at is None else at for at in gone]


def _steps(from_s: float) -> Iterator[float]:
    passed_s = 0.0
    while passed_s < LONGEST_S:
        passed_s += max(FIRST_STEP_S, passed_s * STEP)
        yield from_s + passed_s


def _calls(facts: Facts, at_s: float) -> float:
    """How many calls all windows together allow from now until then."""
    return min(_of_window(facts, window, at_s) for window in facts.windows)


def _of_window(facts: Facts, window: Spent, at_s: float) -> float:
    # What was spent comes back as it ages: the oldest first, then evenly. What comes
    # back in a pause is there after it, and no more than the whole window.
    wait_s = facts.wait_ms / 1000
    back_s = max(0.0, (window.oldest_ms + window.period_ms - facts.now_ms) / 1000)
    rate = window.calls * 1000 / window.period_ms
    free = max(0, window.calls - window.used) + rate * max(0.0, wait_s - back_s)
    return min(free, window.calls) + rate * max(0.0, at_s - max(wait_s, back_s))


def _served(wanting: Sequence[float], able: float) -> list[float]:
    """Share calls out as the turns do; what a lane leaves goes to the next."""
    left, served = list(wanting), [0.0] * len(wanting)
    for share, order in TURNS:
        calls = able * share
        for i in order:
            n = min(left[i], calls)
            left[i] -= n
            served[i] += n
            calls -= n
    return served


def _alive(lane: Lane, facts: Facts, at_s: float) -> float:
    """The share of what waits now that has not expired by then."""
    moment = facts.now_ms + at_s * 1000
    if moment < lane.first_end_ms:
        return 1.0
    if moment >= lane.last_end_ms:
        return 0.0
    return (lane.last_end_ms - moment) / (lane.last_end_ms - lane.first_end_ms)
