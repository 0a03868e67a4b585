"""Start programs on a core, wait until they serve, and read what they cost.

Each is stopped by its own process id, and only by that.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from bench.machine import PATH, ROOT, pin_to

READY_WITHIN_S = 30.0
STOP_WITHIN_S = 20.0
TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A run that says nothing: it is thrown out loudly and never averaged."""


class Program:
    """A running program, with its children."""

    def __init__(self, popen: subprocess.Popen[bytes], output: Path) -> None:
        self.popen = popen
        self._output = output

    @property
    def said(self) -> str:
        return self._output.read_text("utf-8", errors="replace")

    def pids(self) -> list[int]:
        """Its own process and all below it."""
        found = [self.popen.pid]
        for pid in found:  # grows while it is walked
            found += _children(pid)
        return found

    def cpu_s(self) -> float:
        """Processor time of all its processes, user and system."""
        return sum(_cpu_s(pid) for pid in self.pids())

    def rss_mb(self) -> list[float]:
        """Resident memory of each of its processes."""
        return [_rss_kb(pid) / 1024 for pid in self.pids()]

    def wait_for_port(self, port: int, within: float = READY_WITHIN_S) -> None:
        """Return once somebody accepts there."""
        deadline = time.monotonic() + within
        while True:
            self.check()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if time.monotonic() > deadline:
                msg = f"nothing listens on port {port}:\n{self.said}"
                raise BenchError(msg)
            time.sleep(0.005)

    def check(self) -> None:
        """Raise if it has ended."""
        if self.popen.poll() is not None:
            args = self.popen.args
            msg = f"{args!r} ended with {self.popen.returncode}:\n{self.said}"
            raise BenchError(msg)

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            self.popen.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    core: int | None,
    place: Path,
    env: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Program]:
    """Run a program on a core (None: any) until the block ends.

    `place` is where it runs and what it writes, and goes when it ends. No session of
    its own: the kernel shares a core between sessions first (autogroup), and what a
    session does would then depend on who else runs in it.
    """
    place.mkdir(parents=True, exist_ok=True)
    output = place / "output"
    with output.open("wb") as file:
        popen = subprocess.Popen(
            command,
            cwd=place,
            env={"PATH": PATH, "HOME": str(place), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=None if core is None else pin_to(core),  # one thread here
        )
    program = Program(popen, output)
    try:
        if port is not None:
            program.wait_for_port(port)
        yield program
    finally:
        program.stop()
        shutil.rmtree(place, ignore_errors=True)


def result_of(
    module: str, *arguments: str, core: int, within: float = 300.0
) -> dict[str, float]:
    """Run `python -m bench.<module>` on a core, and read the JSON it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", *arguments],
        env={"PATH": PATH, "PYTHONPATH": str(ROOT), "HOME": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=within,
        preexec_fn=pin_to(core),
    )
    if done.returncode != 0:
        msg = f"bench.{module} ended with {done.returncode}:\n{done.stderr}"
        raise BenchError(msg)
    return cast("dict[str, float]", json.loads(done.stdout or "{}"))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:  # ended meanwhile
        return []
    return found


def _cpu_s(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return (int(fields[11]) + int(fields[12])) / TICKS


def _rss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0
