"""Connections for one call at a time: an answer is never another call's."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
import redis.exceptions as broken
import uvloop

from relay.line import Line, _Wire
from tests.support import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
async def line(redis_url: str) -> AsyncIterator[Line]:
    made = Line(redis_url, timeout=5.0)
    yield made
    await made.aclose()


async def test_calls_at_once_get_their_own_answers(line: Line) -> None:
    said = await asyncio.gather(*(line.call("ECHO", f"{n}") for n in range(50)))
    assert said == [f"{n}".encode() for n in range(50)]
    assert len(line._idle) == 50
    assert await line.call("ECHO", b"\xff\x00") == b"\xff\x00"
    assert len(line._idle) == 50


async def test_an_error_is_an_answer_and_the_connection_stays(line: Line) -> None:
    with pytest.raises(broken.NoScriptError):
        await line.call("EVALSHA", "0" * 40, 0)
    [kept] = line._idle
    assert await line.call("ECHO", "x") == b"x"
    assert line._idle == [kept]


async def test_a_late_answer_is_nobodys(redis_url: str) -> None:
    line = Line(redis_url, timeout=0.1)
    try:
        with pytest.raises(broken.TimeoutError):
            await line.call("BLPOP", "nothing-comes-here", 1)
        assert line._idle == []
        assert await line.call("ECHO", "x") == b"x"
    finally:
        await line.aclose()


async def test_a_call_that_is_cancelled_takes_its_connection_along(line: Line) -> None:
    task = asyncio.create_task(line.call("BLPOP", "nothing-comes-here", 1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert line._idle == []
    assert await line.call("ECHO", "x") == b"x"


async def test_a_connection_that_was_cut_is_made_anew(
    line: Line, redis_url: str
) -> None:
    await line.call("ECHO", "x")
    number = await line.call("CLIENT", "ID")
    killer = Line(redis_url, timeout=5.0)
    [kept] = line._idle
    assert await killer.call("CLIENT", "KILL", "ID", str(number)) == 1

    async def noticed() -> bool:
        return kept.lost

    await eventually(noticed)
    # Nothing has been sent there, so nobody need know.
    assert await line.call("ECHO", "y") == b"y"
    assert kept not in line._idle
    # But of what was sent nobody can say what became.
    number = await line.call("CLIENT", "ID")
    waiting = asyncio.create_task(line.call("BLPOP", "nothing-comes-here", 5))

    async def blocked() -> bool:
        told = cast("bytes", await killer.call("CLIENT", "LIST", "ID", str(number)))
        return b"cmd=blpop" in told

    await eventually(blocked)
    assert await killer.call("CLIENT", "KILL", "ID", str(number)) == 1
    with pytest.raises(broken.ConnectionError):
        await waiting
    assert line._idle == []
    assert await line.call("ECHO", "z") == b"z"
    await killer.aclose()


async def asking(line: Line, wire: _Wire) -> asyncio.Task[object]:
    """A call that has been sent on this connection, and waits."""
    before = wire._answer
    task = asyncio.create_task(line.call("BLPOP", "nothing-comes-here", 5))

    async def sent() -> bool:
        return wire._answer is not before

    await eventually(sent)
    return task


async def test_what_comes_after_an_answer_is_not_the_next_ones(line: Line) -> None:
    await line.call("PING")
    [kept] = line._idle
    asked = await asking(line, kept)
    kept.data_received(b"+mine\r\n+whose\r\n")
    assert await asked == b"mine"
    assert await line.call("ECHO", "x") == b"x"
    assert kept not in line._idle


async def asked_now(line: Line, *command: str | int) -> object:
    """What is said to a command that is sent at once."""
    said: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    assert line.ask(*command, then=said.set_result)
    return await said


def never(said: object) -> None:
    pytest.fail(f"nothing was sent, and {said!r} came")


async def test_a_command_is_sent_at_once_where_a_connection_is_idle(line: Line) -> None:
    assert not line.ask("PING", then=never)  # there is none yet
    await line.call("PING")
    [kept] = line._idle
    assert await asked_now(line, "ECHO", "x") == b"x"
    assert isinstance(await asked_now(line, "NO", "SUCH"), broken.ResponseError)
    assert line._idle == [kept]

    # Whoever is told may ask the next thing.
    said: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def again(_: object) -> None:
        assert line.ask("ECHO", "z", then=said.set_result)

    assert line.ask("ECHO", "y", then=again)
    assert not line.ask("PING", then=never)  # it is in use
    assert await said == b"z"
    assert line._idle == [kept]


async def test_who_asked_at_once_is_told_of_an_end(line: Line, redis_url: str) -> None:
    await line.call("PING")
    [kept] = line._idle
    number = cast("int", await line.call("CLIENT", "ID"))
    killer = Line(redis_url, timeout=5.0)
    told = asyncio.create_task(asked_now(line, "BLPOP", "nothing-comes-here", 5))

    async def killed() -> bool:
        return await killer.call("CLIENT", "KILL", "ID", number) == 1

    await eventually(killed)
    assert isinstance(await told, broken.ConnectionError)
    assert line._idle == []
    assert not line.ask("PING", then=never)
    assert await line.call("ECHO", "x") == b"x"
    assert line._ended == []  # it has been closed
    assert kept not in line._idle
    await killer.aclose()


async def test_who_asked_at_once_waits_in_bounds(redis_url: str) -> None:
    line = Line(redis_url, timeout=0.2)
    try:
        await line.call("PING")
        said = await asked_now(line, "BLPOP", "nothing-comes-here", 1)
        assert isinstance(said, broken.TimeoutError)
        # What comes late would be the next one's.
        assert line._idle == []
        assert await line.call("ECHO", "x") == b"x"
    finally:
        await line.aclose()


async def test_what_comes_after_an_answer_at_once_is_nobodys(line: Line) -> None:
    await line.call("PING")
    [kept] = line._idle
    told = asyncio.create_task(asked_now(line, "BLPOP", "nothing-comes-here", 5))

    async def sent() -> bool:
        return kept._then is not None

    await eventually(sent)
    kept.data_received(b"+mine\r\n+whose\r\n")
    assert await told == b"mine"
    assert line._idle == []
    assert await line.call("ECHO", "x") == b"x"


async def test_what_is_said_unasked_is_no_answer(line: Line) -> None:
    await line.call("PING")
    [kept] = line._idle
    kept.data_received(b"+OK\r\n")
    assert await line.call("ECHO", "x") == b"x"
    assert kept not in line._idle


async def test_what_is_no_protocol_is_said_so(line: Line) -> None:
    await line.call("PING")
    [kept] = line._idle
    asked = await asking(line, kept)
    kept.data_received(b"HTTP/1.1 400 Bad Request\r\n")
    with pytest.raises(broken.InvalidResponse):
        await asked
    assert line._idle == []


async def test_an_answer_may_come_in_pieces(line: Line) -> None:
    await line.call("PING")
    [kept] = line._idle
    asked = await asking(line, kept)
    for piece in (b"$5", b"\r\nhe", b"llo", b"\r\n"):
        assert not asked.done()
        kept.data_received(piece)
    assert await asked == b"hello"


async def test_nobody_there_is_said_so() -> None:
    line = Line("redis://127.0.0.1:9", timeout=1.0)
    with pytest.raises(broken.ConnectionError):
        await line.call("PING")
    await line.aclose()


def test_a_reset_connection_is_a_failure_to_connect_on_uvloop_too(
    valkey_url: str,
) -> None:
    """Which raises RuntimeError, where asyncio's own loop has ConnectionResetError."""

    async def reset() -> None:
        line = Line(valkey_url, timeout=5.0)
        await line.call("PING")
        [kept] = line._idle
        kept._transport.abort()
        with pytest.raises(broken.ConnectionError):
            await line.call("PING")
        assert await line.call("PING") == b"PONG"
        await line.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(reset())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_hang_up_after_the_handshake_is_told_at_once(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def greet(asked: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"+OK\r\n" * 3)  # to each command of redis-py's handshake
        writer.write_eof()
        await asked.read()
        writer.close()
        left.set()

    left = asyncio.Event()

    async def talk() -> None:
        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        line = Line(f"redis://127.0.0.1:{port}", timeout=5.0)
        with pytest.raises(broken.ConnectionError):  # and not a timeout
            await line.call("PING")
        await asyncio.wait_for(left.wait(), 5)
        await line.aclose()
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(talk())


@pytest.mark.system("redis-server")
@pytest.mark.system("openssl")
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_tls_passwords_and_databases_are_redis_pys(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    made = "req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 -subj /CN=x"
    subprocess.run(
        ["openssl", *made.split(), "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = (
        f"--port 0 --tls-port {port} --tls-cert-file cert --tls-key-file key "
        "--tls-auth-clients no --requirepass a-password-of-the-test"
    )
    server = subprocess.Popen(
        ["redis-server", *asked.split(), "--save", ""],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )

    async def talk() -> None:
        options = f"?ssl_ca_certs={tmp_path}/cert"
        place = f"127.0.0.1:{port}/3{options}"
        line = Line(f"rediss://:a-password-of-the-test@{place}", timeout=5.0)

        async def there() -> bool:
            with suppress(broken.ConnectionError):
                return await line.call("PING") == b"PONG"
            return False

        async def alone() -> bool:
            return cast("bytes", await line.call("CLIENT", "LIST")).count(b"\n") == 1

        await eventually(there)
        stranger = Line(f"rediss://:another-password@{place}", timeout=5.0)
        with pytest.raises(broken.AuthenticationError):
            await stranger.call("PING")
        await stranger.aclose()
        await eventually(alone)  # redis-py takes its leave, which what follows lets end
        large = b"x" * 1_000_000  # in many pieces
        assert await line.call("SET", "large", large) == b"OK"
        assert await line.call("GET", "large") == large
        assert b" db=3 " in cast("bytes", await line.call("CLIENT", "INFO"))
        # A server that stands still bids no farewell; the loop ends all the same.
        server.send_signal(signal.SIGSTOP)
        await line.aclose()

    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(talk())
    finally:
        server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait()
