"""Several processes on one Redis are one relay: limits and budget hold for all."""

from pathlib import Path

import pytest

from relay.sandbox.config import SandboxConfig
from tests.integration.stack import Sender, stack

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


async def test_limits_are_exact_across_two_relays(
    redis_url: str, prefix: str, tmp_path: Path
) -> None:
    # So slow a refill that none of it comes during the test.
    async with (
        stack(redis_url, prefix, tmp_path, limits="ip=1/1h burst 100") as relay,
        Sender() as sender,
    ):
        first, second = relay.start("serve"), relay.start("serve")
        urls = [await first.track_url(), await second.track_url()]
        for n in range(150):
            await sender.send(urls[n % 2], n)
        assert sender.statuses == {202: 100, 429: 50}
        await relay.drained()
        assert len(relay.delivered_ids()) == 100


async def test_workers_of_one_relay_share_sockets_limits_and_budget(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with (
        stack(valkey_url, prefix, tmp_path, limits="ip=1/1h burst 50") as relay,
        Sender(40) as sender,
    ):
        process = relay.start("serve", "--workers", "2")
        url = await process.track_url()
        await sender.send_all(url, range(80))
        assert sender.statuses == {202: 50, 429: 30}
        await relay.drained()
        assert sorted(relay.delivered_ids()) == sorted(sender.acknowledged)
        assert await process.stop() == 0


async def test_two_forwarders_never_exceed_the_shared_budget(
    redis_url: str, prefix: str, tmp_path: Path
) -> None:
    # The sandbox enforces Voucherify's own limit and fails the test at a 429.
    async with (
        stack(
            redis_url, prefix, tmp_path, sandbox=SandboxConfig(), budget="4/5s"
        ) as relay,
        Sender() as sender,
    ):
        url = await relay.start("serve").track_url()
        relay.start("serve")
        relay.start("worker")
        await sender.send_all(url, range(14))
        await relay.drained()
        at = sorted(record.received_at for record in relay.sandbox.events)
        assert len(at) == 14
        assert all(
            fifth - first >= 5.0 for first, fifth in zip(at, at[4:], strict=False)
        )
