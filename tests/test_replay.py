"""A replay sends each dead letter at most once, carefully, and loses none of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import cast

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.dead_letters import drop, survey
from relay.errors import QueueUnavailable
from relay.events import identified, occurred_at, read_event, upstream_body
from relay.queue import LOOK_UP_MS, Claimed, Letters, Queue
from relay.replay import (
    CANARY,
    CHUNK,
    REPLAY_CURES,
    NothingToResume,
    Plan,
    Progress,
    Replay,
    ReplayBusy,
    Why,
    last_progress,
)
from tests.queues import SIMULATED, START_S, Bench, Clock, event, result, simulated

pytestmark = pytest.mark.anyio

TTL_MS = 3_600_000


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    async with simulated(redis_url, prefix) as made:
        yield made


async def bury(
    bench: Bench, n: int, verdict: str = "rejected", **parts: object
) -> list[str]:
    """Make `n` dead letters; the ids of the letters, oldest first."""
    before = set(await entries(bench))
    made = [event(**parts) for _ in range(n)]  # type: ignore[arg-type]  # its own
    await bench.take(*made)
    while n:  # one customer's go one at a time
        claimed = await bench.claim(n)
        await bench.settle(*(result(c, verdict) for c in claimed))
        n -= len(claimed)
    return [entry for entry in await entries(bench) if entry not in before]


async def entries(bench: Bench) -> list[str]:
    found = await bench.client.xrange(f"{bench.queue.prefix}:dead")
    return [entry.decode() for entry, _ in cast("list[tuple[bytes, object]]", found)]


def replay(queue: Queue, **parts: object) -> Replay:
    given = {"ttl_ms": TTL_MS, "queue_max": 1_000, "poll_s": 0.001, **parts}
    return Replay(queue, **given)  # type: ignore[arg-type]  # its own keywords


Deliver = Callable[[list[Claimed]], Awaitable[None]]


def with_verdict(bench: Bench, verdict: str, **parts: object) -> Deliver:
    async def deliver(claimed: list[Claimed]) -> None:
        await bench.settle(*(result(c, verdict, **parts) for c in claimed))

    return deliver


async def go(bench: Bench, running: Replay, deliver: Deliver) -> Progress:
    """Run it to its end, with a forwarder that takes ten between two looks."""
    async for _ in running.run():
        if claimed := await bench.claim(10):
            await deliver(claimed)
    return running.progress


async def begun(bench: Bench, plan: Plan | None = None, **parts: object) -> Replay:
    plan = plan or Plan()
    seen = await survey(bench.queue, plan.letters, ttl_ms=TTL_MS)
    running = replay(bench.queue, **parts)
    await running.begin(plan, seen.free)
    return running


async def drain(bench: Bench) -> list[Claimed]:
    """Deliver all that waits."""
    taken: list[Claimed] = []
    while claimed := await bench.claim(100):
        await bench.settle(*(result(c, "delivered") for c in claimed))
        taken += claimed
    return taken


# --- what becomes of a letter ---------------------------------------------------------


async def test_a_letter_goes_back_to_its_lane_as_a_new_event(bench: Bench) -> None:
    made = event(
        "order-1",
        name="paid",
        customer="digest",
        lane="high",
        delivery="at_most_once",
        body='{"event":"paid"}',
    )
    await bench.take(made)
    [claimed] = await bench.claim()
    await bench.settle(result(claimed, "rejected"))
    await bench.clock.pass_ms(1_000)
    [entry] = await entries(bench)
    running = await begun(bench)
    again: list[Claimed] = []

    async def deliver(claimed: list[Claimed]) -> None:
        again.extend(claimed)
        await bench.settle(*(result(c, "rejected") for c in claimed))

    told = await go(bench, running, deliver)
    [new] = again
    ms, seq = entry.split("-")
    assert new.id == f"order-1-r{int(ms):x}-{seq}"
    assert (new.lane, new.name, new.delivery) == ("high", "paid", "at_most_once")
    assert (new.body, new.attempts) == ('{"event":"paid"}', 0)
    assert new.received_ms == bench.clock.us // 1000
    [dead] = await bench.dead()
    assert (dead["id"], dead["replay_of"]) == (new.id, "order-1")
    assert int(dead["ttl_ms"]) == TTL_MS - 1_000  # what was left of it
    assert await bench.totals() == {"received": 2, "rejected": 2}
    assert (told.state, told.why, told.failures) == (
        *("stopped", "failed"),
        {"rejected:rejected": 1},
    )
    # And once more: the name does not grow.
    [entry] = await entries(bench)
    running = await begun(bench)
    await go(bench, running, deliver)
    assert again[-1].id.startswith("order-1-r")
    assert again[-1].id.count("-r") == 1
    assert again[-1].id != new.id


async def test_a_letter_keeps_the_time_at_which_it_happened(bench: Bench) -> None:
    said = read_event(b'{"event":"e","customer":{"source_id":"u1"},"age":1500}')
    at = occurred_at(said, bench.clock.us / 1e6)
    body = upstream_body(said, identified(said), {"at": at}).decode()
    await bury(bench, 1, body=body)
    await bench.clock.pass_ms(60_000)
    running = await begun(bench)
    again: list[Claimed] = []

    async def deliver(claimed: list[Claimed]) -> None:
        again.extend(claimed)
        await bench.settle(*(result(c, "delivered") for c in claimed))

    await go(bench, running, deliver)
    [new] = again
    assert new.received_ms == bench.clock.us // 1000  # received anew
    assert json.loads(new.body)["metadata"] == {"at": "2027-01-15T07:59:58.500Z"}
    assert new.body == body


async def test_a_new_id_is_as_short_as_ids_must_be(bench: Bench) -> None:
    await bench.take(event("x" * 64), event("x" * 63 + "y"))
    await bench.settle(*(result(c, "rejected") for c in await bench.claim()))
    running = await begun(bench)
    ids: list[str] = []

    async def deliver(claimed: list[Claimed]) -> None:
        ids.extend(c.id for c in claimed)
        await bench.settle(*(result(c, "delivered") for c in claimed))

    await go(bench, running, deliver)
    assert len(set(ids)) == 2
    assert {len(one) for one in ids} == {64}


async def test_who_waits_for_the_new_event_hears_what_it_repeats(
    bench: Bench,
) -> None:
    [entry] = await bury(bench, 1)
    letter = await bench.queue.letter(entry)
    assert letter is not None
    ms, seq = entry.split("-")
    name = f"{letter['id']}-r{int(ms):x}-{seq}"
    new = event(name, customer=letter["customer"])
    await bench.queue.expect(new[2], 60)
    await go(bench, await begun(bench), with_verdict(bench, "delivered"))
    told = await bench.queue.outcome(new[2], 1)
    assert told is not None
    assert (told["outcome"], told["replay_of"]) == ("delivered", letter["id"])


async def test_what_is_past_its_time_to_live_stays_unless_it_gets_a_new_one(
    bench: Bench,
) -> None:
    await bury(bench, 2, ttl_ms=1_000)
    await bury(bench, 1)
    await bench.clock.pass_ms(1_000)
    deliver = with_verdict(bench, "delivered")
    told = await go(bench, await begun(bench), deliver)
    assert (told.sent, told.skipped) == (1, {"too_old": 2})
    running = await begun(bench, Plan(new_ttl_ms=60_000))
    async for told in running.run():
        if told.sent == 2:
            break
    await bench.clock.pass_ms(60_000)
    [claimed] = await bench.claim(1)  # it has all of its new time
    await bench.settle(result(claimed, "delivered"))
    await bench.clock.pass_ms(1)
    assert await bench.claim(1) == []
    told = await go(bench, running, deliver)
    assert (told.delivered, told.failures) == (1, {"expired:ttl": 1})


async def test_a_letter_of_an_older_version_has_the_settings_time_to_live(
    bench: Bench,
) -> None:
    await bury(bench, 1, ttl_ms=10 * TTL_MS)
    [entry] = await entries(bench)
    letter = await bench.queue.letter(entry)
    assert letter is not None
    old = {n: v for n, v in letter.items() if n not in ("ttl_ms", "replay_of")}
    key = f"{bench.queue.prefix}:dead"
    await bench.client.delete(key)
    await bench.client.xadd(key, old)  # type: ignore[arg-type]  # text for text
    await bench.clock.pass_ms(TTL_MS)
    seen = await survey(bench.queue, Letters(), ttl_ms=TTL_MS)
    assert seen.skipped() == {"too_old": 1}
    seen = await survey(bench.queue, Letters(), ttl_ms=TTL_MS + 1)
    assert seen.free == 1


async def test_ambiguous_ones_are_sent_only_when_they_may_pay_twice(
    bench: Bench,
) -> None:
    await bury(bench, 3, "ambiguous")
    deliver = with_verdict(bench, "delivered")
    told = await go(bench, await begun(bench), deliver)
    assert (told.state, told.sent, told.skipped) == ("done", 0, {"ambiguous": 3})
    told = await go(bench, await begun(bench, Plan(may_pay_twice=True)), deliver)
    assert (told.state, told.sent, told.delivered) == ("done", 3, 3)


@pytest.mark.parametrize(
    ("verdict", "delivery", "looked_up"),
    [
        ("ambiguous", "verify:relay_id", True),
        ("ambiguous", "at_most_once", False),
        ("rejected", "verify:relay_id", False),
    ],
)
async def test_where_it_can_be_it_is_looked_up_before_it_is_sent_again(
    bench: Bench, verdict: str, delivery: str, looked_up: bool
) -> None:
    received_ms = bench.clock.us // 1000
    await bury(bench, 1, verdict, delivery=delivery, ttl_ms=1_000)
    await bench.clock.pass_ms(LOOK_UP_MS)
    claims: list[Claimed] = []

    async def deliver(claimed: list[Claimed]) -> None:
        claims.extend(claimed)
        await bench.settle(*(result(c, "delivered") for c in claimed))

    plan = Plan(may_pay_twice=True, new_ttl_ms=TTL_MS)
    told = await go(bench, await begun(bench, plan), deliver)
    assert (told.state, told.delivered) == ("done", 1)
    assert [c.doubted_ms for c in claims] == [received_ms if looked_up else 0]


async def test_a_replay_nobody_answers_is_looked_up_since_the_first_call(
    bench: Bench,
) -> None:
    first_ms = bench.clock.us // 1000
    await bury(bench, 1, "ambiguous", delivery="verify:relay_id", ttl_ms=1_000)
    asked: list[int] = []

    async def unanswered(claimed: list[Claimed]) -> None:
        asked.extend(c.doubted_ms for c in claimed)
        await bench.settle(*(result(c, "ambiguous") for c in claimed))

    for _ in range(3):
        await bench.clock.pass_ms(LOOK_UP_MS)
        plan = Plan(may_pay_twice=True, new_ttl_ms=TTL_MS)
        await go(bench, await begun(bench, plan), unanswered)
    assert asked == [first_ms] * 3


async def sent_again(bench: Bench) -> list[Claimed]:
    """What a replay of all letters hands out at once."""
    running = await begun(bench, Plan(may_pay_twice=True, new_ttl_ms=TTL_MS))
    async for _ in running.run():
        running.stop()
    return await bench.claim()


async def test_a_letter_is_not_looked_up_before_its_time(bench: Bench) -> None:
    await bury(bench, 1, "ambiguous", delivery="verify:relay_id", ttl_ms=1_000)
    assert await sent_again(bench) == []
    await bench.clock.pass_ms(LOOK_UP_MS - 1)
    assert await bench.claim() == []
    await bench.clock.pass_ms(1)
    [claimed] = await bench.claim()
    assert claimed.doubted_ms


@pytest.mark.parametrize(
    "reason",
    ["look_up_incomplete", "look_up_impossible", "look_up_needs_server_api"],
)
async def test_a_question_without_an_answer_is_not_put_again(
    bench: Bench, reason: str
) -> None:
    await bench.take(event(delivery="verify:relay_id", ttl_ms=1_000))
    [claimed] = await bench.claim()
    await bench.settle(result(claimed, "ambiguous", reason=reason))
    [claimed] = await sent_again(bench)
    assert claimed.doubted_ms == 0


async def test_two_letters_of_one_event_are_replayed_once(bench: Bench) -> None:
    [entry] = await bury(bench, 1)
    letter = await bench.queue.letter(entry)
    assert letter is not None
    key = f"{bench.queue.prefix}:dead"
    await bench.client.xadd(key, letter)  # type: ignore[arg-type]  # text for text
    # Another customer's event of the same id is another event.
    await bench.client.xadd(key, letter | {"customer": "d"})  # type: ignore[arg-type]
    deliver = with_verdict(bench, "delivered")
    told = await go(bench, await begun(bench), deliver)
    assert (told.sent, told.skipped) == (2, {"same_id": 1})
    told = await go(bench, await begun(bench), deliver)  # nor another day
    assert (told.sent, told.skipped) == (0, {"same_id": 1})


async def test_what_no_relay_wrote_is_left_alone(bench: Bench) -> None:
    key = f"{bench.queue.prefix}:dead"
    for fields in ({"x": "y"}, {"id": "1", "lane": "retry", "outcome": "rejected"}):
        await bench.client.xadd(key, fields)  # type: ignore[arg-type]  # text for text
    told = await go(bench, await begun(bench), with_verdict(bench, "delivered"))
    assert (told.state, told.sent, told.skipped) == ("done", 0, {"unreadable": 2})
    assert len(await entries(bench)) == 2


async def test_letters_that_are_named_are_the_only_ones(bench: Bench) -> None:
    ids = await bury(bench, 4)
    wanted = (ids[2], "1-1", ids[0])
    plan = Plan(letters=Letters(ids=wanted))
    running = await begun(bench, plan, batch=1)
    told = await go(bench, running, with_verdict(bench, "delivered"))
    assert (told.sent, told.skipped, told.state) == (2, {"gone": 1}, "done")
    assert await entries(bench) == [ids[1], ids[3]]


# --- canary and parts -----------------------------------------------------------------


async def test_a_canary_goes_first_and_the_rest_waits_for_it(bench: Bench) -> None:
    await bury(bench, 250)
    running = await begun(bench)
    most: list[int] = []

    async def deliver(claimed: list[Claimed]) -> None:
        most.append(running.progress.sent)
        await bench.settle(*(result(c, "delivered") for c in claimed))

    told = await go(bench, running, deliver)
    assert most[0] == CANARY
    assert set(most) == {CANARY, CANARY + CHUNK, CANARY + 2 * CHUNK, 250}
    assert (told.state, told.planned, told.delivered) == ("done", 250, 250)
    assert told.pending == 0
    assert await entries(bench) == []


async def test_a_canary_that_dies_stops_it_and_leaves_the_rest(bench: Bench) -> None:
    await bury(bench, 30)
    running = await begun(bench)

    async def deliver(claimed: list[Claimed]) -> None:
        verdicts = ["delivered"] * 9 + ["rejected"]
        paired = zip(claimed, verdicts, strict=True)
        await bench.settle(*(result(c, v, reason="bad") for c, v in paired))

    told = await go(bench, running, deliver)
    assert (told.state, told.why, told.phase) == ("stopped", "failed", "canary")
    assert (told.sent, told.delivered, told.failures) == (10, 9, {"rejected:bad": 1})
    assert len(await entries(bench)) == 21
    # Cured: another canary, then the rest; what died again is not part of it.
    again = replay(bench.queue)
    await again.resume()
    sent: list[int] = []

    async def cured(claimed: list[Claimed]) -> None:
        sent.append(again.progress.sent)
        await bench.settle(*(result(c, "delivered") for c in claimed))

    told = await go(bench, again, cured)
    assert (told.state, told.sent, told.delivered) == ("done", 30, 29)
    assert sent[0] == 20
    assert len(await entries(bench)) == 1


async def test_it_stops_when_more_than_a_tenth_of_a_part_dies(bench: Bench) -> None:
    await bury(bench, 300)
    running = await begun(bench)
    seen = 0

    async def deliver(claimed: list[Claimed]) -> None:
        nonlocal seen
        verdicts = []
        for _ in claimed:
            seen += 1
            # One of ten in the first part after the canary: that much may fail.
            bad = seen > CANARY and (seen % 10 == 0 or seen > CANARY + CHUNK)
            verdicts.append("rejected" if bad else "delivered")
        paired = zip(claimed, verdicts, strict=True)
        await bench.settle(*(result(c, v) for c, v in paired))

    told = await go(bench, running, deliver)
    assert (told.state, told.why, told.phase) == ("stopped", "failed", "sending")
    assert told.sent == CANARY + 2 * CHUNK
    assert told.failures == {"rejected:rejected": 20}
    await drain(bench)


async def test_what_is_dropped_meanwhile_is_no_failure(bench: Bench) -> None:
    await bury(bench, 1, body='{"customer":{"source_id":"u"}}')
    running = await begun(bench)
    async for _ in running.run():
        await bench.queue.forget("normal", "", 100, "u", '"u"')
    told = running.progress
    assert (told.state, told.outcomes) == ("done", {"dropped": 1})


async def test_a_limit_is_how_many_are_sent(bench: Bench) -> None:
    await bury(bench, 5, "ambiguous")
    await bury(bench, 30)
    running = await begun(bench, Plan(limit=15))
    told = await go(bench, running, with_verdict(bench, "delivered"))
    assert (told.state, told.sent, told.skipped) == ("done", 15, {"ambiguous": 5})
    assert len(await entries(bench)) == 20


async def test_a_full_queue_stops_it_before_the_letter_is_touched(
    bench: Bench,
) -> None:
    await bury(bench, 9)
    running = await begun(bench, queue_max=4)
    async for _ in running.run():
        pass
    told = running.progress
    assert (told.state, told.why, told.sent) == ("stopped", "queue_full", 4)
    assert len(await entries(bench)) == 5
    await bench.balanced()
    await drain(bench)
    again = replay(bench.queue, queue_max=9)
    await again.resume()
    told = await go(bench, again, with_verdict(bench, "delivered"))
    assert (told.state, told.sent, told.delivered) == ("done", 9, 9)


# --- time, holds, interruptions -------------------------------------------------------


class Patience:
    """A clock of the process that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("may_pay_twice", "until"), [(False, 160), (True, 280)])
async def test_outcomes_that_do_not_come_stop_it(
    bench: Bench,
    may_pay_twice: bool,  # and so may have to be looked up
    until: int,
) -> None:
    await bury(bench, 11)
    clock = Patience()
    plan = Plan(may_pay_twice=may_pay_twice)
    running = await begun(bench, plan, clock=clock)
    looks = 0
    async for told in running.run():
        looks += 1
        assert told.sent in (0, CANARY)
        if looks > 5:  # for as long as it may take, it waits
            assert (told.state == "running") == (clock.now < until)
            clock.now += 10
    assert (running.progress.why, running.progress.sent) == ("stalled", CANARY)
    await drain(bench)
    await running.resume()
    told = await go(bench, running, with_verdict(bench, "delivered"))
    assert (told.state, told.delivered) == ("done", 11)


async def test_a_long_queue_is_waited_for_longer(bench: Bench) -> None:
    await bury(bench, 11)
    gauges = f"{bench.queue.prefix}:gauges"
    await bench.client.hset(gauges, mapping={"eta_s": "90", "budget_per_s": "0.5"})
    clock = Patience()
    running = await begun(bench, clock=clock)
    async for _ in running.run():
        clock.now += 10
    waited = clock.now - 100
    # A minute, and twice what is before it and the ten of the canary take.
    assert 60 + 2 * (90 + 10 / 0.5) <= waited <= 60 + 2 * (90 + 10 / 0.5) + 40


async def test_a_hold_is_told_and_stops_it_cleanly(bench: Bench) -> None:
    await bury(bench, 11)
    await bench.queue.hold("")
    clock = Patience()
    running = await begun(bench, clock=clock)
    async for told in running.run():
        clock.now += 10
        assert told.hold == "by_hand"
    assert (running.progress.state, running.progress.why) == ("stopped", "held")
    await bench.queue.resume()
    await running.resume()
    told = await go(bench, running, with_verdict(bench, "delivered"))
    assert (told.state, told.hold, told.delivered) == ("done", "", 11)


async def test_a_last_part_whose_outcomes_are_late_does_not_keep_it(
    bench: Bench,
) -> None:
    await bury(bench, 3)
    clock = Patience()
    running = await begun(bench, clock=clock)
    async for _ in running.run():
        clock.now += 10
    told = running.progress
    assert (told.state, told.sent, told.pending) == ("done", 3, 3)
    await drain(bench)  # and what came of them is counted all the same
    late = await last_progress(bench.queue)
    assert late is not None
    assert (late.delivered, late.pending) == (3, 0)


async def test_it_can_be_interrupted_and_resumed(bench: Bench) -> None:
    await bury(bench, 200)
    running = await begun(bench)

    async def deliver(claimed: list[Claimed]) -> None:
        await bench.settle(*(result(c, "delivered") for c in claimed))
        if running.progress.sent > CANARY:
            running.stop()

    told = await go(bench, running, deliver)
    assert (told.state, told.why) == ("stopped", "interrupted")
    assert told.sent == CANARY + CHUNK
    assert not told.alive
    again = replay(bench.queue)
    await again.resume()
    told = await go(bench, again, with_verdict(bench, "delivered"))
    assert (told.state, told.sent, told.delivered) == ("done", 200, 200)
    assert (await bench.totals())["delivered"] == 200
    with pytest.raises(NothingToResume):
        await replay(bench.queue).resume()


async def test_there_is_nothing_to_resume_at_first(bench: Bench) -> None:
    assert await last_progress(bench.queue) is None
    with pytest.raises(NothingToResume):
        await replay(bench.queue).resume()


async def test_one_replay_at_a_time_and_a_dead_ones_lease_runs_out(
    bench: Bench,
) -> None:
    await bury(bench, 30)
    first = await begun(bench)
    async for told in first.run():
        if told.sent == CANARY:
            break  # as if it were killed here
    with pytest.raises(ReplayBusy, match=r"ask again in 10 s"):
        await begun(bench)
    with pytest.raises(ReplayBusy):
        await replay(bench.queue).resume()
    await bench.clock.pass_ms(10_000)
    second = replay(bench.queue)
    await second.resume()
    with pytest.raises(ReplayBusy, match="taken this replay over"):
        async for _ in first.run():
            pass
    told = await go(bench, second, with_verdict(bench, "delivered"))
    assert (told.sent, told.delivered) == (30, 30)


async def test_a_clock_that_steps_back_leaves_no_endless_lease(bench: Bench) -> None:
    await bury(bench, 1)
    await begun(bench)
    await bench.clock.pass_ms(-3_600_000)
    second = replay(bench.queue)
    await second.resume()
    await go(bench, second, with_verdict(bench, "delivered"))


class Forgetful(Queue):
    """A queue whose answers to a replay are lost every other time."""

    asked = 0

    async def replay(self, what: str, run: str, owner: str, *args: object) -> list[str]:
        said = await super().replay(what, run, owner, *args)
        self.asked += 1
        if self.asked % 2 == 0:
            raise QueueUnavailable("redis_timeout", "lost")
        return said


async def test_lost_answers_send_nothing_twice(
    bench: Bench, redis_url: str, prefix: str
) -> None:
    await bury(bench, 130)
    queue = Forgetful(url=redis_url, prefix=prefix, scripts=SIMULATED, timeout=5.0)
    running = replay(queue)
    await running.begin(Plan(), 130)
    ids: list[str] = []

    async def deliver(claimed: list[Claimed]) -> None:
        ids.extend(c.id for c in claimed)
        await bench.settle(*(result(c, "delivered") for c in claimed))

    told = await go(bench, running, deliver)
    assert (told.state, told.sent, told.delivered) == ("done", 130, 130)
    assert len(ids) == len(set(ids)) == 130
    await queue.aclose()


async def test_a_redis_that_stays_away_ends_it_for_another_time(
    bench: Bench,
) -> None:
    await bury(bench, 3)
    clock = Patience()
    running = await begun(bench, clock=clock)

    async def away(what: str, run: str, *args: object) -> list[str]:
        clock.now += 1
        raise QueueUnavailable("redis_unreachable", f"{what} {run} {len(args)}")

    running._ask = away  # type: ignore[method-assign]  # as if Redis had gone
    with pytest.raises(QueueUnavailable):
        async for _ in running.run():
            pass
    assert clock.now > 120
    await bench.clock.pass_ms(10_000)
    again = replay(bench.queue)
    await again.resume()
    told = await go(bench, again, with_verdict(bench, "delivered"))
    assert told.delivered == 3


async def test_two_operators_at_once_send_each_letter_once(
    bench: Bench,
) -> None:
    await bury(bench, 60)
    ids: list[str] = []
    stop = asyncio.Event()

    async def forward() -> None:
        while not stop.is_set() or await bench.claim(0):
            claimed = await bench.claim(10)
            ids.extend(c.id for c in claimed)
            await bench.settle(*(result(c, "delivered") for c in claimed))
            await asyncio.sleep(0)

    async def operator() -> bool:
        one = replay(bench.queue)
        try:
            await one.begin(Plan(), 60)
        except ReplayBusy:
            return False
        async for _ in one.run():
            pass
        return True

    forwarder = asyncio.create_task(forward())
    ran = await asyncio.gather(*(operator() for _ in range(5)))
    stop.set()
    await forwarder
    assert ran.count(True) >= 1
    assert len(ids) == len(set(ids)) == 60


# --- a random history -----------------------------------------------------------------

STEPS = st.lists(
    st.sampled_from(
        ["bury", "send", "deliver", "reject", "drop", "drop one", "twice", "age"]
    ),
    min_size=1,
    max_size=25,
)


async def test_a_random_history_keeps_the_balance(redis_url: str, prefix: str) -> None:
    turn = 0

    async def history(steps: Sequence[str]) -> None:
        nonlocal turn
        turn += 1
        queue = Queue(url=redis_url, prefix=f"{prefix}-{turn}", scripts=SIMULATED)
        clock = Clock(redis_url, f"{prefix}-{turn}")
        await clock.set(START_S * 1_000_000)
        bench = Bench(queue, clock, redis.asyncio.Redis.from_url(redis_url))
        try:
            for step in steps:
                await take(bench, step)
                await bench.balanced()
        finally:
            for key in await bench.client.keys(f"{queue.prefix}:*"):
                await bench.client.delete(key)
            await bench.aclose()

    async def take(bench: Bench, step: str) -> None:
        if step == "bury":
            await bury(bench, 3)
            await bury(bench, 1, "ambiguous")
        elif step in ("deliver", "reject"):
            verdict = "delivered" if step == "deliver" else "rejected"
            claimed = await bench.claim(5)
            await bench.settle(*(result(c, verdict) for c in claimed))
        elif step == "drop":
            await drop(bench.queue, Letters(outcome="ambiguous"))
        elif step == "drop one":
            await drop(bench.queue, Letters(), most=1)
        elif step == "age":
            await bench.clock.pass_ms(TTL_MS // 2)
        else:
            before = await entries(bench)
            one = replay(bench.queue)
            await one.begin(Plan(limit=4, may_pay_twice=step == "twice"), 4)
            async for _ in one.run():
                one.stop()
            sent = len(before) - len(await entries(bench))
            assert sent == one.progress.sent <= 4

    @settings(
        max_examples=40,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    @given(STEPS)
    def histories(steps: list[str]) -> None:
        loop.run_until_complete(history(steps))

    loop = asyncio.new_event_loop()
    try:
        await asyncio.to_thread(histories)
    finally:
        loop.close()


# --- words ----------------------------------------------------------------------------


def test_every_stop_has_a_cure() -> None:
    assert set(REPLAY_CURES) == {str(why) for why in Why}


async def test_the_state_holds_nothing_of_the_customers(bench: Bench) -> None:
    await bury(bench, 2, body='{"customer":{"source_id":"somebody"}}')
    await go(bench, await begun(bench), with_verdict(bench, "delivered"))
    state = await bench.queue.hash("replay")
    assert "somebody" not in json.dumps(state)
    assert "plan" not in state  # nor whose they were to be
