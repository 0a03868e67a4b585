"""Where the relay's time goes under load: py-spy's samples, summed by function.

Not part of a measured run: py-spy stops the process for each sample. What it finds
leans towards system calls, where a stop takes hold first; `perf` on the same process
says how much of the time the kernel really has.
"""

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.accept import WARM_UP_S, Variant
from bench.load import closed_loop
from bench.machine import OTHER_CORE, WORK, pin_to
from bench.processes import BenchError
from bench.results import PLACE
from bench.stack import SIGNING_KEY, redis_server, relay, token_file, upstream

SAMPLES_A_SECOND = 400
SHOWN = 40
# A thread of the pool that waits for work: py-spy takes it for a busy one.
IDLE = "_worker (concurrent/futures/thread.py"


def profile(variant: Variant, *, seconds: int, say: Callable[[str], None]) -> None:
    """Load the relay, and say which functions it is in, alone and with callees."""
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:/usr/bin")
    if spy is None:
        raise BenchError("needs py-spy in the virtual environment: pip install py-spy")
    PLACE.mkdir(exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    tokens = token_file() if variant.kind == "token" else None
    changes = {"RELAY_SIGNING_KEYS": SIGNING_KEY} if tokens else {}
    with (
        redis_server() as store,
        upstream() as above,
        relay(store, above.url, changes=changes) as served,
    ):

        def load(seconds: int) -> None:
            closed_loop(
                served.url,
                kind=variant.kind,
                connections=variant.connections,
                seconds=seconds,
                tokens=tokens,
            )

        load(WARM_UP_S)
        stacks, picture = WORK / "stacks", PLACE / "profile.svg"
        for form, path in (("raw", stacks), ("flamegraph", picture)):
            sampler = subprocess.Popen(
                [
                    *(spy, "record", "--format", form),
                    *("--rate", str(SAMPLES_A_SECOND), "--duration", f"{seconds:g}"),
                    *("--pid", str(served.program.popen.pid), "--output", str(path)),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=pin_to(OTHER_CORE),
            )
            time.sleep(0.3)
            load(seconds + 1)
            if sampler.wait() != 0:
                raise BenchError("py-spy could not read the process: run it as root")
    alone, with_callees, total = summed(stacks.read_text("utf-8"))
    for title, counted in (("alone", alone), ("with callees", with_callees)):
        say(f"\n{title}, % of {total} samples")
        for name, n in counted.most_common(SHOWN):
            say(f"{n / total:7.1%}  {name}")


def summed(text: str) -> tuple[Counter[str], Counter[str], int]:
    """Samples by the innermost function, by every function, and their number.

    A line of py-spy is `outer (file:line);inner (file:line) samples`.
    """
    alone: Counter[str] = Counter()
    with_callees: Counter[str] = Counter()
    total = 0
    for line in text.splitlines():
        stack, _, samples = line.rpartition(" ")
        # The line within a function would tell calls of one function apart.
        frames = [frame.rpartition(":")[0] + ")" for frame in stack.split(";")]
        if any(frame.startswith(IDLE) for frame in frames):
            continue
        n = int(samples)
        total += n
        alone[frames[-1]] += n
        for frame in set(frames):
            with_callees[frame] += n
    return alone, with_callees, total
