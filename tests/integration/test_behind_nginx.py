"""The relay behind a real nginx, set up with the very files of deploy/nginx.

The site around them is a nasty one: its headers, error pages and limits would spoil
the relay's answers if they reached into the relay's locations.
"""

import asyncio
import gzip
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path

import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from relay.edge import MAX_BODY_BYTES
from relay.embedded import running_url
from relay.queue import Queue
from relay.sandbox import (
    APPLICATION_ID,
    CLIENT_TOKEN,
    ORIGIN,
    RunningSandbox,
    SandboxConfig,
    serve_sandbox,
)
from relay.snippet import NAME, present
from tests.programs import RELAY, Program, find, needs, running
from tests.queues import directory_balanced
from tests.support import eventually

pytestmark = [pytest.mark.anyio, *needs("nginx", package="nginx-light")]

SHIPPED = Path(__file__).parents[2] / "deploy" / "nginx"
SOCKET = "/run/relay/http.sock"  # in the shipped files
PAGE = "https://shop.example"
PER_ADDRESS = 5
SHOPPERS = (f"127.0.{n // 250}.{n % 250 + 2}" for n in count())

MAIN = """
daemon off;
worker_processes 1;
pid {place}/nginx.pid;
error_log stderr;
events {{ worker_connections 128; }}
http {{
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    log_format joined "$request_id $status";
    access_log {place}/access.log joined;
    include {place}/conf.d/*.conf;
}}
"""
SITE = """
proxy_set_header Cookie $http_cookie;
server {{
    listen 127.0.0.1:{port};
    add_header Access-Control-Allow-Origin * always;
    add_header Vary Accept-Encoding always;
    error_page 400 403 413 429 502 503 504 /sorry.html;
    proxy_intercept_errors on;
    client_max_body_size 1k;
    include {relay_conf};
    location = /sorry.html {{ return 200 "sorry"; }}
}}
"""


class Stack:
    """A relay that can be stopped and started again, and what is around it."""

    url: str  # of nginx
    relay: Program

    def __init__(self, place: Path, cluster: RunningSandbox, ends: ExitStack) -> None:
        self.place = place
        self.sandbox = cluster.sandbox
        self._cluster = cluster.url
        self._ends = ends

    def start_relay(self) -> None:
        env = {
            "RELAY_ENV_FILE": os.devnull,
            "RELAY_UDS": str(self.place / "relay"),
            "RELAY_TRUSTED_PROXIES": "unix",
            "RELAY_OPS_PORT": "0",
            "RELAY_DATA_DIR": str(self.place / "data"),
            "RELAY_ALLOWED_ORIGINS": PAGE,
            "RELAY_LIMITS": f"ip={PER_ADDRESS}/1d",
            "RELAY_CLUSTER": self._cluster,
            "RELAY_CLIENT_APPLICATION_ID": APPLICATION_ID,
            "RELAY_CLIENT_TOKEN": CLIENT_TOKEN,
            "RELAY_ORIGIN": ORIGIN,
            "RELAY_UPSTREAM_BUDGET": "off",
        }
        self.relay = self._ends.enter_context(running([*RELAY, "serve"], env=env))
        self.relay.wait_for("^Taking events on unix:")


@contextmanager
def nginx(place: Path, upstream: Path, *, site: Path | None = None) -> Iterator[str]:
    """Run nginx with the shipped files; only the socket and the port are others."""
    program = find("nginx")
    assert program is not None
    config = place / f"nginx-{secrets.token_hex(4)}"
    (config / "conf.d").mkdir(parents=True)
    port = free_port()
    (config / "nginx.conf").write_text(MAIN.format(place=config))
    shipped = (SHIPPED / "relay-upstream.conf").read_text()
    (config / "conf.d" / "relay-upstream.conf").write_text(
        replaced(shipped, f"unix:{SOCKET};", f"unix:{upstream};")
    )
    if site is None:
        text = SITE.format(port=port, relay_conf=SHIPPED / "relay.conf")
    else:
        shutil.copy(SHIPPED / "relay.conf", config)
        text = replaced(site.read_text(), "listen 8080;", f"listen 127.0.0.1:{port};")
    (config / "conf.d" / "default.conf").write_text(text)
    command: list[str | Path] = [program, "-p", config, "-c", config / "nginx.conf"]
    with running(command) as server:
        while not listens(port):
            assert server.process.poll() is None, server.said
            time.sleep(0.005)
        yield f"http://127.0.0.1:{port}"


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not there once"
    return text.replace(old, new)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path, and one that nginx's unprivileged workers can enter."""
    with tempfile.TemporaryDirectory(prefix="relay-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="module")
def stack(place: Path) -> Iterator[Stack]:
    config = SandboxConfig(client_limit=None)
    with ExitStack() as ends:
        portal = ends.enter_context(start_blocking_portal())
        serving = portal.wrap_async_context_manager(serve_sandbox(config))
        made = Stack(place, ends.enter_context(serving), ends)
        made.start_relay()
        made.url = ends.enter_context(nginx(place, place / "relay"))
        yield made
        made.sandbox.assert_clean()
        made.relay.stop()
        portal.call(directory_balanced, place / "data")


@asynccontextmanager
async def shopping(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A browser of a shopper with an address of his own."""
    transport = httpx.AsyncHTTPTransport(local_address=next(SHOPPERS))
    headers = {"origin": PAGE, "content-type": "text/plain", "user-agent": "Shopper/1"}
    async with httpx.AsyncClient(
        base_url=url, transport=transport, headers=headers, trust_env=False
    ) as client:
        yield client


@pytest.fixture
async def shopper(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with shopping(stack.url) as client:
        yield client


def beacon(customer: str = "c1", **more: object) -> dict[str, object]:
    return {"event": "viewed", "customer": {"source_id": customer}, **more}


def assert_readable(answer: httpx.Response) -> None:
    """The page that sent the beacon may read the answer, credentials included."""
    told = answer.headers.get_list
    assert told("access-control-allow-origin") == [PAGE]
    assert told("access-control-allow-credentials") == ["true"]
    assert told("vary") == ["Origin"]
    assert len(told("access-control-expose-headers")) == 1
    assert len(told("x-request-id")) == 1
    assert told("cache-control") == ["no-store"]


async def test_a_beacon_gets_through_and_the_page_can_read_the_answer(
    stack: Stack, shopper: httpx.AsyncClient
) -> None:
    answer = await shopper.post("/track", json=beacon("through"))
    assert answer.status_code == 202, answer.text
    assert answer.json()["events"][0]["status"] == "queued"
    assert_readable(answer)
    policy = f'"ip";q={PER_ADDRESS};w=86400'
    assert policy in answer.headers["ratelimit-policy"]
    assert answer.headers["ratelimit"].startswith(f'"ip";r={PER_ADDRESS - 1};')

    async def arrived() -> bool:
        return "through" in [record.source_id for record in stack.sandbox.events]

    await eventually(arrived)


async def test_voucherifys_own_clients_get_through(
    stack: Stack, shopper: httpx.AsyncClient
) -> None:
    keys = {
        "content-type": "application/json",
        "x-client-application-id": "theirs",
        "x-client-token": "theirs",
    }
    body = beacon("official", metadata={"n": 1})
    answer = await shopper.post("/client/v1/events", json=body, headers=keys)
    assert answer.status_code == 200, answer.text
    assert answer.json()["customer"] == {"object": "customer", "source_id": "official"}
    assert_readable(answer)
    doubled = await shopper.post(
        f"{stack.url}//client/v1/events", json=beacon("doubled"), headers=keys
    )
    assert doubled.status_code == 200, doubled.text

    async def arrived() -> bool:
        known = {record.source_id for record in stack.sandbox.events}
        return {"official", "doubled"} <= known

    await eventually(arrived)


async def test_a_token_and_the_privacy_signal_reach_the_relay(
    shopper: httpx.AsyncClient,
) -> None:
    answer = await shopper.post(
        "/track", json=beacon("signalled"), headers={"relay-token": "no-token"}
    )
    # There is no key to check it with, and the relay says so: it has read it.
    assert (answer.status_code, answer.json()["reason"]) == (401, "token_unexpected")


async def test_the_snippet_gets_through_as_the_relay_gives_it(
    shopper: httpx.AsyncClient,
) -> None:
    for name, age in ((NAME, "max-age=3600"), (present().name, "immutable")):
        got = await shopper.get(f"/{name}", headers={"accept-encoding": "gzip"})
        assert (got.status_code, got.content) == (200, present().encodings["identity"])
        told = got.headers.get_list
        assert told("content-encoding") == ["gzip"]
        assert [age in said for said in told("cache-control")] == [True]
        assert told("access-control-allow-origin") == ["*"]
        assert told("x-content-type-options") == ["nosniff"]
        assert told("vary") == ["Accept-Encoding"]
        assert len(told("x-request-id")) == 1
        again = await shopper.get(
            f"/{name}",
            headers={"accept-encoding": "gzip", "if-none-match": got.headers["etag"]},
        )
        assert again.status_code == 304
    assert (await shopper.get("/relay.0.js")).status_code == 404


async def test_what_a_browser_reports_is_counted_by_its_family(
    stack: Stack, shopper: httpx.AsyncClient
) -> None:
    body = {"events": [beacon("counted")], "report": {"called": 7}}
    agent = {"user-agent": "Mozilla/5.0 Gecko/20100101 Firefox/133.0"}
    answer = await shopper.post("/track", json=body, headers=agent)
    assert answer.status_code == 202, answer.text

    async def counted() -> bool:
        queue = Queue(url=running_url(stack.place / "data"), prefix="relay")
        try:
            now = await queue.now()
            told = await queue.hash(f"browser:{now:%Y%m%d}")
        finally:
            await queue.aclose()
        return told.get("firefox:called") == "7"

    await eventually(counted)


async def test_a_preflight_is_answered_by_the_relay(
    shopper: httpx.AsyncClient,
) -> None:
    answer = await shopper.options(
        "/track",
        headers={
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        },
    )
    assert answer.status_code == 204
    assert_readable(answer)
    assert answer.headers.get_list("access-control-allow-methods") == ["POST"]
    assert "content-type" in answer.headers["access-control-allow-headers"]


async def test_a_refusal_of_the_relay_passes_as_it_is(
    shopper: httpx.AsyncClient,
) -> None:
    refused = await shopper.post("/track", json={"event": "viewed"})
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["reason"] == "customer_missing"
    assert_readable(refused)

    elsewhere = {"origin": "https://evil.example"}
    forbidden = await shopper.post("/track", json=beacon(), headers=elsewhere)
    assert forbidden.status_code == 403
    assert forbidden.json()["reason"] == "origin"
    assert "access-control-allow-origin" not in forbidden.headers


async def test_limits_count_the_address_that_nginx_saw(stack: Stack) -> None:
    async with shopping(stack.url) as one, shopping(stack.url) as another:
        for n in range(PER_ADDRESS):
            spoofed = {"x-forwarded-for": f"203.0.113.{n}", "forwarded": f"for=1.{n}"}
            answer = await one.post("/track", json=beacon(), headers=spoofed)
            assert answer.status_code == 202, answer.text
        refused = await one.post(
            "/track", json=beacon(), headers={"x-forwarded-for": "203.0.113.99"}
        )
        assert refused.status_code == 429
        assert refused.json()["reason"] == "rate_limited_ip"
        assert refused.headers.get_list("retry-after")
        assert_readable(refused)
        assert (await another.post("/track", json=beacon())).status_code == 202


async def test_the_id_of_an_answer_is_the_one_in_the_log_of_nginx(
    stack: Stack, shopper: httpx.AsyncClient
) -> None:
    answer = await shopper.post(
        "/track", json=beacon(), headers={"x-request-id": "of-the-sender"}
    )
    request_id = answer.headers["x-request-id"]
    assert len(request_id) == 32

    async def logged() -> bool:
        logs = [log.read_text() for log in stack.place.glob("nginx-*/access.log")]
        return f"{request_id} 202" in "".join(logs)

    await eventually(logged)


@pytest.mark.parametrize("announced", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("size", "by_relay"),
    [
        pytest.param(MAX_BODY_BYTES + 1, True, id="one-byte-over"),
        pytest.param(1024 * 1024, False, id="far-over"),
    ],
)
async def test_a_body_that_is_too_large_gets_a_413_that_the_page_can_read(
    shopper: httpx.AsyncClient, size: int, *, by_relay: bool, announced: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b" " * (size - 1)
        yield b" "

    answer = await shopper.post(
        "/track", content=b" " * size if announced else chunks()
    )
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["reason"] == "too_large"
    assert_readable(answer)
    assert ("ratelimit-policy" in answer.headers) is by_relay


async def test_the_largest_body_gets_through(shopper: httpx.AsyncClient) -> None:
    text = httpx.Request("POST", PAGE, json=beacon()).content
    answer = await shopper.post("/track", content=text.ljust(MAX_BODY_BYTES))
    assert answer.status_code == 202, answer.text


async def test_a_zipped_beacon_can_wait_for_its_outcome(
    shopper: httpx.AsyncClient,
) -> None:
    text = httpx.Request("POST", PAGE, json=beacon("zipped")).content
    answer = await shopper.post(
        "/track",
        content=gzip.compress(text),
        headers={"content-encoding": "gzip", "prefer": "wait=10"},
    )
    assert answer.json()["events"][0]["outcome"] == "delivered", answer.text


async def test_voucherify_learns_nothing_of_the_browser(
    stack: Stack, shopper: httpx.AsyncClient
) -> None:
    private = {
        "cookie": "session=private",
        "authorization": "Bearer private",
        "referer": f"{PAGE}/private",
        "x-private": "private",
    }
    answer = await shopper.post(
        "/track", json=beacon("discreet"), headers={**private, "prefer": "wait=10"}
    )
    assert answer.status_code == 202
    (record,) = (r for r in stack.sandbox.events if r.source_id == "discreet")
    assert not {*private, "x-forwarded-for", "x-request-id"} & record.headers.keys()
    assert record.headers["user-agent"].startswith("voucherify-relay/")
    assert "private" not in str(record.headers)


@pytest.mark.parametrize("way", ["stopped", "killed"])
async def test_an_absent_relay_is_a_503_that_says_when_to_come_back(
    stack: Stack, shopper: httpx.AsyncClient, way: str
) -> None:
    assert (await shopper.post("/track", json=beacon())).status_code == 202
    if way == "stopped":
        assert stack.relay.stop() == 0
    else:
        stack.relay.kill()
    try:
        answer = await shopper.post("/track", json=beacon())
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["reason"] == "relay_away"
        assert_readable(answer)
    finally:
        stack.start_relay()
    assert (await shopper.post("/track", json=beacon())).status_code == 202


class Listener:
    """In the relay's place: takes every request and keeps its head and body."""

    def __init__(self) -> None:
        self.connections = 0
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        with ExitStack() as ends:
            ends.callback(writer.close)
            while True:
                try:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                except (asyncio.IncompleteReadError, ConnectionError):
                    return
                first, *lines = head.strip().split("\r\n")
                assert first == "post /track http/1.1"
                headers = dict(line.split(": ", 1) for line in lines)
                assert len(headers) == len(lines), "a header came twice"
                self.bodies.append(
                    await reader.readexactly(int(headers["content-length"]))
                )
                self.heads.append(headers)
                writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")


@asynccontextmanager
async def listening(place: Path) -> AsyncIterator[tuple[Listener, Path]]:
    path = place / secrets.token_hex(4)
    listener = Listener()
    server = await asyncio.start_unix_server(listener.serve, path)
    path.chmod(0o666)
    try:
        yield listener, path
    finally:
        server.close()


async def test_the_relay_gets_what_it_reads_and_nothing_else(place: Path) -> None:
    sent = {
        "accept-language": "de",
        "authorization": "Bearer private",
        "content-encoding": "gzip",
        "cookie": "session=private",
        "forwarded": "for=203.0.113.1",
        "prefer": "wait=1",
        "referer": f"{PAGE}/private",
        "x-forwarded-for": "203.0.113.1",
        "x-real-ip": "203.0.113.1",
        "x-request-id": "of-the-sender",
    }
    async with listening(place) as (relay, path):
        with nginx(place, path) as url:
            async with shopping(url) as client:
                for _ in range(3):
                    await client.post("/track", content=b"{}", headers=sent)
    (head, *_) = relay.heads
    assert len(head.pop("x-request-id")) == 32
    assert head.pop("x-forwarded-for").startswith("127.0.")
    assert head == {
        "host": "127.0.0.1",
        "origin": PAGE,
        "content-type": "text/plain",
        "content-encoding": "gzip",
        "content-length": "2",
        "prefer": "wait=1",
        "user-agent": "shopper/1",  # as all that the other end lists
    }
    assert relay.bodies == [b"{}"] * 3
    assert relay.connections == 1, "the connection to the relay is not kept"


async def test_with_compose_the_address_comes_from_whoever_ends_tls(
    place: Path,
) -> None:
    async with listening(place) as (relay, path):
        with nginx(place, path, site=SHIPPED / "compose.conf") as url:
            async with shopping(url) as balancer:
                # The sender's own lie, his address, and an inner proxy's.
                chain = {"x-forwarded-for": "192.0.2.66, 203.0.113.7, 10.0.0.9"}
                await balancer.post("/track", content=b"{}", headers=chain)
                assert (await balancer.get("/nginx-alive")).status_code == 200
                assert (await balancer.get("/")).status_code == 404
    assert [head["x-forwarded-for"] for head in relay.heads] == ["203.0.113.7"]
