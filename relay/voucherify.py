"""Send one event to Voucherify's client-side API and say what became of it.

Whatever the upstream does, `Voucherify.send` gives an `Answer` and raises nothing.
An event makes points and has no idempotency key: a failure counts as `retry` only
when the request was certainly not written; in doubt it is `unknown`. One call is one
request: no retry, no redirect, no cookie, no proxy from the environment.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import aiohttp
import httpx
import msgspec
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from httpx_aiohttp import AiohttpTransport
from pydantic import SecretStr

from relay import __version__
from relay.outcomes import Hold
from relay.retry import HOUR_MS, MONTH_MS, number, told_ms

EVENTS_PATH = "/client/v1/events"
# Node's HTTP server closes an idle connection after 5 s (server.keepAliveTimeout).
# A request that crosses this close is of unknown fate, so we let go first.
KEEPALIVE_SECONDS = 4.0
# Voucherify's errors have some hundred bytes; what is longer comes from a proxy.
MAX_BODY_BYTES = 64 * 1024
# The status line has told the fate; a dawdling body may cost a connection, no more.
BODY_SECONDS = 2.0


class Verdict(StrEnum):
    """What an answer, or the lack of one, means for the event that was sent."""

    DELIVERED = "delivered"  # 2xx, whatever the body says.
    RETRY = "retry"  # Not processed: it was not sent, or 408, 502, 503.
    WAIT = "wait"  # 429: again when told; spends no attempt.
    UNKNOWN = "unknown"  # May have been processed: 500, 504, silence after sending.
    REJECTED = "rejected"  # 400, 404, 413, 422, …: the same event would fail again.
    HOLD = "hold"  # No event gets through until somebody acts; see `Answer.hold`.


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What Voucherify said to one event. Texts are one line each and cut to length."""

    verdict: Verdict
    reason: str  # snake_case, for counters and logs
    status: int | None = None  # None: there was no answer
    hold: Hold | None = None
    # What the upstream asked for: at most 1 h, or 31 days while the plan is spent.
    # With a 2xx it is when the calls that `remaining` counts are restored.
    retry_after_ms: int | None = None
    error_key: str | None = None
    error_message: str | None = None  # may quote the customer's id: not for logs
    error_details: str | None = None
    request_id: str | None = None  # what Voucherify's support asks for
    limit: int | None = None
    remaining: int | None = None
    limit_type: str | None = None


_BY_STATUS: dict[int, tuple[Verdict, Hold | None]] = {
    401: (Verdict.HOLD, Hold.AUTH),
    402: (Verdict.HOLD, Hold.PLAN),
    403: (Verdict.HOLD, Hold.AUTH),
    405: (Verdict.HOLD, Hold.CONFIG),
    406: (Verdict.HOLD, Hold.CONFIG),
    408: (Verdict.RETRY, None),
    415: (Verdict.HOLD, Hold.CONFIG),
    429: (Verdict.WAIT, None),
    502: (Verdict.RETRY, None),
    503: (Verdict.RETRY, None),
}
_BY_CLASS: dict[int, tuple[Verdict, Hold | None]] = {
    2: (Verdict.DELIVERED, None),
    3: (Verdict.HOLD, Hold.CONFIG),  # the API redirects nobody: this is not the API
    4: (Verdict.REJECTED, None),
}

_REASONS = {Verdict.DELIVERED: "delivered", Verdict.WAIT: "rate_limited"}

# What to call a failure without an answer: (before the request was written, after).
# Only the name comes from the class, the verdict never does: httpx-aiohttp 0.2 gives
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
_WRITTEN: ContextVar[asyncio.Event] = ContextVar("relay_voucherify_written")


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


async def _without_reason_phrase(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    # httpx-aiohttp 0.2 encodes the phrase as strict UTF-8, so one in Latin-1 would
    # raise after the status has come, and a delivered event would look lost.
    response = await handler(request)
    response.reason = None
    return response


class Voucherify:
    """The client-side event API, over one pool of kept connections."""

    def __init__(
        self,
        *,
        base_url: str,
        application_id: str,
        token: SecretStr | str,
        origin: str,
        max_connections: int = 32,
        connect_timeout: float = 3.0,  # for the pool, DNS, TCP and TLS together
        timeout: float = 10.0,  # from the call to the last byte read
        clock: Callable[[], float] = time.time,
    ) -> None:
        if isinstance(token, SecretStr):
            token = token.get_secret_value()
        self._base_url = cluster_url(base_url)
        self._origin = _header("origin", origin)
        self._timeout = timeout
        self._clock = clock
        self._max_connections = max_connections
        headers = {
            "X-Client-Application-Id": _header("application id", application_id),
            "X-Client-Token": _header("client token", token),
            "origin": self._origin,
            # Voucherify's audit log shows and filters it as the channel.
            "X-Voucherify-Channel": f"relay:{__version__}",
            "User-Agent": f"voucherify-relay/{__version__}",
            "Content-Type": "application/json",
            "Accept": "application/json",
        }
        self._request = partial(
            httpx.Request,
            "POST",
            httpx.URL(self._base_url + EVENTS_PATH),
            headers=httpx.Headers(headers),
            extensions={"timeout": {"pool": connect_timeout}},
        )
        # The transport without httpx.AsyncClient around it, whose cookies, redirects
        # and authentication we must not use: 0.3 instead of 0.7 ms CPU a request.
        self._transport = AiohttpTransport(trust_env=False, client=self._session)

    def __repr__(self) -> str:
        return f"Voucherify(base_url={self._base_url!r}, origin={self._origin!r})"

    async def send(self, body: bytes) -> Answer:
        """Send one event, JSON in `body`, and say what became of it."""
        if not body:
            raise ValueError("an event has a body: there is nothing to send")
        # The kernel knows of a closed connection before the event loop has polled for
        # it, and until then the pool hands it out. One turn polls, the next one tells.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        request = self._request(content=body)
        written = asyncio.Event()
        reset = _WRITTEN.set(written)
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._transport.handle_async_request(request)
        except _CAUGHT as error:
            return _no_answer(error, written=written.is_set())
        finally:
            _WRITTEN.reset(reset)
        told = await _read_body(response, deadline)
        headers = dict(response.headers)
        return read_answer(response.status_code, headers, told, now=self._clock())

    async def aclose(self) -> None:
        """Close the pool. What is in flight ends without an answer."""
        await self._transport.aclose()

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
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


def _no_answer(error: Exception, *, written: bool) -> Answer:
    # Only the class is used and nothing is logged: an aiohttp exception may carry
    # the request, headers and token included.
    if isinstance(error.__cause__, aiohttp.ClientError):
        error = error.__cause__
    before, after = next(FAILURES[c] for c in type(error).__mro__ if c in FAILURES)
    verdict, reason = (Verdict.UNKNOWN, after) if written else (Verdict.RETRY, before)
    return Answer(verdict=verdict, reason=reason)


async def _read_body(response: httpx.Response, deadline: float) -> bytes:
    """Read the body within bounds. A broken one counts for as far as it came."""
    body = bytearray()
    latest = min(deadline, asyncio.get_running_loop().time() + BODY_SECONDS)
    # The status is known and decides: nothing that goes wrong from here on matters.
    with suppress(*_CAUGHT):
        try:
            async with asyncio.timeout_at(latest):
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) >= MAX_BODY_BYTES:
                        break
        finally:  # not read to its end, the connection is closed
            await response.aclose()
    return bytes(body[:MAX_BODY_BYTES])


def read_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, now: float
) -> Answer:
    """Judge an answer by its status; headers and body only say more about it."""
    limit_type = _code(headers.get("x-rate-limit-type"))
    fate = _BY_STATUS.get(status) or _BY_CLASS.get(status // 100)
    verdict, hold = fate or (Verdict.UNKNOWN, None)
    if status == 429 and limit_type == "api_calls_cycle":
        # Spent until the plan's cycle ends: that takes days, not a minute.
        verdict, hold = Verdict.HOLD, Hold.PLAN
    cap_ms = MONTH_MS if hold is Hold.PLAN else HOUR_MS
    # The body of a 2xx shows the customer's stored profile: it is not looked at.
    error = {} if verdict is Verdict.DELIVERED else _read_error(body)
    key = _text(error.get("key"), 64)
    named = _code(key) if verdict in (Verdict.REJECTED, Verdict.HOLD) else None
    return Answer(
        verdict=verdict,
        reason=_REASONS.get(verdict) or named or f"upstream_{status}",
        status=status,
        hold=hold,
        retry_after_ms=told_ms(headers, now=now, cap_ms=cap_ms),
        error_key=key,
        error_message=_text(error.get("message"), 500),
        error_details=_text(error.get("details"), 500),
        request_id=_text(error.get("request_id"), 64),
        limit=number(headers.get("x-rate-limit-limit")),
        remaining=number(headers.get("x-rate-limit-remaining")),
        limit_type=limit_type,
    )


def _read_error(body: bytes) -> dict[str, object]:
    # Voucherify's own is {code, key, message, details, request_id}, its framework's
    # {statusCode, error, message} (400 for unreadable JSON, 413). The balancer and the
    # firewall in front speak HTML or plain text, or say nothing.
    try:
        error: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return {"message": re.sub(r"<[^<>]*>", " ", body.decode(errors="replace"))}
    if not isinstance(error, dict):
        return {"message": error}
    if "message" not in error:
        nested = error.get("error")
        error["message"] = nested.get("message") if isinstance(nested, dict) else nested
    return error


def _text(value: object, most: int) -> str | None:
    """One line of printable characters, fit for a terminal; None when empty."""
    if not isinstance(value, str):
        return None
    visible = "".join(c if c.isprintable() else " " for c in value[: 4 * most])
    return " ".join(visible.split())[:most] or None


def _code(text: str | None) -> str | None:
    return re.sub(r"[^a-z0-9]+", "_", (text or "")[:64].lower()).strip("_") or None


def _header(name: str, value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError(f"the {name} must be visible ASCII characters: copy it anew")
    return value


_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_URL = re.compile(rf"(https?)://({_LABEL}(?:\.{_LABEL})*|\[::1\])(:[1-9]\d{{0,4}})?/?")
_NO_NAME = re.compile(r".*voucherify\.io|localhost|(?:\d+\.){3}\d+")
_LOOPBACK = re.compile(r"localhost|\[::1\]|127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}")


def cluster_url(cluster: str) -> str:
    """Give the base URL of a cluster, named in short or in full, or ValueError."""
    # The messages never show the value: it may hold a password by mistake.
    cure = (
        "write the cluster's name (api, us1.api, as1.api) or its address (https://host "
        "or https://host:port, no path; http:// only to 127.0.0.1, [::1] or localhost)"
    )
    url = cluster.lower() if cluster.isascii() else ""
    if "://" not in url and not _NO_NAME.fullmatch(url):
        url = f"https://{url}.voucherify.io"
    match = _URL.fullmatch(url)
    if match is None or int((match[3] or ":1")[1:]) > 65_535:
        raise ValueError(f"this is not a cluster: {cure}")
    scheme, host, port = match.groups()
    if scheme == "http" and not _LOOPBACK.fullmatch(host):
        raise ValueError(f"http:// would show the client token to others: {cure}")
    if f".{host}".endswith(".download.voucherify.io"):
        raise ValueError(f"a download host never takes events: {cure}")
    return f"{scheme}://{host}{port or ''}"
