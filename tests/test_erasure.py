"""One person is gone from every place, and everybody else's events are not."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import cast

import pytest
import redis.asyncio

from relay.digests import Digests
from relay.erasure import Erased, forget
from relay.limits import parse_limits
from relay.queue import Event, Queue
from tests.queues import SIMULATED, Bench, Clock, event, result
from tests.support import eventually

pytestmark = pytest.mark.anyio

# Every character that a body writes in another way than a key does.
PERSON = 'zoë "z" \\ 1'
DIGESTS = Digests(b"k")
THEIRS = DIGESTS.customer(source_id=PERSON)
DAY_MS = 86_400_000


def of(person: str, n: int | str, *, key: str = "source_id", **parts: object) -> Event:
    body = {"event": "e", "customer": {key: person}, **parts}
    digest = DIGESTS.customer(**{key: person})
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


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    queue = Queue(
        url=redis_url,
        prefix=prefix,
        limits=parse_limits("customer=900/1h, site=900/1h"),
        scripts=SIMULATED,
        timeout=5.0,
    )
    clock = Clock(redis_url, prefix)
    await clock.set(clock.us)
    made = Bench(queue, clock, redis.asyncio.Redis.from_url(redis_url))
    yield made
    await made.balanced()
    await made.aclose()


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
    await bench.queue.expect(mine[0], 60)
    await bench.take(mine[4], mine[5])
    dead, retry = await bench.claim(2)
    await bench.settle(
        result(dead, "rejected", error=json.dumps({"message": PERSON})),
        result(retry, "retry", delay_ms=60_000),
    )
    await bench.take(*mine[:4], *others)
    waiting = asyncio.create_task(bench.queue.outcome(mine[0], 30))

    async def listening() -> bool:
        info = cast("dict[str, int]", await bench.client.info("clients"))
        return info["blocked_clients"] == 1

    await eventually(listening)
    assert await erase(bench) == Erased(
        waiting=4, delayed=1, dead=1, spooled=0, marks=10, in_flight=0, mentions=0
    )
    assert await waiting == {"outcome": "dropped", "reason": "forgotten"}
    for key, value in (await everything(bench)).items():
        assert THEIRS not in key, key
        assert DIGESTS.customer(id=PERSON) not in key, key
        for form in (PERSON, json.dumps(PERSON)[1:-1], THEIRS):
            assert repr(form.encode())[2:-1].encode() not in value, key
    assert await bench.totals() == {"received": 9, "rejected": 1, "dropped": 5}
    assert [c.id for c in await bench.claim(9)] == [made[0] for made in others]


async def test_what_is_on_its_way_is_left_alone_and_told(bench: Bench) -> None:
    await bench.take(of(PERSON, 1), of(PERSON, 2))
    [claimed] = await bench.claim(1)
    erased = await erase(bench)
    assert (erased.waiting, erased.in_flight) == (1, 1)
    await bench.settle(result(claimed, "delivered"))
    assert await bench.totals() == {"received": 2, "delivered": 1, "dropped": 1}
    erased = await erase(bench)
    assert (erased.waiting, erased.in_flight) == (0, 0)


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
    claimed = await bench.claim(30)
    await bench.settle(
        *(result(c, "retry", delay_ms=DAY_MS // 2) for c in claimed[:15]),
        *(result(c, "rejected") for c in claimed[15:]),
    )
    erased = await erase(bench, batch=4)
    assert (erased.waiting, erased.delayed, erased.dead) == (10, 5, 5)


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
