"""What becomes of the events that pass through the demo's shop, for its panel.

It asks for each event's outcome as `Prefer: wait` does, and tells a visitor of that
visitor's own events alone. Everything is bounded: how many events are followed and
for how long, how much of each is shown, and how many ask Redis at once. Nothing here
decides anything: an event that is not followed is delivered all the same.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from relay.digests import Digests
from relay.endpoints import Outcomes
from relay.errors import QueueUnavailable
from relay.queueable import Waiting

MAX_FOLLOWED = 200  # events of all visitors together, the newest
MAX_SHOWN = 2_000  # characters of what was sent
FOLLOW_S = 3600  # then the panel gives up; the relay does not
# Each look takes a connection to Redis, and macOS gives a process 256 files.
MAX_LOOKS = 16
LOOK_S = 0.5  # one look; then it is the next event's turn

# Nothing is decided for these: what is heard next replaces them. The rest is final,
# but for `queued`, which only an outcome replaces.
_OPEN = {"sent", "rate_limited", "unavailable", "duplicate"}

Json = dict[str, object]


@dataclass(slots=True, kw_only=True)
class Followed:
    """One event of one visitor, and the last that was heard of it.

    `status` is what the relay has answered or the outcome, and before that `sent`;
    `refused` is a request that was refused as a whole, `unfollowed` the end of
    patience.
    """

    visitor: str
    expected: Waiting
    shown: str  # what was sent, as JSON
    since: float
    status: str = "sent"
    reason: str = ""
    detail: str = ""
    until: float | None = None  # when its outcome was known
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def hear(self, said: Json) -> None:
        """Take down an entry of the relay's answer."""
        if self.status in _OPEN:
            self.status = str(said.get("status"))
            self.reason = str(said.get("reason") or "")
            self.detail = str(said.get("detail") or "")

    def settle(self, outcome: Json, now: float) -> None:
        """Take down the outcome, with Voucherify's own words if there are some."""
        error = outcome.get("error")
        words = error if isinstance(error, dict) else {}
        told = [str(words[part]) for part in ("message", "details") if words.get(part)]
        self.status = str(outcome.get("outcome"))
        self.reason = str(outcome.get("reason") or "")
        self.detail = ": ".join(told)
        self.until = now


class Follower:
    """Follows events for one shop, all visitors together."""

    def __init__(
        self,
        outcomes: Outcomes,
        digests: Digests,
        *,
        rate: float,
        most: int = MAX_FOLLOWED,
        seconds: int = FOLLOW_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outcomes = outcomes
        self._digests = digests
        self._rate = rate  # events a second that the upstream budget lets through
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._events: dict[tuple[str, str], Followed] = {}  # oldest first
        self._looks = asyncio.Semaphore(MAX_LOOKS)

    async def aclose(self) -> None:
        """Forget everything; no task is left."""
        tasks = [task for f in self._events.values() if (task := f.task)]
        self._events.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def expect(self, visitor: str, body: bytes) -> list[Followed]:
        """Take note of the events in a body, before the relay gets it."""
        found = [self._note(visitor, event) for event in _read_events(body)]
        with contextlib.suppress(QueueUnavailable):  # then no outcome will be told
            for followed in found:
                if followed.task is None and followed.until is None:
                    await self._outcomes.expect(followed.expected, self._seconds)
        return found

    def answered(self, found: list[Followed], status: int, body: bytes) -> None:
        """Take down what the relay said of them, and follow what it has taken."""
        whole, entries = _read_answer(status, body)
        for followed in found:
            followed.hear(entries.get(followed.expected.id, whole))
            taken = followed.status in ("queued", "duplicate")
            if taken and followed.task is None and self._knows(followed):
                followed.task = asyncio.create_task(self._follow(followed))

    def told(self, visitor: str) -> list[Json]:
        """What is known of a visitor's events, oldest first."""
        waiting = [f for f in self._events.values() if f.status == "queued"]
        places = {id(f): place for place, f in enumerate(waiting, start=1)}
        return [
            {
                "id": f.expected.id,
                "event": f.expected.name,
                "status": f.status,
                "reason": f.reason,
                "detail": f.detail,
                "sent": f.shown,
                "took_ms": round((f.until - f.since) * 1000) if f.until else None,
                "wait_s": self._wait_s(places.get(id(f), 0)),
            }
            for f in self._events.values()
            if f.visitor == visitor
        ]

    def _wait_s(self, place: int) -> int | None:
        """How long the event at this place waits for its turn, about."""
        return round(place / self._rate) if place and self._rate else None

    def _note(self, visitor: str, sent: Json) -> Followed:
        key = (visitor, str(sent["id"]))
        followed = self._events.get(key)
        if followed is None:
            followed = self._events[key] = self._made(visitor, sent)
            while len(self._events) > self._most:
                self._drop(next(iter(self._events)))
        elif followed.status in ("rate_limited", "unavailable"):
            followed.status, followed.detail = "sent", ""
        return followed

    def _made(self, visitor: str, sent: Json) -> Followed:
        customer = sent.get("customer")
        who = customer if isinstance(customer, dict) else {}
        digest = self._digests.customer(
            id=_text(who.get("id")), source_id=_text(who.get("source_id"))
        )
        event_id, name = str(sent["id"]), str(sent.get("event", ""))[:300]
        return Followed(
            visitor=visitor,
            # The queue looks at id and customer to tell an outcome, and at no more.
            expected=Waiting(event_id, name, digest, "", 0, "", ""),
            shown=msgspec.json.format(msgspec.json.encode(sent)).decode()[:MAX_SHOWN],
            since=self._clock(),
        )

    def _drop(self, key: tuple[str, str]) -> None:
        if task := self._events.pop(key).task:
            task.cancel()

    def _knows(self, followed: Followed) -> bool:
        key = (followed.visitor, followed.expected.id)
        return self._events.get(key) is followed

    async def _follow(self, followed: Followed) -> None:
        while self._clock() < followed.since + self._seconds:
            try:
                async with self._looks:
                    outcome = await self._outcomes.outcome(followed.expected, LOOK_S)
            except QueueUnavailable:
                await asyncio.sleep(LOOK_S)
                continue
            if outcome is not None:
                followed.settle(outcome, self._clock())
                return
        if followed.status == "queued":
            followed.status = "unfollowed"


def _read_events(body: bytes) -> list[Json]:
    """The events of a body that can be followed; a body may also be anything else."""
    try:
        said: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    if isinstance(said, dict):
        said = said.get("events", [said])
    if not isinstance(said, list):
        return []
    return [
        event
        for event in said[:100]  # the most that a body carries
        if isinstance(event, dict) and 0 < len(_text(event.get("id")) or "") <= 64
    ]


def _read_answer(status: int, body: bytes) -> tuple[Json, dict[str, Json]]:
    """What is said of the request as a whole, and of each event by its id."""
    try:
        said: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = None
    answer = said if isinstance(said, dict) else {}
    # As the snippet has it: these come again, the other refusals are for good.
    again = status in (408, 429) or not 400 <= status < 500
    word = "unavailable" if again else "refused"
    listed = answer.get("events")
    several = listed if isinstance(listed, list) else []
    entries = [entry for entry in several if isinstance(entry, dict)]
    return {**answer, "status": word}, {
        str(entry.get("id")): entry for entry in entries
    }


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
