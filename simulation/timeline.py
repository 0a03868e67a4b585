"""What happens when: a heap of moments, worked off in their order."""

import heapq
from collections.abc import Awaitable, Callable

from simulation.clock import Clock

Action = Callable[[], Awaitable[None]]


class Timeline:
    """Discrete events; what falls on one moment happens in the order it was said."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._waiting: list[tuple[int, int, Action]] = []
        self._said = 0

    @property
    def now_ms(self) -> int:
        return self.clock.now_ms

    def at(self, when_ms: int, action: Action) -> None:
        """Let something happen then, or now if that is past."""
        self._said += 1
        moment = (max(when_ms, self.now_ms), self._said, action)
        heapq.heappush(self._waiting, moment)

    def after(self, ms: int, action: Action) -> None:
        self.at(self.now_ms + ms, action)

    async def run(self, until: Callable[[], bool]) -> None:
        """Work on until the condition holds, or nothing is left to happen."""
        while self._waiting and not until():
            when_ms, _, action = heapq.heappop(self._waiting)
            self.clock.now_ms = when_ms
            await action()
