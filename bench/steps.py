"""What Python does for a beacon: the interpreter's steps, counted by function.

Beacons go through the relay's protocol in one process, on connections that keep what is
written and into a queue that takes all. Steps (bytecodes) are counted and not timed, so
a busy machine changes nothing. A server under load spends half of its time on them, and
about the same on each, so they show where to look and what a change should give; what
it gives, `--against` says. With valgrind there, instructions are counted, too.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

from uvicorn.server import ServerState

from bench.beacons import request
from bench.machine import ROOT, WORK
from bench.processes import BenchError
from bench.stack import PYTHON, settings
from relay.admission import Admission
from relay.assembly import make_digests
from relay.collector import look_rarely
from relay.edge import Edge
from relay.endpoints import Track
from relay.policy import Policy
from relay.protocol import BeaconProtocol
from relay.queue import Packed, Refused, Reply, Told
from relay.serving import server_config
from relay.settings import Role, load_settings

if TYPE_CHECKING:
    from _typeshed import TraceFunction

    from relay.queueable import Waiting

CONNECTIONS = 64
# Before anything is counted: by then the interpreter has made the most of its code.
WARM_UP = 5 * CONNECTIONS
COUNTED, FEW, MANY = 10 * CONNECTIONS, 10 * CONNECTIONS, 60 * CONNECTIONS
SHOWN = 40
_HERE = str(Path(__file__).resolve())
# Whose steps are not the relay's, and of the loop no two runs have the same.
_OTHERS = (str(Path(_HERE).parent), str(Path(asyncio.__file__).parent))


class _Queue:
    """Takes every event at once."""

    async def commit(
        self, slot: str, seq: int, requests: Sequence[Packed], refused: list[Refused]
    ) -> list[Reply]:
        raise NotImplementedError  # nothing here is sent a second time

    def commit_now(
        self,
        slot: str,
        seq: int,
        requests: Sequence[Packed],
        refused: list[Refused],
        then: Told,
    ) -> bool:
        del slot, seq, refused
        replies = [Reply(0, 59, 500_000, [0, 0]) for _ in requests]
        asyncio.get_running_loop().call_soon(then, replies)
        return True


class _Nobody:
    """Waits for no outcome."""

    async def expect(self, event: "Waiting", seconds: int) -> None:
        raise NotImplementedError

    async def outcome(
        self, event: "Waiting", seconds: float
    ) -> dict[str, object] | None:
        raise NotImplementedError


class _Connection(asyncio.Transport):
    """Keeps the last answer."""

    said = b""

    def get_extra_info(self, name: str, default: object = None) -> object:
        known = {"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)}
        return known.get(name, default)

    def write(self, data: object) -> None:
        self.said = cast("bytes", data)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None: ...


class _App:
    """What the protocol asks of the application."""

    def __init__(self, track: Track) -> None:
        self.beacons = {b"/track": track}

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        raise NotImplementedError  # no beacon gets as far as ASGI


class Counted:
    """Steps by function, and calls, once `start` was called."""

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def start(self) -> None:
        sys.settrace(self._called)

    def stop(self) -> None:
        sys.settrace(None)

    def _called(
        self, frame: FrameType, event: str, arg: object
    ) -> "TraceFunction | None":
        del event, arg
        code = frame.f_code
        if code.co_filename.startswith(_OTHERS):
            return None
        name = f"{code.co_qualname} ({Path(code.co_filename).name})"
        self.calls[name] += 1
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps = self.steps

        def step(frame: FrameType, event: str, arg: object) -> "TraceFunction":
            del frame, arg
            if event == "opcode":
                steps[name] += 1
            return step

        return step


async def take(beacons: int, counted: Counted | None) -> None:
    """Take so many beacons, of which each must be accepted."""
    env = settings(port=80, ops_port=81, redis_url="redis://x", cluster="api")
    made = load_settings(Role.EDGE, env | {"RELAY_ENV_FILE": os.devnull})
    admission = Admission(_Queue())
    await admission.start()
    edge = Edge(
        origins=made.allowed_origins,
        proxies=made.trusted_proxies,
        limits=made.limits,
        digests=make_digests(made),
        policy=Policy(ttl_ms=made.ttl * 1000),
    )
    track = Track(
        edge=edge, admission=admission, outcomes=_Nobody(), limits=made.limits
    )
    config = server_config(_App(track))
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"Tue, 01 Dec 2026 00:00:00 GMT")]
    connections = []
    for _ in range(CONNECTIONS):
        protocol = BeaconProtocol(config=config, server_state=state, app_state={})
        connection = _Connection()
        protocol.connection_made(connection)
        connections.append((protocol, connection))
    sent = 0
    while sent < beacons:
        if sent == WARM_UP and counted is not None:
            counted.start()
        for protocol, _ in connections:
            protocol.data_received(request(sent, nonce="n", path="/track", port=80))
            sent += 1
        while not all(connection.said for _, connection in connections):  # noqa: ASYNC110  # a turn of the loop, and no time
            await asyncio.sleep(0)
        for _, connection in connections:
            if not connection.said.startswith(b"HTTP/1.1 202 "):
                raise BenchError(f"not accepted: {connection.said!r}")
            connection.said = b""
    if counted is not None:
        counted.stop()
    await admission.stop()


def count_steps(other: Path | None, *, say: Callable[[str], None]) -> None:
    """Say what a beacon takes here and, for comparison, in another tree."""
    trees = [ROOT] if other is None else [ROOT, other.resolve()]
    for tree in trees:
        steps, calls = counts(tree)
        total = f"{sum(steps.values()):,.0f} steps and {_instructions(tree)}"
        say(f"{total} for a beacon: {tree}")
        if tree == ROOT:
            say("  steps  calls")
            for name, n in steps.most_common(SHOWN):
                say(f"{n:7.1f} {calls[name]:6.2f}  {name}")


def counts(tree: Path) -> tuple[Counter[str], Counter[str]]:
    """Steps and calls of each function for one beacon."""
    said = json.loads(_run([PYTHON], WARM_UP + COUNTED, "steps", tree=tree).stdout)
    steps, calls = (
        Counter({name: n / COUNTED for name, n in said[kind].items()})
        for kind in ("steps", "calls")
    )
    return steps, calls


def _instructions(tree: Path) -> str:
    """What the processor does for one, with what makes the request."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return "(without valgrind) unknown instructions"
    WORK.mkdir(parents=True, exist_ok=True)
    tool = [valgrind, "--tool=callgrind", f"--callgrind-out-file={WORK / 'callgrind'}"]
    few, many = (
        # The last line: "Collected : 1,801,816,406".
        int(_run([*tool, PYTHON], n, tree=tree).stderr.split()[-1].replace(",", ""))
        for n in (FEW, MANY)
    )
    return f"{(many - few) / (MANY - FEW):,.0f} instructions"


def _run(
    program: list[str], beacons: int, *options: str, tree: Path
) -> subprocess.CompletedProcess[str]:
    # By its path, so that another tree's relay is taken in by this one.
    ran = subprocess.run(
        [*program, _HERE, str(beacons), *options],
        env={"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"},
        check=False,
        capture_output=True,
        text=True,
    )
    if ran.returncode != 0:
        raise BenchError(f"{tree} cannot be counted: {ran.stderr[-500:]}")
    return ran


def main() -> None:
    """Take the beacons, and print the steps where they are asked for."""
    look_rarely()
    counted = Counted() if "steps" in sys.argv[2:] else None
    asyncio.run(take(int(sys.argv[1]), counted))
    if counted is not None:
        sys.stdout.write(json.dumps({"steps": counted.steps, "calls": counted.calls}))


if __name__ == "__main__":
    main()
