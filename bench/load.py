"""The closed loop: wrk, one thread, as fast as the server answers.

Its latencies are those of a full queue (connections divided by rate); what a page
feels at a given rate is measured by generator.py instead.
"""

import json
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

from bench.machine import OTHER_CORE, PATH, pin_to
from bench.processes import BenchError

SCRIPT = Path(__file__).parent / "beacon.lua"
BATCH = 20  # as in beacon.lua
# Runs on one relay begin with other people, or one would meet the limits of another.
_FIRST = count(0, 270_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What wrk saw."""

    requests: int
    seconds: float
    refused: int  # answers with another status than 2xx or 3xx
    p50_ms: float
    p99_ms: float
    cpu_s: float  # of wrk itself
    runs: int = 1  # of which this is made

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def together(loads: Sequence[Load]) -> Load:
    """What several runs come to: sums, and of the latencies the medians."""
    return Load(
        requests=sum(load.requests for load in loads),
        seconds=sum(load.seconds for load in loads),
        refused=sum(load.refused for load in loads),
        p50_ms=median(load.p50_ms for load in loads),
        p99_ms=median(load.p99_ms for load in loads),
        cpu_s=sum(load.cpu_s for load in loads),
        runs=sum(load.runs for load in loads),
    )


def closed_loop(
    url: str,
    *,
    kind: str = "json",
    connections: int = 64,
    seconds: int,
    tokens: Path | None = None,
) -> Load:
    """Run wrk once. Raises `BenchError` on any broken connection or late answer."""
    command = [
        *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"),
        *("-s", str(SCRIPT), url, "--"),
        *(kind, secrets.token_hex(6), str(next(_FIRST)), str(tokens or "-")),
    ]
    # A file, for nobody reads while it is waited for.
    with tempfile.TemporaryFile() as output:
        popen = subprocess.Popen(
            command,
            env=os.environ | {"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=pin_to(OTHER_CORE),  # one thread here
        )
        _, status, used = os.wait4(popen.pid, 0)
        popen.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    if popen.returncode != 0:
        msg = f"wrk ended with {popen.returncode}:\n{said}"
        raise BenchError(msg)
    return read_result(said, cpu_s=used.ru_utime + used.ru_stime)


def read_result(said: str, *, cpu_s: float) -> Load:
    """What the script's last line tells."""
    match = re.search(r"^RESULT (\{.*\})$", said, re.MULTILINE)
    if match is None:
        msg = f"wrk told no result:\n{said}"
        raise BenchError(msg)
    told = json.loads(match[1])
    broken = {k: told[k] for k in ("connect", "read", "write", "timeout") if told[k]}
    if broken or not told["requests"]:
        msg = f"wrk saw broken requests, or none: {broken}"
        raise BenchError(msg)
    return Load(
        requests=told["requests"],
        seconds=told["microseconds"] / 1e6,
        refused=told["status"],
        p50_ms=told["p50"] / 1000,
        p99_ms=told["p99"] / 1000,
        cpu_s=cpu_s,
    )
