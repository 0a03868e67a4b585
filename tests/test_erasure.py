"""One person is gone from every place, and everybody else's events are not."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import msgspec
import pytest
import redis.asyncio

from relay.digests import Digests
from relay.erasure import Erased, forget
from relay.events import identified, read_event, upstream_body
from relay.limits import parse_limits
from relay.queue import Claimed, Queue, Step
from relay.queueable import Queueable
from tests.queues import Bench, event, result, simulated
from tests.servers import start_server
from tests.support import eventually

pytestmark = pytest.mark.anyio

# Every character that a body writes in another way than a key does.
PERSON = 'zoë "z" \\ 1'
DIGESTS = Digests(b"k")
THEIRS = DIGESTS.customer(source_id=PERSON)
DAY_MS = 86_400_000


def of(
    person: str, n: int | str, *, key: str = "source_id", **parts: object
) -> Queueable:
    body = {"event": "e", "customer": {key: person}, **parts}
    digest = DIGESTS.customer(**{key: person})  # type: ignore[arg-type]  # one of two
    lane = str(parts.pop("lane", "normal"))
    return event(
        f"id-{person.encode().hex()[:8]}-{n}",
        customer=digest,
        lane=lane,
        ttl_ms=DAY_MS,
        body=json.dumps(body, ensure_ascii=False, separators=(",", ":")),
        special=("n" * 18, 60_000, 9, DAY_MS, False, "", 0, 0, False)
        if n == "special"
        else None,
    )


class Interrupted(Queue):
    """A queue to which something happens before a step of the walk."""

    before: Callable[[str, str], Awaitable[None]] | None = None

    async def forget(
        self, place: str, cursor: str, size: int, customer: str, needle: str
    ) -> Step:
        if self.before is not None:
            await self.before(place, cursor)
        return await super().forget(place, cursor, size, customer, needle)


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    limits = parse_limits("customer=900/1h, site=900/1h")
    async with simulated(redis_url, prefix, kind=Interrupted, limits=limits) as made:
        yield made


async def erase(bench: Bench, **options: int) -> Erased:
    digests = [DIGESTS.customer(id=PERSON), THEIRS]
    return await forget(bench.queue, PERSON, digests=digests, **options)


async def everything(bench: Bench) -> dict[str, bytes]:
    """Each key with its value as bytes, whatever its type."""
    found: dict[str, bytes] = {}
    for key in cast("list[bytes]", await bench.client.keys(f"{bench.queue.prefix}:*")):
        kind = cast("bytes", await bench.client.type(key)).decode()
        read = {
            "string": bench.client.get,
            "hash": bench.client.hgetall,
            "set": bench.client.smembers,
            "stream": bench.client.xrange,
            "list": lambda key: bench.client.lrange(key, 0, -1),
            "zset": lambda key: bench.client.zrange(key, 0, -1, withscores=True),
        }[kind]
        value: object = await read(key)  # type: ignore[operator]  # by its type
        found[key.decode()] = repr(value).encode()
    return found


async def test_nothing_of_a_person_is_left_in_any_place(bench: Bench) -> None:
    mine = [
        of(PERSON, "high", lane="high"),
        of(PERSON, "low", lane="low"),
        of(PERSON, "special"),
        of(PERSON, "by-id", key="id"),
        of(PERSON, "dead"),
        of(PERSON, "retry"),
    ]
    others = [of("u2", n) for n in range(3)]
    await bench.queue.expect(mine[0][2], 60)
    await bench.take(mine[4], mine[5])
    [dead] = await bench.claim(2)  # one of a person at a time
    await bench.settle(result(dead, "rejected", error=json.dumps({"message": PERSON})))
    [retry] = await bench.claim(2)
    await bench.settle(result(retry, "retry", delay_ms=60_000))
    await bench.take(*mine[:4], *others)
    waiting = asyncio.create_task(bench.queue.outcome(mine[0][2], 30))

    async def listening() -> bool:
        info = cast("dict[str, int]", await bench.client.info("clients"))
        return info["blocked_clients"] == 1

    await eventually(listening)
    assert await erase(bench) == Erased(
        waiting=4, delayed=1, dead=1, spooled=0, marks=9, in_flight=0, mentions=0
    )
    assert await waiting == {"outcome": "dropped", "reason": "forgotten"}
    for key, value in (await everything(bench)).items():
        assert THEIRS not in key, key
        assert DIGESTS.customer(id=PERSON) not in key, key
        for form in (PERSON, json.dumps(PERSON)[1:-1], THEIRS):
            assert repr(form.encode())[2:-1].encode() not in value, key
    assert await bench.totals() == {"received": 9, "rejected": 1, "dropped": 5}
    for made in others:  # all of one customer
        [claimed] = await bench.claim(9)
        assert claimed.id == made[2].id
        await bench.settle(result(claimed, "delivered"))


async def test_what_is_on_its_way_is_left_alone_and_told(bench: Bench) -> None:
    await bench.take(of(PERSON, 1), of(PERSON, 2))
    [claimed] = await bench.claim(1)
    erased = await erase(bench)
    assert (erased.waiting, erased.in_flight) == (1, 1)
    await bench.settle(result(claimed, "delivered"))
    assert await bench.totals() == {"received": 2, "delivered": 1, "dropped": 1}
    erased = await erase(bench)
    assert (erased.waiting, erased.in_flight) == (0, 0)


async def delay(bench: Bench, *events: Queueable, ms: int = 1000) -> None:
    await bench.take(*events)
    claimed = await bench.claim(len(events))
    await bench.settle(*(result(c, "retry", delay_ms=ms) for c in claimed))


def interrupted(bench: Bench) -> Interrupted:
    assert isinstance(bench.queue, Interrupted)
    return bench.queue


async def test_what_leaves_for_its_next_try_during_the_walk_is_told(
    bench: Bench,
) -> None:
    await delay(bench, of(PERSON, 1))
    await bench.clock.pass_ms(1000)
    claimed: list[Claimed] = []

    async def claim(place: str, _cursor: str) -> None:
        if place == "delayed" and not claimed:
            claimed.extend(await bench.claim(1))

    interrupted(bench).before = claim
    erased = await erase(bench)
    assert len(claimed) == 1
    assert (erased.delayed, erased.in_flight) == (0, 1)
    await bench.settle(result(claimed[0], "retry", delay_ms=1000))
    erased = await erase(bench)
    assert (erased.delayed, erased.in_flight) == (1, 0)


async def test_what_is_tried_between_two_steps_is_not_missed(bench: Bench) -> None:
    """It comes back with a later time, and so where the walk is yet to come."""
    await delay(bench, *(of(f"person-{n}", 1) for n in range(30)))
    await delay(bench, of(PERSON, 1))
    key = f"{bench.queue.prefix}:delayed"
    await bench.clock.pass_ms(1000)  # now all of them are due
    tried = 0

    async def try_in_vain(place: str, _cursor: str) -> None:
        nonlocal tried
        if place != "delayed" or tried == 3:
            return
        tried += 1
        for claimed in await bench.claim(31):
            await bench.settle(result(claimed, "retry", delay_ms=60_000))
        await bench.clock.pass_ms(60_000)

    interrupted(bench).before = try_in_vain
    erased = await forget(bench.queue, PERSON, digests=[], batch=7)
    assert tried == 3
    assert (erased.delayed, erased.in_flight) == (1, 0)
    assert await bench.client.zcard(key) == 30


async def test_what_came_back_behind_the_walk_was_seen_on_its_way(
    bench: Bench,
) -> None:
    await delay(bench, *(of(f"person-{n}", 1) for n in range(20)), ms=600_000)
    await delay(bench, of(PERSON, 1))
    await bench.clock.pass_ms(1000)
    [claimed] = await bench.claim(1)
    back = False

    async def settle(place: str, cursor: str) -> None:
        nonlocal back
        if place == "delayed" and cursor and not back:
            back = True
            await bench.settle(result(claimed, "retry", delay_ms=1000))

    interrupted(bench).before = settle
    erased = await forget(bench.queue, PERSON, digests=[], batch=7)
    assert back
    assert (erased.delayed, erased.in_flight) == (0, 1)
    assert (await erase(bench)).delayed == 1


async def test_many_that_are_due_at_once_are_all_looked_at(bench: Bench) -> None:
    for n in range(30):  # one of a person at a time
        await delay(bench, of(PERSON, n))
    key = f"{bench.queue.prefix}:delayed"
    for member in await bench.client.zrange(key, 0, -1):
        await bench.client.zadd(key, {cast("bytes", member): 12_345}, xx=True)
    erased = await forget(bench.queue, PERSON, digests=[], batch=7)
    assert erased.delayed == 30


async def test_marks_stay_as_long_as_an_event_is_on_its_way(bench: Bench) -> None:
    await bench.take(of(PERSON, 1))
    [claimed] = await bench.claim(1)
    erased = await erase(bench)
    assert (erased.in_flight, erased.marks) == (1, 0)
    await bench.settle(result(claimed, "delivered"))
    erased = await erase(bench)
    assert erased.in_flight == 0
    assert erased.marks > 0


async def test_a_body_that_nobody_can_read_costs_no_other_its_count(
    bench: Bench,
) -> None:
    name = json.dumps(PERSON, ensure_ascii=False)
    await bench.take(
        of(PERSON, 1),
        event(body=f'{{"event":"e","customer":null,"referral":7,"metadata":{name}}}'),
        event(body=f"[{name}]"),
        event(body=name),
        event(body=f"{{ {name}"),
    )
    assert (await erase(bench)).waiting == 1
    await bench.balanced()
    assert len(await bench.claim(9)) == 4


@pytest.mark.parametrize("kind", ["id", "source_id"])
@pytest.mark.parametrize(
    "person",
    ["u/1", "a\u2028b", "\x00\x1f\x7f", "👤", "a\tb\nc", "<&'>", "cust_1", "*", "12"],
)
async def test_every_name_is_found_as_the_edge_writes_it(
    bench: Bench, person: str, kind: str
) -> None:
    sent = read_event(msgspec.json.encode({"event": "e", "customer": {kind: person}}))
    body = upstream_body(sent, identified(sent)).decode()
    await bench.take(event(body=body))
    assert (await forget(bench.queue, person, digests=[])).waiting == 1


async def test_keys_of_others_under_a_like_prefix_stay(redis_url: str) -> None:
    """A prefix is no pattern, and a key that is not ours stops nothing."""
    client = redis.asyncio.Redis.from_url(redis_url)
    for mark in (b"{e[a]*?}:\xff", b"{ea1}:coalesce:d:1", b"{e[a]*?}:coalesce:d:1"):
        await client.set(mark, "")
    queue = Queue(url=redis_url, prefix="e[a]*?", timeout=5.0)
    assert await queue.forget_marks(["d"]) == 1
    assert await client.delete(b"{e[a]*?}:\xff", b"{ea1}:coalesce:d:1") == 2
    await queue.aclose()
    await client.aclose()


@pytest.mark.parametrize(
    "program",
    [None, pytest.param("redis-server", marks=pytest.mark.system("redis-server"))],
)
async def test_no_file_of_the_private_server_keeps_the_person(
    program: str | None, prefix: str, tmp_path: Path
) -> None:
    """Not even when a rewrite from before the erasure is under way."""
    binary = shutil.which(program) if program else None
    if program and not binary:
        pytest.skip("needs redis-server (Debian: apt install redis)")

    def kept() -> bool:
        files = (file for file in tmp_path.rglob("*") if file.is_file())
        return any(b"somebody" in file.read_bytes() for file in files)

    with start_server(Path(binary) if binary else None, tmp_path) as url:
        client = redis.asyncio.Redis.from_url(url)
        queue = Queue(url=url, prefix=prefix, timeout=5.0)
        await client.config_set("slowlog-log-slower-than", 0)
        bodies = [event(body='{"customer":{"source_id":"somebody"}}')] * 9
        await queue.commit("w", 1, [("ip", bodies)], [])
        assert kept()
        # Written slowly, so that it still runs when the next is asked for.
        await client.config_set("rdb-key-save-delay", 200_000)
        await client.bgrewriteaof()
        await forget(queue, "somebody", digests=[])
        info = cast("dict[str, int]", await client.info("persistence"))
        assert info["aof_rewrite_in_progress"] == 1
        await client.config_set("rdb-key-save-delay", 0)
        await client.config_set("slowlog-log-slower-than", -1)
        await queue.rewrite_log()

        async def gone() -> bool:
            return not kept()

        await eventually(gone)
        assert await client.slowlog_get() == []
        await queue.aclose()
        await client.aclose()


async def test_an_event_of_another_that_names_the_person_stays(bench: Bench) -> None:
    code = {"code": "FRIEND", "referrer_id": PERSON}
    await bench.take(of("u2", 1, referral=code), of("u3", 1, metadata={"m": PERSON}))
    erased = await erase(bench)
    assert (erased.waiting, erased.mentions) == (0, 1)
    assert len(await bench.claim(9)) == 2


async def test_names_that_hold_the_persons_name_are_others(bench: Bench) -> None:
    await bench.take(of(f"{PERSON}0", 1), of(f"x{PERSON}", 1), of(PERSON.upper(), 1))
    assert (await erase(bench)).waiting == 0
    assert len(await bench.claim(9)) == 3


async def test_a_long_queue_is_walked_to_its_end_in_steps(bench: Bench) -> None:
    made = [of(PERSON if n % 3 == 0 else f"u{n}", n) for n in range(60)]
    await bench.take(*made)
    for n in range(30):
        verdict = {"verdict": "rejected"} if n % 2 else {"verdict": "retry"}
        [claimed] = await bench.claim(1)
        await bench.settle(result(claimed, **verdict, delay_ms=DAY_MS // 2))
    erased = await erase(bench, batch=4)
    assert (erased.waiting, erased.delayed, erased.dead) == (10, 5, 5)


async def test_who_waits_behind_another_event_is_erased_too(bench: Bench) -> None:
    mine = [of(PERSON, n) for n in range(7)]
    await bench.take(*mine[:5], of("u2", 9))
    first, other = await bench.claim(9)
    assert (first.id, other.id) == (mine[0][2].id, of("u2", 9)[2].id)
    erased = await erase(bench, batch=2)
    assert (erased.waiting, erased.in_flight) == (4, 1)
    await bench.settle(result(first, "delivered"))
    await bench.take(mine[6])  # new, and nothing of before holds it up
    assert [c.id for c in await bench.claim(9)] == [mine[6][2].id]


async def test_a_second_time_finds_nothing(bench: Bench) -> None:
    await bench.take(of(PERSON, 1))
    await erase(bench)
    again = await erase(bench)
    assert again == Erased(
        waiting=0, delayed=0, dead=0, spooled=0, marks=0, in_flight=0, mentions=0
    )


async def test_an_erased_id_may_be_sent_again(bench: Bench) -> None:
    await bench.take(of(PERSON, 1))
    await erase(bench)
    assert await bench.codes(of(PERSON, 1)) == [0]
