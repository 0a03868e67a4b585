"""One POST to Voucherify, over one pool of kept connections.

Gives a `Reply` once a status has come, else `Lost`, which knows whether the server may
have learned of the request. It raises nothing. One call is one request: no retry, no
redirect, no cookie, no proxy from the environment.
"""

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar

import aiohttp
import httpx
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from httpx_aiohttp import AiohttpTransport

from relay.replies import Lost, Reply

# Node's HTTP server closes an idle connection after 5 s (server.keepAliveTimeout).
# A request that crosses this close is of unknown fate, so we let go first.
KEEPALIVE_SECONDS = 4.0
# Voucherify's errors have some hundred bytes; what is longer comes from a proxy.
MAX_BODY_BYTES = 64 * 1024
# The status line has told the fate; a dawdling body may cost a connection, no more.
BODY_SECONDS = 2.0

# What to call a failure without an answer: (before the request was written, after).
# Only the name comes from the class, the fate never does: httpx-aiohttp 0.2 gives
# httpx.ConnectTimeout for a refused connection and for one lost after sending alike.
# Its cause, the aiohttp exception, is more exact and is therefore looked up first.
_LOST = ("connect_failed", "connection_lost")
_SLOW = ("connect_timeout", "read_timeout")
FAILURES: dict[type[Exception], tuple[str, str]] = {
    OSError: _LOST,
    TimeoutError: _SLOW,  # our own deadline
    aiohttp.ClientError: _LOST,
    aiohttp.ServerTimeoutError: _SLOW,
    aiohttp.ClientConnectorDNSError: ("dns_failed", "connection_lost"),
    aiohttp.ClientSSLError: ("tls_failed", "connection_lost"),
    aiohttp.ClientResponseError: ("connect_failed", "garbled_answer"),
    httpx.HTTPError: _LOST,
    httpx.TimeoutException: _SLOW,
    httpx.InvalidURL: _LOST,
    httpx.CookieConflict: _LOST,
    httpx.StreamError: _LOST,
}
_CAUGHT = tuple(FAILURES)

# Set once the server may know of the request that the current task sends.
_WRITTEN: ContextVar[asyncio.Event] = ContextVar("relay_transport_written")


class _Request(aiohttp.ClientRequest):
    """A request that notes the moment from which the server may know of it."""

    async def write_bytes(
        self,
        writer: AbstractStreamWriter,
        conn: Connection,
        content_length: int | None = None,
    ) -> None:
        # Head and body leave here, together. A kept connection that has been closed
        # meanwhile takes neither, and the failure stays a certain one.
        transport = conn.transport
        if transport is not None and not transport.is_closing():
            _WRITTEN.get().set()
        await super().write_bytes(writer, conn, content_length)

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        response = await super().send(conn)
        if self.method == "GET":  # without a body there was nothing for write_bytes
            _WRITTEN.get().set()
        return response


async def _without_reason_phrase(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    # httpx-aiohttp 0.2 encodes the phrase as strict UTF-8, so one in Latin-1 would
    # raise after the status has come, and a delivered event would look lost.
    response = await handler(request)
    response.reason = None
    return response


class Transport:
    """The pool, shared by all requests to one cluster."""

    def __init__(
        self,
        *,
        max_connections: int = 32,
        connect_timeout: float = 3.0,  # for the pool, DNS, TCP and TLS together
        timeout: float = 10.0,  # from the call to the last byte read
    ) -> None:
        self._max_connections = max_connections
        self._timeouts = {"timeout": {"pool": connect_timeout}}
        self._timeout = timeout
        # The transport without httpx.AsyncClient around it, whose cookies, redirects
        # and authentication we must not use: 0.3 instead of 0.7 ms CPU a request.
        self._transport = AiohttpTransport(trust_env=False, client=self._session)

    async def request(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        most: int = MAX_BODY_BYTES,  # of the answer's body, in bytes
        body_seconds: float = BODY_SECONDS,
    ) -> Reply | Lost:
        """Send one request, and say what came back."""
        # The kernel knows of a closed connection before the event loop has polled for
        # it, and until then the pool hands it out. One turn polls, the next one tells.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        # Not as `content`, for which httpx adds the headers that aiohttp adds, too.
        request = httpx.Request(
            method,
            url,
            headers=headers,
            stream=httpx.ByteStream(body),
            extensions=self._timeouts,
        )
        request.read()
        written = asyncio.Event()
        reset = _WRITTEN.set(written)
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._transport.handle_async_request(request)
        except _CAUGHT as error:
            return _lost(error, written=written.is_set())
        finally:
            _WRITTEN.reset(reset)
        latest = min(deadline, asyncio.get_running_loop().time() + body_seconds)
        read, whole = await _read_body(response, latest, most)
        return Reply(
            status=response.status_code,
            headers=dict(response.headers.items()),  # by itself it asks for each name
            body=read,
            whole=whole,
        )

    async def aclose(self) -> None:
        """Close the pool. What is in flight ends without an answer."""
        await self._transport.aclose()

    def _socket(self, addr_info: aiohttp.AddrInfoType) -> socket.socket:
        """A socket whose bytes the kernel gives up no later than we do.

        Else it goes on for minutes to send what a cut line has kept, and an event could
        arrive after it was looked up.
        """
        family, kind, proto, *_ = addr_info
        made = socket.socket(family=family, type=kind, proto=proto)
        if option := getattr(socket, "TCP_USER_TIMEOUT", None):  # Linux
            made.setsockopt(socket.IPPROTO_TCP, option, int(self._timeout * 1000))
        return made

    def _session(self) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                socket_factory=self._socket,
                limit=self._max_connections,
                keepalive_timeout=KEEPALIVE_SECONDS,
                ssl=self._transport.ssl_context,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Nothing here inflates an answer, so no compressed one is asked for.
            skip_auto_headers=["Accept-Encoding"],
            request_class=_Request,
            middlewares=[_without_reason_phrase],
        )
        # A GET that met a closed connection would be sent again, beside the budget.
        # There is no argument for it; tests/test_activity.py counts the requests.
        session._retry_connection = False
        return session


def _lost(error: Exception, *, written: bool) -> Lost:
    # Only the class is used and nothing is logged: an aiohttp exception may carry
    # the request, headers and token included.
    if isinstance(error.__cause__, aiohttp.ClientError):
        error = error.__cause__
    before, after = next(FAILURES[c] for c in type(error).__mro__ if c in FAILURES)
    return Lost(reason=after if written else before, written=written)


async def _read_body(
    response: httpx.Response, latest: float, most: int
) -> tuple[bytes, bool]:
    """Read the body within bounds: as far as it came, and whether that is all."""
    body, whole = bytearray(), False
    # The status is known and decides: nothing that goes wrong from here on matters.
    with suppress(*_CAUGHT):
        try:
            async with asyncio.timeout_at(latest):
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) >= most:
                        break
                else:
                    whole = True
        finally:  # not read to its end, the connection is closed
            await response.aclose()
    return bytes(body[:most]), whole
