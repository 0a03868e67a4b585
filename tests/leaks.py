"""What the suite made the relay say, and what must not be in it.

A `Recorder` keeps, compressed, everything that it hears; `leaks()` then looks for
every secret and for the data of customers, as they are and in the usual disguises.
It looks at the end because some secrets are known only after they were used. What
is shorter than eight characters is not looked for: the relay does not mask it
either (`MIN_SECRET`), and it would be found in anything.
"""

import base64
import gzip
import html
import json
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from urllib.parse import quote, quote_plus

from relay.verdicts import MIN_SECRET

MAX_VALUE = 1000  # what is longer is padding, and its start would be found as well
# Of one file: its next customer meets the same code as those before.
MAX_PEOPLE = 1000
BATCH_BYTES = 4 * 1024 * 1024


Packed = tuple[dict[str, str], dict[str, dict[str, str]], "Counter[Kind]", list[bytes]]


class Kind(StrEnum):
    """Where something was said."""

    ANSWER = "answer"  # an HTTP answer of the relay, head and body
    OUTPUT = "output"  # of a program, and so the logs of every real relay
    LOG = "log"  # what a relay within the tests logged or printed
    ERROR = "error"  # the text of an exception that the relay raised
    METRIC = "metric"  # names of keys in Redis, counters, gauges and marks
    EVENT = "event"  # queued events and dead letters: customers belong there


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Something that was said, and what the one it was said to had sent."""

    kind: Kind
    where: str
    said: bytes
    own: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    kind: Kind
    where: str
    name: str  # never the value: this is printed
    near: str

    def __str__(self) -> str:
        return f"{self.name} in the {self.kind} of {self.where}: …{self.near}…"


@dataclass(slots=True)
class Recorder:
    """Hears everything, says nothing until asked."""

    secrets: dict[str, str] = field(default_factory=dict)  # value: name
    people: dict[str, dict[str, str]] = field(default_factory=dict)  # by file of tests
    heard: Counter[Kind] = field(default_factory=Counter)
    _fresh: list[Heard] = field(default_factory=list)
    _fresh_bytes: int = 0
    _kept: list[bytes] = field(default_factory=list)

    def secret(self, value: str, name: str) -> None:
        """Know a secret; `name` is what a finding calls it."""
        value = value.strip()
        # Words, which may be anywhere: "no token" is in an error, too.
        plain = value.replace(" ", "").isalpha() and value.islower()
        if MIN_SECRET <= len(value) <= MAX_VALUE and not plain:
            self.secrets.setdefault(value, name)

    def person(self, value: str, name: str, where: str) -> None:
        """Know a value that belongs to one customer in the tests of one file."""
        if _is_distinctive(value):
            known = self.people.setdefault(_file(where), {})
            if len(known) < MAX_PEOPLE:
                known.setdefault(value, name)

    def sent(self, where: str, body: bytes, headers: str = "") -> bytes:
        """Know whose data are in a request; return all that its sender has said."""
        if body[:2] == b"\x1f\x8b":
            with suppress(OSError, EOFError, zlib.error):
                body = gzip.decompress(body)
        with suppress(ValueError, RecursionError):
            for name, value in _leaves(json.loads(body)):
                if name == "token":
                    self.secret(value, "a token")
                else:
                    self.person(value, f"a customer's {name}", where)
        return headers.encode() + b"\n" + body

    def hear(self, kind: Kind, where: str, said: str | bytes, own: bytes = b"") -> None:
        """Keep what was said."""
        if not said:
            return
        raw = said if isinstance(said, bytes) else said.encode("utf-8", "replace")
        self.heard[kind] += 1
        self._fresh.append(Heard(kind=kind, where=where, said=raw, own=own))
        self._fresh_bytes += len(raw) + len(own)
        if self._fresh_bytes > BATCH_BYTES:
            self._put_away()

    def leaks(self, of: str = "") -> list[Leak]:
        """Everything that was said and should not have been; `of` one test, or all."""
        return [leak for batch in self._batches(of) for leak in self._leaks_of(batch)]

    def kinds(self, of: str = "") -> set[Kind]:
        """What kinds were heard."""
        return {heard.kind for batch in self._batches(of) for heard in batch}

    def packed(self) -> Packed:
        """All that it knows and has heard, for `add` of another one."""
        self._put_away()
        return self.secrets, self.people, self.heard, self._kept

    def add(self, packed: Packed) -> None:
        """Know and have heard what another has, too."""
        secrets, people, heard, kept = packed
        self.secrets = {**secrets, **self.secrets}
        for file, known in people.items():
            self.people[file] = {**known, **self.people.get(file, {})}
        self.heard.update(heard)
        self._kept += kept

    @property
    def size(self) -> int:
        """Bytes that it keeps."""
        return sum(map(len, self._kept)) + self._fresh_bytes

    def _batches(self, of: str) -> Iterator[list[Heard]]:
        self._put_away()
        for kept in self._kept:
            batch = [heard for heard in _open(kept) if heard.where.startswith(of)]
            if batch:
                yield batch

    def _put_away(self) -> None:
        if self._fresh:
            parts = [(h.kind, h.where, h.said, h.own) for h in self._fresh]
            self._kept.append(zlib.compress(pickle.dumps(parts), 1))
        self._fresh, self._fresh_bytes = [], 0

    def _leaks_of(self, batch: list[Heard]) -> Iterator[Leak]:
        # Most needles are nowhere, and one look at all of a batch says so.
        whole = b"\0".join(_seen(heard) for heard in batch)
        for value, name in self.secrets.items():
            for form in forms(value):
                if form in whole:
                    yield from _secret_in(batch, form, name)
        for file in {_file(heard.where) for heard in batch}:
            of_file = [heard for heard in batch if _file(heard.where) == file]
            whole = b"\0".join(_seen(heard) for heard in of_file)
            for value, name in self.people.get(file, {}).items():
                for form in forms(value):
                    if form in whole:
                        yield from _person_in(of_file, form, name, value)


def _secret_in(batch: list[Heard], form: bytes, name: str) -> Iterator[Leak]:
    for heard in batch:
        if form in _seen(heard):
            yield _leak(heard, form, name)


def _person_in(
    batch: list[Heard], form: bytes, name: str, value: str
) -> Iterator[Leak]:
    for heard in batch:
        if heard.kind is Kind.EVENT or form not in _seen(heard):
            continue
        # What a sender has said itself may be said back to it, and to it alone.
        if not any(own in heard.own for own in forms(value)):
            yield _leak(heard, form, name)


def _leak(heard: Heard, form: bytes, name: str) -> Leak:
    seen = _seen(heard)
    at = seen.index(form)
    near = seen[max(0, at - 60) : at].decode("utf-8", "replace")
    return Leak(kind=heard.kind, where=heard.where, name=name, near=near)


def _seen(heard: Heard) -> bytes:
    """What was said; of a program also without the line breaks of its tables."""
    if heard.kind is not Kind.OUTPUT:
        return heard.said
    return heard.said + b"\0" + re.sub(rb"\s*\n\s*", b"", heard.said)


def _open(kept: bytes) -> list[Heard]:
    parts = pickle.loads(zlib.decompress(kept))  # noqa: S301  # our own
    return [Heard(kind=k, where=w, said=s, own=o) for k, w, s, o in parts]


@cache
def forms(value: str) -> tuple[bytes, ...]:
    """A value and its disguises: JSON, URL, HTML, `repr`, hex and base64."""
    raw = value.encode("utf-8", "surrogatepass")
    texts = {
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        json.dumps(value).replace("/", "\\/")[1:-1],
        json.dumps(json.dumps(value)[1:-1])[1:-1],  # JSON within JSON
        repr(value)[1:-1],
        quote(raw, safe=""),
        quote(raw),
        quote_plus(raw),
        html.escape(value),
        raw.hex(),
        raw.hex().upper(),
    }
    encoded = {text.encode("utf-8", "surrogatepass") for text in texts}
    return tuple(sorted({raw} | encoded | set(_in_base64(raw))))


def _in_base64(raw: bytes) -> Iterator[bytes]:
    """What base64 makes of it wherever it stands in a longer text.

    Three bytes become four characters, so there are three ways; characters that
    depend on a neighbour are left out.
    """
    for before in range(3):
        skipped = (0, 2, 3)[before]
        whole = (before + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(b"\0" * before + raw)[skipped:whole]


def _leaves(said: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a body that is about a customer, with its field's name."""
    if isinstance(said, str):
        yield name, said
    elif isinstance(said, dict):
        for key, value in said.items():
            # An event's own name and id are no customer's.
            of_event = key == "event" or (key == "id" and name != "customer")
            if not of_event:
                yield from _leaves(value, str(key))
    elif isinstance(said, list):
        for value in said:
            yield from _leaves(value, name)


def _is_distinctive(value: str) -> bool:
    """Whether it tells of one customer; a plain word may be anywhere."""
    is_word, is_number = value.isalpha(), value.isdigit()
    named = "@" in value or value[:1] == "+" or any(c.isdigit() for c in value)
    fits = MIN_SECRET <= len(value) <= MAX_VALUE and len(set(value)) > 3
    return fits and named and not is_word and not is_number


def _file(where: str) -> str:
    return where.partition("::")[0]
