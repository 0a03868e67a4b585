"""Limits: their grammar, and the properties of the reference GCRA."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.limits import (
    CLOCK_SLACK_US,
    DEFAULT_LIMITS,
    DIMENSIONS,
    MAX_EVENT_QUOTA,
    Gcra,
    Limit,
    Window,
    parse_budget,
    parse_duration,
    parse_event_limit,
    parse_limits,
    policy_header,
)

NOW = 1_795_374_505_247_308  # a real clock in microseconds

limits = st.builds(
    Limit,
    dimension=st.sampled_from(DIMENSIONS),
    quota=st.integers(1, 1_000),
    window_s=st.integers(1, 3_600),
    burst=st.integers(1, 50),
    dry_run=st.just(False),
)


def ip(
    quota: int = 60, window_s: int = 60, burst: int = 3, *, dry_run: bool = False
) -> Limit:
    return Limit(
        dimension="ip", quota=quota, window_s=window_s, burst=burst, dry_run=dry_run
    )


def test_the_default_reads_as_the_three_documented_limits() -> None:
    assert parse_limits(DEFAULT_LIMITS) == (
        Limit(dimension="ip", quota=120, window_s=60, burst=60),
        Limit(dimension="customer", quota=60, window_s=60, burst=30),
        Limit(dimension="site", quota=20_000, window_s=60, burst=5_000),
    )


@pytest.mark.parametrize("text", ["", "  ", "off", " OFF "])
def test_no_limits_are_said_with_off_or_nothing(text: str) -> None:
    assert parse_limits(text) == ()


def test_the_burst_is_the_quota_when_it_is_left_out() -> None:
    assert parse_limits("customer=3/1d") == (
        Limit(dimension="customer", quota=3, window_s=86_400, burst=3),
    )


def test_dry_run_follows_the_rate_or_the_burst() -> None:
    first, second = parse_limits("ip=5/1s dry_run,site = 9/2h burst 4 dry_run")
    assert first == ip(5, 1, 5, dry_run=True)
    assert (second.window_s, second.burst, second.dry_run) == (7_200, 4, True)


@pytest.mark.parametrize(
    ("text", "part", "problem"),
    [
        ("ip", 1, "no dimension"),
        ("ip=5/1m,", 2, "no dimension"),
        ("ip=", 1, "no rate"),
        ("ip=5", 1, "no window"),
        ("ip=5/1m, zone=5/1m", 2, "ip, customer or site"),
        ("=5/1m", 1, "ip, customer or site"),
        ("ip=5/1m, ip=6/1m", 2, "already has a limit"),
        ("ip=x/1m", 1, "quota must be a whole number"),
        ("ip=-5/1m", 1, "quota must be a whole number"),
        ("ip=\u0665/1m", 1, "quota must be a whole number"),
        ("ip=0/1m", 1, "at least 1"),
        ("ip=5/1w", 1, "s, m, h or d"),
        ("ip=5/60", 1, "s, m, h or d"),
        ("ip=5/m", 1, "a whole number and a unit"),
        ("ip=5/0s", 1, "from 1 second to 366 days"),
        ("ip=5/367d", 1, "from 1 second to 366 days"),
        ("ip=100001/1s", 1, "at most 100000 a second"),
        ("ip=5/1m burst", 1, "burst must be a whole number"),
        ("ip=5/1m burst x", 1, "burst must be a whole number"),
        ("ip=5/1m burst 0", 1, "burst must be at least 1"),
        ("ip=1/366d burst 2", 1, "366 days of quota"),
        ("ip=5/1m dry_run burst 3", 1, "only `burst N` and then `dry_run`"),
        ("ip=5/1m brust 3", 1, "only `burst N` and then `dry_run`"),
    ],
)
def test_a_fault_names_the_part_and_shows_the_form(
    text: str, part: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        parse_limits(text)
    assert str(caught.value).startswith(f"limit {part}: ")
    assert str(caught.value).endswith('write it like "ip=120/1m burst 60"')


@given(st.text(max_size=60))
def test_no_text_breaks_the_parsers_and_no_fault_repeats_it(text: str) -> None:
    marker = "Zqx" + text
    for parse in (parse_limits, parse_budget, parse_duration, parse_event_limit):
        with pytest.raises(ValueError, match="write it like") as caught:
            parse(marker)
        assert "Zqx" not in str(caught.value)


def test_a_budget_is_several_windows() -> None:
    assert parse_budget("4/5s, 90/1m, 95000/30d") == (
        Window(quota=4, period_ms=5_000),
        Window(quota=90, period_ms=60_000),
        Window(quota=95_000, period_ms=2_592_000_000),
    )


@pytest.mark.parametrize("text", ["", "off", "unlimited", "Unlimited"])
def test_a_budget_can_be_unlimited(text: str) -> None:
    assert parse_budget(text) == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("4", "window 1: it has no window"),
        ("4/5s, x/1m", "window 2: the quota must be a whole number"),
        ("4/5s, 0/1m", "window 2: the quota must be at least 1"),
        ("4/5s 90/1m", "window 1: the time must be"),
        ("4/60s, 90/1m", "window 2: this window is already there"),
    ],
)
def test_a_faulty_budget_names_the_window(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "window", "dry_run"),
    [
        ("3/1d", Window(quota=3, period_ms=86_400_000), False),
        (" 1/10m  dry_run ", Window(quota=1, period_ms=600_000), True),
        ("1000/366d", Window(quota=1_000, period_ms=366 * 86_400_000), False),
    ],
)
def test_the_limit_of_an_event_is_one_window(
    text: str, window: Window, dry_run: bool
) -> None:
    assert parse_event_limit(text) == (window, dry_run)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it has no window"),
        ("3", "it has no window"),
        ("x/1d", "quota must be a whole number"),
        ("0/1d", "from 1 to 1000"),
        (f"{MAX_EVENT_QUOTA + 1}/1d", "from 1 to 1000: each use is kept"),
        ("3/0s", "from 1 second to 366 days"),
        ("3/367d", "from 1 second to 366 days"),
        ("3/1w", "s, m, h or d"),
        ("3/1d burst 5", "only `dry_run` may follow"),
        ("3/1d dry_run dry_run", "only `dry_run` may follow"),
        ("customer=3/1d", "quota must be a whole number"),
    ],
)
def test_a_faulty_limit_of_an_event_shows_the_form(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        parse_event_limit(text)
    assert str(caught.value).endswith('write it like "3/1d" or "3/1d dry_run"')


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("10m", 600), ("24h", 86_400), ("7d", 604_800), (" 0s ", 0)],
)
def test_durations_are_seconds(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


def test_the_policy_header_tells_bursts_and_hides_dry_runs() -> None:
    text = "ip=120/1m burst 60, customer=7/1m burst 1, site=10/1s dry_run"
    # 7 a minute is 8.57 s for one, and a window is whole seconds, never too short.
    assert policy_header(parse_limits(text)) == '"ip";q=60;w=30, "customer";q=1;w=9'
    assert policy_header(()) == ""


@given(limits)
def test_the_emission_is_never_faster_than_told(limit: Limit) -> None:
    assert limit.emission_us * limit.quota >= limit.window_s * 1_000_000
    assert (limit.emission_us - 1) * limit.quota < limit.window_s * 1_000_000
    assert limit.tolerance_us == limit.burst * limit.emission_us


@given(limits)
def test_an_idle_key_takes_exactly_its_burst_at_once(limit: Limit) -> None:
    gcra, admitted = Gcra([limit]), 0
    tats: tuple[int, ...] = (0,)
    while (verdict := gcra.check(tats, NOW, [1])).admitted:
        tats, admitted = verdict.tats, admitted + 1
    assert admitted == limit.burst
    assert verdict.wait_us == limit.emission_us


@given(limits, st.lists(st.integers(0, 5_000_000), min_size=1, max_size=60))
def test_no_interval_holds_more_than_a_burst_and_the_rate(
    limit: Limit, gaps: list[int]
) -> None:
    gcra, now = Gcra([limit]), NOW
    tats: tuple[int, ...] = (0,)
    admitted: list[int] = []
    for gap in gaps:
        now += gap
        verdict = gcra.check(tats, now, [1])
        tats = verdict.tats
        if verdict.admitted:
            admitted.append(now)
    for first, start in enumerate(admitted):
        for last in range(first, len(admitted)):
            elapsed = admitted[last] - start
            assert last - first + 1 <= limit.burst + elapsed // limit.emission_us


@given(limits, st.integers(-10_000_000_000, 10_000_000_000), st.integers(1, 5))
def test_the_wait_is_exact_to_the_microsecond(
    limit: Limit, offset: int, cost: int
) -> None:
    gcra, tats = Gcra([limit]), (NOW + offset,)
    verdict = gcra.check(tats, NOW, [cost])
    if verdict.admitted or cost > limit.burst:
        return
    # The stored number is what the cut leaves of it.
    kept = verdict.tats
    assert gcra.check(kept, NOW + verdict.wait_us, [cost]).admitted
    assert not gcra.check(kept, NOW + verdict.wait_us - 1, [cost]).admitted


@given(
    st.lists(limits, min_size=1, max_size=3),
    st.lists(st.integers(-100_000_000, 100_000_000), min_size=3, max_size=3),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
)
def test_all_limits_are_charged_or_none(
    several: list[Limit], offsets: list[int], costs: list[int]
) -> None:
    costs = costs[: len(several)]
    tats = tuple(NOW + offset for offset in offsets[: len(several)])
    together = Gcra(several).check(tats, NOW, costs)
    alone = [
        Gcra([limit]).check([tat], NOW, [cost])
        for limit, tat, cost in zip(several, tats, costs, strict=True)
    ]
    assert together.admitted == all(verdict.admitted for verdict in alone)
    assert together.wait_us == max(verdict.wait_us for verdict in alone)
    if together.admitted:
        assert together.tats == tuple(verdict.tats[0] for verdict in alone)
        assert together.dimension is None
    else:  # what is too far ahead is cut, and no more
        assert together.tats == tuple(
            min(tat, NOW + limit.tolerance_us + CLOCK_SLACK_US) if cost else tat
            for limit, tat, cost in zip(several, tats, costs, strict=True)
        )


@given(limits, st.integers(0, 10**15))
def test_a_clock_that_steps_back_blocks_for_five_seconds_more_at_most(
    limit: Limit, step: int
) -> None:
    written = Gcra([limit]).check((0,), NOW + step, [1]).tats
    verdict = Gcra([limit]).check(written, NOW, [1])
    assert verdict.wait_us <= CLOCK_SLACK_US + limit.emission_us


def test_the_wait_is_the_longest_one() -> None:
    slow = Limit(dimension="customer", quota=1, window_s=60, burst=1)
    full = NOW + 60_000_000
    for gcra in (Gcra([slow, ip(burst=1)]), Gcra([ip(burst=1), slow])):
        verdict = gcra.check((full, full), NOW, (1, 1))
        assert (verdict.wait_us, verdict.dimension) == (60_000_000, "customer")


def test_a_cost_of_nothing_leaves_a_limit_out() -> None:
    gcra = Gcra([ip(), Limit(dimension="customer", quota=1, window_s=60, burst=1)])
    full = NOW + 10**9
    verdict = gcra.check((0, full), NOW, (1, 0))
    assert verdict.admitted
    assert verdict.tats == (NOW + 1_000_000, full)


def test_a_dry_run_counts_what_it_would_refuse_and_refuses_nothing() -> None:
    gcra = Gcra([ip(burst=2, dry_run=True)])
    tats: tuple[int, ...] = (0,)
    verdicts = []
    for _ in range(5):
        verdict = gcra.check(tats, NOW, [1])
        tats = verdict.tats
        verdicts.append((verdict.admitted, verdict.would_refuse))
    assert verdicts == [(True, ())] * 2 + [(True, ("ip",))] * 3
    # It predicts enforcement: what it would refuse is not charged to it.
    assert tats == (NOW + 2_000_000,)


def test_a_dry_run_counts_what_another_limit_refuses_too() -> None:
    enforced = Limit(dimension="site", quota=1, window_s=60, burst=1)
    full = NOW + 10**9
    verdict = Gcra([ip(dry_run=True), enforced]).check((full, full), NOW, (1, 1))
    assert not verdict.admitted
    assert (verdict.dimension, verdict.would_refuse) == ("site", ("ip",))


def test_a_limit_that_exists_is_a_valid_one() -> None:
    with pytest.raises(ValueError, match="quota must be at least 1"):
        ip(quota=0)
    with pytest.raises(ValueError, match="ip, customer or site"):
        Limit(dimension="planet", quota=1, window_s=1, burst=1)
