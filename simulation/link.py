"""The way to Redis, on which an answer may get lost; the referee hears the truth.

A call that fails here has taken effect: what is lost is what it said. (One that never
reached Redis is harmless to all but the one who waits, so it is not simulated.)
"""

import random
from collections.abc import Awaitable, Iterable, Sequence
from typing import TypeVar

from relay.errors import QueueUnavailable
from relay.queue import Claimed, Queue, Reply, Result, Tick
from relay.queueable import Request
from simulation.referee import Referee

T = TypeVar("T")


class Link:
    """One fleet's queue: the real one, seen through a line that may break."""

    def __init__(
        self, queue: Queue, *, referee: Referee, rng: random.Random, lost: float
    ) -> None:
        self.queue = queue
        self.referee = referee
        self._rng = rng
        self._lost = lost  # share of the answers that never come
        self._seq = 0

    async def commit(self, requests: list[Request]) -> list[Reply]:
        """Take events in; sent again under its number until an answer comes."""
        self._seq += 1
        while True:
            try:
                return await self._heard(
                    self.queue.commit("edge:0", self._seq, requests, [])
                )
            except QueueUnavailable:
                continue

    async def tick(
        self, consumer: str, wanted: int, *, look_out: bool, held: Iterable[str]
    ) -> Tick:
        tick = await self.queue.tick(consumer, wanted, look_out=look_out, held=held)
        for claimed in tick.claimed:
            self.referee.claimed(claimed, probe=tick.probe)
        return await self._heard(_known(tick))

    async def mark(self, consumer: str, claimed: Sequence[Claimed]) -> list[bool]:
        marked = await self.queue.mark(consumer, claimed)
        for one, ours in zip(claimed, marked, strict=True):
            if ours:
                self.referee.marked(one)
        return await self._heard(_known(marked))

    async def settle(self, consumer: str, results: Sequence[Result]) -> int:
        return await self._heard(self.queue.settle(consumer, results))

    async def _heard(self, said: Awaitable[T]) -> T:
        answer = await said
        if self._lost and self._rng.random() < self._lost:
            raise QueueUnavailable("redis_timeout", "The answer was lost.")
        return answer


async def _known(said: T) -> T:
    return said
