"""Run the relay's processes: one, or several that share the listening sockets."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from relay import logs
from relay.app import App
from relay.assembly import Station, bind
from relay.errors import RelayError
from relay.settings import Role, Settings, load_settings

# A stopping relay answers what it has read; clients that keep a request open longer
# than this are cut.
GRACE_S = 5

# How children learn what the command line said; not settings, so no RELAY_ prefix.
_FORWARD, _OPS_PORT = "_relay_forward", "_relay_ops_port"


class AnnouncingServer(uvicorn.Server):
    """A server that tells when it takes events."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()


def server_config(app: object, *, workers: int = 1) -> uvicorn.Config:
    """How uvicorn runs the edge: fast parsers, nothing it could get wrong for us."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # an application, or the name of a factory
        factory=isinstance(app, str),
        workers=workers,
        # Ours: it would believe the header of any local peer.
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
        backlog=2048,
    )


def public_socket(settings: Settings) -> socket.socket:
    """The socket that takes beacons. Raises `RelayError` if it cannot be had."""
    if settings.uds is None:
        return bind(settings.host, settings.port)
    path = Path(settings.uds)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
        path.unlink()  # left by a relay that was killed
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
    except OSError as error:
        msg = (
            f"Cannot listen on the socket {path} ({error.strerror}): make its "
            "directory, stop what uses it, or choose another one (RELAY_UDS)."
        )
        raise RelayError(msg) from error
    # The directory decides who may connect; the proxy runs as another user.
    path.chmod(0o666)
    sock.set_inheritable(True)
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def serve_one(
    settings: Settings,
    *,
    redis_url: str,
    forward: bool,
    announce: Callable[[str, int], None],
) -> None:
    """Edge, forwarder and ops listener in this process, until a signal."""
    public = public_socket(settings)
    ops = bind(settings.ops_host, settings.ops_port)
    station = Station(settings, redis_url=redis_url, forward=forward, ops_socket=ops)
    where, ops_port = _address(settings, public), ops.getsockname()[1]
    server = AnnouncingServer(
        server_config(App(station)), lambda: announce(where, ops_port)
    )
    try:
        server.run(sockets=[public])
    finally:
        _remove(settings)


def serve_many(
    settings: Settings,
    *,
    redis_url: str,
    forward: bool,
    workers: int,
    announce: Callable[[str, int], None],
) -> None:
    """The same in several processes: alike, sharing sockets, queue and budget."""
    public = public_socket(settings)
    # Reserved here, so that every child gets the same one when any will do.
    ops = bind(settings.ops_host, settings.ops_port, shared=True)
    ops_port = ops.getsockname()[1]
    os.environ["RELAY_REDIS_URL"] = redis_url
    os.environ["RELAY_REDIS_URL_FILE"] = ""  # hides one in a .env file, too
    os.environ[_FORWARD] = "1" if forward else ""
    os.environ[_OPS_PORT] = str(ops_port)
    config = server_config("relay.serving:child", workers=workers)
    public.listen(config.backlog)  # what connects from now on waits for the children
    announce(_address(settings, public), ops_port)
    try:
        Multiprocess(config, sockets=[public]).run()
    finally:
        _remove(settings)


def child() -> App:
    """The application of one of several processes, from its environment."""
    forward = bool(os.environ[_FORWARD])
    settings = load_settings(Role.SERVE if forward else Role.EDGE)
    logs.configure(settings.log_format)
    assert settings.redis_url is not None  # noqa: S101  # set by the parent
    ops = bind(settings.ops_host, int(os.environ[_OPS_PORT]), shared=True)
    return App(
        Station(
            settings,
            redis_url=settings.redis_url.get_secret_value(),
            forward=forward,
            ops_socket=ops,
        )
    )


def _address(settings: Settings, sock: socket.socket) -> str:
    path = settings.path_prefix + settings.track_path
    if settings.uds is not None:
        return f"unix:{settings.uds} {path}"
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def _remove(settings: Settings) -> None:
    if settings.uds is not None:
        Path(settings.uds).unlink(missing_ok=True)
