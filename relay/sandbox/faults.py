"""Faults on demand: what the next requests meet instead of an answer of their own.

A fault acts at one of three moments, and the third is the one that costs money:
before the body is read, before the event is recorded, or after it was recorded but
before the answer. A request that would have been refused anyway keeps its refusal
and uses no fault up, except for those that act before the body.
"""

import re
from dataclasses import replace
from typing import Literal

import msgspec

from relay.sandbox.answers import Answer, html_error, usual_error

Moment = Literal["before_body", "before_record", "after_record"]
Malformed = Literal[
    "html_502",
    "text_200",
    "empty_200",
    "truncated_json",
    "wrong_shape",
]
Route = Literal["events", "oauth", "activity"]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, 5.5

_MALFORMED = {
    "text_200": ("text/plain; charset=utf-8", b"OK"),
    "empty_200": ("application/json; charset=utf-8", b""),
    "truncated_json": ("application/json; charset=utf-8", b'{"object":"event","ty'),
    "wrong_shape": ("application/json; charset=utf-8", b'[{"unexpected":["shape"]}]'),
}


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault. With nothing but `delay` or `headers` the usual answer is kept."""

    count: int | None = 1  # requests it meets; None: every one until cleared
    event: str | None = None  # only events of this name
    source_id: str | None = None  # only events of this customer
    on: Route = "events"
    at: Moment | None = None  # None: after_record for a 2xx, else before_record
    status: int | None = None
    body: object = None  # JSON; None: what that status usually says
    text: str | None = None  # instead of `body`: sent as it is
    content_type: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    malformed: Malformed | None = None
    disconnect: Literal["reset", "close", "cut_short"] | None = None
    delay: float = 0.0  # seconds before the answer, or before the disconnect

    def __post_init__(self) -> None:
        if faults := list(_problems(self)):
            raise ValueError("; ".join(faults))

    @property
    def moment(self) -> Moment:
        """Say when it acts."""
        if self.at is not None:
            return self.at
        if self.disconnect == "cut_short":
            return "after_record"
        # A 2xx tells the sender that the event was taken, so by default it was.
        accepted = self.malformed not in (None, "html_502") or (
            self.status is not None and 200 <= self.status < 300
        )
        unchanged = not (self.status or self.malformed or self.disconnect)
        return "after_record" if accepted or unchanged else "before_record"

    def matches(self, event: str | None, source_id: str | None) -> bool:
        """Tell whether it is meant for this request."""
        return self.event in (None, event) and self.source_id in (None, source_id)

    def answer(self, usual: Answer | None, request_id: str) -> Answer | None:
        """Return what is sent; None where `usual` is None and nothing replaces it."""
        answer = self._answer(usual, request_id)
        if answer is None:
            return None
        if self.content_type is not None:
            answer = replace(answer, content_type=self.content_type)
        return answer.with_headers(tuple(self.headers.items()))

    def _answer(self, usual: Answer | None, request_id: str) -> Answer | None:
        if self.malformed == "html_502":
            return html_error(502)
        if self.malformed is not None:
            content_type, body = _MALFORMED[self.malformed]
            return Answer(
                verdict="fault", status=200, body=body, content_type=content_type
            )
        if self.status is None and self.text is None and self.body is None:
            return usual
        status = self.status or 200
        if self.text is not None:
            kind = "text/plain; charset=utf-8"
            text = self.text.encode()
            return Answer(verdict="fault", status=status, body=text, content_type=kind)
        if self.body is not None:
            json = msgspec.json.encode(self.body)
            return Answer(verdict="fault", status=status, body=json)
        if 200 <= status < 300:
            return replace(usual, status=status) if usual else None
        return usual_error(status, request_id)


class FaultPlan:
    """The faults that wait, oldest first; each request meets at most one."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Fault, int | None]] = []

    def add(self, fault: Fault) -> None:
        """Let `fault` meet the requests from now on."""
        self._waiting.append((fault, fault.count))

    def clear(self) -> None:
        """Forget every fault."""
        self._waiting.clear()

    def waiting(self) -> list[Fault]:
        """Return the faults with what is left of their counts."""
        return [msgspec.structs.replace(f, count=left) for f, left in self._waiting]

    def take(
        self,
        route: Route,
        *,
        before_body: bool,
        event: str | None = None,
        source_id: str | None = None,
    ) -> Fault | None:
        """Use up and return the fault this request meets, if any."""
        for place, (fault, left) in enumerate(self._waiting):
            if fault.on != route or (fault.moment == "before_body") != before_body:
                continue
            if not before_body and not fault.matches(event, source_id):
                continue
            if left == 1:
                del self._waiting[place]
            elif left is not None:
                self._waiting[place] = (fault, left - 1)
            return fault
        return None


def _problems(fault: Fault) -> list[str]:
    faults = []
    if fault.count is not None and fault.count < 1:
        faults.append("count: use 1 or more, or null for every request until cleared")
    if fault.status is not None and not 200 <= fault.status <= 599:
        faults.append("status: use 200 to 599")
    if fault.delay < 0:
        faults.append("delay: use 0 or more seconds")
    contents = (fault.status, fault.body, fault.text)
    plain = any(part is not None for part in contents)
    if plain + (fault.malformed is not None) + (fault.disconnect is not None) > 1:
        faults.append("use one of: status with body or text, malformed, disconnect")
    if fault.body is not None and fault.text is not None:
        faults.append("body, text: use one of them")
    if fault.at == "before_body" and (fault.event or fault.source_id):
        faults.append(
            "event, source_id: they are in the body, so use at = before_record"
        )
    if fault.on != "events" and (fault.event or fault.source_id):
        faults.append("event, source_id: only requests to an event route have them")
    if fault.at in ("before_body", "before_record") and not _ends_request(fault):
        faults.append("at: without an answer of its own the fault is after_record")
    if fault.disconnect == "cut_short" and fault.at not in (None, "after_record"):
        faults.append("at: an answer cut short comes after_record")
    for name, value in fault.headers.items():
        if not _TOKEN.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            faults.append(f"headers: {name!r} cannot be sent in HTTP")
        if name.lower() in ("content-length", "transfer-encoding"):
            faults.append(f"headers: {name} is the server's; use disconnect=cut_short")
    return faults


def _ends_request(fault: Fault) -> bool:
    """Tell whether the fault can stand alone, without the usual answer."""
    if fault.malformed or fault.disconnect or fault.text is not None:
        return True
    if fault.body is not None:
        return True
    return fault.status is not None and not 200 <= fault.status < 300
