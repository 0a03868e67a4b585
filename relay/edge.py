"""Decide about a request: headers and bytes in, a refusal or an admission out.

Knows neither ASGI nor Redis nor a clock, so any server can sit in front of it. In
the order a request meets them: method, origin, content type, size, then per event
the schema and the policy. What is refused changes nothing but counters; each
`Response` names the refusals that are to be counted.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from secrets import token_hex

from msgspec import Struct

from relay.addresses import TrustedProxies, address_key, client_address
from relay.answers import (
    DONE,
    JSON,
    STATUS,
    Beacons,
    Dialect,
    Entry,
    Response,
    Written,
)
from relay.browsers import counts, read_report
from relay.digests import Digests
from relay.events import Event, Invalid, Refused, read_body, read_event, upstream_body
from relay.forms import Fault, Form, Forms
from relay.headers import Block, Fields, Header
from relay.limits import Limit, policy_header
from relay.origins import AllowedOrigins
from relay.outcomes import Outcome
from relay.policy import Policy, Sender
from relay.queueable import Queueable, Request, Waiting

# Fetch allows 64 KiB of keepalive bodies in flight for a page, so a larger beacon
# never leaves the browser. https://fetch.spec.whatwg.org/#http-network-or-cache-fetch
MAX_BODY_BYTES = 64 * 1024
MAX_WAIT_S = 30  # of `Prefer: wait`

# RFC 7240: names in any case, blanks around "=", the first of several counts.
_WAIT = re.compile(rb"(?:^|[,;\s])wait\s*=\s*(\d+)(?:$|[,;\s])", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}\Z")
# Browsers ask again after this long; Chromium caps it at two hours.
_PREFLIGHT_S = b"7200"
# A 401 names a scheme (RFC 9110, 11.6.1); browsers show no dialog for one that they
# do not know.
_CHALLENGE = (b"www-authenticate", b"Relay-Token")

_REST = b"content-length: %d\r\n\r\n%b"
_UNTOLD = b"%bx-request-id: %b\r\n" + _REST  # where no limit is enforced


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What admission says of one event."""

    status: str  # queued, duplicate, coalesced, unavailable or a refusing outcome
    reason: str = ""
    detail: str = ""
    retry_after: int = 0  # seconds
    outcome: dict[str, object] | None = None  # known by now: Prefer: wait


TAKEN = Fate(status="queued")


class Head(Struct, gc=False):
    """What the headers of an acceptable request say.

    One of the values that are made for each request. They are structs of msgspec, for
    to make a dataclass takes three times as long.
    """

    request_id: bytes
    form: Form
    address: str  # digest of the client's address, for limits only
    sender: Sender
    wait_s: int  # Prefer: wait
    agent: bytes = b""  # User-Agent


class Admitted(Struct, gc=False):
    """Sound events, ready for the queue, and the fate of the others."""

    head: Head
    events: list[Queueable]
    ids: list[str]  # of these events
    refused: dict[int, Refused]  # by the place in the sender's body
    several: bool
    said: Event | None = None  # the last one, where answers repeat it
    report: dict[str, int] | None = None  # the snippet's

    def alone(self) -> bool:
        """Whether an answer has one event to tell of, and nothing else."""
        return (
            len(self.ids) == 1
            and not self.refused
            and self.report is None
            and not self.head.wait_s
        )

    @property
    def request(self) -> Request:
        return self.head.address, self.events

    def let_go(self) -> Request:
        """The same, of which only what an answer tells stays here.

        Many wait for their answers at once, and what they hold must find room in the
        processor's cache.
        """
        events, self.events = self.events, []
        return self.head.address, events


class Edge:
    """The decision for one route; computes once what no request changes."""

    def __init__(
        self,
        *,
        origins: AllowedOrigins,
        proxies: TrustedProxies,
        limits: Sequence[Limit],
        digests: Digests,
        policy: Policy,
        dialect: Dialect | None = None,
        allow_no_origin: bool = False,
    ) -> None:
        self.policy = policy  # replaced when the catalogue changes
        self._dialect = dialect or Beacons()
        self._proxies = proxies
        self._names = [f'"{limit.dimension}"'.encode() for limit in limits]
        # What the usual answer has of its own, by the limit that it tells.
        self._usual = [
            b"%%bx-request-id: %%b\r\nratelimit: %b;r=%%d;t=%%d\r\n%b" % (name, _REST)
            for name in self._names
        ]
        # Empty when nothing is enforced: a field of no members is not sent (RFC 9651).
        told = policy_header(limits).encode()
        self._limits_told = [(b"ratelimit-policy", told)] if told else []
        self._forms = Forms(
            origins=origins,
            allow_no_origin=allow_no_origin,
            takes=self._dialect,
            accepted=[*self._limits_told, JSON],
        )
        # Ids must differ from those of every other process, past and future.
        self._ids = count()
        self._boot = token_hex(8).encode()
        self._digests = digests

    # --- before the body ----------------------------------------------------------

    def head(self, method: str, fields: Fields, peer: str | None) -> Head | Response:
        """Judge a request by its headers; the body is not needed for a refusal."""
        get = fields.get
        if b"x-request-id" in fields:
            request_id = self.request_id(fields[b"x-request-id"], peer)
        else:
            request_id = self._made()
        form = self._forms.read(
            get(b"origin"), get(b"content-type", b""), get(b"content-encoding")
        )
        if method != "POST":
            return self._not_taken(method, request_id, form)
        # Without an Origin a token may do, and it is in the body.
        if not form.allowed and (form.origin is not None or self.policy.signer is None):
            return self._at_fault(request_id, form, form.forbidden)
        if form.fault is not None:
            return self._at_fault(request_id, form, form.fault)
        forwarded = get(b"x-forwarded-for", b"").decode("latin-1")
        token = None
        if b"relay-token" in fields:
            token = fields[b"relay-token"].decode("latin-1") or None
        gpc = b"sec-gpc" in fields and fields[b"sec-gpc"] == b"1"
        head = Head(
            request_id,
            form,
            self._address(peer, forwarded),
            Sender(form.origin, form.allowed, token, gpc),
            _wait_s(fields[b"prefer"]) if b"prefer" in fields else 0,
            get(b"user-agent", b""),
        )
        if forwarded and not self._proxies.trusts(peer):
            head.sender.notes.append("untrusted_proxy")
        length = get(b"content-length", b"")
        if len(length) > 4 and _is_large(length):
            return self.too_large(head)
        return head

    def _address(self, peer: str | None, forwarded: str) -> str:
        """The digest by which limits count whoever sends.

        Not kept for the next time: where it is asked for often enough to matter, from
        many at once, to look through those kept takes longer.
        """
        client = client_address(peer, forwarded, self._proxies)
        if ":" in client:
            client = address_key(client)
        return self._digests.address(client)

    def request_id(self, asked: bytes | None, peer: str | None) -> bytes:
        """A trusted proxy's own id, so that its log and ours can be joined."""
        if (
            asked is not None
            and self._proxies.trusts(peer)
            and _REQUEST_ID.match(asked)
        ):
            return asked
        return self._made()

    def _made(self) -> bytes:
        return b"%b-%x" % (self._boot, next(self._ids))

    def _new_id(self) -> str:
        return self._made().decode()

    def _not_taken(self, method: str, request_id: bytes, form: Form) -> Response:
        """The answer to another method than POST."""
        if method != "OPTIONS":
            return self._problem(
                request_id,
                form.cors,
                405,
                None,
                "method",
                "Events are sent with POST.",
                (b"allow", b"POST, OPTIONS"),
            )
        if not form.allowed:  # asked before anything is sent, so nothing is counted
            return self._at_fault(request_id, form, form.forbidden, counts=False)
        return Response(
            204,
            [
                (b"access-control-allow-methods", b"POST"),
                (b"access-control-allow-headers", self._dialect.request_headers),
                (b"access-control-max-age", _PREFLIGHT_S),
                (b"x-request-id", request_id),
            ],
            always=form.cors,
        )

    def _at_fault(
        self, request_id: bytes, form: Form, fault: Fault, *, counts: bool = True
    ) -> Response:
        return self._problem(
            request_id,
            form.cors,
            fault.status,
            fault.outcome if counts else None,
            fault.reason,
            fault.detail,
            *fault.extra,
        )

    # --- the body ------------------------------------------------------------------

    def body(self, head: Head, body: bytes, now: float) -> Admitted | Response:
        """Judge the events. A whole body that cannot be read counts as one event."""
        if head.form.gzip:
            inflated = inflate(body)
            if inflated is None:
                return self.too_large(head)
            if isinstance(inflated, Invalid):
                return self._whole(head, inflated)
            body = inflated
        try:
            read = read_body(body)
        except Invalid as invalid:
            return self._whole(head, invalid)
        if read.several and not self._dialect.batches:
            return self._whole(head, _ONE_ONLY)
        if read.token is not None:
            head.sender.token = read.token
        events: list[Queueable] = []
        ids: list[str] = []
        admitted = Admitted(head, events, ids, {}, read.several)
        if read.report is not None:
            admitted.report = read_report(read.report)
        for place, raw in enumerate(read.events):
            try:
                event = read_event(raw)
                if self._dialect.repeats:
                    admitted.said = event
                sound = self._admit(event, head.sender, now)
            except Refused as refused:
                admitted.refused[place] = refused
            else:
                events.append(sound)
                ids.append(sound[2].id)
        return admitted if events else self.answer(admitted, (), None)

    def _admit(self, event: Event, sender: Sender, now: float) -> Queueable:
        event_id = event.id or self._new_id()
        ruling = self.policy.judge(event, sender, event_id, now)
        who = ruling.customer
        waiting = Waiting(
            event_id,
            event.event,
            self._digests.customer(who.id, who.source_id, ruling.signed),
            ruling.delivery,
            ruling.ttl_ms,
            ruling.lane,
            upstream_body(event, who, ruling.own).decode(),
        )
        return event.id is not None, ruling.special, waiting

    # --- answers ---------------------------------------------------------------------

    def answer(
        self,
        admitted: Admitted,
        fates: Sequence[Fate],
        limit: tuple[int, int, int] | None,
    ) -> Response:
        """Answer for events that met admission, `fates` in their order.

        `limit` is the tightest one: its index, what is left, microseconds until more.
        """
        head, refused = admitted.head, admitted.refused
        limited = len(fates) == 1 and fates[0].status == Outcome.RATE_LIMITED
        if limited and limit and admitted.alone():
            return self._turned_away(admitted, fates[0], *limit)
        entries = [
            _entry(event_id, fate)
            for event_id, fate in zip(admitted.ids, fates, strict=True)
        ]
        if refused:
            for place in sorted(refused):
                entries.insert(place, self._refused_entry(refused[place]))
        statuses = [str(entry["status"]) for entry in entries]
        own = [self._tightest(*limit)] if limit and limit[0] >= 0 else []
        if head.wait_s:
            own.append((b"preference-applied", b"wait=%d" % head.wait_s))
        if not DONE.issuperset(statuses):
            again = max([fate.retry_after for fate in fates], default=0)
            own += [(b"retry-after", b"%d" % again)] if again else []
        if DONE.isdisjoint(statuses):
            always, status = head.form.cors, max(STATUS[said] for said in statuses)
            kind, body = self._all_refused(admitted, status, entries)
            own += [*self._limits_told, kind]
            if status == 401:
                own.append(_CHALLENGE)
        else:
            always = head.form.accepted
            status, body = self._dialect.accept(entries, admitted.said)
        own.append((b"x-request-id", head.request_id))
        response = Response(status, own, body, always)
        response.notes = head.sender.notes
        if refused:
            response.refusals = [
                (r.outcome, r.reason, r.name) for r in refused.values()
            ]
        if admitted.report is not None:
            response.browser = counts(head.agent, admitted.report, statuses)
        return response

    def taken(
        self, admitted: Admitted, which: int, left: int, reset_us: int
    ) -> Written:
        """The answer for one event that was queued: the one that nearly all get.

        It says what `answer` says, and is written in one go.
        """
        head = admitted.head
        status, body = self._dialect.take(admitted.ids[0], admitted.said)
        always, request_id = head.form.accepted.wire, head.request_id
        if which < 0:
            text = _UNTOLD % (always, request_id, len(body), body)
        else:
            until = -(-reset_us // 1_000_000)
            usual = self._usual[which]
            text = usual % (always, request_id, left, until, len(body), body)
        return Written(status, text)

    def _turned_away(
        self, admitted: Admitted, fate: Fate, which: int, left: int, reset_us: int
    ) -> Response:
        """The answer that a flood gets, which must cost no more than to take it."""
        head = admitted.head
        kind, body = self._dialect.turn_away(
            fate.reason, fate.detail, admitted.ids[0], request_id=head.request_id
        )
        own = [self._tightest(which, left, reset_us)] if which >= 0 else []
        own += [
            (b"retry-after", b"%d" % fate.retry_after),
            *self._limits_told,
            kind,
            (b"x-request-id", head.request_id),
        ]
        response = Response(429, own, body, head.form.cors)
        response.notes = head.sender.notes
        return response

    def unavailable(
        self, admitted: Admitted, reason: str, detail: str, retry_after: int
    ) -> Response:
        """503: nothing was taken, or nobody knows.

        A repeat under the sender's own ids is harmless. Ids made here are compared
        with nothing, so an event without its own may come twice.
        """
        fate = Fate(
            status="unavailable", reason=reason, detail=detail, retry_after=retry_after
        )
        return self.answer(admitted, [fate] * len(admitted.ids), None)

    def too_large(self, head: Head) -> Response:
        """413, decided on the announced, the read or the inflated size."""
        return self._problem(
            head.request_id,
            head.form.cors,
            413,
            Outcome.INVALID,
            "too_large",
            f"A body has at most {MAX_BODY_BYTES} bytes, inflated ones included: "
            "send fewer events at once.",
        )

    def too_slow(self, head: Head) -> Response:
        """408: the body did not arrive in time."""
        return self._problem(
            head.request_id,
            head.form.cors,
            408,
            Outcome.INVALID,
            "timeout",
            "The body did not arrive in time: send it again.",
            (b"connection", b"close"),
        )

    def elsewhere(
        self,
        fields: Fields,
        status: int,
        detail: str,
        peer: str | None = "",  # nobody: None is the unix socket
    ) -> Response:
        """An answer outside the hot route: no such path, no such method.

        Not a limited route, so it tells no limits.
        """
        return self._document(
            self.request_id(fields.get(b"x-request-id"), peer),
            self._forms.cors(fields.get(b"origin")),
            status,
            {404: "path", 405: "method"}.get(status, "refused"),
            detail,
        )

    def failed(self, head: Head | None) -> Response:
        """500: a fault of the relay itself."""
        return self._problem(
            head.request_id if head else self._new_id().encode(),
            head.form.cors if head else self._forms.cors(None),
            500,
            Outcome.INTERNAL,
            "internal",
            "The relay failed on this request; its log tells more under the "
            "request id.",
            (b"connection", b"close"),  # nobody knows how much of it was read
        )

    def _whole(self, head: Head, invalid: Invalid) -> Response:
        return self._problem(
            head.request_id,
            head.form.cors,
            400,
            Outcome.INVALID,
            invalid.reason,
            invalid.detail,
        )

    def _all_refused(
        self, admitted: Admitted, status: int, entries: list[Entry]
    ) -> tuple[Header, bytes]:
        # The refusal that decides is the one to be shown.
        first = next(e for e in entries if STATUS[str(e["status"])] == status)
        return self._dialect.refuse(
            status,
            str(first["reason"]),
            str(first["detail"]),
            request_id=admitted.head.request_id,
            entries=entries if admitted.several else [first],
            several=admitted.several,
        )

    def _refused_entry(self, refused: Refused) -> Entry:
        return {
            "id": refused.id or self._new_id(),
            "status": str(refused.outcome),
            "reason": refused.reason,
            "detail": refused.detail,
        }

    def _tightest(self, which: int, left: int, reset_us: int) -> Header:
        until = -(-reset_us // 1_000_000)
        return b"ratelimit", b"%b;r=%d;t=%d" % (self._names[which], left, until)

    def _problem(
        self,
        request_id: bytes,
        cors: Block,
        status: int,
        outcome: Outcome | None,
        reason: str,
        detail: str,
        *extra: Header,
    ) -> Response:
        response = self._document(
            request_id, cors, status, reason, detail, *extra, *self._limits_told
        )
        if outcome is not None:
            response.refusals.append((outcome, reason, ""))
        return response

    def _document(
        self,
        request_id: bytes,
        cors: Block,
        status: int,
        reason: str,
        detail: str,
        *extra: Header,
    ) -> Response:
        kind, body = self._dialect.refuse(status, reason, detail, request_id=request_id)
        own = [*extra, kind, (b"x-request-id", request_id)]
        return Response(status, own, body, cors)


def _wait_s(prefer: bytes) -> int:
    """How long an answer may be held back."""
    wanted = _WAIT.search(prefer)
    # Cut: Python refuses to read a number of thousands of digits.
    return min(int(wanted[1][:9]), MAX_WAIT_S) if wanted else 0


def _is_large(length: bytes) -> bool:
    """Whether an announced length is over the limit."""
    return length.isdigit() and int(length[:19]) > MAX_BODY_BYTES


def _entry(event_id: str, fate: Fate) -> Entry:
    entry: Entry = {"id": event_id, "status": fate.status}
    if fate.reason:
        entry["reason"] = fate.reason
        entry["detail"] = fate.detail
        if fate.retry_after:
            entry["retry_after"] = fate.retry_after
    if fate.outcome is not None:
        entry.update(fate.outcome)
    return entry


def inflate(body: bytes) -> bytes | Invalid | None:
    """Undo gzip; None as soon as the output passes the limit, however it goes on."""
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        return _BAD_GZIP
    if len(plain) > MAX_BODY_BYTES:
        return None
    if not inflater.eof or inflater.unused_data:
        return _BAD_GZIP
    return plain


_BAD_GZIP = Invalid(
    "bad_gzip", "The body is not one whole gzip stream: compress it again."
)
_ONE_ONLY = Invalid(
    "one_event", "This route takes one event a request: send the others by themselves."
)
