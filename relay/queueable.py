"""An event on its way into the queue, in the form in which the commit script reads it.

The edge makes it, the queue packs it: in between nothing is renamed or put in another
order, for each step would be taken for every event. Pure.
"""

from msgspec import Struct

# What is to be counted beside the limits: digest of the event's name, coalesce window
# in ms, quota and period in ms of the event's own limit and whether that only counts,
# digest of the token, its uses, the ms it still lives, and whether that only counts.
Special = tuple[str, int, int, int, bool, str, int, int, bool]


class Waiting(Struct, gc=False, array_like=True):
    """An event as it waits: packed, it is what stands in the stream."""

    id: str
    name: str
    customer: str  # digest
    delivery: str  # the rule: see `queue.Claimed`
    ttl_ms: int
    lane: str
    body: str  # for Voucherify


# Whether the sender chose the id, what else is to be counted, and the event.
Queueable = tuple[bool, Special | None, Waiting]
# The digest of the sender's address, and the events: taken or refused in one step.
Request = tuple[str, list[Queueable]]
