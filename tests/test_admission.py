"""Admission: one commit for what waits, an answer for each, whatever Redis does."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import redis.asyncio

from relay.admission import (
    IN_FLIGHT,
    MAX_BATCH_EVENTS,
    MAX_BATCH_REQUESTS,
    MAX_WAITING_EVENTS,
    Admission,
)
from relay.errors import QueueUnavailable
from relay.outcomes import Outcome
from relay.queue import Packed, Queue, Refused, Reply, Told
from relay.queueable import Request
from tests.queues import Bench, Clock, event
from tests.support import eventually

pytestmark = pytest.mark.anyio


class Line:
    """The queue behind a line that a test can cut, before or after the commit."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.batches: list[int] = []
        self.cut_before = 0
        self.cut_after = 0
        self.gate: asyncio.Event | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def commit(
        self, slot: str, seq: int, requests: Sequence[Packed], refused: list[Refused]
    ) -> list[Reply]:
        unpacked = [msgspec.msgpack.decode(packed) for packed in requests]
        self.batches.append(sum(n for n, *_ in unpacked))
        if self.gate is not None:
            await self.gate.wait()
        if self.cut_before:
            self.cut_before -= 1
            raise QueueUnavailable("redis_unreachable", "cut before")
        replies = await self.queue.commit(slot, seq, requests, refused)
        if self.cut_after:
            self.cut_after -= 1
            raise QueueUnavailable("redis_timeout", "cut after")
        return replies

    def commit_now(
        self,
        slot: str,
        seq: int,
        requests: Sequence[Packed],
        refused: list[Refused],
        then: Told,
    ) -> bool:
        """As the queue has it, once its first connection is idle."""

        async def commit() -> None:
            try:
                said = await self.commit(slot, seq, requests, refused)
            except QueueUnavailable as error:
                then(error)
            except Exception:
                then(None)  # it is asked again, and says it then
            else:
                then(said)

        self.tasks.add(task := asyncio.create_task(commit()))
        task.add_done_callback(self.tasks.discard)
        return True


@pytest.fixture
async def bench(valkey_url: str, prefix: str) -> AsyncIterator[Bench]:
    queue = Queue(url=valkey_url, prefix=prefix, timeout=5.0)
    made = Bench(
        queue, Clock(valkey_url, prefix), redis.asyncio.Redis.from_url(valkey_url)
    )
    yield made
    await made.balanced()
    await queue.aclose()
    await made.clock.aclose()
    await made.client.aclose()


@asynccontextmanager
async def started(line: Line, **options: float) -> AsyncIterator[Admission]:
    admission = Admission(line, **options)
    await admission.start()
    try:
        yield admission
    finally:
        await admission.stop()


def request(*ids: str) -> Request:
    return ("ip", [event(i) for i in ids] or [event()])


async def test_the_batches_of_pages_share_commits_too(bench: Bench) -> None:
    line = Line(bench.queue)
    async with started(line) as admission:
        asked = [admission.submit(request(*map(str, range(20)))) for _ in range(60)]
        await asyncio.gather(*asked)
    most = MAX_BATCH_EVENTS // 20 * 20
    assert max(line.batches) == most
    assert len(line.batches) <= -(-60 * 20 // most) + 2


async def test_what_arrives_together_shares_commits(bench: Bench) -> None:
    line = Line(bench.queue)
    async with started(line) as admission:
        replies = await asyncio.gather(
            *(admission.submit(request()) for _ in range(500))
        )
    assert [reply.codes[0] for reply in replies] == [0] * 500
    assert len(line.batches) <= -(-500 // MAX_BATCH_REQUESTS) + 2
    assert max(line.batches) <= MAX_BATCH_REQUESTS
    assert await bench.totals() == {"received": 500}


async def test_each_request_gets_its_own_answer(bench: Bench) -> None:
    async with started(Line(bench.queue)) as admission:
        first, second, third = await asyncio.gather(
            admission.submit(request("a", "b")),
            admission.submit(request("b")),
            admission.submit(request("c")),
        )
    assert [r.codes[::2] for r in (first, second, third)] == [[0, 0], [1], [0]]


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_cut_line_is_tried_again_and_counts_once(
    bench: Bench, cut: str
) -> None:
    line = Line(bench.queue)
    setattr(line, f"cut_{cut}", 3)
    async with started(line) as admission:
        reply = await admission.submit(request("a"))
    assert reply.codes[0] == 0  # accepted, not a duplicate of itself
    assert await bench.totals() == {"received": 1}


async def test_redis_away_for_long_is_told_to_everyone_who_waits(bench: Bench) -> None:
    line = Line(bench.queue)
    line.cut_before = 1_000
    async with started(line, deadline_s=0.1) as admission:
        waiting = [admission.submit(request()) for _ in range(300)]
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(t, QueueUnavailable) for t in told)
        with pytest.raises(QueueUnavailable):  # known by now: no waiting at all
            admission.submit(request())
        line.cut_before = 0

        async def back() -> bool:
            try:
                return (await admission.submit(request("late"))).codes[0] == 0
            except QueueUnavailable:
                return False

        await eventually(back)
    assert await bench.totals() == {"received": 1}


async def test_too_much_at_once_is_refused_not_hoarded(bench: Bench) -> None:
    line = Line(bench.queue)
    line.gate = asyncio.Event()
    async with started(line) as admission:
        most = IN_FLIGHT * MAX_BATCH_REQUESTS + MAX_WAITING_EVENTS
        waiting = [admission.submit(request()) for _ in range(most)]
        try:
            with pytest.raises(QueueUnavailable) as caught:
                admission.submit(request())
        finally:
            line.gate.set()
        assert caught.value.reason == "overloaded"
        await asyncio.gather(*waiting)


async def test_refusals_are_counted_without_any_event(bench: Bench) -> None:
    async with started(Line(bench.queue)) as admission:
        admission.refuse(Outcome.INVALID, "customer_missing", "signup")

        async def counted() -> bool:
            return await bench.totals() == {"received": 1, "invalid": 1}

        await eventually(counted)


async def test_what_browsers_report_is_counted_by_the_day(bench: Bench) -> None:
    before = await bench.queue.now()
    async with started(Line(bench.queue)) as admission:
        for _ in range(3):
            admission.note_browser("chrome:called", 2)
        admission.note_browser("safari:full", 1)
    days = {f"browser:{now:%Y%m%d}" for now in (before, await bench.queue.now())}
    told = [await bench.queue.hash(day) for day in days]
    assert {"chrome:called": "6", "safari:full": "1"} in told
    assert await bench.totals() == {}  # no events, and no outcomes
    [key] = await bench.client.keys(f"{bench.queue.prefix}:browser:*")
    assert 399 < await bench.client.ttl(key) / 86_400 <= 400


async def test_a_stop_keeps_what_was_still_to_be_counted(bench: Bench) -> None:
    line = Line(bench.queue)
    async with started(line) as admission:
        admission.refuse(Outcome.FORBIDDEN, "origin", "")
    assert await bench.totals() == {"received": 1, "forbidden": 1}


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_refusals_are_counted_once_when_their_commit_was_given_up(
    bench: Bench, cut: str
) -> None:
    line = Line(bench.queue)
    setattr(line, f"cut_{cut}", 1_000)
    async with started(line, deadline_s=0.05) as admission:
        for _ in range(10):
            admission.refuse(Outcome.INVALID, "customer_missing", "")
        with pytest.raises(QueueUnavailable):
            await admission.submit(request("a"))
        setattr(line, f"cut_{cut}", 0)

        async def counted() -> bool:
            return (await bench.totals()).get("invalid", 0) > 0

        await eventually(counted)
    assert (await bench.totals())["invalid"] == 10
    # Given up before it was sent, the event was not taken; after it, it was.
    assert (await bench.totals())["received"] == (10 if cut == "before" else 11)


async def test_refusals_survive_an_outage_within_bounds(bench: Bench) -> None:
    line = Line(bench.queue)
    line.cut_before = 1_000_000
    async with started(line, deadline_s=0.05) as admission:
        for n in range(3_000):
            admission.refuse(Outcome.INVALID, "unknown_field", f"name-{n}")
        assert len(admission._refused) <= 1_001

        async def tried() -> bool:
            return bool(line.batches)

        await eventually(tried)
        line.cut_before = 0

        async def counted() -> bool:
            return await bench.totals() == {"received": 3_000, "invalid": 3_000}

        await eventually(counted)


async def test_a_request_that_went_away_disturbs_nobody(bench: Bench) -> None:
    line = Line(bench.queue)
    line.gate = asyncio.Event()
    async with started(line) as admission:
        gone, stays = admission.submit(request("gone")), admission.submit(request("x"))
        gone.cancel()
        line.gate.set()
        assert (await stays).codes[0] == 0


async def test_a_reply_that_does_not_fit_leaves_nobody_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(bench.queue)
    real = line.commit

    async def short(*asked: object) -> list[Reply]:
        return (await real(*asked))[:-1]  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(line, "commit", short)
    async with started(line) as admission:
        told = await asyncio.wait_for(
            asyncio.gather(
                *(admission.submit(request()) for _ in range(3)),
                return_exceptions=True,
            ),
            timeout=10,
        )
    assert isinstance(told[-1], ValueError)


async def test_a_fault_of_ours_is_told_and_the_next_commit_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(bench.queue)
    real: Callable[..., object] = line.commit

    async def broken(*_: object) -> list[Reply]:
        raise ZeroDivisionError

    async with started(line) as admission:
        monkeypatch.setattr(line, "commit", broken)
        with pytest.raises(ZeroDivisionError):
            await admission.submit(request())
        monkeypatch.setattr(line, "commit", real)
        assert (await admission.submit(request())).codes[0] == 0
