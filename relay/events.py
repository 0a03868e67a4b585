"""What a sender may say, and what of it Voucherify gets.

A body is one event, a bare array, or `{"events": [...], "token": ...}`. Each event
is checked against the schema that Voucherify publishes for its client events
(OpenAPI `ClientEventsCreateRequestBody`): what Voucherify would surely refuse is
refused here, with the field and the rule in the message, and costs no call.

Stricter than the schema on purpose: unknown keys are refused, never dropped in
silence, and a customer must be named by `id` or `source_id`, or by a token. More
lenient: `null` for an optional part counts as absent.

Pure: bytes in, values out. Numbers keep their kind and every digit.
"""

import re
from collections.abc import Mapping
from datetime import date, datetime, timedelta
from string import ascii_letters, digits
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from relay.outcomes import Outcome

MAX_EVENTS = 100  # in one body
MAX_METADATA_KEYS = 100  # Voucherify allows 100 definitions a schema ("Limits")
MAX_ID = 64  # characters
MAX_DEPTH = 8  # levels of an event, the event itself being the first
# Of `age`. An event that a page has kept for longer is nobody's news, and a clock that
# was set meanwhile may say anything.
MAX_AGE_MS = 30 * 86_400_000

Metadata = dict[str, object]
_UNSAID = Raw()
_BLANKS = b" \t\r\n"  # of JSON: RFC 8259, 2


class Address(Struct, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A customer's postal address; every part is optional."""

    city: str | None = None
    state: str | None = None
    line_1: str | None = None
    line_2: str | None = None
    country: str | None = None
    postal_code: str | None = None


class Customer(Struct, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """Who did it. `id` wins over `source_id`; the rest overwrites the profile."""

    id: str | None = None
    source_id: str | None = None
    name: str | None = None
    description: str | None = None
    email: str | None = None
    phone: str | None = None
    birthday: date | None = None  # Voucherify's deprecated alias of birthdate
    birthdate: date | None = None
    # The one part where the schema gives null a meaning, so it is passed on.
    address: Address | UnsetType | None = UNSET
    metadata: Metadata | None = None


class Referral(Struct, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """The referral code that brought the customer here."""

    code: str
    referrer_id: str | None = None


class Loyalty(Struct, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """The loyalty card that earns the points."""

    code: str


class Event(Struct, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """One event as a sender writes it; `id`, `token` and `age` stay with the relay."""

    event: Annotated[str, Meta(min_length=1, max_length=300)]
    customer: Customer | None = None  # a token may name it instead
    referral: Referral | None = None
    loyalty: Loyalty | None = None
    metadata: Metadata | None = None
    id: str | None = None  # its letters are looked at by `read_event`
    token: str | None = None
    age: Raw = _UNSAID  # any number, read by `age_ms`


class Upstream(Struct, gc=False, omit_defaults=True):
    """The body of Voucherify's `POST /client/v1/events`."""

    event: str
    customer: Customer
    referral: Referral | None = None
    loyalty: Loyalty | None = None
    metadata: Metadata | None = None


class Batch(Struct, forbid_unknown_fields=True):
    """Several events in one body, with a token that counts for all of them."""

    events: list[Raw]
    token: str | None = None
    report: Raw = Raw()  # the snippet's, of the way out of the browser; may be anything


class Refused(Exception):
    """An event is not taken: `reason` is a stable code, `detail` says what to do."""

    def __init__(
        self, outcome: Outcome, reason: str, detail: str, *, name: str = ""
    ) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.reason = reason
        self.detail = detail
        self.name = name  # the event's name where it could be read, for counters
        self.id: str | None = None  # the sender's id where it could be read


class Invalid(Refused):
    """A sender's mistake in the form of an event or of a body."""

    def __init__(self, reason: str, detail: str, *, name: str = "") -> None:
        super().__init__(Outcome.INVALID, reason, detail, name=name)


class Body(Struct, gc=False):
    """The events of one request, each still to be checked, and their token."""

    events: list[Raw] | list[bytes]
    token: str | None = None
    several: bool = True  # as the sender wrote it: batch or array, not one event
    report: bytes | None = None


_decode_event = msgspec.json.Decoder(Event).decode
_decode_batch = msgspec.json.Decoder(Batch).decode
_decode_array = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.Encoder().encode
_FAULTS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError)


def read_body(body: bytes) -> Body:
    """Find the events in a request body. Raises `Invalid` for the body as a whole."""
    start = body[:1]
    if start == b"{" and b'"events"' not in body:  # by far the most frequent
        return Body([body], None, False)
    if start in _BLANKS:
        start = body.lstrip(_BLANKS)[:1]
    if (b"\\ud" in body or b"\\uD" in body) and (start == b"[" or b'"events"' in body):
        body = _ESCAPE.sub(_whole, body)
    if start == b"[":
        return _several(_array(body), None, None)
    # It may stand in the metadata of one event, so the word alone decides nothing.
    if start == b"{" and b'"events"' in body and (batch := _batch(body)) is not None:
        return _several(batch.events, batch.token, bytes(batch.report) or None)
    return Body(events=[body], several=False)


# A title that a page has cut inside an emoji ends with half a surrogate pair, which is
# no text (RFC 8259, 8.2), and would cost the events of its whole batch.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL
)


def _whole(escape: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if escape[1] else escape[0]


def read_event(raw: Raw | bytes) -> Event:
    """Check one event against the schema. Raises `Invalid` with field and rule."""
    try:
        event = _decode_event(raw)
    except _FAULTS as fault:
        raise _explain(fault, raw) from fault
    customer = event.customer
    if event.id is not None and not _is_id(event.id):
        bad = _named(event, "bad_id", "id must be 1 to 64 of A-Z a-z 0-9 _ and -.")
        bad.id = None
        raise bad
    metadata = event.metadata
    if metadata is not None and not _is_plain(metadata):
        _check_metadata(event, "metadata", metadata, level=2)
    of_customer = customer.metadata if customer is not None else None
    if of_customer is not None and not _is_plain(of_customer):
        _check_metadata(event, "customer.metadata", of_customer, level=3)
    if event.age is not _UNSAID:
        age_ms(event)
    return event


def identified(event: Event) -> Customer:
    """Whose event it is. Raises `Invalid` when it says nothing of that."""
    customer = event.customer
    if customer is None:
        raise _named(
            event,
            "customer_missing",
            "customer is required: it says whose event this is.",
        )
    if not customer.id and not customer.source_id:
        raise _named(
            event,
            "customer_unidentified",
            "customer.source_id or customer.id is required and must not be empty: "
            "it says whose event this is.",
        )
    return customer


def age_ms(event: Event) -> int:
    """How old it was when it was sent, by the sender's clock. Raises `Invalid`.

    No clock costs an event: whatever number it says is brought within bounds.
    """
    said = bytes(event.age)
    if said in (b"", b"null"):
        return 0
    try:
        age = float(said)  # of a number of any size, as the decoder would not
    except ValueError:
        raise _named(
            event,
            "age_invalid",
            "age must be a number: the milliseconds from the event to this request. "
            "Correct it, or leave it out.",
        ) from None
    return int(min(max(age, 0), MAX_AGE_MS))


def occurred_at(event: Event, received_at: float) -> str:
    """When it happened, on the relay's clock: ISO 8601, UTC, with milliseconds."""
    ms = int(received_at * 1000) - age_ms(event)
    # Not fromtimestamp: a float of seconds has no whole milliseconds.
    happened = _EPOCH + timedelta(milliseconds=ms)
    return f"{happened.isoformat(timespec='milliseconds')}Z"


_EPOCH = datetime(1970, 1, 1)  # of UTC, which is written as Z


def upstream_body(
    event: Event, customer: Customer, own: Mapping[str, object] | None = None
) -> bytes:
    """The JSON that Voucherify gets: no relay keys, no nulls, types unchanged.

    `own` is what the relay says in the metadata, in the place of the sender's words.
    """
    metadata = event.metadata
    if own:  # the event itself stays as it was sent: an answer may repeat it
        metadata = {**(metadata or {}), **own}
    said = Upstream(event.event, customer, event.referral, event.loyalty, metadata)
    return _encode(said)


def _several(events: list[Raw], token: str | None, report: bytes | None) -> Body:
    if not events:
        raise Invalid("empty_batch", "The batch is empty: send at least one event.")
    if len(events) > MAX_EVENTS:
        raise Invalid(
            "too_many_events",
            f"A body carries at most {MAX_EVENTS} events, this one {len(events)}: "
            "send several requests.",
        )
    return Body(events=events, token=token, report=report)


def _array(body: bytes) -> list[Raw]:
    try:
        return _decode_array(body)
    except _FAULTS as fault:
        raise _explain(fault, body) from fault


def _batch(body: bytes) -> Batch | None:
    """The batch, or None when `events` is not a key of the body itself."""
    try:
        return _decode_batch(body)
    except _FAULTS as fault:
        try:
            known = msgspec.json.decode(body, type=dict[str, Raw])
        except _FAULTS as worse:
            # Not JSON, so cut off: the complaint of a batch about its keys is wrong.
            raise _explain(worse, body) from worse
        if "events" in known:
            raise _explain(fault, body) from fault
        return None


def _is_plain(metadata: Metadata) -> bool:
    """Whether it is flat and not too long, as nearly all are."""
    types = map(type, metadata.values())
    return len(metadata) <= MAX_METADATA_KEYS and _FLAT.issuperset(types)


def _check_metadata(
    event: Event, where: str, metadata: Metadata, *, level: int
) -> None:
    if len(metadata) > MAX_METADATA_KEYS:
        raise _named(
            event,
            "too_many_metadata_keys",
            f"{where} has {len(metadata)} keys, at most {MAX_METADATA_KEYS} "
            "are allowed.",
        )
    for value in metadata.values():
        if isinstance(value, (dict, list)) and _deeper(value, MAX_DEPTH - level):
            raise _named(event, "too_deep", _TOO_DEEP.format(where))


_FLAT = frozenset((str, int, float, bool, type(None)))
_TOO_DEEP = "{} is nested too deeply: an event has at most " + f"{MAX_DEPTH} levels."


def _deeper(value: object, allowed: int) -> bool:
    """Whether `value` nests more than `allowed` levels of objects and arrays."""
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list):
        inner = value
    else:
        return False
    return allowed <= 0 or any(_deeper(item, allowed - 1) for item in inner)


def _named(event: Event, reason: str, detail: str) -> Invalid:
    invalid = Invalid(reason, detail, name=event.event)
    invalid.id = event.id
    return invalid


# --- one place where the decoder's words become ours ------------------------------

_AT = re.compile(r" - at `\$\.?([^`]*)`\Z")
_RULES: list[tuple[re.Pattern[str], str, str]] = [
    (
        re.compile(r"Object missing required field `(?P<key>[^`]+)`"),
        "{key}_missing",
        "{path} is required.",
    ),
    (
        re.compile(r"Object contains unknown field `(?P<key>.*)`\Z", re.DOTALL),
        "unknown_field",
        "{path} is not a known field: remove it, or put it into metadata.",
    ),
    (
        re.compile(r"Expected `str` of length >= 1"),
        "empty",
        "{path} must not be empty: it is a string of 1 to 300 characters.",
    ),
    (
        re.compile(r"Expected `str` of length <= 300"),
        "too_long",
        "{path} is too long: it is a string of 1 to 300 characters.",
    ),
    (
        re.compile(r"Invalid (RFC3339|ISO8601) encoded date|Expected `date"),
        "bad_date",
        "{path} must be a date written YYYY-MM-DD.",
    ),
    (
        re.compile(r"Expected `(?P<want>[a-z]+)[^`]*`, got `(?P<got>[^`]+)`"),
        "wrong_type",
        "{path} must be {want}, not {got}.",
    ),
    (
        re.compile(r"Number out of range"),
        "bad_number",
        "{path} is a number too large to be kept exactly.",
    ),
]
_WORDS = {
    "str": "a string",
    "object": "an object",
    "array": "an array",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
    "date": "a date written YYYY-MM-DD",
}


def _explain(fault: Exception, raw: Raw | bytes) -> Invalid:
    """Turn a decoder's complaint into a reason code and a sentence with a cure."""
    if isinstance(fault, RecursionError):
        return Invalid("too_deep", _TOO_DEEP.format("The body"))
    if isinstance(fault, msgspec.ValidationError):
        invalid = _explain_schema(str(fault))
        invalid.name, invalid.id = _peek(raw)
        return invalid
    if isinstance(fault, UnicodeDecodeError):
        return Invalid("malformed_json", "The body must be JSON encoded as UTF-8.")
    if isinstance(fault, msgspec.MsgspecError):
        said = str(fault).removeprefix("JSON is malformed: ")
        return Invalid("malformed_json", f"The body is not valid JSON: {said}.")
    return Invalid("bad_number", "The body holds a number that cannot be read.")


def _explain_schema(said: str) -> Invalid:
    at = _AT.search(said)
    path, rule = (at[1], said[: at.start()]) if at else ("", said)
    for pattern, reason, detail in _RULES:
        if match := pattern.match(rule):
            words = match.groupdict()
            key = words.get("key", "")
            full = ".".join(part for part in (path, key) if part) or "An event"
            return Invalid(
                # referral.code and loyalty.code are both `code_missing`
                reason.format(key=key),
                detail.format(
                    path=full[:100],
                    want=_WORDS.get(words.get("want", ""), words.get("want", "")),
                    got=_WORDS.get(words.get("got", ""), words.get("got", "")),
                ),
            )
    return Invalid("invalid", f"The event breaks the schema: {said[:200]}.")


class _Peek(Struct):
    event: object = None
    id: object = None


_decode_peek = msgspec.json.Decoder(_Peek).decode


_ID_LETTERS = frozenset(f"{ascii_letters}{digits}_-")


def _is_id(text: str) -> bool:
    """1 to 64 of A-Z a-z 0-9 _ and -."""
    return 0 < len(text) <= MAX_ID and _ID_LETTERS.issuperset(text)


def _peek(raw: Raw | bytes) -> tuple[str, str | None]:
    """Name and id of a faulty event, where they are sound: for counters and answers."""
    try:
        seen = _decode_peek(raw)
    except _FAULTS:
        return "", None
    name = seen.event if isinstance(seen.event, str) and len(seen.event) <= 300 else ""
    known = seen.id if isinstance(seen.id, str) and _is_id(seen.id) else None
    return name, known
