"""Keys that rotate and rules that change, while pages go on sending.

Whole relays in processes of their own; `test_rules.py` has what a token and a
catalogue decide. Here is what nobody may notice of a change.
"""

import asyncio
import fcntl
import json
import os
import random
import signal
import subprocess
import termios
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from relay.signing import Signer
from tests.integration.stack import HEADERS, ORIGIN, Process, Sender, Stack, stack
from tests.processes import children, gone
from tests.programs import RELAY
from tests.support import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

OLD, NEW = "old-key-of-thirty-two-characters", "new-key-of-thirty-two-characters"
SDK = {"Origin": ORIGIN, "Content-Type": "application/json"}
TOKEN_TTL_S = 4
RENEW_S = 1  # stamps are whole seconds, and a busy machine takes its time

TAKES_E = "[events.e]\n"
REFUSES_E = '[defaults]\nunlisted = "reject"\n[events.x]\n'
FAULTY = "[events.e]\npriority = 1\n"


@asynccontextmanager
async def pages() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=20),
        timeout=aiohttp.ClientTimeout(total=20),
    ) as session:
        yield session


def replace(path: Path, text: str) -> None:
    """Put a new version there in one step, as docs/catalog.md asks for."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


# --- keys -------------------------------------------------------------------------


class Shop:
    """A backend and its pages: relays behind one name, and tokens made for them."""

    def __init__(self, session: aiohttp.ClientSession, key: str) -> None:
        self.key = key  # what the backend signs with itself
        self.sent: list[str] = []
        self.refused: list[object] = []
        self._session = session
        self._relays: list[tuple[str, str]] = []

    async def join(self, process: Process) -> None:
        ready = await process.ready_url()

        async def is_ready() -> bool:
            async with self._session.get(ready) as answer:
                return answer.status == 200

        await eventually(is_ready)
        where = await process.track_url(), ready.replace("/readyz", "/tokens")
        self._relays.append(where)

    async def swap(self, old: Process, new: Process) -> None:
        """What a load balancer does: the new one in, the old one out and stopped."""
        await self.join(new)
        url = await old.track_url()
        self._relays = [relay for relay in self._relays if relay[0] != url]
        assert await old.stop() == 0

    async def token(self, rng: random.Random, who: str) -> str:
        if rng.random() < 0.3:
            made, _ = Signer([self.key], ttl_s=TOKEN_TTL_S).sign(
                source_id=who, now=time.time()
            )
            return made
        url = rng.choice(self._relays)[1]
        async with self._session.post(url, json={"source_id": who}) as answer:
            told: dict[str, str] = await answer.json()
            assert answer.status == 200, told
            return told["token"]

    async def visit(self, n: int, done: asyncio.Event) -> None:
        """A page: one token for as long as it counts, each event to any relay."""
        rng = random.Random(n)
        said, since = "", 0.0
        while not done.is_set():
            if time.monotonic() - since > RENEW_S:
                said, since = await self.token(rng, f"u{n}"), time.monotonic()
            name = f"{n}-{len(self.sent)}"
            self.sent.append(name)
            body = {"event": "e", "token": said, "id": name, "metadata": {"n": name}}
            url = rng.choice(self._relays)[0]
            async with self._session.post(
                url, data=json.dumps(body), headers=HEADERS
            ) as answer:
                if answer.status != 202:
                    self.refused.append(await answer.json(content_type=None))
            # Steadily, and no faster than one customer's events are delivered.
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), 0.02)

    async def more(self, events: int = 40) -> None:
        seen = len(self.sent)

        async def sent() -> bool:
            return len(self.sent) >= seen + events

        await eventually(sent, within=20)

    async def reason(self, process: Process, said: str) -> str:
        """How one relay finds a token: a reason, or nothing."""
        probe = {"event": "probe", "id": "probe", "metadata": {"n": "probe"}}
        body = json.dumps(probe | {"token": said})
        url = await process.track_url()
        async with self._session.post(url, data=body, headers=HEADERS) as answer:
            told: dict[str, str] = await answer.json(content_type=None)
            return told.get("reason", "")


async def test_keys_rotate_over_two_relays_and_no_page_notices(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    """docs/tokens.md, "Change the key", for relays that restart one after another."""
    ttl = f"{TOKEN_TTL_S}s"
    async with (
        stack(valkey_url, prefix, tmp_path, tokens="required", token_ttl=ttl) as relay,
        pages() as session,
    ):
        shop = Shop(session, OLD)
        running = [relay.start("serve", signing_keys=OLD) for _ in range(2)]
        for process in running:
            await shop.join(process)
        done = asyncio.Event()
        visits = [asyncio.create_task(shop.visit(n, done)) for n in range(4)]
        await shop.more()
        for keys in (f"{NEW} {OLD}", f"{OLD},{NEW}", NEW):
            if keys == NEW:  # every token of the old one has ended by then
                shop.key, changed = NEW, time.monotonic()

                async def ended(changed: float = changed) -> bool:
                    return time.monotonic() - changed > TOKEN_TTL_S + 1

                await eventually(ended)
            for place in range(2):
                fresh = relay.start("serve", signing_keys=keys)
                await shop.swap(running[place], fresh)
                running[place] = fresh
                await shop.more()
        done.set()
        await asyncio.gather(*visits)
        assert shop.refused == []
        retired, _ = Signer([OLD]).sign(source_id="u1", now=time.time())
        for process in running:
            assert await shop.reason(process, retired) == "token_forged"
        await relay.drained()
        assert sorted(relay.delivered_ids()) == sorted(shop.sent)
        assert {record.source_id for record in relay.sandbox.events} == {
            f"u{n}" for n in range(4)
        }


async def test_the_step_that_is_only_for_several_relays_is_needed(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with (
        stack(valkey_url, prefix, tmp_path, tokens="required") as relay,
        pages() as session,
    ):
        shop = Shop(session, OLD)
        relays = {
            name: relay.start("serve", signing_keys=keys)
            for name, keys in [
                ("behind", OLD),
                ("known", f"{NEW},{OLD}"),
                ("ahead", f"{OLD} {NEW}"),
            ]
        }
        found: dict[tuple[str, str], str] = {}
        for signer, made in relays.items():
            url = (await made.ready_url()).replace("/readyz", "/tokens")
            async with session.post(url, json={"source_id": "u1"}) as answer:
                said = str((await answer.json())["token"])
            for reader, process in relays.items():
                found[signer, reader] = await shop.reason(process, said)
        refused = {pair: reason for pair, reason in found.items() if reason}
        # Who signs with a new key at once is ahead of who has not heard of it.
        assert refused == {("ahead", "behind"): "token_forged"}
        await relay.drained()


# --- the catalogue: one process ---------------------------------------------------

VERSIONS = 30


def version(n: int) -> str:
    """A catalogue that takes `e<n>`, and `always`, and nothing else."""
    return f'[defaults]\nunlisted = "reject"\n[events.e{n}]\n[events.always]\n'


def body(name: str) -> dict[str, object]:
    # Of a customer each: one customer's events are delivered one after the other.
    customer = f"u{random.getrandbits(48):x}"
    return {"event": name, "customer": {"source_id": customer}, "metadata": {"n": "b"}}


async def test_each_request_meets_one_version_whole_while_they_change_under_load(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(version(0))
    batch = json.dumps([body(f"e{n}") for n in range(VERSIONS + 1)])
    always = json.dumps(body("always"))
    async with (
        stack(valkey_url, prefix, tmp_path, catalog=str(path)) as relay,
        pages() as session,
    ):
        process = relay.start("serve", "--no-forwarder")
        url = await process.track_url()
        met: list[tuple[int, int]] = []  # the newest seen at the start, and what came
        statuses: Counter[int] = Counter()
        done = asyncio.Event()

        async def beacons() -> None:
            while not done.is_set():
                newest = max((seen for _, seen in met), default=0)
                async with session.post(url, data=batch, headers=HEADERS) as answer:
                    assert answer.status == 202
                    entries = (await answer.json())["events"]
                statuses_said = [entry["status"] for entry in entries]
                reasons = {entry.get("reason") for entry in entries} - {None}
                assert reasons == {"event_unlisted"}
                assert statuses_said.count("queued") == 1  # not two versions, not none
                met.append((newest, statuses_said.index("queued")))

        async def clients() -> None:
            official = url.replace("/track", "/client/v1/events")
            while not done.is_set():
                async with session.post(official, data=always, headers=SDK) as answer:
                    await answer.read()
                    statuses[answer.status] += 1

        sending = [asyncio.create_task(beacons()) for _ in range(3)]
        sending.append(asyncio.create_task(clients()))
        for n in range(VERSIONS + 1):
            if n:
                replace(path, version(n))
                os.kill(process.pid, signal.SIGHUP)

            async def in_force(n: int = n) -> bool:
                assert not any(task.done() for task in sending)
                return bool(met) and met[-1][1] == n

            await eventually(in_force)
        done.set()
        await asyncio.gather(*sending)
        assert {seen for _, seen in met} == set(range(VERSIONS + 1))
        # And never back: what came after a new one was seen met that one or a newer.
        assert all(seen >= newest for newest, seen in met)
        assert set(statuses) == {200}
        assert process.text.count("catalog.loaded") == VERSIONS
        relay.start("worker")
        await relay.drained()


def probe() -> str:
    return json.dumps(body("e"))


async def answers(
    session: aiohttp.ClientSession, url: str, status: int, *, times: int = 1
) -> None:
    """Wait until each of so many new connections gets this answer."""
    headers = HEADERS | {"Connection": "close"}

    async def same() -> bool:
        found = set()
        for _ in range(times):
            async with session.post(url, data=probe(), headers=headers) as answer:
                await answer.read()
                found.add(answer.status)
        return found == {status}

    await eventually(same, within=20)


async def catalog_check(ready: str) -> str:
    async with aiohttp.ClientSession() as fresh, fresh.get(ready) as answer:
        assert answer.status == 200
        told: dict[str, dict[str, str]] = await answer.json()
        return told["checks"]["catalog"]


@pytest.mark.parametrize("how", ["faulty", "gone", "emptied"])
async def test_a_file_that_went_wrong_changes_nothing_and_a_repaired_one_counts(
    valkey_url: str, prefix: str, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(REFUSES_E)
    async with (
        stack(valkey_url, prefix, tmp_path, catalog=str(path)) as relay,
        pages() as session,
    ):
        process = relay.start("serve")
        url, ready = await process.track_url(), await process.ready_url()
        await answers(session, url, 403)
        match how:
            case "faulty":
                replace(path, FAULTY)
            case "gone":
                path.unlink()
            case "emptied":  # as a full disk leaves it: rules must not end with it
                path.write_text("")
        os.kill(process.pid, signal.SIGHUP)
        await process.says("catalog.(refused|loaded)", within=5)
        async with session.post(url, data=probe(), headers=HEADERS) as answer:
            assert answer.status == 403
        told = await catalog_check(ready)
        assert told.startswith("ok, but the old one is in force: ")
        refusals = process.text.count("catalog.refused")
        assert refusals <= 2  # at most a look of its own, and SIGHUP
        replace(path, TAKES_E)  # without a signal: seen at the next look
        await answers(session, url, 202)
        assert await catalog_check(ready) == "ok"
        assert process.text.count("catalog.refused") == refusals
        await relay.drained()


# --- the catalogue: several processes ---------------------------------------------


async def is_up(process: Process, workers: int = 2) -> None:
    async def there() -> bool:
        return len(children(process.pid)) == workers

    await eventually(there, within=20)


async def refused_by_all(parent: Process) -> None:
    async def all_three() -> bool:  # the parent knows the last good one for late ones
        return parent.text.count("catalog.refused") >= 3

    await eventually(all_three)


async def replaced(parent: Process) -> None:
    """Kill every process; when this returns only late ones are there to answer."""
    before = children(parent.pid)
    for child in before:
        os.kill(child, signal.SIGKILL)

    async def others() -> bool:
        now = children(parent.pid)
        return not set(now) & set(before) and len(now) == 2

    await eventually(others, within=20)


async def test_a_signal_to_the_parent_reaches_every_process(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(TAKES_E.ljust(len(REFUSES_E)))
    async with (
        stack(valkey_url, prefix, tmp_path, catalog=str(path)) as relay,
        pages() as session,
    ):
        parent = relay.start("serve", "--workers", "2")
        url = await parent.track_url()
        await is_up(parent)
        await answers(session, url, 202, times=20)
        # The same inode, size and time: only who is told to look will see it.
        before = path.stat()
        path.write_text(REFUSES_E)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.kill(parent.pid, signal.SIGHUP)
        await answers(session, url, 403, times=30)
        await relay.drained()


async def test_a_process_that_starts_late_goes_by_the_rules_of_the_others(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(TAKES_E)
    async with (
        stack(valkey_url, prefix, tmp_path, catalog=str(path)) as relay,
        pages() as session,
    ):
        parent = relay.start("serve", "--workers", "2")
        url = await parent.track_url()
        await is_up(parent)
        await answers(session, url, 202, times=20)
        replace(path, REFUSES_E)
        await answers(session, url, 403, times=30)
        replace(path, FAULTY)
        await refused_by_all(parent)
        await replaced(parent)
        # Else a rule that was in force is lifted again by a process that died.
        async with session.post(url, data=probe(), headers=HEADERS) as answer:
            assert answer.status == 403
        await answers(session, url, 403, times=30)
        await relay.drained()


async def test_a_process_that_starts_late_may_begin_without_rules(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text("[defaults]\n")  # no rules yet, and a good catalogue
    async with (
        stack(valkey_url, prefix, tmp_path, catalog=str(path)) as relay,
        pages() as session,
    ):
        parent = relay.start("serve", "--workers", "2")
        url = await parent.track_url()
        await is_up(parent)
        await answers(session, url, 202, times=20)
        replace(path, FAULTY)
        await refused_by_all(parent)
        await replaced(parent)
        await answers(session, url, 202, times=30)
        assert parent.text.count("serve.child_died") == 2
        assert "Traceback" not in parent.text
        await relay.drained()


async def test_a_process_that_starts_late_says_that_the_file_is_gone(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(REFUSES_E)
    async with (
        stack(valkey_url, prefix, tmp_path, catalog=str(path)) as relay,
        pages() as session,
    ):
        parent = relay.start("serve", "--workers", "2")
        url, ready = await parent.track_url(), await parent.ready_url()
        await is_up(parent)
        await answers(session, url, 403, times=30)
        path.unlink()
        await refused_by_all(parent)
        await replaced(parent)
        await answers(session, url, 403, times=30)

        async def each_says_so() -> bool:
            said = [await catalog_check(ready) for _ in range(20)]
            return all("the old one is in force" in word for word in said)

        await eventually(each_says_so)


# --- SIGHUP -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_hangup_without_a_catalogue_ends_nothing(
    valkey_url: str, prefix: str, tmp_path: Path, workers: str
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process = relay.start("serve", "--workers", workers)
        url = await process.track_url()
        if workers != "1":
            await is_up(process)
        assert await sender.send(url, 0) == 202  # so it is up, and listens to signals
        before = children(process.pid)
        for n in range(1, 21):
            os.killpg(process.pid, signal.SIGHUP)
            assert await sender.send(url, n) == 202
        assert process.popen.poll() is None
        assert children(process.pid) == before
        await relay.drained()
        assert len(relay.delivered_ids()) == 21
        assert await process.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_hangup_while_it_drains_does_not_cut_it_short(
    valkey_url: str, prefix: str, tmp_path: Path, workers: str
) -> None:
    """systemd's SendSIGHUP, and shells that tell their jobs of a lost terminal."""
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process = relay.start("serve", "--workers", workers)
        url = await process.track_url()
        relay.sandbox.fail_next(1, delay=1.0)
        assert await sender.send(url, 1) == 202
        await in_flight(relay)
        process.popen.send_signal(signal.SIGTERM)

        async def told_often() -> bool:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGHUP)
            return process.popen.poll() is not None

        await eventually(told_often, within=20)
        assert relay.delivered_ids() == ["1"]
        assert "Traceback" not in process.text
        assert process.popen.returncode == 0
        await gone(group=process.pid)


async def in_flight(relay: Stack) -> None:
    async def there() -> bool:
        return (await relay.bench.gauges())["in_flight"] == "1"

    await eventually(there)


def on_terminal(relay: Stack) -> tuple[Process, int]:
    """`relay serve` in a terminal of its own, and the other end of that."""
    terminal, inside = os.openpty()
    said = relay.directory / "terminal.log"
    with said.open("wb") as out:
        popen = subprocess.Popen(
            [*RELAY, "serve"],
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


async def test_one_process_ends_with_its_terminal_and_drains(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay, Sender() as sender:
        process, terminal = on_terminal(relay)
        url = await process.track_url()
        relay.sandbox.fail_next(1, delay=0.5)
        assert await sender.send(url, 1) == 202
        await in_flight(relay)
        # Somebody's, while the terminal is there: nothing ends.
        process.popen.send_signal(signal.SIGHUP)
        assert await sender.send(url, 2) == 202
        os.close(terminal)

        async def ended() -> bool:
            return process.popen.poll() is not None

        await eventually(ended, within=20)
        assert process.popen.returncode == 0
        assert "1" in relay.delivered_ids()
        await gone(group=process.pid)
