"""Events that may have arrived and can be looked up: what Redis knows of them."""

from collections.abc import AsyncIterator
from typing import cast

import pytest

from relay.queue import DEATHS_MAX, LOOK_UP_MS, STALE_MS, Claimed
from tests.queues import START_S, Bench, event, result, simulated

pytestmark = pytest.mark.anyio

VERIFY = "verify:relay_id"
TTL_MS = 3_600_000


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    async with simulated(redis_url, prefix) as made:
        yield made


async def take(bench: Bench, **parts: object) -> None:
    await bench.take(event("x", delivery=VERIFY, **{"ttl_ms": TTL_MS, **parts}))  # type: ignore[arg-type]  # event()'s own keywords


async def sent(bench: Bench, consumer: str = "a") -> Claimed:
    """Claimed and marked: its first byte may leave now."""
    [claimed] = await bench.claim(consumer=consumer)
    assert await bench.queue.mark(consumer, [claimed]) == [True]
    return claimed


async def in_doubt(bench: Bench) -> Claimed:
    """Sent without an answer, and claimed again to be looked up."""
    await take(bench)
    assert await bench.settle(result(await sent(bench), "ambiguous")) == 1
    await bench.clock.pass_ms(LOOK_UP_MS)
    [claimed] = await bench.claim()
    return claimed


async def others_live_on(bench: Bench, consumer: str) -> list[Claimed]:
    """Whoever is silent meanwhile is dead; what the other one gets of it."""
    taken: list[Claimed] = []
    for _ in range(4):
        await bench.clock.pass_ms(STALE_MS // 3)
        taken += await bench.claim(consumer=consumer, look_out=True, held=taken)
    return taken


async def letter(bench: Bench) -> tuple[str, str]:
    [dead] = await bench.dead()
    return dead["outcome"], dead["reason"]


async def test_without_an_answer_it_waits_and_is_to_be_looked_up(bench: Bench) -> None:
    await take(bench)
    claimed = await sent(bench)
    assert (claimed.doubted_ms, claimed.proof, claimed.once) == (0, "relay_id", True)
    await bench.clock.pass_ms(9_000)
    assert await bench.settle(result(claimed, "ambiguous")) == 1
    await bench.clock.pass_ms(LOOK_UP_MS - 1)
    assert await bench.claim() == []
    await bench.clock.pass_ms(1)
    [again] = await bench.claim()
    # Since it was taken: a call before this one may have been forgotten by Redis.
    assert again.doubted_ms == START_S * 1000
    assert (again.attempts, again.id, again.delivery) == (1, "x", VERIFY)
    assert await bench.client.exists(f"{bench.queue.prefix}:sent") == 0


async def test_what_is_there_is_delivered(bench: Bench) -> None:
    claimed = await in_doubt(bench)
    assert await bench.settle(result(claimed, "delivered")) == 1
    assert (await bench.totals())["delivered"] == 1


async def test_what_is_not_there_is_sent_again_at_once(bench: Bench) -> None:
    claimed = await in_doubt(bench)
    assert await bench.settle(result(claimed, "resend")) == 1
    [again] = await bench.claim()
    assert (again.doubted_ms, again.attempts) == (0, 1)
    assert await bench.queue.mark("a", [again]) == [True]
    assert await bench.settle(result(again, "ambiguous")) == 1
    await bench.clock.pass_ms(LOOK_UP_MS)
    assert await bench.claim() == []  # longer with each attempt
    await bench.clock.pass_ms(LOOK_UP_MS // 4)
    [third] = await bench.claim()
    assert third.doubted_ms == START_S * 1000


@pytest.mark.parametrize("verdict", ["retry", "wait", "release"])
async def test_a_question_without_an_answer_is_put_again(
    bench: Bench, verdict: str
) -> None:
    claimed = await in_doubt(bench)
    assert await bench.settle(result(claimed, verdict, delay_ms=50)) == 1
    await bench.clock.pass_ms(50)
    [again] = await bench.claim()
    assert again.doubted_ms == claimed.doubted_ms


async def test_what_nobody_can_tell_is_ambiguous(bench: Bench) -> None:
    claimed = await in_doubt(bench)
    answer = result(claimed, "ambiguous", reason="look_up_incomplete")
    assert await bench.settle(answer) == 1
    assert await letter(bench) == ("ambiguous", "look_up_incomplete")
    [dead] = await bench.dead()
    assert dead["doubted_ms"] == str(START_S * 1000)


@pytest.mark.parametrize("left_ms", [0, 1])
async def test_one_without_the_time_to_be_looked_up_is_ambiguous(
    bench: Bench, left_ms: int
) -> None:
    await take(bench, ttl_ms=LOOK_UP_MS - 1 + left_ms)
    assert await bench.settle(result(await sent(bench), "ambiguous", reason="r")) == 1
    if left_ms:
        await bench.clock.pass_ms(LOOK_UP_MS)
        [claimed] = await bench.claim()
        assert claimed.doubted_ms
        assert await bench.settle(result(claimed, "retry", reason="r", delay_ms=1)) == 1
    assert await letter(bench) == ("ambiguous", "r")


async def test_one_in_doubt_that_is_too_old_is_ambiguous(bench: Bench) -> None:
    await take(bench)
    assert await bench.settle(result(await sent(bench), "ambiguous")) == 1
    await bench.clock.pass_ms(TTL_MS + 1)
    assert await bench.claim() == []
    assert await letter(bench) == ("ambiguous", "ttl")


async def test_one_that_was_not_there_and_is_too_old_has_expired(bench: Bench) -> None:
    claimed = await in_doubt(bench)
    assert await bench.settle(result(claimed, "resend")) == 1
    await bench.clock.pass_ms(TTL_MS)
    assert await bench.claim() == []
    assert await letter(bench) == ("expired", "ttl")


@pytest.mark.parametrize("marked", [True, False])
async def test_only_what_a_dead_forwarder_may_have_sent_is_looked_up(
    bench: Bench, marked: bool
) -> None:
    await take(bench)
    if marked:
        await sent(bench, "dead")
    else:
        await bench.claim(consumer="dead")
    claimed = await others_live_on(bench, "a")
    if marked:
        assert claimed == []
        await bench.clock.pass_ms(LOOK_UP_MS)
        claimed = await bench.claim()
    [again] = claimed
    assert again.doubted_ms == (START_S * 1000 if marked else 0)


async def test_a_forwarder_that_dies_over_the_question_leaves_it_to_the_next(
    bench: Bench,
) -> None:
    claimed = await in_doubt(bench)
    # Two minutes at once look like a clock that has stepped.
    await bench.client.delete(f"{bench.queue.prefix}:amnesty")
    for n in range(DEATHS_MAX - 1):
        [again] = await others_live_on(bench, f"b{n}")
        assert again.doubted_ms == claimed.doubted_ms
    assert await others_live_on(bench, "c") == []
    assert await letter(bench) == ("ambiguous", "worker_died")


async def test_one_handed_out_anew_after_its_group_was_lost_is_looked_up(
    bench: Bench,
) -> None:
    await take(bench)
    await sent(bench)
    lane = f"{bench.queue.prefix}:q:normal"
    await bench.client.xgroup_destroy(lane, "relay")
    assert await bench.claim() == []
    await bench.clock.pass_ms(LOOK_UP_MS)
    [again] = await bench.claim()
    assert again.doubted_ms == START_S * 1000


async def test_what_an_older_version_left_behind_is_no_doubt(bench: Bench) -> None:
    """Its entries have one part less."""
    await take(bench)
    [claimed] = await bench.claim()
    assert await bench.settle(result(claimed, "retry", delay_ms=1)) == 1
    delayed = f"{bench.queue.prefix}:delayed"
    found = await bench.client.zrange(delayed, 0, -1, withscores=True)
    [(member, due)] = cast("list[tuple[bytes, float]]", found)
    shorter = bytes([member[0] - 1]) + member[1:-1]  # a packed array, and its last part
    assert member[0] & 0xF0 == 0x90
    assert member[-1] == 0
    await bench.client.zadd(delayed, {shorter: due})
    await bench.client.zrem(delayed, member)
    await bench.clock.pass_ms(1)
    [again] = await bench.claim()
    assert (again.doubted_ms, again.attempts) == (0, 1)


async def test_no_probe_looks_up_before_the_time(bench: Bench) -> None:
    """Five silent calls open the breaker, and there is nothing else to probe with."""
    for n in range(5):
        await bench.take(event(f"x-{n}", delivery=VERIFY, ttl_ms=TTL_MS))
    claimed = await bench.claim()
    assert await bench.queue.mark("a", claimed) == [True] * 5
    await bench.settle(*(result(c, "ambiguous", signal="failed") for c in claimed))
    assert (await bench.queue.hash("flow"))["hold"] == "breaker_open"
    await bench.clock.pass_ms(LOOK_UP_MS - 1)
    assert await bench.claim() == []
    # One that is only tried again later is taken all the same.
    await bench.take(event("other", ttl_ms=TTL_MS))
    [other] = await bench.claim()
    assert other.id == "other"
    later = {"delay_ms": TTL_MS // 2, "signal": "failed", "probe": True}
    await bench.settle(result(other, "retry", **later))
    await bench.clock.pass_ms(9_000)
    [probe] = await bench.claim()
    assert probe.doubted_ms  # its time has come, and it is the first one


async def test_a_refused_question_waits_under_a_hold_too(bench: Bench) -> None:
    claimed = await in_doubt(bench)
    await bench.client.hset(f"{bench.queue.prefix}:flow", "hold", "auth_hold")
    asked = 0
    for _ in range(60):
        await bench.settle(result(claimed, "wait", delay_ms=600_000, probe=True))
        await bench.clock.pass_ms(9_000)
        asked += len(await bench.claim())
    assert asked == 0
    await bench.clock.pass_ms(60_000)
    assert len(await bench.claim()) == 1


async def test_it_is_looked_for_since_before_the_clock_stepped_back(
    bench: Bench,
) -> None:
    await take(bench)
    await bench.clock.pass_ms(-600_000)  # it was ahead when the event was taken
    claimed = await sent(bench)
    sent_ms = bench.clock.us // 1000
    await bench.settle(result(claimed, "ambiguous"))
    await bench.clock.pass_ms(-600_000)  # and still was when it was sent
    assert await bench.claim() == []
    await bench.clock.pass_ms(LOOK_UP_MS)
    [again] = await bench.claim()
    assert again.doubted_ms == sent_ms - 600_000
