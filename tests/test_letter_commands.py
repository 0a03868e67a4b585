"""`relay dead-letters`, as an operator types it at three in the morning."""

import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import redis.asyncio

from relay.assembly import make_digests
from relay.outcomes import letter_cure
from relay.queue import Queue
from relay.settings import Role, load_settings
from tests.integration.stack import Process, Stack, beacon, stack
from tests.queues import Bench, Clock, event, result
from tests.support import eventually
from tests.test_cli import relay

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bench(valkey_url: str, prefix: str) -> AsyncIterator[Bench]:
    queue = Queue(url=valkey_url, prefix=prefix, timeout=5.0)
    client = redis.asyncio.Redis.from_url(valkey_url)
    made = Bench(queue, Clock(valkey_url, prefix), client)
    yield made
    await made.balanced()
    await made.aclose()


async def bury(bench: Bench, n: int, verdict: str = "rejected", **more: object) -> None:
    died = {name: more.pop(name) for name in ("reason", "error") if name in more}
    await bench.take(*(event(**more) for _ in range(n)))  # type: ignore[arg-type]
    while n:  # one customer's go one at a time
        claimed = await bench.claim(n)
        await bench.settle(*(result(c, verdict, **died) for c in claimed))
        n -= len(claimed)


@pytest.fixture
def where(valkey_url: str, prefix: str) -> dict[str, str]:
    return {"redis_url": valkey_url, "redis_prefix": prefix}


def words(text: str) -> str:
    return " ".join(re.sub(r"[│┃]", " ", text).split())


async def test_the_list_says_what_failed_why_and_what_to_do(
    bench: Bench, where: dict[str, str], tmp_path: Path
) -> None:
    done = relay(tmp_path, "dead-letters", "list", **where)
    assert done.stdout == "There are no dead letters of this kind.\n"
    await bury(bench, 2, reason="bad", name="\x1b[2J[red]", body='{"a":"zoë"}')
    await bury(bench, 1, "expired", reason="ttl")
    done = relay(tmp_path, "dead-letters", "list", **where)
    assert (done.returncode, done.stderr) == (0, "")
    said = words(done.stdout)
    assert said.index("rejected bad") < said.index("expired ttl")
    assert "the newest 3 of 3" in said
    assert "\x1b" not in done.stdout
    assert "[2J[red]" in said
    assert "zoë" not in done.stdout
    done = relay(tmp_path, "dead-letters", "list", "--reason", "ttl", "--json", **where)
    told = json.loads(done.stdout)
    cure = letter_cure("expired", "ttl")
    [counted], [letter] = told["counts"], told["letters"]
    assert counted == {"n": 1, "outcome": "expired", "reason": "ttl", "cure": cure}
    assert "body" not in letter
    shown = relay(tmp_path, "dead-letters", "show", letter["id"], "--json", **where)
    assert json.loads(shown.stdout)["cure"] == cure
    text = relay(tmp_path, "dead-letters", "show", letter["id"], **where).stdout
    assert "outcome: expired\n" in text
    assert "body:\n" in text
    gone = relay(tmp_path, "dead-letters", "show", "1-1", **where)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr == "There is no dead letter 1-1 (any more).\n"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("list", "--outcome", "delivered"), "--outcome"),
        (("list", "--since", "soon"), "--since"),
        (("list", "--customer", "u1"), "--customer"),
        (("show", "x"), "--ID"),
        (("drop", "5"), "--ids"),
        (("replay", "--new-ttl", "1"), "--new-ttl"),
        (("replay", "--resume", "--reason", "x"), "no filters here"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_what_cannot_be_used_is_wrong_usage_and_named(
    where: dict[str, str], tmp_path: Path, command: tuple[str, ...], named: str
) -> None:
    done = relay(tmp_path, "dead-letters", *command, **where)
    assert (done.returncode, done.stdout) == (2, "")
    assert named.replace("--ID", "ID") in words(done.stderr)


async def test_a_customer_is_found_by_the_same_digest_as_the_edge_makes(
    bench: Bench, where: dict[str, str], tmp_path: Path
) -> None:
    environ = {"RELAY_CLIENT_TOKEN": "S3CRET-token", "RELAY_ENV_FILE": "/dev/null"}
    digests = make_digests(load_settings(Role.READ, environ))
    await bury(bench, 1, customer=digests.customer(source_id="u1"))
    await bury(bench, 1, customer="other")
    done = relay(
        tmp_path,
        *("dead-letters", "list", "--customer", "u1", "--json"),
        **where,
        client_token="S3CRET-token",
    )
    assert len(json.loads(done.stdout)["letters"]) == 1


async def test_nothing_is_dropped_unless_it_is_said(
    bench: Bench, where: dict[str, str], tmp_path: Path
) -> None:
    await bury(bench, 3, reason="bad")
    drop = ("dead-letters", "drop", "--reason", "bad", "--limit", "2")
    done = relay(tmp_path, *drop, **where)
    assert done.returncode == 1
    assert "say --yes to do it" in done.stderr
    assert len(await bench.dead()) == 3
    done = relay(tmp_path, *drop, "--yes", **where)
    assert done.returncode == 0
    assert done.stdout.endswith(
        "2 dead letters are gone; their outcome stays counted.\n"
    )
    logged = json.loads(done.stderr)
    assert (logged["event"], logged["dropped"]) == ("letters.dropped", 2)
    assert len(await bench.dead()) == 1
    assert await bench.totals() == {"received": 3, "rejected": 3}


async def test_a_replay_says_first_what_it_costs(
    bench: Bench, where: dict[str, str], tmp_path: Path
) -> None:
    await bury(bench, 12, reason="bad", name="paid")
    await bury(bench, 1, "ambiguous")
    await bench.client.hset(
        f"{bench.queue.prefix}:gauges", mapping={"budget_per_s": "0.1", "eta_s": "60"}
    )
    done = relay(tmp_path, "dead-letters", "replay", "--dry-run", **where)
    assert done.returncode == 0
    said = words(done.stdout)
    assert "13 dead letters are meant." in said
    assert "1 are skipped: ambiguous: they may have arrived" in said
    assert letter_cure("ambiguous", "") in said
    assert "12 are paid" in said
    assert "To send: 12 calls, about 3.0 minutes at 0.1 calls a second, 1.0 of" in said
    done = relay(tmp_path, "dead-letters", "replay", **where)
    assert done.returncode == 1
    assert "say --yes to do it" in done.stderr
    assert len(await bench.dead()) == 13
    ambiguous = ("dead-letters", "replay", "--outcome", "ambiguous", "--yes")
    done = relay(tmp_path, *ambiguous, **where)
    assert done.returncode == 1
    assert "look in Voucherify" in words(done.stdout)
    done = relay(tmp_path, "dead-letters", "replay", "--resume", **where)
    assert done.stderr == "There is no unfinished replay to resume.\n"


# --- with a relay ---------------------------------------------------------------------


async def ended(process: Process) -> int:
    async def over() -> bool:
        return process.popen.poll() is not None

    await eventually(over, within=50)
    return cast("int", process.popen.returncode)


async def bury_beacons(it: Stack, n: int) -> None:
    """Dead letters that the sandbox takes."""
    made = []
    for number in range(n):
        body = json.loads(beacon(number))
        del body["id"]
        made.append(event(f"id-{number}", body=json.dumps(body)))
    await it.bench.take(*made)

    async def all_dead() -> bool:
        claimed = await it.bench.claim(50, consumer="test")  # as the budget lets it
        refusals = [result(c, "rejected", reason="bad") for c in claimed]
        await it.bench.settle(*refusals, consumer="test")
        return len(await it.bench.dead()) == n

    await eventually(all_dead)


async def test_a_replay_delivers_all_and_says_so(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as it:
        await bury_beacons(it, 130)
        worker = it.start("worker")
        await worker.ready_url()
        replay = it.start("dead-letters", "replay", "--yes")
        assert await ended(replay) == 0, replay.text
        assert "130 of 130 sent: 130 delivered, 0 failed, 0 on their" in replay.text
        ids = it.delivered_ids()
        assert sorted(ids, key=int) == [str(n) for n in range(130)]


async def test_a_replay_that_is_killed_is_resumed_and_sends_nothing_twice(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path, budget="100/1s") as it:
        await bury_beacons(it, 400)
        worker = it.start("worker")
        await worker.ready_url()
        replay = it.start("dead-letters", "replay", "--yes")

        async def in_the_middle() -> bool:
            assert (await it.bench.gauges())["unaccounted"] == "0"
            state = await it.bench.queue.hash("replay")
            return int(state.get("sent", 0)) > 100

        await eventually(in_the_middle, within=30)
        replay.kill()
        # From one look of one script, for the worker goes on meanwhile.
        assert (await it.bench.gauges())["unaccounted"] == "0"
        assert len(await it.bench.dead()) > 0
        early = it.start("dead-letters", "replay", "--resume")
        assert await ended(early) == 1
        assert "A replay is running in another process" in early.text

        async def lapsed() -> bool:
            state = await it.bench.queue.hash("replay")
            now = (await it.bench.queue.now()).timestamp() * 1000
            return int(state["lease_ms"]) <= now

        await eventually(lapsed, within=15)
        resumed = it.start("dead-letters", "replay", "--resume")
        assert await ended(resumed) == 0, resumed.text
        await it.drained()
        ids = it.delivered_ids()
        assert sorted(ids, key=int) == [str(n) for n in range(400)]
        totals = await it.bench.totals()
        assert totals == {"received": 800, "rejected": 400, "delivered": 400}


async def test_ctrl_c_says_how_far_it_got(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as it:
        await bury_beacons(it, 30)  # and nobody delivers
        replay = it.start("dead-letters", "replay", "--yes")
        await replay.says("canary: 10 of 30 sent")
        replay.popen.send_signal(signal.SIGINT)
        assert await ended(replay) == 1
        assert "10 of 30 sent: 0 delivered, 0 failed, 10 on their way." in replay.text
        assert "It stopped (interrupted)." in replay.text
        assert "relay dead-letters replay --resume" in replay.text
        worker = it.start("worker")
        await worker.ready_url()
        resumed = it.start("dead-letters", "replay", "--resume")
        assert await ended(resumed) == 0, resumed.text
        assert len(it.delivered_ids()) == 30


async def test_a_hold_is_said_while_it_waits(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as it:
        await bury_beacons(it, 3)
        await it.bench.queue.hold("")
        worker = it.start("worker")
        await worker.ready_url()
        replay = it.start("dead-letters", "replay", "--yes")
        await replay.says("canary: 3 of 3 sent, and delivery is held: by_hand")
        assert "Delivery is held (by_hand). Somebody held delivery" in replay.text
        assert it.start("resume").popen.wait(20) == 0
        assert await ended(replay) == 0, replay.text
        assert len(it.delivered_ids()) == 3
