"""What becomes of an event: exactly one outcome each, and the reasons behind them.

The names are wire format: answers, counters, logs and dead letters all use them.
"""

from collections.abc import Mapping
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
    COALESCED = "coalesced"  # A later one of the same customer took its place.
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


def held_by(flow: Mapping[str, str]) -> str:
    """The hold in the hash `flow`, a person's before an automatic one, or empty."""
    return str(Hold.BY_HAND) if Hold.BY_HAND in flow else flow.get("hold", "")


# What the operator does about a dead letter, by its reason; likewise. What is `expired`
# has used up its time to live, as a rule, so a replay must give it a new one.
_LOOK_FIRST = (
    "It may have arrived: look in Voucherify, under the customer's activity or in the "
    "audit log by the channel `relay:` and the version. If it is not there: `relay "
    "dead-letters replay --yes-it-may-pay-twice`; else drop it."
)
_NETWORK = (
    "Let this machine out to Voucherify, and see its status page; then replay with "
    "`--new-ttl 24h`."
)
_FAILING = "Voucherify failed for too long: replay with `--new-ttl 24h` once it is up."
_SIGN_IN = (
    "Compare the credentials that RELAY_AUTH names; then replay with `--new-ttl 24h`."
)
LETTER_CURES = {
    "ttl": "Find out why it waited: a hold, an outage, the budget. If it still "
    "matters, replay with `--new-ttl 24h`; else drop it.",
    "worker_died": "See the log for what ends the relay's processes; then replay.",
    "stalled": "See that nothing stops or starves the relay's processes; then replay "
    "with `--new-ttl 24h`.",
    "internal": "A fault of the relay: keep the log and report it; then replay with "
    "`--new-ttl 24h`.",
    "rate_limited": "Compare RELAY_UPSTREAM_BUDGET with Voucherify's limits; then "
    "replay with `--new-ttl 24h`.",
    **dict.fromkeys(
        ("connect_failed", "dns_failed", "tls_failed", "connect_timeout"), _NETWORK
    ),
    **dict.fromkeys(("connection_lost", "read_timeout", "garbled_answer"), _FAILING),
}
_BY_HEAD = {
    "upstream_5": _FAILING,
    "oauth_": _SIGN_IN,
    "redis_": "See that Redis is well; then replay with `--new-ttl 24h`.",
}
_BY_OUTCOME = {
    "rejected": "Voucherify refuses it as it is: compare its error with the page, the "
    "catalogue, and the event's schema in Voucherify. When that is cured, replay; what "
    "is wrong in the event itself is refused again, so drop it.",
    "expired": "Find out why it was not delivered in time; then replay with "
    "`--new-ttl 24h`.",
    "ambiguous": _LOOK_FIRST,
}


def letter_cure(outcome: str, reason: str) -> str:
    """What to do about a dead letter."""
    if outcome == Outcome.EXPIRED:
        if reason in LETTER_CURES:
            return LETTER_CURES[reason]
        for head, cure in _BY_HEAD.items():
            if reason.startswith(head):
                return cure
    return _BY_OUTCOME.get(outcome, "")
