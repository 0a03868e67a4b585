"""A station is put together as the settings say, and tells whether it is fit."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from redis import Redis
from structlog.testing import capture_logs

from relay import assembly
from relay.assembly import (
    REAP_EVERY_S,
    UPSTREAM,
    Station,
    bind,
    http_url,
    listen,
    make_catalog,
    make_digests,
    make_policy,
    make_queue,
    tell_of_strangers,
)
from relay.catalog import EMPTY
from relay.edge import Edge, Head
from relay.embedded import EmbeddedServer, running_url
from relay.errors import RelayError
from relay.limits import DEFAULT_LIMITS, parse_limits
from relay.settings import STRANGERS, Role, Settings, load_settings
from tests.queues import event
from tests.support import eventually

pytestmark = pytest.mark.anyio


def settings(**given: object) -> Settings:
    return load_settings(
        Role.SERVE,
        {"RELAY_ENV_FILE": "/dev/null", "HOME": "/nowhere"},
        **{
            "allowed_origins": "https://shop.example",
            "client_application_id": "application-1",
            "client_token": "client-token-1",
            "origin": "https://shop.example",
            "cluster": "http://127.0.0.1:9",
            **given,
        },
    )


@asynccontextmanager
async def running(
    redis_url: str,
    *,
    reap_every_s: float = 0.1,
    forward: bool = False,
    **given: object,
) -> AsyncIterator[tuple[Station, httpx.AsyncClient]]:
    """A station between start and stop, and a client of its ops listener."""
    ops = listen("127.0.0.1", 0)
    station = Station(
        settings(**given),
        redis_url=redis_url,
        forward=forward,
        ops_socket=ops,
        reap_every_s=reap_every_s,
    )
    async with httpx.AsyncClient(base_url=http_url(ops), timeout=20) as client:
        async with station.running():
            yield station, client
        with pytest.raises(httpx.ConnectError):
            await client.get("/healthz")


async def checks(client: httpx.AsyncClient) -> tuple[int, dict[str, str]]:
    answer = await client.get("/readyz")
    return answer.status_code, answer.json()["checks"]


# Digests


def of_people(**given: object) -> list[str]:
    made = make_digests(settings(**given))
    return [
        made.address("192.0.2.1"),
        made.customer(source_id="u1"),
        made.customer(id="cust_1", source_id="u1"),
    ]


def test_digests_are_made_of_the_secret_alone_and_never_change() -> None:
    others = of_people(
        client_token="token-1",
        client_application_id="application-2",
        origin="https://other.example",
        allowed_origins="https://other.example",
        redis_prefix="other",
        limits="off",
        ops_token="ops-token-1a2b3c",
    )
    assert of_people(client_token="token-1") == others
    # Others would begin every limit anew, so this is as good as wire format.
    assert others == [
        "694883bc3fa7b26f95",
        "43ad7684af72e40c61",
        "1bf2ce1f9588f02531",
    ]


def test_another_token_makes_other_digests() -> None:
    assert set(of_people(client_token="client-token-2")).isdisjoint(of_people())


def test_relays_with_one_token_share_digests_and_others_do_not() -> None:
    def address(**given: object) -> str:
        made = settings(**given)
        edge = Edge(
            origins=made.allowed_origins,
            proxies=made.trusted_proxies,
            limits=made.limits,
            digests=make_digests(made),
            policy=make_policy(made, EMPTY),
        )
        head = edge.head("POST", {b"origin": b"https://shop.example"}, "192.0.2.1")
        assert isinstance(head, Head)
        return head.address

    assert address() == address(redis_prefix="other", limits="off")
    assert address() != address(client_token="client-token-2")


# The queue


async def test_the_queue_is_as_the_settings_say(valkey_url: str, prefix: str) -> None:
    queue = make_queue(
        settings(redis_prefix=prefix, egress="nat-1", upstream_budget="4/5s, 30/1m"),
        valkey_url,
    )
    try:
        assert queue.prefix == "{" + prefix + "}"
        assert (queue.egress, queue.rate) == ("nat-1", 0.5)
        assert queue.limits == parse_limits(DEFAULT_LIMITS)
    finally:
        await queue.aclose()


# Sockets


def test_a_port_that_is_taken_is_named_with_the_setting_to_change() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RelayError) as caught:
            bind("127.0.0.1", port, setting="RELAY_PORT")
    assert str(caught.value) == (
        f"Cannot listen on 127.0.0.1 port {port} (Address already in use): stop what "
        "uses it, or choose another port with RELAY_PORT."
    )


def test_an_address_of_another_machine_is_not_called_a_taken_port() -> None:
    with pytest.raises(RelayError, match="choose an address of this machine"):
        bind("192.0.2.1", 0, setting="RELAY_PORT")  # TEST-NET-1, RFC 5737


def test_who_connects_before_anybody_accepts_waits() -> None:
    with (
        listen("127.0.0.1", 0) as sock,
        socket.create_connection(sock.getsockname()) as early,
    ):
        accepted, _ = sock.accept()
        with accepted:
            accepted.sendall(b"at last")
        assert early.recv(16) == b"at last"


def test_an_ipv6_address_is_put_in_brackets() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    try:
        sock = listen("::1", 0)
    except OSError:
        pytest.skip("needs IPv6 on the loopback interface")
    with sock:
        assert http_url(sock) == f"http://[::1]:{sock.getsockname()[1]}"


# Delivery


def test_beacons_are_taken_without_the_client_that_delivers() -> None:
    """A start does not wait for it to be imported, and an edge alone has none."""
    code = "import relay.cli, relay.serving, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {"relay.protocol", "relay.forwarder"} < set(done.stdout.split())
    assert {"httpx", "aiohttp", UPSTREAM}.isdisjoint(done.stdout.split())


async def test_a_station_that_stops_at_once_delivers_nothing_and_leaves_nothing(
    valkey_url: str, prefix: str
) -> None:
    async with running(valkey_url, redis_prefix=prefix, forward=True):
        pass


async def test_a_fault_that_ends_the_delivery_ends_the_process(
    valkey_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go on taking events, and nobody would see that none leaves."""
    monkeypatch.setattr(assembly, "UPSTREAM", "relay.nowhere")
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    was = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    try:
        with capture_logs() as logs:
            async with running(valkey_url, redis_prefix=prefix, forward=True):
                await stopped.wait()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, was)
    assert [entry for entry in logs if entry["event"] == "delivery.failed"]


# Readiness


async def test_a_station_with_its_redis_is_ready(valkey_url: str, prefix: str) -> None:
    async with running(valkey_url, redis_prefix=prefix) as (_, client):
        assert await checks(client) == (200, {"redis": "ok", "queue": "ok"})


async def test_sixty_probes_at_once_are_all_told_the_same(
    valkey_url: str, prefix: str
) -> None:
    async with running(valkey_url, redis_prefix=prefix) as (_, client):
        told = await asyncio.gather(*(checks(client) for _ in range(60)))
        assert [status for status, _ in told] == [200] * 60


async def test_a_full_queue_is_not_ready_and_names_the_setting(
    valkey_url: str, prefix: str
) -> None:
    async with running(valkey_url, redis_prefix=prefix, queue_max=2) as (it, client):
        await it.queue.commit("test", 1, [("ip", [event(), event()])], [])

        async def unready() -> bool:
            return (await checks(client))[0] == 503

        await eventually(unready)
        _, said = await checks(client)
        assert said == {
            "redis": "ok",
            "queue": "full: 2 events wait, RELAY_QUEUE_MAX is reached",
        }


async def test_it_starts_without_redis_and_is_ready_once_that_is_there(
    tmp_path: Path, prefix: str
) -> None:
    async with running(running_url(tmp_path), redis_prefix=prefix) as (_, client):
        status, said = await checks(client)
        assert status == 503
        assert said["redis"].startswith("redis_unreachable: ")
        with EmbeddedServer(data_dir=tmp_path):

            async def ready() -> bool:
                return (await checks(client))[0] == 200

            await eventually(ready)
        status, said = await checks(client)
        assert status == 503


async def test_a_redis_that_evicts_is_refused_until_it_is_put_right(
    tmp_path: Path, prefix: str
) -> None:
    with EmbeddedServer(data_dir=tmp_path) as server, Redis.from_url(server.url) as ask:
        ask.config_set("maxmemory-policy", "allkeys-lru")
        async with running(server.url, redis_prefix=prefix) as (_, client):
            status, said = await checks(client)
            assert status == 503
            assert "allkeys-lru" in said["redis"]
            assert "set `maxmemory-policy noeviction`" in said["redis"]
            ask.config_set("maxmemory-policy", "noeviction")

            async def ready() -> bool:
                return (await checks(client))[0] == 200

            await eventually(ready)


# Housekeeping


async def test_the_gauges_are_kept_fresh_by_the_station_alone(
    valkey_url: str, prefix: str
) -> None:
    async with running(valkey_url, redis_prefix=prefix, reap_every_s=REAP_EVERY_S) as (
        station,
        _,
    ):

        async def written() -> str | None:
            return (await station.queue.hash("gauges")).get("updated_at_ms")

        await eventually(written)
        first = await written()

        async def again() -> bool:
            return await written() != first

        await eventually(again, within=2 * REAP_EVERY_S + 0.5)


async def test_a_hold_by_hand_is_logged_by_the_relay_and_leaves_it_ready(
    valkey_url: str, prefix: str
) -> None:
    with capture_logs() as lines:
        async with running(valkey_url, redis_prefix=prefix) as (station, client):

            def said(name: str) -> list[dict[str, object]]:
                return [dict(line) for line in lines if line["event"] == name]

            async def held() -> object:
                return said("delivery.held")

            async def resumed() -> object:
                return said("delivery.resumed")

            await station.queue.hold("Ana")
            await eventually(held)
            assert (await checks(client))[0] == 200
            await station.queue.resume()
            await eventually(resumed)
    [line] = said("delivery.held")
    assert line["reason"] == "Ana"


@pytest.mark.parametrize(
    ("tokens", "rule", "told"),
    [("required", "off", True), ("off", "required", False), ("off", "off", True)],
)
def test_what_a_catalogue_lets_strangers_do_is_said_at_the_start(
    tokens: str, rule: str, told: bool, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(f'[defaults]\nunlisted = "reject"\n[events.e]\ntoken = "{rule}"\n')
    made = settings(
        signing_keys="k" * 32, anonymous="trusted", tokens=tokens, catalog=str(path)
    )
    assert not [w for w in made.warnings if w.startswith("RELAY_ANONYMOUS")]
    with capture_logs() as lines:
        tell_of_strangers(made, make_catalog(made).catalog)
    said = [line["detail"] for line in lines if line["event"] == "settings.doubtful"]
    assert said == ([STRANGERS] if told else [])
