"""What grows with the queue: rate, memory of the relay, memory of Redis."""

import time

from bench.accept import RATIOS, SETTLE_S, WARM_UP_S, Say
from bench.load import closed_loop
from bench.machine import SERVER_CORE
from bench.processes import BenchError, result_of
from bench.results import Rows, Sample, add, against
from bench.stack import (
    Served,
    Store,
    Upstream,
    floor,
    redis_server,
    relay,
    upstream,
)

# Not to the million at which the relay takes no more: a round needs room itself, of
# 120,000 on a fast machine.
DEPTHS = (1_000, 10_000, 100_000, 600_000)
FULL = 1_000_000  # the default of RELAY_QUEUE_MAX
BATCH = 128  # events in a commit, as admission has it at most


def depth(*, rounds: int, seconds: int, quick: bool, say: Say) -> Rows:
    """Accept at each depth of the queue, and memory, up to a million that wait."""
    rows: Rows = {}
    with upstream() as above, floor() as bare:
        for wanted in DEPTHS[:2] if quick else DEPTHS:
            for n in range(rounds):
                sample = _at(wanted, above, bare, seconds, bare_first=n % 2 == 1)
                add(rows, f"{wanted:,} waiting", sample)
            say(
                f"{wanted:9,} waiting  {sample['events_per_s']:8,.0f}/s  "
                f"x {sample['ratio']:.3f}  relay {sample['relay_mb']:.0f} MB"
            )
    add(rows, f"{FULL:,} waiting", _memory(20_000 if quick else FULL, say))
    return rows


def _at(
    wanted: int, above: Upstream, bare: Served, seconds: int, *, bare_first: bool
) -> Sample:
    """One round at a depth, on a Redis that has nothing else to do."""
    with redis_server() as store:
        _fill_to(store, wanted)
        store.rewrite()
        with relay(store, above.url) as served:
            _load(bare, WARM_UP_S)
            _load(served, WARM_UP_S)
            time.sleep(SETTLE_S)
            before = store.counts().received
            order = (bare, served) if bare_first else (served, bare)
            found = {run.url: _load(run, seconds) for run in order}
            time.sleep(SETTLE_S)
            seen = store.counts().received - before
            if not 0 <= seen - found[served.url]["requests"] <= 64:
                msg = f"{found[served.url]}, but Redis counted {seen}"
                raise BenchError(msg)
            sample = against(found[served.url], found[bare.url], RATIOS)
            return dict(sample, relay_mb=max(served.program.rss_mb()))


def _load(served: Served, seconds: int) -> Sample:
    began = served.program.cpu_s()
    load = closed_loop(served.url, seconds=seconds)
    used = served.program.cpu_s() - began
    if load.refused:
        msg = f"{load.refused} of {load.requests} were refused"
        raise BenchError(msg)
    return {
        "requests": load.requests,
        "events_per_s": load.rate,
        "p99_ms": load.p99_ms,
        "server_us_per_event": used / load.requests * 1e6,
    }


def _fill_to(store: Store, wanted: int) -> None:
    missing = wanted - store.counts().waiting
    if missing > 0:
        told = result_of("fill", store.url, str(missing), str(BATCH), core=SERVER_CORE)
        if told["taken"] != missing:
            msg = f"{missing} events to fill in, Redis took {told['taken']}"
            raise BenchError(msg)


def _memory(events: int, say: Say) -> Sample:
    """What a full queue takes: in Redis for each event, and in an idle relay."""
    with redis_server() as store, upstream() as above:
        with relay(store, above.url) as served:
            closed_loop(served.url, seconds=WARM_UP_S)  # what every process grows to
            before_mb = max(served.program.rss_mb())
        store.flush()
        empty = store.memory()
        _fill_to(store, events)
        passing = store.bytes_of_limits()
        taken = store.memory() - empty - passing
        streams = store.bytes_of_queue()
        with relay(store, above.url) as served:
            time.sleep(5.0)  # it looks at the queue, writes gauges, delivers a little
            idle_mb = max(served.program.rss_mb())
        counts = store.counts()
    say(
        f"{counts.waiting:,} wait: {taken / events:.0f} bytes each in Redis, "
        f"{streams / events:.0f} of them the queue's, {passing / events:.0f} on top "
        f"for its limits; relay {idle_mb:.0f} MB, after load on an empty queue "
        f"{before_mb:.0f} MB"
    )
    return {
        "redis_bytes_per_event": taken / events,
        "queue_bytes_per_event": streams / events,
        "limit_bytes_per_event": passing / events,
        "relay_idle_mb": idle_mb,
        "relay_loaded_mb": before_mb,
    }


def ceiling(*, rounds: int, quick: bool, say: Say) -> Rows:
    """Redis' own limit for the commit script: its processor time for each event."""
    rows: Rows = {}
    events = 5_000 if quick else 60_000
    for _ in range(rounds):
        for fsync in ("everysec", "always"):
            for batch in (1, 8, 32, 128):
                with redis_server(fsync=fsync) as store:
                    n = events // 4 if batch == 1 else events
                    began = store.program.cpu_s()
                    told = result_of(
                        *("fill", store.url, str(n), str(batch)), core=SERVER_CORE
                    )
                    used = store.program.cpu_s() - began
                    if told["taken"] != n or store.counts().waiting != n:
                        msg = f"{n} events committed, Redis took {told}"
                        raise BenchError(msg)
                name = f"{fsync}, {batch} a commit"
                sample = {
                    "events_per_s": n / told["seconds"],
                    "redis_us_per_event": used / n * 1e6,
                    "ceiling_per_s": n / used,
                }
                add(rows, name, sample)
                say(
                    f"{name:24} {sample['redis_us_per_event']:6.1f} us of Redis/event: "
                    f"{sample['ceiling_per_s']:8,.0f}/s at most, "
                    f"{sample['events_per_s']:8,.0f}/s seen"
                )
    return rows
