"""Two versions of the relay at once, on the same core: what a beacon costs each.

What a busy machine does to one it does to the other within the same milliseconds, so
two per cent show here where runs one after the other differ by tens. It says nothing of
rates, for each has only a part of the core.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.accept import WARM_UP_S, Say
from bench.load import closed_loop
from bench.machine import ROOT
from bench.results import spread
from bench.stack import Served, redis_server, relay, upstream


def versions(other: Path, *, rounds: int, seconds: int, say: Say) -> None:
    """Compare the tree `other` with this one, and say what comes out."""
    trees = {"this": ROOT, "other": other.resolve()}
    ratios: list[float] = []
    for n in range(rounds):
        order = list(trees)[:: -1 if n % 2 else 1]
        with ExitStack() as stack:
            served: dict[str, Served] = {}
            for name in order:
                store = stack.enter_context(redis_server())
                above = stack.enter_context(upstream())
                started = relay(store, above.url, tree=trees[name])
                served[name] = stack.enter_context(started)
            _costs(served, WARM_UP_S)
            costs = _costs(served, seconds)
        ratios.append(costs["this"] / costs["other"])
        say(
            f"round {n + 1}  this {costs['this']:6.1f}  other {costs['other']:6.1f} "
            f"us of the server for a beacon  x {ratios[-1]:.3f}"
        )
    told = spread(ratios)
    say(f"this costs {told.median:.3f} ({told.low:.3f}-{told.high:.3f}) of the other")


def _costs(served: dict[str, Served], seconds: int) -> dict[str, float]:
    """Microseconds of each server for a beacon, all under load at once."""

    def cost(one: Served) -> float:
        before = one.program.cpu_s()
        load = closed_loop(one.url, seconds=seconds)
        return (one.program.cpu_s() - before) / load.requests * 1e6

    with ThreadPoolExecutor(len(served)) as pool:
        return dict(zip(served, pool.map(cost, served.values()), strict=True))
