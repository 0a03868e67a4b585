"""The way out: delivery beside a bare client, and what becomes of a burst."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from resource import RUSAGE_CHILDREN, getrusage
from secrets import token_hex

from bench.accept import FOREIGN_MOST, TRIES, Say
from bench.machine import OTHER_CORE, SERVER_CORE, busy_s
from bench.peers import PEERS
from bench.processes import BenchError, result_of
from bench.results import Rows, Sample, add, against
from bench.stack import Store, Upstream, floor, redis_server, relay, upstream

CONCURRENCY = 32  # the default of RELAY_CONCURRENCY
BURST, BURST_CONNECTIONS = 10_000, 200
BURST_WITHIN_S = 60.0
SLOW_MS, SLOW_LIMIT = 100, "4/5"


def delivery(*, rounds: int, quick: bool, say: Say) -> Rows:
    """With an unlimited budget, to a fast upstream and to one of 100 ms."""
    rows: Rows = {}
    sizes = {0: 500, SLOW_MS: 100} if quick else {0: 10_000, SLOW_MS: 1_500}
    for n in range(rounds):
        for delay_ms, events in sizes.items():
            where = f"{delay_ms} ms" if delay_ms else "fast"
            shift = n % len(DELIVERERS)
            names = [*DELIVERERS][shift:] + [*DELIVERERS][:shift]
            samples = {name: DELIVERERS[name](delay_ms, events) for name in names}
            bare = samples[BARE]
            for name in DELIVERERS:
                sample = against(samples[name], bare, {"ratio": "events_per_s"})
                add(rows, f"{name}, {where}", sample)
            mine = against(samples["relay"], bare, {"ratio": "events_per_s"})
            say(
                f"round {n + 1}  {where:7}  relay {mine['events_per_s']:7,.0f}/s  "
                f"bare client {bare['events_per_s']:7,.0f}/s  x {mine['ratio']:.3f}  "
                f"server {mine['server_us_per_event']:.0f} us/event"
            )
    return rows


def _bare(delay_ms: int, events: int, *options: str) -> Sample:
    with upstream(delay_ms=delay_ms) as above:
        result_of(
            *("bare_client", above.url, str(events), str(CONCURRENCY), *options),
            core=SERVER_CORE,
        )
        told = above.told()
    if told["taken"] != events:
        msg = f"{events} sent, the upstream got {told}"
        raise BenchError(msg)
    return {"events_per_s": (events - 1) / told["seconds"]}


def _forwarder(delay_ms: int, events: int) -> Sample:
    with redis_server() as store, upstream(delay_ms=delay_ms) as above:
        result_of("fill", store.url, str(events), "128", core=SERVER_CORE)
        with relay(store, above.url, command="worker", changes=NO_BUDGET) as worker:
            began = worker.program.cpu_s()
            told = _arrived(above, events, within=120)
            used = worker.program.cpu_s() - began
            time.sleep(0.2)  # the last answers are settled
            counts = store.counts()
    if counts.outcomes["delivered"] != events or told["twice"]:
        msg = f"{events} to deliver, Redis counted {counts}, the upstream {told}"
        raise BenchError(msg)
    return {
        "events_per_s": (events - 1) / told["seconds"],
        "server_us_per_event": used / events * 1e6,
    }


def _rarely(delay_ms: int, events: int) -> Sample:
    return _bare(delay_ms, events, "rarely")


NO_BUDGET = {"RELAY_UPSTREAM_BUDGET": "off"}
# With Python's settings, as anybody would write it, and with the relay's.
BARE = "bare client"
DELIVERERS: dict[str, Callable[[int, int], Sample]] = {
    BARE: _bare,
    "bare client, garbage collected as in the relay": _rarely,
    "relay": _forwarder,
}


def _arrived(above: Upstream, events: int, *, within: float) -> dict[str, float]:
    """What the upstream has got: all of it, or as much as came in time."""
    deadline = time.monotonic() + within
    while (told := above.told())["taken"] < events and time.monotonic() < deadline:
        time.sleep(0.05)
    return told


def burst(*, quick: bool, say: Say) -> Rows:
    """10,000 events at once, above an upstream of 100 ms that takes 4 calls in 5 s."""
    rows: Rows = {}
    events = 400 if quick else BURST
    for name in (*PEERS, "relay"):
        sample = _burst(name, events)
        add(rows, name, sample)
        say(
            f"{name:10} answered 2xx {sample['accepted']:6,.0f}  arrived at once "
            f"{sample['arrived']:6,.0f}, in the end "
            f"{sample['arrived_in_the_end']:6,.0f}  twice {sample['twice']:.0f}  "
            f"took {sample['seconds']:.1f} s"
        )
    return rows


def _burst(name: str, events: int) -> Sample:
    with ExitStack() as stack:
        store = stack.enter_context(redis_server())
        above = stack.enter_context(upstream(delay_ms=SLOW_MS, limit=SLOW_LIMIT))
        with ExitStack() as serving:
            starter = (
                relay(store, above.url)
                if name == "relay"
                else PEERS[name](store, above)
            )
            served = serving.enter_context(starter)
            began = time.monotonic()
            told = generate(
                served.url,
                total=events,
                connections=BURST_CONNECTIONS,
                within_s=BURST_WITHIN_S,
            )
            seconds = time.monotonic() - began
            time.sleep(1.0)  # calls that are still under way
            at_once = above.told()
        statuses = told["statuses"]
        assert isinstance(statuses, dict)
        accepted = sum(n for status, n in statuses.items() if status.startswith("2"))
        finally_ = at_once
        if name == "relay":
            finally_ = _drain(store, above, accepted)
    return {
        "accepted": float(accepted),
        "refused": float(sum(statuses.values()) - accepted),
        "unanswered": float(events - sum(statuses.values())),
        "arrived": at_once["taken"],
        "arrived_in_the_end": finally_["taken"],
        "twice": finally_["twice"],
        "seconds": seconds,
    }


def _drain(store: Store, above: Upstream, accepted: int) -> dict[str, float]:
    """Lift the limit, and see whether all that was accepted is still there.

    At 4 calls in 5 s the queue would take hours; the upstream is opened instead, and
    another process of the relay delivers what the first one left.
    """
    above.told("/open")
    with relay(store, above.url, command="worker", changes=NO_BUDGET):
        told = _arrived(above, accepted, within=120)
        time.sleep(0.5)
        return above.told() if told["taken"] >= accepted else told


def generate(url: str, **plan: object) -> dict[str, object]:
    """Run the open-loop generator, or a burst, on the core of the load."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    asked = {"port": port, "nonce": token_hex(6), **plan}
    return dict(result_of("generator", json.dumps(asked), core=OTHER_CORE))


def latency(*, rounds: int, seconds: float, quick: bool, say: Say) -> Rows:
    """Open loop at fixed rates: what a page waits for, from when it was due."""
    rows: Rows = {}
    rates = (500,) if quick else (1000, 2000, 4000)
    cases = [("floor", ""), ("relay", "everysec"), ("relay", "always")]
    for n in range(rounds):
        for rate in rates:
            shift = n % len(cases)
            samples = {
                case: _undisturbed(case, rate=rate, seconds=seconds, say=say)
                for case in cases[shift:] + cases[:shift]
            }
            for case in cases:
                name = " ".join(filter(None, (*case, f"at {rate}/s")))
                sample = against(
                    samples[case], samples["floor", ""], {"p99_ratio": "p99_ms"}
                )
                add(rows, name, sample)
                say(
                    f"round {n + 1}  {name:26} p50 {sample['p50_ms']:6.2f}  p99 "
                    f"{sample['p99_ms']:6.2f}  p99.9 {sample['p999_ms']:6.2f} ms  "
                    f"(sender late: p99 {sample['late_p99_ms']:.2f} ms)"
                )
    return rows


def _undisturbed(
    case: tuple[str, str], *, rate: int, seconds: float, say: Say
) -> Sample:
    for _ in range(TRIES):
        sample = _open_loop(case, rate=rate, seconds=seconds)
        if sample["foreign"] <= FOREIGN_MOST:
            return sample
        say(f"thrown out  {case} at {rate}/s: others had {sample['foreign']:.0%}")
    msg = f"{case} at {rate}/s: the machine is too busy with other things"
    raise BenchError(msg)


def _open_loop(case: tuple[str, str], *, rate: int, seconds: float) -> Sample:
    with ExitStack() as stack:
        store = None
        if case[0] == "floor":
            served = stack.enter_context(floor())
            programs = [served.program]
        else:
            store = stack.enter_context(redis_server(fsync=case[1]))
            above = stack.enter_context(upstream())
            served = stack.enter_context(relay(store, above.url))
            programs = [served.program, store.program, above.program]

        def foreign() -> float:
            # The sender is the one child that begins and ends in between.
            ended = getrusage(RUSAGE_CHILDREN)
            ours = sum(program.cpu_s() for program in programs)
            return busy_s() - ours - ended.ru_utime - ended.ru_stime

        before = foreign()
        told = generate(served.url, rate=rate, seconds=seconds, warm_up_s=1.0)
        others = (foreign() - before) / (seconds + 1.0)
        _check_open(case, told, store, round(rate * (seconds + 1.0)))
    names = ("p50_ms", "p99_ms", "p999_ms", "late_p99_ms")
    return {name: float(str(told[name])) for name in names} | {"foreign": others}


def _check_open(
    case: tuple[str, str], told: dict[str, object], store: Store | None, sent: int
) -> None:
    wanted = "204" if store is None else "202"
    if told["lost"] or set(dict(told["statuses"])) != {wanted}:  # type: ignore[call-overload]  # JSON
        msg = f"{case}: {told}"
        raise BenchError(msg)
    if store is not None and (counts := store.counts()).received != sent:
        msg = f"{case}: {sent} sent, Redis counted {counts}"
        raise BenchError(msg)
