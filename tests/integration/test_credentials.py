"""Two APIs, four kinds of credentials: what Voucherify gets, and tokens that end.

Real queue, real forwarder, and the sandbox, which knows no mercy with credentials.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import redis.asyncio
from pydantic import SecretStr
from structlog.testing import capture_logs

from relay import oauth
from relay.cluster import Api, Keys
from relay.forwarder import Forwarder
from relay.grants import EVENT_SCOPES, Grant
from relay.limits import parse_budget
from relay.outcomes import Hold, Outcome
from relay.queue import Queue
from relay.sandbox import (
    APPLICATION_ID,
    CLIENT_TOKEN,
    OAUTH_APP_ID,
    OAUTH_APP_SECRET,
    ORIGIN,
    PROJECT_ID,
    SERVER_APP_ID,
    SERVER_APP_TOKEN,
    Fault,
    Sandbox,
    SandboxConfig,
    serve_sandbox,
)
from relay.verdicts import Verdict
from relay.voucherify import Voucherify
from tests.integration.stack import Stack, stack
from tests.queues import Bench, Clock, event
from tests.support import eventually

pytestmark = pytest.mark.anyio

PLAIN, PAYING = "at_least_once", "at_most_once"
LIFE_S = 900.0
SECRETS = (CLIENT_TOKEN, SERVER_APP_TOKEN, OAUTH_APP_SECRET)

KEYS: dict[Api, Keys] = {
    "client": Keys(app_id=APPLICATION_ID, token=SecretStr(CLIENT_TOKEN)),
    "server": Keys(app_id=SERVER_APP_ID, token=SecretStr(SERVER_APP_TOKEN)),
}


def grant(scheme: str, api: Api) -> Grant | None:
    if scheme == "oauth2":
        return Grant(
            version=2,
            app_id=OAUTH_APP_ID,
            secret=SecretStr(OAUTH_APP_SECRET),
            scope="events.create",
            project_id=PROJECT_ID,
        )
    if scheme == "keys":
        return None
    return Grant(
        version=1,
        app_id=SERVER_APP_ID,
        secret=SecretStr(SERVER_APP_TOKEN),
        scope=EVENT_SCOPES[api],
    )


@dataclass
class Monotonic:
    """A clock that stands still until a test moves it."""

    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Shop:
    """One cluster, one queue, and the relays that deliver from it."""

    sandbox: Sandbox
    url: str
    redis_url: str
    bench: Bench
    clock: Monotonic = field(default_factory=Monotonic)

    @asynccontextmanager
    async def forwarder(
        self,
        scheme: str = "oauth1",
        api: Api = "client",
        *,
        budget: str = "off",
        concurrency: int = 32,
    ) -> AsyncIterator[Forwarder]:
        """One relay, as a process has it: its own queue, pool and copy of the token."""
        queue = Queue(
            url=self.redis_url,
            prefix=self.bench.queue.prefix[1:-1],
            budget=parse_budget(budget),
            timeout=5.0,
        )
        upstream = Voucherify(
            base_url=self.url,
            api=api,
            origin=ORIGIN,
            keys=KEYS[api] if "keys" in scheme else None,
            grant=grant(scheme, api),
            store=queue,
            max_connections=concurrency,
            monotonic=self.clock,
        )
        made = Forwarder(
            queue=queue,
            upstream=upstream,
            concurrency=concurrency,
            backoff=lambda _attempt, _told: 20,
        )
        running = asyncio.create_task(made.run())
        try:
            yield made
        finally:
            made.stop()
            await running
            await upstream.aclose()
            await queue.aclose()

    async def send(self, *names: str, delivery: str = PAYING) -> None:
        for name in names:
            body = {"event": name, "customer": {"source_id": "c"}}
            await self.bench.take(
                event(name=name, delivery=delivery, body=json.dumps(body))
            )

    async def outcomes(self) -> dict[str, int]:
        totals = await self.bench.totals()
        return {n: totals[n] for n in map(str, Outcome) if totals.get(n)}

    async def settled(self, within: float = 30) -> dict[str, int]:
        async def quiet() -> bool:
            gauges = await self.bench.gauges()
            return all(gauges[g] == "0" for g in ("queued", "in_flight", "delayed"))

        await eventually(quiet, within=within)
        return await self.outcomes()

    async def held(self, hold: str) -> None:
        async def so() -> bool:
            gauges = await self.bench.gauges()
            return gauges["hold"] == hold and gauges["in_flight"] == "0"

        await eventually(so)

    async def probe(self) -> None:
        """What waiting would bring, at once: a probe, and what was held comes back."""
        client, prefix = self.bench.client, self.bench.queue.prefix
        await client.hset(f"{prefix}:flow", "probe_at_ms", 0)
        held = cast("list[bytes]", await client.zrange(f"{prefix}:delayed", 0, -1))
        if held:
            due = dict.fromkeys(held, 0)
            await client.zadd(f"{prefix}:delayed", due, xx=True)

    async def probed(self) -> None:
        before = self.sandbox.counts()["requests"]
        await self.probe()

        async def asked() -> bool:
            return self.sandbox.counts()["requests"] != before

        await eventually(asked)

    @property
    def minted(self) -> int:
        return cast("int", self.sandbox.counts()["tokens_minted"])

    def answered(self, status: int) -> int:
        by_status = cast("dict[str, int]", self.sandbox.counts()["by_status"])
        return by_status.get(str(status), 0)


@asynccontextmanager
async def opened(
    redis_url: str, prefix: str, config: SandboxConfig | None = None
) -> AsyncIterator[Shop]:
    shop_clock = Monotonic()
    sandbox = Sandbox(
        config or SandboxConfig(client_limit=None),
        wall=lambda: time.time() + shop_clock.now - 1_000.0,
    )
    async with serve_sandbox(sandbox=sandbox) as running:
        bench = Bench(
            Queue(url=redis_url, prefix=prefix, timeout=5.0),
            Clock(redis_url, prefix),
            redis.asyncio.Redis.from_url(redis_url),
        )
        try:
            yield Shop(sandbox, running.url, redis_url, bench, shop_clock)
            await bench.balanced()
            sandbox.assert_clean()
        finally:
            await bench.aclose()


@pytest.fixture
async def shop(valkey_url: str, prefix: str) -> AsyncIterator[Shop]:
    async with opened(valkey_url, prefix) as made:
        yield made


# What Voucherify gets

ALWAYS = {
    "host",
    "content-length",
    "content-type",
    "accept",
    "user-agent",
    "x-voucherify-channel",
}
CLIENT_KEYS = {"x-client-application-id", "x-client-token"}
SERVER_KEYS = {"x-app-id", "x-app-token"}
OF_THE_API: dict[Api, set[str]] = {"client": {"origin"}, "server": set()}
OF_THE_SCHEME: dict[tuple[Api, str], set[str]] = {
    ("client", "keys"): CLIENT_KEYS,
    ("server", "keys"): SERVER_KEYS,
    ("client", "oauth1"): {"authorization"},
    ("server", "oauth1"): {"authorization"},
    ("client", "oauth2"): {"authorization"},
    ("server", "oauth2"): {"authorization"},
    ("client", "keys+oauth1"): CLIENT_KEYS | {"authorization"},
    ("server", "keys+oauth1"): SERVER_KEYS | {"authorization"},
}
PATHS: dict[Api, str] = {"client": "/client/v1/events", "server": "/v1/events"}
OF_A_TOKEN_REQUEST = {"host", "content-length", "content-type", "accept", "user-agent"}
TOKEN_REQUESTS: dict[str, tuple[str, set[str]] | None] = {
    "keys": None,
    "oauth1": ("/v1/oauth/token", SERVER_KEYS),
    "oauth2": ("/v2/oauth/token", {"authorization"}),
    "keys+oauth1": ("/v1/oauth/token", SERVER_KEYS),
}
ROWS = list(OF_THE_SCHEME)


@pytest.mark.parametrize(
    ("api", "scheme"), ROWS, ids=[f"{api}-{scheme}" for api, scheme in ROWS]
)
async def test_every_scheme_against_both_apis(
    shop: Shop, api: Api, scheme: str
) -> None:
    if scheme == "keys+oauth1":
        shop.sandbox.expect("keys_and_bearer")
    await shop.send("one", "two")
    async with shop.forwarder(scheme, api):
        assert await shop.settled() == {"delivered": 2}

    for record in shop.sandbox.events:
        assert (record.method, record.path) == ("POST", PATHS[api])
        expected = ALWAYS | OF_THE_API[api] | OF_THE_SCHEME[api, scheme]
        assert set(record.headers) == expected
        assert record.headers.get("origin") == (ORIGIN if api == "client" else None)
        assert record.headers.get("authorization", "Bearer ***") == "Bearer ***"
    asked = [r for r in shop.sandbox.requests if r.path != PATHS[api]]
    request = TOKEN_REQUESTS[scheme]
    if request is None:
        assert asked == []
        return
    path, credentials = request
    [record] = asked
    assert (record.method, record.path) == ("POST", path)
    assert set(record.headers) == OF_A_TOKEN_REQUEST | credentials
    assert record.headers.get("authorization", "Basic ***") == "Basic ***"
    assert record.headers["content-type"] == "application/x-www-form-urlencoded"
    assert record.headers["accept"] == "application/json"


@pytest.mark.parametrize("api", ["client", "server"])
async def test_a_cluster_that_refuses_keys_beside_a_token_holds_delivery(
    shop: Shop, api: Api
) -> None:
    shop.sandbox.expect("keys_and_bearer", "keys")
    shop.sandbox.configure(keys_with_bearer="reject")
    await shop.send("one", "two")
    async with shop.forwarder("keys+oauth1", api):
        await shop.held("auth_hold")
        await shop.probed()
        await shop.held("auth_hold")
    assert shop.minted == 1
    # The cure: one kind of credentials. The events are all still there.
    await shop.probe()
    async with shop.forwarder("oauth1", api):
        assert await shop.settled() == {"delivered": 2}


@pytest.mark.parametrize("status", [401, 403])
async def test_a_token_without_the_scope_holds_delivery(
    shop: Shop, status: int
) -> None:
    shop.sandbox.expect("scope")
    shop.sandbox.configure(wrong_scope_status=status)
    narrow = Grant(
        version=1,
        app_id=SERVER_APP_ID,
        secret=SecretStr(SERVER_APP_TOKEN),
        scope="vouchers",
    )
    queue = shop.bench.queue
    upstream = Voucherify(base_url=shop.url, api="server", grant=narrow, store=queue)
    body = b'{"event":"e","customer":{"source_id":"c"}}'
    answer = await upstream.send(body)
    if answer.verdict is Verdict.RENEWED:  # it had to wait for the token
        answer = await upstream.send(body)
    assert (answer.verdict, answer.hold) == (Verdict.HOLD, Hold.AUTH)
    assert shop.minted == 1
    await upstream.aclose()


# Tokens that end


async def test_a_token_is_renewed_at_80_percent_and_no_event_notices(
    shop: Shop,
) -> None:
    with capture_logs() as logged:
        async with shop.forwarder():
            await shop.send("before")
            await shop.settled()
            shop.sandbox.fail_next(on="oauth", delay=0.3)
            shop.clock.now += 0.8 * LIFE_S
            names = [f"e{n}" for n in range(100)]
            for name in names:
                await shop.send(name)

            async def renewed() -> bool:
                return shop.minted == 2

            await eventually(renewed)
            await shop.send("after")
            assert await shop.settled() == {"delivered": 102}
    said = [line for line in logged if line["event"] == "forwarder.not_delivered"]
    # Only the very first could have had to wait.
    assert {line["reason"] for line in said} <= {"oauth_renewed"}
    assert len(said) <= 1
    assert (shop.minted, shop.answered(401)) == (2, 0)
    assert sorted(shop.sandbox.event_names()) == sorted(["before", *names, "after"])


async def test_a_token_that_expired_unused_is_replaced_before_anything_is_sent(
    shop: Shop,
) -> None:
    async with shop.forwarder():
        await shop.send("before")
        await shop.settled()
        shop.clock.now += LIFE_S + 1
        await shop.send("after")
        assert await shop.settled() == {"delivered": 2}
    assert (shop.minted, shop.answered(401)) == (2, 0)


@pytest.mark.parametrize("rule", [PLAIN, PAYING])
@pytest.mark.parametrize("relays", [1, 3])
async def test_a_revoked_token_is_renewed_once_and_every_event_arrives_once(
    valkey_url: str, prefix: str, rule: str, relays: int
) -> None:
    # As strict as Voucherify in proportion: 5 calls a window, of which we use 4.
    config = SandboxConfig(client_limit=5, client_limit_seconds=1.0)
    async with opened(valkey_url, prefix, config) as shop:
        shop.sandbox.expect("token")
        names = [f"e{n}" for n in range(12)]
        await shop.send(*names[:3], delivery=rule)
        async with asyncio.TaskGroup() as group:
            stop = asyncio.Event()
            for _ in range(relays):
                group.create_task(_deliver(shop, stop))
            await shop.settled()
            shop.sandbox.expire_tokens()
            await shop.send(*names[3:], delivery=rule)
            assert await shop.settled() == {"delivered": 12}
            stop.set()
        assert sorted(shop.sandbox.event_names()) == sorted(names)
        assert shop.minted == 2
        # What one window had in flight; each relay learns of it by its own.
        assert 1 <= shop.answered(401) <= 4 * relays
        assert shop.answered(429) == 0
        assert (await shop.bench.gauges())["hold"] == ""


async def _deliver(shop: Shop, stop: asyncio.Event) -> None:
    async with shop.forwarder(budget="4/1s"):
        await stop.wait()


async def test_waiting_for_the_first_token_makes_no_crowd_at_the_limit(
    valkey_url: str, prefix: str
) -> None:
    config = SandboxConfig(client_limit=5, client_limit_seconds=1.0)
    async with opened(valkey_url, prefix, config) as shop:
        # Those of the first window would leave together with those of the second.
        shop.sandbox.fail_next(on="oauth", delay=0.95)
        await shop.send(*(f"e{n}" for n in range(12)))
        async with shop.forwarder(budget="4/1s"):
            assert await shop.settled() == {"delivered": 12}
        assert (shop.minted, shop.answered(429)) == (1, 0)


async def test_a_cluster_that_refuses_every_token_is_held_and_not_flooded(
    shop: Shop,
) -> None:
    async with shop.forwarder() as _, shop.forwarder() as _:
        await shop.send("before")
        await shop.settled()
        shop.sandbox.fail_next(None, status=401)
        await shop.send(*(f"e{n}" for n in range(60)))
        await shop.held("auth_hold")
        # One renewal, which the first 401 asked for.
        assert shop.minted == 2
        minutes = 3
        for _ in range(minutes * 4):
            shop.clock.now += 15
            await shop.probed()
            await shop.held("auth_hold")
        assert shop.minted <= 2 + minutes
        assert await shop.outcomes() == {"delivered": 1}
        shop.sandbox.clear_faults()
        await shop.probe()
        assert await shop.settled() == {"delivered": 61}


# The token endpoint fails


@pytest.mark.parametrize(
    ("fault", "hold"),
    [
        ({"status": 401}, "auth_hold"),
        ({"status": 400}, "auth_hold"),
        ({"malformed": "wrong_shape"}, "config_hold"),
    ],
    ids=["401", "400", "garbled"],
)
async def test_a_refused_token_request_holds_delivery_and_loses_nothing(
    shop: Shop, fault: dict[str, object], hold: str
) -> None:
    shop.sandbox.fail_next(None, on="oauth", **fault)  # type: ignore[arg-type]  # the fault's own keywords
    await shop.send(*(f"e{n}" for n in range(32)))
    async with shop.forwarder():
        await shop.held(hold)
        assert shop.sandbox.counts()["requests"] == 1
        shop.sandbox.clear_faults()
        shop.clock.now += oauth.REFUSED_S
        await shop.probe()
        assert await shop.settled() == {"delivered": 32}
    assert len(shop.sandbox.events) == 32


async def test_a_token_endpoint_that_is_down_delays_and_loses_nothing(
    shop: Shop,
) -> None:
    shop.sandbox.fail_next(None, on="oauth", status=503)
    await shop.send(*(f"e{n}" for n in range(32)))
    async with shop.forwarder():
        await shop.held("breaker_open")
        assert await shop.outcomes() == {}
        shop.sandbox.clear_faults()
        shop.clock.now += oauth.AWAY_S
        await shop.probe()
        assert await shop.settled() == {"delivered": 32}
    assert len(shop.sandbox.events) == 32


async def test_a_429_for_a_token_is_obeyed_by_all(shop: Shop) -> None:
    shop.sandbox.expect("429")
    shop.sandbox.fail_next(on="oauth", status=429, headers={"Retry-After": "2"})
    await shop.send("one", "two")
    started = time.monotonic()
    async with shop.forwarder():

        async def paused() -> bool:
            prefix = shop.bench.queue.prefix
            return await shop.bench.client.pttl(f"{prefix}:pause:all") > 1_000

        await eventually(paused)
        shop.clock.now += 2
        assert await shop.settled() == {"delivered": 2}
    assert time.monotonic() - started >= 2


# Processes


@asynccontextmanager
async def relays_of(
    redis_url: str,
    prefix: str,
    directory: Path,
    config: SandboxConfig | None = None,
) -> AsyncIterator[Stack]:
    async with stack(
        redis_url,
        prefix,
        directory,
        sandbox=config,
        auth="oauth1",
        server_app_id=SERVER_APP_ID,
        server_app_token=SERVER_APP_TOKEN,
    ) as made:
        yield made


async def test_processes_share_one_token(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    config = SandboxConfig(client_limit=None, latency=0.02)
    async with relays_of(valkey_url, prefix, tmp_path, config) as relays:
        workers = [relays.start("worker") for _ in range(2)]
        for worker in workers:
            await worker.ready_url()
        await _take(relays.bench, 200)
        await relays.drained()
        assert len(relays.sandbox.events) == 200
        assert relays.sandbox.counts()["tokens_minted"] == 1
        said = "".join(worker.text for worker in workers)
    for secret in SECRETS:
        assert secret not in said


async def test_a_process_killed_while_it_renews_leaves_a_lock_that_ends(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with relays_of(valkey_url, prefix, tmp_path) as relays:
        relays.sandbox.fail_next(on="oauth", delay=30, status=503)
        await _take(relays.bench, 1)
        first = relays.start("worker")

        async def asking() -> bool:
            asked = relays.sandbox.counts()["requests"]
            return bool(asked and await _locks(relays.bench))

        await eventually(asking, within=30)
        first.kill()
        [lock] = await _locks(relays.bench)
        left_ms = await relays.bench.client.pttl(lock)
        assert 0 < left_ms <= oauth.LOCK_S * 1000
        await relays.bench.client.pexpire(lock, 500)  # what waiting would bring
        await _take(relays.bench, 5)
        second = relays.start("worker")

        async def delivered() -> bool:
            return len(relays.sandbox.events) >= 5

        # That of the killed one follows when its heart has been silent for long enough.
        await eventually(delivered, within=30)
        await second.stop()
        assert relays.sandbox.counts()["tokens_minted"] == 1


async def _locks(bench: Bench) -> Sequence[bytes]:
    found = await bench.client.keys(f"{bench.queue.prefix}:oauth:*:lock")
    return cast("Sequence[bytes]", found)


async def _take(bench: Bench, events: int) -> None:
    for n in range(events):
        body = {"event": "e", "customer": {"source_id": "c"}, "metadata": {"n": str(n)}}
        await bench.take(event(delivery=PAYING, body=json.dumps(body)))


# Secrets


async def test_no_secret_is_logged_or_kept(shop: Shop) -> None:
    shop.sandbox.expect("token")
    with capture_logs() as logged:
        async with shop.forwarder():
            await shop.send("one")
            await shop.settled()
            tokens = await _tokens(shop.bench)
            shop.sandbox.expire_tokens()
            await shop.send("two")
            await shop.settled()
            tokens += await _tokens(shop.bench)
            for number, status in enumerate((400, 404)):
                shop.sandbox.inject(_quoting(status, tokens[1]))
                await shop.send(f"quoted-{number}")
            assert await shop.settled() == {"delivered": 2, "rejected": 2}
    assert len(set(tokens)) == 2
    dead = await shop.bench.dead()
    assert "***" in dead[0]["error"]
    kept = [
        key
        for key in await shop.bench.client.keys(f"{shop.bench.queue.prefix}*")
        if b":oauth:" not in key
    ]
    dumped = [await shop.bench.client.dump(key) for key in kept]
    for secret in (*SECRETS, *tokens):
        assert secret not in f"{logged} {dead}"
        assert all(secret.encode() not in (dump or b"") for dump in dumped)


def _quoting(status: int, token: str) -> Fault:
    said = {"code": status, "key": "not_found", "message": f"Bearer {token} is fine"}
    return Fault(status=status, body=said)


async def _tokens(bench: Bench) -> list[str]:
    [key] = await bench.client.keys(f"{bench.queue.prefix}:oauth:*")
    value = await cast("Awaitable[bytes]", bench.client.hget(key, "value"))
    return [value.decode()]
