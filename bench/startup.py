"""From the start of the process to the first event taken, and what it then takes."""

import http.client
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from secrets import token_hex

from bench.accept import Say
from bench.beacons import ORIGIN, body
from bench.machine import PATH, ROOT, SERVER_CORE, WORK, pin_to
from bench.processes import BenchError, free_port, running
from bench.results import Rows, add
from bench.stack import PYTHON, redis_server, settings, upstream

IMPORTS = {
    "python": "pass",
    "uvicorn": "import uvicorn, uvloop, httptools",
    "relay serve": "import relay.cli, relay.serving",
}


def startup(*, rounds: int, quick: bool, say: Say) -> Rows:
    """Start the relay with a Redis that runs, with its own server, and the floor."""
    rows: Rows = {}
    _first("relay", None)  # byte code is written once, by an installer or a first start
    for _ in range(rounds):
        for name in ("floor", "relay", "relay, embedded server"):
            seconds, mb = _first(name.partition(",")[0], "embedded" in name)
            add(rows, name, {"first_event_s": seconds, "largest_mb": max(mb)})
            say(
                f"{name:24} first event after {seconds:.3f} s; "
                f"MB of its processes: {', '.join(f'{n:.0f}' for n in mb)}"
            )
        for name, code in IMPORTS.items():
            seconds = _import(code)
            add(rows, f"import: {name}", {"import_s": seconds})
    if not quick:
        for name in IMPORTS:
            say(f"import {name}: {min(rows[f'import: {name}']['import_s']):.3f} s")
    return rows


def _first(server: str, embedded: bool | None) -> tuple[float, list[float]]:
    port = free_port()
    with ExitStack() as stack:
        env = {"PYTHONPATH": str(ROOT)}
        if server == "floor":
            command = [PYTHON, "-m", "bench.floors", str(port)]
        else:
            above = stack.enter_context(upstream())
            store = None if embedded else stack.enter_context(redis_server())
            env |= settings(
                port=port,
                ops_port=free_port(),
                redis_url=store.url if store else "",
                cluster=above.url,
            )
            command = [PYTHON, "-m", "relay", "serve"]
        place = WORK / f"start-{token_hex(4)}"
        env["RELAY_DATA_DIR"] = str(place / "data")
        began = time.perf_counter()
        program = stack.enter_context(
            running(command, core=SERVER_CORE, place=place, env=env)
        )
        while not _taken(port):
            program.check()
            if time.perf_counter() - began > 30:
                raise BenchError(f"no event taken: {program.said}")
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        return seconds, program.rss_mb()


def _taken(port: int) -> bool:
    """Whether an event is accepted now."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        client.request(
            "POST",
            "/track",
            body(1, nonce="start"),
            {"Origin": ORIGIN, "Content-Type": "application/json"},
        )
        return client.getresponse().status in (202, 204)
    except OSError:  # nobody listens yet
        return False
    finally:
        client.close()


def _import(code: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        [PYTHON, "-c", code],
        check=True,
        cwd=Path(ROOT),
        env={"PATH": PATH},
        preexec_fn=pin_to(SERVER_CORE),
    )
    return time.perf_counter() - began
