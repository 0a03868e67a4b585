"""Whether an event has arrived: its customer's activity in Voucherify, asked and read.

`GET /v1/customers/{id or source_id}/activity` ("List Customer Activity"), which takes
server credentials. An event carries its own id in a property of its metadata, and what
Voucherify keeps of it has the same. One answer must do, for each question costs a call:
it begins a little before the event was sent, with the oldest first.

Pure: bytes in, an `Answer` out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

import msgspec
from msgspec.structs import replace

from relay.verdicts import Answer, Verdict

PATH = "/v1/customers/{}/activity"
MOST = 100  # activities in an answer: what the API allows
CUSTOM_EVENT = "customer.custom_event"
# Between the clocks of Redis, which knows when the event was sent, and of Voucherify.
SKEW_MS = 300_000
# An activity shows the customer's whole profile: some KB each.
MAX_BYTES = 4 * 1024 * 1024
BODY_SECONDS = 10.0
MAX_DEPTH = 8  # of what is looked through
OWN_ID = "cust_"  # how the ids begin that Voucherify itself gives to customers
# The customer is not there, so no event of his is. Any other 404 says nothing of him.
NO_CUSTOMER = frozenset({"not_found", "resource_not_found"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question, and how an answer to it is read."""

    path: str
    params: dict[str, str]
    proof: str
    value: str


class _Customer(msgspec.Struct):
    id: str | None = None
    source_id: str | None = None


class _Sent(msgspec.Struct):
    customer: _Customer
    metadata: dict[str, object]


class _Activity(msgspec.Struct):
    type: str = ""
    data: object = None


class _Page(msgspec.Struct):
    data: list[_Activity]
    has_more: bool | None = None


def asked(body: bytes, *, proof: str, since_ms: int) -> Asked | None:
    """How to look for an event that was sent; None if it carries no proof."""
    try:
        sent = msgspec.json.decode(body, type=_Sent)
    except msgspec.MsgspecError:
        return None
    value = sent.metadata.get(proof)
    customer = sent.customer.id or sent.customer.source_id
    if not customer or not isinstance(value, str) or not value:
        return None
    if customer in (".", ".."):  # a way up, to every URL parser, however it is written
        return None
    if not sent.customer.id and customer.startswith(OWN_ID):
        return None  # the path takes either, and so it could be another customer's id
    begin = datetime.fromtimestamp(max(0, since_ms - SKEW_MS) / 1000, UTC)
    return Asked(
        path=PATH.format(quote(customer, safe="")),
        params={
            "limit": str(MOST),
            "order": "created_at",
            "type": CUSTOM_EVENT,
            "start_date": begin.isoformat(timespec="milliseconds")[:-6] + "Z",
        },
        proof=proof,
        value=value,
    )


def judged(asked: Asked, answer: Answer, body: bytes, *, whole: bool) -> Answer:
    """What an answer says of the event; `answer` is what its status and headers say."""
    if answer.status == 404 and answer.error_key in NO_CUSTOMER:
        return replace(answer, verdict=Verdict.ABSENT, reason="not_found")
    if answer.verdict is not Verdict.DELIVERED:
        return answer
    if not whole:
        return replace(answer, verdict=Verdict.RETRY, reason="look_up_cut_short")
    try:
        page = msgspec.json.decode(body, type=_Page)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return replace(answer, verdict=Verdict.REJECTED, reason="look_up_garbled")
    for entry in page.data:
        if CUSTOM_EVENT in entry.type and _holds(entry.data, asked):
            return replace(answer, reason="found")
    more = len(page.data) >= MOST if page.has_more is None else page.has_more
    if more:
        return replace(answer, verdict=Verdict.UNCLEAR, reason="look_up_incomplete")
    return replace(answer, verdict=Verdict.ABSENT, reason="not_found")


def _holds(data: object, asked: Asked) -> bool:
    """Whether some `metadata` in it has the proof; how deep it is, is undocumented."""
    return any(
        isinstance(found, dict) and found.get(asked.proof) == asked.value
        for found in _metadata(data, MAX_DEPTH)
    )


def _metadata(data: object, depth: int) -> Iterator[object]:
    if not isinstance(data, dict) or depth <= 0:
        return
    for name, value in data.items():
        if name == "metadata":
            yield value
        elif name != "customer":  # whose profile has metadata, too, of any sender
            yield from _metadata(value, depth - 1)
