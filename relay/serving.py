"""Run the relay's processes: one, or several that share the listening sockets.

Every stop drains: SIGTERM, Ctrl-C, and for the children of a parent that was killed
its end. What is still in flight after the drain is taken over by another forwarder.
"""

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from errno import ECONNREFUSED
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from relay import logs
from relay.app import App
from relay.assembly import (
    BACKLOG,
    STOPS,
    Station,
    bind,
    http_url,
    hung_up,
    make_catalog,
    ops_socket,
)
from relay.errors import RelayError
from relay.protocol import BeaconProtocol
from relay.reload import CatalogFile
from relay.settings import Settings

# A stopping relay answers what it has read; clients that keep a request open longer
# than this are cut.
GRACE_S = 5
FOLLOW_EVERY_S = 0.5
WATCH_EVERY_S = 0.2
PROBE_S = 1.0  # for a socket that is there to answer

Announce = Callable[[str, str], None]  # told where beacons and probes go

log = structlog.get_logger()


class Server(uvicorn.Server):
    """A server that can tell when it takes events, and always drains."""

    def __init__(
        self, config: uvicorn.Config, announce: Callable[[], None] | None = None
    ) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._announce is not None and not self.should_exit:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        # uvicorn drops everything at a second Ctrl-C. What is in flight may be money
        # that is then never known to have arrived, and the drain takes seconds.
        self.force_exit = False


def server_config(app: object) -> uvicorn.Config:
    """How uvicorn runs the edge: fast parsers, nothing it could get wrong for us."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # Starlette's types of ASGI, not uvicorn's
        http=BeaconProtocol,
        # Ours: it would believe the header of any local peer.
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
        backlog=BACKLOG,
    )


@contextmanager
def public_socket(settings: Settings) -> Iterator[socket.socket]:
    """The socket that takes beacons. Raises `RelayError` if it cannot be had."""
    if settings.uds is None:
        with bind(settings.host, settings.port, setting="RELAY_PORT") as sock:
            yield sock
        return
    path = Path(settings.uds)
    with _bind_unix(path) as sock:
        ours = path.stat().st_ino
        try:
            yield sock
        finally:
            with suppress(FileNotFoundError):  # another relay may have replaced it
                if path.stat().st_ino == ours:
                    path.unlink()


def _bind_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            path.unlink()  # left by a relay that was killed
        sock.bind(str(path))
        # The directory decides who may connect; the proxy runs as another user.
        path.chmod(0o666)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        msg = (
            f"Cannot listen on the socket {path} ({error.strerror}): make its "
            "directory, stop what uses it, or choose another one (RELAY_UDS)."
        )
        raise RelayError(msg) from error
    return sock


def _is_stale(path: Path) -> bool:
    """Whether this is a socket that nobody listens on any more."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)  # a full backlog makes it wait
        return probe.connect_ex(str(path)) == ECONNREFUSED


def serve_one(
    settings: Settings, *, redis_url: str, forward: bool, announce: Announce
) -> None:
    """Edge, forwarder and ops listener in this process, until a signal."""
    with public_socket(settings) as public, ops_socket(settings) as ops:
        station = Station(
            settings, redis_url=redis_url, forward=forward, ops_socket=ops
        )
        where, ready = _address(settings, public), f"{http_url(ops)}/readyz"
        server = Server(server_config(App(station)), lambda: announce(where, ready))
        server.run(sockets=[public])


def serve_many(
    settings: Settings,
    *,
    redis_url: str,
    forward: bool,
    workers: int,
    announce: Announce,
) -> None:
    """The same in several processes: alike, sharing sockets, queue and budget."""
    catalog = make_catalog(settings)
    with public_socket(settings) as public, ops_socket(settings) as ops:
        # What connects from now on waits for the children.
        announce(_address(settings, public), f"{http_url(ops)}/readyz")
        child = Child(
            settings=settings,
            redis_url=redis_url,
            forward=forward,
            public=public,
            ops=ops,
        )
        Supervisor(child, workers, catalog).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """What a parent hands to each of its processes, and what they do with it."""

    settings: Settings
    redis_url: str = field(repr=False)  # may have a password
    forward: bool
    public: socket.socket
    ops: socket.socket
    catalog_text: str | None = field(default=None, repr=False)  # the last good one
    parent: int = field(default_factory=os.getpid)

    def run(self) -> None:
        """Edge, forwarder and ops listener until SIGTERM, or the parent's end."""
        logs.configure(self.settings.log_format)
        # The parent says what these mean; while it serves, Ctrl-C drains here, too.
        for sign in (signal.SIGHUP, signal.SIGINT):
            signal.signal(sign, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGHUP])
        threading.Thread(target=_follow, args=(self.parent,), daemon=True).start()
        station = Station(
            self.settings,
            redis_url=self.redis_url,
            forward=self.forward,
            ops_socket=self.ops,
        )
        app = App(station, catalog_text=self.catalog_text)
        Server(server_config(app)).run(sockets=[self.public])


def _follow(parent: int) -> None:
    """Drain and end when the parent has ended without a word."""
    while os.getppid() == parent:
        time.sleep(FOLLOW_EVERY_S)
    log.error("serve.parent_died", pid=parent)
    os.kill(os.getpid(), signal.SIGTERM)


class Supervisor:
    """The parent of several processes: starts them, and replaces one that died."""

    def __init__(
        self, child: Child, workers: int, catalog: CatalogFile | None = None
    ) -> None:
        self._child = child
        self._workers = workers
        self._catalog = catalog
        self._stopping = False
        self._asked = False  # by SIGHUP, to look at the catalogue
        self._children: list[SpawnProcess] = []

    def run(self) -> None:
        """Keep the processes alive until a signal; returns when they have drained."""
        for sign in STOPS:
            signal.signal(sign, self._stop)
        signal.signal(signal.SIGHUP, self._hear_hangup)
        try:
            while not self._stopping:
                while len(self._children) < self._workers and not self._stopping:
                    self._children.append(self._start())
                time.sleep(WATCH_EVERY_S)
                self._look()
                self._children = [c for c in self._children if self._lives(c)]
        finally:
            # Or who connects now waits for an answer that nobody will give.
            self._child.public.close()
            self._child.ops.close()
            for child in self._children:
                child.terminate()
            for child in self._children:
                child.join()
            # Or Python, as it ends, goes back to the default.
            for sign in (*STOPS, signal.SIGHUP):
                signal.signal(sign, signal.SIG_IGN)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _hear_hangup(self, *_: object) -> None:
        """Have every process read the catalogue again, or stop with the terminal."""
        if hung_up():
            self._stopping = True
            return
        self._asked = True
        for child in self._children:
            if child.pid is not None and child.exitcode is None:
                os.kill(child.pid, signal.SIGHUP)

    def _start(self) -> SpawnProcess:
        # Ctrl-C reaches children, too, and one that still imports would answer with a
        # traceback. What is blocked here is blocked there until it is up.
        resource_tracker.ensure_running()  # by itself it would unblock the signals
        child = SpawnProcess(target=self._fresh().run)
        early = [signal.SIGINT, signal.SIGHUP]
        signal.pthread_sigmask(signal.SIG_BLOCK, early)
        child.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, early)
        return child

    def _look(self) -> None:
        """Know every good catalogue as soon as the processes may have taken it.

        One that starts when the file is faulty has to go by the rules of the others.
        """
        asked, self._asked = self._asked, False
        if self._catalog is not None:
            self._catalog.poll(at_once=asked)

    def _fresh(self) -> Child:
        """What the next process gets: the last good catalogue."""
        if self._catalog is None:
            return self._child
        self._look()
        return replace(self._child, catalog_text=self._catalog.text)

    def _lives(self, child: SpawnProcess) -> bool:
        if child.exitcode is None:
            return True
        log.error("serve.child_died", pid=child.pid, exit_code=child.exitcode)
        if child.exitcode == STARTUP_FAILURE:  # and so would the next one
            msg = "A process of the relay does not start: the log above says why."
            raise RelayError(msg)
        return False


def _address(settings: Settings, sock: socket.socket) -> str:
    path = settings.path_prefix + settings.track_path
    if settings.uds is not None:
        return f"unix:{settings.uds} {path}"
    return http_url(sock) + path
