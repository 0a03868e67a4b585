"""The upstream client against servers that misbehave, on real sockets.

The rule under test: an event that may have arrived is never called `retry`, and a
status that was seen is the truth, whatever comes after it.
"""

import asyncio
import re
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from relay import __version__, transport
from relay.cluster import Api, Keys, cluster_url
from relay.grants import Grant
from relay.outcomes import Hold
from relay.verdicts import Answer, Verdict
from relay.voucherify import Voucherify
from tests.support import eventually
from tests.test_verdicts import HEADERS, TABLE, check_bounds

pytestmark = pytest.mark.anyio

TOKEN = "b7c2-token-never-shown"
KEYS = Keys(app_id="app-1", token=SecretStr(TOKEN))
EVENT = b'{"event":"e","customer":{"source_id":"a"}}'
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@dataclass
class Raw:
    """A server that does with each connection what a script says."""

    url: str = ""
    requests: list[tuple[list[str], bytes]] = field(default_factory=list)
    connections: int = 0


@dataclass
class Peer:
    """The server's end of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    server: Raw

    async def request(self) -> None:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        assert length
        body = await self.reader.readexactly(int(length[1]))
        self.server.requests.append((head.split("\r\n")[:-2], body))

    async def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def gone(self) -> None:
        while await self.reader.read(65536):
            pass

    def reset(self) -> None:
        connection = self.writer.get_extra_info("socket")
        at_once = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def serving(script: Script, **options: object) -> AsyncIterator[Raw]:
    raw = Raw()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        raw.connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await script(Peer(reader, writer, raw))
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, **options)  # type: ignore[arg-type]  # asyncio's own keywords
    raw.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def client(
    url: str,
    *,
    max_connections: int = 32,
    connect_timeout: float = 3.0,
    timeout: float = 10.0,
) -> AsyncIterator[Voucherify]:
    upstream = Voucherify(
        base_url=url,
        keys=KEYS,
        origin="https://shop.example",
        max_connections=max_connections,
        connect_timeout=connect_timeout,
        timeout=timeout,
    )
    try:
        yield upstream
    finally:
        await upstream.aclose()


async def send_once(script: Script, *, timeout: float = 10.0) -> Answer:
    async with serving(script) as raw, client(raw.url, timeout=timeout) as upstream:
        return await upstream.send(EVENT)


def answering(*parts: bytes) -> Script:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(*parts)

    return script


def answering_once(*parts: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(*parts)

    return script


# What is sent


async def test_a_request_carries_exactly_these_headers() -> None:
    async with serving(answering(OK)) as raw, client(raw.url) as upstream:
        answer = await upstream.send(EVENT)
    assert answer == Answer(verdict=Verdict.DELIVERED, reason="delivered", status=200)
    [(head, body)] = raw.requests
    assert body == EVENT
    assert head[0] == "POST /client/v1/events HTTP/1.1"
    lines = (line.split(": ", 1) for line in head[1:])
    assert {name.lower(): value for name, value in lines} == {
        "host": raw.url.removeprefix("http://"),
        "content-length": str(len(EVENT)),
        "x-client-application-id": "app-1",
        "x-client-token": TOKEN,
        "origin": "https://shop.example",
        "x-voucherify-channel": f"relay:{__version__}",
        "user-agent": f"voucherify-relay/{__version__}",
        "content-type": "application/json",
        "accept": "application/json",
    }
    assert len(head) == 10


async def test_cookies_of_the_balancer_never_come_back() -> None:
    cookie = (
        b"HTTP/1.1 200 OK\r\nset-cookie: AWSALB=1; Path=/\r\ncontent-length: 0\r\n\r\n"
    )
    async with serving(answering(cookie)) as raw, client(raw.url) as upstream:
        await upstream.send(EVENT)
        await upstream.send(EVENT)
    assert len(raw.requests) == 2
    assert "cookie" not in str(raw.requests).lower()


async def test_the_environment_names_no_proxy_and_no_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password something\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with serving(answering(OK)) as raw, client(raw.url) as upstream:
        assert (await upstream.send(EVENT)).status == 200
    [(head, _)] = raw.requests
    assert not [line for line in head if "authorization" in line.lower()]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    async with serving(answering(OK)) as other:
        away = (
            f"HTTP/1.1 {status} Away\r\nlocation: {other.url}/\r\n"
            "content-length: 0\r\n\r\n"
        )
        async with (
            serving(answering(away.encode())) as raw,
            client(raw.url) as upstream,
        ):
            answer = await upstream.send(EVENT)
    assert (answer.verdict, answer.hold) == (Verdict.HOLD, Hold.CONFIG)
    assert (raw.connections, other.connections) == (1, 0)


async def test_nothing_to_send_is_an_error_of_the_caller() -> None:
    async with client("http://127.0.0.1:9") as upstream:
        with pytest.raises(ValueError, match="nothing to send"):
            await upstream.send(b"")


# The phase: certainly not sent


async def test_a_refused_connection_is_certain() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with client(f"http://127.0.0.1:{taken.getsockname()[1]}") as upstream:
            answer = await upstream.send(EVENT)
    assert answer == Answer(verdict=Verdict.RETRY, reason="connect_failed")


async def test_an_unknown_host_is_certain() -> None:
    async with client("https://voucherify.invalid") as upstream:
        answer = await upstream.send(EVENT)
    assert answer == Answer(verdict=Verdict.RETRY, reason="dns_failed")


@pytest.mark.parametrize(("connect", "total"), [(0.2, 10.0), (10.0, 0.2)])
async def test_a_host_that_never_takes_the_connection_is_certain(
    connect: float, total: float
) -> None:
    # A full backlog: Linux then leaves the handshake unanswered.
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        started = time.monotonic()
        async with client(url, connect_timeout=connect, timeout=total) as upstream:
            answer = await upstream.send(EVENT)
        for one in waiting:
            one.close()
    assert answer == Answer(verdict=Verdict.RETRY, reason="connect_timeout")
    assert time.monotonic() - started < 2


async def test_no_free_connection_is_certain() -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.gone()

    async with (
        serving(silent) as raw,
        client(raw.url, max_connections=1, connect_timeout=0.2) as upstream,
    ):
        first = asyncio.create_task(upstream.send(EVENT))
        await eventually(lambda: truth(raw.requests))
        answer = await upstream.send(EVENT)
        assert answer == Answer(verdict=Verdict.RETRY, reason="connect_timeout")
        first.cancel()
        assert raw.connections == 1


async def truth(value: object) -> object:
    return value


async def test_a_server_without_tls_is_certain() -> None:
    async def plain(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(plain) as raw:
        url = raw.url.replace("http:", "https:")
        async with client(url) as upstream:
            answer = await upstream.send(EVENT)
    assert answer == Answer(verdict=Verdict.RETRY, reason="tls_failed")


async def test_a_tls_handshake_that_hangs_is_certain() -> None:
    async with serving(Peer.gone) as raw:
        url = raw.url.replace("http:", "https:")
        async with client(url, connect_timeout=0.2) as upstream:
            answer = await upstream.send(EVENT)
    assert answer == Answer(verdict=Verdict.RETRY, reason="connect_timeout")


@pytest.mark.system("openssl")
async def test_an_untrusted_certificate_gets_no_event(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    made = "req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 -subj /CN=x"
    subprocess.run(  # noqa: ASYNC221  # half a second, before anything runs
        [openssl, *made.split(), "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    async with serving(answering(OK), ssl=context) as raw:
        url = raw.url.replace("http:", "https:")
        async with client(url) as upstream:
            answer = await upstream.send(EVENT)
    assert answer == Answer(verdict=Verdict.RETRY, reason="tls_failed")
    assert raw.requests == []


# The phase: it may have arrived


async def reset_midway(peer: Peer) -> None:
    await peer.reader.read(1)
    peer.reset()


async def reset_after(peer: Peer) -> None:
    await peer.request()
    peer.reset()


async def silent(peer: Peer) -> None:
    await peer.request()
    await peer.gone()


async def half_a_head(peer: Peer) -> None:
    await peer.request()
    await peer.say(b"HTTP/1.1 200 OK\r\ncontent-le")
    await peer.gone()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(reset_midway, "connection_lost", id="reset-midway"),
        pytest.param(reset_after, "connection_lost", id="reset-after"),
        pytest.param(Peer.request, "connection_lost", id="closed-without-answer"),
        pytest.param(silent, "read_timeout", id="silence"),
        pytest.param(half_a_head, "read_timeout", id="half-a-head"),
        pytest.param(
            answering_once(b"HTTP/1.1 200 OK\r\n"), "connection_lost", id="cut-head"
        ),
        pytest.param(
            answering_once(b"220 mail.example ESMTP\r\n"), "garbled_answer", id="smtp"
        ),
        pytest.param(
            answering_once(b"\x00\xff\x15\x03\r\n\r\n"), "garbled_answer", id="noise"
        ),
        pytest.param(
            answering_once(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 99_999),
            "garbled_answer",
            id="endless-header",
        ),
        # The parser gives up before it hands over a head that came in the same read.
        pytest.param(
            answering_once(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}"
            ),
            "garbled_answer",
            id="bad-chunk",
        ),
        pytest.param(
            answering_once(b"HTTP/1.1 100 Continue\r\n\r\n"),
            "connection_lost",
            id="only-1xx",
        ),
    ],
)
async def test_a_loss_after_sending_is_unknown(script: Script, reason: str) -> None:
    answer = await send_once(script, timeout=0.5)
    assert answer == Answer(verdict=Verdict.UNKNOWN, reason=reason)


async def test_one_call_is_one_request_even_when_the_connection_is_lost() -> None:
    async with serving(reset_after) as raw, client(raw.url) as upstream:
        await upstream.send(EVENT)
    assert (raw.connections, len(raw.requests)) == (1, 1)


async def test_closing_the_client_leaves_what_is_in_flight_unknown() -> None:
    async with serving(silent) as raw, client(raw.url) as upstream:
        sending = asyncio.create_task(upstream.send(EVENT))
        await eventually(lambda: truth(raw.requests))
        await upstream.aclose()
        assert (await sending).verdict is Verdict.UNKNOWN


async def test_a_cancellation_passes_through_and_frees_the_connection() -> None:
    async with serving(silent) as raw, client(raw.url, max_connections=1) as upstream:
        for _ in range(2):
            before = len(raw.requests)
            sending = asyncio.create_task(upstream.send(EVENT))
            await eventually(lambda before=before: truth(len(raw.requests) > before))  # type: ignore[misc]  # mypy does not infer a lambda with a default
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending


# The status is the truth


async def endless_body(peer: Peer) -> None:
    await peer.request()
    await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{")
    await peer.gone()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(endless_body, id="body-never-ends"),
        pytest.param(
            answering_once(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"),
            id="body-cut",
        ),
        pytest.param(answering_once(b"HTTP/1.0 200 OK\r\n\r\n{}"), id="http-1.0"),
        pytest.param(answering_once(b"HTTP/1.1 204 No Content\r\n\r\n"), id="no-body"),
        pytest.param(answering_once(b"HTTP/1.1 200\r\n\r\n"), id="no-phrase"),
        pytest.param(
            answering_once(b"HTTP/1.1 200 tr\xe8s bien\r\ncontent-length: 0\r\n\r\n"),
            id="phrase-in-latin-1",
        ),
        pytest.param(
            answering_once(
                b"HTTP/1.1 100 Continue\r\n\r\n",
                b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n",
                OK,
            ),
            id="after-1xx",
        ),
        pytest.param(
            answering_once(
                b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n"
                b"\r\n{}"
            ),
            id="not-really-gzip",
        ),
        pytest.param(
            answering_once(
                b"HTTP/1.1 200 OK\r\nx: \xff\xfe\r\nset-cookie: \x80=;;=\r\n"
                b"content-length: 0\r\n\r\n"
            ),
            id="odd-header-bytes",
        ),
    ],
)
async def test_a_2xx_is_delivered_whatever_follows(script: Script) -> None:
    started = time.monotonic()
    answer = await send_once(script)
    assert (answer.verdict, answer.reason) == (Verdict.DELIVERED, "delivered")
    assert time.monotonic() - started < transport.BODY_SECONDS + 1


@pytest.mark.parametrize("body", [EVENT, b"x" * 1_000_000], ids=["small", "large"])
async def test_an_answer_before_the_body_was_read_counts(body: bytes) -> None:
    async def hasty(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await peer.gone()

    async with serving(hasty) as raw, client(raw.url) as upstream:
        answer = await upstream.send(body)
    assert (answer.verdict, answer.status) == (Verdict.REJECTED, 413)


async def test_a_flood_of_a_body_is_cut_and_its_connection_dropped() -> None:
    async def flood(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 404 Not Found\r\n\r\nno such thing ")
        while True:
            await peer.say(b"y" * 65536)

    async with serving(flood) as raw, client(raw.url) as upstream:
        for _ in range(2):
            started = time.monotonic()
            answer = await upstream.send(EVENT)
            assert time.monotonic() - started < transport.BODY_SECONDS
            assert (answer.verdict, answer.status) == (Verdict.REJECTED, 404)
            assert answer.error_message is not None
            assert answer.error_message.startswith("no such thing yyy")
            assert len(answer.error_message) == 500
    assert raw.connections == 2


async def test_an_unheard_of_status_is_unknown() -> None:
    for status in (101, 600, 999):
        line = f"HTTP/1.1 {status} Odd\r\ncontent-length: 0\r\n\r\n"
        answer = await send_once(answering_once(line.encode()))
        assert (answer.verdict, answer.reason) == (
            Verdict.UNKNOWN,
            f"upstream_{status}",
        )


# Kept connections


async def test_a_connection_is_kept_and_used_again() -> None:
    async with serving(answering(OK)) as raw, client(raw.url) as upstream:
        for _ in range(5):
            await upstream.send(EVENT)
    assert (raw.connections, len(raw.requests)) == (1, 5)


async def test_an_error_answer_keeps_its_connection_too() -> None:
    busy = b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy"
    async with serving(answering(busy)) as raw, client(raw.url) as upstream:
        for _ in range(3):
            assert (await upstream.send(EVENT)).verdict is Verdict.RETRY
    assert raw.connections == 1


async def test_an_idle_connection_is_let_go_before_the_server_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert transport.KEEPALIVE_SECONDS < 5  # Node's default
    monkeypatch.setattr(transport, "KEEPALIVE_SECONDS", 0.1)
    ended: list[bool] = []

    async def kept(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK)
        await peer.gone()
        ended.append(True)

    async with serving(kept) as raw, client(raw.url) as upstream:
        await upstream.send(EVENT)
        await eventually(lambda: truth(ended))
        assert (await upstream.send(EVENT)).verdict is Verdict.DELIVERED
    assert raw.connections == 2


async def test_a_kept_connection_closed_under_a_busy_loop_is_not_used() -> None:
    peers: list[Peer] = []

    async def kept(peer: Peer) -> None:
        peers.append(peer)
        await answering(OK)(peer)

    async with serving(kept) as raw, client(raw.url) as upstream:
        await upstream.send(EVENT)
        # Closed at once, in the kernel, with no turn of the loop to notice.
        connection = peers[0].writer.get_extra_info("socket")
        with socket.socket(fileno=socket.dup(connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)
        answer = await upstream.send(EVENT)
    assert answer.verdict is Verdict.DELIVERED
    assert raw.connections == 2


async def test_a_kept_connection_closed_on_the_next_request_is_unknown() -> None:
    async def once(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK)
        await peer.request()

    async with serving(once) as raw, client(raw.url) as upstream:
        await upstream.send(EVENT)
        answer = await upstream.send(EVENT)
    assert answer == Answer(verdict=Verdict.UNKNOWN, reason="connection_lost")
    assert (raw.connections, len(raw.requests)) == (1, 2)


async def test_the_delivery_table_holds_over_a_real_connection() -> None:
    left = [s for s in TABLE if s % 100 < 32]

    async def each_in_turn(peer: Peer) -> None:
        for status in left:
            await peer.request()
            # 204 and 304 have no body: RFC 9112, 6.3.
            length = 0 if status in (204, 304) else 2
            head = f"HTTP/1.1 {status} S\r\ncontent-length: {length}\r\n\r\n"
            await peer.say(head.encode() + b"{}"[:length])

    async with serving(each_in_turn) as raw, client(raw.url) as upstream:
        for status in left:
            answer = await upstream.send(EVENT)
            assert (answer.verdict, answer.hold) == TABLE[status], status
    assert raw.connections == 1


async def test_a_limit_is_read_from_a_real_answer() -> None:
    limited = (
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 30\r\n"
        b"X-Rate-Limit-Limit: 100\r\nX-Rate-Limit-Remaining: 0\r\n"
        b"X-Rate-Limit-Type: api_calls\r\ncontent-length: 26\r\n\r\n"
        b"API calls limit exceeded.\r\n"
    )
    assert await send_once(answering_once(limited)) == Answer(
        verdict=Verdict.WAIT,
        reason="rate_limited",
        status=429,
        retry_after_ms=30_000,
        error_message="API calls limit exceeded.",
        limit=100,
        remaining=0,
        limit_type="api_calls",
    )


# Answers that are nearly right, which lead furthest into a parser.
status_line = st.sampled_from(
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.0 429 \xe9",
        b"HTTP/1.1 204",
        b"HTTP/1.1 302 Found",
        b"HTTP/1.1 101 Switching Protocols",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy",
        b"HTTP/1.1 999 \x00",
        b"HTTP/2 200",
    ]
)
header_line = st.one_of(
    st.sampled_from(
        [
            b"transfer-encoding: chunked",
            b"connection: close",
            b"connection: upgrade\r\nupgrade: websocket",
            b"content-encoding: gzip",
            b"location: //[",
            b"set-cookie: a=\x80;;=",
        ]
    ),
    st.builds(
        b"%b: %b".__mod__,
        st.tuples(
            st.sampled_from([b"content-length", *(h.encode() for h in HEADERS)]),
            st.integers(0, 99).map(lambda n: b"%d" % n) | st.binary(max_size=9),
        ),
    ),
)
wire = st.builds(
    lambda first, headers, rest: b"\r\n".join([first, *headers, b"", rest]),
    status_line,
    st.lists(header_line, max_size=4),
    st.sampled_from([b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"]) | st.binary(),
)


@settings(max_examples=50)
@given(wire | st.binary())
async def test_whatever_bytes_come_back_there_is_an_answer(data: bytes) -> None:
    answer = await send_once(answering_once(data), timeout=2.0)
    check_bounds(answer)
    # The whole request was read before anything was said.
    assert answer.status is not None or answer.verdict is Verdict.UNKNOWN


# Failures


def subclasses(root: type[Exception]) -> set[type[Exception]]:
    return {root}.union(*(subclasses(child) for child in root.__subclasses__()))


HTTPX: list[type[Exception]] = [
    thing
    for name in dir(httpx)
    if isinstance(thing := getattr(httpx, name), type) and issubclass(thing, Exception)
]


@pytest.mark.parametrize(
    "failure",
    sorted({*HTTPX, *subclasses(aiohttp.ClientError)}, key=repr),
)
def test_every_failure_of_the_libraries_has_a_name(failure: type[Exception]) -> None:
    assert any(known in transport.FAILURES for known in failure.__mro__), failure


def test_the_table_of_failures_knows_both_phases() -> None:
    for before, after in transport.FAILURES.values():
        assert re.fullmatch(r"[a-z_]+", before)
        assert re.fullmatch(r"[a-z_]+", after)


# Construction


def test_the_token_is_not_shown() -> None:
    upstream = make()
    assert TOKEN not in f"{upstream!r} {upstream!s}"
    assert repr(upstream) == (
        "Voucherify(base_url='https://api.voucherify.io', api='client', "
        "origin='https://shop.example')"
    )
    assert TOKEN not in repr(KEYS)


def make(
    *,
    token: str = TOKEN,
    api: Api = "client",
    origin: str | None = "https://shop.example",
) -> Voucherify:
    keys = Keys(app_id="app-1", token=SecretStr(token))
    return Voucherify(base_url="api", api=api, keys=keys, origin=origin)


@pytest.mark.parametrize("api", ["client", "server"])
@pytest.mark.parametrize("token", ["", "a b", "a\r\nx: y", "a\n", "ä", "a\x00"])
def test_a_token_that_is_no_header_is_refused_unseen(token: str, api: Api) -> None:
    says = f"{api} token must be visible ASCII"
    with pytest.raises(ValueError, match=says) as error:
        make(token=token, api=api)
    assert token == "" or token not in str(error.value)


@pytest.mark.parametrize("origin", [None, "", "https://shop.example\r\nx: y"])
def test_an_origin_that_is_no_header_is_refused(origin: str | None) -> None:
    with pytest.raises(ValueError, match="origin must be visible ASCII"):
        make(origin=origin)
    make(origin=origin, api="server")  # which has none


def test_without_credentials_there_is_no_client() -> None:
    grant = Grant(version=1, app_id="a", secret=SecretStr("of-a-grant"), scope="events")
    for some in ({}, {"grant": grant}, {"grant": grant, "keys": KEYS}):
        with pytest.raises(ValueError, match="give keys, or a grant with the store"):
            Voucherify(base_url="api", api="server", **some)


@pytest.mark.parametrize(
    ("cluster", "url"),
    [
        ("api", "https://api.voucherify.io"),
        ("us1.api", "https://us1.api.voucherify.io"),
        ("AS1.api", "https://as1.api.voucherify.io"),
        ("acme-2", "https://acme-2.voucherify.io"),
        ("no-download", "https://no-download.voucherify.io"),
        ("https://api.voucherify.io", "https://api.voucherify.io"),
        ("https://api.voucherify.io/", "https://api.voucherify.io"),
        ("HTTPS://Acme.Example:8443", "https://acme.example:8443"),
        ("https://10.0.0.7", "https://10.0.0.7"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.255.255.254", "http://127.255.255.254"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://localhost:8000", "http://localhost:8000"),
    ],
)
def test_a_cluster_is_named_in_short_or_in_full(cluster: str, url: str) -> None:
    assert cluster_url(cluster) == url
    assert cluster_url(url) == url


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        ("", "not a cluster"),
        (" api", "not a cluster"),
        ("api\n", "not a cluster"),
        ("api/", "not a cluster"),
        ("-api", "not a cluster"),
        ("api.", "not a cluster"),
        ("a" * 64, "not a cluster"),
        ("\u0430pi", "not a cluster"),
        ("\u212a.api", "not a cluster"),
        ("api.voucherify.io", "not a cluster"),
        ("localhost", "not a cluster"),
        ("localhost:8000", "not a cluster"),
        ("127.0.0.1", "not a cluster"),
        ("https://", "not a cluster"),
        ("//api.voucherify.io", "not a cluster"),
        ("ftp://api.voucherify.io", "not a cluster"),
        ("https://user:hunter2@api.voucherify.io", "not a cluster"),
        ("https://api.voucherify.io/client/v1/events", "not a cluster"),
        ("https://api.voucherify.io//", "not a cluster"),
        ("https://api.voucherify.io?x", "not a cluster"),
        ("https://api.voucherify.io#x", "not a cluster"),
        ("https://api.voucherify.io\\@evil.example", "not a cluster"),
        ("https://api.voucherify.io:", "not a cluster"),
        ("https://api.voucherify.io:0", "not a cluster"),
        ("https://api.voucherify.io:65536", "not a cluster"),
        ("https://api.voucherify.io\n", "not a cluster"),
        ("http://api.voucherify.io", "http:// would show"),
        ("http://10.0.0.7", "http:// would show"),
        ("http://127.0.0.1.evil.example", "http:// would show"),
        ("http://127.0.0.256", "http:// would show"),
        ("http://localhost.evil.example", "http:// would show"),
        ("download", "download host"),
        ("us1.download", "download host"),
        ("https://as1.download.voucherify.io", "download host"),
    ],
)
def test_what_is_no_cluster_is_refused_with_a_cure(cluster: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        cluster_url(cluster)
    assert "write the cluster's name (api, us1.api, as1.api)" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"),
    reason="only Linux lets a program set TCP_USER_TIMEOUT",
)
async def test_the_kernel_gives_up_when_the_relay_does() -> None:
    made = transport.Transport(timeout=7.0)._socket(
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 9))
    )
    with made:
        wait_ms = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert wait_ms == 7_000
