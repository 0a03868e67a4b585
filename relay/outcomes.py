"""What becomes of an event: exactly one outcome each, and the reasons behind them.

The names are wire format: answers, counters, logs and dead letters all use them.
"""

from enum import StrEnum


class Outcome(StrEnum):
    """The final fate of an event."""

    DELIVERED = "delivered"  # Forwarder: Voucherify answered 2xx.
    REJECTED = "rejected"  # Forwarder: Voucherify answered a final 4xx.
    EXPIRED = "expired"  # Forwarder: too old, or its attempts were used up.
    AMBIGUOUS = "ambiguous"  # Forwarder: may have arrived, must not be sent twice.
    INVALID = "invalid"  # Edge: malformed or oversized, never queued.
    UNAUTHENTICATED = "unauthenticated"  # Edge: identity missing or refused.
    FORBIDDEN = "forbidden"  # Edge: origin or catalogue says no.
    RATE_LIMITED = "rate_limited"  # Edge: over quota, never queued.
    DUPLICATE = "duplicate"  # Edge: an event with this id was accepted before.
    COALESCED = "coalesced"  # Edge: one of the same customer was taken shortly before.
    DROPPED = "dropped"  # An operator decided so.
    INTERNAL = "internal"  # Our bug: any count above zero is an alert.


# Kept whole in the dead letters until an operator replays or drops them.
DEAD = frozenset({Outcome.REJECTED, Outcome.EXPIRED, Outcome.AMBIGUOUS})


class Hold(StrEnum):
    """Why delivery as a whole is paused; the queue is kept and grows."""

    AUTH = "auth_hold"  # 401, 403: the credentials or the origin are refused.
    PLAN = "plan_hold"  # 402, or the plan's calls for this cycle are spent.
    CONFIG = "config_hold"  # 3xx, 405, 406, 415: this is not the API we speak.
    BREAKER = "breaker_open"  # Voucherify is down: connect errors, 5xx, timeouts.
    BY_HAND = "by_hand"  # A person said `relay hold`; no probe ends it.


# What the operator does about a hold; the same words in docs/operations.md.
CURES = {
    "auth_hold": "Voucherify refuses the credentials or the origin: compare "
    "RELAY_ORIGIN, and RELAY_CLIENT_TOKEN, RELAY_SERVER_APP_TOKEN or "
    "RELAY_OAUTH_APP_SECRET with its id, as RELAY_AUTH asks for, with Project Settings "
    "in Voucherify's dashboard.",
    "plan_hold": "The plan's calls are spent: raise the plan, or wait for the next "
    "cycle; the queue is kept.",
    "config_hold": "This is not the API the relay speaks: check RELAY_CLUSTER.",
    "breaker_open": "Voucherify is down or unreachable: see its status page; the "
    "relay tries again by itself.",
    "by_hand": "Somebody held delivery: `relay resume` lets it go on.",
}
