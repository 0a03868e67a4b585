"""Which requests go past ASGI, and that uvicorn has its connection back after each."""

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast
from weakref import WeakSet

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGIApplication

from relay.answers import Response
from relay.endpoints import Track
from relay.headers import Fields, fields_of
from relay.protocol import BeaconProtocol
from tests.support import eventually, serve

pytestmark = pytest.mark.anyio

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PLAIN = "POST /track HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


@dataclass(slots=True)
class App:
    """Answers on both ways, and says which one it was."""

    body_timeout_s: float = 5.0
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    fields: list[Fields] = field(default_factory=list)
    held: list[Callable[[Response], None]] = field(default_factory=list)
    at_once: float = math.inf  # so many beacons are answered, the others held
    beacons: dict[bytes, Track] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.beacons = {b"/track": cast("Track", self)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.fields.append(fields_of(scope["headers"]))
        message = await receive()
        self.seen.append(("asgi", message.get("body", b"")))
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"asgi"})

    def take(
        self,
        fields: Fields,
        peer: str | None,
        body: bytes,
        answer: Callable[[Response], None],
    ) -> None:
        assert fields[b"host"] == b"x"
        assert peer == "127.0.0.1"
        self.seen.append(("short", body))
        self.fields.append(fields)
        if self.at_once > 0:
            self.at_once -= 1
            answer(said())
        else:
            self.held.append(answer)

    def too_slow(self, fields: Fields, peer: str | None) -> Response:
        del fields, peer
        return Response(408, [(b"connection", b"close"), (b"content-length", b"0")])


def said() -> Response:
    return Response(202, [(b"content-length", b"5")], b"short")


@asynccontextmanager
async def spoken(app: App, **options: object) -> AsyncIterator[Streams]:
    given = {"http": BeaconProtocol, "lifespan": "off", "proxy_headers": False}
    served = serve(cast("ASGIApplication", app), **(given | options))
    async with served as url:
        yield await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))


async def asked(app: App, *requests: str, answers: int = 1) -> bytes:
    """Send these on one connection, and read as many answers."""
    async with spoken(app) as (reader, writer):
        for request in requests:
            writer.write(request.encode())
        got = b""
        async with asyncio.timeout(10):
            while got.count(b"HTTP/1.1 2") < answers or not got.endswith(
                (b"asgi", b"short")
            ):
                part = await reader.read(4096)
                assert part, got
                got += part
        writer.close()
        return got


@pytest.mark.parametrize(
    ("request_", "way"),
    [
        (PLAIN, "short"),
        (PLAIN.replace("host: x", "host: x\r\norigin: https://a"), "short"),
        (PLAIN.replace("/track", "/track?x=1"), "asgi"),
        (PLAIN.replace("/track", "/other"), "asgi"),
        (PLAIN.replace("POST", "PUT"), "asgi"),
        (PLAIN.replace("host: x", "host: x\r\nprefer: wait=1"), "asgi"),
        (PLAIN.replace("host: x", "host: x\r\nconnection: close"), "asgi"),
        (PLAIN.replace("host: x", "host: x\r\nexpect: 100-continue"), "asgi"),
        (
            "POST /track HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            "2\r\n{}\r\n0\r\n\r\n",
            "asgi",
        ),
        ("GET /track HTTP/1.1\r\nhost: x\r\n\r\n", "asgi"),
        (
            "POST /track HTTP/1.1\r\nhost: x\r\ncontent-length: 65537\r\n\r\n"
            + "x" * 65_537,
            "asgi",
        ),
        (
            "POST /track HTTP/1.1\r\nhost: x\r\ncontent-length: 65536\r\n\r\n"
            + "x" * 65_536,
            "short",
        ),
    ],
)
async def test_only_what_is_plain_goes_past_asgi(request_: str, way: str) -> None:
    app = App()
    got = await asked(app, request_)
    assert app.seen[0][0] == way
    assert got.endswith(way.encode())
    assert b"\r\ndate: " in got.lower()


async def test_headers_that_come_again_are_read_alike_on_both_ways() -> None:
    app = App()
    again = (
        "X-Forwarded-For: 192.0.2.1\r\nOrigin: https://a\r\nUser-Agent: one\r\n"
        "sec-gpc: 1\r\nempty:\r\nx-forwarded-for: 10.0.0.1, 10.0.0.2\r\n"
        "ORIGIN: https://b\r\nuser-agent: two\r\nSec-GPC: 1\r\nEmpty:\r\n"
    )
    for request in (PLAIN, PLAIN.replace("/track", "/track?x=1")):
        await asked(app, request.replace("host: x\r\n", f"host: x\r\n{again}"))
    assert [way for way, _ in app.seen] == ["short", "asgi"]
    assert app.fields[0] == app.fields[1]
    assert app.fields[0] == {
        b"host": b"x",
        b"content-length": b"2",
        b"x-forwarded-for": b"192.0.2.1,10.0.0.1, 10.0.0.2",
        b"origin": b"https://a https://b",
        b"user-agent": b"two",
        b"sec-gpc": b"1",
        b"empty": b"",
    }


async def test_no_header_is_left_over_for_the_next_request() -> None:
    app = App()
    first = PLAIN.replace("host: x", "host: x\r\norigin: https://a")
    async with spoken(app) as (reader, writer):
        for request in (first, PLAIN, first.replace("/track", "/other"), PLAIN):
            writer.write(request.encode())
            async with asyncio.timeout(10):
                await reader.readuntil(b"asgi" if "/other" in request else b"short")
        writer.close()
    assert [b"origin" in fields for fields in app.fields] == [True, False, True, False]


async def test_a_connection_is_used_again_on_both_ways() -> None:
    app = App()
    other = PLAIN.replace("/track", "/other")
    async with spoken(app) as (reader, writer):
        for request, way in ((PLAIN, b"short"), (other, b"asgi"), (PLAIN, b"short")):
            writer.write(request.encode())
            async with asyncio.timeout(10):
                await reader.readuntil(way)
        writer.close()
    assert [way for way, _ in app.seen] == ["short", "asgi", "short"]


async def test_what_is_sent_before_the_answer_waits_for_it() -> None:
    app = App(at_once=0)

    async def answer() -> None:
        async def one_is_held() -> bool:
            return bool(app.held)

        await eventually(one_is_held)
        app.held.pop()(said())

    answering = asyncio.create_task(answer())
    got = await asked(app, PLAIN + PLAIN, answers=2)
    await answering
    assert [way for way, _ in app.seen] == ["short", "asgi"]
    assert got.index(b"short") < got.index(b"asgi")


async def test_a_body_in_pieces_is_put_together() -> None:
    app = App()
    head, _, _ = PLAIN.partition("{")
    async with spoken(app) as (reader, writer):
        writer.write(head.encode() + b"{")
        await writer.drain()
        writer.write(b"}")
        async with asyncio.timeout(10):
            await reader.readuntil(b"short")
        writer.close()
    assert app.seen == [("short", b"{}")]


async def test_a_body_that_does_not_come_is_answered_and_closed() -> None:
    app = App(body_timeout_s=0.05)
    async with spoken(app) as (reader, writer):
        writer.write(PLAIN[:-1].encode())
        async with asyncio.timeout(10):
            got = await reader.read()
        writer.close()
    assert got.startswith(b"HTTP/1.1 408")
    assert got.count(b"connection: close") == 1
    assert app.seen == []


async def test_an_answer_for_who_is_gone_goes_nowhere() -> None:
    app = App(at_once=0)
    async with spoken(app) as (_, writer):
        writer.write(PLAIN.encode())

        async def one_is_held() -> bool:
            return bool(app.held)

        await eventually(one_is_held)
        writer.transport.abort()
        app.held.pop()(said())
    assert await asked(App(), PLAIN)


@pytest.mark.parametrize(
    ("sent", "at_once"),
    [
        pytest.param(PLAIN, math.inf, id="answered"),
        pytest.param(PLAIN, 0, id="held"),
        pytest.param(PLAIN[:-1], math.inf, id="unfinished"),
    ],
)
async def test_a_connection_that_ended_leaves_nothing_to_collect(
    sent: str, at_once: float
) -> None:
    """The collector comes seldom, and a page may make a connection for each beacon."""
    alive: WeakSet[BeaconProtocol] = WeakSet()

    class Watched(BeaconProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            alive.add(self)
            super().connection_made(transport)

    app = App(at_once=at_once)
    gc.disable()
    try:
        async with spoken(app, http=Watched) as (reader, writer):
            writer.write(sent.encode())

            async def arrived() -> bool:
                return bool(alive) and (bool(app.seen) or sent != PLAIN)

            await eventually(arrived)
            if at_once and sent == PLAIN:
                await reader.readuntil(b"short")
            writer.close()

            async def ended() -> bool:
                return all(made.transport.is_closing() for made in alive)

            await eventually(ended)
            while app.held:
                app.held.pop()(said())

            async def gone() -> bool:
                return not alive

            await eventually(gone)
    finally:
        gc.enable()


async def test_a_server_that_stops_answers_what_it_has_taken_and_closes() -> None:
    app = App(at_once=0)
    async with spoken(app) as (reader, writer):
        writer.write(PLAIN.encode())

        async def one_is_held() -> bool:
            return bool(app.held)

        await eventually(one_is_held)

        # After the block's end has asked it to stop.
        asyncio.get_running_loop().call_later(0.2, lambda: app.held.pop()(said()))
    async with asyncio.timeout(10):
        got = await reader.read()
    assert got.endswith(b"short")
    assert b"connection: close" in got
    writer.close()


async def test_what_came_together_with_another_is_not_closed_as_idle() -> None:
    app = App(at_once=1)
    async with spoken(app, timeout_keep_alive=0.2) as (reader, writer):
        other, other_writer = await asyncio.open_connection(
            *writer.get_extra_info("peername")
        )
        writer.write((PLAIN + PLAIN).encode())
        await reader.readuntil(b"short")

        async def asked_again() -> bool:
            return bool(app.held)

        await eventually(asked_again)
        # Asked later, and idle for long enough to be closed.
        other_writer.write(PLAIN.replace("/track", "/other").encode())
        async with asyncio.timeout(10):
            assert (await other.read()).endswith(b"asgi")
            app.held[0](said())
            assert (await reader.readuntil(b"short")).startswith(b"HTTP/1.1 202")
        other_writer.close()
        writer.close()


async def test_who_reads_no_answers_is_read_no_more() -> None:
    made: list[BeaconProtocol] = []

    class Kept(BeaconProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            made.append(self)

    async with spoken(App(), http=Kept) as (_, writer):
        writer.write(PLAIN.encode() * 500_000)

        async def both_are_held_back() -> bool:
            [server] = made
            return server.flow.write_paused and server.flow.read_paused

        await eventually(both_are_held_back)
        assert made[0].transport.get_write_buffer_size() < 1024 * 1024
        writer.transport.abort()


async def test_an_idle_connection_is_closed_and_one_that_is_asked_is_not() -> None:
    app = App(at_once=1)
    async with spoken(app, timeout_keep_alive=1.0) as (reader, writer):
        other, other_writer = await asyncio.open_connection(
            *writer.get_extra_info("peername")
        )
        writer.write(PLAIN.encode())
        await reader.readuntil(b"short")
        writer.write(PLAIN.encode())

        async def asked_again() -> bool:
            return bool(app.held)

        await eventually(asked_again)
        app.at_once = 1
        # Asked later, and idle for long enough to be closed.
        other_writer.write(PLAIN.encode())
        async with asyncio.timeout(10):
            assert (await other.read()).endswith(b"short")
            app.held[0](said())
            assert (await reader.readuntil(b"short")).startswith(b"HTTP/1.1 202")
            assert await reader.read() == b""
        other_writer.close()
        writer.close()
