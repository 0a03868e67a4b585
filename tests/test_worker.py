"""A worker delivers what edges elsewhere have queued."""

import signal
from pathlib import Path

import aiohttp
import pytest

from relay.assembly import listen
from tests.integration.stack import Process, Sender, Stack, stack
from tests.processes import gone
from tests.support import eventually

pytestmark = pytest.mark.anyio


async def test_what_an_edge_queued_is_delivered_by_a_worker(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        edge = relay.start("serve", "--no-forwarder")
        url = await edge.track_url()
        assert "not delivering (--no-forwarder)" in edge.text
        await sender.send_all(url, range(5))
        assert await edge.stop() == 0
        assert relay.delivered_ids() == []

        worker = relay.start("worker")
        await worker.says(rf"A worker, delivering to {relay.environ['RELAY_CLUSTER']} ")
        await relay.drained()
        assert sorted(relay.delivered_ids()) == ["0", "1", "2", "3", "4"]
        ready = await worker.ready_url()
        async with aiohttp.ClientSession() as session, session.get(ready) as answer:
            assert answer.status == 200
            assert (await answer.json())["status"] == "ready"
        assert await worker.stop() == 0
        await gone(group=worker.pid)


async def test_a_stop_finishes_what_is_in_flight_however_often_it_is_asked(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with (
        stack(valkey_url, prefix, tmp_path, budget="4/5s") as relay,
        Sender() as sender,
    ):
        url = await relay.start("serve", "--no-forwarder").track_url()
        relay.sandbox.fail_next(4, delay=1.0)
        await sender.send_all(url, range(6))
        worker = relay.start("worker")
        await in_flight(relay, 4)
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            worker.popen.send_signal(sign)
        assert await worker.stop() == 0
        assert len(relay.delivered_ids()) == 4
        gauges = await relay.bench.gauges()
        assert (gauges["queued"], gauges["in_flight"]) == ("2", "0")


async def in_flight(relay: Stack, n: int) -> None:
    async def there() -> bool:
        return (await relay.bench.gauges())["in_flight"] == str(n)

    await eventually(there)


async def test_a_second_worker_on_this_host_is_told_to_take_another_ops_port(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay:
        with listen("127.0.0.1", 0) as first:
            port = first.getsockname()[1]
            second = relay.start("worker", ops_port=str(port))
            assert await ended(second) == 1
        assert second.text == (
            f"Cannot listen on 127.0.0.1 port {port} (Address already in use): stop "
            "what uses it, or choose another port with RELAY_OPS_PORT.\n"
        )


async def ended(process: Process) -> int:
    async def has_ended() -> bool:
        return process.popen.poll() is not None

    await eventually(has_ended, within=30)
    return process.popen.returncode
