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


def _is_theirs(n: int) -> bool:
    return n % 2 == 1 if n < 10_000 else n < 20_000


async def test_a_person_can_be_erased_under_load(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    """Each of their events is delivered once or dropped; the others all arrive."""
    async with (
        stack(valkey_url, prefix, tmp_path, budget="200/1s") as relay,
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
        # While they, and others, go on sending, and the forwarder delivers.
        stop = asyncio.Event()

        async def keep_sending(customer: str, base: int) -> None:
            n = base
            while not stop.is_set():
                await sender.send(url, n, customer=customer)
                n += 1

        senders = [
            asyncio.create_task(keep_sending("gone", 10_000)),
            asyncio.create_task(keep_sending("stays", 20_000)),
        ]
        code, counts = await forget(relay, "gone")
        assert counts["waiting"] > 0
        stop.set()
        await asyncio.gather(*senders)
        # Once more for what came meanwhile, and for what was on its way.
        again = True
        while again:
            code, more = await forget(relay, "gone")
            again = code == 1
            counts = {name: counts[name] + more[name] for name in counts}
        assert code == 0
        await relay.drained()
        arrived = relay.delivered_ids()
        assert len(arrived) == len(set(arrived))
        theirs = {n for n in sender.acknowledged if _is_theirs(int(n))}
        others = set(sender.acknowledged) - theirs
        assert others <= set(arrived)
        assert any(int(n) >= 10_000 for n in theirs)
        assert any(int(n) >= 20_000 for n in others)
        # Every event of the person that did not arrive was dropped, and no other.
        dropped = counts["waiting"] + counts["delayed"]
        assert len(theirs - set(arrived)) == dropped
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
