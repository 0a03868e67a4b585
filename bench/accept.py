"""What a server takes in, in a closed loop: the relay, the floor, the peers.

Each run has fresh processes and an empty Redis. It counts only if what wrk saw, what
Redis counted and what waits in the queue agree; else it raises.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.load import BATCH, Load, closed_loop
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
TRIES = 4
Peer = Callable[[Store, Upstream], AbstractContextManager[Served]]
Say = Callable[[str], None]

RATIOS = {
    "ratio": "events_per_s",
    "p99_ratio": "p99_ms",
    "cpu_ratio": "server_us_per_event",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What one run measures."""

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
    """Run all variants in each round, every round beginning with another one.

    The first variant is the floor of the others, each with its own connections.
    """
    rows: Rows = {}
    for n in range(rounds):
        shift = n % len(variants)
        samples = {
            variant.name: undisturbed(
                variant, seconds=seconds, peers=peers or {}, say=say
            )
            for variant in variants[shift:] + variants[:shift]
        }
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


def undisturbed(
    variant: Variant, *, seconds: int, peers: Mapping[str, Peer], say: Say
) -> Sample:
    """A run during which the machine did little else; repeated loudly until then."""
    for _ in range(TRIES):
        sample = run(variant, seconds=seconds, peers=peers)
        if sample["foreign"] <= FOREIGN_MOST:
            return sample
        say(
            f"thrown out  {variant.name}: others had {sample['foreign']:.0%} of a core "
            f"meanwhile ({sample['events_per_s']:,.0f}/s)"
        )
    msg = f"{variant.name}: the machine is too busy with other things"
    raise BenchError(msg)


def run(variant: Variant, *, seconds: int, peers: Mapping[str, Peer]) -> Sample:
    """One run of one variant, with everything that it needs started for it."""
    with ExitStack() as stack:
        tokens: Path | None = None
        store: Store | None = None
        above: Upstream | None = None
        core = SERVER_CORE if variant.pinned else None
        other = OTHER_CORE if variant.pinned else None
        if variant.server == "floor":
            served = stack.enter_context(floor(workers=variant.workers, core=core))
        else:
            store = stack.enter_context(redis_server(fsync=variant.fsync, core=other))
            above = stack.enter_context(upstream(core=other))
            if variant.server == "relay":
                changes = changes_of(variant)
                if changes:
                    tokens = token_file()
                options = []
                if variant.workers > 1:
                    options = ["--workers", str(variant.workers)]
                served = stack.enter_context(
                    relay(store, above.url, *options, core=core, changes=changes)
                )
            else:
                served = stack.enter_context(peers[variant.server](store, above))

        def load(seconds: int) -> Load:
            return closed_loop(
                served.url,
                kind=variant.kind,
                connections=variant.connections,
                seconds=seconds,
                tokens=tokens,
            )

        load(WARM_UP_S)
        time.sleep(SETTLE_S)
        before = _seen(variant, store, above)
        cost, busy = _costs(served, store, above), busy_s()
        result = load(seconds)
        busy = busy_s() - busy
        cost = {
            name: n - cost[name] for name, n in _costs(served, store, above).items()
        }
        time.sleep(SETTLE_S)
        served.program.check()
        verify(variant, result, before, _seen(variant, store, above))
    events = result.requests * variant.events
    return {
        "events_per_s": events / result.seconds,
        "p50_ms": result.p50_ms,
        "p99_ms": result.p99_ms,
        "load_us_per_event": result.cpu_s / events * 1e6,
        "server_busy": cost["server"] / result.seconds,
        "foreign": (busy - sum(cost.values()) - result.cpu_s) / result.seconds,
        # Full, it is the measurement that is slow: the server could do more.
        "other_busy": (sum(cost.values()) - cost["server"] + result.cpu_s)
        / result.seconds,
    } | {f"{name}_us_per_event": s / events * 1e6 for name, s in cost.items()}


def changes_of(variant: Variant) -> dict[str, str]:
    """What a variant sets beside stack.py: a check more, never one less."""
    return {"RELAY_SIGNING_KEYS": SIGNING_KEY} if variant.kind == "token" else {}


def _costs(
    served: Served, store: Store | None, above: Upstream | None
) -> dict[str, float]:
    told = {"server": served.program.cpu_s()}
    if store is not None:
        told["redis"] = store.program.cpu_s()
    if above is not None:
        told["upstream"] = above.program.cpu_s()
    return told


def _seen(
    variant: Variant, store: Store | None, above: Upstream | None
) -> Counts | float:
    """What the other side has counted: Redis for the relay, else the upstream."""
    if variant.server == "relay" and store is not None:
        return store.counts()
    return above.told()["taken"] if above is not None else 0.0


def verify(
    variant: Variant, load: Load, before: Counts | float, after: Counts | float
) -> None:
    """Throw a run out whose figures do not agree.

    wrk leaves what is in flight at its end uncounted: a request a connection at most.
    """
    slack = variant.connections * variant.events
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
