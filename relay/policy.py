"""Who may say what: one event against identity, catalogue and privacy signal.

The rules, in the order an event meets them: the privacy signal, the token, the origin,
the catalogue, and for senders without a token what anonymous senders may set. The
first one that says no decides, and its refusal names it. A rule in dry run is counted
as `would_refuse:<rule>` and lets the event through as if it had no token.

Pure: the time is an argument. Limits and uses are counted at admission.
"""

from collections.abc import Callable, Mapping
from hashlib import blake2b

from msgspec import Struct, field
from msgspec.structs import fields

from relay.catalog import EMPTY, Catalog, Rule, metadata_fault, quoted
from relay.events import Customer, Event, Refused, identified, occurred_at
from relay.outcomes import Outcome
from relay.queueable import Special
from relay.signing import LEEWAY_S, Identity, Signer, TokenRefused

IDENTIFIERS = frozenset({"id", "source_id"})
_ABSENT = {field.name: field.default for field in fields(Customer)}


class Sender(Struct, gc=False):
    """What a request says of who sends it."""

    origin: str | None = None
    allowed: bool = True  # by its origin, or by the setting for those without one
    token: str | None = None  # of the whole request
    gpc: bool = False  # Sec-GPC: 1
    notes: list[str] = field(default_factory=list)  # to be counted


class Ruling(Struct, gc=False):
    """How an event that may pass is to be handled."""

    customer: Customer
    lane: str
    delivery: str
    ttl_ms: int
    special: Special | None
    signed: bool  # a token names the customer
    own: Mapping[str, str] | None = None  # metadata that the relay sets itself


class Policy:
    """The rules in force. Replaced as a whole when the catalogue changes."""

    def __init__(
        self,
        *,
        ttl_ms: int,
        catalog: Catalog = EMPTY,
        signer: Signer | None = None,
        tokens: str = "optional",
        restricted: bool = False,
        gpc: str = "ignore",
        verifies: bool = False,  # Voucherify can be asked what has arrived
    ) -> None:
        self.catalog = catalog
        self.signer = signer
        self._ttl_ms = ttl_ms
        self._tokens = tokens
        self._restricted = restricted
        self._gpc = gpc
        self._verifies = verifies

    def judge(
        self,
        event: Event,
        sender: Sender,
        event_id: str,
        now: float,
        say: Callable[[str, str], None] | None = None,
    ) -> Ruling:
        """Let an event pass, or raise `Refused`; takes out of it what must not pass.

        `event_id` is its own, given by the sender or made by the relay. `say` is told
        each rule that was met and what it came to, for people.
        """
        try:
            if sender.gpc:
                self._heed_privacy(event, sender)
                if say is not None:
                    say("privacy signal", f"Sec-GPC: 1, RELAY_GPC={self._gpc}")
            rule = self.catalog.rule(event.event)
            if rule is None:
                raise _unlisted()
            mode = rule.token or self._tokens
            if say is not None:
                say("catalogue", f"the rule {rule.place}")
            # Before a token fills in the customer.
            trial = mode == "dry_run" and self._passes_unknown(event, sender, rule)
            token = event.token if event.token is not None else sender.token
            identity = None
            if mode != "off" and (token is not None or mode != "optional"):
                identity = self._identify(event, sender, token, mode, now)
            if say is not None:
                say("token", f"{_whose(identity)} ({mode})")
            if identity is None and not sender.allowed:
                raise _origin_needed()
            customer = identified(event)
            self._check_fields(event, customer, rule, identity)
            if rule.metadata is not None and event.metadata is not None:
                fault = metadata_fault(rule, event.metadata)
                if fault is not None:
                    raise _forbidden(*fault)
            if say is not None:
                few = self._restricted and identity is None
                say("fields", "as an anonymous sender may" if few else "allowed")
            own = None
            # Not `rule.own`, which is made anew at each call.
            if rule.occurred_at is not None or rule.event_id is not None:
                own = self._own_metadata(event, event_id, sender, rule, now, say)
        except Refused as refused:
            refused.name, refused.id = event.event, event.id
            raise
        special = None
        if identity is not None or rule.limit is not None or rule.coalesce_ms:
            # Used up in a trial, it is as if there were no token: so it may only be let
            # through where that would be.
            special = _special(event, rule, identity, now=now, trial=trial)
        # What happens when Voucherify may have the event already. Points and referrals
        # are money: never a second delivery that might be one.
        paying = event.loyalty is not None or event.referral is not None
        delivery = rule.delivery or ("at_most_once" if paying else "at_least_once")
        if delivery == "verify":
            delivery = self._verifying(rule, own)
        return Ruling(
            customer,
            rule.priority,
            delivery,
            self._ttl_ms if rule.ttl_s is None else rule.ttl_s * 1000,
            special,
            identity is not None,
            own,
        )

    def _passes_unknown(self, event: Event, sender: Sender, rule: Rule) -> bool:
        """Whether the event would get this far without its token."""
        if not sender.allowed:
            return False
        try:
            self._check_fields(event, identified(event), rule, None)
        except Refused:
            return False
        return True

    # --- the rules ----------------------------------------------------------------

    def _heed_privacy(self, event: Event, sender: Sender) -> None:
        """Global Privacy Control: https://w3c.github.io/gpc/ (Sec-GPC)."""
        if self._gpc == "drop":
            raise Refused(
                Outcome.DROPPED,
                "gpc",
                "The browser asks not to share this (Sec-GPC: 1), so the event goes "
                "no further (RELAY_GPC).",
            )
        if self._gpc == "strip":
            event.metadata = None
            if event.customer is not None:
                event.customer = Customer(
                    id=event.customer.id, source_id=event.customer.source_id
                )
            sender.notes.append("gpc_stripped")

    def _identify(
        self, event: Event, sender: Sender, token: str | None, mode: str, now: float
    ) -> Identity | None:
        """Who the sender is by its token, with the event's customer made that one."""
        try:
            identity = self._read(token, now)
            _check_token(identity, event, sender)
        except Refused:
            if mode != "dry_run":
                raise
            sender.notes.append("would_refuse:token")
            return None
        if event.customer is None:
            event.customer = Customer()
        event.customer.source_id = identity.source_id
        return identity

    def _read(self, token: str | None, now: float) -> Identity:
        if token is None:
            raise _unauthenticated(
                "token_missing",
                "This event needs a signed token (RELAY_TOKENS or the catalogue): get "
                "one from the shop's server.",
            )
        if self.signer is None:
            raise _unauthenticated(
                "token_unexpected",
                "The relay has no key to check this token with: set "
                "RELAY_SIGNING_KEYS, or send none.",
            )
        try:
            return self.signer.read(token, now=now)
        except TokenRefused as refused:
            raise _unauthenticated(refused.reason, refused.detail) from None

    def _check_fields(
        self, event: Event, customer: Customer, rule: Rule, identity: Identity | None
    ) -> None:
        known = identity is not None
        allowed = rule.customer
        if allowed is not None or (self._restricted and not known):
            given = _fields(customer) - (IDENTIFIERS if known else frozenset())
            extra = given - (IDENTIFIERS if allowed is None else allowed)
            if extra:
                raise _forbidden(
                    "customer_field",
                    f"customer.{min(extra)} may not be set: {self._said(rule, allowed)}"
                    ". Leave it out.",
                )
        if event.loyalty is not None and not rule.loyalty:
            self._check_part("loyalty", rule, rule.loyalty, known=known)
        if event.referral is not None and not rule.referral:
            self._check_part("referral", rule, rule.referral, known=known)

    def _check_part(
        self, part: str, rule: Rule, opened: bool | None, *, known: bool
    ) -> None:
        if opened is False:
            raise _forbidden(
                part, f"{part} may not be set: {rule.place}.{part} is false."
            )
        if self._restricted and not known:
            raise _forbidden(
                part,
                f"{part} may not be set without a token (RELAY_ANONYMOUS): get "
                f"one from the shop's server, or say {rule.place}.{part} = true "
                "in the catalogue.",
            )

    def _said(self, rule: Rule, allowed: frozenset[str] | None) -> str:
        if allowed is None:
            return "without a token only source_id or id may (RELAY_ANONYMOUS)"
        return f"{rule.place}.customer lists {', '.join(sorted(allowed))}"

    def _verifying(self, rule: Rule, own: Mapping[str, str] | None) -> str:
        """`verify` with its property; or where that cannot be done, the safe rule."""
        # Without its own id in it, or nobody to ask, it cannot be found again.
        named = self._verifies and own is not None and rule.event_id in own
        return f"verify:{rule.event_id}" if named else "at_most_once"

    def _own_metadata(
        self,
        event: Event,
        event_id: str,
        sender: Sender,
        rule: Rule,
        now: float,
        say: Callable[[str, str], None] | None,
    ) -> dict[str, str]:
        """What the relay itself says in the metadata, by the name of the property."""
        own: dict[str, str] = {}
        if sender.gpc and self._gpc == "strip":
            if say is not None:
                say("own metadata", "left out: the privacy signal takes all metadata")
            return own
        if (name := rule.occurred_at) is not None:
            own[name] = occurred_at(event, now)
            if say is not None:
                came = f"{quoted(name)} in metadata is {own[name]}"
                say("occurred_at", f"{came} ({rule.place}.occurred_at)")
        if (name := rule.event_id) is not None:
            own[name] = event_id
            if say is not None:
                said = f"{quoted(name)} in metadata is the event's own id"
                say("event_id", f"{said} ({rule.place}.event_id)")
        return own


def _check_token(identity: Identity, event: Event, sender: Sender) -> None:
    """What a sound token says it may not be used for."""
    if identity.events is not None and event.event not in identity.events:
        raise _forbidden("token_event", "This token may not send this event.")
    if identity.origin is not None and identity.origin != sender.origin:
        raise _forbidden("token_origin", "This token is for pages of another origin.")
    customer = event.customer
    if customer is not None and (
        customer.id is not None or customer.source_id not in (None, identity.source_id)
    ):
        # An `id` may be anybody's, and Voucherify lets it win over `source_id`.
        raise _forbidden(
            "customer_mismatch",
            "The token names the customer: leave customer.id out, and send "
            "customer.source_id as the token has it or not at all.",
        )


def _fields(customer: Customer) -> frozenset[str]:
    # Null is absence, but for `address`, where Voucherify takes it as "remove it".
    return frozenset(
        name
        for name, absent in _ABSENT.items()
        if getattr(customer, name) is not absent
    )


def _special(
    event: Event,
    rule: Rule,
    identity: Identity | None,
    *,
    now: float,
    trial: bool,
) -> Special | None:
    """What admission has to count beside the limits; None for most events."""
    limit = rule.limit
    uses = identity.uses if identity is not None else None
    if limit is None and uses is None and not rule.coalesce_ms:
        return None
    return (
        # All spellings that meet a rule are counted together.
        blake2b((rule.name or event.event).encode(), digest_size=9).hexdigest(),
        rule.coalesce_ms,
        limit.quota if limit is not None else 0,
        limit.period_ms if limit is not None else 0,
        rule.limit_dry_run,
        identity.digest if identity is not None and uses is not None else "",
        uses or 0,
        # Longer than any relay takes the token, whose clock may be behind this one.
        int((identity.expires_at - now + LEEWAY_S) * 1000) if identity else 0,
        trial,
    )


def _whose(identity: Identity | None) -> str:
    return "no token" if identity is None else "valid, and names the customer"


def _forbidden(reason: str, detail: str) -> Refused:
    return Refused(Outcome.FORBIDDEN, reason, detail)


def _unauthenticated(reason: str, detail: str) -> Refused:
    return Refused(Outcome.UNAUTHENTICATED, reason, detail)


def _unlisted() -> Refused:
    return _forbidden(
        "event_unlisted",
        "This event is not in the catalogue (defaults.unlisted): correct its name, or "
        "add it there.",
    )


def _origin_needed() -> Refused:
    return _forbidden(
        "origin",
        "The request names no Origin, and this event has no valid token: browsers "
        "send an Origin with every POST; for other senders set "
        "RELAY_ALLOW_NO_ORIGIN=true or give them a token.",
    )
