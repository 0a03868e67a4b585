"""How long what waits takes, and when a cycle's calls end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.forecast import LONGEST_S, Facts, Lane, Pace, Spent, etas_s, pace

NOW = 1_800_000_000_000
DAY_MS = 86_400_000
MONTH_MS = 30 * DAY_MS
NEVER = float(NOW + 10 * MONTH_MS)


def lane(
    waiting: int = 0, soon: float = 0.0, long: float = 0.0, ends: float = 0
) -> Lane:
    end = NOW + ends * 1000 if ends else NEVER
    return Lane(waiting, soon, long, end, end)


def window(calls: int, seconds: int, used: int = 0, age_s: float = 0) -> Spent:
    return Spent(calls, seconds * 1000, used, int(NOW - age_s * 1000))


def facts(
    *lanes: Lane,
    windows: tuple[Spent, ...] = (),
    wait_s: float = 0,
    retrying: tuple[float, ...] = (0, 0, 0),
    due_s: float = 0,
) -> Facts:
    whole = [*lanes, *(lane() for _ in range(3 - len(lanes)))]
    due_ms = NOW + due_s * 1000
    return Facts(NOW, int(wait_s * 1000), [*retrying], due_ms, whole, [*windows])


MINUTE = window(60, 60, 60, 60)  # one a second from now on, evenly


def test_nothing_waits_and_nothing_is_to_be_done() -> None:
    assert etas_s(facts(windows=(MINUTE,))) == [0, 0, 0]


def test_without_a_budget_nobody_knows() -> None:
    assert etas_s(facts(lane(5))) is None


@pytest.mark.parametrize("waiting", [10, 600, 50_000])
def test_one_lane_drains_at_the_pace_of_the_budget(waiting: int) -> None:
    [high, *_] = etas_s(facts(lane(waiting), windows=(MINUTE,))) or []
    assert high == pytest.approx(waiting, rel=0.04, abs=1)


def test_lower_lanes_get_their_share_and_then_what_is_left() -> None:
    # High has 0.8 calls a second; then normal 0.9; then low all of them.
    etas = etas_s(facts(lane(800), lane(1_000), lane(500), windows=(MINUTE,))) or []
    assert etas[0] == pytest.approx(1_000, rel=0.04)
    assert etas[1] == pytest.approx(1_000 + 900 / 0.9, rel=0.04)
    assert etas[2] == pytest.approx(2_300, rel=0.04)


def test_what_arrives_takes_calls_from_the_lanes_below_it() -> None:
    etas = etas_s(facts(lane(0, 0.5), lane(100), windows=(MINUTE,))) or []
    assert etas[1] == pytest.approx(200, rel=0.05)
    # Of its own lane it comes after what waits already.
    etas = etas_s(facts(lane(0), lane(100, 0.9), windows=(MINUTE,))) or []
    assert etas[1] == pytest.approx(100, rel=0.05)


def test_what_expires_is_gone_and_costs_no_call() -> None:
    etas = etas_s(facts(lane(0), lane(800), lane(5_000, ends=600), windows=(MINUTE,)))
    assert etas is not None
    assert etas[2] == pytest.approx(600, rel=0.04)
    assert etas[1] == pytest.approx(600 + (800 - 540), rel=0.05)


def test_a_window_gives_what_is_left_of_it_at_once() -> None:
    free = window(1_000, 3_600)
    assert max(etas_s(facts(lane(900), windows=(free,))) or []) <= 1
    spent = window(
        1_000, 3_600, used=1_000, age_s=600
    )  # the first comes back in 50 min
    [high, *_] = etas_s(facts(lane(1), windows=(spent,))) or []
    assert high == pytest.approx(3_000, rel=0.04)


def test_the_tightest_window_counts() -> None:
    both = (window(4, 5, 4, 5), window(30, 60, 30, 60))
    [high, *_] = etas_s(facts(lane(300), windows=both)) or []
    assert high == pytest.approx(600, rel=0.04)


def test_a_pause_comes_first() -> None:
    # The window is whole again when it is over, and no more than that.
    [high, *_] = etas_s(facts(lane(100), windows=(MINUTE,), wait_s=500)) or []
    assert high == pytest.approx(540, rel=0.04)


def test_retries_take_every_other_call_and_hold_their_lane_open() -> None:
    some = facts(lane(100), windows=(MINUTE,), retrying=(100, 0, 0))
    assert (etas_s(some) or [])[0] == pytest.approx(200, rel=0.05)
    late = facts(lane(10), lane(10), windows=(MINUTE,), retrying=(0, 5, 0), due_s=400)
    etas = etas_s(late) or []
    assert etas[0] < 25
    assert etas[1] == pytest.approx(400, rel=0.04)


def test_a_lane_that_is_slowed_down_takes_its_time() -> None:
    slow = facts(lane(), lane(), lane(10), windows=(MINUTE,))
    etas = etas_s(slow, Pace(low_ms=60_000)) or []
    assert etas[2] == pytest.approx(600, rel=0.05)


def test_what_will_never_be_done_has_an_end_all_the_same() -> None:
    flood = facts(lane(0, 2.0), lane(), lane(10), windows=(window(1, 60, 1, 60),))
    assert (etas_s(flood) or [])[2] <= LONGEST_S
    stuck = facts(lane(10), windows=(window(1, 366 * 86_400, 1),))
    assert etas_s(stuck) == [LONGEST_S, 0, 0]


@given(
    st.lists(st.integers(0, 100_000), min_size=3, max_size=3),
    st.lists(st.floats(0, 5), min_size=3, max_size=3),
    st.lists(st.floats(0, 1_000), min_size=3, max_size=3),
    st.integers(1, 1_000),
)
def test_every_forecast_is_a_time(
    waiting: list[int], soon: list[float], retrying: list[float], calls: int
) -> None:
    lanes = [lane(n, s) for n, s in zip(waiting, soon, strict=True)]
    seen = facts(*lanes, windows=(window(calls, 60),), retrying=tuple(retrying))
    etas = etas_s(seen)
    assert etas is not None
    assert all(0 <= eta <= LONGEST_S for eta in etas)
    assert [eta > 0 for eta in etas] == [
        n + again > 0 for n, again in zip(waiting, retrying, strict=True)
    ]


# --- a cycle --------------------------------------------------------------------------

DAY_S = 86_400


def month(left: int, *lanes: Lane, age_d: float = 10) -> Facts:
    spent = window(10_000, 30 * DAY_S, 10_000 - left, age_d * DAY_S)
    return facts(*lanes, windows=(MINUTE, spent))


def test_calls_that_last_slow_nobody_down() -> None:
    # 20 days until the first comes back; 100 a day arrive.
    assert pace(month(2_100, lane(long=100 / DAY_S))) == Pace()
    assert pace(facts(lane(10**6, long=9), windows=(MINUTE,))) == Pace()


def test_the_end_is_told_and_the_low_lane_slowed_down_first() -> None:
    a_day = [lane(long=n / DAY_S) for n in (30, 40, 80)]
    found = pace(month(2_000, *a_day))
    assert found.ends_ms == pytest.approx(NOW + 2_000 / 150 * DAY_MS, rel=0.001)
    assert (found.window_ms, found.back_ms) == (MONTH_MS, NOW + 20 * DAY_MS)
    assert found.normal_ms == 0
    assert found.low_ms == pytest.approx(DAY_MS / 27, rel=0.001)  # a tenth for high


def test_the_normal_lane_is_next_and_the_high_one_never() -> None:
    a_day = [lane(long=n / DAY_S) for n in (80, 40, 80)]
    found = pace(month(2_000, *a_day))
    assert found.normal_ms == pytest.approx(DAY_MS / 12, rel=0.001)
    assert found.low_ms == pytest.approx(
        DAY_MS / 2, rel=0.001
    )  # a fiftieth: never none


def test_what_waits_counts_as_spent() -> None:
    assert pace(month(2_000, lane(), lane(1_999, long=0))) == Pace()
    found = pace(month(2_000, lane(2_500), lane(long=1 / DAY_S)))
    assert found.ends_ms == NOW
    assert found.low_ms >= found.normal_ms > DAY_MS


@given(
    st.integers(-50, 10_000),
    st.lists(st.floats(0, 2), min_size=3, max_size=3),
    st.lists(st.integers(0, 20_000), min_size=3, max_size=3),
    st.floats(-1, 31),
)
def test_every_pace_is_one(
    left: int, long: list[float], waiting: list[int], age_d: float
) -> None:
    lanes = [lane(n, long=per_s) for n, per_s in zip(waiting, long, strict=True)]
    found = pace(month(left, *lanes, age_d=age_d))
    assert found.normal_ms >= 0
    assert found.low_ms >= found.normal_ms
    assert found.ends_ms == 0 or found.low_ms > 0
