"""Whatever is killed at whatever step, nothing is lost, and what pays goes once.

A table: at which step the worker is killed (SIGKILL), under which rule its event is
delivered, and what must be seen when another worker has taken over. Each run has a
queue of its own with three events; the first one meets the death, the others wait.
docs/delivery.md keeps what was seen: `make crash-matrix` runs it all and writes it
there.
"""

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import msgspec
import pytest
import redis
import redis.asyncio

from relay.embedded import find_binary
from relay.queue import Queue
from relay.sandbox.config import SandboxConfig
from relay.sandbox.server import RunningSandbox, serve_sandbox
from tests.doomed import Order, Report, left
from tests.integration.stack import ORIGIN, Sender, stack
from tests.queues import Bench, Clock, event
from tests.support import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

DOCUMENT = Path(__file__).parents[2] / "docs" / "delivery.md"
RULES = ("at_least_once", "at_most_once", "verify")
PLAIN = RULES[:2]  # with either API
RUNS = 25
REDIS_RUNS = 3  # each with two starts of a server
RELAY_RUNS = 3  # events of one kind that a relay has in flight when it is killed
AT_ONCE = 12


@dataclass(frozen=True, slots=True, order=True)
class Seen:
    """What became of the event that met the death."""

    arrived: int  # how often Voucherify has processed it
    outcome: str  # the relay's own word


ONCE, TWICE = Seen(1, "delivered"), Seen(2, "delivered")
# Given up without a second try, whether the first one arrived or not.
NEVER_SENT, SENT_ONCE = Seen(0, "ambiguous"), Seen(1, "ambiguous")

# The steps in the order of a delivery, as docs/delivery.md describes them. What Redis
# must know at each: whether the event is still in flight, and whether it is marked.
# And what must be seen in the end, under each rule.
STEPS: dict[str, tuple[tuple[bool, bool], tuple[Seen, Seen, Seen]]] = {
    "claimed": ((True, False), (ONCE, ONCE, ONCE)),
    "marked": ((True, True), (ONCE, NEVER_SENT, ONCE)),
    "connected": ((True, True), (ONCE, NEVER_SENT, ONCE)),
    "first bytes": ((True, True), (ONCE, NEVER_SENT, ONCE)),
    "whole request": ((True, True), (TWICE, SENT_ONCE, ONCE)),
    "answered": ((True, True), (TWICE, SENT_ONCE, ONCE)),
    "before settle": ((True, True), (TWICE, SENT_ONCE, ONCE)),
    "after settle": ((False, False), (ONCE, ONCE, ONCE)),
}
# A second death, while what became of the first one is looked up. Nothing is marked
# then: a question may be put again.
SECOND = ("in doubt", "looked up")
FIRST = ("marked", "whole request")  # in turns
# `relay serve` is killed while Voucherify has the whole request.
LIKE = {"read": "first bytes", "processed": "whole request"}
# Of the request that has left at `first bytes`: a byte, half its head, all of that and
# half its body, all but the last byte.
PARTS = (0.0, 0.5, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class Cell:
    step: str
    rule: str
    killed: str = "worker"

    def __str__(self) -> str:
        return "-".join((self.killed, self.step, self.rule)).replace(" ", "_")

    @property
    def must(self) -> Seen:
        """What must be seen, each time."""
        if self.killed == "Redis":
            return ONCE  # the worker has the answer, and waits until Redis is back
        if self.step in SECOND:
            return ONCE
        _, fates = STEPS[LIKE.get(self.step, self.step)]
        return fates[RULES.index(self.rule)]


WORKER = [Cell(step, rule) for step in STEPS for rule in RULES]
WORKER += [Cell(step, "verify") for step in SECOND]
REDIS = [
    Cell(step, rule, killed)
    for killed in ("Redis", "Redis and worker")
    for step in ("marked", "before settle")
    for rule in RULES
]
# Voucherify has read the request and done nothing yet, or has processed it.
RELAY = [Cell(step, rule, "relay") for step in LIKE for rule in RULES]


@dataclass
class Workshop:
    """Where workers are made, and the Voucherify that all of them call."""

    process: asyncio.subprocess.Process
    running: RunningSandbox
    log: Path
    _runs: Iterator[int] = field(default_factory=count)
    _said: dict[int, "asyncio.Future[str]"] = field(default_factory=dict)
    _ended: dict[int, "asyncio.Future[int]"] = field(default_factory=dict)
    _arrived: Counter[str] = field(default_factory=Counter)
    _counted: int = 0

    async def hear(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            report = msgspec.json.decode(line, type=Report)
            if report.ended is None:
                self._said[report.run].set_result(report.said)
            else:
                self._ended[report.run].set_result(report.ended)

    def start(
        self,
        url: str,
        prefix: str,
        *,
        rule: str,
        step: str = "",
        part: float = 0.0,
        server: int = 0,
        survives: bool = False,
        wrong: str = "",
    ) -> "Worker":
        run, loop = next(self._runs), asyncio.get_running_loop()
        said = self._said[run] = loop.create_future()
        ended = self._ended[run] = loop.create_future()
        config = self.running.sandbox.config
        order = Order(
            run=run,
            redis=url,
            prefix=prefix,
            cluster=self.running.url,
            application_id=config.application_id,
            client_token=config.client_token,
            origin=ORIGIN,
            server_keys=(
                (config.server_app_id, config.server_app_token)
                if rule == "verify"
                else None
            ),
            step=step,
            part=part,
            server=server,
            survives=survives,
            wrong=wrong,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(order) + b"\n")
        return Worker(said, ended)

    def arrived(self, n: str) -> int:
        """How often Voucherify has processed an event."""
        events = self.running.sandbox.events
        for record in events[self._counted :]:
            assert isinstance(record.body, dict)
            self._arrived[record.body["metadata"]["n"]] += 1
        self._counted = len(events)
        return self._arrived[n]


@dataclass(frozen=True, slots=True)
class Worker:
    said: "asyncio.Future[str]"  # the step it has come to
    ended: "asyncio.Future[int]"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def workshop(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Workshop]:
    log = tmp_path_factory.mktemp("workers") / "log"
    config = SandboxConfig(client_limit=None, keep_requests=1_000_000)
    async with serve_sandbox(config) as running:
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.doomed"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=out,
                cwd=Path(__file__).parents[2],
            )
        made = Workshop(process, running, log)
        hearing = asyncio.create_task(made.hear())
        yield made
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await hearing
        running.sandbox.assert_clean()


@asynccontextmanager
async def bench_of(url: str, prefix: str) -> AsyncIterator[Bench]:
    queue = Queue(url=url, prefix=prefix, timeout=5.0)
    bench = Bench(queue, Clock(url, prefix), redis.asyncio.Redis.from_url(url))
    try:
        yield bench
    finally:
        await bench.aclose()


async def fill(bench: Bench, prefix: str, rule: str) -> list[str]:
    """Three events: the one that meets the death, and two plain ones behind it."""
    names = [f"{prefix}-{i}" for i in range(3)]
    lanes = ("high", "normal", "normal")
    events = [
        event(
            f"id-{n}",
            lane=lane,
            delivery=delivery.replace("verify", "verify:n"),
            body=json.dumps(
                {"event": "e", "customer": {"source_id": n}, "metadata": {"n": n}}
            ),
        )
        for n, lane, delivery in zip(names, lanes, (rule, *PLAIN), strict=True)
    ]
    await bench.take(*events)
    return names


async def known(bench: Bench) -> tuple[bool, bool]:
    """Whether the first event is in flight, and marked as sent, as Redis has it."""
    key = f"{bench.queue.prefix}:"
    flying = await bench.client.xlen(f"{key}q:high")
    marked = await bench.client.hlen(f"{key}sent")
    return flying == 1, marked == 1


async def fate(shop: Workshop, bench: Bench, names: list[str]) -> Seen:
    """What became of the first event; of the others, each arrived once."""
    assert await left(bench.client, bench.queue.prefix.strip("{}")) == 0
    await bench.balanced()
    totals, dead = await bench.totals(), await bench.dead()
    assert totals["received"] == len(names)
    assert totals.get("delivered", 0) + len(dead) == len(names)
    assert [letter["id"] for letter in dead] == [f"id-{names[0]}"] * len(dead)
    assert [shop.arrived(n) for n in names[1:]] == [1, 1]
    outcome = dead[0]["outcome"] if dead else "delivered"
    return Seen(shop.arrived(names[0]), outcome)


async def crash(shop: Workshop, url: str, cell: Cell, run: int) -> Seen:
    """One run with a worker that is killed; what was seen."""
    prefix = f"test-{secrets.token_hex(6)}"
    async with bench_of(url, prefix) as bench:
        names = await fill(bench, prefix, cell.rule)
        part = PARTS[run % len(PARTS)]
        if cell.step in SECOND:
            first = FIRST[run % len(FIRST)]
            await die(shop, url, prefix, first, cell.rule, part=part)
        await die(shop, url, prefix, cell.step, cell.rule, part=part)
        if cell.step in SECOND:
            assert await bench.client.hlen(f"{bench.queue.prefix}:sent") == 0
        else:
            (flying, marked), _ = STEPS[cell.step]
            marked = marked and cell.rule != "at_least_once"
            assert await known(bench) == (flying, marked)
        return await taken_over(shop, bench, url, prefix, names, cell.rule)


async def die(
    shop: Workshop,
    url: str,
    prefix: str,
    step: str,
    rule: str,
    part: float = 0,
    wrong: str = "",
) -> None:
    """Let a worker be killed, and see that it was, and where."""
    worker = shop.start(url, prefix, rule=rule, step=step, part=part, wrong=wrong)
    assert await worker.ended == -signal.SIGKILL, shop.log.read_text()
    assert await worker.said == step


async def taken_over(
    shop: Workshop, bench: Bench, url: str, prefix: str, names: list[str], rule: str
) -> Seen:
    """Let a healthy worker deliver what is left."""
    healthy = shop.start(url, prefix, rule=rule)
    assert await healthy.ended == 0, shop.log.read_text()
    seen = await fate(shop, bench, names)
    for key in [key async for key in bench.client.scan_iter(f"{{{prefix}}}*")]:
        await bench.client.unlink(key)
    return seen


Results = dict[Cell, list[Seen]]


async def all_runs(
    cells: list[Cell], runs: int, one: Callable[[Cell, int], Awaitable[Seen]]
) -> Results:
    """Run each cell so often, many at a time."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def run(cell: Cell, number: int) -> Seen:
        async with turns:
            return await one(cell, number)

    async with asyncio.TaskGroup() as group:
        tasks = {c: [group.create_task(run(c, i)) for i in range(runs)] for c in cells}
    return {cell: [task.result() for task in those] for cell, those in tasks.items()}


@pytest.fixture(scope="module")
async def deaths(workshop: Workshop, valkey_url: str) -> Results:
    """Every cell in which the worker is killed."""

    async def one(cell: Cell, run: int) -> Seen:
        return await crash(workshop, valkey_url, cell, run)

    return await all_runs(WORKER, RUNS, one)


@contextmanager
def own_server(directory: Path) -> Iterator["Server"]:
    server = Server(directory)
    try:
        yield server
    finally:
        server.kill()


class Server:
    """A Redis of one run, which has each change on disk before it answers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = directory / "s"
        self.url = f"unix://{self.path}"

    async def start(self) -> int:
        """Start it, or start it again on the same file; its process."""
        self._spawn()

        async def up() -> bool:
            async with redis.asyncio.Redis.from_url(self.url) as client:
                with suppress(redis.RedisError):
                    return bool(await client.ping())
            return False

        await eventually(up)
        return self._process.pid

    def _spawn(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.path),
            "dir": str(self._directory),
            "logfile": str(self._directory / "log"),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
        }
        words = [
            word for name, value in options.items() for word in (f"--{name}", value)
        ]
        self._process = subprocess.Popen([str(find_binary()), *words])

    def killed(self) -> None:
        """See that it was killed, by somebody else."""
        assert self._process.wait() == -signal.SIGKILL

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


async def redis_crash(shop: Workshop, directory: Path, cell: Cell) -> Seen:
    """One run with a Redis that is killed, alone or with the worker; what was seen."""
    prefix = f"test-{secrets.token_hex(6)}"
    survives = cell.killed == "Redis"
    with own_server(directory) as server:
        pid = await server.start()
        async with bench_of(server.url, prefix) as bench:
            names = await fill(bench, prefix, cell.rule)
            worker = shop.start(
                server.url,
                prefix,
                rule=cell.rule,
                step=cell.step,
                server=pid,
                survives=survives,
            )
            assert await worker.said == cell.step, shop.log.read_text()
            server.killed()
            if not survives:
                assert await worker.ended == -signal.SIGKILL
            await server.start()
        async with bench_of(server.url, prefix) as bench:
            if survives:
                assert await worker.ended == 0, shop.log.read_text()
                return await fate(shop, bench, names)
            assert await known(bench) == (True, cell.rule != "at_least_once")
            return await taken_over(shop, bench, server.url, prefix, names, cell.rule)


@pytest.fixture(scope="module")
async def redis_deaths(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """Every cell in which Redis is killed."""

    async def one(cell: Cell, _: int) -> Seen:
        return await redis_crash(workshop, tmp_path_factory.mktemp("redis"), cell)

    return await all_runs(REDIS, REDIS_RUNS, one)


@pytest.fixture(scope="module")
async def relay_deaths(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """`relay serve`, edge and forwarder in one, killed with all of this in flight."""
    prefix, directory = f"test-{secrets.token_hex(6)}", tmp_path_factory.mktemp("relay")
    names = {cell: [f"{cell}-{i}" for i in range(RELAY_RUNS)] for cell in RELAY}
    catalog = directory / "catalog.toml"
    catalog.write_text(
        "".join(
            f'[events.{rule}]\ndelivery = "{rule}"\nevent_id = "relay_id"\n'
            for rule in RULES
        )
    )
    config = SandboxConfig(client_limit=None)
    async with (
        stack(
            valkey_url,
            prefix,
            directory,
            sandbox=config,
            catalog=str(catalog),
            upstream_api="server",
            server_app_id=config.server_app_id,
            server_app_token=config.server_app_token,
        ) as relay,
        Sender() as sender,
    ):
        relay.module = "tests.doomed"
        for cell, those in names.items():
            for n in those:
                if cell.step == "read":
                    relay.sandbox.fail_next(
                        disconnect="close",
                        at="before_record",
                        delay=60,
                        source_id=f"c-{n}",
                    )
                else:
                    relay.sandbox.fail_next(delay=60, source_id=f"c-{n}")
        first = relay.start("serve")
        url = await first.track_url()
        for cell, those in names.items():
            for n in those:
                assert await sender.send(url, n, name=cell.rule) == 202

        async def all_in_flight() -> bool:
            return not relay.sandbox.faults()

        await eventually(all_in_flight)
        first.kill()
        assert first.popen.returncode == -signal.SIGKILL
        relay.start("serve")
        await relay.drained()
        arrived = Counter(relay.delivered_ids())
        dead = {d["id"]: d["outcome"] for d in await relay.bench.dead()}
        return {
            cell: [Seen(arrived[n], dead.get(f"id-{n}", "delivered")) for n in those]
            for cell, those in names.items()
        }


@pytest.mark.parametrize("cell", WORKER, ids=str)
async def test_a_worker_killed_at_a_step(cell: Cell, deaths: Results) -> None:
    assert deaths[cell] == [cell.must] * RUNS


@pytest.mark.parametrize("cell", REDIS, ids=str)
async def test_redis_killed_at_a_step(cell: Cell, redis_deaths: Results) -> None:
    assert redis_deaths[cell] == [cell.must] * REDIS_RUNS


@pytest.mark.parametrize("cell", RELAY, ids=str)
async def test_the_whole_relay_killed(cell: Cell, relay_deaths: Results) -> None:
    assert relay_deaths[cell] == [cell.must] * RELAY_RUNS


# --- the matrix itself ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "step", "rule", "found"),
    [
        ("marked after it is sent", "whole request", "at_most_once", TWICE),
        ("marked after it is sent", "answered", "at_most_once", TWICE),
        ("settled before it is sent", "marked", "at_least_once", Seen(0, "delivered")),
    ],
)
async def test_a_wrong_order_of_things_is_found(
    wrong: str,
    step: str,
    rule: str,
    found: Seen,
    workshop: Workshop,
    valkey_url: str,
) -> None:
    prefix = f"test-{secrets.token_hex(6)}"
    async with bench_of(valkey_url, prefix) as bench:
        names = await fill(bench, prefix, rule)
        await die(workshop, valkey_url, prefix, step, rule, wrong=wrong)
        seen = await taken_over(workshop, bench, valkey_url, prefix, names, rule)
    assert seen == found
    assert seen != Cell(step, rule).must


async def test_a_worker_that_does_not_come_to_the_step_is_found(
    workshop: Workshop, valkey_url: str
) -> None:
    prefix = f"test-{secrets.token_hex(6)}"
    async with bench_of(valkey_url, prefix) as bench:
        await fill(bench, prefix, "at_least_once")
        with pytest.raises(AssertionError):
            await die(workshop, valkey_url, prefix, "no such step", "at_least_once")


# --- docs/delivery.md -----------------------------------------------------------------


async def test_the_document_has_the_table(
    deaths: Results, redis_deaths: Results, relay_deaths: Results
) -> None:
    text = DOCUMENT.read_text("utf-8")
    found = re.search(r"<!-- crashes -->\n(.*?)<!-- /crashes -->", text, re.DOTALL)
    assert found is not None
    seen = table(deaths | redis_deaths | relay_deaths)
    if os.environ.get("EVERY_CELL"):
        print(seen)  # noqa: T201  # what was asked for
        start, end = found.span(1)
        DOCUMENT.write_text(text[:start] + seen + text[end:], "utf-8")
        return
    assert found[1] == seen


def table(results: Results) -> str:
    """What was seen, as Markdown."""
    columns = (
        *("killed", "step", "rule", "runs", "delivered", "of these twice"),
        *("ambiguous", "of these arrived", "lost"),
    )
    rows = [columns, ("---",) * len(columns)]
    for cell, seen in results.items():
        delivered = [s for s in seen if s.outcome == "delivered" and s.arrived]
        ambiguous = [s for s in seen if s.outcome == "ambiguous"]
        numbers = (
            len(seen),
            len(delivered),
            sum(s.arrived > 1 for s in delivered),
            len(ambiguous),
            sum(s.arrived > 0 for s in ambiguous),
            len(seen) - len(delivered) - len(ambiguous),
        )
        rows.append((cell.killed, cell.step, f"`{cell.rule}`", *map(str, numbers)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
