"""One customer's events go one at a time and in their order, and flood nobody."""

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import pytest

from relay.queue import Claimed
from relay.queueable import Queueable
from tests.queues import Bench, event, result, simulated

pytestmark = pytest.mark.anyio

Make = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    async with simulated(redis_url, prefix) as made:
        yield made


def of(customer: str, n: int, **parts: object) -> Queueable:
    return event(f"{customer}-{n}", customer=customer, **parts)  # type: ignore[arg-type]  # its own keywords


async def deliver(bench: Bench, *claimed: Claimed) -> None:
    await bench.settle(*(result(c, "delivered") for c in claimed))


async def drain(bench: Bench, at_once: int = 4, limit: int = 10_000) -> list[str]:
    """Deliver everything, some at a time; the ids in the order they were claimed."""
    order: list[str] = []
    while len(order) < limit:
        claimed = await bench.claim(at_once)
        if not claimed:
            break
        order += [c.id for c in claimed]
        await deliver(bench, *claimed)
    return order


async def test_one_customers_events_are_in_flight_one_at_a_time(bench: Bench) -> None:
    await bench.take(*(of("ann", n) for n in range(5)), of("bob", 0))
    first, other = await bench.claim()
    assert (first.id, other.id) == ("ann-0", "bob-0")
    assert await bench.claim() == []
    await deliver(bench, first)
    assert [c.id for c in await bench.claim()] == ["ann-1"]
    assert (await bench.gauges())["queued"] == "3"


async def test_they_go_in_the_order_in_which_they_were_taken(bench: Bench) -> None:
    for n in range(30):
        await bench.take(of("ann", n), of("bob", n), of(f"other-{n}", 0))
    order = await drain(bench)
    for customer in ("ann", "bob"):
        own = [name for name in order if name.startswith(customer)]
        assert own == [f"{customer}-{n}" for n in range(30)]
    assert len(order) == 90


async def test_a_customer_in_two_lanes_has_one_in_flight(bench: Bench) -> None:
    await bench.take(
        of("ann", 1, lane="low"), of("ann", 2, lane="high"), of("ann", 3, lane="high")
    )
    claimed = await bench.claim()
    assert [c.id for c in claimed] == ["ann-2"]
    await deliver(bench, *claimed)
    rest = await drain(bench)
    assert rest == ["ann-3", "ann-1"]


async def test_a_retry_gives_up_its_place(bench: Bench) -> None:
    await bench.take(*(of("ann", n) for n in range(3)))
    [first] = await bench.claim()
    await bench.settle(result(first, "retry", delay_ms=2_000))
    [second] = await bench.claim()
    assert second.id == "ann-1"
    await bench.clock.pass_ms(2_500)
    # The retry is due while another one is in flight, and waits for it.
    assert await bench.claim() == []
    await deliver(bench, second)
    await bench.clock.pass_ms(1_500)
    assert sorted(await drain(bench)) == ["ann-0", "ann-2"]


async def test_a_flood_of_one_customer_leaves_half_of_the_lane_to_the_rest(
    bench: Bench,
) -> None:
    for start in range(0, 1000, 100):
        await bench.take(*(of("flood", start + n) for n in range(100)))
    await bench.take(*(of(f"other-{n}", 0) for n in range(100)))
    order = await drain(bench, limit=220)
    first = Counter(name.partition("-")[0] for name in order[:210])
    assert first["other"] >= 100
    assert order.index("other-0-0") < 5


async def test_many_floods_take_turns(bench: Bench) -> None:
    for customer in range(5):
        await bench.take(*(of(f"flood{customer}", n) for n in range(50)))
    order = await drain(bench, at_once=5, limit=100)
    shares = Counter(name.partition("-")[0] for name in order)
    assert len(shares) == 5
    assert max(shares.values()) - min(shares.values()) <= 6


async def test_what_waits_behind_expires_in_its_time(bench: Bench) -> None:
    await bench.take(*(of("ann", n, ttl_ms=5_000) for n in range(3)))
    [first] = await bench.claim()
    assert await bench.claim() == []  # the others have stepped behind
    await bench.clock.pass_ms(6_000)
    await bench.take(of("ann", 3, ttl_ms=5_000))
    await deliver(bench, first)
    assert await drain(bench) == ["ann-3"]
    assert (await bench.totals())["expired"] == 2


async def test_who_died_frees_the_customer(bench: Bench) -> None:
    await bench.take(*(of("ann", n) for n in range(2)))
    assert [c.id for c in await bench.claim(consumer="dead")] == ["ann-0"]
    assert await bench.claim() == []
    for _ in range(8):
        await bench.clock.pass_ms(5_000)
        await bench.claim(0)
    ids: list[str] = []
    for _ in range(4):
        claimed = await bench.claim(look_out=True)
        ids += [c.id for c in claimed]
        await deliver(bench, *claimed)
    assert sorted(ids) == ["ann-0", "ann-1"]


async def test_a_lost_group_strands_nobody(bench: Bench) -> None:
    """In flight, behind a lane, and in a row of their own: all of it comes back."""
    await bench.take(*(of("ann", n) for n in range(3)), of("bob", 0))
    await bench.claim()
    assert await bench.claim() == []
    key = bench.queue.prefix
    for lane in ("high", "normal", "low", "retry"):
        if await bench.client.exists(f"{key}:q:{lane}"):
            await bench.client.xgroup_destroy(f"{key}:q:{lane}", "relay")
    seen = await drain(bench)
    await bench.claim(0, look_out=True)
    seen += await drain(bench)
    assert sorted(seen) == ["ann-0", "ann-1", "ann-2", "bob-0"]


async def test_a_half_written_step_is_mended(bench: Bench) -> None:
    await bench.take(*(of("ann", n) for n in range(3)))
    [first] = await bench.claim()
    assert await bench.claim() == []
    await deliver(bench, first)
    # As after a script that failed between two of its writes.
    await bench.client.delete(f"{bench.queue.prefix}:ready:normal")
    assert await bench.claim() == []
    await bench.claim(0, look_out=True)
    assert await drain(bench) == ["ann-1", "ann-2"]


async def test_nothing_is_left_when_everything_is_out(bench: Bench) -> None:
    await bench.take(*(of("ann", n) for n in range(5)))
    await drain(bench)
    keys = cast("list[bytes]", await bench.client.keys(f"{bench.queue.prefix}:*"))
    left = {key.decode().partition("}:")[2].partition(":")[0] for key in keys}
    assert not left & {"busy", "ready", "behind"}


@pytest.mark.parametrize("seed", range(6))
async def test_any_history_keeps_order_and_loses_nobody(
    seed: int, bench: Bench
) -> None:
    """Several forwarders, deaths, retries, holds and lost groups, by chance."""
    rng = random.Random(seed)
    taken = 0
    flying: dict[str, tuple[str, Claimed]] = {}  # by customer
    for _ in range(300):
        match rng.randrange(8):
            case 0 | 1:
                customer = f"c{rng.randrange(4)}"
                lane = rng.choice(("high", "normal", "low"))
                await bench.take(of(customer, taken, lane=lane))
                taken += 1
            case 2 | 3:
                consumer = rng.choice("ab")
                held = [c for who, c in flying.values() if who == consumer]
                look_out = rng.random() < 0.3
                for claimed in await bench.claim(
                    rng.randrange(1, 4), consumer=consumer, look_out=look_out, held=held
                ):
                    customer = claimed.id.partition("-")[0]
                    assert customer not in flying
                    flying[customer] = (consumer, claimed)
            case 4 | 5 if flying:
                customer = rng.choice(sorted(flying))
                consumer, claimed = flying.pop(customer)
                verdict = rng.choice(("delivered", "delivered", "retry", "release"))
                await bench.settle(
                    result(claimed, verdict, delay_ms=rng.randrange(3_000)),
                    consumer=consumer,
                )
            case 6:
                await bench.clock.pass_ms(rng.randrange(1_500))
                for consumer in "ab":
                    await bench.claim(0, consumer=consumer)
            case _:
                await bench.balanced()
    for consumer, claimed in flying.values():
        await bench.settle(result(claimed, "delivered"), consumer=consumer)
    for _ in range(40):
        await bench.clock.pass_ms(1_100)
        await drain(bench)
    assert (await bench.totals())["delivered"] == taken
