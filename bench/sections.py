"""The parts of the benchmark, in the order in which they run."""

from typing import Protocol

from bench.accept import FLOOR, JSON, Say, Variant, at, compare
from bench.delivery import burst as _burst
from bench.delivery import delivery as _delivery
from bench.delivery import latency as _latency
from bench.depth import ceiling as _ceiling
from bench.depth import depth as _depth
from bench.peers import PEERS
from bench.results import Rows
from bench.startup import startup as _startup


class Section(Protocol):
    """One part: runs for a while, and gives its figures."""

    def __call__(self, *, rounds: int, seconds: int, quick: bool, say: Say) -> Rows: ...


def accept(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """Single beacons at 64 connections, everything on: what the goals speak of."""
    del quick
    return compare([FLOOR, JSON], rounds=rounds, seconds=seconds, say=say)


def connections(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """The same at 16 and at 256 connections."""
    del quick
    variants = [FLOOR, *(at(n, v) for n in (16, 256) for v in (FLOOR, JSON))]
    return compare(variants[1:], rounds=rounds, seconds=seconds, say=say)


def kinds(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """What a page may send: text/plain, tokens, batches of 20."""
    del quick
    sent = [
        Variant(name=kind, kind=kind) for kind in ("json", "text", "token", "batch")
    ]
    return compare([FLOOR, *sent], rounds=rounds, seconds=seconds, say=say)


def refusals(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """What is refused must cost less than what is taken."""
    del quick
    refused = [
        Variant(name="bad origin", kind="bad_origin", outcome="forbidden"),
        Variant(name="limited", kind="limited", outcome="rate_limited"),
    ]
    return compare([FLOOR, JSON, *refused], rounds=rounds, seconds=seconds, say=say)


def durability(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """Redis' append-only file written each second, and before each answer."""
    del quick
    kept = [Variant(name=how, fsync=how) for how in ("everysec", "always")]
    return compare([FLOOR, *kept], rounds=rounds, seconds=seconds, say=say)


def workers(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """One and two processes, pinned to nothing: load and Redis share both cores."""
    del quick
    variants = [
        Variant(name=f"{server}, {n} processes", server=server, workers=n, pinned=False)
        for n in (1, 2)
        for server in ("floor", "relay")
    ]
    return compare(variants, rounds=rounds, seconds=seconds, say=say)


def peers(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """Stacks that call the upstream while the page waits; it answers at once."""
    del quick
    others = [Variant(name=name, server=name) for name in PEERS]
    return compare(
        [FLOOR, JSON, *others], rounds=rounds, seconds=seconds, say=say, peers=PEERS
    )


def burst(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """10,000 events at once, and an upstream that takes 4 in 5 s. Once: it counts."""
    del rounds, seconds
    return _burst(quick=quick, say=say)


def latency(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """Open loop at fixed rates."""
    return _latency(rounds=rounds, seconds=seconds, quick=quick, say=say)


def delivery(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """The forwarder with no budget beside a bare client."""
    del seconds
    return _delivery(rounds=rounds, quick=quick, say=say)


def ceiling(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """What Redis itself could take through the commit script."""
    del seconds
    return _ceiling(rounds=rounds, quick=quick, say=say)


def depth(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """Growth with the queue, and memory while a million events wait."""
    return _depth(rounds=rounds, seconds=seconds, quick=quick, say=say)


def startup(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """Start to first event, import time, memory."""
    del seconds
    return _startup(rounds=rounds, quick=quick, say=say)


SECTIONS: dict[str, Section] = {
    "accept": accept,
    "connections": connections,
    "kinds": kinds,
    "refusals": refusals,
    "durability": durability,
    "workers": workers,
    "latency": latency,
    "peers": peers,
    "burst": burst,
    "delivery": delivery,
    "ceiling": ceiling,
    "depth": depth,
    "startup": startup,
}
