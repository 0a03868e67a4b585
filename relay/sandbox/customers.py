"""The customers of the sandbox's project: created by their first event, then updated.

"Upserting customers" in Voucherify's data synchronization guide: given fields
replace stored ones, the last write wins, `source_id` never changes; metadata merges
key by key.
"""

import random
import string
from collections import OrderedDict

import msgspec

_ALPHABET = string.ascii_letters + string.digits
_FIELDS = (
    "name",
    "description",
    "email",
    "phone",
    "birthday",
    "birthdate",
    "address",
)


class Customer(msgspec.Struct, kw_only=True):
    """One customer as the sandbox stores it."""

    id: str
    source_id: str | None = None
    fields: dict[str, object] = msgspec.field(default_factory=dict)
    metadata: dict[str, object] = msgspec.field(default_factory=dict)
    events: int = 0

    def simple(self) -> dict[str, object]:
        """Return the `SimpleCustomer` of an event's answer."""
        return {
            "id": self.id,
            "source_id": self.source_id,
            "name": self.fields.get("name"),
            "email": self.fields.get("email"),
            "metadata": self.metadata,
            "object": "customer",
        }


class Customers:
    """At most `keep` customers; the one unseen for longest is forgotten first."""

    def __init__(self, *, keep: int, rng: random.Random) -> None:
        self._keep = keep
        self._rng = rng
        self._by_id: OrderedDict[str, Customer] = OrderedDict()
        self._by_source: dict[str, str] = {}
        self.created = 0

    def all(self) -> list[Customer]:
        """Return every customer, the one seen last at the end."""
        return list(self._by_id.values())

    def find(self, given: dict[str, object]) -> Customer | None:
        """Return the customer that a request names; with an id, by that alone."""
        if "id" in given:
            return self._by_id.get(str(given["id"]))
        source_id = given.get("source_id")
        if not source_id:
            return None
        return self._by_id.get(self._by_source.get(str(source_id), ""))

    def upsert(self, given: dict[str, object]) -> Customer:
        """Create or update; the caller has made sure that a given id exists."""
        customer = self.find(given)
        if customer is None:
            source_id = given.get("source_id")
            customer = self.add(source_id=str(source_id) if source_id else None)
        for name in _FIELDS:
            if name in given:
                customer.fields[name] = given[name]
        metadata = given.get("metadata")
        if isinstance(metadata, dict):
            customer.metadata.update(metadata)
        self._by_id.move_to_end(customer.id)
        return customer

    def add(self, *, id: str | None = None, source_id: str | None = None) -> Customer:  # noqa: A002  # the field's name
        """Create a customer, under an id of its own unless one is given."""
        drawn = "".join(self._rng.choices(_ALPHABET, k=24))
        customer = Customer(id=id or f"cust_{drawn}", source_id=source_id)
        self._by_id[customer.id] = customer
        if source_id is not None:
            self._by_source[source_id] = customer.id
        self.created += 1
        if len(self._by_id) > self._keep:
            _, oldest = self._by_id.popitem(last=False)
            if oldest.source_id is not None:
                self._by_source.pop(oldest.source_id, None)
        return customer
