"""Processes that serve: their sockets, their children, and how they end."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from uvicorn.config import STARTUP_FAILURE

from relay.assembly import STOPS, listen
from relay.errors import RelayError
from relay.serving import Child, Supervisor, public_socket
from relay.settings import Role, Settings, load_settings
from tests.integration.stack import (
    HEADERS,
    ORIGIN,
    Process,
    Sender,
    Stack,
    beacon,
    stack,
)
from tests.processes import children, gone
from tests.programs import RELAY
from tests.support import eventually

pytestmark = pytest.mark.anyio


def uds(path: Path) -> Settings:
    environ = {"RELAY_ENV_FILE": os.devnull, "HOME": "/nowhere"}
    return load_settings(Role.READ, environ, uds=str(path))


# The unix socket


def test_a_unix_socket_is_for_every_user_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    with public_socket(uds(path)) as sock:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            sock.accept()[0].close()
    assert not path.exists()


def test_a_socket_that_a_killed_relay_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with public_socket(uds(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert not path.exists()


def test_a_socket_on_which_somebody_listens_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    with public_socket(uds(path)) as live:
        with (
            pytest.raises(RelayError, match="Address already in use") as caught,
            public_socket(uds(path)),
        ):
            pass
        assert str(caught.value).startswith(f"Cannot listen on the socket {path} (")
        assert str(caught.value).endswith("or choose another one (RELAY_UDS).")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            live.accept()[0].close()


def test_a_listener_too_busy_to_answer_is_not_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as other:
        busy.bind(str(path))
        busy.listen(0)
        other.connect(str(path))  # its backlog is full
        with (
            pytest.raises(RelayError, match="Address already in use"),
            public_socket(uds(path)),
        ):
            pass
        assert path.exists()


def test_a_file_that_is_no_socket_is_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    path.write_text("precious")
    with pytest.raises(RelayError, match="Cannot listen"), public_socket(uds(path)):
        pass
    assert path.read_text() == "precious"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "relay.sock"
    with (
        pytest.raises(RelayError, match="make its directory"),
        public_socket(uds(path)),
    ):
        pass


def test_a_socket_that_replaced_ours_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as other:
        with public_socket(uds(path)):
            path.rename(tmp_path / "moved.sock")
            other.bind(str(path))
        assert path.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_beacons_come_through_a_unix_socket(
    valkey_url: str, prefix: str, tmp_path: Path, workers: str
) -> None:
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # as a relay that was killed leaves it
    async with stack(
        valkey_url,
        prefix,
        tmp_path,
        uds=str(path),
        trusted_proxies="unix",
        limits="ip=1/1h burst 2",
    ) as relay:
        first = relay.start("serve", "--workers", workers)
        await first.says(rf"Taking events on unix:{path} /track, ")
        await ready(first)
        # The proxy is trusted: limits are of the address that it names.
        said = [await send(path, n, f"192.0.2.{n // 3}") for n in range(6)]
        assert said == [202, 202, 429] * 2
        second = relay.start("serve", "--workers", workers)
        await second.says(f"Cannot listen on the socket {path} ")
        assert await ended(second) == 1
        await relay.drained()
        assert sorted(relay.delivered_ids()) == ["0", "1", "3", "4"]
        assert await first.stop() == 0
        assert not path.exists()


async def send(path: Path, n: int, address: str) -> int:
    headers = HEADERS | {"X-Forwarded-For": address}
    connector = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://relay/track", data=beacon(n), headers=headers) as answer,
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        return answer.status


async def ready(process: Process) -> None:
    url = await process.ready_url()

    async def is_ready() -> bool:
        return await status(url) == 200

    await eventually(is_ready, within=30)


async def status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status


async def ended(process: Process) -> int:
    async def has_ended() -> bool:
        return process.popen.poll() is not None

    await eventually(has_ended, within=30)
    return process.popen.returncode


# Children


async def test_a_child_that_is_killed_is_replaced_and_events_go_on(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        parent = relay.start("serve", "--workers", "2")
        url = await parent.track_url()
        await ready(parent)
        [first, second] = children(parent.pid)
        os.kill(first, signal.SIGKILL)
        await parent.says(rf'"pid": {first}, "exit_code": -9, .*"serve.child_died"')
        for n in range(20):
            assert await sender.send(url, n) == 202

        async def two_again() -> bool:
            now = children(parent.pid)
            return len(now) == 2 and second in now and first not in now

        await eventually(two_again)
        await relay.drained()
        assert sorted(relay.delivered_ids()) == sorted(sender.acknowledged)
        # Whichever child answers, it is the same listener.
        ready_url = await parent.ready_url()
        assert [await status(ready_url) for _ in range(10)] == [200] * 10
        assert await parent.stop() == 0
        await gone(group=parent.pid)


async def test_children_whose_parent_was_killed_drain_and_leave_the_port(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with (
        stack(valkey_url, prefix, tmp_path) as relay,
        Sender() as sender,
    ):
        parent = relay.start("serve", "--workers", "2")
        url = await parent.track_url()
        await ready(parent)
        relay.sandbox.fail_next(3, delay=0.5)
        await sender.send_all(url, range(3))
        await in_flight(relay, 3)
        parent.kill()
        await gone(group=parent.pid, within=15)
        # In flight when the parent died, and delivered all the same.
        assert sorted(relay.delivered_ids()) == ["0", "1", "2"]
        listen("127.0.0.1", int(url.split(":")[2].split("/")[0])).close()


def on_terminal(relay: Stack) -> tuple[Process, int]:
    """`relay serve --workers 2` in a terminal of its own, and the other end of that."""
    terminal, inside = os.openpty()
    said = relay.directory / "terminal.log"
    with said.open("wb") as out:
        popen = subprocess.Popen(
            [*RELAY, "serve", "--workers", "2"],
            env=relay.environ,
            cwd=relay.directory,
            stdin=inside,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
    os.close(inside)
    relay.processes.append(Process(popen, said))
    return relay.processes[-1], terminal


async def test_a_terminal_that_closes_ends_the_relay_with_a_drain(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process, terminal = on_terminal(relay)
        url = await process.track_url()
        await ready(process)
        # Not the terminal's doing: the catalogue is read again, and nothing ends.
        os.killpg(process.pid, signal.SIGHUP)
        relay.sandbox.fail_next(1, delay=0.5)
        assert await sender.send(url, 1) == 202
        await in_flight(relay, 1)
        os.close(terminal)
        assert await ended(process) == 0
        assert relay.delivered_ids() == ["1"]
        await gone(group=process.pid)


async def in_flight(relay: Stack, n: int) -> None:
    async def there() -> bool:
        return (await relay.bench.gauges())["in_flight"] == str(n)

    await eventually(there)


async def test_what_connects_while_it_stops_is_refused_at_once(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process = relay.start("serve", "--workers", "2")
        url = await process.track_url()
        await ready(process)
        relay.sandbox.fail_next(1, delay=2.0)
        assert await sender.send(url, 1) == 202
        await in_flight(relay, 1)
        process.popen.send_signal(signal.SIGTERM)

        async def refused() -> bool:
            return await sender.send(url, 2) == 0

        await eventually(refused, within=2)
        assert process.popen.poll() is None  # it drains
        assert await ended(process) == 0
        assert "1" in relay.delivered_ids()


class Broken(Child):
    """A child that cannot start."""

    def run(self) -> None:
        sys.exit(STARTUP_FAILURE)


@pytest.fixture
def _own_signals() -> Iterator[None]:
    kept = {sign: signal.getsignal(sign) for sign in STOPS}
    yield
    for sign, handler in kept.items():
        signal.signal(sign, handler)


@pytest.mark.usefixtures("_own_signals")
def test_children_that_cannot_start_end_the_relay_with_a_message() -> None:
    settings = load_settings(Role.READ, {"RELAY_ENV_FILE": os.devnull})
    with listen("127.0.0.1", 0) as public, listen("127.0.0.1", 0) as ops:
        child = Broken(
            settings=settings,
            redis_url="redis://",
            forward=False,
            public=public,
            ops=ops,
        )
        with pytest.raises(RelayError, match="A process of the relay does not start"):
            Supervisor(child, 2).run()
