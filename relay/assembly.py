"""Put the parts together from the settings: what the edge and the worker share.

A `Station` is one process's share of the relay: the queue, the forwarder if it has
one, the ops listener, and the housekeeping that keeps the gauges fresh.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from hashlib import sha256
from secrets import token_hex

import structlog
import uvicorn

from relay.errors import QueueUnavailable, RelayError
from relay.forwarder import Forwarder
from relay.ops import Check, ops_app
from relay.queue import Queue
from relay.settings import Settings
from relay.voucherify import Voucherify

REAP_EVERY_S = 2.0  # gauges are promised to be at most five seconds old

log = structlog.get_logger()


def make_queue(settings: Settings, redis_url: str) -> Queue:
    """The queue as the settings describe it."""
    return Queue(
        url=redis_url,
        prefix=settings.redis_prefix,
        limits=settings.limits,
        budget=settings.upstream_budget,
        egress=settings.egress,
        queue_max=settings.queue_max,
        dedupe_ms=settings.dedupe_window * 1000,
    )


def digest_key(settings: Settings) -> bytes:
    """The key of the digests that stand for people in Redis.

    Made from a secret that all relays of a shop share already, so that their limits
    count together; nobody without it can turn a digest back.
    """
    secret = settings.client_token.get_secret_value()
    return sha256(b"relay digests\0" + secret.encode()).digest()


class QuietServer(uvicorn.Server):
    """A second server in one process: signals belong to the first one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Station:
    """One process's share of the relay, between start and stop."""

    def __init__(
        self,
        settings: Settings,
        *,
        redis_url: str,
        forward: bool,
        ops_socket: socket.socket | None = None,
    ) -> None:
        self.settings = settings
        self.queue = make_queue(settings, redis_url)
        self.draining = False
        self._upstream: Voucherify | None = None
        self._forwarder: Forwarder | None = None
        if forward:
            self._upstream = Voucherify(
                base_url=settings.upstream_url,
                application_id=settings.client_application_id,
                token=settings.client_token,
                origin=settings.origin,
                max_connections=settings.concurrency,
            )
            self._forwarder = Forwarder(
                queue=self.queue,
                upstream=self._upstream,
                concurrency=settings.concurrency,
                drain_timeout_s=settings.drain_timeout,
            )
        self._ops_socket = ops_socket
        self._fit: str | None = None  # why this Redis may not be used
        # A name nobody had before: a slot refuses numbers that it has seen.
        self._slot, self._seq = f"ready-{token_hex(6)}", 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Deliver and keep house; leaving it drains."""
        await self._look_at_redis()
        housekeeping = asyncio.create_task(self._housekeeping())
        delivering = (
            asyncio.create_task(self._forwarder.run()) if self._forwarder else None
        )
        try:
            async with self._ops():
                yield
                self.draining = True
                if self._forwarder is not None and delivering is not None:
                    self._forwarder.stop()
                    await delivering
        finally:
            for task in filter(None, (housekeeping, delivering)):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            if self._upstream is not None:
                await self._upstream.aclose()
            await self.queue.aclose()

    # --- readiness ----------------------------------------------------------------

    def checks(self) -> dict[str, Check]:
        return {"redis": self._redis_check, "queue": self._queue_check}

    async def _redis_check(self) -> str:
        if self._fit is not None:
            return self._fit
        if self.draining:
            return "draining: this relay is stopping"
        # An empty commit meets everything that a real one would: memory, disk, role.
        self._seq += 1
        await self.queue.commit(self._slot, self._seq, [], [])
        return "ok"

    async def _queue_check(self) -> str:
        gauges = await self.queue.hash("gauges")
        waiting = sum(int(gauges.get(g, 0)) for g in ("queued", "in_flight", "delayed"))
        if waiting >= self.settings.queue_max:
            return f"full: {waiting} events wait, RELAY_QUEUE_MAX is reached"
        return "ok"

    # --- background ---------------------------------------------------------------

    async def _look_at_redis(self) -> None:
        """Judge the server once it is there; events wait outside until then."""
        try:
            for warning in await self.queue.probe():
                log.warning("redis.doubtful", detail=warning)
        except QueueUnavailable as error:
            self._fit = f"{error.reason}: {error.detail}"
            log.error("redis.unavailable", reason=error.reason, detail=error.detail)
        except RelayError as error:
            self._fit = str(error)
            raise
        else:
            self._fit = None

    async def _housekeeping(self) -> None:
        away = False
        while True:
            try:
                if self._fit is not None:
                    await self._look_at_redis()
                await self.queue.reap()
                away = False
            except QueueUnavailable as error:
                if not away:
                    log.warning("housekeeping.paused", reason=error.reason)
                away = True
            except Exception:
                # The top of the loop: stale gauges must not end the delivery.
                log.exception("housekeeping.failed")
            await asyncio.sleep(REAP_EVERY_S)

    @asynccontextmanager
    async def _ops(self) -> AsyncIterator[None]:
        if self._ops_socket is None:
            yield
            return
        server = QuietServer(
            uvicorn.Config(
                ops_app(self.checks()),
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[self._ops_socket]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket, `shared` by several processes of one relay.

    Raises `RelayError` that says what to do when the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        msg = (
            f"Cannot listen on {host} port {port} ({error.strerror}): stop what uses "
            "it, or choose another port (RELAY_PORT, RELAY_OPS_PORT)."
        )
        raise RelayError(msg) from error
    sock.set_inheritable(True)
    return sock
