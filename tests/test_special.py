"""What a commit counts for single events: coalescing, exact limits, uses of a token."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio

from relay.limits import parse_limits
from relay.queue import (
    COALESCED,
    DUPLICATE,
    EVENT_LIMITED,
    LIMITED,
    QUEUED,
    USED_UP,
    Event,
    Queue,
    Special,
)
from tests.queues import SIMULATED, Bench, Clock, event

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000


def special(
    *,
    name: str = "n",
    coalesce_ms: int = 0,
    quota: int = 0,
    limit_dry: bool = False,
    token: str = "t",  # noqa: S107  # a digest
    uses: int = 0,
    life_ms: int = 60_000,
    token_dry: bool = False,
) -> Special:
    return (
        *(name, coalesce_ms, quota, DAY_MS, limit_dry),
        *(token, uses, life_ms, token_dry),
    )


def of(id: str = "", customer: str = "c", **parts: object) -> Event:  # noqa: A002
    made: Special = special(**parts)  # type: ignore[arg-type]  # the test names them right
    return event(id, customer=customer, special=made)


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    queue = Queue(
        url=redis_url,
        prefix=prefix,
        limits=parse_limits("customer=50/1m burst 50"),
        scripts=SIMULATED,
        timeout=5.0,
    )
    clock = Clock(redis_url, prefix)
    await clock.set(clock.us)
    made = Bench(queue, clock, redis.asyncio.Redis.from_url(redis_url))
    yield made
    await made.balanced()
    await made.aclose()


async def minute(bench: Bench, field: str) -> int:
    stamps = await bench.client.keys(f"{bench.queue.prefix}:minute:*")
    found = 0
    for key in stamps:
        found += int(await bench.client.hget(key, field) or 0)
    return found


# --- coalesce -------------------------------------------------------------------------


async def test_the_first_in_a_window_is_taken_and_the_others_are_coalesced(
    bench: Bench,
) -> None:
    each: dict[str, Any] = {"coalesce_ms": 600_000}
    assert await bench.codes(of("a", **each), of("b", **each)) == [QUEUED, COALESCED]
    # For each customer and each event by itself.
    assert await bench.codes(of("c", "other", **each)) == [QUEUED]
    assert await bench.codes(of("d", name="m", **each)) == [QUEUED]
    assert await bench.codes(of("b", **each), of("a", **each)) == [DUPLICATE] * 2
    assert (await bench.totals())["coalesced"] == 1
    # Redis forgets the window by its own clock: as if it were over.
    await bench.client.delete(f"{bench.queue.prefix}:coalesce:c:n")
    assert await bench.codes(of("e", **each)) == [QUEUED]


async def test_a_window_ends_by_itself(bench: Bench) -> None:
    await bench.codes(of("a", coalesce_ms=600_000))
    left = await bench.client.pttl(f"{bench.queue.prefix}:coalesce:c:n")
    assert 590_000 < left <= 600_000


async def test_what_is_coalesced_is_charged_nowhere(bench: Bench) -> None:
    each: dict[str, Any] = {"coalesce_ms": 600_000, "quota": 2, "uses": 2}
    await bench.codes(*(of(**each) for _ in range(5)))
    before = await bench.take(event(customer="c"))
    assert before.remaining == 48  # two of fifty: the first one and this
    assert await bench.client.llen(f"{bench.queue.prefix}:rl:event:n:c") == 1
    assert await bench.client.get(f"{bench.queue.prefix}:uses:t") == b"1"


# --- the limit of an event ------------------------------------------------------------


async def test_no_day_has_more_than_the_limit_whatever_the_clock_does(
    bench: Bench,
) -> None:
    rng = random.Random(7)
    taken: list[int] = []
    # A clock that steps back counts what is past as of now: never more is let through.
    for _ in range(300):
        step = rng.choice([60_000, 600_000, 3_600_000, 9 * 3_600_000])
        await bench.clock.pass_ms(-step // 4 if rng.random() < 0.05 else step)
        now = bench.clock.us // 1000
        [code] = await bench.codes(of(quota=3))
        if code == QUEUED:
            taken.append(now)
        else:
            # After a step back the other limits may say no as well.
            assert code in (EVENT_LIMITED, LIMITED)
        assert len([at for at in taken if now - DAY_MS < at <= now]) <= 3
    assert len(taken) > 20


async def test_the_wait_is_that_of_the_oldest(bench: Bench) -> None:
    await bench.codes(of(quota=2))
    await bench.clock.pass_ms(3_600_000)
    await bench.codes(of(quota=2))
    reply = await bench.take(of(quota=2))
    assert reply.codes == [EVENT_LIMITED, (DAY_MS - 3_600_000) * 1000]
    await bench.clock.pass_ms(DAY_MS - 3_600_000 - 1)
    assert await bench.codes(of(quota=2)) == [EVENT_LIMITED]
    await bench.clock.pass_ms(1)
    assert await bench.codes(of(quota=2), of(quota=2)) == [QUEUED, EVENT_LIMITED]
    assert await minute(bench, "reason:rate_limited_event") == 3


async def test_a_trial_counts_what_the_limit_would_refuse(bench: Bench) -> None:
    for _ in range(4):
        trial = [of(customer="trial", quota=3, limit_dry=True) for _ in range(5)]
        assert await bench.codes(*trial) == [QUEUED] * 5
        refused = (await bench.codes(*(of(quota=3) for _ in range(5)))).count(
            EVENT_LIMITED
        )
        assert await minute(bench, "would_refuse:event") == refused
        for key in await bench.client.keys(f"{bench.queue.prefix}:minute:*"):
            await bench.client.delete(key)
        await bench.clock.pass_ms(DAY_MS // 3)


async def test_a_repeat_is_a_duplicate_also_over_the_limit(bench: Bench) -> None:
    assert await bench.codes(of("a", quota=1)) == [QUEUED]
    assert await bench.codes(of("a", quota=1)) == [DUPLICATE]
    assert await bench.codes(of("b", quota=1)) == [EVENT_LIMITED]


# --- uses of a token ------------------------------------------------------------------


async def test_a_token_is_used_up_and_a_repeat_is_none(bench: Bench) -> None:
    codes = await bench.codes(*(of(f"i{n}", uses=3) for n in range(5)))
    assert codes == [QUEUED] * 3 + [USED_UP] * 2
    assert await bench.codes(of("i1", uses=3), of("i4", uses=3)) == [DUPLICATE, USED_UP]
    assert await bench.codes(of(uses=3, token="another")) == [QUEUED]
    totals = await bench.totals()
    assert totals["unauthenticated"] == 3
    assert await minute(bench, "reason:token_used_up") == 3
    left = await bench.client.pttl(f"{bench.queue.prefix}:uses:t")
    assert 50_000 < left <= 60_000


async def test_what_is_refused_uses_nothing(bench: Bench) -> None:
    await bench.codes(*(event(customer="c") for _ in range(50)))  # the limit is spent
    assert await bench.codes(of(uses=1)) == [LIMITED]
    await bench.clock.pass_ms(60_000)
    assert await bench.codes(of(uses=1, quota=1)) == [QUEUED]
    assert await bench.codes(of(uses=5, token="u", quota=1)) == [EVENT_LIMITED]
    assert await bench.client.get(f"{bench.queue.prefix}:uses:u") is None


async def test_a_trial_of_the_token_rule_refuses_nothing(bench: Bench) -> None:
    trial: dict[str, Any] = {"uses": 1, "token_dry": True}
    assert await bench.codes(*(of(**trial) for _ in range(3))) == [QUEUED] * 3
    assert await minute(bench, "would_refuse:token") == 2


async def test_writers_at_once_never_share_one_use_too_many(bench: Bench) -> None:
    async def writer(n: int) -> list[int]:
        codes: list[int] = []
        for seq in range(1, 11):
            request = [("ip", [of(f"w{n}-{seq}", uses=7)])]
            [reply] = await bench.commit(request, slot=f"w:{n}", seq=seq)
            codes += reply.codes[::2]
        return codes

    codes = [
        code for one in await asyncio.gather(*map(writer, range(2))) for code in one
    ]
    assert (codes.count(QUEUED), codes.count(USED_UP)) == (7, 13)


async def test_a_repeated_commit_charges_nothing_twice(bench: Bench) -> None:
    request = [("ip", [of("a", uses=2, quota=2, coalesce_ms=1)])]
    first = await bench.commit(request, slot="w", seq=1)
    assert await bench.commit(request, slot="w", seq=1) == first
    assert await bench.client.get(f"{bench.queue.prefix}:uses:t") == b"1"
    assert await bench.client.llen(f"{bench.queue.prefix}:rl:event:n:c") == 1
