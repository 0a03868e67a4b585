"""The queue's scripts, on every server that the relay supports."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from secrets import token_hex
from typing import cast

import pytest
import redis.asyncio
import redis.exceptions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.errors import QueueUnavailable, RelayError
from relay.limits import Gcra, Limit, Window, parse_budget, parse_limits
from relay.outcomes import DEAD, Outcome
from relay.queue import (
    DUPLICATE,
    LIMITED,
    NO_ROOM,
    QUEUED,
    Queue,
    Scripts,
    _judge,
    _reason,
    connect,
)
from tests.queues import SIMULATED, START_S, Bench, Clock, event, result

pytestmark = pytest.mark.anyio

Make = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def make(redis_url: str, prefix: str) -> AsyncIterator[Make]:
    made: list[Bench] = []

    async def bench(limits: str = "off", budget: str = "off", **more: object) -> Bench:
        queue = Queue(
            url=redis_url,
            prefix=prefix,
            limits=parse_limits(limits),
            budget=parse_budget(budget),
            scripts=SIMULATED,
            timeout=5.0,
            **more,  # type: ignore[arg-type]  # the queue's own keywords
        )
        clock = Clock(redis_url, prefix)
        await clock.set(clock.us)
        made.append(Bench(queue, clock, redis.asyncio.Redis.from_url(redis_url)))
        made[-1].url = redis_url
        return made[-1]

    yield bench
    for one in made:
        await one.balanced()
        await one.queue.aclose()
        await one.clock.aclose()
        await one.client.aclose()


# --- commit -----------------------------------------------------------------------


async def test_events_are_queued_in_their_order(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"), event("2"))
    await bench.take(event("3"))
    assert [c.id for c in await bench.claim()] == ["1", "2", "3"]


async def test_a_senders_id_counts_once_and_ours_are_never_compared(make: Make) -> None:
    bench = await make()
    assert await bench.codes(event("x"), event("x"), event(), event()) == [
        QUEUED,
        DUPLICATE,
        QUEUED,
        QUEUED,
    ]
    assert await bench.codes(event("x")) == [DUPLICATE]
    assert await bench.totals() == {"received": 5, "duplicate": 2}


async def test_an_id_that_we_made_is_known_when_its_sender_repeats_it(
    make: Make,
) -> None:
    bench = await make()
    made = event()
    again = event(made[2].id, customer=made[2].customer)
    assert await bench.codes(made) == [QUEUED]
    assert await bench.codes(again) == [DUPLICATE]
    await bench.clock.pass_ms(119_999)
    assert await bench.codes(again) == [DUPLICATE]
    # Not for longer, or page views of anybody would fill Redis with days of them.
    await bench.clock.pass_ms(1)
    assert await bench.codes(again) == [QUEUED]
    assert await bench.client.pttl(f"{bench.queue.prefix}:made") <= 240_000


async def test_an_id_is_known_for_its_window_wherever_it_stands(make: Make) -> None:
    minute_ms = 60_000
    bench = await make(dedupe_ms=60 * minute_ms)
    keys = [f"{bench.queue.prefix}:seen{which}" for which in ("", ":before", ":oldest")]
    first, middle, late = event("first"), event("middle"), event("late")

    async def fields() -> list[int]:
        return [await bench.client.hlen(key) for key in keys]

    assert await bench.codes(first) == [QUEUED]
    assert await bench.client.pttl(keys[0]) > 89 * minute_ms
    await bench.clock.pass_ms(30 * minute_ms - 1)
    assert await bench.codes(first, middle) == [DUPLICATE, QUEUED]
    assert await fields() == [3, 0, 0]
    await bench.clock.pass_ms(1)
    assert await bench.codes(first, middle, late) == [DUPLICATE, DUPLICATE, QUEUED]
    assert await fields() == [2, 3, 0]
    await bench.clock.pass_ms(30 * minute_ms - 1)
    assert await bench.codes(first, middle, late) == [DUPLICATE] * 3
    # Over to the millisecond, though it still stands there.
    await bench.clock.pass_ms(1)
    assert await bench.codes(first, middle, first) == [QUEUED, DUPLICATE, DUPLICATE]
    assert await fields() == [2, 2, 3]
    await bench.clock.pass_ms(30 * minute_ms - 2)
    assert await bench.codes(middle, late) == [DUPLICATE] * 2
    await bench.clock.pass_ms(1)
    assert await bench.codes(first, middle, late) == [DUPLICATE, QUEUED, DUPLICATE]
    # Nothing is kept of what is older than all three.
    await bench.clock.pass_ms(1)
    assert await bench.codes(first, middle, late) == [DUPLICATE, DUPLICATE, QUEUED]
    assert await fields() == [2, 3, 2]


async def test_ids_stay_known_when_the_clock_steps_back(make: Make) -> None:
    bench = await make(dedupe_ms=60_000)
    before = event("before")
    assert await bench.codes(before) == [QUEUED]
    await bench.clock.pass_ms(-3_600_000)
    assert await bench.codes(before) == [DUPLICATE]
    assert await bench.codes(event("after")) == [QUEUED]
    await bench.clock.pass_ms(59_999)
    assert await bench.codes(before, event("after")) == [DUPLICATE] * 2


async def test_more_ids_than_a_command_takes_are_compared(make: Make) -> None:
    bench = await make(limits="customer=9/1h")
    many = [event(f"{n}") for n in range(4_500)]
    assert await bench.codes(*many) == [QUEUED] * len(many)
    assert await bench.codes(*many) == [DUPLICATE] * len(many)


async def test_nobody_can_take_the_id_of_anothers_event(make: Make) -> None:
    bench = await make()
    assert await bench.codes(event("order-1", customer="mallory")) == [QUEUED]
    assert await bench.codes(event("order-1", customer="alice")) == [QUEUED]
    assert await bench.codes(event("order-1", customer="alice")) == [DUPLICATE]


async def test_a_limit_admits_its_burst_then_its_rate(make: Make) -> None:
    bench = await make(limits="ip=60/1m burst 3")
    assert await bench.codes(*(event() for _ in range(4))) == [QUEUED] * 3 + [LIMITED]
    reply = await bench.take(event())
    assert reply.codes == [LIMITED, 1_000_000]  # one a second: wait for one
    await bench.clock.pass_ms(999)
    assert await bench.codes(event()) == [LIMITED]
    await bench.clock.pass_ms(1)
    assert await bench.codes(event()) == [QUEUED]
    assert await bench.codes(event(), ip="another") == [QUEUED]


async def test_a_limit_holds_when_its_hash_becomes_the_one_before(make: Make) -> None:
    bench = await make(limits="customer=2/1h burst 2")
    span_ms = 3_605_000  # as long as a time can matter, and 5 s
    key = f"{bench.queue.prefix}:limit:customer"

    async def fields(of: str) -> set[str]:
        names = cast("list[bytes]", await bench.client.hkeys(of))
        return {name.decode() for name in names} - {""}

    assert await bench.codes(event(customer="first")) == [QUEUED]
    await bench.clock.pass_ms(span_ms - 1_000)
    twice = [event(customer="late") for _ in range(2)]
    assert await bench.codes(*twice) == [QUEUED] * 2
    assert await fields(key) == {"first", "late"}
    assert await bench.client.pttl(key) > span_ms
    await bench.clock.pass_ms(1_000)
    assert await bench.codes(event(customer="next")) == [QUEUED]
    assert await fields(key) == {"next"}
    assert await fields(f"{key}:before") == {"first", "late"}
    # Half an hour for one, and it has had two a second ago.
    assert await bench.codes(event(customer="late")) == [LIMITED]
    await bench.clock.pass_ms(1_799_000)
    assert await bench.codes(event(customer="late"), event(customer="late")) == [
        QUEUED,
        LIMITED,
    ]
    assert await fields(key) == {"next", "late"}
    await bench.clock.pass_ms(span_ms)
    assert await bench.codes(event(customer="next")) == [QUEUED]
    assert await fields(f"{key}:before") == {"next", "late"}


async def test_a_limit_that_refuses_writes_nothing(make: Make) -> None:
    bench = await make(limits="ip=1/1h burst 1")
    await bench.take(event())
    key = f"{bench.queue.prefix}:limit:ip"
    before = await bench.client.hgetall(key)
    assert len(before) == 2
    await bench.clock.pass_ms(1_000)
    assert await bench.codes(event(), event()) == [LIMITED] * 2
    assert await bench.client.hgetall(key) == before


async def test_a_limit_is_begun_anew_by_a_clock_that_steps_back(make: Make) -> None:
    bench = await make(limits="ip=1/1m burst 1")
    assert await bench.codes(event()) == [QUEUED]
    await bench.clock.pass_ms(-3_600_000)
    # Not for an hour more, but for a minute and 5 s.
    assert (await bench.take(event())).codes == [LIMITED, 65_000_000]
    await bench.clock.pass_ms(65_000)
    assert await bench.codes(event()) == [QUEUED]
    since = await bench.client.hget(f"{bench.queue.prefix}:limit:ip", "")
    assert int(since or 0) <= bench.clock.us // 1000


async def test_several_limits_charge_all_or_none(make: Make) -> None:
    bench = await make(limits="ip=1/1m burst 2, customer=1/1m burst 1")
    assert await bench.codes(event(customer="a")) == [QUEUED]
    # Refused by the customer's limit: the address is not charged for it.
    for _ in range(5):
        assert await bench.codes(event(customer="a")) == [LIMITED + 1]
    assert await bench.codes(event(customer="b")) == [QUEUED]
    assert await bench.codes(event(customer="c")) == [LIMITED]


async def test_a_duplicate_is_not_charged(make: Make) -> None:
    bench = await make(limits="ip=1/1m burst 2")
    assert await bench.codes(event("x"), event("x"), event("y")) == [
        QUEUED,
        DUPLICATE,
        QUEUED,
    ]


async def test_a_dry_run_limit_counts_and_refuses_nothing(make: Make) -> None:
    bench = await make(limits="ip=1/1m burst 1 dry_run")
    assert await bench.codes(event(), event(), event()) == [QUEUED] * 3
    assert (await windows(bench))["would_refuse:ip"] == "2"


async def test_the_tightest_limit_is_told(make: Make) -> None:
    bench = await make(limits="ip=60/1m burst 5, customer=60/1m burst 3")
    reply = await bench.take(event())
    assert (reply.dimension, reply.remaining, reply.reset_us) == (1, 2, 1_000_000)


async def test_a_full_queue_refuses_without_receiving(make: Make) -> None:
    bench = await make(queue_max=2)
    assert await bench.codes(event("1"), event("2"), event("3")) == [0, 0, NO_ROOM]
    assert await bench.totals() == {"received": 2}
    [first, _] = await bench.claim()
    await bench.settle(result(first, "delivered"))
    assert await bench.codes(event("3")) == [QUEUED]


async def test_a_repeated_commit_takes_effect_once(make: Make) -> None:
    bench = await make(limits="ip=1/1m burst 3")
    requests = [("ip", [event("1"), event()])]
    first = await bench.commit(requests, seq=7_000_001)
    assert await bench.commit(requests, seq=7_000_001) == first
    assert await bench.totals() == {"received": 2}
    assert len(await bench.claim()) == 2


async def test_a_straggling_commit_changes_nothing(make: Make) -> None:
    bench = await make()
    await bench.commit([("ip", [event("new")])], seq=7_000_002)
    with pytest.raises(QueueUnavailable) as caught:
        await bench.commit([("ip", [event("old")])], seq=7_000_001)
    assert caught.value.reason == "redis_timeout"
    assert [c.id for c in await bench.claim()] == ["new"]


async def test_refusals_of_the_edge_ride_along(make: Make) -> None:
    bench = await make()
    refused = [
        ("invalid", "customer_missing", "signup", 3),
        ("forbidden", "origin", "", 2),
    ]
    await bench.queue.commit("w:0", 1, [], refused)
    assert await bench.totals() == {"received": 5, "invalid": 3, "forbidden": 2}
    counted = await windows(bench)
    assert counted["event:signup:invalid"] == "3"
    assert counted["reason:customer_missing"] == "3"
    assert counted["reason:origin"] == "2"


async def test_minute_and_hour_are_civil_time(make: Make) -> None:
    bench = await make()
    for seconds, minute in [
        (1_709_209_500, "202402291225"),  # a leap day
        (1_735_689_599, "202412312359"),
        (1_735_689_600, "202501010000"),
        (4_102_444_799, "209912312359"),
    ]:
        await bench.clock.set(seconds * 1_000_000)
        await bench.take(event(name="n"))
        counted = await bench.queue.hash(f"minute:{minute}")
        assert counted["event:n:received"] == "1", minute
        assert await bench.queue.hash(f"hour:{minute[:10]}")
    key = f"{bench.queue.prefix}:minute:209912312359"
    assert 0 < await bench.client.pttl(key) <= 72 * 3_600_000


async def test_event_names_are_bounded_and_the_frequent_ones_kept(make: Make) -> None:
    bench = await make()
    for n in range(30):
        await bench.take(*(event(name="real") for _ in range(20)))
        await bench.take(*(event(name=f"junk-{n}-{i}") for i in range(100)))
    counted = await windows(bench)
    names = {f.split(":")[1] for f in counted if f.startswith("event:")}
    assert counted["event:real:received"] == "600"
    assert "other" in names
    assert len(names) < 400
    assert await bench.client.zcard(f"{bench.queue.prefix}:names") == 1000


async def test_a_long_name_is_counted_under_a_short_one(make: Make) -> None:
    bench = await make()
    await bench.take(event(name="😀" * 300), event(name="é" * 300))
    names = [f for f in await windows(bench) if f.startswith("event:")]
    assert len(names) == 2
    assert all(len(name.encode()) <= 64 + 9 + len("event::received") for name in names)


# Now and then long enough for a limit's hash to become the one before.
PAUSE = st.one_of(st.integers(0, 3_000_000), st.integers(0, 90_000_000))
COST = st.tuples(PAUSE, st.integers(1, 4), st.integers(1, 4))


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    quotas=st.lists(
        st.tuples(st.integers(1, 90), st.integers(1, 9)), min_size=1, max_size=3
    ),
    steps=st.lists(COST, min_size=1, max_size=12),
)
async def test_lua_and_the_reference_gcra_decide_alike(
    valkey_url: str, quotas: list[tuple[int, int]], steps: list[tuple[int, int, int]]
) -> None:
    limits = tuple(
        Limit(dimension=name, quota=quota, window_s=60, burst=burst)
        for name, (quota, burst) in zip(
            ("ip", "customer", "site"), quotas, strict=False
        )
    )
    prefix = f"gcra-{token_hex(8)}"
    queue = Queue(url=valkey_url, prefix=prefix, limits=limits, scripts=SIMULATED)
    clock = Clock(valkey_url, prefix)
    model = Gcra(limits)
    tats: dict[str, int] = {}
    try:
        for n, (us, ip, customer) in enumerate(steps, start=1):
            await clock.set(clock.us + us)
            asked = (str(ip), [event(customer=str(customer))])
            [reply] = await queue.commit("w:0", n, [asked], [])
            keys = [
                {"ip": f"ip{ip}", "customer": f"c{customer}"}.get(d.dimension, "s")
                for d in limits
            ]
            check = model.check(
                [tats.get(k, 0) for k in keys], clock.us, [1] * len(keys)
            )
            assert (reply.codes[0] == QUEUED) == check.admitted
            assert reply.codes[1] == check.wait_us
            tats.update(zip(keys, check.tats, strict=True))
    finally:
        await queue.aclose()
        await clock.aclose()


# --- tick ---------------------------------------------------------------------------


async def test_lanes_are_served_by_priority_and_none_starves(make: Make) -> None:
    bench = await make()
    for lane in ("low", "normal", "high"):
        await bench.take(*(event(lane=lane) for _ in range(60)))
    order = [c.lane for c in await bench.claim(40)]
    assert order.count("high") > 30
    assert order.count("normal") >= 3
    assert order.count("low") >= 3


async def test_the_budget_is_never_passed_in_any_window(make: Make) -> None:
    bench = await make(budget="4/5s, 10/1m")
    await bench.take(*(event() for _ in range(100)))
    sent: list[int] = []
    for _ in range(400):
        sent += [bench.clock.us // 1000] * len(await bench.claim())
        await bench.clock.pass_ms(500)
    for quota, window in ((4, 5_000), (10, 60_000)):
        for first in sent:
            assert sum(first <= at < first + window for at in sent) <= quota
    # 200 s of 10 a minute: as much as is allowed, not only less than that.
    assert len(sent) >= 33


async def test_forwarders_with_different_settings_see_each_others_calls(
    make: Make,
) -> None:
    wide, narrow = await make(budget="5/5s"), await make(budget="4/5s")
    await wide.take(*(event() for _ in range(20)))
    assert len(await wide.claim()) == 5
    assert await narrow.claim() == []


async def test_two_forwarders_share_one_budget(make: Make) -> None:
    bench = await make(budget="4/5s")
    await bench.take(*(event() for _ in range(20)))
    first = await bench.claim(3, consumer="a")
    second = await bench.claim(3, consumer="b")
    assert (len(first), len(second)) == (3, 1)
    tick = await bench.queue.tick("b", 3, look_out=False)
    assert (tick.claimed, tick.wait_ms) == ([], 5_100)


async def test_a_clock_that_steps_back_does_not_block_the_budget(make: Make) -> None:
    bench = await make(budget="4/5s")
    await bench.take(*(event() for _ in range(20)))
    await bench.claim()
    await bench.clock.pass_ms(-3_600_000)
    assert await bench.claim() == []  # those calls were just made, for all we know
    await bench.clock.pass_ms(5_100)
    assert len(await bench.claim()) == 4


async def test_an_event_past_its_time_expires_visibly_and_costs_no_call(
    make: Make,
) -> None:
    bench = await make(budget="1/1h")
    await bench.take(event("old", ttl_ms=1_000), event("young"))
    await bench.clock.pass_ms(1_001)
    assert [c.id for c in await bench.claim()] == ["young"]
    [dead] = await bench.dead()
    assert (dead["id"], dead["outcome"], dead["reason"]) == ("old", "expired", "ttl")
    assert (await bench.totals())["expired"] == 1


async def test_idle_is_told_with_the_place_to_wait_at(make: Make) -> None:
    bench = await make()
    tick = await bench.queue.tick("a", 5, look_out=False)
    assert (tick.claimed, tick.wait_ms, len(tick.doorbell)) == ([], -1, 3)
    await bench.take(event("1"))
    await bench.queue.doorbell(tick.doorbell, 30_000)  # returns at once
    assert [c.id for c in await bench.claim()] == ["1"]


async def test_a_lost_group_is_made_again_and_nothing_is_skipped(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"))
    await bench.client.xgroup_destroy(f"{bench.queue.prefix}:q:normal", "relay")
    assert [c.id for c in await bench.claim()] == ["1"]


# --- settle -------------------------------------------------------------------------


async def test_a_delivered_event_leaves_nothing_behind(make: Make) -> None:
    bench = await make()
    await bench.take(event("1", name="signup"))
    [claimed] = await bench.claim()
    assert await bench.settle(result(claimed, "delivered", signal="ok")) == 1
    assert await bench.totals() == {"received": 1, "delivered": 1}
    assert (await windows(bench))["event:signup:delivered"] == "1"
    assert await bench.client.xlen(f"{bench.queue.prefix}:q:normal") == 0


async def test_an_event_is_settled_once(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"))
    [claimed] = await bench.claim()
    assert await bench.settle(result(claimed, "delivered")) == 1
    assert await bench.settle(result(claimed, "retry", delay_ms=1)) == 0
    assert await bench.settle(result(claimed, "rejected")) == 0
    assert await bench.totals() == {"received": 1, "delivered": 1}


async def test_a_retry_waits_its_time_and_counts_its_attempts(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"), event("2"))
    first, second = await bench.claim()
    await bench.settle(
        result(first, "retry", delay_ms=2_000), result(second, "wait", delay_ms=3_000)
    )
    tick = await bench.queue.tick("a", 5, look_out=False)
    assert (tick.claimed, tick.wait_ms) == ([], 2_000)
    await bench.clock.pass_ms(2_000)
    [again] = await bench.claim()
    assert (again.id, again.attempts, again.lane) == ("1", 1, "retry")
    await bench.clock.pass_ms(1_000)
    [again] = await bench.claim()
    assert (again.id, again.attempts) == ("2", 0)  # a 429 spends no attempt


async def test_a_retry_beyond_its_time_expires_now(make: Make) -> None:
    bench = await make()
    await bench.take(event("1", ttl_ms=10_000))
    [claimed] = await bench.claim()
    await bench.settle(result(claimed, "retry", reason="upstream_503", delay_ms=10_001))
    [dead] = await bench.dead()
    assert (dead["outcome"], dead["reason"], dead["attempts"]) == (
        "expired",
        "upstream_503",
        "1",
    )


@pytest.mark.parametrize("outcome", sorted(DEAD))
async def test_a_dead_letter_keeps_the_whole_event(
    make: Make, outcome: Outcome
) -> None:
    bench = await make()
    await bench.take(event("1", name="n", customer="digest", body='{"event":"n"}'))
    [claimed] = await bench.claim()
    await bench.settle(
        result(claimed, str(outcome), reason="why", status=400, error='{"key":"k"}')
    )
    [dead] = await bench.dead()
    received = dead.pop("received_ms")
    assert received == str(START_S * 1000)
    assert dead == {
        "id": "1",
        "event": "n",
        "outcome": str(outcome),
        "reason": "why",
        "status": "400",
        "error": '{"key":"k"}',
        "attempts": "0",
        "lane": "normal",
        "delivery": "at_least_once",
        "customer": "digest",
        "ttl_ms": "3600000",
        "doubted_ms": "",
        "replay_of": "",
        "body": '{"event":"n"}',
    }
    assert (await windows(bench))["reason:why"] == "1"


async def test_retries_leave_half_the_calls_to_the_rest(make: Make) -> None:
    bench = await make()
    await bench.take(*(event() for _ in range(20)))
    claimed = await bench.claim(20)
    await bench.settle(*(result(c, "retry") for c in claimed))
    await bench.take(*(event() for _ in range(20)))
    lanes = [c.lane for c in await bench.claim(20)]
    assert lanes.count("retry") == 10


async def test_a_pause_stops_every_forwarder_until_told(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"), event("2"))
    [first] = await bench.claim(1)
    await bench.settle(result(first, "wait", delay_ms=9_000, pause_ms=9_000))
    tick = await bench.queue.tick("b", 5, look_out=False)
    assert (tick.claimed, tick.wait_ms) == ([], 9_000)
    await bench.clock.pass_ms(9_000)
    assert {c.id for c in await bench.claim(consumer="b")} == {"1", "2"}


# --- holds --------------------------------------------------------------------------


async def test_a_hold_keeps_the_queue_probes_with_one_and_ends_by_itself(
    make: Make,
) -> None:
    bench = await make()
    await bench.take(*(event() for _ in range(5)))
    [first] = await bench.claim(1)
    await bench.settle(result(first, "wait", reason="unauthorized", signal="auth_hold"))
    assert await bench.claim() == []
    assert (await bench.gauges())["hold"] == "auth_hold"
    await bench.clock.pass_ms(5_000)
    tick = await bench.queue.tick("a", 10, look_out=False)
    assert (len(tick.claimed), tick.probe) == (1, True)
    assert await bench.claim(consumer="b") == []  # one probe at a time
    [probe] = tick.claimed
    await bench.settle(result(probe, "wait", signal="auth_hold", probe=True))
    await bench.clock.pass_ms(9_999)  # twice as long by now
    assert await bench.claim() == []
    await bench.clock.pass_ms(1)
    [probe] = await bench.claim()
    await bench.settle(result(probe, "delivered", signal="ok", probe=True))
    assert len(await bench.claim()) == 2
    await bench.clock.pass_ms(30_000)  # the two that had met the hold come last
    assert len(await bench.claim()) == 2
    assert (await bench.gauges())["hold"] == ""


async def test_a_hold_by_hand_stops_every_forwarder_and_every_probe(
    make: Make,
) -> None:
    bench = await make()
    await bench.take(*(event() for _ in range(3)))
    [first] = await bench.claim(1)
    since_ms, reason, automatic = await bench.queue.hold("Ana")
    assert (since_ms, reason, automatic) == (bench.clock.us // 1000, "Ana", "")
    assert (await bench.gauges())["hold"] == "by_hand"
    for consumer in ("a", "b"):
        tick = await bench.queue.tick(consumer, 5, look_out=False)
        assert (tick.claimed, tick.wait_ms, tick.probe) == ([], 1_000, False)
    # What was on its way finishes, and its success lifts nothing.
    await bench.settle(result(first, "delivered", signal="ok"))
    await bench.clock.pass_ms(86_400_000 // 48)
    assert await bench.claim() == []
    assert await bench.queue.hold("Bo") == (since_ms, "Bo", "")
    assert await bench.queue.resume() == (since_ms, "Bo", "")
    assert await bench.queue.resume() == (0, "", "")
    assert len(await bench.claim()) == 2
    assert (await bench.gauges())["hold"] == ""


async def test_a_hold_by_hand_and_an_automatic_one_do_not_lift_each_other(
    make: Make,
) -> None:
    bench = await make()
    await bench.take(*(event() for _ in range(3)))
    first, second = await bench.claim(2)
    await bench.queue.hold("")
    await bench.settle(result(first, "wait", signal="auth_hold"))
    assert (await bench.gauges())["hold"] == "by_hand"
    assert (await bench.queue.hash("flow"))["hold"] == "auth_hold"
    await bench.clock.pass_ms(3_600_000)
    assert await bench.claim() == []  # however long the probe is due
    assert (await bench.queue.resume())[2] == "auth_hold"
    assert (await bench.gauges())["hold"] == "auth_hold"
    tick = await bench.queue.tick("a", 5, look_out=False)
    assert (len(tick.claimed), tick.probe) == (1, True)
    await bench.settle(result(second, "delivered"))
    await bench.settle(result(tick.claimed[0], "delivered", signal="ok", probe=True))
    assert (await bench.gauges())["hold"] == ""


async def test_to_resume_makes_an_automatic_hold_probe_at_once(make: Make) -> None:
    bench = await make()
    await bench.take(event(), event())
    [first] = await bench.claim(1)
    await bench.settle(result(first, "wait", signal="config_hold"))
    assert await bench.claim() == []
    assert await bench.queue.resume() == (0, "", "config_hold")
    assert len(await bench.claim()) == 1


async def test_a_clock_that_steps_back_takes_the_hold_by_hand_with_it(
    make: Make,
) -> None:
    bench = await make()
    await bench.claim()
    since_ms, *_ = await bench.queue.hold("")
    await bench.clock.pass_ms(-60_000)
    await bench.claim()
    assert (await bench.queue.resume())[0] == since_ms - 60_000


async def test_a_settle_that_is_repeated_says_nothing_new(make: Make) -> None:
    bench = await make()
    await bench.take(event(), event())
    [failed] = await bench.claim(1)
    answer = result(failed, "retry", signal="failed", delay_ms=1_000)
    for _ in range(6):
        await bench.settle(answer)
    assert (await bench.gauges())["hold"] == ""
    assert (await bench.queue.hash("flow"))["failures"] == "1"


async def test_a_spent_plan_is_asked_again_each_hour(make: Make) -> None:
    bench = await make()
    await bench.take(event(ttl_ms=10 * 86_400_000))
    [first] = await bench.claim()
    month = 20 * 86_400_000
    await bench.settle(result(first, "wait", signal="plan_hold", pause_ms=month))
    await bench.clock.pass_ms(3_599_000)
    assert await bench.claim() == []
    await bench.clock.pass_ms(1_000)  # the plan may have been raised meanwhile
    assert len(await bench.claim()) == 1


async def test_unrelated_holds_do_not_make_a_sound_event_rejected(make: Make) -> None:
    bench = await make()
    await bench.take(event("unlucky"))
    for hold in ("auth_hold", "plan_hold", "config_hold", "auth_hold", "plan_hold"):
        await bench.clock.pass_ms(600_000)
        tick = await bench.queue.tick("a", 1, look_out=False)
        [claimed] = tick.claimed
        await bench.settle(result(claimed, "wait", signal=hold, probe=tick.probe))
    assert await bench.dead() == []


async def test_a_hundred_poisonous_events_hold_the_good_ones_up_for_minutes_not_days(
    make: Make,
) -> None:
    bench = await make(budget="4/5s")
    await bench.take(*(event(f"bad-{n}") for n in range(100)))
    await bench.take(*(event(f"good-{n}") for n in range(20)))
    delivered_at: dict[str, int] = {}
    begin = bench.clock.us
    while bench.clock.us - begin < 6 * 3_600 * 1_000_000:
        tick = await bench.queue.tick("a", 4, look_out=False)
        for c in tick.claimed:
            if c.id.startswith("bad"):
                answer = result(
                    c, "wait", status=403, signal="auth_hold", probe=tick.probe
                )
            else:
                answer = result(c, "delivered", signal="ok", probe=tick.probe)
                delivered_at[c.id] = bench.clock.us
            await bench.settle(answer)
        if len(delivered_at) == 20:
            break
        await bench.clock.pass_ms(max(500, min(tick.wait_ms, 5_000)))
    assert len(delivered_at) == 20
    assert max(delivered_at.values()) - begin < 3_600 * 1_000_000


async def test_answers_from_before_a_hold_do_not_prolong_it(make: Make) -> None:
    bench = await make()
    await bench.take(*(event() for _ in range(4)))
    claimed = await bench.claim()
    await bench.settle(*(result(c, "wait", signal="auth_hold") for c in claimed))
    await bench.clock.pass_ms(5_000)
    assert len(await bench.claim()) == 1


async def test_one_poisonous_event_cannot_hold_the_rest_for_ever(make: Make) -> None:
    bench = await make()
    await bench.take(event("poison"))
    for n in range(60):
        await bench.take(event(f"good-{n}"))
        for c in await bench.claim(1):
            if c.id == "poison":
                tick_probe = (await bench.queue.hash("flow")).get("hold") is not None
                answer = result(
                    c,
                    "wait",
                    reason="forbidden",
                    status=403,
                    signal="auth_hold",
                    delay_ms=1_000,
                    probe=tick_probe,
                )
            else:
                answer = result(c, "delivered", signal="ok")
            await bench.settle(answer)
        await bench.clock.pass_ms(5_000)
    [dead] = await bench.dead()
    assert (dead["id"], dead["outcome"], dead["status"]) == (
        "poison",
        "rejected",
        "403",
    )


async def test_five_failures_in_a_row_open_the_breaker_and_one_success_closes_it(
    make: Make,
) -> None:
    bench = await make()
    await bench.take(*(event() for _ in range(8)))
    for _ in range(4):
        [claimed] = await bench.claim(1)
        await bench.settle(result(claimed, "retry", signal="failed", delay_ms=600_000))
    [claimed] = await bench.claim(1)
    await bench.settle(
        result(
            claimed, "retry", reason="upstream_503", signal="failed", delay_ms=600_000
        )
    )
    assert await bench.claim() == []
    assert (await bench.gauges())["hold"] == "breaker_open"
    await bench.clock.pass_ms(1_000)
    [probe] = await bench.claim()
    await bench.settle(result(probe, "delivered", signal="ok", probe=True))
    assert len(await bench.claim()) == 2


# --- dead forwarders ------------------------------------------------------------------


async def live_on(bench: Bench, ms: int, consumer: str = "b") -> None:
    """Let time pass while this forwarder goes on asking."""
    while ms > 0:
        step = min(ms, 5_000)
        await bench.clock.pass_ms(step)
        await bench.claim(0, consumer=consumer)
        ms -= step


async def test_what_a_dead_forwarder_had_is_taken_over_by_its_rule(make: Make) -> None:
    bench = await make()
    await bench.take(
        event("plain"),
        event("paying-unsent", delivery="at_most_once"),
        event("paying-sent", delivery="at_most_once"),
    )
    _, _, sent = await bench.claim(consumer="dead")
    assert await bench.queue.mark("dead", [sent]) == [True]
    await live_on(bench, 20_000)
    assert await bench.claim(consumer="b", look_out=True) == []
    await live_on(bench, 1)
    taken = await bench.claim(consumer="b", look_out=True)
    assert {c.id for c in taken} == {"plain", "paying-unsent"}
    [dead] = await bench.dead()
    assert (dead["id"], dead["outcome"], dead["reason"]) == (
        "paying-sent",
        "ambiguous",
        "worker_died",
    )


async def test_a_take_over_needs_no_budget_and_respects_the_time_to_live(
    make: Make,
) -> None:
    bench = await make(budget="1/1h")
    await bench.take(event("1"))
    await bench.claim(1, consumer="dead")
    await bench.take(event("2", ttl_ms=1_000))
    await live_on(bench, 21_000)
    assert await bench.claim(consumer="b", look_out=True) == []
    assert (await bench.gauges())["in_flight"] == "0"  # back, to wait for its turn


async def test_a_live_forwarder_keeps_what_it_has(make: Make) -> None:
    bench = await make()
    await bench.take(event("slow"))
    [slow] = await bench.claim(consumer="slow")
    for _ in range(10):
        await bench.clock.pass_ms(8_000)
        assert await bench.claim(0, consumer="slow", look_out=True, held=[slow]) == []
        assert await bench.claim(consumer="b", look_out=True) == []


async def test_what_was_handed_out_with_a_lost_answer_comes_back_soon(
    make: Make,
) -> None:
    bench = await make()
    await bench.take(event("known"), event("lost"))
    [known] = await bench.claim(1)
    await bench.claim(1)  # the forwarder never got this answer
    again = await bench.claim(5, look_out=True, held=[known])
    assert [c.id for c in again] == ["lost"]


async def test_a_forwarder_that_lost_its_event_can_do_nothing_with_it(
    make: Make,
) -> None:
    bench = await make()
    await bench.take(event("1", delivery="at_most_once"))
    [stalled] = await bench.claim(consumer="stalled")
    await live_on(bench, 21_000)
    [taken] = await bench.claim(consumer="b", look_out=True)
    assert await bench.queue.mark("stalled", [stalled]) == [False]
    failed = result(stalled, "rejected", signal="auth_hold")
    assert await bench.settle(failed, consumer="stalled") == 0
    assert (await bench.gauges())["hold"] == ""  # nor is its word heard
    assert await bench.queue.mark("b", [taken]) == [True]
    assert await bench.settle(result(taken, "delivered"), consumer="b") == 1


async def test_an_event_that_kills_its_forwarders_is_set_aside(make: Make) -> None:
    bench = await make()
    await bench.take(event("killer"))
    for n in range(5):
        assert len(await bench.claim(consumer=f"w{n}")) == 1
        await live_on(bench, 21_000, consumer="watch")
        await bench.claim(0, consumer="watch", look_out=True)
    assert await bench.claim(consumer="w5") == []
    [dead] = await bench.dead()
    assert (dead["outcome"], dead["reason"]) == ("expired", "worker_died")


async def test_after_an_outage_everyone_gets_the_time_to_be_heard_again(
    make: Make,
) -> None:
    bench = await make()
    await bench.take(event("1"), event("2"))
    [first] = await bench.claim(1, consumer="a")
    await bench.claim(1, consumer="gone")
    await bench.clock.pass_ms(60_000)  # Redis was away for all of them
    assert await bench.claim(consumer="fresh", look_out=True) == []
    await bench.claim(0, consumer="a", look_out=True, held=[first])
    # The amnesty itself lasts by the server's clock; here it is over at once.
    await bench.client.delete(f"{bench.queue.prefix}:amnesty")
    taken = await bench.claim(consumer="fresh", look_out=True)
    assert [c.id for c in taken] == ["2"]


async def test_an_amnesty_is_not_prolonged(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"))
    await bench.claim(1, consumer="dead")
    left = []
    for _ in range(3):  # a lone forwarder that is heard every eleven seconds
        await bench.clock.pass_ms(11_000)
        await bench.claim(0, consumer="b", look_out=True)
        left.append(await bench.client.pttl(f"{bench.queue.prefix}:amnesty"))
    assert sorted(left, reverse=True) == left


async def test_an_amnesty_does_not_outlive_a_step_back_of_the_clock(
    make: Make,
) -> None:
    bench = await make()
    await bench.claim(0)
    # Redis lets a key live until a moment, which the step has put an hour further.
    key = f"{bench.queue.prefix}:amnesty"
    await bench.client.set(key, "", px=3_620_000)
    await bench.clock.pass_ms(-3_600_000)
    await bench.claim(0)
    assert 0 < await bench.client.pttl(key) <= 20_000


async def test_an_event_marked_as_sent_is_not_handed_out_as_new(make: Make) -> None:
    bench = await make()
    await bench.take(event("paying", delivery="at_most_once"))
    [claimed] = await bench.claim()
    await bench.queue.mark("a", [claimed])
    # The group is lost, and with it what was in flight; the mark is not.
    await bench.client.xgroup_destroy(f"{bench.queue.prefix}:q:normal", "relay")
    assert await bench.claim() == []
    [dead] = await bench.dead()
    assert (dead["outcome"], dead["reason"]) == ("ambiguous", "claimed_again")


async def test_a_clock_that_steps_back_holds_nothing_up(make: Make) -> None:
    bench = await make()
    await bench.take(event("retry"), event("hold"), event("dead"))
    retried, held = await bench.claim(2)
    await bench.claim(1, consumer="dead")
    await bench.settle(result(retried, "retry", delay_ms=2_000))
    await bench.settle(result(held, "wait", signal="auth_hold", pause_ms=4_000))
    await bench.clock.pass_ms(-86_400_000)
    await bench.claim(0, consumer="b")
    await live_on(bench, 35_000)
    await bench.client.delete(f"{bench.queue.prefix}:amnesty")
    [probe] = await bench.claim(consumer="b", look_out=True)
    answer = result(probe, "delivered", signal="ok", probe=True)
    await bench.settle(answer, consumer="b")
    rest = await bench.claim(consumer="b", look_out=True, held=[probe])
    assert {probe.id, *(c.id for c in rest)} == {"retry", "hold", "dead"}


# --- reap ---------------------------------------------------------------------------


async def test_gauges_tell_what_waits_and_for_how_long(make: Make) -> None:
    bench = await make(budget="4/5s")
    await bench.take(*(event() for _ in range(10)))
    claimed = await bench.claim(3)
    await bench.settle(result(claimed[0], "retry", delay_ms=60_000))
    await bench.settle(result(claimed[1], "rejected"))
    await bench.clock.pass_ms(7_000)
    gauges = await bench.gauges()
    assert {
        name: gauges[name]
        for name in ("queued", "in_flight", "delayed", "dead", "unaccounted", "spooled")
    } == {
        "queued": "7",
        "in_flight": "1",
        "delayed": "1",
        "dead": "1",
        "unaccounted": "0",
        "spooled": "0",
    }
    assert gauges["oldest_age_ms"] == "7000"
    assert gauges["budget_per_s"] == "0.8"
    # The next try of one is due in 53 s; the others are gone long before.
    assert 53 <= int(gauges["eta_s"]) == int(gauges["eta_s_normal"]) <= 55
    assert (gauges["eta_s_high"], gauges["eta_s_low"]) == ("0", "0")


async def test_consumers_that_own_nothing_are_removed_in_time(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"), event("2"))
    await bench.claim(1, consumer="gone-with-one")
    [second] = await bench.claim(1, consumer="gone-with-none")
    await bench.settle(result(second, "delivered"), consumer="gone-with-none")
    await bench.clock.pass_ms(3_600_001)
    await bench.gauges()
    consumers = await bench.client.xinfo_consumers(
        f"{bench.queue.prefix}:q:normal", "relay"
    )
    assert [c["name"] for c in consumers] == [b"gone-with-one"]


# --- the server ----------------------------------------------------------------------


async def test_a_full_server_refuses_events_and_still_lets_them_out(
    prefix: str, tmp_path: Path
) -> None:
    from tests.servers import start_server

    with start_server(None, tmp_path / "full") as url:
        queue = Queue(url=url, prefix=prefix)
        client = redis.asyncio.Redis.from_url(url)
        try:
            await queue.commit("w:0", 1, [("ip", [event("1"), event("2")])], [])
            await client.config_set("maxmemory", "1")
            with pytest.raises(QueueUnavailable) as caught:
                await queue.commit("w:0", 2, [("ip", [event("3")])], [])
            assert caught.value.reason == "redis_full"
            tick = await queue.tick("a", 5, look_out=True)
            assert [c.id for c in tick.claimed] == ["1", "2"]
            await queue.settle(
                "a",
                [
                    result(tick.claimed[0], "delivered"),
                    result(tick.claimed[1], "retry"),
                ],
            )
            assert (await queue.reap())["unaccounted"] == "0"
        finally:
            await queue.aclose()
            await client.aclose()


async def test_a_flushed_script_cache_is_filled_again(make: Make) -> None:
    bench = await make()
    await bench.take(event("1"))
    await bench.client.script_flush()
    await bench.take(event("2"))
    assert len(await bench.claim()) == 2


async def test_many_questions_at_once_wait_for_their_turn(make: Make) -> None:
    bench = await make()
    await bench.take(event())
    asked = await asyncio.gather(*(bench.queue.hash("totals") for _ in range(100)))
    assert asked == [{"received": "1"}] * 100


async def test_a_server_that_is_not_there_is_named() -> None:
    queue = Queue(url="unix:///nonexistent.sock", prefix="x")
    try:
        with pytest.raises(QueueUnavailable) as caught:
            await queue.ping()
        assert caught.value.reason == "redis_unreachable"
    finally:
        await queue.aclose()


async def test_a_cancellation_is_never_swallowed(make: Make) -> None:
    bench = await make()
    for turns in range(40):  # whatever the client is just doing
        fresh = Queue(url=bench.url, prefix="cancelled")
        task = asyncio.create_task(fresh.reap())
        for _ in range(turns):
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await fresh.aclose()


def test_no_command_is_ever_sent_twice_by_the_client() -> None:
    client = connect("redis://127.0.0.1:1", timeout=1, connections=1)
    retry = client.connection_pool.connection_kwargs["retry"]
    assert retry.get_retries() == 0


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"redis_version": "6.2.14"}, "Redis 7.0 or Valkey 7.2 is the least"),
        (
            {"redis_version": "7.2.4", "valkey_version": "7.1.0"},
            "Valkey 7.2 is the least",
        ),
        (
            {"redis_version": "7.4.0", "maxmemory_policy": "allkeys-lru"},
            "maxmemory-policy noeviction",
        ),
    ],
    ids=["old-redis", "old-valkey", "evicting"],
)
def test_a_server_that_would_lose_events_is_refused(
    info: dict[str, object], says: str
) -> None:
    with pytest.raises(RelayError, match=says):
        _judge(info)


def test_a_doubtful_server_is_warned_about() -> None:
    info: dict[str, object] = {
        "redis_version": "7.4.0",
        "maxmemory_policy": "volatile-lru",
        "aof_enabled": 0,
    }
    assert len(_judge(info)) == 2
    info |= {"maxmemory_policy": "noeviction", "aof_enabled": 1}
    assert _judge(info) == []


def test_every_redis_exception_has_a_reason_or_is_our_own_fault() -> None:
    ours = {
        # Raised for commands, arguments or data types that we would have got wrong,
        # or for features the relay does not use.
        name
        for name, kind in vars(redis.exceptions).items()
        if isinstance(kind, type)
        and issubclass(kind, redis.exceptions.RedisError)
        and _reason(
            kind("x") if kind.__init__ is Exception.__init__ else kind.__new__(kind)
        )
        is None
    }
    assert not {
        n for n in ours if "Connection" in n or "Timeout" in n or "ReadOnly" in n
    }


def test_the_scripts_know_every_outcome() -> None:
    for outcome in Outcome:
        assert f"'{outcome}'" in Scripts().reap.source


def test_the_scripts_read_one_clock() -> None:
    assert Scripts().commit.source.count("call('TIME')") == 1
    assert "call('TIME')" not in SIMULATED.tick.source


def test_windows_of_an_unlimited_budget_are_none() -> None:
    assert parse_budget("off") == ()
    assert Queue(url="redis://x", prefix="x", budget=()).rate == 0
    assert Queue(
        url="redis://x", prefix="x", budget=[Window(quota=4, period_ms=5000)]
    ).rate == pytest.approx(0.8)


async def windows(bench: Bench) -> dict[str, str]:
    """The hour's counts, whichever minutes the test's clock went through."""
    [key] = [
        k
        async for k in bench.client.scan_iter(
            f"{bench.queue.prefix}:hour:*".replace("{", "[{]")
        )
    ]
    return await bench.queue.hash(key.decode().removeprefix(f"{bench.queue.prefix}:"))


async def test_no_key_shows_the_id_that_a_sender_chose(make: Make) -> None:
    bench = await make()
    named = event("jane-doe-1", name="told", customer="c")
    await bench.queue.expect(named[2], 60)
    await bench.take(named)
    waiting = await bench.client.keys(f"{bench.queue.prefix}:*")
    [claimed] = await bench.claim()
    await bench.settle(result(claimed, "rejected"))
    told = await bench.queue.outcome(named[2], 1)
    assert told is not None
    assert told["outcome"] == "rejected"
    keys = [*waiting, *await bench.client.keys(f"{bench.queue.prefix}:*")]
    assert not [key for key in keys if b"jane" in key]
