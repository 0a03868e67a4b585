"""Replay dead letters: a canary of ten first, then a hundred at a time.

The state of a replay is in Redis, and every turn begins with reading it: whoever runs
it may be killed, or lose an answer, at any moment, and it can be resumed by another
process. What becomes of its events is counted there by the scripts that settle them.
It only enqueues; the forwarders deliver, at the pace of their budget. Nothing here
prints.

It does not put anything back: what it has sent stays in the queue when it stops.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from secrets import token_hex

import msgspec
import structlog

from relay.dead_letters import BATCH
from relay.errors import QueueUnavailable, RelayError
from relay.outcomes import Outcome, held_by
from relay.queue import Letters, Queue

CANARY, CHUNK = 10, 100
# Stop when more than a tenth of a part has failed, of at least so many: else the first
# outcome of a part alone could stop it.
LEAST_JUDGED = 10
POLL_S = 0.5
# How long the outcomes of a part are waited for: twice what the queue should take.
PATIENCE_S, PATIENCE_FACTOR = 60.0, 2.0
REDIS_AWAY_S = 20.0  # then it stops, and can be resumed

log = structlog.get_logger()


class Why(StrEnum):
    """Why a replay has stopped before its end."""

    FAILED = "failed"  # too many of its events died again
    STALLED = "stalled"  # their outcomes did not come in time
    HELD = "held"  # likewise, for delivery is held
    QUEUE_FULL = "queue_full"  # RELAY_QUEUE_MAX
    INTERRUPTED = "interrupted"  # an operator stopped it, or the process ended


# What the operator does about it; docs/operations.md has the same words.
REPLAY_CURES = {
    "failed": "The rest is left as it was. See what `relay dead-letters list` says of "
    "these reasons, put it right, then resume: another canary goes first.",
    "stalled": "What was sent waits in the queue. See `relay stats`, then resume.",
    "held": "What was sent waits in the queue. End the hold, then resume.",
    "queue_full": "Wait until the queue is shorter, or raise RELAY_QUEUE_MAX, then "
    "resume.",
    "interrupted": "Resume whenever you like.",
}


class ReplayBusy(RelayError):
    """Somebody else runs a replay, or has taken this one over."""


class NothingToResume(RelayError):
    """There is no replay that was begun and not finished."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be replayed; kept in Redis for whoever resumes it."""

    letters: Letters = Letters()
    limit: int | None = None
    new_ttl_ms: int = 0
    may_pay_twice: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the last replay got."""

    state: str  # running, stopped or done
    why: str  # it stopped: one of Why
    phase: str  # canary or sending
    planned: int
    sent: int
    skipped: dict[str, int]  # by obstacle
    outcomes: dict[str, int]  # of what was sent
    failures: dict[str, int]  # by outcome and reason: "rejected:invalid_payload"
    hold: str
    started_ms: int
    alive: bool  # some process runs it now

    @property
    def delivered(self) -> int:
        return self.outcomes.get(Outcome.DELIVERED, 0)

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def pending(self) -> int:
        """Sent, and without an outcome yet."""
        return self.sent - sum(self.outcomes.values())


def read_progress(
    fields: Mapping[str, str], *, now_ms: int, hold: str = ""
) -> Progress | None:
    """Read the hash; None when there never was a replay."""
    if "run" not in fields:
        return None

    def under(head: str) -> dict[str, int]:
        return {
            n.removeprefix(head): int(v)
            for n, v in fields.items()
            if n.startswith(head)
        }

    return Progress(
        state=fields["state"],
        why=fields["why"],
        phase=fields["phase"],
        planned=int(fields["planned"]),
        sent=int(fields["sent"]),
        skipped=under("skipped:"),
        outcomes={str(o): int(fields[o]) for o in Outcome if o in fields},
        failures=under("failed:"),
        hold=hold,
        started_ms=int(fields["started_ms"]),
        alive=int(fields.get("lease_ms", 0)) > now_ms,
    )


async def last_progress(queue: Queue) -> Progress | None:
    """How far the last replay got, whoever ran it."""
    fields = await queue.hash("replay")
    hold = held_by(await queue.hash("flow"))
    now_ms = int((await queue.now()).timestamp() * 1000)
    return read_progress(fields, now_ms=now_ms, hold=hold)


def told_progress(progress: Progress) -> dict[str, object]:
    """The same for programs."""
    return asdict(progress) | {
        "delivered": progress.delivered,
        "failed": progress.failed,
        "pending": progress.pending,
        "cure": REPLAY_CURES.get(progress.why, ""),
    }


class Replay:
    """One replay in one process. `begin` or `resume`, then go through `run`."""

    def __init__(
        self,
        queue: Queue,
        *,
        ttl_ms: int,
        queue_max: int,
        batch: int = BATCH,
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._ttl_ms = ttl_ms
        self._queue_max = queue_max
        self._batch = batch
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._clock = clock
        self._owner = token_hex(8)
        self._run = ""
        self._plan = Plan()
        self._fields: dict[str, str] = {}
        self._hold = ""
        self._stopped = asyncio.Event()
        self._chunk = ""  # the part whose outcomes are waited for
        self._until = 0.0  # and how long

    async def begin(self, plan: Plan, planned: int) -> None:
        """Take the lease for a new replay, or raise `ReplayBusy`."""
        run = token_hex(6)
        text = msgspec.json.encode(plan).decode()
        packed = plan.letters.packed()
        self._take(await self._ask("begin", run, text, packed, planned))
        log.info("replay.begun", planned=planned)

    async def resume(self) -> None:
        """Go on with the last one, or raise `ReplayBusy` or `NothingToResume`."""
        self._take(await self._ask("resume", ""))
        self._chunk = ""
        log.info("replay.resumed", sent=self._n("sent"), planned=self._n("planned"))

    def stop(self) -> None:
        """Send nothing more; `run` ends soon. What was sent stays sent."""
        self._stopped.set()

    @property
    def progress(self) -> Progress:
        """How far it got, by the last look."""
        told = read_progress(self._fields, now_ms=0, hold=self._hold)
        if told is None:
            raise RuntimeError("a replay begins with begin or resume")
        return told

    async def run(self) -> AsyncIterator[Progress]:
        """Send part after part, and tell how far it got after each look.

        Raises `ReplayBusy` when another process has taken over, `QueueUnavailable` when
        Redis stays away; it can be resumed after either.
        """
        away_since: float | None = None
        while self._fields["state"] == "running":
            idle = True
            try:
                idle = await self._turn()
                away_since = None
            except QueueUnavailable:
                if away_since is None:
                    away_since = self._clock()
                if self._clock() - away_since > REDIS_AWAY_S:
                    raise
            yield self.progress
            if idle and self._fields["state"] == "running":
                await self._pause()
        done = self.progress
        log.info("replay.ended", state=done.state, why=done.why, sent=done.sent)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._poll_s):
                await self._stopped.wait()
        except TimeoutError:
            pass

    # --- one turn ---------------------------------------------------------------------

    async def _turn(self) -> bool:
        """Read how it stands, and do the one thing that follows.

        True when there is nothing to do but to wait.
        """
        await self._step("keep")
        await self._look_at_hold()
        if self._fields["state"] != "running":
            return False  # it had ended, and the answer was lost
        sent, failed = self._n("chunk_sent"), self._n("chunk_failed")
        known = failed + self._n("chunk_passed")
        canary, over = self._fields["phase"] == "canary", self._is_over()
        # Of a larger part a tenth may be late: it is not worth waiting for a retry.
        late = 0 if canary or over else sent // 10
        if self._stopped.is_set():
            await self._end("stopped", Why.INTERRUPTED)
        elif failed > (0 if canary else max(known, LEAST_JUDGED) / 10):
            await self._end("stopped", Why.FAILED)
        elif not over and sent < self._size():
            await self._send(fresh=False)
        elif sent - known > late:
            return await self._wait_for_outcomes(sent - known)
        elif over:
            await self._end("done", "")
        else:
            if canary:
                await self._step("pass")
            await self._send(fresh=True)
        return False

    async def _look_at_hold(self) -> None:
        hold = held_by(await self._queue.hash("flow"))
        if self._hold and not hold:
            self._chunk = ""  # delivery goes on, and gets its full time
        self._hold = hold

    async def _wait_for_outcomes(self, missing: int) -> bool:
        """Wait in turns, for a time that the length of the queue decides."""
        if self._chunk != self._fields["chunk"]:
            gauges = await self._queue.hash("gauges")
            rate = float(gauges.get("budget_per_s") or 0)
            queue_s = float(gauges.get("eta_s") or 0) + (missing / rate if rate else 0)
            self._until = self._clock() + self._patience_s + PATIENCE_FACTOR * queue_s
            if self._plan.may_pay_twice:  # some are looked up first, in their time
                self._until += self._queue.look_up_ms / 1000
            self._chunk = self._fields["chunk"]
        if self._clock() < self._until:
            return True
        if self._is_over():  # nothing is left that could be held back
            await self._end("done", "")
        else:
            await self._end("stopped", Why.HELD if self._hold else Why.STALLED)
        return False

    def _is_over(self) -> bool:
        limit = self._plan.limit
        enough = limit is not None and self._n("sent") >= limit
        return enough or self._fields["ended"] == "1"

    def _size(self) -> int:
        return CANARY if self._fields["phase"] == "canary" else CHUNK

    async def _send(self, *, fresh: bool) -> None:
        room = self._size() - (0 if fresh else self._n("chunk_sent"))
        if self._plan.limit is not None:
            room = min(room, self._plan.limit - self._n("sent"))
        settings = [
            *(room, self._batch, self._ttl_ms, self._plan.new_ttl_ms),
            *(self._plan.may_pay_twice, self._queue_max, self._queue.look_up_ms),
        ]
        await self._step(
            "send",
            self._fields["seq"],
            "1" if fresh else "0",
            self._plan.letters.packed(),
            msgspec.msgpack.encode(settings),
        )
        if self._fields["full"] == "1":
            await self._end("stopped", Why.QUEUE_FULL)

    async def _end(self, state: str, why: str) -> None:
        await self._step("end", state, why)

    async def _step(self, what: str, *args: object) -> None:
        self._take(await self._ask(what, self._run, *args))

    async def _ask(self, what: str, run: str, *args: object) -> list[str]:
        return await self._queue.replay(what, run, self._owner, *args)

    def _take(self, said: list[str]) -> None:
        match said:
            case ["busy", ms]:
                raise ReplayBusy(
                    "A replay is running in another process: wait for its end. If that "
                    f"process is gone, ask again in {-(-float(ms) // 1000):.0f} s."
                )
            case ["lost"]:
                raise ReplayBusy("Another process has taken this replay over.")
            case ["none"]:
                raise NothingToResume("There is no unfinished replay to resume.")
        self._fields = dict(zip(said[::2], said[1::2], strict=True))
        self._run = self._fields["run"]
        if plan := self._fields.get("plan"):
            self._plan = msgspec.json.decode(plan, type=Plan)

    def _n(self, field: str) -> int:
        return int(self._fields[field])
