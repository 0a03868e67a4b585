"""What a correct relay would never send, and how a test says that it meant to.

The sandbox answers such requests like any other, as Voucherify would; it also
remembers them, and the check at the end of a test names each.
"""

from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum

from relay.sandbox import oauth, schema
from relay.sandbox.activity import named_in
from relay.sandbox.record import Record
from relay.sandbox.request import Request

KEPT = 1000


class Kind(StrEnum):
    """Ways in which a request can be wrong."""

    FORBIDDEN_HEADER = "forbidden_header"  # a header of the shopper's, or unknown
    KEYS_AND_BEARER = "keys_and_bearer"  # two credentials in one request
    USER_AGENT = "user_agent"  # not the relay's own
    CHANNEL = "channel"  # X-Voucherify-Channel missing, or not the relay's own
    INVALID_BODY = "invalid_body"  # no JSON, or against the schema
    UNKNOWN_FIELD = "unknown_field"  # a key the schema does not name
    NULL_FIELD = "null_field"  # null where the schema has none
    CUSTOMER_MISSING = "customer_missing"  # neither id nor source_id
    RATE_LIMITED = "429"  # a limit was provoked
    KEYS = "keys"  # wrong or missing credentials
    TOKEN = "token"  # noqa: S105  # unknown or expired bearer token
    SCOPE = "scope"  # a token that is not for events
    OAUTH = "oauth"  # a token request that was refused
    ORIGIN = "origin"  # not a trusted domain
    UNKNOWN_PATH = "unknown_path"
    METHOD = "method"
    CONTENT_TYPE = "content_type"
    ACCEPT = "accept"
    TOO_LARGE = "too_large"


_KIND_OF_VERDICT = {
    "invalid_json": Kind.INVALID_BODY,
    "invalid_payload": Kind.INVALID_BODY,
    "rate_limited_ip": Kind.RATE_LIMITED,
    "rate_limited_plan": Kind.RATE_LIMITED,
    "unauthorized": Kind.KEYS,
    "token": Kind.TOKEN,
    "scope": Kind.SCOPE,
    "origin": Kind.ORIGIN,
    "unknown_path": Kind.UNKNOWN_PATH,
    "method": Kind.METHOD,
    "content_type": Kind.CONTENT_TYPE,
    "accept": Kind.ACCEPT,
    "too_large": Kind.TOO_LARGE,
    "invalid_grant_type": Kind.OAUTH,
    "invalid_scope": Kind.OAUTH,
    "invalid_project": Kind.OAUTH,
    "too_many_tokens": Kind.OAUTH,
    "missing_parameters": Kind.OAUTH,
}

_CLIENT_KEYS = frozenset({"x-client-application-id", "x-client-token"})
_SERVER_KEYS = frozenset({"x-app-id", "x-app-token"})
_COMMON = frozenset(
    {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "content-type",
        "content-length",
        "connection",
        "x-voucherify-channel",
        "authorization",
    }
)
_OF_EVENTS = frozenset({"x-voucherify-channel"})
ACTIVITY = "/v1/customers/{}/activity"
_ALLOWED = {
    "/client/v1/events": _COMMON | _CLIENT_KEYS | {"origin"},
    "/v1/events": _COMMON | _SERVER_KEYS,
    ACTIVITY: (_COMMON | _SERVER_KEYS) - {"content-type", "content-length"},
    oauth.TOKEN_V2: _COMMON - _OF_EVENTS,
    oauth.TOKEN_V1: (_COMMON | _SERVER_KEYS) - _OF_EVENTS - {"authorization"},
    oauth.INTROSPECT: (_COMMON | _SERVER_KEYS) - _OF_EVENTS - {"authorization"},
    oauth.REVOKE: (_COMMON | _SERVER_KEYS) - _OF_EVENTS - {"authorization"},
}


class UnexpectedTraffic(AssertionError):
    """Something reached the sandbox that a correct relay would not send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unexpected:
    """One thing wrong with one request; never holds a header's value."""

    kind: Kind
    seq: int
    detail: str


class Watch:
    """The newest unexpected things, and the kinds that are meant to happen."""

    def __init__(self) -> None:
        self._expected: set[Kind] = set()
        self._found: deque[Unexpected] = deque(maxlen=KEPT)

    def expect(self, *kinds: str) -> None:
        """Say that these kinds are meant to happen, before or after they do."""
        known = {kind.value for kind in Kind}
        for kind in kinds:
            if kind not in known:
                msg = f"{kind!r} is no kind; use one of {', '.join(sorted(known))}"
                raise ValueError(msg)
            self._expected.add(Kind(kind))

    def unexpected(self) -> list[Unexpected]:
        """Return what was found and not expected."""
        return [found for found in self._found if found.kind not in self._expected]

    def forget(self) -> None:
        """Forget what was found; what is expected stays so."""
        self._found.clear()

    def inspect(self, request: Request, record: Record) -> None:
        """Look at one judged request."""
        if record.verdict == "preflight":
            return
        found = [*_of_headers(request), *_of_body(record)]
        if (kind := _KIND_OF_VERDICT.get(record.verdict)) is not None:
            named = f"{request.method} {request.path}"
            found.append((kind, record.details or named))
        for kind, detail in found:
            self._found.append(Unexpected(kind=kind, seq=record.seq, detail=detail))
        record.unexpected = [kind.value for kind, _ in found]


def _of_headers(request: Request) -> list[tuple[Kind, str]]:
    path = request.path
    allowed = _ALLOWED.get(ACTIVITY if named_in(path) is not None else path)
    if allowed is None:
        return []
    headers = request.headers
    found = [
        (Kind.FORBIDDEN_HEADER, f"header {name}")
        for name in sorted(headers.keys() - allowed)
    ]
    if len(request.header_list) > len(headers):
        times = Counter(name for name, _ in request.header_list)
        found += [
            (Kind.FORBIDDEN_HEADER, f"header {name} more than once")
            for name, count in times.items()
            if count > 1
        ]
    if "authorization" in headers and any(
        name in headers for name in _CLIENT_KEYS | _SERVER_KEYS
    ):
        found.append((Kind.KEYS_AND_BEARER, "authorization beside keys"))
    if not headers.get("user-agent", "").startswith("voucherify-relay/"):
        found.append((Kind.USER_AGENT, "user-agent is not voucherify-relay/…"))
    channel = headers.get("x-voucherify-channel", "")
    if "x-voucherify-channel" in allowed and not channel.startswith("relay:"):
        found.append((Kind.CHANNEL, "x-voucherify-channel is not relay:…"))
    return found


def _of_body(record: Record) -> list[tuple[Kind, str]]:
    body = record.body
    if not isinstance(body, dict):
        return []
    found = [(Kind.UNKNOWN_FIELD, path) for path in schema.unknown_fields(body)]
    found += [(Kind.NULL_FIELD, path) for path in schema.null_fields(body)]
    customer = body.get("customer")
    if isinstance(customer, dict) and not (
        customer.get("id") or customer.get("source_id")
    ):
        found.append((Kind.CUSTOMER_MISSING, "customer has neither id nor source_id"))
    return found
