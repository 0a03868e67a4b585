"""Each finding of `relay check`, provoked for real, with its cure and no secret."""

import asyncio
import contextlib
import json
import os
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import pytest
import redis.asyncio

from relay.checks import check, own_network
from relay.findings import Code, Finding, lines
from relay.limits import calls_a_day, most_calls, parse_budget
from relay.outcomes import CURES
from relay.queue import Queue
from relay.sandbox.config import SandboxConfig
from relay.sandbox.server import serve_sandbox
from tests.programs import needs
from tests.queues import event, result
from tests.servers import start_server
from tests.support import eventually
from tests.test_cli import relay
from tests.test_docs import coded, section, tables

pytestmark = pytest.mark.anyio

UUID = "11111111-2222-3333-4444-555555555555"
ENVIRON = {
    "RELAY_ENV_FILE": os.devnull,
    "HOME": "/nowhere",
    "RELAY_ALLOWED_ORIGINS": "https://shop.example",
    "RELAY_CLIENT_APPLICATION_ID": UUID,
    "RELAY_CLIENT_TOKEN": "66666666-7777-8888-9999-000000000000",
    "RELAY_OPS_TOKEN": "S3CRET-ops-token",
    "RELAY_ORIGIN": "shop.example",
    "RELAY_ANONYMOUS": "restricted",
    # Nothing listens there (discard).
    "RELAY_REDIS_URL": "redis://127.0.0.1:9",
    "RELAY_CLUSTER": "http://127.0.0.1:9",
}
AWAY = {"sandbox_cluster", "cluster_unreachable", "redis_unreachable"}


# What must be in no finding, whatever fails; others begin with S3CRET.
SECRET_SETTINGS = ("RELAY_CLIENT_TOKEN", "RELAY_SERVER_APP_TOKEN")
# Code and levels, as the document has them.
TOLD = {
    coded(code)[0]: set(levels.split(", "))
    for code, levels, *_ in tables(section("docs/operations.md", "Checks"))
}


async def found(**settings: str) -> dict[str, Finding]:
    environ = ENVIRON | {f"RELAY_{n.upper()}": value for n, value in settings.items()}
    findings = await check(environ)
    ranks = ["fault", "warning", "note"]
    assert [f.level for f in findings] == sorted(
        (f.level for f in findings), key=ranks.index
    )
    for finding in findings:
        assert finding.level in TOLD[finding.code], finding
        assert finding.detail.strip()
        assert finding.cure.strip()
    told = lines(findings)
    assert len(told) == 3 * len(findings) + 3
    for secret in ("S3CRET", *filter(None, map(environ.get, SECRET_SETTINGS))):
        assert secret not in "\n".join(told)
        assert secret not in repr(findings)
    return {finding.code: finding for finding in findings}


def test_every_code_is_told() -> None:
    assert list(TOLD) == list(get_args(Code))  # in the same order, too


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


async def test_each_wrong_setting_has_a_finding(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    given = {
        "RELAY_ALLOWED_ORIGINS": "https://shop.example/S3CRET",
        "RELAY_CLUSTER": "http://user:S3CRET@api.voucherify.io",
        "RELAY_CLIENT_TOKEN_FILE": str(tmp_path / "empty"),
        "RELAY_REDIS_URL": "redis://:S3CRET#@redis.example",
        "RELAY_SIGNING_KEYS": "S3CRET",
        "RELAY_LIMITS": "ip=S3CRET",
        "RELAY_ORIGIN": "",
    }
    findings = await check({**ENVIRON, "RELAY_CLIENT_TOKEN": "", **given})
    assert sorted(f.about for f in findings) == sorted(given)
    assert {(f.level, f.code) for f in findings} == {("fault", "setting")}
    assert "S3CRET" not in repr(findings)


@pytest.mark.parametrize(
    ("settings", "code", "level"),
    [
        ({"anonymous": "trusted"}, "anonymous_trusted", "warning"),
        ({"anonymous": "auto"}, "anonymous_trusted", "fault"),
        ({"allowed_origins": "https://*.com"}, "any_origin", "warning"),
        ({"allowed_origins": "https://*.co.uk:8443"}, "any_origin", "warning"),
        (
            {"allowed_origins": "https://*.com", "anonymous": "trusted"},
            "any_origin",
            "fault",
        ),
        ({"origin": "http://shop.example"}, "http_origin", "warning"),
        ({"signing_keys": "k" * 32, "ops_token": ""}, "ops_without_token", "warning"),
        ({"allowed_origins": "*"}, "any_origin", "warning"),
        ({"allowed_origins": "*", "anonymous": "trusted"}, "any_origin", "fault"),
        ({"signing_keys": "k" * 32, "tokens": "dry_run"}, "tokens_dry_run", "note"),
        ({"allowed_origins": "http://shop.example"}, "http_origin", "warning"),
        ({"redis_url": "redis://relay.invalid"}, "redis_unencrypted", "warning"),
        ({"signing_keys": "k" * 32}, "no_catalog", "note"),
        ({"origin": "https://other.example"}, "origin_elsewhere", "note"),
        ({"origin": "notshop.example"}, "origin_elsewhere", "note"),
        ({"server_app_id": UUID}, "same_keys", "warning"),
        ({"client_tokn": "S3CRET"}, "setting_doubtful", "warning"),
        ({"client_token": "token-of-another-form"}, "odd_credentials", "note"),
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
    "origin",
    [
        "http://localhost:3000",
        "http://shop.localhost:3000",
        "http://127.0.0.1",
        "http://[::1]:3000",
        "https://shop.example",
    ],
)
async def test_origins_of_developers_need_no_tls(origin: str) -> None:
    assert "http_origin" not in await found(allowed_origins=origin)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("redis", True),
        ("10.1.2.3", True),
        ("fd00::1", True),
        ("localhost", True),
        ("redis.internal", True),
        ("redis.example", False),
        ("203.0.113.9", False),
        ("2001:db8::1", False),
        ("internal.example", False),
    ],
)
def test_a_redis_of_ones_own_network_may_do_without_tls(host: str, own: bool) -> None:
    assert own_network(host) is own


@pytest.mark.parametrize(
    ("shown", "pages"),
    [
        ("shop.example", "https://www.shop.example"),
        ("https://www.shop.example:8443", "https://shop.example"),
        ("shop.example", "https://other.example, https://*.shop.example"),
        ("www.shop.example", "https://*.shop.example"),
        ("other.example", "*"),
        ("localhost:5000", "http://localhost:3000"),
    ],
)
async def test_an_origin_of_the_same_shop_is_no_finding(shown: str, pages: str) -> None:
    assert "origin_elsewhere" not in await found(origin=shown, allowed_origins=pages)


async def test_trusted_senders_beside_keys_are_told_to_go() -> None:
    keys = {"signing_keys": "S3CRET-" + "k" * 32, "anonymous": "trusted"}
    assert "keys" in (await found(**keys))["anonymous_trusted"].cure
    assert "anonymous_trusted" not in await found(**keys, tokens="required")


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


@pytest.mark.parametrize(
    ("budget", "calls"),
    [("off", None), ("4/5s", 69_120), ("4/5s, 90000/30d", 3_000), ("1/1d, 9/1m", 1)],
)
def test_what_a_budget_allows_a_day_for_ever(budget: str, calls: int | None) -> None:
    assert calls_a_day(parse_budget(budget)) == calls


async def test_a_budget_above_voucherifys_limit_is_told() -> None:
    cluster = "https://relay.invalid"  # never resolves (RFC 6761)
    above = {"upstream_budget": "90/1m", "cluster": cluster}
    assert "budget_above_limit" in await found(**above)
    assert "any number" in (
        (await found(**above | {"upstream_budget": "off"}))["budget_above_limit"].detail
    )
    keys = {"server_app_id": UUID, "server_app_token": UUID}
    assert "budget_above_limit" not in await found(
        **above, **keys, upstream_api="server"
    )
    told = await found(cluster=cluster)
    assert "budget_above_limit" not in told
    assert "(DNS)" in told["cluster_unreachable"].detail


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({}, "cannot_verify"),
        ({"upstream_api": "server"}, ""),
        ({"upstream_api": "server", "auth": "oauth1"}, "look_up_scope"),
        (
            {"upstream_api": "server", "auth": "oauth1", "oauth_scope": "events"},
            "look_up_scope",
        ),
        (
            {
                "upstream_api": "server",
                "auth": "oauth1",
                "oauth_scope": "events customers",
            },
            "",
        ),
        ({"upstream_api": "server", "auth": "oauth1", "oauth_scope": "api"}, ""),
    ],
)
async def test_a_look_up_that_would_fail_is_told(
    tmp_path: Path, settings: dict[str, str], code: str
) -> None:
    catalog = tmp_path / "catalog.toml"
    keys = {"server_app_id": UUID, "server_app_token": UUID}
    kept = {"cannot_verify", "look_up_scope"}
    for rule, said in (("verify", {code} - {""}), ("at_most_once", set())):
        catalog.write_text(f'[events.e]\ndelivery = "{rule}"\nevent_id = "n"\n')
        told = await found(**keys, **settings, catalog=str(catalog))
        assert told.keys() & kept == said


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
        (b"HTTP/1.1 503 Bad\r\n" + PAGE, "cluster_failing", "warning"),
        (b"HTTP/1.1 501 No\r\n" + PAGE, "not_the_api", "fault"),
        (b"SSH-2.0-OpenSSH\r\n", "cluster_unreachable", "fault"),
        (b"S3CRET\r\n\r\n", "cluster_unreachable", "fault"),
        (LATE, "clock_skew", "fault"),
    ],
    ids=[
        *("page", "other-404", "redirect", "down", "balancer", "no-options"),
        *("garbage", "echo", "late-clock"),
    ],
)
async def test_a_cluster_that_is_another_is_told(
    said: bytes, code: str, level: str
) -> None:
    async with answering(said) as url:
        told = await found(cluster=url)
    assert told[code].level == level
    others = {"not_the_api", "cluster_failing", "cluster_unreachable"} - {code}
    assert not others & told.keys()


@pytest.mark.parametrize(
    "date", ["", "soon", "Mon, 99 Jan 2024 99:99:99 GMT", "9" * 99]
)
async def test_a_date_of_no_clock_is_no_finding(date: str) -> None:
    said = f"HTTP/1.1 204 No Content\r\nDate: {date}\r\n\r\n".encode()
    async with answering(said) as url:
        assert (await found(cluster=url)).keys() == {
            "sandbox_cluster",
            "redis_unreachable",
        }


async def test_an_answer_without_end_is_not_read() -> None:
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                writer.write(bytes(100_000))
                await writer.drain()
                sent += 100_000
        writer.close()

    async with await asyncio.start_server(pour, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        told = await found(cluster=f"http://127.0.0.1:{port}")
        assert "cluster_unreachable" not in told
    assert sent < 50_000_000  # what sockets hold, not what five seconds bring


@pytest.mark.parametrize(
    ("ahead", "level"), [(0, None), (10, "warning"), (-10, "warning"), (120, "fault")]
)
async def test_a_clock_that_is_off_is_told(
    valkey_url: str, prefix: str, ahead: int, level: str | None
) -> None:
    """Beside Redis and the sandbox alike; the hours are those of Redis."""
    async with serve_sandbox(SandboxConfig()) as running:
        findings = await check(
            ENVIRON
            | {
                "RELAY_CLUSTER": running.url,
                "RELAY_REDIS_URL": valkey_url,
                "RELAY_REDIS_PREFIX": prefix,
            },
            now=lambda: time.time() + ahead,
        )
    skewed = [f for f in findings if f.code == "clock_skew"]
    assert [f.level for f in skewed] == ([level] * 2 if level else [])
    whose = " ".join(f.detail for f in skewed)
    assert ("cluster" in whose and "Redis" in whose) is bool(level)


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
    assert "cluster_unreachable" not in told


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
        ({"maxmemory_policy": "volatile-lru"}, "redis_evicts_marks", "fault"),
        ({"maxmemory_policy": "allkeys-lru"}, "redis_unfit", "fault"),
        ({"maxmemory": "1100000"}, "redis_nearly_full", "warning"),
        ({"appendfsync": "no"}, "redis_fsync_off", "fault"),
    ],
    ids=str,
)
async def test_a_redis_that_could_lose_events_is_told(
    config: dict[str, str], code: str, level: str, tmp_path: Path
) -> None:
    async with server(tmp_path / "data", **config) as (url, _):
        told = await found(redis_url=url)
    assert told[code].level == level


async def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    async with server(tmp_path / "data") as (url, client):
        where = await client.config_get("dir")
        file = await client.config_get("dbfilename")
        # Redis cannot put a file where a directory is, not even as root.
        (Path(str(where["dir"])) / str(file["dbfilename"]) / "full").mkdir(parents=True)
        await client.bgsave()

        async def failed() -> bool:
            info = await client.info("persistence")
            return bool(info["rdb_last_bgsave_status"] != "ok")

        await eventually(failed)
        told = await found(redis_url=url)
    assert told["redis_disk"].level == "fault"
    assert "rdb_last_bgsave_status" in told["redis_disk"].detail


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-S3CRET\r\n", b"HTTP/1.1 400 S3CRET\r\n\r\n"], ids=["ssh", "http"]
)
async def test_what_is_no_redis_is_told(said: bytes) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1") as other:
        port = other.sockets[0].getsockname()[1]
        told = await found(redis_url=f"redis://:S3CRET@127.0.0.1:{port}")
    assert "protocol" in told["redis_unreachable"].detail


@pytest.mark.parametrize("key", ["totals", "gauges", "hour"])
async def test_keys_of_somebody_else_are_told(
    key: str, valkey_url: str, prefix: str
) -> None:
    client = redis.asyncio.Redis.from_url(valkey_url)
    try:
        if key == "hour":
            key += time.strftime(":%Y%m%d%H", time.gmtime(time.time() - 7200))
            await client.hset(f"{{{prefix}}}:{key}", "received", "S3CRET")
        else:
            await client.set(f"{{{prefix}}}:{key}", "S3CRET")
        told = await found(redis_url=valkey_url, redis_prefix=prefix)
    finally:
        await client.delete(f"{{{prefix}}}:{key}")
        await client.aclose()
    assert told["redis_foreign"].level == "fault"


async def test_what_was_found_stays_when_redis_refuses_the_rest(tmp_path: Path) -> None:
    async with server(tmp_path / "data", appendonly="no") as (url, client):
        await client.acl_setuser(
            "some",
            enabled=True,
            passwords=["+S3CRET"],
            keys=["*"],
            commands=["+time", "+info", "+client", "+hello", "+auth"],
        )
        told = await found(redis_url=f"unix://some:S3CRET@{urlsplit(url).path}")
    assert {"redis_not_persistent", "redis_unreachable"} <= told.keys()
    assert "credentials" in told["redis_unreachable"].detail


async def test_a_password_that_is_wrong_is_told(tmp_path: Path) -> None:
    async with server(tmp_path / "data") as (url, _):
        told = await found(redis_url=f"unix://relay:S3CRET@{urlsplit(url).path}")
    assert told["redis_unreachable"].level == "fault"


async def test_a_redis_without_config_is_checked_as_far_as_it_goes(
    tmp_path: Path,
) -> None:
    async with server(tmp_path / "data", appendfsync="no") as (url, client):
        await client.acl_setuser(
            "some",
            enabled=True,
            passwords=["+S3CRET"],
            keys=["*"],
            categories=["+@all"],
            commands=["-config"],
        )
        told = await found(redis_url=f"unix://some:S3CRET@{urlsplit(url).path}")
    assert told.keys() == {"sandbox_cluster", "cluster_unreachable"}


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


async def test_a_hold_by_hand_is_a_fault_with_its_reason(
    valkey_url: str, prefix: str
) -> None:
    queue = Queue(url=valkey_url, prefix=prefix)
    try:
        await queue.hold("Ana, until noon")
    finally:
        await queue.aclose()
    told = await found(redis_url=valkey_url, redis_prefix=prefix)
    held = told["delivery_held"]
    assert (held.level, held.cure) == ("fault", CURES["by_hand"])
    assert "by_hand (Ana, until noon), since 2" in held.detail


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
    # Nothing fewer than all of it in a day, but then nothing more for a month.
    told = await found(
        redis_url=valkey_url,
        redis_prefix=prefix,
        upstream_budget="600000/30d",
    )
    assert "delivers 20000 events a day" in told["budget_below_traffic"].detail
    told = await found(
        redis_url=valkey_url, redis_prefix=prefix, upstream_budget="498000/1d"
    )
    assert told["budget_below_traffic"].level == "warning"
    told = await found(
        redis_url=valkey_url, redis_prefix=prefix, upstream_budget="499000/1d"
    )
    assert "budget_below_traffic" not in told


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


@pytest.mark.parametrize(
    "pages", ["https://*.shop.example", "https://*.localhost", "https://*.a.b.shop.com"]
)
async def test_a_star_before_a_domain_of_ones_own_is_no_finding(pages: str) -> None:
    assert "any_origin" not in await found(allowed_origins=pages)


@pytest.mark.parametrize(
    "rules", ['[events.e]\ntoken = "off"\n', '[defaults]\ntoken = "optional"\n']
)
async def test_a_catalogue_that_relaxes_the_token_is_seen(
    rules: str, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(rules)
    told = await found(
        signing_keys="S3CRET-" + "k" * 32,
        anonymous="trusted",
        tokens="required",
        catalog=str(tmp_path / "c.toml"),
    )
    assert "anonymous_trusted" in told


async def test_a_catalogue_that_asks_always_leaves_nobody_trusted(
    tmp_path: Path,
) -> None:
    (tmp_path / "c.toml").write_text(
        '[defaults]\ntoken = "required"\n[events.e]\nlimit = "3/1d"\n'
        'token = "required"\n'
    )
    told = await found(
        signing_keys="S3CRET-" + "k" * 32,
        anonymous="trusted",
        catalog=str(tmp_path / "c.toml"),
    )
    assert "anonymous_trusted" not in told


async def test_what_is_set_in_voucherify_names_its_screen() -> None:
    told = await found(origin="https://shop.example/path")
    assert "Voucherify: Project Settings, Client-side" in told["setting"].cure
    told = await found(cluster="http://api.voucherify.io")
    assert "Project Settings, General" in told["setting"].cure
    told = await found(cluster="api", upstream_budget="99/5s")
    assert "In Voucherify: " in told["budget_above_limit"].cure


async def test_what_the_privacy_signal_dropped_is_no_call(
    valkey_url: str, prefix: str
) -> None:
    queue = Queue(url=valkey_url, prefix=prefix)
    client = redis.asyncio.Redis.from_url(valkey_url)
    try:
        before = int((await queue.now()).timestamp()) - 7200
        hour = time.strftime("%Y%m%d%H", time.gmtime(before))
        counts = {"received": 200_000, "dropped": 200_000, "reason:gpc": 200_000}
        key = f"{queue.prefix}:hour:{hour}"
        await client.hset(key, mapping=counts)  # type: ignore[arg-type]  # numbers, too
    finally:
        await queue.aclose()
        await client.aclose()
    told = await found(redis_url=valkey_url, redis_prefix=prefix)
    assert "budget_below_traffic" not in told


async def test_a_database_that_is_not_there_is_told_as_that(valkey_url: str) -> None:
    told = await found(redis_url=f"{valkey_url}?db=99")
    assert "number" in told["redis_unreachable"].cure
