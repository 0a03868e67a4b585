"""Deliver queued events to Voucherify, no faster than it allows.

Asks the shared budget first, then claims, sends and settles. At least once for
plain events: settled only after Voucherify has answered. At most once for events
that pay: what may have arrived is never sent again, it goes to the dead letters as
`ambiguous`; a durable mark before the first byte tells the two apart after a crash.
Where its rule is `verify`, it is looked up in Voucherify before either.

Redis may come and go: results are kept until it takes them. Nothing here decides
about an event's state alone; the scripts do, and only for its present owner.
"""

import asyncio
import random
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import structlog

from relay.errors import QueueUnavailable
from relay.judgement import Backoff, given_back, interrupted, judged, not_processed
from relay.queue import Claimed, Queue, Result, consumer_name
from relay.retry import next_delay_ms
from relay.verdicts import Answer

LOOK_OUT_S = 4.0  # between two looks for dead forwarders: 20 s + 4 s < 30 s
NAP_S = 1.0  # the longest time without a heartbeat, and without a look at the holds
SENT_KEPT = 10_000
SETTLE_MAX = 128
SETTLE_TRIES = 3  # of one result that Redis does not take for a reason of its own
BACKOFF_S, BACKOFF_MAX_S = 0.05, 2.0
# How old a mark may be when the first byte leaves. After 20 s without a heartbeat
# another forwarder takes the event over, and may have it sent again: whoever stood
# still for so long (a stopped process, a paused machine) sends it no more.
MARK_GOOD_S = 10.0
LAST_SETTLE_S = 3.0  # after the drain: for Redis to take the last results
# How long a free hand waits for others that become free, so that they claim together.
GATHER_S = 0.002

log = structlog.get_logger()


def _backoff(attempt: int, told_ms: int | None) -> int:
    return next_delay_ms(attempt, told_ms, random.random)


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment by both clocks: each stands still where the other one goes on."""

    monotonic: float
    wall: float

    @classmethod
    def now(cls) -> "Moment":
        return cls(time.monotonic(), time.time())

    def passed_s(self) -> float:
        return max(time.monotonic() - self.monotonic, time.time() - self.wall)


class Upstream(Protocol):
    """Whoever can send one event and say what came of it."""

    async def send(self, body: bytes) -> Answer: ...

    async def look_up(self, body: bytes, *, proof: str, since_ms: int) -> Answer: ...


class Forwarder:
    """One delivering process; any number of them share a queue and its budget."""

    def __init__(
        self,
        *,
        queue: Queue,
        upstream: Upstream,
        concurrency: int = 32,
        drain_timeout_s: float = 10.0,
        backoff: Backoff = _backoff,
        name: str | None = None,
        look_out_s: float = LOOK_OUT_S,
    ) -> None:
        self.name = name or consumer_name()
        self._queue = queue
        self._upstream = upstream
        self._concurrency = concurrency
        self._drain_timeout_s = drain_timeout_s
        self._backoff = backoff
        self._look_out_s = look_out_s
        self._looked_out = float("-inf")
        self._calls: set[asyncio.Task[None]] = set()
        # The places of all that was claimed and is not settled yet: what is called for
        # now, and as many results again while Redis takes its time.
        self._held: set[str] = set()
        # What this process sent and may have arrived, of what must not be sent twice,
        # and the attempts that were spent before. Redis may go back in time (a
        # failover, a lost second) and hand it out anew, with as few attempts as then.
        self._sent: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._results: list[Result] = []
        self._settling: asyncio.Task[None] | None = None
        self._bell: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._stopping = False

    async def run(self) -> None:
        """Deliver until `stop`; returns when everything in flight is settled."""
        pause = BACKOFF_S
        while not self._stopping:
            self._wake.clear()
            try:
                await self._turn()
                pause = BACKOFF_S
            except QueueUnavailable as error:
                log.warning("forwarder.queue_unavailable", reason=error.reason)
                await self._nap(pause)
                pause = min(2 * pause, BACKOFF_MAX_S)
            except Exception:
                # The top of the loop: our bug must not end the delivery of the rest.
                log.exception("forwarder.failed")
                await self._nap(BACKOFF_MAX_S)
        await self._drain()

    def stop(self) -> None:
        """Claim nothing more; `run` returns after the drain."""
        self._stopping = True
        self._wake.set()

    async def _turn(self) -> None:
        now = asyncio.get_running_loop().time()
        look_out = now - self._looked_out >= self._look_out_s
        # With no hand free it is a heartbeat only.
        tick = await self._queue.tick(
            self.name,
            self._free,
            look_out=look_out,
            held=tuple(self._held) if look_out else (),
        )
        if look_out:
            self._looked_out = now
        since = Moment.now()
        unmarked = await self._mark(tick.claimed)
        # Not before: what a fault leaves without a task is given back by a look-out.
        self._held.update(claimed.place for claimed in tick.claimed)
        for claimed in tick.claimed:
            task = asyncio.create_task(
                self._deliver(
                    claimed,
                    probe=tick.probe,
                    unmarked=unmarked.get(claimed.place),
                    since=since,
                )
            )
            self._calls.add(task)
            task.add_done_callback(self._landed)
        if not self._free:
            await self._nap(NAP_S)
        elif tick.doorbell:
            await self._idle(tick.doorbell, tick.wait_ms)
        elif tick.wait_ms > 0:
            await self._nap(min(tick.wait_ms / 1000, NAP_S))

    async def _mark(self, claimed: list[Claimed]) -> dict[str, str]:
        """Mark what must not be sent twice; which may not be sent, and why not."""
        paying = [c for c in claimed if c.once and not c.doubted_ms]
        if not paying:
            return {}
        try:
            marked = await self._queue.mark(self.name, paying)
        except QueueUnavailable as error:
            return {c.place: error.reason for c in paying}
        return {c.place: "" for c, ours in zip(paying, marked, strict=True) if not ours}

    @property
    def _free(self) -> int:
        """How many more can be called for. As many results may wait for Redis.

        To let more of them wait is slower: fewer share a claim.
        """
        unsettled = len(self._held) - len(self._calls)
        return max(0, self._concurrency - max(len(self._calls), unsettled))

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._claim_soon()

    def _claim_soon(self) -> None:
        """Claim for the hands that are free now, together with those free soon."""
        if self._free >= self._concurrency // 2:
            self._wake.set()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(
                GATHER_S, self._gathered
            )

    def _gathered(self) -> None:
        self._gathering = None
        self._wake.set()

    async def _nap(self, seconds: float) -> None:
        """Sleep, unless something happens here first."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _idle(self, last: list[str], wait_ms: int) -> None:
        """Nothing to send: wait for a new event, a due retry or a stop."""
        if self._bell is None:
            self._bell = asyncio.create_task(
                self._queue.doorbell(last, int(NAP_S * 1000))
            )
        woken = asyncio.create_task(self._wake.wait())
        # Longer than the bell's own time only when its connection is dead.
        due = 2 * NAP_S if wait_ms < 0 else min(max(wait_ms, 1) / 1000, 2 * NAP_S)
        await asyncio.wait(
            {self._bell, woken}, timeout=due, return_when=asyncio.FIRST_COMPLETED
        )
        woken.cancel()
        # A bell that has not rung stays: at worst it rings for what was taken since,
        # and cancelling a client that is just connecting can take its whole BLOCK.
        if self._bell.done():
            rung, self._bell = self._bell, None
            rung.result()

    # --- one event --------------------------------------------------------------------

    async def _deliver(
        self, claimed: Claimed, *, probe: bool, unmarked: str | None, since: Moment
    ) -> None:
        """Send one event, and have it settled; `unmarked`: why it may not be sent."""
        if unmarked == "":  # another forwarder has taken it over
            self._held.discard(claimed.place)
            return
        key = (claimed.id, claimed.received_ms)
        if unmarked is not None:
            result = given_back(claimed, unmarked, probe=probe)
        elif claimed.attempts <= self._sent.get(key, -1) and not claimed.doubted_ms:
            result = interrupted(claimed, "claimed_again")
        elif claimed.once and since.passed_s() > MARK_GOOD_S:
            result = given_back(claimed, "stalled", probe=probe)
        else:
            result = await self._send(claimed, key, probe=probe)
        self._settle(result)

    async def _send(
        self, claimed: Claimed, key: tuple[str, int], *, probe: bool
    ) -> Result:
        if claimed.once and not claimed.doubted_ms:
            self._sent[key] = claimed.attempts
            if len(self._sent) > SENT_KEPT:
                self._sent.popitem(last=False)
        try:
            answer = await self._ask(claimed)
            result = self._result(claimed, answer, probe=probe)
        except asyncio.CancelledError:  # the drain took too long
            return interrupted(claimed, "drain_timeout")
        except Exception:
            # Our bug: the event's own rule says what a lost attempt means for it.
            log.exception("forwarder.delivery_failed")
            return interrupted(claimed, "internal")
        if not_processed(result):
            self._sent.pop(key, None)
        return result

    async def _ask(self, claimed: Claimed) -> Answer:
        """Send it, or look for it first; one call either way, as the budget has it."""
        body = claimed.body.encode()
        if not claimed.doubted_ms:
            return await self._upstream.send(body)
        return await self._upstream.look_up(
            body, proof=claimed.proof, since_ms=claimed.doubted_ms
        )

    def _result(self, claimed: Claimed, answer: Answer, *, probe: bool) -> Result:
        result = judged(claimed, answer, probe=probe, backoff=self._backoff)
        if result.verdict != "delivered":
            log.warning(
                "forwarder.not_delivered",
                verdict=result.verdict,
                reason=answer.reason,
                status=answer.status,
                request_id=answer.request_id,
                attempt=claimed.attempts + 1,
                looked_up=claimed.doubted_ms > 0,
                delay_ms=result.delay_ms,
            )
        return result

    # --- settling ---------------------------------------------------------------------

    def _settle(self, result: Result) -> None:
        """Have a result taken to Redis, with what else there is by then."""
        self._results.append(result)
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle_all())

    async def _settle_all(self) -> None:
        pause, size, failed = BACKOFF_S, SETTLE_MAX, 0
        while self._results:
            part = self._results[:size]
            try:
                await self._queue.settle(self.name, part)
            except QueueUnavailable as error:
                # Kept until Redis is back: forgetting would send them again.
                log.warning("forwarder.settle_waits", reason=error.reason)
                await asyncio.sleep(pause)
                pause = min(2 * pause, BACKOFF_MAX_S)
                continue
            except Exception:
                log.exception("forwarder.settle_failed", results=len(part))
                failed += 1
                if len(part) > 1 or failed < SETTLE_TRIES:
                    size = 1  # one by one, so that a bad one holds up nobody else
                    await asyncio.sleep(BACKOFF_S)
                    continue
                # Its event stays in flight, unknown to us: the next look-out takes it
                # over by its rule.
            failed = 0
            del self._results[: len(part)]
            self._held.difference_update(f"{r.lane}:{r.entry}" for r in part)
            self._claim_soon()
            if not self._results:
                size = SETTLE_MAX

    async def _drain(self) -> None:
        """Finish what is in flight, then give the rest back, then let go."""
        if self._bell is not None:
            self._bell.cancel()
            await asyncio.gather(self._bell, return_exceptions=True)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_timeout_s
        if self._held:
            log.info("forwarder.draining", in_flight=len(self._held))
        if self._calls:
            await asyncio.wait(self._calls, timeout=self._drain_timeout_s)
        late = set(self._calls)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=LAST_SETTLE_S)
        if self._settling is not None and not self._settling.done():
            left_s = max(LAST_SETTLE_S, until - loop.time())
            await asyncio.wait({self._settling}, timeout=left_s)
        if self._settling is not None and not self._settling.done():
            # Redis is away: these are taken over later, by the rule of each event.
            log.error("forwarder.unsettled", results=len(self._results))
            self._settling.cancel()
            await asyncio.gather(self._settling, return_exceptions=True)
