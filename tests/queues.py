"""Queues for tests: events made in a line, and a clock that tests move."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import cast

import redis.asyncio

from relay.embedded import EmbeddedServer
from relay.limits import Limit
from relay.outcomes import Outcome
from relay.queue import (
    Claimed,
    Queue,
    Reply,
    Result,
    Scripts,
)
from relay.queueable import Queueable, Request, Special, Waiting

SIMULATED = Scripts(clock="call('HMGET', P .. ':clock', 's', 'us')")
START_S = 1_800_000_000

_seq = count(1)


def event(
    id: str = "",  # noqa: A002  # the wire's own name
    *,
    name: str = "e",
    customer: str = "",
    lane: str = "normal",
    delivery: str = "at_least_once",
    ttl_ms: int = 3_600_000,
    body: str = '{"event":"e"}',
    special: Special | None = None,
) -> Queueable:
    made = id or f"made-{next(_seq)}"
    # One of its own for each id, since one customer's events go one at a time.
    customer = customer or f"c-{made}"
    waiting = Waiting(made, name, customer, delivery, ttl_ms, lane, body)
    return bool(id), special, waiting


def result(claimed: Claimed, verdict: str, **parts: object) -> Result:
    return Result(
        lane=claimed.lane,
        entry=claimed.entry,
        verdict=verdict,
        **{"reason": verdict, **parts},  # type: ignore[arg-type]  # the test names them right
    )


class Clock:
    """The time that the scripts of one prefix see, in microseconds."""

    def __init__(self, url: str, prefix: str) -> None:
        self._client = redis.asyncio.Redis.from_url(url)
        self._key = "{" + prefix + "}:clock"
        self.us = START_S * 1_000_000

    async def set(self, us: int) -> None:
        self.us = us
        seconds, micros = divmod(us, 1_000_000)
        await self._client.hset(self._key, mapping={"s": seconds, "us": micros})

    async def pass_ms(self, ms: int) -> None:
        await self.set(self.us + ms * 1000)

    async def aclose(self) -> None:
        await self._client.aclose()


class Bench:
    """One queue under test, with what a test wants to say in one word."""

    def __init__(self, queue: Queue, clock: Clock, client: redis.asyncio.Redis) -> None:
        self.queue = queue
        self.clock = clock
        self.client = client  # for keys that have no method of their own
        self.url = ""

    async def take(self, *events: Queueable, ip: str = "ip") -> Reply:
        [reply] = await self.commit([(ip, list(events))])
        return reply

    async def commit(
        self, requests: list[Request], slot: str = "w:0", seq: int = 0
    ) -> list[Reply]:
        return await self.queue.commit(slot, seq or next(_seq), requests, [])

    async def codes(self, *events: Queueable, ip: str = "ip") -> list[int]:
        return (await self.take(*events, ip=ip)).codes[::2]

    async def claim(
        self,
        wanted: int = 10,
        *,
        consumer: str = "a",
        look_out: bool = False,
        held: Sequence[Claimed] = (),
    ) -> list[Claimed]:
        tick = await self.queue.tick(
            consumer, wanted, look_out=look_out, held=[c.place for c in held]
        )
        return tick.claimed

    async def settle(self, *results: Result, consumer: str = "a") -> int:
        return await self.queue.settle(consumer, results)

    async def totals(self) -> dict[str, int]:
        return {n: int(v) for n, v in (await self.queue.hash("totals")).items()}

    async def gauges(self) -> dict[str, str]:
        await self.client.hdel(f"{self.queue.prefix}:gauges", "updated_at_ms")
        return await self.queue.reap()

    async def dead(self) -> list[dict[str, str]]:
        found = cast(
            "Sequence[tuple[bytes, dict[bytes, bytes]]]",
            await self.client.xrange(f"{self.queue.prefix}:dead"),
        )
        return [{n.decode(): v.decode() for n, v in f.items()} for _, f in found]

    async def balanced(self) -> None:
        """received = outcomes + queued + in flight + delayed, by our own sum."""
        totals, gauges = await self.totals(), await self.gauges()
        outcomes = sum(totals.get(str(outcome), 0) for outcome in Outcome)
        waiting = sum(int(gauges[g]) for g in ("queued", "in_flight", "delayed"))
        assert totals.get("received", 0) == outcomes + waiting, (totals, gauges)
        assert gauges["unaccounted"] == "0"

    async def aclose(self) -> None:
        await self.queue.aclose()
        await self.clock.aclose()
        await self.client.aclose()


@asynccontextmanager
async def simulated(
    redis_url: str,
    prefix: str,
    *,
    kind: type[Queue] = Queue,
    limits: Sequence[Limit] = (),
) -> AsyncIterator[Bench]:
    """A queue that lives by a `Clock`, and whose counts are right at the end."""
    queue = kind(
        url=redis_url, prefix=prefix, limits=limits, scripts=SIMULATED, timeout=5.0
    )
    clock = Clock(redis_url, prefix)
    await clock.set(clock.us)
    bench = Bench(queue, clock, redis.asyncio.Redis.from_url(redis_url))
    yield bench
    await bench.balanced()
    await bench.aclose()


async def directory_balanced(directory: Path) -> None:
    """The same of what a relay that has ended left in its data directory."""
    with EmbeddedServer(data_dir=directory) as server:
        url = server.url
        bench = Bench(
            Queue(url=url, prefix="relay", timeout=5.0),
            Clock(url, "relay"),
            redis.asyncio.Redis.from_url(url),
        )
        try:
            await bench.balanced()
        finally:
            await bench.aclose()
