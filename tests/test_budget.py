"""What Voucherify's headers teach, what is left to others, and who is slowed down."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis.asyncio

from relay.limits import parse_budget
from relay.queue import Claimed, Queue
from tests.queues import SIMULATED, Bench, Clock, event, result

pytestmark = pytest.mark.anyio

MINUTE_MS = 60_000
DAY_MS = 86_400_000

Make = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def make(redis_url: str, prefix: str) -> AsyncIterator[Make]:
    made: list[Bench] = []

    async def bench(
        budget: str = "90/1m", reserve: float = 0.2, egress: str = "all"
    ) -> Bench:
        queue = Queue(
            url=redis_url,
            prefix=prefix,
            budget=parse_budget(budget),
            reserve=reserve,
            egress=egress,
            scripts=SIMULATED,
            timeout=5.0,
        )
        clock = Clock(redis_url, prefix)
        if not made:
            await clock.set(clock.us)
        else:
            clock.us = made[0].clock.us
        made.append(Bench(queue, clock, redis.asyncio.Redis.from_url(redis_url)))
        return made[-1]

    yield bench
    for one in made:
        await one.balanced()
        await one.aclose()


async def answer(bench: Bench, *claimed: Claimed, limit: int, remaining: int) -> None:
    """All were delivered; the last answer says this of the plan."""
    told = {"limit": limit, "remaining": remaining}
    for one in claimed:
        await bench.settle(result(one, "delivered", signal="ok", **told))


async def taught(bench: Bench, *, limit: int, remaining: int) -> None:
    """One call, and what its answer says."""
    await bench.take(event())
    [one] = await bench.claim(1)
    await answer(bench, one, limit=limit, remaining=remaining)


async def others(bench: Bench, ms: int = MINUTE_MS) -> float:
    plan = f"{bench.queue.prefix}:plan:{bench.queue.egress}"
    return float(await bench.client.hget(plan, f"others:{ms}") or -1)


async def allowed(bench: Bench) -> int:
    """How many calls a minute may hold now."""
    await bench.clock.pass_ms(1_000)  # the gauges are written once a second
    return round(float((await bench.gauges())["budget_per_s"]) * 60)


async def in_a_window(bench: Bench, ms: int = MINUTE_MS) -> int:
    """How many calls a whole window gives, as fast as it gives them."""
    await bench.clock.pass_ms(ms + 100)
    await bench.take(*(event() for _ in range(100)))
    made = 0
    for _ in range(20):  # each twentieth of it
        claimed = await bench.claim(100)
        made += len(claimed)
        if claimed:
            await bench.settle(*(result(one, "delivered") for one in claimed))
        await bench.clock.pass_ms(ms // 20)
    return made


async def test_what_was_set_counts_until_voucherify_says_more(make: Make) -> None:
    assert await in_a_window(await make("90/1m")) == 90


@pytest.mark.parametrize(
    ("limit", "reserve", "calls"),
    [(100, 0.2, 80), (100, 0.0, 90), (60, 0.5, 30), (1_000, 0.2, 90), (2_000, 0, 90)],
)
async def test_the_reserve_of_a_known_plan_is_left_to_others(
    make: Make, limit: int, reserve: float, calls: int
) -> None:
    bench = await make("90/1m", reserve)
    await taught(bench, limit=limit, remaining=limit - 1)
    assert await in_a_window(bench) == calls
    gauges = await bench.gauges()
    assert float(gauges["budget_per_s"]) == pytest.approx(calls / 60, rel=0.001)


async def test_a_shared_plan_is_spent_evenly(make: Make) -> None:
    bench = await make("90/1m")
    await taught(bench, limit=100, remaining=99)
    await bench.clock.pass_ms(MINUTE_MS + 100)
    await bench.take(*(event() for _ in range(50)))
    tick = await bench.queue.tick("a", 50, look_out=False)
    assert len(tick.claimed) == 8
    again = await bench.queue.tick("a", 50, look_out=False)
    assert (again.claimed, again.wait_ms) == ([], 6_000)
    await bench.clock.pass_ms(6_000)
    assert len((await bench.queue.tick("a", 50, look_out=False)).claimed) == 8


async def test_what_others_use_is_left_to_them_and_fades(make: Make) -> None:
    bench = await make("90/1m")
    await taught(bench, limit=100, remaining=49)  # one was ours
    assert await others(bench) == 50
    # 50, a tenth more, and half the reserve stay free.
    assert await allowed(bench) == 100 - 65
    await bench.clock.pass_ms(5 * MINUTE_MS - 1_000)
    assert await others(bench) == 50  # as it was heard
    assert await allowed(bench) == 100 - 38  # 25, a tenth, and ten
    assert 100 - 38 <= await in_a_window(bench) <= 100 - 30


async def test_all_relays_of_an_address_obey_at_once(make: Make) -> None:
    first = await make("90/1m")
    second = await make("90/1m")
    await taught(first, limit=100, remaining=39)
    second.clock.us = first.clock.us
    assert await allowed(second) == 100 - 76
    other = await make("90/1m", egress="elsewhere")
    other.clock.us = second.clock.us
    assert await allowed(other) == 90  # it learns by itself


async def test_our_own_calls_are_nobody_elses(make: Make) -> None:
    bench = await make("90/1m")
    await bench.take(*(event() for _ in range(40)))
    claimed = await bench.claim(40)
    await answer(bench, *claimed, limit=100, remaining=60)
    assert await others(bench) == 0
    # A window that begins anew is not negative use, either.
    await bench.clock.pass_ms(MINUTE_MS)
    await taught(bench, limit=100, remaining=99)
    assert await others(bench) == 0


async def test_a_plan_that_is_nearly_spent_leaves_more_to_others(make: Make) -> None:
    bench = await make("90/1m")
    await taught(bench, limit=100, remaining=9)
    assert await others(bench) == 100  # 90 seen, 10 on top, and never above the plan
    assert await allowed(bench) == 1  # the least, or nobody would hear of its end
    assert await in_a_window(bench) <= 20  # two minutes later


async def test_without_a_reserve_nothing_more_is_left(make: Make) -> None:
    bench = await make("90/1m", 0.0)
    await taught(bench, limit=100, remaining=9)
    assert await others(bench) == 90
    assert await allowed(bench) == 10


async def test_once_in_a_window_is_enough(make: Make) -> None:
    bench = await make("90/1m")
    await bench.take(*(event() for _ in range(80)))
    claimed = await bench.claim(80)
    await answer(bench, *claimed[:1], limit=100, remaining=5)
    first = await others(bench)
    await answer(bench, *claimed[1:], limit=100, remaining=5)
    assert await others(bench) == pytest.approx(first, abs=0.01)
    await bench.clock.pass_ms(MINUTE_MS + 100)
    await taught(bench, limit=100, remaining=5)
    assert await others(bench) > first


@pytest.mark.parametrize(
    ("budget", "limit", "ms"),
    [
        ("4/5s, 90/1m, 95000/30d", 100, MINUTE_MS),
        ("4/5s, 90/1m, 95000/30d", 5, 5_000),
        ("4/5s, 90/1m, 95000/30d", 100_000, 30 * DAY_MS),
        ("4/5s", 100, MINUTE_MS),
        ("90/1m", 5, 5_000),
        ("1800/1m", 2_000, MINUTE_MS),
        ("90/1h", 100, 3_600_000),
        ("20/1m", 100, MINUTE_MS),
    ],
)
async def test_a_limit_is_of_the_window_that_was_set_for_it(
    make: Make, budget: str, limit: int, ms: int
) -> None:
    bench = await make(budget)
    await taught(bench, limit=limit, remaining=limit - 1)
    fields = await bench.client.hgetall(f"{bench.queue.prefix}:plan:all")
    assert fields[f"limit:{ms}".encode()] == str(limit).encode()
    assert len(fields) == 3


@pytest.mark.parametrize("kind", ["api_calls_cycle", "bulk_api_calls", "webhook_calls"])
async def test_a_limit_of_something_else_teaches_nothing(make: Make, kind: str) -> None:
    bench = await make()
    await bench.take(event())
    [one] = await bench.claim(1)
    told = {"limit": 10, "remaining": 0, "limit_type": kind}
    await bench.settle(result(one, "delivered", signal="ok", **told))
    assert not await bench.client.exists(f"{bench.queue.prefix}:plan:all")


async def test_without_a_budget_nothing_is_kept_back(make: Make) -> None:
    bench = await make("off")
    await taught(bench, limit=10, remaining=0)
    await bench.take(*(event() for _ in range(50)))
    assert len(await bench.claim(50)) == 50


async def test_a_narrower_window_waits_until_it_has_room(make: Make) -> None:
    bench = await make("90/1m")
    await bench.take(*(event() for _ in range(80)))
    claimed = await bench.claim(60)
    await answer(bench, claimed[0], limit=50, remaining=40)
    tick = await bench.queue.tick("a", 50, look_out=False)
    assert tick.claimed == []
    assert tick.wait_ms == MINUTE_MS + 100
    await bench.settle(*(result(one, "delivered") for one in claimed[1:]))


async def test_stats_tell_of_the_plan_and_of_the_end(make: Make) -> None:
    from relay.counters import stats

    bench = await make("4/5s, 90/1m")
    shown = await stats(bench.queue, minutes=0, days=0)
    assert (shown["plan"], shown["forecast"]) == ([], None)
    await taught(bench, limit=100, remaining=89)
    plan = (await stats(bench.queue, minutes=0, days=0))["plan"]
    assert isinstance(plan, list)
    [window] = plan
    assert {n: window[n] for n in ("window_s", "limit", "others")} == {
        "window_s": 60,
        "limit": 100,
        "others": 10,
    }


# --- a cycle that will not last -------------------------------------------------------


async def test_low_lanes_slow_down_before_the_calls_of_a_cycle_end(make: Make) -> None:
    from relay.counters import stats

    bench = await make("40/1d")
    await bench.gauges()
    for _ in range(24):  # 24 low ones an hour, and two high
        await bench.take(*(event(lane="low") for _ in range(24)))
        await bench.take(*(event(lane="high") for _ in range(2)))
        await bench.clock.pass_ms(3_600_000 // 2)
        await bench.gauges()
        claimed = await bench.claim(100)
        await bench.settle(*(result(one, "delivered") for one in claimed))
        await bench.clock.pass_ms(3_600_000 // 2)
    forecast = (await stats(bench.queue, minutes=0, days=0))["forecast"]
    assert isinstance(forecast, dict)
    assert forecast["window_s"] == 86_400
    assert forecast["low_every_s"] > 0
    minute = await bench.client.hgetall(f"{bench.queue.prefix}:totals")
    assert int(minute[b"delivered"]) <= 80


async def test_a_slow_lane_gives_one_at_a_time_and_is_waited_for(make: Make) -> None:
    bench = await make("off")
    lows = [event(lane="low", ttl_ms=2 * DAY_MS) for _ in range(3)]
    await bench.take(*lows, event(lane="high"))
    pace = f"{bench.queue.prefix}:pace"
    now_ms = bench.clock.us // 1000
    await bench.client.hset(pace, mapping={"low_ms": 10_000, "at_ms": now_ms})
    first = await bench.queue.tick("a", 10, look_out=False)
    assert sorted(one.lane for one in first.claimed) == ["high", "low"]
    again = await bench.queue.tick("a", 10, look_out=False)
    assert (again.claimed, again.wait_ms) == ([], 10_000)
    assert len(again.doorbell) == 3
    await bench.clock.pass_ms(10_000)
    assert len((await bench.queue.tick("a", 10, look_out=False)).claimed) == 1
    # Whoever set it is gone: it holds no more.
    await bench.clock.pass_ms(3_600_000)
    await bench.client.hset(pace, mapping={"low_ms": 10**9, "at_ms": now_ms})
    assert len((await bench.queue.tick("a", 10, look_out=False)).claimed) == 1


# --- probes ---------------------------------------------------------------------------


async def opened(bench: Bench) -> None:
    """A hold is on, and its probe is due."""
    await bench.take(event("victim"))
    [one] = await bench.claim(1)
    await bench.settle(result(one, "wait", signal="auth_hold", delay_ms=1_000))
    await bench.clock.pass_ms(5_000)


async def test_a_probe_is_an_event_that_may_be_sent_twice(make: Make) -> None:
    bench = await make("off")
    await opened(bench)
    paying = [event(f"p{n}", lane="high", delivery="at_most_once") for n in range(3)]
    await bench.take(*paying, event("plain", lane="high"), event("low", lane="low"))
    tick = await bench.queue.tick("a", 10, look_out=False)
    assert tick.probe
    assert [one.id for one in tick.claimed] == ["plain"]
    await bench.settle(result(tick.claimed[0], "delivered", signal="ok", probe=True))
    rest = await bench.claim(10)
    assert [one.id for one in rest if one.lane == "high"] == ["p0", "p1", "p2"]


async def test_a_probe_does_not_overtake_its_own_customer(make: Make) -> None:
    bench = await make("off")
    await opened(bench)
    await bench.take(
        event("ann1", customer="ann", delivery="at_most_once"),
        event("ann2", customer="ann"),
        event("bob", customer="bob"),
    )
    [probe] = (await bench.queue.tick("a", 10, look_out=False)).claimed
    assert probe.id == "bob"


async def test_where_all_pay_one_of_them_is_the_probe(make: Make) -> None:
    bench = await make("off")
    await opened(bench)
    await bench.take(event("p", lane="high", delivery="at_most_once"))
    [probe] = (await bench.queue.tick("a", 10, look_out=False)).claimed
    assert probe.id == "p"


# --- what is too old ------------------------------------------------------------------


async def look_out(bench: Bench, consumer: str = "a") -> None:
    tick = await bench.queue.tick(consumer, 0, look_out=True)
    assert tick.claimed == []


async def test_what_is_too_old_goes_also_while_nothing_may_be_sent(make: Make) -> None:
    bench = await make("off")
    await bench.queue.hold("by hand")
    await bench.take(*(event(f"{n}", ttl_ms=60_000) for n in range(250)))
    await bench.take(event("lives"), event("behind", ttl_ms=60_000))
    await bench.clock.pass_ms(60_000)
    await look_out(bench)
    assert await bench.dead() == []  # to the millisecond
    await bench.clock.pass_ms(1)
    await look_out(bench)
    letters = await bench.dead()
    assert [letter["id"] for letter in letters][:250] == [f"{n}" for n in range(250)]
    assert {letter["reason"] for letter in letters} == {"ttl"}
    await bench.queue.resume()
    assert [one.id for one in await bench.claim(10)] == ["lives"]


async def test_a_customer_behind_a_lane_goes_on_after_what_was_too_old(
    make: Make,
) -> None:
    bench = await make("off")
    await bench.take(
        event("a", customer="ann"),
        event("b", customer="ann", ttl_ms=60_000),
        event("c", customer="ann"),
    )
    [first] = await bench.claim(10)
    await bench.clock.pass_ms(60_001)
    await bench.queue.tick("a", 0, look_out=True, held=[first.place])
    assert [letter["id"] for letter in await bench.dead()] == ["b"]
    await bench.settle(result(first, "delivered"))
    assert [one.id for one in await bench.claim(10)] == ["c"]


async def test_a_lane_keeps_its_share_though_much_in_it_is_too_old(make: Make) -> None:
    bench = await make("off")
    old = [event(f"o{n}", lane="low", ttl_ms=60_000) for n in range(50)]
    hidden = event("first", lane="low")  # what is behind it is not swept at once
    await bench.take(hidden, *old, *(event(lane="low") for _ in range(20)))
    await bench.take(*(event(lane="high") for _ in range(200)))
    await bench.clock.pass_ms(60_001)
    lanes = []
    for _ in range(100):
        [one] = await bench.claim(1)
        lanes.append(one.lane)
        await bench.settle(result(one, "delivered"))
    assert lanes.count("low") == 10
