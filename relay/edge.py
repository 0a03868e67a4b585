"""Decide about a request: headers and bytes in, a refusal or an admission out.

Knows neither ASGI nor Redis nor a clock, so any server can sit in front of it. In
the order a request meets them: method, origin, content type, size, then per event
the schema and the policy. What is refused changes nothing but counters; each
`Response` names the refusals that are to be counted.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from secrets import token_hex

from msgspec import Struct

from relay.addresses import TrustedProxies, address_key, client_address
from relay.answers import DONE, STATUS, Beacons, Dialect, Entry, Header, Response
from relay.browsers import counts, read_report
from relay.digests import Digests
from relay.events import Event, Invalid, Refused, read_body, read_event, upstream_body
from relay.limits import Limit, policy_header
from relay.origins import AllowedOrigins
from relay.outcomes import Outcome
from relay.policy import Policy, Sender, Special

# Fetch allows 64 KiB of keepalive bodies in flight for a page, so a larger beacon
# never leaves the browser. https://fetch.spec.whatwg.org/#http-network-or-cache-fetch
MAX_BODY_BYTES = 64 * 1024
MAX_WAIT_S = 30  # of `Prefer: wait`

# The headers that decide anything.
_READ = frozenset(
    (
        *(b"origin", b"content-type", b"content-length", b"content-encoding"),
        *(b"x-forwarded-for", b"prefer", b"x-request-id", b"relay-token"),
        *(b"sec-gpc", b"user-agent"),
    )
)
_CODINGS = {b"identity": False, b"gzip": True, b"x-gzip": True}  # RFC 9110, 8.4.1.3
# RFC 7240: names in any case, blanks around "=", the first of several counts.
_WAIT = re.compile(rb"(?:^|[,;\s])wait\s*=\s*(\d+)(?:$|[,;\s])", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}\Z")
_EXPOSED = (
    b"Retry-After, RateLimit, RateLimit-Policy, X-Request-Id, Relay-Degraded, "
    b"Preference-Applied"
)
# Browsers ask again after this long; Chromium caps it at two hours.
_PREFLIGHT_S = b"7200"
# A 401 names a scheme (RFC 9110, 11.6.1); browsers show no dialog for one that they
# do not know.
_CHALLENGE = (b"www-authenticate", b"Relay-Token")

# For the commit script: id, whether the sender chose it, customer digest, name, lane,
# delivery rule, ttl in ms, the body for Voucherify, what else is to be counted.
Queueable = tuple[str, bool, str, str, str, str, int, str, Special | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What admission says of one event."""

    status: str  # queued, duplicate, coalesced, unavailable or a refusing outcome
    reason: str = ""
    detail: str = ""
    retry_after: int = 0  # seconds
    outcome: dict[str, object] | None = None  # known by now: Prefer: wait


class Head(Struct):
    """What the headers of an acceptable request say.

    One of the values that are made for each request. They are structs of msgspec, for
    to make a dataclass takes three times as long.
    """

    request_id: bytes
    cors: tuple[Header, ...]
    address: str  # digest of the client's address, for limits only
    sender: Sender
    gzip: bool
    length: int  # as announced, -1 when it is not
    wait_s: int  # Prefer: wait
    agent: bytes = b""  # User-Agent


class Admitted(Struct):
    """Sound events, ready for the queue, and the fate of the others."""

    head: Head
    events: list[Queueable]
    refused: dict[int, Refused]  # by the place in the sender's body
    several: bool
    said: Event | None = None  # the last one, for answers that repeat it
    report: dict[str, int] | None = None  # the snippet's

    @property
    def request(self) -> tuple[str, list[Queueable]]:
        return self.head.address, self.events


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
        self._origins = origins
        self._proxies = proxies
        self._allow_no_origin = allow_no_origin
        self._limits = tuple(limits)
        # Empty when nothing is enforced: a field of no members is not sent (RFC 9651).
        told = policy_header(limits).encode()
        self._limits_told = [(b"ratelimit-policy", told)] if told else []
        # Ids must differ from those of every other process, past and future.
        self._ids = count()
        self._boot = token_hex(8)
        self._customer_digest = digests.customer
        self._address_digest = lru_cache(16_384)(digests.address)

    # --- before the body ----------------------------------------------------------

    def head(
        self, method: str, headers: Iterable[Header], peer: str | None
    ) -> Head | Response:
        """Judge a request by its headers; the body is not needed for a refusal."""
        origin = encoding = length = prefer = asked_id = None
        token = gpc = None
        content_type = agent = b""
        forwarded: list[bytes] = []
        for name, value in headers:
            if name not in _READ:  # most are not, and are told so at once
                continue
            if name == b"origin":
                origin = value if origin is None else origin + b" " + value
            elif name == b"content-type":
                content_type = value
            elif name == b"content-length":
                length = value
            elif name == b"content-encoding":
                encoding = value
            elif name == b"x-forwarded-for":
                forwarded.append(value)
            elif name == b"prefer":
                prefer = value if prefer is None else prefer + b"," + value
            elif name == b"x-request-id":
                asked_id = value
            elif name == b"relay-token":
                token = value
            elif name == b"sec-gpc":
                gpc = value
            elif name == b"user-agent":
                agent = value
        request_id = self.request_id(asked_id, peer)
        said = origin.decode("latin-1") if origin is not None else None
        allowed = self._allow_no_origin if said is None else self._origins.allows(said)
        cors = self._cors(origin if allowed else None)
        if method == "OPTIONS":
            return self._preflight(request_id, cors, origin, allowed=allowed)
        if method != "POST":
            return self._problem(
                request_id,
                cors,
                405,
                None,
                "method",
                "Events are sent with POST.",
                (b"allow", b"POST, OPTIONS"),
            )
        # Without an Origin a token may do, and it is in the body.
        if not allowed and (origin is not None or self.policy.signer is None):
            return self._problem(
                request_id, cors, 403, Outcome.FORBIDDEN, "origin", _say_origin(origin)
            )
        types = self._dialect.content_types
        if content_type not in types and _media_type(content_type) not in types:
            taken = sorted(kind.decode() for kind in types if kind)
            return self._problem(
                request_id,
                cors,
                415,
                Outcome.INVALID,
                "content_type",
                f"Send JSON as {' or '.join(taken)}.",
                (b"accept-post", ", ".join(taken).encode()),
            )
        coding = encoding.strip().lower() if encoding else b"identity"
        if coding not in _CODINGS:
            return self._problem(
                request_id,
                cors,
                415,
                Outcome.INVALID,
                "content_encoding",
                "Send the body plain or with Content-Encoding: gzip.",
                (b"accept-encoding", b"gzip"),
            )
        # Cut: Python refuses to read a number of thousands of digits.
        announced = int(length[:19]) if length is not None and length.isdigit() else -1
        wanted = _WAIT.search(prefer) if prefer is not None else None
        head = Head(
            request_id=request_id,
            cors=cors,
            address=self._address_digest(
                address_key(client_address(peer, forwarded, self._proxies))
            ),
            sender=Sender(
                origin=said,
                allowed=allowed,
                token=token.decode("latin-1") if token else None,
                gpc=gpc == b"1",
            ),
            gzip=_CODINGS[coding],
            length=announced,
            wait_s=min(int(wanted[1][:9]), MAX_WAIT_S) if wanted else 0,
            agent=agent,
        )
        if forwarded and not self._proxies.trusts(peer):
            head.sender.notes.append("untrusted_proxy")
        return self.too_large(head) if announced > MAX_BODY_BYTES else head

    def _allows(self, origin: bytes) -> bool:
        return self._origins.allows(origin.decode("latin-1"))

    def request_id(self, asked: bytes | None, peer: str | None) -> bytes:
        """A trusted proxy's own id, so that its log and ours can be joined."""
        if (
            asked is not None
            and self._proxies.trusts(peer)
            and _REQUEST_ID.match(asked)
        ):
            return asked
        return self._new_id().encode()

    def _new_id(self) -> str:
        return f"{self._boot}-{next(self._ids):x}"

    def _cors(self, origin: bytes | None) -> tuple[Header, ...]:
        if origin is None:
            return ((b"vary", b"Origin"),)
        return (
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-credentials", b"true"),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"Origin"),
        )

    def _preflight(
        self,
        request_id: bytes,
        cors: tuple[Header, ...],
        origin: bytes | None,
        *,
        allowed: bool,
    ) -> Response:
        if not allowed:  # asked before anything is sent, so nothing is counted
            return self._problem(
                request_id, cors, 403, None, "origin", _say_origin(origin)
            )
        return Response(
            204,
            [
                *cors,
                (b"access-control-allow-methods", b"POST"),
                (b"access-control-allow-headers", self._dialect.request_headers),
                (b"access-control-max-age", _PREFLIGHT_S),
                (b"x-request-id", request_id),
            ],
        )

    # --- the body ------------------------------------------------------------------

    def body(self, head: Head, body: bytes, *, now: float) -> Admitted | Response:
        """Judge the events. A whole body that cannot be read counts as one event."""
        if head.gzip:
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
        admitted = Admitted(head, [], {}, read.several)
        if read.report is not None:
            admitted.report = read_report(read.report)
        for place, raw in enumerate(read.events):
            try:
                admitted.said = event = read_event(raw)
                admitted.events.append(self._admit(event, head.sender, now))
            except Refused as refused:
                admitted.refused[place] = refused
        return admitted if admitted.events else self.answer(admitted, (), None)

    def _admit(self, event: Event, sender: Sender, now: float) -> Queueable:
        event_id = event.id or self._new_id()
        ruling = self.policy.judge(event, sender, event_id=event_id, now=now)
        who = ruling.customer
        return (
            event_id,
            event.id is not None,
            self._customer_digest(
                id=who.id, source_id=who.source_id, signed=ruling.signed
            ),
            event.event,
            ruling.lane,
            ruling.delivery,
            ruling.ttl_ms,
            upstream_body(event, who, ruling.own).decode(),
            ruling.special,
        )

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
        entries: list[Entry] = []
        known = iter(zip(admitted.events, fates, strict=True))
        accepted = False
        retry_after = 0
        worst = 400
        for place in range(len(admitted.events) + len(admitted.refused)):
            if (refused := admitted.refused.get(place)) is not None:
                entry = self._refused_entry(refused)
            else:
                event, fate = next(known)
                entry = _entry(event[0], fate)
                retry_after = max(retry_after, fate.retry_after)
            entries.append(entry)
            if entry["status"] in DONE:
                accepted = True
            else:
                worst = max(worst, STATUS[str(entry["status"])])
        extra = self._limit_headers(limit)
        if retry_after:
            extra.append((b"retry-after", b"%d" % retry_after))
        head = admitted.head
        if head.wait_s:
            extra.append((b"preference-applied", b"wait=%d" % head.wait_s))
        if accepted:
            status, kind, body = self._dialect.accept(entries, admitted.said)
        else:
            status = worst
            kind, body = self._all_refused(admitted, worst, entries)
            if worst == 401:
                extra.append(_CHALLENGE)
        response = Response(
            status,
            [*head.cors, *extra, kind, (b"x-request-id", head.request_id)],
            body,
            [(r.outcome, r.reason, r.name) for r in admitted.refused.values()],
            head.sender.notes,
        )
        if admitted.report is not None:
            statuses = [str(entry["status"]) for entry in entries]
            response.browser = counts(head.agent, admitted.report, statuses)
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
        return self.answer(admitted, [fate] * len(admitted.events), None)

    def too_large(self, head: Head) -> Response:
        """413, decided on the announced, the read or the inflated size."""
        return self._problem(
            head.request_id,
            head.cors,
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
            head.cors,
            408,
            Outcome.INVALID,
            "timeout",
            "The body did not arrive in time: send it again.",
            (b"connection", b"close"),
        )

    def elsewhere(
        self,
        headers: Iterable[Header],
        status: int,
        detail: str,
        peer: str | None = "",  # nobody: None is the unix socket
    ) -> Response:
        """An answer outside the hot route: no such path, no such method.

        Not a limited route, so it tells no limits.
        """
        origins: list[bytes] = []
        asked = None
        for name, value in headers:
            if name == b"origin":
                origins.append(value)
            elif name == b"x-request-id":
                asked = value
        allowed = len(origins) == 1 and self._allows(origins[0])
        return self._document(
            self.request_id(asked, peer),
            self._cors(origins[0] if allowed else None),
            status,
            {404: "path", 405: "method"}.get(status, "refused"),
            detail,
        )

    def failed(self, head: Head | None) -> Response:
        """500: a fault of the relay itself."""
        return self._problem(
            head.request_id if head else self._new_id().encode(),
            head.cors if head else self._cors(None),
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
            head.cors,
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

    def _limit_headers(self, limit: tuple[int, int, int] | None) -> list[Header]:
        if limit is None or limit[0] < 0:
            return [*self._limits_told]
        which, left, reset_us = limit
        name = self._limits[which].dimension
        until = -(-reset_us // 1_000_000)
        return [
            *self._limits_told,
            (b"ratelimit", f'"{name}";r={left};t={until}'.encode()),
        ]

    def _problem(
        self,
        request_id: bytes,
        cors: tuple[Header, ...],
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
        cors: tuple[Header, ...],
        status: int,
        reason: str,
        detail: str,
        *extra: Header,
    ) -> Response:
        kind, body = self._dialect.refuse(status, reason, detail, request_id=request_id)
        return Response(
            status, [*cors, *extra, kind, (b"x-request-id", request_id)], body
        )


def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


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


def _say_origin(origin: bytes | None) -> str:
    if origin is None:
        return (
            "The request names no Origin: browsers send it with every POST; for other "
            "senders set RELAY_ALLOW_NO_ORIGIN=true."
        )
    return (
        "This origin may not send events here: add it to RELAY_ALLOWED_ORIGINS if it "
        "is one of the shop's own."
    )


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
