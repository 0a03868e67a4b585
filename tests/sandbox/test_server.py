"""Serving a sandbox: within another program, and as one of its own."""

import asyncio
import signal
import socket
import time

import httpx
import pytest

from relay.sandbox import (
    PROTOCOL,
    Sandbox,
    SandboxServer,
    serve_sandbox,
    server_config,
)
from tests.sandbox.support import CLIENT_HEADERS, EVENT
from tests.support import eventually, serve

pytestmark = pytest.mark.anyio


async def test_a_taken_port_is_an_error_and_not_the_end_of_the_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            async with serve_sandbox(port=port):
                pass


async def test_signals_stay_with_the_program_around_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with serve_sandbox():
        assert signal.getsignal(signal.SIGTERM) is before


async def test_two_sandboxes_share_nothing() -> None:
    async with (
        serve_sandbox() as one,
        serve_sandbox() as two,
        httpx.AsyncClient(headers=CLIENT_HEADERS) as http,
    ):
        await http.post(f"{one.url}/client/v1/events", json=EVENT)
        assert (len(one.sandbox.events), len(two.sandbox.events)) == (1, 0)


async def test_it_listens_on_ipv6_where_the_machine_has_it() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 on this machine")
    async with serve_sandbox(host="::1") as running, httpx.AsyncClient() as http:
        assert running.url.startswith("http://[::1]:")
        counts = await http.get(f"{running.url}/_sandbox/counts")
        assert counts.status_code == 200


async def test_any_uvicorn_can_serve_it_with_the_protocol() -> None:
    sandbox = Sandbox()
    sandbox.fail_next(1, disconnect="reset")
    async with (
        serve(sandbox.app, http=PROTOCOL, proxy_headers=False) as url,
        httpx.AsyncClient(headers=CLIENT_HEADERS) as http,
    ):
        with pytest.raises(httpx.ReadError):
            await http.post(f"{url}/client/v1/events", json=EVENT)
        answer = await http.post(f"{url}/client/v1/events", json=EVENT)
        assert answer.status_code == 200


async def test_a_server_of_its_own_stops_at_once() -> None:
    sandbox = Sandbox()
    sandbox.fail_next(1, delay=600)
    server = SandboxServer(server_config(sandbox))
    serving = asyncio.create_task(server.serve())

    async def started() -> object:
        return server.started

    await eventually(started)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(headers=CLIENT_HEADERS) as http:
        url = f"http://127.0.0.1:{port}/client/v1/events"
        waiting = asyncio.create_task(http.post(url, json=EVENT))

        async def arrived() -> object:
            return sandbox.events

        await eventually(arrived)
        began = time.monotonic()
        server.should_exit = True
        await serving
        assert time.monotonic() - began < 5
        with pytest.raises(httpx.HTTPError):
            await waiting


async def test_a_sender_that_hangs_up_within_the_body_is_noted() -> None:
    async with serve_sandbox() as running:
        port = int(running.url.rsplit(":", 1)[1])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

        async def noted() -> object:
            return running.sandbox.requests

        await eventually(noted)
        [record] = running.sandbox.requests
        assert (record.verdict, record.status) == ("client_gone", None)
