"""What a request's origin, content type and encoding come to.

A page repeats them with each beacon, so each combination is judged once. Knows
neither bodies nor rules.
"""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from relay.headers import Block, Header, block
from relay.origins import AllowedOrigins
from relay.outcomes import Outcome

# Combinations that are kept, of at most so many characters beside the origin, which an
# allowed one has few of: a sender cannot fill the memory with them.
KEPT, KEPT_CHARS = 1024, 100

_CODINGS = {b"identity": False, b"gzip": True, b"x-gzip": True}  # RFC 9110, 8.4.1.3
_EXPOSED = (
    b"Retry-After, RateLimit, RateLimit-Policy, X-Request-Id, Relay-Degraded, "
    b"Preference-Applied"
)
_VARY = (b"vary", b"Origin")


class Takes(Protocol):
    """The part of a dialect that says what its route takes."""

    content_types: frozenset[bytes]


class Fault(Struct, frozen=True):
    """Why a request is refused for its headers alone."""

    status: int
    outcome: Outcome
    reason: str
    detail: str
    extra: tuple[Header, ...] = ()


class Form(Struct, frozen=True):
    """What the headers that repeat say."""

    origin: str | None  # as it was sent
    allowed: bool  # by its origin, or by the setting for those without one
    cors: Block  # of every answer
    accepted: Block  # of one that accepts; its body is JSON
    gzip: bool = False
    fault: Fault | None = None  # beside the origin

    @property
    def forbidden(self) -> Fault:
        """The refusal of its origin."""
        said = _NO_ORIGIN if self.origin is None else _OTHER_ORIGIN
        return Fault(403, Outcome.FORBIDDEN, "origin", said)


class Forms:
    """The forms of one route."""

    def __init__(
        self,
        *,
        origins: AllowedOrigins,
        allow_no_origin: bool,
        takes: Takes,
        accepted: Sequence[Header],
    ) -> None:
        self._origins = origins
        self._allow_no_origin = allow_no_origin
        self._types = takes.content_types
        self._accepted = tuple(accepted)
        self._kept: dict[tuple[bytes | None, bytes, bytes | None], Form] = {}

    def read(
        self, origin: bytes | None, content_type: bytes, coding: bytes | None
    ) -> Form:
        """Judge the values of `Origin`, `Content-Type` and `Content-Encoding`."""
        key = (origin, content_type, coding)
        form = self._kept.get(key)
        if form is None:
            form = self._judge(origin, content_type, coding)
            short = len(content_type) + len(coding or b"") <= KEPT_CHARS
            if form.allowed and form.fault is None and short:
                if len(self._kept) >= KEPT:
                    self._kept.clear()
                self._kept[key] = form
        return form

    def cors(self, origin: bytes | None) -> Block:
        """What an answer to a page of this origin tells its browser."""
        said = None if origin is None else origin.decode("latin-1")
        return self._cors(origin if said and self._origins.allows(said) else None)

    def _judge(
        self, origin: bytes | None, content_type: bytes, coding: bytes | None
    ) -> Form:
        said = None if origin is None else origin.decode("latin-1")
        allowed = self._allow_no_origin if said is None else self._origins.allows(said)
        cors = self._cors(origin if allowed else None)
        asked = coding.strip().lower() if coding else b"identity"
        return Form(
            origin=said,
            allowed=allowed,
            cors=cors,
            accepted=block(*cors.pairs, *self._accepted),
            gzip=_CODINGS.get(asked, False),
            fault=self._fault(content_type, asked),
        )

    def _cors(self, origin: bytes | None) -> Block:
        if origin is None:
            return _STRANGER
        return block(
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-credentials", b"true"),
            (b"access-control-expose-headers", _EXPOSED),
            _VARY,
        )

    def _fault(self, content_type: bytes, coding: bytes) -> Fault | None:
        types = self._types
        if content_type not in types and _media_type(content_type) not in types:
            taken = sorted(kind.decode() for kind in types if kind)
            return Fault(
                415,
                Outcome.INVALID,
                "content_type",
                f"Send JSON as {' or '.join(taken)}.",
                ((b"accept-post", ", ".join(taken).encode()),),
            )
        if coding not in _CODINGS:
            return Fault(
                415,
                Outcome.INVALID,
                "content_encoding",
                "Send the body plain or with Content-Encoding: gzip.",
                ((b"accept-encoding", b"gzip"),),
            )
        return None


_STRANGER = block(_VARY)
_NO_ORIGIN = (
    "The request names no Origin: browsers send it with every POST; for other "
    "senders set RELAY_ALLOW_NO_ORIGIN=true."
)
_OTHER_ORIGIN = (
    "This origin may not send events here: add it to RELAY_ALLOWED_ORIGINS if it "
    "is one of the shop's own."
)


def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()
