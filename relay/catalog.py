"""The event catalogue: which event may carry what, and how it is handled.

A catalogue is a TOML file, `[defaults]` and a table `[events.<name>]` for each event.
A faulty one is refused as a whole, with every fault at once: the line, the path, what
is wrong and what to write instead. Listed events inherit nothing from `[defaults]`.

Pure: text in, values out. Who sends, and whether a rule is kept, is decided elsewhere.
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, time
from difflib import get_close_matches
from typing import TypeVar

from relay.errors import RelayError
from relay.events import Customer
from relay.limits import UNIT_S, Window, parse_duration, parse_event_limit
from relay.toml_lines import Path, first_broken, read_lines

LANES = ("high", "normal", "low")
TOKEN_RULES = ("off", "optional", "required", "dry_run")
DELIVERIES = ("at_least_once", "at_most_once", "verify")
UNLISTED = ("accept", "reject")
CUSTOMER_FIELDS = Customer.__struct_fields__

# Types of an event's properties in Voucherify (management API, "Create Custom Event
# Schema"), and `any` for what is not to be checked.
METADATA_TYPES = ("string", "number", "boolean", "date", "datetime", "any")

MAX_CHARS = 256 * 1024  # of a file: thousands of events
# Of a line. tomllib takes quadratic time for a key of many parts, and a key is on one
# line: 200,000 characters of "a.a.a" took 23 s.
MAX_LINE = 4_000
MAX_NAME = 300  # of `event` ("Track Custom Event (client-side)")
MAX_COALESCE_S = 30 * 86_400
LOOK_UP_S = 120  # from a doubtful call until it is looked up: queue.py does it

# What a property may be listed as that the relay sets: to a time, and to an id.
TIME_TYPES = ("datetime", "string", "any")
ID_TYPES = ("string", "any")

# Every key that there is, as messages and docs/catalog.md show it. `unlisted` is for
# [defaults] alone.
EXAMPLES = {
    "unlisted": 'unlisted = "reject"',
    "priority": 'priority = "low"',
    "ttl": 'ttl = "2h"',
    "coalesce": 'coalesce = "10m"',
    "token": 'token = "required"',
    "delivery": 'delivery = "at_most_once"',
    "limit": 'limit = "3/1d"',
    "customer": 'customer = ["source_id", "email"]',
    "loyalty": "loyalty = true",
    "referral": "referral = false",
    "metadata": 'metadata = { plan = "string", seats = "number" }',
    "occurred_at": 'occurred_at = "signed_up_at"',
    "event_id": 'event_id = "relay_id"',
}
EVENT_KEYS = tuple(key for key in EXAMPLES if key != "unlisted")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What counts for the events of one name."""

    name: str | None  # None: the rule for names that are not listed
    priority: str = "normal"
    ttl_s: int | None = None  # None: RELAY_TTL
    coalesce_ms: int = 0  # one call per customer in this window; 0: one for each
    token: str | None = None  # None: RELAY_TOKENS decides
    # None: at_most_once when loyalty or referral is present, else at_least_once
    delivery: str | None = None  # `verify` has an `event_id`
    limit: Window | None = None  # per customer, for this event
    limit_dry_run: bool = False
    customer: frozenset[str] | None = None  # None: the sender's identity decides
    loyalty: bool | None = None  # True: anyone may, False: nobody, None: not said
    referral: bool | None = None
    metadata: Mapping[str, str] | None = None  # name to type; None: anything
    occurred_at: str | None = None  # the property that says when it happened
    event_id: str | None = None  # the property that names the event
    place: str  # for messages: "events.cart_abandoned" or "defaults"

    @property
    def own(self) -> tuple[str, ...]:
        """The properties of metadata that the relay sets itself."""
        return tuple(name for name in (self.occurred_at, self.event_id) if name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The rules of all events."""

    rules: Mapping[str, Rule]
    defaults: Rule
    unlisted: str = "accept"  # or "reject"
    warnings: tuple[str, ...] = ()  # allowed, but probably not meant
    _alike: Mapping[str, Rule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        alike = {_plain(name): rule for name, rule in self.rules.items()}
        object.__setattr__(self, "_alike", alike)

    def rule(self, name: str) -> Rule | None:
        """What counts for this event; None when it is not listed and so refused.

        A name that differs from a listed one in blanks around it or in case alone is
        not listed, and where that is accepted it meets the listed one's rule: nobody
        steps round a token by a capital letter.
        """
        rule = self.rules.get(name)
        if rule is not None or self.unlisted != "accept":
            return rule
        if not self._alike:
            return self.defaults
        return self._alike.get(_plain(name), self.defaults)

    @property
    def _counting(self) -> list[Rule]:
        """The rules that an event can meet."""
        others = [self.defaults] if self.unlisted == "accept" else []
        return [*self.rules.values(), *others]

    @property
    def needs_keys(self) -> bool:
        """Whether a rule that can count looks at tokens, which takes signing keys."""
        return any(rule.token in ("required", "dry_run") for rule in self._counting)

    def takes_strangers(self, tokens: str) -> bool:
        """Whether some event needs no token, where `tokens` is the setting's rule."""
        return any((rule.token or tokens) != "required" for rule in self._counting)

    @property
    def verifies(self) -> bool:
        """Whether a rule that can count has events looked up in Voucherify."""
        return any(rule.delivery == "verify" for rule in self._counting)

    @property
    def names(self) -> tuple[str, ...]:
        """The listed events, in the order of the file."""
        return tuple(self.rules)


def _plain(name: str) -> str:
    return name.strip().casefold()


# What counts without a file.
EMPTY = Catalog(rules={}, defaults=Rule(name=None, place="defaults"))


class CatalogError(RelayError):
    """The catalogue is faulty. Carries one line for each fault, in the file's order."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def parse_catalog(text: str, *, max_ttl_s: int) -> Catalog:
    """Read a catalogue. Raises `CatalogError` with every fault in it.

    `max_ttl_s` is how long ids are remembered: no event may live longer.
    """
    text = text.removeprefix("\ufeff")  # some editors for Windows write it
    if len(text) > MAX_CHARS:
        raise CatalogError([f"line 1: the file is larger than {MAX_CHARS} characters."])
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            said = f"the line is longer than {MAX_LINE} characters: break it"
            raise CatalogError([f"line {number}: {said}"])
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise CatalogError([_explain(text, error)]) from error
    if not document:
        # As a write that failed leaves it. It must not lift every rule there was.
        raise CatalogError(["line 1: the file is empty: for no rules write [defaults]"])
    notes = _Notes()
    catalog = _catalog(document, notes, max_ttl_s)
    if notes.faults or notes.warnings:
        lines = read_lines(text)
        if notes.faults:
            raise CatalogError(_placed(notes.faults, lines))
        return replace(catalog, warnings=tuple(_placed(notes.warnings, lines)))
    return catalog


def metadata_fault(
    rule: Rule, metadata: Mapping[str, object]
) -> tuple[str, str] | None:
    """Give reason and detail when an event's metadata is not as the rule says.

    A listed name may be absent or null: whether it is needed is Voucherify's to say.
    What the relay sets itself is no matter, for nothing of it is passed on.
    """
    if rule.metadata is None:
        return None
    for name, value in metadata.items():
        kind = rule.metadata.get(name)
        if kind is None:
            said = "is not listed"
            reason = "metadata_field"
        elif value is not None and not _FITS[kind](value):
            said = f"must be {_TYPE_WORDS[kind]}"
            reason = "metadata_type"
        else:
            continue
        if name in rule.own:
            continue
        path = _dotted(("metadata", name))
        return reason, f"{path} {said} (catalogue: {rule.place}.metadata)."
    return None


def quoted(text: str) -> str:
    """Give a text in quotes with JSON's escapes for all that cannot be seen.

    Such are line ends, U+2028 and U+2029, and marks that turn the direction of text.
    """
    return "".join(
        char if char.isprintable() else json.dumps(char)[1:-1]
        for char in json.dumps(text, ensure_ascii=False)
    )


def span(seconds: int) -> str:
    """Write a time as a catalogue does: `2h`, or `90s` when no larger unit fits."""
    unit = max(
        (unit for unit, size in UNIT_S.items() if seconds % size == 0),
        key=UNIT_S.__getitem__,
    )
    return f"{seconds // UNIT_S[unit]}{unit}"


# --- metadata -------------------------------------------------------------------------

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# The forms that Voucherify lists for times (API reference, `start_date` of a voucher):
# a date alone, then hours, minutes, seconds, fractions and a zone as far as wanted.
_DATETIME = re.compile(
    rf"(?P<date>{_DATE.pattern})"
    r"(?:T(?P<time>[0-9]{2}(?::[0-9]{2}(?::[0-9]{2})?)?)(?:(?<=:..:..)\.[0-9]{1,9})?"
    r"(?:Z|[+-](?P<zone>[0-9]{2}:[0-9]{2}))?)?"
)


def _is_date(value: object) -> bool:
    if not isinstance(value, str) or not _DATE.fullmatch(value):
        return False
    return _is_real(date.fromisoformat, value)


def _is_datetime(value: object) -> bool:
    match = _DATETIME.fullmatch(value) if isinstance(value, str) else None
    if match is None or not _is_real(date.fromisoformat, match["date"]):
        return False
    times = (part for part in (match["time"], match["zone"]) if part)
    return all(_is_real(time.fromisoformat, part) for part in times)


def _is_real(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


_FITS: dict[str, Callable[[object], bool]] = {
    "string": lambda value: isinstance(value, str),
    "number": lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool)
    ),
    "boolean": lambda value: isinstance(value, bool),
    "date": _is_date,
    "datetime": _is_datetime,
    "any": lambda _: True,
}
_TYPE_WORDS = {
    "string": "a string",
    "number": "a number",
    "boolean": "true or false",
    "date": "a date written YYYY-MM-DD",
    "datetime": "a time written like 2030-01-31T09:00:00Z",
}


# --- from tables to rules -------------------------------------------------------------


class _Notes:
    """The faults and warnings found so far, each with the path that it is about."""

    def __init__(self) -> None:
        self.faults: list[tuple[Path, str]] = []
        self.warnings: list[tuple[Path, str]] = []


class _Table:
    """One table of the file, read key by key; what is wrong is noted, not raised."""

    def __init__(self, path: Path, table: dict[str, object], notes: _Notes) -> None:
        self.path = path
        self.table = table
        self.notes = notes

    def take(self, key: str, read: Callable[[object], T], absent: T) -> T:
        if key not in self.table:
            return absent
        try:
            return read(self.table[key])
        except ValueError as error:
            self.fault(f"{error}. Example: {EXAMPLES[key]}", key)
            return absent

    def fault(self, said: str, *keys: str) -> None:
        self.notes.faults.append((self.path + keys, said))

    def warn(self, said: str, *keys: str) -> None:
        self.notes.warnings.append((self.path + keys, said))

    def check_keys(self, known: tuple[str, ...]) -> None:
        for key, value in self.table.items():
            if key in known:
                continue
            said = _nearest(key, known)
            if not self.path and isinstance(value, dict):
                said += f"; an event is written [{_dotted(('events', key))}]"
            elif not self.path and key in EXAMPLES:
                said = "write it under [defaults], or under an event"
            elif key == "unlisted":
                said = "write it under [defaults]"
            elif self.path[:1] == ("events",) and isinstance(value, dict):
                name = _dotted(("events", f"{self.path[1]}.{key}"))
                said = f"if the event's name has a dot, write [{name}]"
            self.fault(f"this key is not known: {said}", key)


def _catalog(document: dict[str, object], notes: _Notes, max_ttl_s: int) -> Catalog:
    top = _Table((), document, notes)
    top.check_keys(("defaults", "events"))
    said_defaults = _subtable(top, "defaults")
    defaults = _Table(("defaults",), said_defaults, notes)
    unlisted = defaults.take("unlisted", _one_of(UNLISTED), "accept")
    defaults.check_keys(("unlisted", *EVENT_KEYS))
    default = _rule(None, defaults, max_ttl_s)
    if unlisted == "reject" and len(said_defaults) > 1:
        defaults.warn(
            'nothing here counts but unlisted = "reject": listed events inherit nothing'
        )
    events = _Table(("events",), _subtable(top, "events"), notes)
    rules: dict[str, Rule] = {}
    for name in events.table:
        if not 1 <= len(name) <= MAX_NAME:
            events.fault(f"the name must have 1 to {MAX_NAME} characters", name)
        event = _Table(("events", name), _subtable(events, name), notes)
        event.check_keys(EVENT_KEYS)
        rules[name] = _rule(name, event, max_ttl_s)
    return Catalog(rules=rules, defaults=default, unlisted=unlisted)


def _subtable(table: _Table, key: str) -> dict[str, object]:
    value = table.table.get(key, {})
    if isinstance(value, dict):
        return value
    path = (*table.path, key)
    example = path if len(path) > 1 or key == "defaults" else (*path, "cart_abandoned")
    table.fault(f"must be a table, not {_kind(value)}: [{_dotted(example)}]", key)
    return {}


def _rule(name: str | None, table: _Table, max_ttl_s: int) -> Rule:
    limit, limit_dry_run = table.take("limit", _limit, _NO_LIMIT)
    rule = Rule(
        name=name,
        priority=table.take("priority", _one_of(LANES), "normal"),
        ttl_s=table.take("ttl", lambda v: _span(v, max_ttl_s, _TTL_WHY), None),
        coalesce_ms=table.take(
            "coalesce", lambda v: _span(v, MAX_COALESCE_S) * 1000, 0
        ),
        token=table.take("token", _one_of(TOKEN_RULES), None),
        delivery=table.take("delivery", _one_of(DELIVERIES), None),
        limit=limit,
        limit_dry_run=limit_dry_run,
        customer=table.take("customer", _customer, None),
        loyalty=table.take("loyalty", _flag, None),
        referral=table.take("referral", _flag, None),
        metadata=table.take("metadata", lambda v: _metadata(v, table), None),
        occurred_at=table.take("occurred_at", _property, None),
        event_id=table.take("event_id", _property, None),
        place=_dotted(table.path),
    )
    _check_together(rule, table)
    return rule


def _check_together(rule: Rule, table: _Table) -> None:
    named = rule.customer is None or rule.customer & {"source_id", "id"}
    anonymous = rule.token != "required"  # noqa: S105 - the name of a rule
    if anonymous and not named:
        table.fault(
            "nobody without a token could say whose event it is: "
            'add source_id, or token = "required"',
            "customer",
        )
    if rule.ttl_s is not None and rule.coalesce_ms >= rule.ttl_s * 1000:
        table.fault(
            "what waits for the end of this time would expire before: "
            "make it shorter than ttl",
            "coalesce",
        )
    _check_own(rule, table)
    paying = [key for key in ("loyalty", "referral") if getattr(rule, key)]
    if not paying:
        return
    if rule.delivery == "at_least_once":
        table.warn(
            "points could be paid twice after a connection that broke: "
            'leave it out, or say "at_most_once" or "verify"',
            "delivery",
        )
    limited = rule.limit is not None and not rule.limit_dry_run
    if anonymous and not limited:
        unless = "" if rule.token else "unless RELAY_TOKENS is required, "
        table.warn(
            f"{unless}any visitor can mint points as often as the general limits "
            'allow: add token = "required", or limit = "3/1d"',
            paying[0],
        )


def _check_own(rule: Rule, table: _Table) -> None:
    """The properties of metadata that the relay sets."""
    listed = rule.metadata or {}
    for key, name, what, types in (
        ("occurred_at", rule.occurred_at, "a time", TIME_TYPES),
        ("event_id", rule.event_id, "an id", ID_TYPES),
    ):
        kind = listed.get(name or "", "any")
        if kind not in types:
            table.fault(
                f"metadata lists this name as {kind}, and {what} is none: list it as "
                f"{types[0]}, or leave it out there",
                key,
            )
    if rule.event_id is not None and rule.event_id == rule.occurred_at:
        table.fault("occurred_at has this name: give it another one", "event_id")
    if rule.delivery == "verify" and rule.event_id is None:
        table.fault(
            "an event is found again by a property of its own: name one, "
            f"{EXAMPLES['event_id']}",
            "delivery",
        )
    short = rule.ttl_s is not None and rule.ttl_s <= LOOK_UP_S
    if rule.delivery == "verify" and short:
        table.warn(
            f"an event is looked up {LOOK_UP_S} s after a doubtful call, its time is "
            'over before: make it longer, or say delivery = "at_most_once"',
            "ttl",
        )


# --- values: each reader gives it, or says what is wrong ------------------------------


def _one_of(known: tuple[str, ...]) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"must be {_any_of(known)}, not {_shown(value)}")
        return value

    return read


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {_shown(value)}")
    return value


def _span(value: object, most: int, why: str = "") -> int:
    if not isinstance(value, str):
        raise ValueError(f"must be a time in quotes, not {_shown(value)}")
    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise ValueError(_because(value, error)) from None
    if not 1 <= seconds <= most:
        raise ValueError(f"must be from 1s to {span(most)}, not {_shown(value)}{why}")
    return seconds


_TTL_WHY = (
    ": an id must be remembered for as long as its event may live. For a longer ttl "
    "raise RELAY_DEDUPE_WINDOW, which is never less than RELAY_TTL"
)
_NO_LIMIT: tuple[Window | None, bool] = (None, False)


def _limit(value: object) -> tuple[Window | None, bool]:
    if not isinstance(value, str):
        raise ValueError(f"must be a rate in quotes, not {_shown(value)}")
    try:
        return parse_event_limit(value)
    except ValueError as error:
        raise ValueError(_because(value, error)) from None


def _customer(value: object) -> frozenset[str]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of names, not {_shown(value)}")
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"must be a list of names, and {_shown(name)} is none")
        if name not in CUSTOMER_FIELDS:
            said = _nearest(name, CUSTOMER_FIELDS)
            raise ValueError(f"{_shown(name)} is no field of a customer: {said}")
    return frozenset(value)


def _metadata(value: object, table: _Table) -> dict[str, str] | None:
    if value == "any":
        return None
    if not isinstance(value, dict):
        raise ValueError(f'must be a table of types, or "any", not {_shown(value)}')
    read = _one_of(METADATA_TYPES)
    types: dict[str, str] = {}
    for name, kind in value.items():
        try:
            types[name] = read(kind)
        except ValueError as error:
            table.fault(f"{error}. Example: {EXAMPLES['metadata']}", "metadata", name)
    return types


def _property(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a name in quotes, not {_shown(value)}")
    if not value:
        raise ValueError("must be the name of a property, not empty")
    return value


# --- words ----------------------------------------------------------------------------

_BARE = re.compile(r"[A-Za-z0-9_-]{1,60}")


def _dotted(path: Path) -> str:
    """A path as TOML has it, long names cut."""
    return ".".join(
        part if _BARE.fullmatch(part) else quoted(_cut(part)) for part in path
    )


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return quoted(_cut(value)) if isinstance(value, str) else _kind(value)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return "a table"
    return "a list" if isinstance(value, list) else "a date or time"


def _any_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _nearest(name: str, known: tuple[str, ...]) -> str:
    if close := get_close_matches(name, known, n=1):
        return f"the nearest is {close[0]}"
    return f"there are {', '.join(known)}"


def _because(value: str, error: ValueError) -> str:
    """Why a text cannot be read; the form is told by the example of the key."""
    return f"{_shown(value)} cannot be read: {str(error).partition(';')[0]}"


# --- places in the file ---------------------------------------------------------------


def _placed(notes: list[tuple[Path, str]], lines: dict[Path, int]) -> list[str]:
    placed = sorted(
        ((lines.get(path, 1), path, said) for path, said in notes),
        key=lambda note: note[0],
    )
    return [f"line {line}: {_dotted(path)}: {said}" for line, path, said in placed]


_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)\Z")


def _explain(text: str, error: Exception) -> str:
    """Turn a parser's complaint into a fault with the line of its cause."""
    match = _AT.search(str(error))
    said = "it has too many brackets"
    if match:
        said = str(error)[: min(match.start(), 200)]  # a repeated name may be long
    if match and match[1]:
        line, said = int(match[1]), f"{said} (column {match[2]})"
    else:  # something is open until the end, or was read and is too large
        line = first_broken(text)
    cure = f"Texts, times and rates stand in quotes: {EXAMPLES['ttl']}"
    if said.startswith("Cannot "):
        cure = "Write each table and each key once"
    return f"line {line}: this is not TOML: {said}. {cure}"
