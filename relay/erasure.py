"""Erase one person from everything that the relay keeps: `relay forget`.

Events that wait become `dropped`, dead letters go, and so do the marks that limits and
the comparison of ids have made. An event that is on its way to Voucherify at this
moment is left alone and reported: it cannot be called back. In bounded steps, so that
nobody else waits for it.

It cannot erase what Redis has in its file until that is rewritten, nor backups, nor
what Voucherify has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from relay.queue import Queue

BATCH = 500  # entries looked at in one call: a few milliseconds of Redis
MAX_ROUNDS = 5

PLACES = ("high", "normal", "low", "retry", "delayed", "dead")


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What was erased, and what was not."""

    waiting: int  # events that waited for their first try
    delayed: int  # and for another one
    dead: int  # dead letters
    spooled: int  # always 0: this version has no spool
    marks: int  # of limits, ids, tokens' customers
    in_flight: int  # left alone: on their way, ask again in a minute
    mentions: int  # left alone: events of others that name this person as referrer


async def forget(
    queue: Queue, customer: str, *, digests: Sequence[str], batch: int = BATCH
) -> Erased:
    """Erase who is named by `customer`, a source_id or an id of Voucherify.

    `digests` are what stands for this person in keys.
    """
    needle = msgspec.json.encode(customer).decode()
    totals = dict.fromkeys(PLACES, 0)
    in_flight = mentions = 0
    # An event may move behind the walk's back, from a lane over a forwarder to the
    # delayed ones: so it ends only with a round that has found nothing more.
    for _ in range(MAX_ROUNDS):
        found = in_flight = mentions = 0
        for place in PLACES:
            cursor = ""
            while True:
                step = await queue.forget(place, cursor, batch, customer, needle)
                totals[place] += step.erased
                found += step.erased
                in_flight += step.in_flight
                mentions += step.mentions
                cursor = step.cursor
                if not cursor:
                    break
        if not found:
            break
    marks = await queue.forget_marks(digests)
    return Erased(
        waiting=sum(totals[lane] for lane in ("high", "normal", "low", "retry")),
        delayed=totals["delayed"],
        dead=totals["dead"],
        spooled=0,
        marks=marks,
        in_flight=in_flight,
        mentions=mentions,
    )
