"""What a commit counts for single events: coalescing, exact limits, uses of a token."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.limits import parse_limits
from relay.queue import (
    COALESCED,
    DUPLICATE,
    EVENT_LIMITED,
    LIMITED,
    NO_ROOM,
    QUEUED,
    USED_UP,
    Queue,
)
from relay.queueable import Queueable, Special
from tests.queues import SIMULATED, Bench, Clock, event, result
from tests.support import eventually

pytestmark = pytest.mark.anyio

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
DEDUPE_MS = 86_400_000  # the queue's default
MADE_ID_MS = 120_000
WINDOW_MS = 600_000

Make = Callable[..., Awaitable[Bench]]


def of(
    id: str = "",  # noqa: A002  # the wire's own name
    customer: str = "c",
    *,
    name: str = "n",
    coalesce_ms: int = 0,
    quota: int = 0,
    period_ms: int = DAY_MS,
    limit_dry: bool = False,
    token: str = "t",  # noqa: S107  # a digest
    uses: int = 0,
    life_ms: int = 60_000,
    token_dry: bool = False,
    **parts: object,
) -> Queueable:
    special: Special = (
        *(name, coalesce_ms, quota, period_ms, limit_dry),
        *(token, uses, life_ms, token_dry),
    )
    return event(id, customer=customer, name=name, special=special, **parts)  # type: ignore[arg-type]  # as there


@pytest.fixture
async def make(redis_url: str, prefix: str) -> AsyncIterator[Make]:
    made: list[Bench] = []

    async def bench(limits: str = "off", queue_max: int = 1_000_000) -> Bench:
        queue = Queue(
            url=redis_url,
            prefix=prefix,
            limits=parse_limits(limits),
            queue_max=queue_max,
            scripts=SIMULATED,
            timeout=5.0,
        )
        clock = Clock(redis_url, prefix)
        await clock.set(clock.us)
        made.append(Bench(queue, clock, redis.asyncio.Redis.from_url(redis_url)))
        return made[-1]

    yield bench
    for one in made:
        await one.balanced()
        await one.aclose()


@pytest.fixture
async def bench(make: Make) -> Bench:
    """One for all examples of a property, which tell themselves apart by names."""
    return await make()


async def noted(bench: Bench, counter: str) -> int:
    """A counter of the hours, added up over all of them."""
    pipe = bench.client.pipeline(transaction=False)
    for key in await bench.client.keys(f"{bench.queue.prefix}:hour:*"):
        pipe.hget(key, counter)
    return sum(int(found or 0) for found in await pipe.execute())


async def charged(bench: Bench, customer: str = "c") -> tuple[int, int]:
    """What the limit of the event, and the token, have been charged."""
    prefix = bench.queue.prefix
    return (
        await bench.client.llen(f"{prefix}:rl:event:n:{customer}"),
        int(await bench.client.get(f"{prefix}:uses:t") or 0),
    )


# --- coalesce ---------------------------------------------------------------------


async def test_the_last_one_takes_the_place_of_the_first(make: Make) -> None:
    bench = await make()
    taken = [of(f"{n}", coalesce_ms=WINDOW_MS, body=f'{{"n":{n}}}') for n in range(4)]
    await bench.codes(of("before", "d"))
    assert await bench.codes(*taken[:2]) == [QUEUED, COALESCED]
    assert await bench.codes(of("after", "e"), *taken[2:]) == [QUEUED] + [COALESCED] * 2
    claimed = await bench.claim()
    assert [c.id for c in claimed] == ["before", "3", "after"]
    assert claimed[1].body == '{"n":3}'
    assert (await bench.totals())["coalesced"] == 3
    assert await noted(bench, "event:n:coalesced") == 3
    await bench.settle(*(result(c, "delivered") for c in claimed))
    assert (await bench.totals())["delivered"] == 3


async def test_what_comes_after_the_call_waits_for_the_end_of_the_window(
    make: Make,
) -> None:
    bench = await make()
    assert await bench.codes(of("a", coalesce_ms=WINDOW_MS)) == [QUEUED]
    [first] = await bench.claim()
    await bench.settle(result(first, "delivered"))
    await bench.clock.pass_ms(WINDOW_MS - 5_000)
    # Once it is over there is one call more, with what came last.
    late = [of(n, coalesce_ms=WINDOW_MS) for n in "bcd"]
    assert await bench.codes(*late) == [QUEUED, COALESCED, COALESCED]
    assert await bench.claim() == []
    await bench.clock.pass_ms(5_000)
    [second] = await bench.claim()
    assert second.id == "d"
    # And the next window has begun with that call.
    assert await bench.codes(of("e", coalesce_ms=WINDOW_MS)) == [QUEUED]
    await bench.settle(result(second, "delivered"))
    assert await bench.claim() == []


async def test_a_retry_leaves_the_one_that_waits_alone(make: Make) -> None:
    bench = await make()
    await bench.codes(of("a", coalesce_ms=WINDOW_MS))
    [first] = await bench.claim()
    await bench.codes(*(of(n, coalesce_ms=WINDOW_MS) for n in "bc"))
    await bench.settle(result(first, "retry", delay_ms=1_000))
    await bench.clock.pass_ms(1_000)
    [again] = await bench.claim()
    assert again.id == "a"
    await bench.settle(result(again, "delivered"))
    await bench.clock.pass_ms(WINDOW_MS)
    [last] = await bench.claim()
    assert last.id == "c"


async def test_a_place_is_looked_into_also_after_a_group_was_lost(make: Make) -> None:
    bench = await make()
    await bench.take(event("x"))
    await bench.codes(of("d1", "dee", coalesce_ms=WINDOW_MS))
    first = await bench.claim()
    await bench.settle(
        *(result(c, "delivered") for c in first if c.id == "d1"),
        *(result(c, "retry", delay_ms=1) for c in first if c.id == "x"),
    )
    await bench.codes(*(of(n, "dee", coalesce_ms=WINDOW_MS) for n in ("d2", "d3")))
    await bench.clock.pass_ms(1)
    assert [c.id for c in await bench.claim()] == ["x"]
    # It is handed out anew, before whatever comes into the stream behind it.
    await bench.client.xgroup_destroy(f"{bench.queue.prefix}:q:retry", "relay")
    await bench.codes(*(of(n, "bob", coalesce_ms=WINDOW_MS) for n in ("b1", "b2")))
    await bench.clock.pass_ms(WINDOW_MS)
    taken: list[str] = []
    for _ in range(3):
        taken += [c.id for c in await bench.claim()]
    assert sorted(taken) == ["b2", "d3", "x"]


async def test_what_is_too_old_when_its_turn_comes_opens_no_window(make: Make) -> None:
    bench = await make()
    await bench.codes(of("a", coalesce_ms=WINDOW_MS, ttl_ms=60_000))
    await bench.clock.pass_ms(50_000)
    await bench.codes(of("b", coalesce_ms=WINDOW_MS, ttl_ms=60_000))
    await bench.clock.pass_ms(50_000)  # the place is too old, what it holds is not
    [claimed] = await bench.claim()
    assert claimed.id == "b"
    await bench.settle(result(claimed, "delivered"))
    await bench.clock.pass_ms(WINDOW_MS)
    await bench.codes(of("c", coalesce_ms=WINDOW_MS, ttl_ms=60_000))
    await bench.clock.pass_ms(60_001)
    assert await bench.claim() == []
    assert [letter["id"] for letter in await bench.dead()] == ["c"]
    await bench.codes(of("d", coalesce_ms=WINDOW_MS))
    assert [c.id for c in await bench.claim()] == ["d"]


async def test_a_window_that_a_clock_left_far_ahead_ends_as_a_new_one_would(
    make: Make,
) -> None:
    bench = await make()
    await bench.codes(of("a", coalesce_ms=WINDOW_MS))
    [first] = await bench.claim()
    await bench.settle(result(first, "delivered"))
    await bench.clock.pass_ms(-HOUR_MS)
    await bench.codes(of("b", coalesce_ms=WINDOW_MS))
    await bench.clock.pass_ms(WINDOW_MS)
    assert [c.id for c in await bench.claim()] == ["b"]


async def test_a_place_waits_for_as_long_as_a_hold_lasts(make: Make) -> None:
    bench = await make()
    longest = 30 * DAY_MS
    key = f"{bench.queue.prefix}:coalesce:c:n"
    await bench.codes(of("a", coalesce_ms=longest, ttl_ms=2 * longest))
    assert await bench.client.pttl(key) == -1
    await bench.claim()
    assert longest - 10_000 < await bench.client.pttl(key) <= longest
    await bench.codes(of("b", coalesce_ms=longest, ttl_ms=2 * longest))
    assert await bench.client.pttl(key) == -1


async def test_who_waits_for_an_outcome_hears_that_a_later_one_came(make: Make) -> None:
    bench = await make()
    first, second, third = (of(n, coalesce_ms=WINDOW_MS) for n in "abc")
    for one, after in ((first, second), (second, third)):
        await bench.queue.expect(one[2], 5)
        await bench.codes(one, after)
        told = await bench.queue.outcome(one[2], 1)
        assert told == {"outcome": "coalesced", "reason": "coalesced"}


async def test_the_longest_period_is_kept_to_the_millisecond(make: Make) -> None:
    bench = await make()
    year = 366 * DAY_MS
    assert await bench.codes(of(quota=1, period_ms=year)) == [QUEUED]
    reply = await bench.take(of(quota=1, period_ms=year))
    assert reply.codes == [EVENT_LIMITED, year * 1000]


async def test_a_person_who_waits_in_anothers_place_is_erased_from_it(
    make: Make,
) -> None:
    """The events are one customer's; only the last one names this id as well."""
    bench = await make()
    await bench.codes(of("a", coalesce_ms=WINDOW_MS, body='{"customer":{"id":"c"}}'))
    await bench.codes(of("b", coalesce_ms=WINDOW_MS, body='{"customer":{"id":"ann"}}'))
    step = await bench.queue.forget("normal", "", 10, "ann", '"ann"')
    assert step.erased == 1
    assert (await bench.totals())["dropped"] == 1
    assert await bench.client.exists(f"{bench.queue.prefix}:coalesce:c:n") == 0
    await bench.codes(of("c", coalesce_ms=WINDOW_MS))
    assert [c.id for c in await bench.claim()] == ["c"]


async def test_customers_and_events_have_windows_of_their_own(make: Make) -> None:
    bench = await make()
    events = [
        of(customer=who, name=name, coalesce_ms=WINDOW_MS)
        for who in "ab"
        for name in "mn"
    ]
    assert await bench.codes(*events) == [QUEUED] * 4
    assert await bench.codes(*events) == [COALESCED] * 4
    # An event of the same name that asks for no window is in none.
    assert await bench.codes(of(customer="a", name="n", quota=9)) == [QUEUED]


async def test_a_coalesced_id_is_a_duplicate_when_it_comes_again(make: Make) -> None:
    bench = await make()
    first, second = (of(n, coalesce_ms=WINDOW_MS) for n in "ab")
    assert await bench.codes(first, second) == [QUEUED, COALESCED]
    assert await bench.codes(second, first) == [DUPLICATE] * 2
    # Also when it was sent, or the catalogue has no window any more.
    await bench.claim()
    assert await bench.codes(second) == [DUPLICATE]
    assert await bench.codes(event("b", customer="c", name="n")) == [DUPLICATE]
    # Another's id is not taken.
    assert await bench.codes(of("b", "d", coalesce_ms=WINDOW_MS)) == [QUEUED]
    await bench.clock.pass_ms(DEDUPE_MS - 1)
    assert await bench.codes(second) == [DUPLICATE]
    await bench.clock.pass_ms(1)
    assert await bench.codes(event("b", customer="c", name="n")) == [QUEUED]


async def test_a_coalesced_event_without_an_id_is_forgotten_as_soon_as_others(
    make: Make,
) -> None:
    bench = await make()
    made = of(coalesce_ms=WINDOW_MS)
    again = event(made[2].id, customer="c", name="n")
    assert await bench.codes(of(coalesce_ms=WINDOW_MS), made) == [QUEUED, COALESCED]
    await bench.clock.pass_ms(MADE_ID_MS - 1)
    assert await bench.codes(again) == [DUPLICATE]
    # As when it is queued.
    await bench.clock.pass_ms(1)
    assert await bench.codes(again) == [QUEUED]


async def test_what_is_coalesced_is_charged_nowhere(make: Make) -> None:
    bench = await make(limits="customer=50/1m burst 50")
    events = [of(coalesce_ms=WINDOW_MS, quota=2, uses=2) for _ in range(5)]
    assert await bench.codes(*events) == [QUEUED] + [COALESCED] * 4
    assert await charged(bench) == (1, 1)
    reply = await bench.take(event(customer="c"))
    assert reply.remaining == 48  # two of fifty: the first one and this


# --- the limit of an event --------------------------------------------------------


async def test_the_wait_is_that_of_the_oldest_and_right_to_the_millisecond(
    make: Make,
) -> None:
    bench = await make()
    assert await bench.codes(of(quota=2)) == [QUEUED]
    await bench.clock.pass_ms(HOUR_MS)
    assert await bench.codes(of(quota=2)) == [QUEUED]
    reply = await bench.take(of(quota=2))
    assert reply.codes == [EVENT_LIMITED, (DAY_MS - HOUR_MS) * 1000]
    await bench.clock.pass_ms(DAY_MS - HOUR_MS - 1)
    assert (await bench.take(of(quota=2))).codes == [EVENT_LIMITED, 1_000]
    await bench.clock.pass_ms(1)
    reply = await bench.take(of(quota=2), of(quota=2))
    assert reply.codes == [QUEUED, 0, EVENT_LIMITED, HOUR_MS * 1000]
    assert await noted(bench, "reason:rate_limited_event") == 3
    assert await noted(bench, "event:n:rate_limited") == 3
    assert (await bench.totals())["rate_limited"] == 3


async def test_customers_and_events_have_limits_of_their_own(make: Make) -> None:
    bench = await make()
    events = [of(customer=who, name=name, quota=1) for who in "ab" for name in "mn"]
    assert await bench.codes(*events) == [QUEUED] * 4
    assert await bench.codes(*events) == [EVENT_LIMITED] * 4


@pytest.mark.parametrize("quota", [1, 3, 1_000])
async def test_a_whole_quota_may_come_at_once(make: Make, quota: int) -> None:
    bench = await make()
    events = [of(quota=quota) for _ in range(quota + 2)]
    assert await bench.codes(*events) == [QUEUED] * quota + [EVENT_LIMITED] * 2
    assert (await charged(bench))[0] == quota
    left = await bench.client.pttl(f"{bench.queue.prefix}:rl:event:n:c")
    assert DAY_MS - 60_000 < left <= DAY_MS


async def test_another_quota_counts_what_was_taken_before(make: Make) -> None:
    bench = await make()
    assert await bench.codes(of(quota=3), of(quota=3)) == [QUEUED] * 2
    assert await bench.codes(of(quota=2)) == [EVENT_LIMITED]
    assert await bench.codes(*(of(quota=5) for _ in range(4))) == [
        *[QUEUED] * 3,
        EVENT_LIMITED,
    ]


# Most of them near the limit, some over it; and steps back of up to two days.
STEPS_MS = [0, 1, 60_000, HOUR_MS, 7 * HOUR_MS, DAY_MS // 3, DAY_MS - 1, DAY_MS]
BACK_MS = [1, 1_000, HOUR_MS, 5 * HOUR_MS, 2 * DAY_MS]


@pytest.mark.parametrize("seed", range(4))
async def test_no_day_has_more_than_the_limit_whatever_the_clock_does(
    make: Make, seed: int
) -> None:
    bench = await make()
    rng = random.Random(seed)
    # By a clock that never steps back: days that the server's lives twice are two.
    true: list[int] = []
    now_ms = 0
    for _ in range(250):
        step = rng.choice(STEPS_MS)
        now_ms += step
        back = rng.choice(BACK_MS) if rng.random() < 0.06 else 0
        await bench.clock.pass_ms(step - back)
        codes = await bench.codes(*(of(quota=3) for _ in range(rng.randint(1, 3))))
        assert set(codes) <= {QUEUED, EVENT_LIMITED}
        true += [now_ms] * codes.count(QUEUED)
    assert max(sum(at <= t < at + DAY_MS for t in true) for at in true) == 3
    assert len(true) >= 20


@pytest.mark.parametrize("back_ms", [1, 1_000, HOUR_MS, 10 * DAY_MS])
async def test_the_wait_told_is_right_after_the_clock_stepped_back(
    make: Make, back_ms: int
) -> None:
    bench = await make()
    assert await bench.codes(of(quota=1)) == [QUEUED]
    await bench.clock.pass_ms(-back_ms)
    [code, wait_us] = (await bench.take(of(quota=1))).codes
    assert code == EVENT_LIMITED
    assert wait_us <= DAY_MS * 1000
    await bench.clock.pass_ms(wait_us // 1000)
    assert (await bench.take(of(quota=1))).codes == [QUEUED, 0]


async def test_a_small_step_back_makes_no_old_use_a_new_one(make: Make) -> None:
    bench = await make()
    for _ in range(2):
        assert await bench.codes(of(quota=2)) == [QUEUED]
        await bench.clock.pass_ms(23 * HOUR_MS)
    await bench.clock.pass_ms(-23 * HOUR_MS - 1_000)
    # Only the second one lies ahead of the clock now: the first counts as before.
    reply = await bench.take(of(quota=2))
    assert reply.codes == [EVENT_LIMITED, (HOUR_MS + 1_000) * 1000]
    await bench.clock.pass_ms(HOUR_MS + 1_000)
    assert await bench.codes(of(quota=2), of(quota=2)) == [QUEUED, EVENT_LIMITED]


async def test_the_wait_told_is_right_for_general_limits_too(make: Make) -> None:
    bench = await make(limits="customer=60/1m burst 1")
    assert await bench.codes(event(customer="c")) == [QUEUED]
    await bench.clock.pass_ms(-HOUR_MS)
    [code, wait_us] = (await bench.take(event(customer="c"))).codes
    assert code == LIMITED
    assert wait_us <= 6_000_000  # five seconds and what one event costs
    await bench.clock.set(bench.clock.us + wait_us)
    assert await bench.codes(event(customer="c")) == [QUEUED]


HISTORIES = st.lists(
    st.tuples(st.sampled_from(STEPS_MS), st.integers(1, 4), st.integers(0, 1)),
    min_size=1,
    max_size=15,
)
HYPOTHESIS = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_runs = iter(range(1_000_000))


@HYPOTHESIS
@given(quota=st.integers(1, 4), history=HISTORIES)
async def test_a_trial_counts_exactly_what_the_limit_would_refuse(
    bench: Bench, quota: int, history: list[tuple[int, int, int]]
) -> None:
    run = next(_runs)
    refused, before = 0, await noted(bench, "would_refuse:event")
    for step, many, who in history:
        await bench.clock.pass_ms(step)
        customer = f"{run}-{who}"
        trial = [
            of(customer=customer, name="trial", quota=quota, limit_dry=True)
            for _ in range(many)
        ]
        real = [of(customer=customer, quota=quota) for _ in range(many)]
        assert await bench.codes(*trial) == [QUEUED] * many
        refused += (await bench.codes(*real)).count(EVENT_LIMITED)
    assert await noted(bench, "would_refuse:event") - before == refused


async def test_a_repeat_is_a_duplicate_also_over_the_limit(make: Make) -> None:
    bench = await make()
    assert await bench.codes(of("a", quota=1)) == [QUEUED]
    assert await bench.codes(of("a", quota=1)) == [DUPLICATE]
    assert await bench.codes(of("b", quota=1)) == [EVENT_LIMITED]
    # What was refused is not known: its sender may repeat it later.
    await bench.clock.pass_ms(DAY_MS)
    assert await bench.codes(of("b", quota=1)) == [QUEUED]


# --- uses of a token --------------------------------------------------------------


async def test_so_many_are_taken_and_then_the_token_is_used_up(make: Make) -> None:
    bench = await make()
    codes = await bench.codes(*(of(f"{n}", uses=3) for n in range(5)))
    assert codes == [QUEUED] * 3 + [USED_UP] * 2
    # A repeat of what was taken is none, also when nothing is left.
    assert await bench.codes(*(of(f"{n}", uses=3) for n in range(5))) == [
        *[DUPLICATE] * 3,
        *[USED_UP] * 2,
    ]
    # Under another name or for another customer it is the same token.
    assert await bench.codes(of(name="m", uses=3), of(customer="d", uses=3)) == [
        *[USED_UP] * 2
    ]
    assert await bench.codes(of(uses=3, token="other")) == [QUEUED]
    assert (await bench.totals())["unauthenticated"] == 6
    assert await noted(bench, "reason:token_used_up") == 6
    assert await noted(bench, "event:n:unauthenticated") == 5
    assert await charged(bench) == (0, 3)


async def test_what_is_not_queued_charges_no_use(make: Make) -> None:
    bench = await make(limits="ip=1/1h burst 1", queue_max=4)
    assert await bench.codes(of("a", uses=9)) == [QUEUED]
    assert await bench.codes(of("b", uses=9)) == [LIMITED]
    assert await bench.codes(of("a", "d", uses=9), ip="2") == [QUEUED]
    assert await bench.codes(of("a", "d", uses=9), ip="3") == [DUPLICATE]
    assert await charged(bench) == (0, 2)
    each = {"coalesce_ms": WINDOW_MS, "quota": 1, "uses": 9}
    assert await bench.codes(of("e", **each), ip="4") == [QUEUED]  # type: ignore[arg-type]  # whole numbers
    assert await bench.codes(of("f", **each), ip="5") == [COALESCED]  # type: ignore[arg-type]  # likewise
    assert await bench.codes(of("g", quota=1, uses=9), ip="6") == [EVENT_LIMITED]
    assert await charged(bench) == (1, 3)
    assert await bench.codes(of("h", uses=9), ip="7") == [QUEUED]
    assert await bench.codes(of("i", uses=9), ip="8") == [NO_ROOM]
    assert await charged(bench) == (1, 4)


async def test_a_used_up_token_charges_neither_limit_nor_window(make: Make) -> None:
    bench = await make(limits="customer=50/1m burst 50")
    assert await bench.codes(of(uses=1)) == [QUEUED]
    spent = [of(uses=1, quota=1, coalesce_ms=WINDOW_MS) for _ in range(3)]
    assert await bench.codes(*spent) == [USED_UP] * 3
    assert await charged(bench) == (0, 1)
    assert not await bench.client.exists(f"{bench.queue.prefix}:coalesce:c:n")
    reply = await bench.take(of(uses=5, token="u", quota=1, coalesce_ms=WINDOW_MS))
    assert (reply.codes, reply.remaining) == ([QUEUED, 0], 48)


@HYPOTHESIS
@given(uses=st.integers(1, 4), sizes=st.lists(st.integers(1, 4), max_size=6))
async def test_a_trial_counts_exactly_what_the_token_would_refuse(
    bench: Bench, uses: int, sizes: list[int]
) -> None:
    run = next(_runs)
    refused, before = 0, await noted(bench, "would_refuse:token")
    for many in sizes:
        trial = [
            of(token=f"trial-{run}", uses=uses, token_dry=True) for _ in range(many)
        ]
        real = [of(token=f"real-{run}", uses=uses) for _ in range(many)]
        assert await bench.codes(*trial) == [QUEUED] * many
        refused += (await bench.codes(*real)).count(USED_UP)
    assert await noted(bench, "would_refuse:token") - before == refused


@pytest.mark.parametrize("uses", [1, 7, 30])
async def test_writers_at_once_never_let_one_more_through(
    make: Make, uses: int
) -> None:
    bench, other = await make(), await make()

    async def writer(n: int) -> list[int]:
        codes: list[int] = []
        for seq in range(1, 11):
            events = [of(f"{n}-{seq}-{k}", uses=uses) for k in range(2)]
            [reply] = await (bench, other)[n % 2].commit(
                [("ip", events)], slot=f"writer-{n}", seq=seq
            )
            codes += reply.codes[::2]
        return codes

    codes = [c for one in await asyncio.gather(*map(writer, range(4))) for c in one]
    assert len(codes) == 80
    assert (codes.count(QUEUED), codes.count(USED_UP)) == (uses, 80 - uses)
    assert await charged(bench) == (0, uses)


async def test_two_writers_with_one_id_have_it_taken_and_charged_once(
    make: Make,
) -> None:
    bench, other = await make(), await make()
    for n in range(20):
        request = [("ip", [of(f"{n}", uses=99, quota=99)])]
        replies = await asyncio.gather(
            bench.commit(request, slot="one"), other.commit(request, slot="two")
        )
        assert sorted(reply.codes[0] for [reply] in replies) == [QUEUED, DUPLICATE]
    assert await charged(bench) == (20, 20)


async def test_the_count_is_forgotten_with_its_token(make: Make) -> None:
    bench = await make()
    key = f"{bench.queue.prefix}:uses:t"
    await bench.codes(of(uses=9, life_ms=90_000))
    assert 80_000 < await bench.client.pttl(key) <= 90_000
    await bench.codes(of(uses=9, life_ms=40_000))  # later: it has less to live
    assert 30_000 < await bench.client.pttl(key) <= 40_000
    await bench.codes(of(uses=2, life_ms=90_000))  # refused: nothing changes
    assert await bench.client.pttl(key) <= 40_000
    await bench.codes(of(uses=9, life_ms=50))

    async def forgotten() -> bool:
        return not await bench.client.exists(key)

    await eventually(forgotten)


# --- all together -----------------------------------------------------------------


@pytest.mark.parametrize("code", [QUEUED, COALESCED, EVENT_LIMITED, USED_UP])
async def test_a_repeated_commit_takes_effect_once(make: Make, code: int) -> None:
    bench = await make()
    special = {
        QUEUED: {"quota": 3, "uses": 3, "coalesce_ms": WINDOW_MS},
        COALESCED: {"coalesce_ms": WINDOW_MS, "quota": 3, "uses": 3},
        EVENT_LIMITED: {"quota": 1, "uses": 3},
        USED_UP: {"quota": 3, "uses": 1},
    }[code]
    if code != QUEUED:
        await bench.codes(of("before", **special))  # type: ignore[arg-type]  # whole numbers
    request = [("ip", [of("again", **special)])]  # type: ignore[arg-type]  # likewise
    first = await bench.commit(request, slot="w", seq=1)
    assert first[0].codes[0] == code
    after = (await charged(bench), await bench.totals())
    assert after[0] == (1, 1)
    for _ in range(2):
        assert await bench.commit(request, slot="w", seq=1) == first
    assert (await charged(bench), await bench.totals()) == after


async def test_what_was_counted_for_an_event_does_not_follow_it(make: Make) -> None:
    bench = await make()
    await bench.codes(of("a", quota=2, uses=2, coalesce_ms=WINDOW_MS))
    [claimed] = await bench.claim()
    await bench.settle(result(claimed, "retry", delay_ms=1_000))
    await bench.clock.pass_ms(1_000)
    [again] = await bench.claim()
    assert again.id == "a"
    await bench.settle(result(again, "delivered"))
    assert await charged(bench) == (1, 1)
    assert (await bench.totals())["delivered"] == 1


@dataclass(slots=True)
class Model:
    """The same rules in plain Python, for a clock that only goes forward."""

    now_ms: int = 0
    seen: dict[tuple[str, str], int] = field(default_factory=dict)  # since when
    windows: set[str] = field(default_factory=set)
    taken: dict[str, list[int]] = field(default_factory=dict)
    used: int = 0

    def admit(
        self,
        id: str,  # noqa: A002  # the wire's own name
        customer: str,
        *,
        coalesce: bool,
        quota: int,
        uses: int,
    ) -> tuple[int, int]:
        if self.seen.get((customer, id), -DEDUPE_MS) > self.now_ms - DEDUPE_MS:
            return DUPLICATE, 0
        if coalesce and customer in self.windows:
            self.seen[customer, id] = self.now_ms
            return COALESCED, 0
        recent = [
            at for at in self.taken.get(customer, []) if at > self.now_ms - DAY_MS
        ]
        if quota and len(recent) >= quota:
            return EVENT_LIMITED, (recent[-quota] + DAY_MS - self.now_ms) * 1000
        if uses and self.used >= uses:
            return USED_UP, 0
        self.seen[customer, id] = self.now_ms
        if coalesce:
            self.windows.add(customer)
        if quota:
            self.taken.setdefault(customer, []).append(self.now_ms)
        if uses:
            self.used += 1
        return QUEUED, 0


ASKED = st.fixed_dictionaries(
    {
        "id": st.sampled_from("0123456789"),
        "customer": st.sampled_from("ab"),
        "coalesce": st.booleans() | st.just(value=False),
        "quota": st.sampled_from([0, 2, 3]),
        "uses": st.sampled_from([0, 4, 5]),
    }
)


@HYPOTHESIS
@given(
    commits=st.lists(
        st.tuples(st.sampled_from(STEPS_MS), st.lists(ASKED, min_size=1, max_size=5)),
        min_size=1,
        max_size=8,
    )
)
async def test_the_script_decides_as_the_rules_say(
    bench: Bench, commits: list[tuple[int, list[dict[str, object]]]]
) -> None:
    run, model = next(_runs), Model()
    for step, asked in commits:
        await bench.clock.pass_ms(step)
        model.now_ms += step
        expected: list[int] = []
        events: list[Queueable] = []
        for one in asked:
            expected += model.admit(**one)  # type: ignore[arg-type]  # as drawn
            events.append(
                of(
                    str(one["id"]),
                    f"{run}-{one['customer']}",
                    coalesce_ms=WINDOW_MS if one["coalesce"] else 0,
                    quota=int(str(one["quota"])),
                    uses=int(str(one["uses"])),
                    token=f"{run}",
                )
            )
        assert (await bench.take(*events)).codes == expected
