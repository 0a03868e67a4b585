"""Erase one person from everything that the relay keeps: `relay forget`.

Events that wait become `dropped`, dead letters go, and so do the marks that limits and
the comparison of ids have made. An event that is on its way to Voucherify at this
moment is left alone and reported: it cannot be called back. In bounded steps, so that
nobody else waits for it.

It cannot erase what Redis has in its file until that is rewritten, nor backups, nor
what Voucherify has. What the person sends while it runs may stay: that is new. Marks
stay as long as an event is on its way: both go when it is run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from relay.queue import Queue

# Entries looked at in one call. Measured with 100,000 waiting events of one person:
# 100 keep Redis for 12 ms at most, 500 for 61, and the whole takes as long with either.
BATCH = 100
MAX_ROUNDS = 5

LANES = ("high", "normal", "low")
WAITING = (*LANES, *(f"{lane}:behind" for lane in LANES))
PLACES = (*WAITING, "retry", "delayed", "dead")


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What was erased, and what was not."""

    waiting: int  # events that waited for their first try
    delayed: int  # and for another one
    dead: int  # dead letters
    spooled: int  # always 0: this version has no spool
    marks: int  # of limits, ids, windows to coalesce in
    in_flight: int  # left alone: on their way, ask again in a minute
    mentions: int  # left alone: events of others that name this person as referrer


class _Round:
    """One walk over all places."""

    def __init__(self) -> None:
        self.erased = dict.fromkeys(PLACES, 0)
        self.in_flight = 0
        self.mentions = 0

    async def walk(
        self, queue: Queue, place: str, batch: int, customer: str, needle: str
    ) -> None:
        cursor, trying = "", 0
        while True:
            step = await queue.forget(place, cursor, batch, customer, needle)
            self.erased[place] += step.erased
            self.mentions += step.mentions
            if place == "delayed":  # each step tells of all that are tried again
                trying = max(trying, step.in_flight)
            elif place != "retry":
                self.in_flight += step.in_flight
            cursor = step.cursor
            if not cursor:
                break
        self.in_flight += trying


async def forget(
    queue: Queue, customer: str, *, digests: Sequence[str], batch: int = BATCH
) -> Erased:
    """Erase who is named by `customer`, a source_id or an id of Voucherify.

    `digests` are what stands for this person in keys.
    """
    needle = msgspec.json.encode(customer).decode()
    totals = dict.fromkeys(PLACES, 0)
    # An event may move behind the walk's back, from a lane over a forwarder to the
    # delayed ones: so it ends only with a round that has found nothing more. What is
    # with a forwarder meanwhile is counted as in flight.
    for _ in range(MAX_ROUNDS):
        last = _Round()
        # A replay moves dead letters to where the walk has been: so they come first,
        # and once more at the end, where what waits may die meanwhile.
        await last.walk(queue, "dead", batch, customer, needle)
        last.mentions = 0
        for place in PLACES:
            await last.walk(queue, place, batch, customer, needle)
        for place in PLACES:
            totals[place] += last.erased[place]
        if not any(last.erased.values()):
            break
    # As long as one of their events is on its way, its id must be known: a sender that
    # repeats it would have it accepted, and perhaps paid, once more.
    marks = 0 if last.in_flight else await queue.forget_marks(digests)
    return Erased(
        waiting=sum(totals[place] for place in (*WAITING, "retry")),
        delayed=totals["delayed"],
        dead=totals["dead"],
        spooled=0,
        marks=marks,
        in_flight=last.in_flight,
        mentions=last.mentions,
    )
