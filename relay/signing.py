"""Signed identities: whom a page may speak for, and what it may send.

A token is made by the shop's backend, which knows who is logged in, with a key that
no page has; docs/tokens.md has its format. To read one is to know that a key of ours
signed exactly these claims for this purpose, and that they still hold. A token has
one written form only, so its digest can count its uses.

A token hides nothing (its claims are readable), is tied to no browser, and counts no
uses by itself. Pure: the time is an argument. No error, nor what caused it, carries
a key, a token or the value of a claim.
"""

import base64
import hashlib
import re
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import itsdangerous
import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from pydantic import SecretStr

from relay.origins import MAX_ORIGIN, parse_origin_pattern

PURPOSE = "relay.identity"  # the salt: a token for one purpose is none for another
DEFAULT_TTL_S = 86_400
MAX_TTL_S = 366 * 86_400
LEEWAY_S = 60  # how far the clock of the shop's backend may be ahead of ours
MAX_TOKEN_BYTES = 4096  # as much as a cookie (RFC 6265, 6.1); it may be a header
MAX_CLAIMS_BYTES = 16_384  # inflated: room for hundreds of names, and no zip bomb
MAX_USES = 1_000_000

# Tokens that were read already, as one comes with each beacon. About 1 KB each.
CACHE = 4096

# A signature of 32 bytes is 43 characters of base64url, which could hold two bits
# more: the last character is one of 16, or the same signature had four forms.
_FORM = re.compile(
    r"(?P<payload>\.?[A-Za-z0-9_-]+)"
    r"\.(?P<stamp>[A-Za-z0-9_-]{2,11})"
    r"\.(?P<signature>[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048])"
)


class Claims(Struct, forbid_unknown_fields=True):
    """The payload. A misspelt key or a null must not widen what a token allows."""

    source_id: Annotated[str, Meta(min_length=1, max_length=512)]
    events: (
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=300)]],
            Meta(min_length=1),
        ]
        | UnsetType
    ) = UNSET
    origin: str | UnsetType = UNSET
    ttl: Annotated[int, Meta(ge=1, le=MAX_TTL_S)] | UnsetType = UNSET
    uses: Annotated[int, Meta(ge=1, le=MAX_USES)] | UnsetType = UNSET
    id: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET  # tells twins apart


_RULES = {
    "source_id": "source_id is required: a string of 1 to 512 characters",
    "events": "events must be a list of names, at least one, of 1 to 300 characters",
    "origin": "origin must be one origin as a browser writes it, "
    "like https://shop.example",
    "ttl": f"ttl must be a whole number of seconds, 1 to {MAX_TTL_S}",
    "uses": f"uses must be a whole number, 1 to {MAX_USES}",
    "id": "id must be a string of at most 64 characters",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a token says that is sound: who sends, and what may be sent."""

    source_id: str
    events: frozenset[str] | None = None  # names it may send; None: any
    origin: str | None = None  # as a browser serialises it, to be compared exactly
    uses: int | None = None  # how many events it may send in all
    issued_at: int  # Unix seconds
    expires_at: int
    digest: str  # of the token, 24 hex characters: what its uses are counted under


class TokenRefused(Exception):
    """A token does not count: `reason` is a stable code, `detail` says what to do."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class InvalidClaim(ValueError):
    """A claim that cannot be signed. `field` is its key, or empty for all of them."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class Signer:
    """Makes and reads tokens with keys that are listed from oldest to newest."""

    def __init__(
        self,
        keys: Sequence[str | SecretStr],
        *,
        ttl_s: int = DEFAULT_TTL_S,
        purpose: str = PURPOSE,
    ) -> None:
        """The last key signs, all verify; `ttl_s` is for tokens that name no ttl."""
        if not 1 <= ttl_s <= MAX_TTL_S:
            msg = f"ttl_s must be 1 to {MAX_TTL_S}"
            raise ValueError(msg)
        self._ttl_s = ttl_s
        # Not its TimestampSigner: that one reads the clock, and puts the token into
        # its errors.
        self._hmac = itsdangerous.Signer(
            _texts(keys),
            salt=purpose,
            key_derivation="hmac",
            digest_method=hashlib.sha256,
        )
        # A dictionary compares texts only when their keyed hashes agree, so its speed
        # tells nothing of the tokens in it. What is refused is not kept.
        self._known = lru_cache(CACHE)(self._verify)

    def sign(
        self,
        *,
        source_id: str,
        events: Sequence[str] | None = None,
        origin: str | None = None,
        ttl_s: int | None = None,
        uses: int | None = None,
        now: float,
    ) -> tuple[str, int]:
        """Make a token; gives it and when it expires. Raises `InvalidClaim`."""
        given = {
            "source_id": source_id,
            "events": events,
            "origin": origin and (_serialised(origin) or origin),
            # Always written, so that the time told here holds for every reader.
            "ttl": self._ttl_s if ttl_s is None else ttl_s,
            "uses": uses,
            # Two tokens of one second would else be the same, and share their uses.
            "id": None if uses is None else secrets.token_urlsafe(9),
        }
        raw = _encode({key: v for key, v in given.items() if v is not None})
        claims = _decode(raw)
        issued_at = int(now)
        stamp = issued_at.to_bytes((issued_at.bit_length() + 7) // 8, "big")
        token = self._hmac.sign(f"{_pack(raw)}.{_base64(stamp)}").decode("ascii")
        if len(token) > MAX_TOKEN_BYTES or len(raw) > MAX_CLAIMS_BYTES:
            raise InvalidClaim("events", "events are too many for a token: name fewer")
        return token, self._expiry(claims, issued_at)

    def read(self, token: str, *, now: float) -> Identity:
        """Give what a token says while it holds. Raises `TokenRefused`."""
        if len(token) > MAX_TOKEN_BYTES:
            raise TokenRefused(
                "token_malformed", _CUT.format("is too long for a token")
            )
        identity = self._known(token)
        if now < identity.issued_at - LEEWAY_S:
            ahead = int(identity.issued_at - now)
            raise TokenRefused(
                "token_not_yet_valid",
                f"The token is stamped {ahead} s in the future: set the clock of the "
                "machine that made it.",
            )
        if now >= identity.expires_at:
            raise TokenRefused(
                "token_expired", "The token has expired: ask the shop for a new one."
            )
        return identity

    def _verify(self, token: str) -> Identity:
        form = _FORM.fullmatch(token)
        if form is None:
            raise TokenRefused("token_malformed", _CUT.format("is no token"))
        # The signature comes first: what a stranger wrote is not even decoded.
        # itsdangerous compares with hmac.compare_digest, the newest key before others.
        if not self._hmac.verify_signature(
            f"{form['payload']}.{form['stamp']}", form["signature"]
        ):
            raise TokenRefused(
                "token_forged",
                "No signing key of this relay made the token: ask the shop for a new "
                "one.",
            )
        issued_at = _read_stamp(form["stamp"])
        claims = _read_payload(form["payload"])
        return Identity(
            source_id=claims.source_id,
            events=frozenset(claims.events) if claims.events is not UNSET else None,
            origin=claims.origin if claims.origin is not UNSET else None,
            uses=claims.uses if claims.uses is not UNSET else None,
            issued_at=issued_at,
            expires_at=self._expiry(claims, issued_at),
            digest=hashlib.sha256(token.encode("ascii")).hexdigest()[:24],
        )

    def _expiry(self, claims: Claims, issued_at: int) -> int:
        return issued_at + (claims.ttl if claims.ttl is not UNSET else self._ttl_s)


_CUT = "What was sent {}: send it whole and unchanged, as it was made."
_SIGNED = "The token is signed, but {}. Correct the program that makes it."


def _texts(keys: Sequence[str | SecretStr]) -> list[str]:
    if isinstance(keys, str):  # a sequence too, of keys of one letter
        raise ValueError("signing keys must be a list")
    if not keys:
        raise ValueError("a signing key is missing; `relay keygen` makes one")
    texts = [k.get_secret_value() if isinstance(k, SecretStr) else k for k in keys]
    for position, text in enumerate(texts, start=1):
        if not text or not text.isascii():
            fault = "must be ASCII" if text else "is empty"
            msg = f"signing key {position} {fault}; `relay keygen` makes one"
            raise ValueError(msg)
    return texts


# --- the parts of a token -------------------------------------------------------------


def _read_stamp(text: str) -> int:
    raw = _unbase64(text)
    if not raw or raw[0] == 0:
        raise TokenRefused(
            "token_malformed",
            _SIGNED.format("its time is not Unix seconds without leading zeros"),
        )
    return int.from_bytes(raw, "big")


def _read_payload(text: str) -> Claims:
    raw = _unbase64(text.removeprefix("."))
    if raw is not None and text.startswith("."):
        raw = _inflate(raw)
    if raw is None or len(raw) > MAX_CLAIMS_BYTES:
        raise TokenRefused(
            "token_malformed",
            _SIGNED.format("its payload is not base64url without padding, or too long"),
        )
    try:
        return _decode(raw)
    except InvalidClaim as fault:
        raise TokenRefused("token_malformed", _SIGNED.format(fault)) from None


def _pack(raw: bytes) -> str:
    """The payload, deflated behind a dot where that is shorter."""
    deflated = zlib.compress(raw)
    if len(deflated) < len(raw) - 1:
        return f".{_base64(deflated)}"
    return _base64(raw)


def _inflate(deflated: bytes) -> bytes | None:
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(deflated, MAX_CLAIMS_BYTES + 1)
    except zlib.error:
        return None
    return raw if stream.eof and not stream.unused_data else None


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _unbase64(text: str) -> bytes | None:
    """The bytes, unless `text` is not the very form in which we would write them."""
    if len(text) % 4 == 1:
        return None
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return raw if _base64(raw) == text else None


# --- claims ---------------------------------------------------------------------------

_decode_claims = msgspec.json.Decoder(Claims).decode
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_FIELD = re.compile(r"`\$\.(\w+)|missing required field `(\w+)`")


def _encode(given: dict[str, object]) -> bytes:
    try:
        return msgspec.json.encode(given)
    except UnicodeEncodeError:
        pass
    # Past the handler, as that error carries the text.
    raise InvalidClaim("", "a claim holds half a surrogate pair: it must be Unicode")


def _decode(raw: bytes) -> Claims:
    try:
        claims = _decode_claims(raw)
    except msgspec.ValidationError as fault:
        field, problem = _explain(str(fault))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        field, problem = "", "its payload is not JSON in UTF-8"
    else:
        if claims.origin is UNSET or _serialised(claims.origin) == claims.origin:
            return claims
        field, problem = "origin", _RULES["origin"]
    # Past the handlers, as an error about UTF-8 carries the payload.
    raise InvalidClaim(field, problem)


def _explain(said: str) -> tuple[str, str]:
    if unknown := _UNKNOWN.match(said):
        known = ", ".join(_RULES)
        return unknown[1], f"{unknown[1][:60]!r} is not a claim: there are {known}"
    if match := _FIELD.search(said):
        field = match[1] or match[2]
        return field, _RULES[field]
    return "", "its payload is not a JSON object"


def _serialised(origin: str) -> str | None:
    """One origin in the form that browsers send, or None if it is not one."""
    if len(origin) > MAX_ORIGIN:
        return None
    try:
        text = parse_origin_pattern(origin)
    except ValueError:
        return None
    return None if "*" in text else text
