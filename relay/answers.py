"""What the relay answers, in the words of the route that was asked.

The decision is the same on every route (edge.py); a dialect gives it a form. Beacons
get the relay's own JSON and problem documents, Voucherify's own clients get what
Voucherify would have said, made only of what the sender itself has sent.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import msgspec
from msgspec import Struct, field

from relay.events import Event
from relay.headers import NONE, Block, Header
from relay.outcomes import Outcome

Refusal = tuple[Outcome, str, str]  # outcome, reason, event name or ""

JSON = (b"content-type", b"application/json")
PROBLEM = (b"content-type", b"application/problem+json")

# The sender is done with these.
DONE = {"queued", "duplicate", "coalesced", "dropped"}
# The status when every event was refused: the highest of these, so that a sender
# who can still get something in by waiting is told to wait.
STATUS = {
    "invalid": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "rate_limited": 429,
    "unavailable": 503,
}


class Response(Struct, gc=False):
    """An answer, the refusals it stands for, and what else is to be counted."""

    status: int
    own: list[Header]
    body: bytes = b""
    always: Block = NONE  # what it has in common with others, written before its own
    refusals: list[Refusal] = field(default_factory=list)
    notes: Sequence[str] = ()
    browser: Sequence[tuple[str, int]] = ()  # what the snippet reported

    @property
    def headers(self) -> list[Header]:
        return [*self.always.pairs, *self.own]

    @property
    def text(self) -> bytes:
        """As it is written: its headers, the empty line and the body."""
        own = [b"%b: %b\r\n" % header for header in self.own]
        return b"".join((self.always.wire, *own, b"\r\n", self.body))


class Written(Struct, gc=False):
    """An answer in one piece; it stands for no refusals."""

    status: int
    text: bytes


# What an answer says of one event: id, status, and why not.
Entry = dict[str, object]


class Dialect(Protocol):
    """The form of a route's answers, and what the route takes."""

    content_types: frozenset[bytes]
    request_headers: bytes  # that a page may send: Access-Control-Allow-Headers
    batches: bool  # whether one request may carry several events
    repeats: bool  # whether an answer says again what the event was

    def accept(
        self, entries: Sequence[Entry], event: Event | None
    ) -> tuple[int, bytes]:
        """At least one event was taken; `event` is the only one, as it was sent.

        The body is JSON.
        """
        ...

    def take(self, event_id: str, event: Event | None) -> tuple[int, bytes]:
        """The same of one event that was queued, which is what most answers say."""
        ...

    def refuse(
        self,
        status: int,
        reason: str,
        detail: str,
        *,
        request_id: bytes,
        entries: Sequence[Entry] = (),
        several: bool = False,
    ) -> tuple[Header, bytes]:
        """Nothing was taken; `entries` is empty for a refusal of the whole request."""
        ...

    def turn_away(
        self, reason: str, detail: str, event_id: str, *, request_id: bytes
    ) -> tuple[Header, bytes]:
        """The same of one event that a limit refuses, which is what floods are told."""
        ...


_json = msgspec.json.Encoder().encode


class Beacons:
    """The relay's own: entries for each event, and problem documents (RFC 9457)."""

    content_types = frozenset({b"application/json", b"text/plain", b""})
    request_headers = b"content-type, content-encoding, prefer, relay-token"
    batches = True
    repeats = False

    def __init__(self, *, disabled: bool = False) -> None:
        # The snippet stops when it reads this, until its page is loaded again.
        self._more: dict[str, object] = {"disabled": True} if disabled else {}
        # Ids have no letters that JSON would write in another way.
        _, taken = self.accept([{"id": "%", "status": "queued"}], None)
        self._before, self._after = taken.split(b"%")
        # By reason and detail, whose seconds have an end: those of a limit's window.
        self._turned_away = lru_cache(maxsize=256)(self._about)

    def accept(
        self, entries: Sequence[Entry], event: Event | None
    ) -> tuple[int, bytes]:
        del event
        return 202, _json({"events": entries, **self._more})

    def take(self, event_id: str, event: Event | None) -> tuple[int, bytes]:
        del event
        return 202, self._before + event_id.encode() + self._after

    def refuse(
        self,
        status: int,
        reason: str,
        detail: str,
        *,
        request_id: bytes,
        entries: Sequence[Entry] = (),
        several: bool = False,
    ) -> tuple[Header, bytes]:
        del request_id  # it is in its header
        body = problem_body(status, reason, detail)
        if several:
            body["detail"] = f"None of the {len(entries)} events was accepted: {detail}"
            body["events"] = entries
        elif entries:
            body["id"] = entries[0]["id"]
        return PROBLEM, _json({**body, **self._more})

    def turn_away(
        self, reason: str, detail: str, event_id: str, *, request_id: bytes
    ) -> tuple[Header, bytes]:
        del request_id  # it is in its header
        before, after = self._turned_away(reason, detail)
        return PROBLEM, before + event_id.encode() + after

    def _about(self, reason: str, detail: str) -> tuple[bytes, bytes]:
        """A problem document of a limit, before an event's id and after it."""
        _, body = self.refuse(
            429, reason, detail, request_id=b"", entries=[{"id": "\x00"}]
        )
        before, after = body.split(_json("\x00")[1:-1])
        return before, after


class Official:
    """Voucherify's own: its event object, and its errors.

    `@voucherify/sdk` copies code, key, message, details and request_id out of an
    error; `voucherify.js` takes an answer for a success only when it is JSON with
    `object` "event" and a `type`.
    """

    content_types = frozenset({b"application/json"})
    # Sorted as browsers ask for them. `user-agent` is what 3.x sets and Firefox and
    # Safari let it; `authorization` its OAuth. All of them are ignored.
    request_headers = (
        b"authorization, content-encoding, content-type, prefer, relay-token, "
        b"user-agent, x-client-application-id, x-client-token, "
        b"x-voucherify-api-version, x-voucherify-channel"
    )
    batches = False
    repeats = True

    def accept(
        self, entries: Sequence[Entry], event: Event | None
    ) -> tuple[int, bytes]:
        del entries
        # What Voucherify stores about the customer is nobody's business here, so the
        # answer is made of the sender's own words.
        customer: dict[str, object] = {"object": "customer"}
        if event is not None and event.customer is not None:
            said = event.customer
            customer |= {"id": said.id} if said.id else {}
            customer |= {"source_id": said.source_id} if said.source_id else {}
        body = {
            "object": "event",
            "type": event.event if event is not None else "",
            "customer": customer,
            "referral": None,
            "loyalty": None,
            "metadata": (event.metadata if event is not None else None) or {},
        }
        return 200, _json(body)

    def take(self, event_id: str, event: Event | None) -> tuple[int, bytes]:
        del event_id
        return self.accept((), event)

    def refuse(
        self,
        status: int,
        reason: str,
        detail: str,
        *,
        request_id: bytes,
        entries: Sequence[Entry] = (),
        several: bool = False,
    ) -> tuple[Header, bytes]:
        del entries, several
        key, message = _OFFICIAL.get(status, ("refused", "Refused"))
        body = {
            "code": status,
            "key": key,
            "message": message,
            "details": detail,
            "request_id": request_id.decode(),
            "reason": reason,
        }
        return JSON, _json(body)

    def turn_away(
        self, reason: str, detail: str, event_id: str, *, request_id: bytes
    ) -> tuple[Header, bytes]:
        del event_id
        return self.refuse(429, reason, detail, request_id=request_id)


# Keys and messages of Voucherify where it has them (its guide "Errors").
_OFFICIAL = {
    400: ("invalid_payload", "Invalid payload"),
    401: ("unauthorized", "Unauthorized"),
    403: ("forbidden", "Forbidden"),
    404: ("not_found", "Resource not found"),
    405: ("method_not_allowed", "Method not allowed"),
    408: ("request_timeout", "Request timeout"),
    413: ("payload_too_large", "Payload too large"),
    415: ("unsupported_media_type", "Unsupported media type"),
    429: ("too_many_requests", "Too many requests hit the API too quickly."),
    500: ("internal_error", "Internal error"),
    503: ("service_unavailable", "Service unavailable"),
}

_TITLES = {
    400: "Not valid",
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


def problem_body(status: int, reason: str, detail: str) -> dict[str, object]:
    """A problem document (RFC 9457); `type` names the reason, not a page."""
    return {
        "type": f"urn:voucherify-relay:problem:{reason}",
        "title": _TITLES.get(status, "Refused"),
        "status": status,
        "detail": detail,
        "reason": reason,
    }
