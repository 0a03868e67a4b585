"""One command and no Redis: a relay that keeps its events through every ending."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from relay.counters import stats
from relay.embedded import running_url
from relay.queue import Queue
from tests.integration.stack import Process, Sender, Stack, stack
from tests.processes import gone, processes
from tests.queues import directory_balanced
from tests.support import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ONE_OR_TWO = pytest.mark.parametrize("workers", ["1", "2"], ids="workers-{}".format)


@asynccontextmanager
async def standalone(
    valkey_url: str, prefix: str, directory: Path
) -> AsyncIterator[Stack]:
    """A stack without any setting of Redis; what it starts must end with it."""
    # A directory of its own, so that its processes can be told from others.
    async with stack(valkey_url, prefix, directory) as relay:
        for name in ("RELAY_REDIS_URL", "RELAY_REDIS_PREFIX"):
            del relay.environ[name]
        yield relay
        for process in relay.processes:
            assert "Traceback" not in process.text, process.text
    assert servers(directory) == {}
    await directory_balanced(data(directory))


def data(directory: Path) -> Path:
    return directory / ".local" / "state" / "relay"  # HOME is `directory`


def servers(directory: Path) -> dict[int, str]:
    return processes(mentions=f"{data(directory)}/redis.sock")


async def totals(directory: Path) -> dict[str, int]:
    """What became of the events so far, from the private server itself."""
    queue = Queue(url=running_url(data(directory)), prefix="relay")
    try:
        shown = (await stats(queue))["totals"]
        assert isinstance(shown, dict)
        return {name: count for name, count in shown.items() if count}
    finally:
        await queue.aclose()


async def delivered(relay: Stack, sender: Sender, within: float = 10) -> None:
    """Return once everything that was acknowledged has arrived, once each."""

    async def all_there() -> bool:
        return set(sender.acknowledged) <= set(relay.delivered_ids())

    await eventually(all_there, within=within)
    assert sorted(relay.delivered_ids()) == sorted(sender.acknowledged)


async def ended(process: Process) -> int:
    async def has_ended() -> bool:
        return process.popen.poll() is not None

    await eventually(has_ended, within=30)
    return process.popen.returncode


async def test_a_cluster_and_credentials_are_enough(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with standalone(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process = relay.start("serve")
        url = await process.track_url()
        [line] = [line for line in process.text.splitlines() if "are kept" in line]
        assert line.startswith("Events are kept by Valkey ")
        assert f" in {data(tmp_path)} (append-only file, fsync each second)" in line
        assert await sender.send(url, 1) == 202
        await delivered(relay, sender, within=2)
        assert await process.stop() == 0
        assert servers(tmp_path) == {}
        assert list((data(tmp_path) / "appendonlydir").iterdir())


async def test_what_was_queued_at_a_stop_is_delivered_after_the_next_start(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with standalone(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        first = relay.start("serve", "--no-forwarder")
        await sender.send_all(await first.track_url(), range(20))
        assert await first.stop() == 0
        assert relay.delivered_ids() == []
        second = relay.start("serve")
        await delivered(relay, sender)
        assert len(sender.acknowledged) == 20
        assert (await totals(tmp_path))["received"] == 20
        assert await second.stop() == 0


async def test_a_relay_that_is_killed_is_followed_by_one_that_adopts_its_server(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with standalone(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        first = relay.start("serve", "--no-forwarder")
        url = await first.track_url()
        await sender.send_all(url, range(50))
        [orphan] = servers(tmp_path)
        first.kill()
        second = relay.start("serve")
        await second.says(
            rf"Events are kept by the running .*\(pid {orphan}\), adopted"
        )
        await delivered(relay, sender)
        assert len(sender.acknowledged) == 50
        assert list(servers(tmp_path)) == [orphan]
        assert await second.stop() == 0


async def test_a_second_relay_in_one_directory_is_refused_with_the_pid_of_the_first(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with standalone(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        first = relay.start("serve")
        url = await first.track_url()
        others = [
            relay.start("serve", anonymous="restricted"),
            relay.start("worker"),
        ]
        for second in others:
            assert await ended(second) == 1
            assert second.text == (
                f"Another relay (pid {first.pid}) owns {data(tmp_path)}. Stop that "
                "one. To run two, give each its RELAY_DATA_DIR, or both one "
                "RELAY_REDIS_URL.\n"
            )
        assert await sender.send(url, 1) == 202  # the first has not noticed
        await delivered(relay, sender)
        assert await first.stop() == 0


@ONE_OR_TWO
async def test_ctrl_c_drains_though_it_reaches_every_process(
    valkey_url: str, prefix: str, tmp_path: Path, workers: str
) -> None:
    async with standalone(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process = relay.start("serve", "--workers", workers)
        url = await process.track_url()
        relay.sandbox.fail_next(4, delay=1.0)
        await sender.send_all(url, range(4))

        async def at_the_sandbox() -> bool:
            return len(relay.sandbox.requests) == 4

        await eventually(at_the_sandbox)
        os.killpg(process.pid, signal.SIGINT)
        assert await ended(process) == 0
        assert sorted(relay.delivered_ids()) == sorted(sender.acknowledged)
        await gone(group=process.pid)
        again = relay.start("serve", "--no-forwarder")
        await again.track_url()
        assert await totals(tmp_path) == {"received": 4, "delivered": 4}


async def test_a_stop_while_it_starts_leaves_nothing(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with standalone(valkey_url, prefix, tmp_path) as relay:
        # The server is there, and the rest is not.
        early = relay.start("serve")

        async def server() -> bool:
            return bool(servers(tmp_path))

        await eventually(server, within=30)
        assert await early.stop() == 0
        assert servers(tmp_path) == {}
        # The parent is there, and its children are not.
        parent = relay.start("serve", "--workers", "2")
        await parent.says("Taking events on")
        os.killpg(parent.pid, signal.SIGINT)
        assert await ended(parent) == 0
        assert servers(tmp_path) == {}
        await gone(group=parent.pid)


async def test_a_stop_while_redis_stays_silent_is_quick_and_quiet(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    asked = asyncio.Event()

    async def say_nothing(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        asked.set()
        await reader.read()
        writer.close()

    async with (
        standalone(valkey_url, prefix, tmp_path) as relay,
        await asyncio.start_server(say_nothing, "127.0.0.1") as silent,
    ):
        host, port = silent.sockets[0].getsockname()
        process = relay.start(
            "serve", redis_url=f"redis://{host}:{port}", anonymous="restricted"
        )
        await asked.wait()
        assert await process.stop(within=5) == 0
        assert process.text == ""


@pytest.mark.parametrize(
    ("workers", "sign"),
    [("1", signal.SIGINT), ("2", signal.SIGTERM)],
    ids=["ctrl-c", "sigterm-with-workers"],
)
async def test_an_impatient_operator_breaks_nothing(
    valkey_url: str, prefix: str, tmp_path: Path, workers: str, sign: signal.Signals
) -> None:
    async with standalone(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process = relay.start("serve", "--no-forwarder", "--workers", workers)
        await sender.send_all(await process.track_url(), range(4))

        async def ends() -> bool:
            process.popen.send_signal(sign)  # a hundred times a second
            return process.popen.poll() is not None

        await eventually(ends)
        assert process.popen.returncode == 0
        assert servers(tmp_path) == {}
        await gone(group=process.pid)
        relay.start("serve")
        await delivered(relay, sender)
        assert len(sender.acknowledged) == 4
