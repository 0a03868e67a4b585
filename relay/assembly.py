"""Put the parts together from the settings: what the edge and the worker share.

A `Station` is one process's share of the relay: the queue, the forwarder if it has
one, the ops listener, and the housekeeping that keeps the gauges fresh.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib import import_module
from secrets import token_hex
from typing import TYPE_CHECKING

import structlog
import uvicorn
from pydantic import SecretStr

from relay.catalog import Catalog, CatalogError
from relay.cluster import Keys, shown_request
from relay.counters import stats, time_of
from relay.digests import Digests
from relay.errors import QueueUnavailable, RelayError, SettingsError
from relay.forwarder import Forwarder
from relay.grants import EVENT_SCOPES, Grant
from relay.letters_api import LettersApi
from relay.ops import Check, ops_app
from relay.outcomes import Hold
from relay.policy import Policy
from relay.queue import Queue
from relay.reload import CatalogFile
from relay.settings import STRANGERS, Settings
from relay.signing import Signer

if TYPE_CHECKING:
    from relay.voucherify import Voucherify

# Who makes the calls, with the HTTP client that it needs: a fifth of all that a start
# has to import. Beacons are taken before it is there, and an edge alone never needs it.
UPSTREAM = "relay.voucherify"
REAP_EVERY_S = 2.0  # gauges are promised to be at most five seconds old
BACKLOG = 2048  # connections that wait to be accepted, as uvicorn has it
STOPS = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger()


def make_queue(settings: Settings, redis_url: str) -> Queue:
    """The queue as the settings describe it."""
    return Queue(
        url=redis_url,
        prefix=settings.redis_prefix,
        limits=settings.limits,
        budget=settings.upstream_budget,
        egress=settings.egress,
        reserve=settings.upstream_reserve,
        queue_max=settings.queue_max,
        # An id must be known for as long as its event can still be delivered.
        dedupe_ms=max(settings.dedupe_window, settings.ttl) * 1000,
    )


def make_digests(settings: Settings) -> Digests:
    """What stands for people in Redis.

    Keyed with a secret that all relays of a shop share already, so that their limits
    count together; nobody without it can turn a digest back.
    """
    secret = settings.digest_secret.encode()
    return Digests(sha256(b"relay digests\0" + secret).digest())


def make_signer(settings: Settings) -> Signer | None:
    """What makes and reads tokens; None when there is no key for it."""
    if not settings.signing_keys:
        return None
    return Signer(settings.signing_keys, ttl_s=settings.token_ttl)


def make_catalog(settings: Settings, text: str | None = None) -> CatalogFile:
    """The catalogue's file. Raises `SettingsError` when it is faulty.

    `text` is a version that was good, for a process that starts late.
    """
    try:
        return CatalogFile(
            settings.catalog,
            # An id must be remembered for as long as its event may live.
            max_ttl_s=max(settings.dedupe_window, settings.ttl),
            signing=bool(settings.signing_keys),
            server_api=settings.upstream_api == "server",
            text=text,
        )
    except CatalogError as error:
        raise SettingsError([f"RELAY_CATALOG: {f}" for f in error.faults]) from None


def trusts_strangers(settings: Settings, catalog: Catalog) -> bool:
    """Whether a sender without a token may say all that the schema allows."""
    return not settings.restricted and catalog.takes_strangers(settings.tokens)


def tell_of_strangers(settings: Settings, catalog: Catalog) -> None:
    """Log what a catalogue lets any visitor do; without one, settings.py says it."""
    if settings.catalog is not None and trusts_strangers(settings, catalog):
        log.warning("settings.doubtful", detail=STRANGERS)


def make_policy(settings: Settings, catalog: Catalog) -> Policy:
    """Who may say what, as settings and catalogue have it."""
    return Policy(
        ttl_ms=settings.ttl * 1000,
        catalog=catalog,
        signer=make_signer(settings),
        tokens=settings.tokens,
        restricted=settings.restricted,
        gpc=settings.gpc,
        verifies=settings.upstream_api == "server",
    )


def make_upstream(settings: Settings, store: Queue) -> "Voucherify":
    """Voucherify's API with the credentials of the settings; `store` shares tokens."""
    made: type[Voucherify] = import_module(UPSTREAM).Voucherify
    return made(
        base_url=settings.upstream_url,
        api=settings.upstream_api,
        origin=_origin(settings),
        keys=_keys(settings),
        grant=_grant(settings),
        store=store,
        max_connections=settings.concurrency,
    )


def shown_upstream(settings: Settings) -> tuple[str, dict[str, str]]:
    """The URL and the headers that an event would be sent with, secrets masked."""
    return shown_request(
        base_url=settings.upstream_url,
        api=settings.upstream_api,
        origin=_origin(settings),
        keys=_keys(settings),
        bearer=_grant(settings) is not None,
    )


def _origin(settings: Settings) -> str | None:
    return settings.origin if settings.upstream_api == "client" else None


def _keys(settings: Settings) -> Keys | None:
    if "keys" not in settings.auth:
        return None
    if settings.upstream_api == "client":
        return Keys(
            app_id=settings.client_application_id, token=_given(settings.client_token)
        )
    return Keys(app_id=settings.server_app_id, token=_given(settings.server_app_token))


def _grant(settings: Settings) -> Grant | None:
    if "oauth" not in settings.auth:
        return None
    if settings.auth == "oauth2":
        return Grant(
            version=2,
            app_id=settings.oauth_app_id,
            secret=_given(settings.oauth_app_secret),
            scope=settings.oauth_scope,
            project_id=settings.oauth_project_id,
        )
    return Grant(
        version=1,
        app_id=settings.server_app_id,
        secret=_given(settings.server_app_token),
        scope=settings.oauth_scope or EVENT_SCOPES[settings.upstream_api],
    )


def _given(secret: SecretStr | None) -> SecretStr:
    assert secret is not None  # noqa: S101  # load_settings requires it
    return secret


class Station:
    """One process's share of the relay, between start and stop."""

    def __init__(
        self,
        settings: Settings,
        *,
        redis_url: str,
        forward: bool,
        ops_socket: socket.socket | None = None,
        reap_every_s: float = REAP_EVERY_S,
    ) -> None:
        self.settings = settings
        self.queue = make_queue(settings, redis_url)
        self.draining = False
        self.notes: dict[str, Check] = {}  # what else `/readyz` has to say
        self._forward = forward
        if forward:
            shown_upstream(settings)  # raises here what would end the delivery later
        self._forwarder: Forwarder | None = None
        self._delivering: asyncio.Task[None] | None = None
        self._delivers = True  # until it is to stop
        self._stopping = asyncio.Event()
        self._ops_socket = ops_socket
        self._reap_every_s = reap_every_s
        self._letters = LettersApi(
            self.queue,
            ttl_ms=settings.ttl * 1000,
            queue_max=settings.queue_max,
            digests=make_digests(settings) if settings.digest_secret else None,
        )
        self._held = False  # by hand, as far as this process has noticed
        self._unfit: str | None = None  # why this Redis may not be used
        # A name nobody had before: a slot refuses numbers that it has seen.
        self._slot, self._seq = f"ready-{token_hex(6)}", 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Deliver and keep house; leaving it drains."""
        await self._look_at_redis()
        housekeeping = asyncio.create_task(self._housekeeping())
        if self._forward:
            self._delivering = asyncio.create_task(self._deliver())
        try:
            async with self._ops():
                yield
                self.draining = True
                await self._stop_delivering()
        finally:
            await self._letters.aclose()
            await self._stop_delivering()
            # Asked, not cancelled: redis-py may swallow a cancellation.
            self._stopping.set()
            await housekeeping
            await self.queue.aclose()

    async def _deliver(self) -> None:
        """Deliver until the stop, and drain then."""
        try:
            await asyncio.to_thread(import_module, UPSTREAM)
            if not self._delivers:
                return
            upstream = make_upstream(self.settings, self.queue)
            self._forwarder = Forwarder(
                queue=self.queue,
                upstream=upstream,
                concurrency=self.settings.concurrency,
                drain_timeout_s=self.settings.drain_timeout,
            )
            try:
                await self._forwarder.run()
            finally:
                await upstream.aclose()
        except Exception:
            # A fault of ours, and one that nobody sees while events are taken.
            log.exception("delivery.failed")
            os.kill(os.getpid(), signal.SIGTERM)

    async def _stop_delivering(self) -> None:
        self._delivers = False
        if self._forwarder is not None:
            self._forwarder.stop()
        if self._delivering is not None:
            await self._delivering

    # --- readiness ----------------------------------------------------------------

    def checks(self) -> dict[str, Check]:
        return {"redis": self._redis_check, "queue": self._queue_check} | self.notes

    async def _redis_check(self) -> str:
        if self._unfit is not None:
            return self._unfit
        if self.draining:
            return "draining: this relay is stopping"
        # An empty commit meets everything that a real one would: memory, disk, role.
        # One after the other (ops.py): the slot takes numbers in their order only.
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
        """Judge the server once it is there; until then `/readyz` says what is wrong.

        The command has refused a server that loses events; one that was away then
        may turn out to be such a server now, and may also be put right.
        """
        unfit = None
        try:
            for warning in await self.queue.probe():
                log.warning("redis.doubtful", detail=warning)
        except QueueUnavailable as error:
            unfit = f"{error.reason}: {error.detail}"
        except RelayError as error:
            unfit = str(error)
        if unfit is not None and unfit != self._unfit:
            log.error("redis.unfit", detail=unfit)
        self._unfit = unfit

    async def _housekeeping(self) -> None:
        away = False
        while not self._stopping.is_set():
            try:
                if self._unfit is not None:
                    await self._look_at_redis()
                await self._notice_hold(await self.queue.reap())
                away = False
            except QueueUnavailable as error:
                if not away:
                    log.warning("housekeeping.paused", reason=error.reason)
                away = True
            except Exception:
                # The top of the loop: stale gauges must not end the delivery.
                log.exception("housekeeping.failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._reap_every_s):
                    await self._stopping.wait()

    async def _notice_hold(self, gauges: dict[str, str]) -> None:
        """Log a hold by hand where logs are collected: who holds sits elsewhere."""
        held = gauges.get("hold") == Hold.BY_HAND
        if held and not self._held:
            flow = await self.queue.hash("flow")
            since = time_of(int(flow.get("by_hand_since_ms", 0)))
            log.warning("delivery.held", reason=flow.get(Hold.BY_HAND), since=since)
        elif self._held and not held:
            log.warning("delivery.resumed")
        self._held = held

    @asynccontextmanager
    async def _ops(self) -> AsyncIterator[None]:
        if self._ops_socket is None:
            yield
            return
        config = uvicorn.Config(
            ops_app(
                self.checks(),
                signer=make_signer(self.settings),
                token=self.settings.ops_token,
                letters=self._letters,
                stats=lambda: stats(self.queue),
            ),
            lifespan="off",
            ws="none",  # whose library would be imported
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
        )
        async with served(config, self._ops_socket):
            yield


def hung_up() -> bool:
    """Whether the terminal that this process was started from is gone."""
    for fd in range(3):
        try:
            termios.tcgetattr(fd)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # ENOTTY: it never was one
                return True
        except OSError:
            continue
    return False


class _QuietServer(uvicorn.Server):
    """A server that leaves the signals to the rest of its process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(config: uvicorn.Config, sock: socket.socket) -> AsyncIterator[None]:
    """Serve beside whatever else this process does; leaving it ends the server."""
    server = _QuietServer(config)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


@contextlib.contextmanager
def stop_asked() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and Ctrl-C set; afterwards they change nothing more."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in STOPS:
        loop.add_signal_handler(sign, stopped.set)
    try:
        yield stopped
    finally:
        # The loop would leave the default behind, which kills; what is still to be
        # done after it is done whatever comes.
        for sign in STOPS:
            loop.remove_signal_handler(sign)
            signal.signal(sign, signal.SIG_IGN)


def ops_socket(settings: Settings) -> socket.socket:
    """The socket of the ops listener. Raises `RelayError` if it cannot be had."""
    return bind(settings.ops_host, settings.ops_port, setting="RELAY_OPS_PORT")


def bind(host: str, port: int, *, setting: str) -> socket.socket:
    """A listening socket, or a `RelayError` that says what to do about `setting`."""
    try:
        return listen(host, port)
    except OSError as error:
        cure = (
            f"stop what uses it, or choose another port with {setting}"
            if error.errno == errno.EADDRINUSE
            else f"choose an address of this machine, and a port ({setting}) that "
            "this user may take"
        )
        msg = f"Cannot listen on {host} port {port} ({error.strerror}): {cure}."
        raise RelayError(msg) from error


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; who connects waits in it until somebody accepts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        # At once: with SO_REUSEADDR two sockets can be bound to one port until the
        # first of them listens (socket(7)).
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def http_url(sock: socket.socket) -> str:
    """The address of a listening socket, as a URL."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
