"""Decide about a request: headers and bytes in, a refusal or an admission out.

Knows neither ASGI nor Redis nor a clock, so any server can sit in front of it. In
the order a request meets them: method, origin, content type, size, then per event
the schema. What is refused changes nothing but counters; each `Response` names the
refusals that are to be counted.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import count
from secrets import token_hex

import msgspec

from relay.addresses import TrustedProxies, address_key, client_address
from relay.events import Event, Invalid, read_body, read_event, upstream_body
from relay.limits import Limit, policy_header
from relay.origins import AllowedOrigins
from relay.outcomes import Outcome

# Fetch allows 64 KiB of keepalive bodies in flight for a page, so a larger beacon
# never leaves the browser. https://fetch.spec.whatwg.org/#http-network-or-cache-fetch
MAX_BODY_BYTES = 64 * 1024
MAX_WAIT_S = 30  # of `Prefer: wait`

Header = tuple[bytes, bytes]

_TYPES = {b"application/json", b"text/plain", b""}
_CODINGS = {b"identity": False, b"gzip": True, b"x-gzip": True}  # RFC 9110, 8.4.1.3
_JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", b"application/problem+json")
# RFC 7240: names in any case, blanks around "=", the first of several counts.
_WAIT = re.compile(rb"(?:^|[,;\s])wait\s*=\s*(\d+)(?:$|[,;\s])", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}\Z")
_EXPOSED = (
    b"Retry-After, RateLimit, RateLimit-Policy, X-Request-Id, Relay-Degraded, "
    b"Preference-Applied"
)
# Browsers ask again after this long; Chromium caps it at two hours.
_PREFLIGHT_S = b"7200"

# For the commit script: id, whether the sender chose it, customer digest, name, lane,
# delivery rule, ttl in ms, the body for Voucherify.
Queueable = tuple[str, bool, str, str, str, str, int, str]

Refusal = tuple[Outcome, str, str]  # outcome, reason, event name or ""


@dataclass(slots=True)
class Response:
    """An answer, and the refusals it stands for."""

    status: int
    headers: list[Header]
    body: bytes = b""
    refusals: list[Refusal] = field(default_factory=list)


@dataclass(slots=True)
class Head:
    """What the headers of an acceptable request say."""

    request_id: bytes
    cors: tuple[Header, ...]
    address: str  # digest of the client's address, for limits only
    gzip: bool
    length: int  # as announced, -1 when it is not
    wait_s: int  # Prefer: wait


@dataclass(slots=True)
class Admission:
    """Sound events, ready for the queue, and the fate of the others."""

    head: Head
    events: list[Queueable]
    invalid: dict[int, Invalid]  # by the place in the sender's body
    several: bool

    @property
    def request(self) -> tuple[str, list[Queueable]]:
        return self.head.address, self.events


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What admission says of one event."""

    status: str  # queued, duplicate, unavailable or a refusing outcome
    reason: str = ""
    detail: str = ""
    retry_after: int = 0  # seconds
    outcome: dict[str, object] | None = None  # known by now: Prefer: wait


class Edge:
    """The decision for one set of rules; computes once what no request changes."""

    def __init__(
        self,
        *,
        origins: AllowedOrigins,
        proxies: TrustedProxies,
        limits: Sequence[Limit],
        digest_key: bytes,
        ttl_ms: int,
        allow_no_origin: bool = False,
    ) -> None:
        self._origins = origins
        self._proxies = proxies
        self._allow_no_origin = allow_no_origin
        self._ttl_ms = ttl_ms
        self._limits = tuple(limits)
        # Empty when nothing is enforced: a field of no members is not sent (RFC 9651).
        policy = policy_header(limits).encode()
        self._policy = [(b"ratelimit-policy", policy)] if policy else []
        # Ids must differ from those of every other process, past and future.
        self._ids = count()
        self._boot = token_hex(8)
        self._key = blake2b(digest_key, digest_size=32).digest()
        self._address_digest = lru_cache(16_384)(self._digest)

    # --- before the body ----------------------------------------------------------

    def head(
        self, method: str, headers: Iterable[Header], peer: str | None
    ) -> Head | Response:
        """Judge a request by its headers; the body is not needed for a refusal."""
        origin = content_type = encoding = length = prefer = asked_id = None
        forwarded: list[bytes] = []
        for name, value in headers:
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
        request_id = self._request_id(asked_id, peer)
        allowed = self._allow_no_origin if origin is None else self._allows(origin)
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
        if not allowed:
            return self._problem(
                request_id, cors, 403, Outcome.FORBIDDEN, "origin", _say_origin(origin)
            )
        kind = (content_type or b"").partition(b";")[0].strip().lower()
        if kind not in _TYPES:
            return self._problem(
                request_id,
                cors,
                415,
                Outcome.INVALID,
                "content_type",
                "Send JSON as application/json or text/plain.",
                (b"accept-post", b"application/json, text/plain"),
            )
        coding = (encoding or b"identity").strip().lower()
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
                b"a", address_key(client_address(peer, forwarded, self._proxies))
            ),
            gzip=_CODINGS[coding],
            length=announced,
            wait_s=min(int(wanted[1][:9]), MAX_WAIT_S) if wanted else 0,
        )
        return self.too_large(head) if announced > MAX_BODY_BYTES else head

    def _allows(self, origin: bytes) -> bool:
        return self._origins.allows(origin.decode("latin-1"))

    def _request_id(self, asked: bytes | None, peer: str | None) -> bytes:
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
                (
                    b"access-control-allow-headers",
                    b"content-type, content-encoding, prefer",
                ),
                (b"access-control-max-age", _PREFLIGHT_S),
                (b"x-request-id", request_id),
            ],
        )

    # --- the body ------------------------------------------------------------------

    def body(self, head: Head, body: bytes) -> Admission | Response:
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
        admission = Admission(head, [], {}, read.several)
        for place, raw in enumerate(read.events):
            try:
                admission.events.append(self._admit(read_event(raw)))
            except Invalid as invalid:
                admission.invalid[place] = invalid
        return admission if admission.events else self._refuse_all(admission)

    def _admit(self, event: Event) -> Queueable:
        given = event.id is not None
        event_id = event.id or self._new_id()
        who = event.customer
        customer = (
            self._digest(b"i", who.id) if who.id else self._digest(b"s", who.source_id)
        )
        lane = "normal"
        # Points and referrals are money: never a second delivery that might be one.
        paying = event.loyalty is not None or event.referral is not None
        delivery = "at_most_once" if paying else "at_least_once"
        return (
            event_id,
            given,
            customer,
            event.event,
            lane,
            delivery,
            self._ttl_ms,
            upstream_body(event).decode(),
        )

    def _digest(self, kind: bytes, value: str | None) -> str:
        """What stands for a person in keys: bounded, keyed, not to be turned back."""
        return blake2b(
            kind + (value or "").encode(), key=self._key, digest_size=9
        ).hexdigest()

    # --- answers ---------------------------------------------------------------------

    def answer(
        self,
        admission: Admission,
        fates: Sequence[Fate],
        limit: tuple[int, int, int] | None,
    ) -> Response:
        """Answer for events that met admission, `fates` in their order.

        `limit` is the tightest one: its index, what is left, microseconds until more.
        """
        entries: list[dict[str, object]] = []
        known = iter(zip(admission.events, fates, strict=True))
        accepted = False
        retry_after = 0
        worst = 400
        for place in range(len(admission.events) + len(admission.invalid)):
            if (invalid := admission.invalid.get(place)) is not None:
                entries.append(self._invalid_entry(invalid))
                continue
            event, fate = next(known)
            entry: dict[str, object] = {"id": event[0], "status": fate.status}
            if fate.status in _DONE:
                accepted = True
            else:
                entry["reason"] = fate.reason
                entry["detail"] = fate.detail
                if fate.retry_after:
                    entry["retry_after"] = fate.retry_after
                retry_after = max(retry_after, fate.retry_after)
                worst = max(worst, _STATUS[fate.status])
            if fate.outcome is not None:
                entry.update(fate.outcome)
            entries.append(entry)
        extra = self._limit_headers(limit)
        if retry_after:
            extra.append((b"retry-after", b"%d" % retry_after))
        if admission.head.wait_s:
            extra.append((b"preference-applied", b"wait=%d" % admission.head.wait_s))
        refusals = [
            (Outcome.INVALID, invalid.reason, invalid.name)
            for invalid in admission.invalid.values()
        ]
        if not accepted:
            response = self._all_refused(admission, worst, entries, extra)
            response.refusals = refusals
            return response
        head = admission.head
        return Response(
            202,
            [*head.cors, *extra, _JSON, (b"x-request-id", head.request_id)],
            _json({"events": entries}),
            refusals,
        )

    def unavailable(
        self, admission: Admission, reason: str, detail: str, retry_after: int
    ) -> Response:
        """503: nothing was taken, or nobody knows.

        A repeat under the sender's own ids is harmless. Ids made here are compared
        with nothing, so an event without its own may come twice.
        """
        fate = Fate(
            status="unavailable", reason=reason, detail=detail, retry_after=retry_after
        )
        return self.answer(admission, [fate] * len(admission.events), None)

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
        return _document(
            self._request_id(asked, peer),
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

    def _refuse_all(self, admission: Admission) -> Response:
        return self.answer(admission, (), None)

    def _all_refused(
        self,
        admission: Admission,
        status: int,
        entries: list[dict[str, object]],
        extra: list[Header],
    ) -> Response:
        head, first = admission.head, entries[0]
        if status != 400:  # the refusal that decides is the one to be shown
            first = next(e for e in entries if _STATUS[str(e["status"])] == status)
        body: dict[str, object] = _problem_body(
            status, str(first["reason"]), str(first["detail"])
        )
        if admission.several:
            body["detail"] = (
                f"None of the {len(entries)} events was accepted: {first['detail']}"
            )
            body["events"] = entries
        else:
            body["id"] = first["id"]
        return Response(
            status,
            [*head.cors, *extra, _PROBLEM, (b"x-request-id", head.request_id)],
            _json(body),
        )

    def _invalid_entry(self, invalid: Invalid) -> dict[str, object]:
        return {
            "id": invalid.id or self._new_id(),
            "status": str(Outcome.INVALID),
            "reason": invalid.reason,
            "detail": invalid.detail,
        }

    def _limit_headers(self, limit: tuple[int, int, int] | None) -> list[Header]:
        if limit is None or limit[0] < 0:
            return [*self._policy]
        which, left, reset_us = limit
        name = self._limits[which].dimension
        until = -(-reset_us // 1_000_000)
        return [
            *self._policy,
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
        response = _document(
            request_id, cors, status, reason, detail, *extra, *self._policy
        )
        if outcome is not None:
            response.refusals.append((outcome, reason, ""))
        return response


_json = msgspec.json.Encoder().encode
_DONE = {"queued", "duplicate", "coalesced"}
# The status when every event was refused: the highest of these, so that a sender
# who can still get something in by waiting is told to wait.
_STATUS = {
    "invalid": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "rate_limited": 429,
    "unavailable": 503,
}
_TITLES = {
    400: "The event is not valid",
    401: "Not identified",
    403: "Not allowed",
    404: "Nothing here",
    405: "Wrong method",
    408: "Too slow",
    413: "Too large",
    415: "Unknown format",
    429: "Too many events",
    500: "Internal fault",
    503: "Not now",
}


def _problem_body(status: int, reason: str, detail: str) -> dict[str, object]:
    """A problem document (RFC 9457); `type` names the reason, not a page."""
    return {
        "type": f"urn:voucherify-relay:problem:{reason}",
        "title": _TITLES.get(status, "Refused"),
        "status": status,
        "detail": detail,
        "reason": reason,
    }


def _document(
    request_id: bytes,
    cors: tuple[Header, ...],
    status: int,
    reason: str,
    detail: str,
    *extra: Header,
) -> Response:
    return Response(
        status,
        [*cors, *extra, _PROBLEM, (b"x-request-id", request_id)],
        _json(_problem_body(status, reason, detail)),
    )


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
