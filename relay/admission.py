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
from msgspec import Struct

from relay.errors import QueueUnavailable
from relay.outcomes import Outcome
from relay.queue import Packed, Refused, Reply, Told, pack_request
from relay.queueable import Request

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
Pending = tuple[Packed, int, Then]  # a request, with the number of its events


class Commits(Protocol):
    """The part of the queue that admission needs."""

    async def commit(
        self, slot: str, seq: int, requests: Sequence[Packed], refused: list[Refused]
    ) -> list[Reply]: ...

    def commit_now(
        self,
        slot: str,
        seq: int,
        requests: Sequence[Packed],
        refused: list[Refused],
        then: Told,
    ) -> bool: ...


class _Commit(Struct, gc=False):
    """Requests on their way to Redis, under one number."""

    admission: "Admission"
    slot: str
    seq: int
    batch: list[Pending]
    refused: Counter[tuple[str, str, str]]  # what rides along
    deadline: float  # of trying, by the loop's clock

    @property
    def requests(self) -> list[Packed]:
        return [packed for packed, _, _ in self.batch]

    @property
    def counts(self) -> list[Refused]:
        return [(*kind, n) for kind, n in self.refused.items()]

    def told(self, said: list[Reply] | QueueUnavailable | None) -> None:
        if isinstance(said, list) and len(said) == len(self.batch):
            self.admission.answered(self, said)
            return
        if isinstance(said, QueueUnavailable):
            log.warning("admission.commit_repeated", reason=said.reason)
        self.admission.insist(self, sent=True)


class Admission:
    """The way into the queue for one process."""

    def __init__(self, queue: Commits, *, deadline_s: float = DEADLINE_S) -> None:
        self._queue = queue
        self._deadline_s = deadline_s
        self._waiting: deque[Pending] = deque()
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
        self._all_back: asyncio.Event | None = None  # once somebody waits for that
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
        self._all_back = asyncio.Event()
        self._flush(final=True)
        if len(self._slots) < IN_FLIGHT:
            await self._all_back.wait()

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
        n = len(request[1])
        if (
            self._waiting_events + n > MAX_WAITING_EVENTS
            or self._waiting_bytes > MAX_WAITING_BYTES
        ):
            raise QueueUnavailable("overloaded", "Too much at once: try again soon.")
        # As Redis will get it: it takes up less, and only once.
        packed = pack_request(request)
        self._waiting.append((packed, n, then))
        self._waiting_events += n
        self._waiting_bytes += len(packed)
        if not self._slots:
            return
        if len(self._waiting) >= MAX_BATCH_REQUESTS:
            self._flush()  # Redis need not wait for what is still to be read
        elif not self._scheduled:
            # At the end of this turn of the loop: what was read together goes together.
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self, *, final: bool = False) -> None:
        self._scheduled = False
        while self._slots and (
            self._waiting or (final and (self._refused or self._unsure))
        ):
            self._send(self._slots.pop(), self._batch())

    def _send(self, slot: str, batch: list[Pending]) -> None:
        """Commit some requests: at once, or where that cannot be, in a task."""
        refused, self._refused = self._refused, Counter()
        self._seq += 1
        deadline = self._loop.time() + self._deadline_s
        commit = _Commit(self, slot, self._seq, batch, refused, deadline)
        sent = slot not in self._unsure and self._queue.commit_now(
            slot, commit.seq, commit.requests, commit.counts, commit.told
        )
        if not sent:
            self.insist(commit)

    def answered(self, commit: "_Commit", replies: list[Reply]) -> None:
        self._open_s = BREAKER_FIRST_S
        # The next commit leaves before these are answered, so that Redis has work.
        self._give_back(commit.slot)
        for (_, _, then), reply in zip(commit.batch, replies, strict=True):
            then(reply)

    def _give_back(self, slot: str) -> None:
        self._slots.append(slot)
        self._flush()
        if self._all_back is not None and len(self._slots) == IN_FLIGHT:
            self._all_back.set()

    def insist(self, commit: "_Commit", *, sent: bool = False) -> None:
        """Go on with a commit in a task: `sent` may have come through."""
        task = asyncio.create_task(self._go_on(commit, sent=sent))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _batch(self) -> list[Pending]:
        """What shares the next commit: all that waits, where that is not too much."""
        if (
            len(self._waiting) <= MAX_BATCH_REQUESTS
            and self._waiting_events <= MAX_BATCH_EVENTS
            and self._waiting_bytes <= MAX_BATCH_BYTES
        ):
            batch = [*self._waiting]
            self._waiting.clear()
            self._waiting_events = self._waiting_bytes = 0
            return batch
        batch = []
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

    async def _go_on(self, commit: "_Commit", *, sent: bool) -> None:
        try:
            replies = await self._insist(commit, sent=sent)
            if len(replies) != len(commit.batch):
                msg = f"{len(replies)} replies to {len(commit.batch)} requests"
                raise ValueError(msg)
        except QueueUnavailable as error:
            self._fail(commit.batch, error)
        except Exception as error:
            # A fault of the script or of ours: each request answers for itself.
            for _, _, then in commit.batch:
                then(error)
            # Written last, so certainly not counted.
            self._refused.update(commit.refused)
            log.exception("admission.failed")
        else:
            self.answered(commit, replies)
            return
        self._give_back(commit.slot)

    async def _insist(self, commit: "_Commit", *, sent: bool) -> list[Reply]:
        """Send one commit until it is answered, under one number: it counts once."""
        slot, seq, pause = commit.slot, commit.seq, FIRST_PAUSE_S
        while True:
            try:
                await self._make_sure(slot)
                sent = True
                return await self._queue.commit(
                    slot, seq, commit.requests, commit.counts
                )
            except QueueUnavailable as error:
                hopeless = error.reason in ("redis_full", "redis_auth")
                if hopeless or self._loop.time() + pause > commit.deadline:
                    if sent:
                        self._unsure[slot] = (seq, commit.counts)
                    else:
                        self._refused.update(commit.refused)
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

    def _fail(self, batch: list[Pending], error: QueueUnavailable) -> None:
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
