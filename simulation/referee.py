"""The referee: what really happened, told apart from what the queue believes.

It is told of each event that was accepted and of each call, and looks at the end at
what is left in Redis. It shares no arithmetic with the scripts. Its findings are
numbers beside the number that they must not pass.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from relay.limits import Window
from relay.outcomes import DEAD, Outcome
from relay.queue import Claimed, Result
from simulation.voucherify import Heard

CROWD = 100  # calls of a lane in a row, for what one customer may take of it


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check: what was found, and what it may be at most."""

    check: str
    found: float
    most: float
    said: str  # what the number counts

    @property
    def kept(self) -> bool:
        return self.found <= self.most


@dataclass(slots=True, kw_only=True)
class Tracked:
    """An accepted event and its fate as Voucherify would tell it."""

    id: str
    number: int  # in the order of acceptance
    at_ms: int
    customer: str
    lane: str
    delivery: str
    ttl_ms: int
    value: int
    claimed: bool = False
    marked: bool = False  # about to be sent, as far as Redis knows
    tries: list[int] = field(default_factory=list)  # when calls left for Voucherify
    processed: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What Redis holds at the end: ids that wait, dead letters, and its totals."""

    waiting: Sequence[str]
    dead: Sequence[tuple[str, str]]  # id and outcome
    totals: Mapping[str, int]


class Referee:
    """Watches one scenario."""

    def __init__(self) -> None:
        self.events: dict[str, Tracked] = {}
        self.refused: Counter[str] = Counter()  # at admission, by outcome
        self.calls: dict[str, list[int]] = defaultdict(list)  # arrivals by egress
        self.turned_away = 0  # calls that met a limit of Voucherify
        self.crossed = 0  # calls of a customer beside another one of the same
        self.overtaken = 0  # first claims before an older one of customer and lane
        self.strangers = 0  # events that nobody sent
        self.late_swaps = 0  # events whose place was taken when they were claimed
        self._accepted = 0
        self._under_way: dict[str, set[str]] = defaultdict(set)
        self._newest: dict[tuple[str, str], int] = {}
        self._refused: set[str] = set()  # by an answer of Voucherify
        self._rejected: set[str] = set()  # likewise, and for good
        self._probes: set[str] = set()  # sent to try whether a hold is over

    # --- what happens ---------------------------------------------------------------

    def accepted(
        self,
        event_id: str,
        *,
        at_ms: int,
        customer: str,
        lane: str,
        delivery: str,
        ttl_ms: int,
        value: int,
        replaces: str | None = None,
    ) -> None:
        number = self._accepted = self._accepted + 1
        if replaces is not None:
            # It has the other's place, and the other has its outcome.
            older = self.events.pop(replaces)
            number = older.number
            self.refused["coalesced"] += 1
            self.late_swaps += older.claimed
        self.events[event_id] = Tracked(
            id=event_id,
            number=number,
            at_ms=at_ms,
            customer=customer,
            lane=lane,
            delivery=delivery,
            ttl_ms=ttl_ms,
            value=value,
        )

    def claimed(self, claimed: Claimed, *, probe: bool = False) -> None:
        event = self._known(claimed)
        if probe:
            self._probes.add(claimed.id)
        if event is None or event.claimed:
            return
        event.claimed = True
        key = (event.customer, event.lane)
        self.overtaken += event.number < self._newest.get(key, -1)
        self._newest[key] = max(event.number, self._newest.get(key, -1))

    def marked(self, claimed: Claimed) -> None:
        event = self._known(claimed)
        if event is not None:
            event.marked = True

    def departed(self, claimed: Claimed, now_ms: int) -> None:
        event = self._known(claimed)
        if event is None:
            return
        event.tries.append(now_ms)
        others = self._under_way[event.customer]
        self.crossed += bool(others)
        others.add(event.id)

    def arrived(self, claimed: Claimed, heard: Heard, egress: str, now_ms: int) -> None:
        event = self._known(claimed)
        if event is None:
            return
        if heard.arrived:
            self.calls[egress].append(now_ms)
        self.turned_away += heard.answer.status == 429
        if heard.processed:
            event.processed.append(now_ms)

    def ended(self, claimed: Claimed) -> None:
        event = self._known(claimed)
        if event is not None:
            self._under_way[event.customer].discard(event.id)

    def judged(self, claimed: Claimed, result: Result) -> None:
        # A firewall's 403 may end as `rejected`, too: when only this event meets it.
        if result.verdict == "rejected" or result.signal in (
            "auth_hold",
            "config_hold",
        ):
            self._refused.add(claimed.id)
        if result.verdict == "rejected":
            self._rejected.add(claimed.id)

    def _known(self, claimed: Claimed) -> Tracked | None:
        event = self.events.get(claimed.id)
        self.strangers += event is None
        return event

    # --- what is found --------------------------------------------------------------

    def windows(self, budgets: Mapping[str, Sequence[Window]]) -> list[Finding]:
        """The most calls that any window of each length has held, by egress."""
        return [
            Finding(
                check="windows",
                found=most_within(self.calls[egress], window.period_ms),
                most=window.quota,
                said=f"calls in {span(window.period_ms)}",
            )
            for egress, windows in sorted(budgets.items())
            for window in windows
        ]

    def promises(self, left: Left) -> list[Finding]:
        """What holds for every scenario."""
        twice, lost, untrue = self._outcomes(left)
        return [
            _none("once", self._paid_twice(), "processed twice that must not be"),
            _none("accounted", self._unaccounted(left), "unaccounted"),
            _none("one_outcome", twice, "events with two outcomes"),
            _none("lost", lost, "counted as delivered, and never processed"),
            _none("true_outcome", untrue, "outcomes that Voucherify belies"),
            _none("strangers", self.strangers, "events that nobody sent"),
            _none("late_swaps", self.late_swaps, "coalesced after they were claimed"),
            _none("one_at_a_time", self.crossed, "of a customer at the same time"),
            _none("in_order", self.overtaken, "claimed before an older one"),
        ]

    def gone_ms(self, ids: Sequence[str]) -> int:
        """When 99 in 100 of these events were sent for the last time, or had expired.

        The rest are those that failed, and are tried again much later.
        """
        moments = sorted(
            min(e.tries[-1], e.at_ms + e.ttl_ms) if e.tries else e.at_ms + e.ttl_ms
            for e in (self.events[name] for name in ids if name in self.events)
        )
        return moments[len(moments) * 99 // 100] if moments else 0

    def fairness(self, customer: str) -> Finding:
        """The share that one customer has of a lane while others wait in it."""
        return Finding(
            check="fair",
            found=max(
                (
                    self._share(lane, customer)
                    for lane in {event.lane for event in self.events.values()}
                ),
                default=0.0,
            ),
            most=0.5,
            said="share of a lane that one customer's flood has",
        )

    def probes(self, left: Left) -> Finding:
        """What pays should not be what finds out whether Voucherify is up again."""
        spent = self._probes & {n for n, end in left.dead if end == Outcome.AMBIGUOUS}
        return _none("probes", len(spent), "at_most_once events spent as probes")

    def duplicates(self, delivery: str) -> int:
        """How often an event was processed again."""
        return sum(
            len(event.processed) - 1
            for event in self.events.values()
            if event.delivery == delivery and event.processed
        )

    def in_time(self, lane: str = "") -> float | None:
        """The share of value that was processed within its time to live.

        What Voucherify refuses for good, for its own sake, has no value.
        """
        events = [
            e
            for e in self.events.values()
            if lane in ("", e.lane) and e.id not in self._rejected
        ]
        whole = sum(e.value for e in events)
        good = sum(
            e.value
            for e in events
            if e.processed and e.processed[0] <= e.at_ms + e.ttl_ms
        )
        return good / whole if whole else None

    def _paid_twice(self) -> int:
        return sum(
            self.duplicates(rule)
            for rule in {event.delivery for event in self.events.values()}
            if rule != "at_least_once"
        )

    def _unaccounted(self, left: Left) -> int:
        """By our own sum: what was received less outcomes and what waits."""
        received = len(self.events) + sum(self.refused.values())
        outcomes = sum(left.totals.get(str(outcome), 0) for outcome in Outcome)
        off = abs(left.totals.get("received", 0) - received)
        return off + abs(received - outcomes - len(left.waiting))

    def _outcomes(self, left: Left) -> tuple[int, int, int]:
        """Events with more than one outcome, lost ones, and untrue outcomes."""
        ends = Counter(left.waiting) + Counter(name for name, _ in left.dead)
        twice = sum(n - 1 for n in ends.values() if n > 1)
        delivered = [e for name, e in self.events.items() if name not in ends]
        # Nobody keeps the ids of what was delivered: what is nowhere else must be it.
        twice += max(0, left.totals.get("delivered", 0) - len(delivered))
        lost = max(0, len(delivered) - left.totals.get("delivered", 0))
        lost += sum(not event.processed for event in delivered)
        untrue = sum(not self._fits(name, end) for name, end in left.dead)
        counted = Counter(end for _, end in left.dead)
        untrue += sum(
            abs(left.totals.get(str(outcome), 0) - counted[str(outcome)])
            for outcome in DEAD
        )
        return twice, lost, untrue

    def _fits(self, name: str, outcome: str) -> bool:
        event = self.events.get(name)
        if event is None:
            return False
        paying = event.delivery != "at_least_once"
        match outcome:
            case Outcome.AMBIGUOUS:  # it may have left
                return paying and event.marked
            case Outcome.REJECTED:
                return name in self._refused
            case Outcome.EXPIRED:  # what pays and arrived is never called too old
                return not (paying and event.processed)
        return False

    def _share(self, lane: str, customer: str) -> float:
        """The most that a customer had of `CROWD` calls while others waited."""
        moments: list[tuple[int, int, int, str]] = []
        for event in self.events.values():
            if event.lane == lane:
                # What was never called went away when it was too old.
                gone_ms = event.tries[0] if event.tries else event.at_ms + event.ttl_ms
                kind = 1 if event.tries else 2
                moments.append((event.at_ms, 0, event.number, event.customer))
                moments.append((gone_ms, kind, event.number, event.customer))
        waiting, worst = 0, 0.0
        run: list[bool] = []
        for _, kind, _, who in sorted(moments):
            theirs = who == customer
            if kind == 0:
                waiting += not theirs
                continue
            waiting -= not theirs
            if kind == 2:
                continue
            run = [*run[-CROWD + 1 :], theirs] if waiting >= CROWD else []
            if len(run) == CROWD:
                worst = max(worst, sum(run) / CROWD)
        return worst


def most_within(times: Sequence[int], window_ms: int) -> int:
    """The most moments of a rising list that lie less than a window apart."""
    most = first = 0
    for last, at in enumerate(times):
        while at - times[first] >= window_ms:
            first += 1
        most = max(most, last - first + 1)
    return most


def span(ms: int) -> str:
    """5000 is 5 s, 60000 is 1 min."""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000)):
        if ms >= size and ms % size == 0:
            return f"{ms // size} {unit}"
    return f"{ms / 1000:g} s"


def _none(check: str, found: int, said: str) -> Finding:
    return Finding(check=check, found=found, most=0, said=said)


def kept_all(findings: Iterable[Finding]) -> bool:
    return all(finding.kept for finding in findings)
