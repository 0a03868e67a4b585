"""The relay as it is measured, with a real Redis and a stand-in for Voucherify.

`settings()` is what the relay gets: its defaults, addresses and credentials, and two
things without which one machine cannot load it. The load generator counts as a proxy
(`trusted_proxies`), so that each beacon can come from another address, as in life;
and the limit for the whole site has a number that a saturated core cannot reach. All
three limits are evaluated for each event, and every check is on.
"""

import json
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from time import monotonic, sleep, time
from typing import cast

import redis

from bench.machine import OTHER_CORE, ROOT, SERVER_CORE, WORK, find
from bench.processes import BenchError, Program, free_port, running
from relay.limits import DEFAULT_LIMITS
from relay.outcomes import Outcome
from relay.signing import Signer

PYTHON = sys.executable
ORIGIN = "https://shop.example"
SIGNING_KEY = "a-key-of-the-benchmark-that-opens-nothing"
TOKENS = 20_000
REWRITE_S = 60  # how long Redis may take to write its file anew

# The names of what differs from the defaults, and why; a test holds it to these.
DIFFERENT = {
    "port": "address",
    "ops_port": "address",
    "redis_url": "address",
    "data_dir": "address",
    "cluster": "address",
    "allowed_origins": "needed: no default",
    "client_application_id": "credentials",
    "client_token": "credentials",
    "origin": "needed: no default",
    "trusted_proxies": "each beacon from another address",
    "limits": "the number of the site's limit alone",
}
SITE = "site=20000/1m"  # the default
SITE_HERE = "site=6000000/1m"  # 100,000 a second, the most that can be set


def settings(
    *, port: int, ops_port: int, redis_url: str, cluster: str
) -> dict[str, str]:
    """The environment of the measured relay."""
    return {
        "RELAY_PORT": str(port),
        "RELAY_OPS_PORT": str(ops_port),
        "RELAY_REDIS_URL": redis_url,
        "RELAY_DATA_DIR": str(WORK / "data"),
        "RELAY_CLUSTER": cluster,
        "RELAY_ALLOWED_ORIGINS": ORIGIN,
        "RELAY_CLIENT_APPLICATION_ID": "11111111-2222-3333-4444-555555555555",
        "RELAY_CLIENT_TOKEN": "66666666-7777-8888-9999-000000000000",
        "RELAY_ORIGIN": "shop.example",
        "RELAY_TRUSTED_PROXIES": "127.0.0.1",
        "RELAY_LIMITS": DEFAULT_LIMITS.replace(SITE, SITE_HERE),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What Redis holds: how many events came in, and where they are now."""

    received: int
    outcomes: dict[str, int]
    waiting: int

    def since(self, before: "Counts") -> "Counts":
        """What has come in between."""
        outcomes = {
            name: n - before.outcomes.get(name, 0) for name, n in self.outcomes.items()
        }
        return Counts(
            received=self.received - before.received,
            outcomes={name: n for name, n in outcomes.items() if n},
            waiting=self.waiting - before.waiting,
        )


class Store:
    """The Redis of the benchmark."""

    def __init__(self, program: Program, port: int) -> None:
        self.program = program
        self.url = f"redis://127.0.0.1:{port}/0"
        self._client = redis.Redis.from_url(self.url)

    def counts(self) -> Counts:
        """Read totals and queue. Raises `BenchError` when they do not add up."""
        pipe = self._client.pipeline(transaction=True)
        pipe.hgetall("{relay}:totals")
        lanes = [f"{{relay}}:q:{lane}" for lane in ("high", "normal", "low", "retry")]
        for lane in (*lanes, *(f"{lane}:behind" for lane in lanes)):
            pipe.xlen(lane)
        pipe.zcard("{relay}:delayed")
        totals, *lengths = pipe.execute()
        told = {name.decode(): int(n) for name, n in totals.items()}
        received = told.pop("received", 0)
        outcomes = {name: told.get(name, 0) for name in map(str, Outcome)}
        waiting = sum(lengths)
        if received != sum(outcomes.values()) + waiting:
            msg = f"{received} received, but {outcomes} and {waiting} waiting"
            raise BenchError(msg)
        return Counts(received=received, outcomes=outcomes, waiting=waiting)

    def memory(self) -> int:
        """Bytes that the data take, by Redis' own account."""
        told = cast("dict[str, int]", self._client.info("memory"))
        return told["used_memory"]

    def bytes_of_queue(self) -> int:
        """Bytes of the lanes themselves; ids, marks and counters are others."""
        return self._bytes_of(f"q:{lane}" for lane in ("high", "normal", "low"))

    def bytes_of_limits(self) -> int:
        """Bytes of the limits' numbers, which pass: the default ones' in 70 s."""
        names = [f"limit:{dimension}" for dimension in ("ip", "customer", "site")]
        return self._bytes_of([*names, *(f"{name}:before" for name in names)])

    def _bytes_of(self, names: Iterable[str]) -> int:
        keys = [f"{{relay}}:{name}" for name in names]
        found = [self._client.memory_usage(key, samples=0) for key in keys]
        return sum(int(n or 0) for n in found)

    def rewrite(self) -> None:
        """Have the append-only file written anew, and wait: it is much work."""
        with suppress(redis.ResponseError):  # it has begun of itself
            self._client.bgrewriteaof()
        until = monotonic() + REWRITE_S
        while monotonic() < until:
            told = cast("dict[str, int]", self._client.info("persistence"))
            if not told["aof_rewrite_in_progress"] | told["aof_rewrite_scheduled"]:
                return
            sleep(0.1)
        raise BenchError("Redis did not end writing its file")

    def flush(self) -> None:
        """Empty it, file included."""
        self._client.flushall()


@contextmanager
def redis_server(
    *, fsync: str = "everysec", core: int | None = OTHER_CORE
) -> Iterator[Store]:
    """A Redis with an append-only file, on the disk of the repository."""
    binary = find("redis-server")
    if binary is None:
        raise BenchError("needs redis-server (Debian: apt install redis-server)")
    place = WORK / f"redis-{token_hex(4)}"
    port = free_port()
    command = redis_command(binary, port, place, fsync)
    with running(command, core=core, place=place, port=port) as program:
        yield Store(program, port)


def redis_command(binary: str, port: int, place: Path, fsync: str) -> list[str]:
    """A Redis as the relay runs its own, but for the address."""
    return [
        *(binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(place)),
        *("--appendonly", "yes", "--appendfsync", fsync, "--save", ""),
    ]


class Upstream:
    """The stand-in for Voucherify: what it has been sent."""

    def __init__(self, program: Program, port: int) -> None:
        self.program = program
        self.url = f"http://127.0.0.1:{port}"

    def told(self, path: str = "/count") -> dict[str, float]:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:  # noqa: S310
            return cast("dict[str, float]", json.load(answer))


@contextmanager
def upstream(
    *, delay_ms: int = 0, limit: str = "", core: int | None = OTHER_CORE
) -> Iterator[Upstream]:
    """A fast upstream, or one that takes its time and allows `calls/seconds`."""
    port = free_port()
    command = [PYTHON, "-m", "bench.upstream", str(port), str(delay_ms), limit]
    with running(
        command,
        core=core,
        place=WORK / f"upstream-{token_hex(4)}",
        env={"PYTHONPATH": str(ROOT)},
        port=port,
    ) as program:
        yield Upstream(program, port)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server under test."""

    program: Program
    url: str


@contextmanager
def relay(
    store: Store,
    cluster: str,
    *options: str,
    command: str = "serve",
    core: int | None = SERVER_CORE,
    changes: Mapping[str, str] | None = None,
    tree: Path = ROOT,
) -> Iterator[Served]:
    """`relay serve`, or another command; `changes` are settings by variable.

    `tree` is where its source is.
    """
    port, ops_port = free_port(), free_port()
    env = settings(port=port, ops_port=ops_port, redis_url=store.url, cluster=cluster)
    with running(
        [PYTHON, "-m", "relay", command, *options],
        core=core,
        place=WORK / f"relay-{token_hex(4)}",
        env=env | dict(changes or {}) | {"PYTHONPATH": str(tree)},
        port=port if command == "serve" else ops_port,
    ) as program:
        yield Served(program=program, url=f"http://127.0.0.1:{port}/track")


@contextmanager
def floor(*, workers: int = 1, core: int | None = SERVER_CORE) -> Iterator[Served]:
    """The bare uvicorn application."""
    port = free_port()
    command = [PYTHON, "-m", "bench.floors", str(port)]
    if workers > 1:
        command = [PYTHON, "-m", "uvicorn", "bench.floors:app", "--port", str(port)]
        command += ["--workers", str(workers), "--backlog", "2048", "--ws", "none"]
        command += ["--no-access-log", "--no-server-header", "--no-proxy-headers"]
    with running(
        command,
        core=core,
        place=WORK / f"floor-{token_hex(4)}",
        env={"PYTHONPATH": str(ROOT)},
        port=port,
    ) as program:
        yield Served(program=program, url=f"http://127.0.0.1:{port}/track")


def token_file() -> Path:
    """A file of signed tokens, each of another customer; one a line."""
    signer = Signer([SIGNING_KEY], ttl_s=86_400)
    path = WORK / "tokens"
    WORK.mkdir(parents=True, exist_ok=True)
    now = time()
    made = (signer.sign(source_id=f"shopper-{n}", now=now)[0] for n in range(TOKENS))
    path.write_text("\n".join(made))
    return path
