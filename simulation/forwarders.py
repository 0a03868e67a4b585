"""A forwarder in simulated time: the turns of relay/forwarder.py without its sockets.

What is claimed, marked, sent and settled, and in which order, is as there; what an
answer means is decided by the same module. Whoever is killed forgets everything; what
it has sent arrives all the same.

Two liberties, so that a quiet night costs no time: while the queue says that nothing
can be had before a moment, it is not asked before that; and a heartbeat is given only
while somebody has an event in hand, or may have left one behind.
"""

import random
from collections import OrderedDict
from collections.abc import Callable

from relay.errors import QueueUnavailable
from relay.forwarder import LOOK_OUT_S, SENT_KEPT, SETTLE_MAX
from relay.judgement import given_back, interrupted, judged, not_processed
from relay.queue import Claimed, Result, Tick
from relay.retry import next_delay_ms
from simulation.link import Link
from simulation.timeline import Timeline
from simulation.voucherify import Heard, Voucherify

LOOK_OUT_MS = int(LOOK_OUT_S * 1000)
REDIS_MS = 2  # to Redis and back; results that come meanwhile go together
AWAY_MS = 50  # after an answer of Redis that did not come
# From the claim to Voucherify: each call takes its own time to leave. The scripts keep
# their windows 100 ms longer for that, and a longer wait on the way would break them.
MEAN_DEPARTURE_MS, MAX_DEPARTURE_MS = 10, 95
STRAY_MS = 60_000  # 20 s for a heartbeat to be missed, 20 s of amnesty, some looks


class Watch:
    """Whether anybody has to give heartbeats and to look out for the dead."""

    def __init__(self) -> None:
        self.in_hand = 0
        self.until_ms = 0

    def needed(self, now_ms: int) -> bool:
        return self.in_hand > 0 or now_ms < self.until_ms


class Forwarder:
    """One delivering process, until it is killed."""

    def __init__(
        self,
        name: str,
        *,
        link: Link,
        voucherify: Voucherify,
        timeline: Timeline,
        watch: Watch,
        rng: random.Random,
        concurrency: int,
        egress: str,
        idle: Callable[[], None],
    ) -> None:
        self.name = name
        self._link = link
        self._voucherify = voucherify
        self._timeline = timeline
        self._watch = watch
        self._rng = rng
        self._concurrency = concurrency
        self._egress = egress
        self._idle = idle  # told when there is nothing at all to do
        self._alive = True
        self._in_hand: dict[str, Claimed] = {}
        self._sent: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._results: list[Result] = []
        self._settling = False
        self._looked_out_ms = 0
        self._turn_no = 0  # a turn that was brought forward makes the old one void
        self._listening = False  # to the doorbell
        self._shut_until_ms = 0

    def start(self) -> None:
        self._wake()

    def kill(self) -> None:
        """SIGKILL: nothing is finished, nothing is given back."""
        self._alive = False
        self._watch.in_hand -= len(self._in_hand)
        self._watch.until_ms = self._timeline.now_ms + STRAY_MS

    def rung(self) -> None:
        """There is a new event."""
        if self._listening:
            self._wake()

    # --- a turn ---------------------------------------------------------------------

    def _wake(self, after_ms: int = 0) -> None:
        self._turn_no += 1
        self._listening = False
        number = self._turn_no

        async def turn() -> None:
            if self._alive and number == self._turn_no:
                await self._turn()

        self._timeline.after(after_ms, turn)

    async def _turn(self) -> None:
        now = self._timeline.now_ms
        look_out = now - self._looked_out_ms >= LOOK_OUT_MS
        free = self._concurrency - len(self._in_hand)
        held = list(self._in_hand) if look_out else []
        try:
            tick = await self._link.tick(self.name, free, look_out=look_out, held=held)
        except QueueUnavailable:
            self._watch.until_ms = now + STRAY_MS  # it may have given us something
            self._wake(AWAY_MS)
            return
        if look_out:
            self._looked_out_ms = now
        unmarked = await self._mark(tick.claimed)
        for claimed in tick.claimed:
            self._take(claimed, unmarked.get(claimed.place), probe=tick.probe)
        self._rest(tick, free)

    def _rest(self, tick: Tick, free: int) -> None:
        """When to ask again; a landing or the doorbell may bring it forward."""
        wait_ms = tick.wait_ms
        short = wait_ms > 0 and not tick.doorbell and len(tick.claimed) < free
        self._shut_until_ms = self._timeline.now_ms + wait_ms if short else 0
        if (
            len(self._in_hand) < self._concurrency
            and not tick.doorbell
            and wait_ms <= 0
        ):
            self._wake(1 if free == 0 or not tick.claimed else 0)
            return
        if self._watch.needed(self._timeline.now_ms):
            wait_ms = LOOK_OUT_MS if wait_ms < 0 else min(wait_ms, LOOK_OUT_MS)
        elif tick.doorbell and wait_ms < 0:
            self._idle()
        if wait_ms >= 0:
            self._wake(max(wait_ms, 1))
        self._listening = bool(tick.doorbell)

    async def _mark(self, claimed: list[Claimed]) -> dict[str, str]:
        """Mark what must not be sent twice; which may not be sent, and why not."""
        paying = [c for c in claimed if c.once]
        if not paying:
            return {}
        try:
            marked = await self._link.mark(self.name, paying)
        except QueueUnavailable as error:
            return {c.place: error.reason for c in paying}
        return {c.place: "" for c, ours in zip(paying, marked, strict=True) if not ours}

    def _take(self, claimed: Claimed, unmarked: str | None, *, probe: bool) -> None:
        if unmarked == "":
            return  # another forwarder has taken it over
        self._in_hand[claimed.place] = claimed
        self._watch.in_hand += 1
        key = (claimed.id, claimed.received_ms)
        if unmarked is not None:
            self._land(given_back(claimed, unmarked, probe=probe))
        elif claimed.attempts <= self._sent.get(key, -1):
            self._land(interrupted(claimed, "claimed_again"))
        else:
            self._send(claimed, key, probe=probe)

    # --- one call -------------------------------------------------------------------

    def _send(self, claimed: Claimed, key: tuple[str, int], *, probe: bool) -> None:
        if claimed.once:
            self._sent[key] = claimed.attempts
            if len(self._sent) > SENT_KEPT:
                self._sent.popitem(last=False)
        drawn = int(self._rng.expovariate(1 / MEAN_DEPARTURE_MS))
        leaving_ms = self._rng.randint(0, min(drawn, MAX_DEPARTURE_MS))
        travelling_ms = min(drawn, MAX_DEPARTURE_MS) - leaving_ms

        async def depart() -> None:
            if self._alive:  # else it died before the first byte had left
                self._link.referee.departed(claimed, self._timeline.now_ms)
                self._timeline.after(travelling_ms, arrive)

        async def arrive() -> None:
            heard = self._voucherify.call(claimed.body.encode(), self._egress)
            self._link.referee.arrived(
                claimed, heard, self._egress, self._timeline.now_ms
            )
            self._timeline.after(heard.after_ms, lambda: answered(heard))

        async def answered(heard: Heard) -> None:
            self._link.referee.ended(claimed)
            if self._alive:
                self._hear(claimed, key, heard, probe=probe)

        self._timeline.after(leaving_ms, depart)

    def _hear(
        self, claimed: Claimed, key: tuple[str, int], heard: Heard, *, probe: bool
    ) -> None:
        result = judged(claimed, heard.answer, probe=probe, backoff=self._backoff)
        if not_processed(result):
            self._sent.pop(key, None)
        self._link.referee.judged(claimed, result)
        self._land(result)

    def _backoff(self, attempt: int, told_ms: int | None) -> int:
        return next_delay_ms(attempt, told_ms, self._rng.random)

    # --- settling -------------------------------------------------------------------

    def _land(self, result: Result) -> None:
        self._results.append(result)
        if not self._settling:
            self._settling = True
            self._timeline.after(REDIS_MS, self._settle)

    async def _settle(self) -> None:
        if not self._alive:
            return
        part = self._results[:SETTLE_MAX]
        try:
            await self._link.settle(self.name, part)
        except QueueUnavailable:  # kept until Redis answers
            self._timeline.after(AWAY_MS, self._settle)
            return
        del self._results[: len(part)]
        for result in part:
            self._in_hand.pop(f"{result.lane}:{result.entry}")
        self._watch.in_hand -= len(part)
        self._settling = bool(self._results)
        if self._settling:
            self._timeline.after(REDIS_MS, self._settle)
        shut = self._timeline.now_ms < self._shut_until_ms
        if not shut or any(result.probe for result in part):
            self._wake()
