"""What the operator sees is what Redis holds, in numbers."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
import redis.asyncio

from relay.counters import GAUGES, stats
from relay.errors import QueueUnavailable
from relay.limits import parse_budget
from relay.outcomes import Outcome
from relay.queue import Queue
from tests.queues import Bench, Clock, event, result

pytestmark = pytest.mark.anyio

TOTALS = ["received", *(str(outcome) for outcome in Outcome)]


@pytest.fixture
async def bench(valkey_url: str, prefix: str) -> AsyncIterator[Bench]:
    queue = Queue(url=valkey_url, prefix=prefix, budget=parse_budget("4/5s"))
    clock = Clock(valkey_url, prefix)  # not used: these tests go by the real one
    client = redis.asyncio.Redis.from_url(valkey_url)
    yield Bench(queue, clock, client)
    for closed in (queue, clock, client):
        await closed.aclose()


def numbers(shown: object) -> dict[str, int]:
    assert isinstance(shown, dict)
    assert all(type(value) is int for value in shown.values())
    return shown


async def test_before_the_first_event_every_total_is_nought(bench: Bench) -> None:
    shown = await stats(bench.queue)
    assert list(shown) == [
        *("totals", "gauges", "hold", "plan", "forecast", "replay", "minutes"),
        "browser",
    ]
    assert shown["totals"] == dict.fromkeys(TOTALS, 0)
    assert shown["gauges"] == dict.fromkeys(GAUGES)
    assert shown["hold"] is None
    assert isinstance(shown["minutes"], dict)
    assert list(shown["minutes"].values()) == [{}] * 5
    assert isinstance(shown["browser"], dict)
    assert list(shown["browser"].values()) == [{}] * 2


async def test_each_outcome_is_counted_in_totals_and_in_its_minute(
    bench: Bench,
) -> None:
    await bench.take(event("a"), event("b"), event("c"), event("c"))
    first, second, _ = await bench.claim(3)
    await bench.settle(result(first, "delivered"), result(second, "rejected"))
    await bench.gauges()
    shown = await stats(bench.queue)
    counted = {"received": 4, "delivered": 1, "rejected": 1, "duplicate": 1}
    assert numbers(shown["totals"]) == dict.fromkeys(TOTALS, 0) | counted
    assert isinstance(shown["minutes"], dict)
    # The events may have met the turn of a minute.
    summed = {
        name: sum(numbers(minute).get(name, 0) for minute in shown["minutes"].values())
        for name in counted
    }
    assert summed == counted
    gauges = shown["gauges"]
    assert isinstance(gauges, dict)
    assert (gauges["queued"], gauges["in_flight"], gauges["dead"]) == (0, 1, 1)
    assert (gauges["unaccounted"], gauges["budget_per_s"]) == (0, 0.8)
    assert gauges["hold"] is None
    assert json.loads(json.dumps(shown)) == shown


async def test_the_minutes_are_the_last_ones_by_the_clock_of_redis(
    bench: Bench,
) -> None:
    before = await bench.queue.now()
    minutes = (await stats(bench.queue, minutes=3))["minutes"]
    assert isinstance(minutes, dict)
    stamps = list(minutes)
    assert stamps in (
        [f"{now - timedelta(minutes=n):%Y%m%d%H%M}" for n in range(3)]
        for now in (before, await bench.queue.now())
    )


async def test_what_browsers_reported_is_told_by_day_and_family(bench: Bench) -> None:
    now = await bench.queue.now()
    today = f"{bench.queue.prefix}:browser:{now:%Y%m%d}"
    await bench.client.hset(
        today, mapping={"safari:called": 2, "chrome:called": 9, "chrome:arrived": 8}
    )
    told = (await stats(bench.queue))["browser"]
    assert isinstance(told, dict)
    assert list(told) in (
        [f"{at - timedelta(days=n):%Y%m%d}" for n in range(2)]
        for at in (now, await bench.queue.now())
    )
    families = told[f"{now:%Y%m%d}"]
    assert families == {"chrome": {"called": 9, "arrived": 8}, "safari": {"called": 2}}
    assert list(families) == ["chrome", "safari"]  # the one with the most goes first


async def test_a_hold_says_why_since_when_and_when_it_is_tried_again(
    bench: Bench,
) -> None:
    await bench.take(event())
    [claimed] = await bench.claim(1)
    refused = result(claimed, "wait", reason="http_401", signal="auth_hold")
    await bench.settle(refused)
    await bench.gauges()
    shown = await stats(bench.queue)
    hold = shown["hold"]
    assert isinstance(hold, dict)
    assert list(hold) == ["hold", "reason", "since", "next_probe", "ends"]
    assert (hold["hold"], hold["reason"]) == ("auth_hold", "http_401")
    since, tried = (datetime.fromisoformat(hold[n]) for n in ("since", "next_probe"))
    assert since.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - since) < timedelta(seconds=10)
    assert tried >= since
    assert isinstance(shown["gauges"], dict)
    assert shown["gauges"]["hold"] == "auth_hold"


async def test_a_hold_by_hand_is_told_with_the_automatic_one_behind_it(
    bench: Bench,
) -> None:
    await bench.queue.hold("Ana, until noon")
    hold = (await stats(bench.queue))["hold"]
    assert isinstance(hold, dict)
    assert (hold["hold"], hold["reason"]) == ("by_hand", "Ana, until noon")
    assert (hold["next_probe"], hold["automatic"]) == (None, None)
    assert datetime.fromisoformat(hold["since"]).utcoffset() == timedelta(0)
    await bench.take(event())
    assert await bench.claim() == []
    await bench.queue.resume()
    [claimed] = await bench.claim()
    await bench.queue.hold("")
    refused = result(claimed, "wait", reason="http_401", signal="auth_hold")
    await bench.settle(refused)
    hold = (await stats(bench.queue))["hold"]
    assert isinstance(hold, dict)
    assert hold["automatic"]["hold"] == "auth_hold"


async def test_without_redis_it_says_so(prefix: str) -> None:
    queue = Queue(url="redis://127.0.0.1:9", prefix=prefix)  # the discard port
    try:
        with pytest.raises(QueueUnavailable) as caught:
            await stats(queue)
        assert caught.value.reason == "redis_unreachable"
    finally:
        await queue.aclose()
