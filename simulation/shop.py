"""The shop: its catalogue, its customers, and the events that they make.

Bodies go through the real edge, so the catalogue decides on lane, time to live,
delivery rule and coalescing, and is refused what a page would be refused.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from relay.addresses import TrustedProxies
from relay.catalog import parse_catalog
from relay.digests import Digests
from relay.edge import Admitted, Edge, Head
from relay.origins import AllowedOrigins
from relay.policy import Policy
from relay.queue import COALESCED, DUPLICATE, QUEUED
from relay.queueable import Request, Waiting
from simulation.clock import Clock
from simulation.referee import Referee

CATALOG = """
[defaults]
unlisted = "reject"

[events.order_paid]              # earns points
priority = "high"
ttl      = "72h"
loyalty  = true

[events.referral_signup]         # earns its friend something
priority = "high"
ttl      = "72h"
referral = true

[events.wishlist_added]
priority = "normal"
ttl      = "48h"

[events.product_viewed]
priority = "normal"
ttl      = "24h"

[events.cart_abandoned]          # a reminder that is late is worse than none
priority = "low"
ttl      = "2h"
coalesce = "10m"
"""
# In parts of a hundred.
MIX = {
    "order_paid": 6,
    "referral_signup": 2,
    "wishlist_added": 32,
    "product_viewed": 30,
    "cart_abandoned": 30,
}
MONTH_S = 31 * 86_400
PAYING_VALUE, VALUE = 10, 1  # of an event with points or a referral, and of the rest

AGAIN = 0.01  # sent again by its page, which had no answer
UNKNOWN = 0.002  # names a customer that Voucherify does not know: a 404
REQUEST_EVENTS, COMMIT_EVENTS = 20, 120

FLOOD = "flood"  # one customer whose page runs wild


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How many events a second arrive for a while, in ms since the start."""

    from_ms: int
    until_ms: int
    per_s: float


class Shop:
    """Makes events, and takes them to the queue as the edge would."""

    def __init__(
        self, *, clock: Clock, rng: random.Random, referee: Referee, customers: int
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._referee = referee
        self._customers = customers
        self._made = 0
        self._last: dict[tuple[str, str], str] = {}  # id by customer and name
        self._catalog = parse_catalog(CATALOG, max_ttl_s=MONTH_S)
        self._edge = Edge(
            origins=AllowedOrigins(["https://shop.example"]),
            proxies=TrustedProxies(),
            limits=(),
            digests=Digests(b"simulation"),
            policy=Policy(ttl_ms=72 * 3_600_000, catalog=self._catalog),
        )
        self.flood = Digests(b"simulation").customer(source_id=FLOOD)
        head = self._edge.head("POST", _HEADERS, "203.0.113.1")
        if not isinstance(head, Head):
            raise TypeError("the edge refuses the simulation's own requests")
        self._head = head

    def commits(self, n: int, *, flood: int = 0) -> Iterator[list[Request]]:
        """Make events, `flood` of them of the one wild customer, in whole commits."""
        bodies = [self._body(FLOOD) for _ in range(flood)]
        bodies += [self._body(self._customer()) for _ in range(n)]
        bodies += [b for b in bodies if self._rng.random() < AGAIN]
        requests = [
            self._request(bodies[i : i + REQUEST_EVENTS])
            for i in range(0, len(bodies), REQUEST_EVENTS)
        ]
        each = COMMIT_EVENTS // REQUEST_EVENTS
        for i in range(0, len(requests), each):
            yield requests[i : i + each]

    def heard(self, request: Request, codes: list[int]) -> None:
        """Tell the referee what became of a request's events at admission."""
        for (_, _, event), code in zip(request[1], codes[::2], strict=True):
            whose = event.customer, event.name
            if code in (QUEUED, COALESCED):
                # The last one that was taken is the one whose place this is.
                older = self._last.get(whose) if code != QUEUED else None
                self._accepted(event, older)
                self._last[whose] = event.id
            elif code == DUPLICATE:
                self._referee.refused["duplicate"] += 1
            else:
                raise AssertionError(f"admission said {code} to an event")

    def _accepted(self, event: Waiting, replaces: str | None) -> None:
        rule = self._catalog.rules[event.name]
        self._referee.accepted(
            event.id,
            at_ms=self._clock.now_ms,
            customer=event.customer,
            lane=event.lane,
            delivery=event.delivery,
            ttl_ms=event.ttl_ms,
            value=PAYING_VALUE if rule.loyalty or rule.referral else VALUE,
            replaces=replaces,
        )

    def _request(self, bodies: list[bytes]) -> Request:
        body = b"[" + b",".join(bodies) + b"]"
        seconds = self._clock.now_ms / 1000
        admitted = self._edge.body(self._head, body, now=seconds)
        if not isinstance(admitted, Admitted) or admitted.refused:
            raise AssertionError("the edge refuses the simulation's own events")
        return admitted.request

    def _customer(self) -> str:
        # A few are here often, most are here once.
        return f"u{int(self._customers * self._rng.random() ** 2)}"

    def _body(self, customer: str) -> bytes:
        self._made += 1
        [name] = self._rng.choices(list(MIX), weights=list(MIX.values()))
        event: dict[str, object] = {
            "event": name,
            "id": f"e{self._made}",
            "customer": {"source_id": customer},
        }
        if self._rng.random() < UNKNOWN:
            event["customer"] = {"id": f"cust_{self._made}"}
        if name == "order_paid":
            event["loyalty"] = {"code": f"card-{customer}"}
        elif name == "referral_signup":
            event["referral"] = {"code": "friend"}
        return msgspec.json.encode(event)


def arrivals(
    rates: Sequence[Rate], step_ms: int, rng: random.Random
) -> Iterator[tuple[int, int]]:
    """When how many arrive: moments in ms since the start, `step_ms` apart."""
    for rate in rates:
        owed = rng.random()  # what is left over of one step goes to the next
        for at_ms in range(rate.from_ms, rate.until_ms, step_ms):
            owed += rate.per_s * min(step_ms, rate.until_ms - at_ms) / 1000
            n, owed = int(owed), owed % 1
            if n:
                yield at_ms, n


_HEADERS = {b"origin": b"https://shop.example", b"content-type": b"application/json"}
