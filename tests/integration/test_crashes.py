"""Nothing that was acknowledged is lost, whatever is killed in mid-load."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from relay.embedded import EmbeddedServer
from tests.integration.stack import Sender, Stack, stack
from tests.support import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


@asynccontextmanager
async def load(url: str, sender: Sender, senders: int = 10) -> AsyncIterator[None]:
    """A steady load while the block runs."""
    stop = asyncio.Event()
    running = [
        asyncio.create_task(sender.keep_sending(url, stop, base=10_000 * (i + 1)))
        for i in range(senders)
    ]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*running)


async def acknowledged(sender: Sender, at_least: int) -> None:
    async def enough() -> bool:
        return len(sender.acknowledged) >= at_least

    await eventually(enough, within=30)


async def test_sigkill_of_the_relay_loses_no_acknowledged_event(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        first = relay.start("serve", "--no-forwarder")
        async with load(await first.track_url(), sender):
            await acknowledged(sender, 500)
            first.kill()
        relay.start("worker")
        await relay.drained()
        delivered = relay.delivered_ids()
        assert set(sender.acknowledged) <= set(delivered)
        assert len(delivered) == len(set(delivered))


async def test_sigkill_of_redis_loses_no_acknowledged_event(
    prefix: str, tmp_path: Path
) -> None:
    with EmbeddedServer(data_dir=tmp_path / "data") as server:
        async with stack(server.url, prefix, tmp_path) as relay, Sender() as sender:
            process = relay.start("serve")
            url = await process.track_url()
            async with load(url, sender):
                await acknowledged(sender, 300)
                killed = server.pid
                assert killed is not None
                os.kill(killed, signal.SIGKILL)
                before = len(sender.acknowledged)
                await acknowledged(sender, before + 300)  # it goes on by itself
            await relay.drained()
            assert server.pid != killed
            assert 500 not in sender.statuses
            missing = set(sender.acknowledged) - set(relay.delivered_ids())
            assert missing == set()


async def test_redis_away_is_a_503_with_retry_after_and_readyz_says_so(
    prefix: str, tmp_path: Path
) -> None:
    with EmbeddedServer(data_dir=tmp_path / "data") as server:
        async with stack(server.url, prefix, tmp_path) as relay, Sender() as sender:
            process = relay.start("serve")
            url, ready = await process.track_url(), await process.ready_url()
            assert await sender.send(url, 1) == 202
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            try:
                assert await sender.send(url, 2) == 503
                assert await status(ready) == 503
            finally:
                os.kill(server.pid, signal.SIGCONT)

            async def back() -> bool:
                return await sender.send(url, 2) == 202

            await eventually(back)
            assert await status(ready) == 200
            await relay.drained()
            # Whether the stopped server had taken the 2 or not: it arrived once.
            assert sorted(relay.delivered_ids()) == ["1", "2"]


async def status(url: str) -> int:
    async with Sender() as sender, sender._session.get(url) as answer:
        return answer.status


@pytest.mark.timeout(90)
async def test_what_a_killed_worker_held_is_taken_over_within_30_s(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        url = await relay.start("serve", "--no-forwarder").track_url()
        # Both calls hang at the sandbox, unrecorded, until their worker is dead.
        relay.sandbox.fail_next(2, disconnect="close", at="before_record", delay=8.0)
        await sender.send(url, "plain")
        await sender.send(url, "paying", loyalty={"code": "CARD"})
        worker = relay.start("worker")
        await in_flight(relay, 2)

        async def at_the_sandbox() -> bool:
            return len(relay.sandbox.faults()) == 0

        await eventually(at_the_sandbox)
        worker.kill()
        killed = loop.time()
        relay.start("worker")
        await relay.drained(within=40)
        assert loop.time() - killed < 30
        assert relay.delivered_ids() == ["plain"]
        [dead] = await relay.bench.dead()
        assert (dead["outcome"], dead["reason"]) == ("ambiguous", "worker_died")


async def in_flight(relay: Stack, n: int) -> None:
    async def there() -> bool:
        return (await relay.bench.gauges())["in_flight"] == str(n)

    await eventually(there)


async def test_sigterm_finishes_what_is_in_flight_and_keeps_the_rest(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with (
        stack(
            valkey_url,
            prefix,
            tmp_path,
            budget="4/5s",
        ) as relay,
        Sender() as sender,
    ):
        process = relay.start("serve")
        url = await process.track_url()
        relay.sandbox.fail_next(4, delay=1.0)
        await sender.send_all(url, range(8))
        await in_flight(relay, 4)
        assert await process.stop() == 0
        assert len(relay.delivered_ids()) == 4
        gauges = await relay.bench.gauges()
        assert (gauges["queued"], gauges["in_flight"]) == ("4", "0")
