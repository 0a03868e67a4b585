"""Each finding of `relay check`, provoked for real, with its cure and no secret."""

import asyncio
import json
import os
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio

from relay.checks import Finding, check, lines, most_calls
from relay.limits import parse_budget
from relay.queue import Queue
from relay.sandbox.config import SandboxConfig
from relay.sandbox.server import serve_sandbox
from tests.programs import needs
from tests.queues import event, result
from tests.servers import start_server
from tests.test_cli import relay
from tests.test_docs import first_column, section

pytestmark = pytest.mark.anyio

UUID = "11111111-2222-3333-4444-555555555555"
ENVIRON = {
    "RELAY_ENV_FILE": os.devnull,
    "HOME": "/nowhere",
    "RELAY_ALLOWED_ORIGINS": "https://shop.example",
    "RELAY_CLIENT_APPLICATION_ID": UUID,
    "RELAY_CLIENT_TOKEN": "66666666-7777-8888-9999-000000000000",
    "RELAY_ORIGIN": "shop.example",
    "RELAY_ANONYMOUS": "restricted",
    # Nothing listens there (discard).
    "RELAY_REDIS_URL": "redis://127.0.0.1:9",
    "RELAY_CLUSTER": "http://127.0.0.1:9",
}
AWAY = {"sandbox_cluster", "cluster_unreachable", "redis_unreachable"}


async def found(**settings: str) -> dict[str, Finding]:
    given = {f"RELAY_{name.upper()}": value for name, value in settings.items()}
    findings = await check(ENVIRON | given)
    ranks = ["fault", "warning", "note"]
    assert [f.level for f in findings] == sorted(
        (f.level for f in findings), key=ranks.index
    )
    for finding in findings:
        assert finding.code in first_column(section("docs/operations.md", "Checks"))
        assert finding.detail.strip()
        assert finding.cure.strip()
    assert len(lines(findings)) == 3 * len(findings) + 2
    return {finding.code: finding for finding in findings}


def test_every_code_is_told() -> None:
    source = (Path(__file__).parents[1] / "relay" / "checks.py").read_text()
    told = first_column(section("docs/operations.md", "Checks"))
    assert len(told) == len(set(told)) > 20
    for code in told:
        assert f'"{code}"' in source, code


# --- settings -------------------------------------------------------------------------


async def test_what_is_away_is_told_once_and_the_rest_is_checked() -> None:
    told = await found()
    assert told.keys() == AWAY
    assert told["cluster_unreachable"].level == told["redis_unreachable"].level
    assert "refuses the connection" in told["cluster_unreachable"].detail


@pytest.mark.parametrize(
    ("setting", "value", "about"),
    [
        ("allowed_origins", "https://shop.example/path", "RELAY_ALLOWED_ORIGINS"),
        ("cluster", "http://api.voucherify.io", "RELAY_CLUSTER"),
        ("client_token_file", "/nowhere/token", "RELAY_CLIENT_TOKEN_FILE"),
        ("catalog", "/nowhere/catalog.toml", "RELAY_CATALOG"),
        ("origin", "", "RELAY_ORIGIN"),
    ],
)
async def test_a_wrong_setting_is_a_fault(setting: str, value: str, about: str) -> None:
    if setting == "client_token_file":
        told = await found(**{setting: value}, client_token="")
    else:
        told = await found(**{setting: value})
    assert told.keys() == {"setting"}
    assert (told["setting"].about, told["setting"].level) == (about, "fault")


@pytest.mark.parametrize(
    ("settings", "code", "level"),
    [
        ({"anonymous": "trusted"}, "anonymous_trusted", "warning"),
        ({"allowed_origins": "*"}, "any_origin", "warning"),
        ({"allowed_origins": "*", "anonymous": "trusted"}, "any_origin", "fault"),
        ({"signing_keys": "k" * 32, "tokens": "dry_run"}, "tokens_dry_run", "note"),
        ({"allowed_origins": "http://shop.example"}, "http_origin", "warning"),
        ({"redis_url": "redis://192.0.2.1:1"}, "redis_unencrypted", "warning"),
        ({"client_token": "tok"}, "odd_credentials", "note"),
        ({"server_app_token": ENVIRON["RELAY_CLIENT_TOKEN"]}, "same_keys", "warning"),
        ({"uds": "/run/relay.sock"}, "setting_doubtful", "warning"),
        ({"cluster": "relay.invalid:1"}, "setting", "fault"),
    ],
    ids=str,
)
async def test_a_doubtful_setting_is_told(
    settings: dict[str, str], code: str, level: str
) -> None:
    told = await found(**settings)
    assert told[code].level == level


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1", "https://shop.example"]
)
async def test_origins_of_developers_need_no_tls(origin: str) -> None:
    assert "http_origin" not in await found(allowed_origins=origin)


async def test_a_doubtful_catalogue_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[events.e]\nloyalty = true\n")
    told = await found(catalog=str(tmp_path / "c.toml"))
    assert "mint points" in told["catalog_doubtful"].detail


@pytest.mark.parametrize(
    ("budget", "calls"),
    [
        ("off", None),
        ("4/5s", 4),
        ("5/5s, 90/1m", 5),
        ("90/1m", 90),
        ("2/1s", 10),
        ("100/1h, 6/5s", 6),
    ],
)
def test_the_most_calls_of_a_budget(budget: str, calls: int | None) -> None:
    assert most_calls(parse_budget(budget), 5_000) == calls


async def test_a_budget_above_voucherifys_limit_is_told() -> None:
    cluster = "https://relay.invalid"  # never resolves (RFC 6761)
    above = {"upstream_budget": "90/1m", "cluster": cluster}
    assert "budget_above_limit" in await found(**above)
    keys = {"server_app_id": UUID, "server_app_token": UUID}
    assert "budget_above_limit" not in await found(
        **above, **keys, upstream_api="server"
    )
    told = await found(cluster=cluster)
    assert "budget_above_limit" not in told
    assert "(DNS)" in told["cluster_unreachable"].detail


# --- the cluster ----------------------------------------------------------------------


async def test_a_cluster_that_is_there_hears_no_event() -> None:
    async with serve_sandbox(SandboxConfig()) as running:
        told = await found(cluster=running.url)
        assert told.keys() == {"sandbox_cluster", "redis_unreachable"}
        assert running.sandbox.events == []
        running.sandbox.assert_clean()


@asynccontextmanager
async def answering(
    said: bytes, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server that says this to whoever connects; with nothing to say it hangs."""

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if said:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(said)
        else:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"


PAGE = b"Content-Type: text/html\r\nContent-Length: 2\r\n\r\nhi"
LATE = b"HTTP/1.1 204 No Content\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "code", "level"),
    [
        (b"HTTP/1.1 200 OK\r\n" + PAGE, "not_the_api", "fault"),
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            "not_the_api",
            "fault",
        ),
        (b"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n", "not_the_api", "fault"),
        (
            b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n",
            "cluster_failing",
            "warning",
        ),
        (b"SSH-2.0-OpenSSH\r\n", "cluster_unreachable", "fault"),
        (LATE, "clock_skew", "fault"),
    ],
    ids=["page", "other-404", "redirect", "down", "garbage", "late-clock"],
)
async def test_a_cluster_that_is_another_is_told(
    said: bytes, code: str, level: str
) -> None:
    async with answering(said) as url:
        told = await found(cluster=url)
    assert told[code].level == level


async def test_what_hangs_is_waited_for_in_bounds() -> None:
    began = time.monotonic()
    async with answering(b"") as url, answering(b"") as silent:
        told = await found(cluster=url, redis_url=silent.replace("http", "redis"))
    assert {"cluster_unreachable", "redis_unreachable"} <= told.keys()
    assert "did not answer in 5 s" in told["cluster_unreachable"].detail
    assert time.monotonic() - began < 20  # far more than 5 s, far less than for ever


@pytest.mark.parametrize(
    "marked", [pytest.param(None, marks=needs("openssl", package="openssl"))]
)
async def test_a_certificate_of_nobody_is_told(marked: None, tmp_path: Path) -> None:
    del marked
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(  # noqa: ASYNC221  # nothing else runs yet
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
            *(
                "-days",
                "1",
                "-subj",
                "/CN=localhost",
                "-keyout",
                str(key),
                "-out",
                str(cert),
            ),
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    async with answering(LATE, tls) as url:
        told = await found(cluster=url)
    assert told["cluster_tls"].level == "fault"


# --- Redis and its counters -----------------------------------------------------------


@asynccontextmanager
async def server(
    directory: Path, **config: str
) -> AsyncIterator[tuple[str, redis.asyncio.Redis]]:
    with start_server(None, directory) as url:
        client = redis.asyncio.Redis.from_url(url)
        for name, value in config.items():
            await client.config_set(name.replace("_", "-"), value)
        try:
            yield url, client
        finally:
            await client.aclose()


@pytest.mark.parametrize(
    ("config", "code", "level"),
    [
        ({"appendonly": "no"}, "redis_not_persistent", "fault"),
        ({"maxmemory_policy": "volatile-lru"}, "redis_evicts_marks", "warning"),
        ({"maxmemory_policy": "allkeys-lru"}, "redis_unfit", "fault"),
        ({"maxmemory": "1100000"}, "redis_nearly_full", "warning"),
    ],
    ids=str,
)
async def test_a_redis_that_could_lose_events_is_told(
    config: dict[str, str], code: str, level: str, tmp_path: Path
) -> None:
    async with server(tmp_path / "data", **config) as (url, _):
        told = await found(redis_url=url)
    assert told[code].level == level


async def test_a_sound_redis_gives_no_finding(valkey_url: str, prefix: str) -> None:
    async with serve_sandbox(SandboxConfig()) as running:
        told = await found(
            redis_url=valkey_url, redis_prefix=prefix, cluster=running.url
        )
    assert told.keys() == {"sandbox_cluster"}


async def test_the_private_server_is_looked_at_while_it_runs(tmp_path: Path) -> None:
    told = await found(redis_url="", data_dir=str(tmp_path / "data"))
    assert "no_relay_yet" in told
    async with server(tmp_path / "data"):
        told = await found(redis_url="", data_dir=str(tmp_path / "data"))
        assert told.keys() == {"sandbox_cluster", "cluster_unreachable"}


async def test_what_the_counters_say_is_told(valkey_url: str, prefix: str) -> None:
    queue = Queue(url=valkey_url, prefix=prefix, budget=parse_budget("1/1h"))
    client = redis.asyncio.Redis.from_url(valkey_url)
    try:
        await queue.commit("w", 1, [("ip", [event(str(n)) for n in range(99)])], [])
        [claimed] = (await queue.tick("a", 1, look_out=False)).claimed
        await queue.settle("a", [result(claimed, "rejected", signal="auth_hold")])
        now = await queue.now()
        before = int(now.timestamp()) - 7200
        hour = time.strftime("%Y%m%d%H", time.gmtime(before))
        counts = {"received": 500_000, "invalid": 1000, "untrusted_proxy": 3}
        for name, count in counts.items():
            await client.hset(f"{queue.prefix}:hour:{hour}", name, str(count))
        await client.hincrby(f"{queue.prefix}:totals", "received", 2)
        await queue.reap()
    finally:
        await queue.aclose()
        await client.aclose()
    told = await found(redis_url=valkey_url, redis_prefix=prefix)
    assert told.keys() >= {"delivery_held", "unaccounted", "dead_letters"}
    assert "RELAY_CLIENT_TOKEN" in told["delivery_held"].cure
    assert told["backlog_expires"].level == "fault"
    assert "3 requests" in told["untrusted_proxy"].detail
    assert "had 499000" in told["budget_below_traffic"].detail
    assert told["budget_below_traffic"].level == "fault"


# --- the command ----------------------------------------------------------------------


async def test_the_command_exits_with_3_and_shows_no_secret(tmp_path: Path) -> None:
    given = {n.removeprefix("RELAY_").lower(): v for n, v in ENVIRON.items()}
    given = {n: v for n, v in given.items() if n not in ("env_file", "home")}
    given |= {
        "client_token": "S3CRET-client",
        "signing_keys": "S3CRET-signing-key-of-32-characters",
        "redis_url": "redis://:S3CRET-password@127.0.0.1:9",
        "ops_token": "S3CRET-ops",
    }
    done = await asyncio.to_thread(relay, tmp_path, "check", **given)
    assert done.returncode == 3, done.stderr
    assert "S3CRET" not in done.stdout + done.stderr
    assert "redis_unreachable" in done.stdout
    done = await asyncio.to_thread(relay, tmp_path, "check", "--json", **given)
    assert done.returncode == 3
    told = json.loads(done.stdout)["findings"]
    assert {"level", "code", "about", "detail", "cure"} == set(told[0])
