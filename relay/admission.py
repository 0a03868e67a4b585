"""Take requests into the queue, many with one commit.

Whatever arrives while two commits are under way shares the next one: no timer, so
an idle relay adds no delay, and batches grow with the load. Each request waits only
for its own result. A commit whose answer was lost is sent again under the same
number, which takes effect once; so a request fails here only when Redis stays away
for longer than the deadline, and then the sender is told to come back.

Refusals of the edge are gathered and ride along, at the latest after half a second.
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from secrets import token_hex
from typing import Protocol

import structlog

from relay.errors import QueueUnavailable
from relay.outcomes import Outcome
from relay.queue import Packed, Refused, Reply, Request, pack_request

# Beyond it a commit gains little, and while Redis has a large one the edge has nothing
# to do: two of so many requests keep both busy. A page's batch costs the edge less.
MAX_BATCH_REQUESTS, MAX_BATCH_EVENTS = 24, 128
MAX_BATCH_BYTES = 256 * 1024
IN_FLIGHT = 2  # one being answered while the next one gathers
MAX_WAITING_EVENTS, MAX_WAITING_BYTES = 5_000, 16 * 1024 * 1024
DEADLINE_S = 2.0  # how long one commit is tried
FIRST_PAUSE_S = 0.02
BREAKER_FIRST_S, BREAKER_MAX_S = 0.5, 5.0
REFUSALS_EVERY_S = 0.5
MAX_REFUSAL_KINDS = 1_000

log = structlog.get_logger()


# Whoever waits for a result. Must not raise.
Then = Callable[[Reply | Exception], None]
Waiting = tuple[Packed, int, Then]  # with the number of its events


class Commits(Protocol):
    """The part of the queue that admission needs."""

    async def commit(
        self, slot: str, seq: int, requests: Sequence[Packed], refused: list[Refused]
    ) -> list[Reply]: ...


class Admission:
    """The way into the queue for one process."""

    def __init__(self, queue: Commits, *, deadline_s: float = DEADLINE_S) -> None:
        self._queue = queue
        self._deadline_s = deadline_s
        self._waiting: deque[Waiting] = deque()
        self._waiting_events = self._waiting_bytes = 0
        self._refused: Counter[tuple[str, str, str]] = Counter()
        # A slot remembers its last reply in Redis, so each has one commit at a time.
        writer = token_hex(6)
        self._slots = [f"{writer}:{n}" for n in range(IN_FLIGHT)]
        self._seq = 0
        # By slot: a commit that was given up without knowing whether it took effect.
        self._unsure: dict[str, tuple[int, list[Refused]]] = {}
        self._scheduled = False
        self._running: set[asyncio.Task[None]] = set()
        self._open_until = 0.0
        self._open_s = BREAKER_FIRST_S
        self._flusher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        # Kept, for to ask for it costs a call of the system each time.
        self._loop = asyncio.get_running_loop()
        self._flusher = asyncio.create_task(self._flush_refusals())

    async def stop(self) -> None:
        """Finish what is waiting; call it when no request is left to come."""
        if self._flusher is not None:
            self._flusher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flusher
        self._flush(final=True)
        while self._running:
            await asyncio.wait(self._running)

    def refuse(self, outcome: Outcome, reason: str, name: str) -> None:
        """Count an event that the edge refused."""
        key = (str(outcome), reason, name)
        if key not in self._refused and len(self._refused) >= MAX_REFUSAL_KINDS:
            key = (str(outcome), reason, "")  # Redis is away and names pile up
        self._refused[key] += 1

    def note(self, field: str) -> None:
        """Count something that is no outcome, in the minute and the hour."""
        self._refused["", field, ""] += 1

    def note_browser(self, field: str, n: int) -> None:
        """Count what a snippet reported, in the day: `<family>:<kind>`."""
        self._refused["browser", field, ""] += n

    def submit(self, request: Request) -> asyncio.Future[Reply]:
        """Queue a request's events; the future gives the result or `QueueUnavailable`.

        Raises `QueueUnavailable` at once while Redis is known to be away, and when
        more waits than can be taken in soon.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        self.submit_then(request, partial(_settle, future))
        return future

    def submit_then(self, request: Request, then: Then) -> None:
        """The same for who needs no future: `then` gets the result, or what failed."""
        if self._open_until and self._open_until > self._loop.time():
            raise QueueUnavailable(
                "redis_unreachable", "The queue is away: try again soon."
            )
        events = request[1]
        if (
            self._waiting_events + len(events) > MAX_WAITING_EVENTS
            or self._waiting_bytes > MAX_WAITING_BYTES
        ):
            raise QueueUnavailable("overloaded", "Too much at once: try again soon.")
        # As Redis will get it: it takes up less, and only once.
        packed = pack_request(request)
        self._waiting.append((packed, len(events), then))
        self._waiting_events += len(events)
        self._waiting_bytes += len(packed)
        if not self._scheduled and self._slots:
            # At the end of this turn of the loop: what was read together goes together.
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self, *, final: bool = False) -> None:
        self._scheduled = False
        while self._slots and (
            self._waiting or (final and (self._refused or self._unsure))
        ):
            task = asyncio.create_task(self._commit(self._slots.pop(), self._batch()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _batch(self) -> list[Waiting]:
        batch: list[Waiting] = []
        events = size = 0
        while self._waiting:
            packed, n, _ = self._waiting[0]
            full = (
                len(batch) == MAX_BATCH_REQUESTS
                or events + n > MAX_BATCH_EVENTS
                or size + len(packed) > MAX_BATCH_BYTES
            )
            if batch and full:
                break
            batch.append(self._waiting.popleft())
            events += n
            size += len(packed)
        self._waiting_events -= events
        self._waiting_bytes -= size
        return batch

    async def _commit(self, slot: str, batch: list[Waiting]) -> None:
        refused, self._refused = self._refused, Counter()
        answers: list[tuple[Waiting, Reply]] = []
        try:
            replies = await self._insist(
                slot, [packed for packed, _, _ in batch], refused
            )
            self._open_s = BREAKER_FIRST_S
            answers = list(zip(batch, replies, strict=True))
        except QueueUnavailable as error:
            self._fail(batch, error)
        except Exception as error:
            # A fault of the script or of ours: each request answers for itself.
            for _, _, then in batch:
                then(error)
            self._refused.update(refused)  # written last, so certainly not counted
            log.exception("admission.failed")
        finally:
            self._slots.append(slot)
            self._flush()
        # The next commit leaves before these are answered, so that Redis has work.
        await asyncio.sleep(0)
        for (_, _, then), reply in answers:
            then(reply)

    async def _insist(
        self, slot: str, requests: list[Packed], refused: Counter[tuple[str, str, str]]
    ) -> list[Reply]:
        """Send one commit until it is answered, under one number: it counts once."""
        self._seq += 1
        seq, pause = self._seq, FIRST_PAUSE_S
        counts: list[Refused] = [(*kind, n) for kind, n in refused.items()]
        deadline = self._loop.time() + self._deadline_s
        sent = False
        while True:
            try:
                await self._make_sure(slot)
                sent = True
                return await self._queue.commit(slot, seq, requests, counts)
            except QueueUnavailable as error:
                hopeless = error.reason in ("redis_full", "redis_auth")
                if hopeless or self._loop.time() + pause > deadline:
                    if sent:
                        self._unsure[slot] = (seq, counts)
                    else:
                        self._refused.update(refused)
                    raise
                log.warning("admission.commit_repeated", reason=error.reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.25)

    async def _make_sure(self, slot: str) -> None:
        """Settle what became of a commit that was given up.

        Its requests were told 503, so it is repeated without them: the same number
        takes effect once, now or then, and the refusals it carried are counted once.
        """
        if slot in self._unsure:
            seq, counts = self._unsure[slot]
            await self._queue.commit(slot, seq, [], counts)
            del self._unsure[slot]

    def _fail(self, batch: list[Waiting], error: QueueUnavailable) -> None:
        """Redis stayed away: answer everyone who waits, and ask again in a while."""
        again_in_s = self._open_s
        self._open_until = self._loop.time() + again_in_s
        self._open_s = min(2 * again_in_s, BREAKER_MAX_S)
        for _, _, then in (*batch, *self._waiting):
            then(error)
        self._waiting.clear()
        self._waiting_events = self._waiting_bytes = 0
        log.error("admission.unavailable", reason=error.reason, again_in_s=again_in_s)

    async def _flush_refusals(self) -> None:
        while True:
            await asyncio.sleep(REFUSALS_EVERY_S)
            idle = len(self._slots) == IN_FLIGHT
            away = self._open_until > self._loop.time()
            if (self._refused or self._unsure) and idle and not away:
                self._flush(final=True)


def _settle(future: asyncio.Future[Reply], result: Reply | Exception) -> None:
    if future.done():  # its request may have been cancelled
        return
    if isinstance(result, Reply):
        future.set_result(result)
    else:
        future.set_exception(result)
