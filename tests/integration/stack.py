"""The whole relay in processes of its own, with the sandbox as Voucherify.

Each process is `python -m relay …`, as an operator runs it: real sockets, real
signals. Leaving the stack checks that nothing unexpected reached the sandbox and
that every event is accounted for.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import redis.asyncio

from relay.limits import parse_budget
from relay.queue import Queue
from relay.sandbox.app import Sandbox
from relay.sandbox.config import SandboxConfig
from relay.sandbox.server import serve_sandbox
from tests.queues import Bench, Clock
from tests.support import eventually

ORIGIN = "https://shop.example"
HEADERS = {"Origin": ORIGIN, "Content-Type": "text/plain"}
READY_WITHIN_S = 30


@dataclass
class Process:
    """One `relay` process and what it says."""

    popen: subprocess.Popen[bytes]
    said: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def text(self) -> str:
        return self.said.read_text()

    async def says(self, pattern: str, within: float = READY_WITHIN_S) -> re.Match[str]:
        async def said() -> re.Match[str] | None:
            if self.popen.poll() is not None and not re.search(pattern, self.text):
                raise AssertionError(f"ended with {self.popen.returncode}: {self.text}")
            return re.search(pattern, self.text)

        await eventually(said, within=within)
        found = re.search(pattern, self.text)
        assert found is not None
        return found

    async def track_url(self) -> str:
        return (await self.says(r"Taking events on (http\S+),"))[1]

    async def ready_url(self) -> str:
        return (await self.says(r"Ready\? (http\S+)"))[1]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    async def stop(self, within: float = 30) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)

        async def ended() -> bool:
            return self.popen.poll() is not None

        await eventually(ended, within=within)
        return self.popen.returncode


@dataclass
class Stack:
    """Processes around one Redis and one sandbox."""

    bench: Bench
    sandbox: Sandbox
    directory: Path
    environ: dict[str, str]
    module: str = "relay"
    processes: list[Process] = field(default_factory=list)

    def start(self, *command: str, **settings: str) -> Process:
        """Run `relay <command>`; `settings` are variables without their prefix."""
        said = self.directory / f"{len(self.processes)}-{command[0]}.log"
        own = {f"RELAY_{name.upper()}": value for name, value in settings.items()}
        with said.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, "-m", self.module, *command],
                env=self.environ | own,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,
            )
        self.processes.append(Process(popen, said))
        return self.processes[-1]

    async def drained(self, within: float = 60) -> None:
        async def quiet() -> bool:
            gauges = await self.bench.gauges()
            return all(gauges[g] == "0" for g in ("queued", "in_flight", "delayed"))

        await eventually(quiet, within=within)

    def delivered_ids(self) -> list[str]:
        """What arrived, by the id that the test put into each event's metadata."""
        return [_id_of(record.body) for record in self.sandbox.events]


def _id_of(body: object) -> str:
    assert isinstance(body, dict)
    return str(body["metadata"]["n"])


@asynccontextmanager
async def stack(
    redis_url: str,
    prefix: str,
    directory: Path,
    *,
    sandbox: SandboxConfig | None = None,
    budget: str = "off",
    **settings: str,
) -> AsyncIterator[Stack]:
    # More than any test sends, so that what has arrived can be counted at its end.
    config = sandbox or SandboxConfig(client_limit=None, keep_requests=1_000_000)
    async with serve_sandbox(config) as running:
        queue = Queue(
            url=redis_url, prefix=prefix, budget=parse_budget(budget), timeout=5.0
        )
        bench = Bench(
            queue, Clock(redis_url, prefix), redis.asyncio.Redis.from_url(redis_url)
        )
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HOME": str(directory),
            "RELAY_REDIS_URL": redis_url,
            "RELAY_REDIS_PREFIX": prefix,
            "RELAY_PORT": "0",
            "RELAY_OPS_PORT": "0",
            "RELAY_ALLOWED_ORIGINS": ORIGIN,
            "RELAY_CLUSTER": running.url,
            "RELAY_CLIENT_APPLICATION_ID": config.application_id,
            "RELAY_CLIENT_TOKEN": config.client_token,
            "RELAY_ORIGIN": ORIGIN,
            "RELAY_LIMITS": "off",
            "RELAY_UPSTREAM_BUDGET": budget,
        } | {f"RELAY_{name.upper()}": value for name, value in settings.items()}
        made = Stack(bench, running.sandbox, directory, environ)
        try:
            yield made
            await made.bench.balanced()
            running.sandbox.assert_clean()
        finally:
            for process in made.processes:
                if process.popen.poll() is None:
                    with suppress(AssertionError):
                        await process.stop()
                    process.kill()
            await queue.aclose()
            await bench.clock.aclose()
            await bench.client.aclose()


def beacon(
    n: int | str, *, name: str = "e", customer: str = "", **parts: object
) -> str:
    customer = customer or f"c-{n}"  # one customer's events go one at a time
    return json.dumps(
        {
            "event": name,
            "id": f"id-{n}",
            "customer": {"source_id": customer},
            # A text that belongs to this event's sender alone: tests/leaks.py.
            "metadata": {"n": str(n), "note": f"note-{n}-of-{customer}"},
            **parts,
        }
    )


class Sender:
    """A browser's side: keeps what was acknowledged, as the shop would count it."""

    def __init__(self, connections: int = 20) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections),
            timeout=aiohttp.ClientTimeout(total=30),
        )
        self.acknowledged: list[str] = []
        self.statuses: dict[int, int] = {}

    async def __aenter__(self) -> "Sender":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, url: str, n: int | str, **parts: object) -> int:
        """One beacon; 0 when the connection broke, which acknowledges nothing."""
        try:
            body = beacon(n, **parts)  # type: ignore[arg-type]  # its own keywords
            async with self._session.post(url, data=body, headers=HEADERS) as answer:
                await answer.read()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError):
            status = 0
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 202:
            self.acknowledged.append(str(n))
        return status

    async def send_all(self, url: str, numbers: Iterable[int]) -> None:
        await asyncio.gather(*(self.send(url, n) for n in numbers))

    async def keep_sending(self, url: str, stop: asyncio.Event, base: int) -> None:
        """One after the other until told; with several of these, a steady load."""
        n = base
        while not stop.is_set():
            await self.send(url, n)
            n += 1


def monotonic_ms() -> int:
    return int(time.monotonic() * 1000)
