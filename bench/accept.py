"""What a server takes in, in a closed loop: the relay, the floor, the peers.

Each round has fresh processes and an empty Redis. It counts only if what wrk saw, what
Redis counted and what waits in the queue agree; else it raises.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.load import BATCH, Load, closed_loop, together
from bench.machine import OTHER_CORE, SERVER_CORE, busy_s
from bench.processes import BenchError
from bench.results import Rows, Sample, add, against
from bench.stack import (
    SIGNING_KEY,
    Counts,
    Served,
    Store,
    Upstream,
    floor,
    redis_server,
    relay,
    token_file,
    upstream,
)

WARM_UP_S = 1
SETTLE_S = 0.8  # refusals of the edge are counted at most half a second late
FOREIGN_MOST = 0.15  # of a core, for whatever else the machine does during a run
TRIES, PAUSE_S = 12, 1.0  # each pause longer by this: a busy spell is a minute's
Peer = Callable[[Store, Upstream], AbstractContextManager[Served]]
Say = Callable[[str], None]

RATIOS = {
    "ratio": "events_per_s",
    "p99_ratio": "p99_ms",
    "cpu_ratio": "server_us_per_event",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is measured beside others."""

    name: str
    server: str = "relay"  # floor, relay, or a peer by its name
    kind: str = "json"  # of beacon.lua
    connections: int = 64
    fsync: str = "everysec"
    outcome: str = ""  # every event is refused with it
    workers: int = 1
    pinned: bool = True

    @property
    def events(self) -> int:
        """In one request."""
        return BATCH if self.kind == "batch" else 1


FLOOR = Variant(name="floor", server="floor")
JSON = Variant(name="json")


def compare(
    variants: list[Variant],
    *,
    rounds: int,
    seconds: int,
    say: Say,
    peers: Mapping[str, Peer] | None = None,
) -> Rows:
    """Run all variants side by side in each round, each round in another order.

    The first variant is the floor of the others, each with its own connections.
    """
    rows: Rows = {}
    for n in range(rounds):
        shift = n % len(variants)
        samples = side_by_side(
            variants[shift:] + variants[:shift],
            seconds=seconds,
            peers=peers or {},
            say=say,
        )
        for variant in variants:
            base = samples[_floor_of(variant, variants).name]
            sample = against(samples[variant.name], base, RATIOS)
            if single := samples.get(JSON.name):
                sample = against(sample, single, {"of_json": "events_per_s"})
            add(rows, variant.name, sample)
            say(
                f"round {n + 1}  {variant.name:24}  {sample['events_per_s']:9,.0f}/s  "
                f"x {sample['ratio']:.3f}  p99 {sample['p99_ms']:6.2f} ms  "
                f"server {sample['server_us_per_event']:6.1f} us/event, "
                f"{sample['server_busy']:.0%} busy, other core "
                f"{sample['other_busy']:.0%}, others {sample['foreign']:.0%}"
            )
    return rows


def _floor_of(variant: Variant, variants: list[Variant]) -> Variant:
    alike = (
        v
        for v in variants
        if v.server == "floor"
        and (v.connections, v.workers) == (variant.connections, variant.workers)
    )
    return next(alike, variants[0])


def side_by_side(
    variants: list[Variant],
    *,
    seconds: int,
    peers: Mapping[str, Peer],
    say: Say,
) -> dict[str, Sample]:
    """Load them in turn for a second each, until each has had `seconds`.

    All are there from the first to the last, and only one has anything to do: what a
    core that is shared with strangers does in a second changes twofold within some, and
    so each variant meets all of it.
    """
    with ExitStack() as stack:
        subjects = [Subject(variant, stack, peers) for variant in variants]
        for subject in subjects:
            subject.load(WARM_UP_S)
        time.sleep(SETTLE_S)
        for subject in subjects:
            subject.begin()
        for n in range(seconds):
            shift = n % len(subjects)
            for subject in subjects[shift:] + subjects[:shift]:
                _undisturbed(subject, subjects, say)
        time.sleep(SETTLE_S)
        return {subject.variant.name: subject.sample() for subject in subjects}


class Subject:
    """A variant, running, with everything that it needs; and what it has done."""

    def __init__(
        self, variant: Variant, stack: ExitStack, peers: Mapping[str, Peer]
    ) -> None:
        self.variant = variant
        self._tokens: Path | None = None
        self._store: Store | None = None
        self._above: Upstream | None = None
        self._loads: list[Load] = []  # all of them
        self._counted: list[tuple[Load, dict[str, float], float]] = []
        core = SERVER_CORE if variant.pinned else None
        other = OTHER_CORE if variant.pinned else None
        if variant.server == "floor":
            self.served = stack.enter_context(floor(workers=variant.workers, core=core))
            return
        self._store = stack.enter_context(redis_server(fsync=variant.fsync, core=other))
        self._above = stack.enter_context(upstream(core=other))
        if variant.server != "relay":
            starter = peers[variant.server](self._store, self._above)
            self.served = stack.enter_context(starter)
            return
        changes = changes_of(variant)
        if changes:
            self._tokens = token_file()
        options = ["--workers", str(variant.workers)] if variant.workers > 1 else []
        self.served = stack.enter_context(
            relay(self._store, self._above.url, *options, core=core, changes=changes)
        )

    def load(self, seconds: int) -> Load:
        """Send to it for so long."""
        return closed_loop(
            self.served.url,
            kind=self.variant.kind,
            connections=self.variant.connections,
            seconds=seconds,
            tokens=self._tokens,
        )

    def costs(self) -> dict[str, float]:
        """Processor time so far, of its server and what stands behind it."""
        told = {"server": self.served.program.cpu_s()}
        if self._store is not None:
            told["redis"] = self._store.program.cpu_s()
        if self._above is not None:
            told["upstream"] = self._above.program.cpu_s()
        return told

    def begin(self) -> None:
        """From here on, all that is sent must be found again."""
        self._before = self._seen()

    def note(
        self, load: Load, cost: dict[str, float], foreign: float, *, counts: bool
    ) -> None:
        """Keep what a second gave. If it does not count, it was sent all the same."""
        self._loads.append(load)
        if counts:
            self._counted.append((load, cost, foreign))

    def sample(self) -> Sample:
        """Its figures. Raises `BenchError` where not all that was sent was taken."""
        self.served.program.check()
        verify(self.variant, together(self._loads), self._before, self._seen())
        load = together([load for load, _, _ in self._counted])
        cost = {
            name: sum(cost[name] for _, cost, _ in self._counted)
            for name in self._counted[0][1]
        }
        events = load.requests * self.variant.events
        return {
            "events_per_s": events / load.seconds,
            "p50_ms": load.p50_ms,
            "p99_ms": load.p99_ms,
            "load_us_per_event": load.cpu_s / events * 1e6,
            "server_busy": cost["server"] / load.seconds,
            "foreign": max(foreign for _, _, foreign in self._counted),
            # Full, it is the measurement that is slow: the server could do more.
            "other_busy": (sum(cost.values()) - cost["server"] + load.cpu_s)
            / load.seconds,
        } | {f"{name}_us_per_event": s / events * 1e6 for name, s in cost.items()}

    def _seen(self) -> Counts | float:
        """What the other side has counted: Redis for the relay, else the upstream."""
        if self.variant.server == "relay" and self._store is not None:
            return self._store.counts()
        return self._above.told()["taken"] if self._above is not None else 0.0


def _undisturbed(subject: Subject, all_: list[Subject], say: Say) -> None:
    """A second in which the machine did little else; repeated loudly until then."""
    for n in range(TRIES):
        time.sleep(n * PAUSE_S)
        before, busy = {id(each): each.costs() for each in all_}, busy_s()
        load = subject.load(1)
        busy = busy_s() - busy
        spent = {
            id(each): {name: s - before[id(each)][name] for name, s in now.items()}
            for each in all_
            for now in [each.costs()]
        }
        ours = sum(sum(cost.values()) for cost in spent.values()) + load.cpu_s
        foreign = (busy - ours) / load.seconds
        counts = foreign <= FOREIGN_MOST
        subject.note(load, spent[id(subject)], foreign, counts=counts)
        if counts:
            return
        say(
            f"thrown out  {subject.variant.name}: others had {foreign:.0%} of a core "
            f"meanwhile ({load.rate:,.0f} requests/s)"
        )
    msg = f"{subject.variant.name}: the machine is too busy with other things"
    raise BenchError(msg)


def changes_of(variant: Variant) -> dict[str, str]:
    """What a variant sets beside stack.py: a check more, never one less."""
    return {"RELAY_SIGNING_KEYS": SIGNING_KEY} if variant.kind == "token" else {}


def verify(
    variant: Variant, load: Load, before: Counts | float, after: Counts | float
) -> None:
    """Throw a run out whose figures do not agree.

    wrk leaves what is in flight at its end uncounted: a request a connection at most,
    and each time that it was run.
    """
    slack = variant.connections * variant.events * load.runs
    sent = load.requests * variant.events
    if isinstance(after, Counts):
        assert isinstance(before, Counts)
        counted = after.since(before)
        refused = sum(n for name, n in counted.outcomes.items() if name != "delivered")
        taken = counted.received - refused
        if variant.outcome:
            fits = (
                set(counted.outcomes) <= {variant.outcome, "delivered"}
                and load.refused >= 0.99 * load.requests
                and 0 <= refused - load.refused <= slack
            )
        else:
            fits = not load.refused and not refused and 0 <= taken - sent <= slack
        if not fits:
            msg = f"{variant.name}: wrk saw {load}, Redis counted {counted}"
            raise BenchError(msg)
    elif load.refused:
        msg = f"{variant.name}: {load.refused} of {load.requests} were refused"
        raise BenchError(msg)
    elif variant.server != "floor":
        assert not isinstance(before, Counts)
        if not 0 <= after - before - sent <= slack:
            msg = f"{variant.name}: {sent} answered, upstream got {after - before}"
            raise BenchError(msg)


def at(connections: int, variant: Variant) -> Variant:
    """The same with another number of connections."""
    name = f"{variant.name} at {connections}"
    return replace(variant, name=name, connections=connections)
