"""A person can be erased while the relay runs, and nobody else notices."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.integration.stack import Sender, Stack, stack
from tests.programs import RELAY
from tests.support import eventually

pytestmark = pytest.mark.anyio


async def forget(relay: Stack, person: str) -> tuple[int, dict[str, int]]:
    """Run `relay forget`, and give its exit code and its counts."""
    process = await asyncio.create_subprocess_exec(
        *RELAY,
        "forget",
        person,
        "--json",
        env=relay.environ,
        cwd=relay.directory,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, json.loads(said)


async def test_a_person_can_be_erased_under_load(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    """Each of their events is delivered once or dropped; the others all arrive."""
    async with (
        stack(valkey_url, prefix, tmp_path, budget="60/1s") as relay,
        Sender() as sender,
    ):
        serve = relay.start("serve")
        url = await serve.track_url()
        await asyncio.gather(
            *(
                sender.send(url, n, customer="gone" if n % 2 else f"stays-{n}")
                for n in range(400)
            )
        )
        assert len(sender.acknowledged) == 400
        code, counts = await forget(relay, "gone")
        # A late one: what was on its way could come back for another try.
        while code == 1:
            code, more = await forget(relay, "gone")
            counts = {name: counts[name] + more[name] for name in counts}
        assert code == 0
        assert counts["waiting"] > 0
        await relay.drained()
        arrived = relay.delivered_ids()
        assert len(arrived) == len(set(arrived))
        stayed = {str(n) for n in range(0, 400, 2)}
        assert stayed <= set(arrived)
        dropped = counts["waiting"] + counts["delayed"]
        assert len(arrived) == 400 - dropped
        totals = await relay.bench.totals()
        assert (totals["delivered"], totals["dropped"]) == (len(arrived), dropped)

        # They may come back, as somebody new.
        assert await sender.send(url, "again", customer="gone") == 202

        async def back() -> bool:
            return "again" in relay.delivered_ids()

        await eventually(back)


async def test_without_the_secret_of_the_digests_nothing_is_half_erased(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay:
        process = relay.start("forget", "anybody", client_token="")
        await process.says("are keyed with the first secret")
        assert process.popen.wait(10) == 1
