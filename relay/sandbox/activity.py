"""What customers did: their custom events, as "List Customer Activity" shows them.

An event is shown some time after it was taken (`activity_delay_seconds`): Voucherify
processes it after it has answered. The newest ones are kept, within a number.
"""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import parse_qs

from relay.sandbox.answers import Answer, error, ok

HEAD, TAIL = "/v1/customers/", "/activity"
CUSTOM_EVENT = "customer.custom_event"

_ORDERS = ("created_at", "-created_at")
_FILTERS = (
    "start_date",
    "end_date",
    "campaign_id",
    "campaign_type",
    "category",
    "type",
)
_KNOWN = ("limit", "order", "starting_after_id", *_FILTERS)

Shape = Literal["nested", "flat"]


def named_in(path: str) -> str | None:
    """Return the customer whose activity a path asks for, if it asks for one."""
    name = path.removeprefix(HEAD).removesuffix(TAIL)
    return name if name and path == f"{HEAD}{name}{TAIL}" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """One custom event of one customer."""

    id: str
    customer_id: str
    event: str
    metadata: Mapping[str, object]
    created_at: float  # Unix seconds

    def shown(self, shape: Shape) -> dict[str, object]:
        """Return it as the API does; in which of the two shapes is not documented."""
        at = _written(self.created_at)
        what: dict[str, object] = {
            "customer": {"object": "customer", "id": self.customer_id, "metadata": {}},
            "event": {
                "object": "event",
                "id": self.id.replace("evcus", "event"),
                "type": self.event,
                "metadata": dict(self.metadata),
                "created_at": at,
            },
        }
        source = {"channel": "API"}
        return {
            "id": self.id,
            "type": CUSTOM_EVENT,
            "data": {"data": what, "event_source": source}
            if shape == "nested"
            else what,
            "created_at": at,
        }


class Activities:
    """The newest activities of all customers."""

    def __init__(self, *, keep: int, rng: random.Random) -> None:
        self._kept: deque[Activity] = deque(maxlen=keep)
        self._rng = rng

    def add(
        self, customer_id: str, event: str, metadata: Mapping[str, object], now: float
    ) -> None:
        """Note an event that was taken."""
        self._kept.append(
            Activity(
                id=f"evcus_{self._rng.getrandbits(72):018x}",
                customer_id=customer_id,
                event=event,
                metadata=metadata,
                created_at=now,
            )
        )

    def page(
        self,
        customer_id: str,
        query: str,
        *,
        until: float,
        shape: Shape,
        request_id: str,
    ) -> Answer:
        """Answer with the activity of one customer until a moment in Unix seconds."""
        try:
            asked = _read(query)
        except ValueError as fault:
            return error("invalid_query_params", 400, request_id, details=str(fault))
        found = [
            activity
            for activity in self._kept
            if activity.customer_id == customer_id
            and activity.created_at <= until
            and asked.begin <= activity.created_at <= asked.end
            and asked.type in (None, CUSTOM_EVENT)
        ]
        if asked.newest_first:
            found.reverse()
        after = [n for n, activity in enumerate(found) if activity.id == asked.after]
        found = found[after[0] + 1 :] if after else found
        body: dict[str, object] = {
            "object": "list",
            "data_ref": "data",
            "data": [activity.shown(shape) for activity in found[: asked.limit]],
            "has_more": len(found) > asked.limit,
        }
        if body["has_more"]:
            body["more_starting_after"] = found[asked.limit - 1].id
        return ok("activity", body)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    limit: int
    newest_first: bool
    begin: float
    end: float
    type: str | None
    after: str | None


def _read(query: str) -> _Asked:
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    for name in given:
        if name not in _KNOWN:
            raise ValueError(f"{name}: no such parameter")
    limit, order = given.get("limit", "10"), given.get("order", "-created_at")
    if not limit.isdigit() or not 1 <= int(limit) <= 100:
        raise ValueError("limit: must be from 1 to 100")
    if order not in _ORDERS:
        raise ValueError(f"order: must be one of {', '.join(_ORDERS)}")
    return _Asked(
        limit=int(limit),
        newest_first=order == "-created_at",
        begin=_moment(given, "start_date", 0.0),
        end=_moment(given, "end_date", float("inf")),
        type=given.get("type"),
        after=given.get("starting_after_id"),
    )


def _moment(given: Mapping[str, str], name: str, absent: float) -> float:
    if name not in given:
        return absent
    try:
        return datetime.fromisoformat(given[name]).timestamp()
    except ValueError:
        raise ValueError(f"{name}: must be a date and time in ISO 8601") from None


def _written(at: float) -> str:
    moment = datetime.fromtimestamp(at, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
