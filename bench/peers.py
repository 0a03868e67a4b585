"""The peers: what a shop would put in front of Voucherify otherwise.

Each gets a request, limits it by address where it can, adds the credentials, and
calls the upstream while the page waits. None of them keeps an event.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from bench.machine import SERVER_CORE, WORK, find
from bench.processes import BenchError, free_port, running
from bench.stack import Served, Store, Upstream

HERE = Path(__file__).parent / "peers"
PEERS_VENV = WORK / "starlette"


def _command(
    name: str, port: int, store: Store, above: Upstream, place: Path
) -> list[str]:
    if name in ("nginx", "caddy"):
        program = find(name)
        if program is None:
            msg = f"needs {name} (Debian: apt install {name})"
            raise BenchError(msg)
        file = _filled(name, port, above, place)
        if name == "nginx":
            return [program, "-p", str(place), "-c", str(file), "-g", "daemon off;"]
        return [program, "run", "--config", str(file), "--adapter", "caddyfile"]
    arguments = [str(port), above.url, store.url]
    if name == "starlette":
        python = PEERS_VENV / "bin" / "python"
        if not python.exists():
            raise BenchError("the Starlette peer is not installed: make bench-peers")
        return [str(python), str(HERE / name / "server.py"), *arguments]
    node = find("node")
    if node is None or not (HERE / name / "node_modules").exists():
        msg = f"needs node, and the packages of bench/peers/{name}: make bench-peers"
        raise BenchError(msg)
    return [node, str(HERE / name / "server.mjs"), *arguments]


def _filled(name: str, port: int, above: Upstream, place: Path) -> Path:
    source = HERE / ("nginx.conf" if name == "nginx" else "Caddyfile")
    text = source.read_text()
    for word, value in {
        "@PLACE@": str(place),
        "@PORT@": str(port),
        "@UPSTREAM@": above.url.rpartition(":")[2],
    }.items():
        text = text.replace(word, value)
    place.mkdir(parents=True, exist_ok=True)
    (place / source.name).write_text(text)
    return place / source.name


def peer(name: str) -> Callable[[Store, Upstream], Iterator[Served]]:
    """What starts one of them."""

    def start(store: Store, above: Upstream) -> Iterator[Served]:
        port = free_port()
        place = WORK / f"{name}-{token_hex(4)}"
        with running(
            _command(name, port, store, above, place),
            core=SERVER_CORE,
            place=place,
            env={"NODE_ENV": "production"},
            port=port,
        ) as program:
            yield Served(program=program, url=f"http://127.0.0.1:{port}/track")

    return start


PEERS = {
    name: contextmanager(peer(name))
    for name in ("nginx", "caddy", "fastify", "express", "starlette")
}


def install() -> None:
    """Put the packages of the Node peers and of the Starlette peer in place."""
    for name in ("fastify", "express"):
        subprocess.run(
            [
                "npm",
                "ci",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                "--loglevel=error",
            ],
            cwd=HERE / name,
            check=True,
            env=os.environ | {"NODE_ENV": "production"},
        )
    if not PEERS_VENV.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS_VENV)], check=True)
    requirements = HERE / "starlette" / "requirements.txt"
    subprocess.run(
        [
            *(str(PEERS_VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"),
            *("--require-hashes", "-r", str(requirements)),
        ],
        check=True,
    )


if __name__ == "__main__":
    install()
