"""Delivery: the whole table, against the sandbox on a real socket and a real queue."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import redis.asyncio
from pydantic import SecretStr

from relay.cluster import Keys
from relay.errors import QueueUnavailable
from relay.forwarder import MARK_GOOD_S, Forwarder, Moment
from relay.limits import parse_budget
from relay.outcomes import Outcome
from relay.queue import Claimed, Queue, Result, Tick
from relay.sandbox.app import Sandbox
from relay.sandbox.config import SandboxConfig
from relay.sandbox.server import serve_sandbox
from relay.verdicts import Answer, Verdict
from relay.voucherify import Voucherify
from tests.queues import Bench, Clock, event
from tests.support import eventually

pytestmark = pytest.mark.anyio

PLAIN, PAYING = "at_least_once", "at_most_once"


def soon(_attempt: int, _told_ms: int | None) -> int:
    return 20  # milliseconds instead of a second and more


@dataclass
class Delivery:
    """A queue, a sandbox and what connects them."""

    bench: Bench
    sandbox: Sandbox
    upstream: Voucherify
    url: str

    @asynccontextmanager
    async def forwarder(self, **options: object) -> AsyncIterator[Forwarder]:
        given = {"queue": self.bench.queue, "upstream": self.upstream, "backoff": soon}
        made = Forwarder(**(given | options))  # type: ignore[arg-type]  # its own keywords
        running = asyncio.create_task(made.run())
        try:
            yield made
        finally:
            made.stop()
            await running

    async def send(self, name: str, delivery: str = PLAIN, **more: object) -> None:
        body = {"event": name, "customer": {"source_id": "c"}}
        await self.bench.take(
            event(name=name, delivery=delivery, body=json.dumps(body), **more)  # type: ignore[arg-type]  # event()'s own keywords
        )

    async def outcomes(self) -> dict[str, int]:
        totals = await self.bench.totals()
        return {n: totals[n] for n in map(str, Outcome) if totals.get(n)}

    async def settled(self, within: float = 20) -> dict[str, int]:
        async def quiet() -> bool:
            gauges = await self.bench.gauges()
            return all(gauges[g] == "0" for g in ("queued", "in_flight", "delayed"))

        await eventually(quiet, within=within)
        return await self.outcomes()


@asynccontextmanager
async def delivering(
    url: str, queue: Queue, config: SandboxConfig, **upstream: object
) -> AsyncIterator[Delivery]:
    async with serve_sandbox(config) as running:
        to = Voucherify(base_url=running.url, timeout=TIMEOUT_S, **upstream)  # type: ignore[arg-type]  # its own keywords
        clock = Clock(url, queue.prefix.strip("{}"))
        bench = Bench(queue, clock, redis.asyncio.Redis.from_url(url))
        yield Delivery(bench, running.sandbox, to, running.url)
        await bench.balanced()
        await to.aclose()
        await bench.aclose()
        running.sandbox.assert_clean()


@pytest.fixture
async def delivery(valkey_url: str, prefix: str) -> AsyncIterator[Delivery]:
    config = SandboxConfig(client_limit=None)
    keys = Keys(app_id=config.application_id, token=SecretStr(config.client_token))
    queue = Queue(url=valkey_url, prefix=prefix, timeout=5.0)
    async with delivering(
        valkey_url, queue, config, keys=keys, origin="https://shop.example"
    ) as made:
        yield made


async def test_a_queued_event_is_delivered_and_wakes_an_idle_forwarder(
    delivery: Delivery,
) -> None:
    async with delivery.forwarder():
        await delivery.send("first")
        await delivery.settled()
        await delivery.send("second")
        assert await delivery.settled() == {"delivered": 2}
    assert delivery.sandbox.event_names() == ["first", "second"]


TIMEOUT_S = 5.0  # a busy machine may stand still for a second
SILENCE = {"delay": TIMEOUT_S + 1, "disconnect": "close", "at": "before_record"}
TABLE: list[tuple[str, dict[str, object], str, dict[str, int], int, str]] = [
    # fault, delivery rule -> outcomes, how often it was recorded, reason of the letter
    ("2xx-unexpected-body", {"malformed": "text_200"}, PAYING, {"delivered": 1}, 1, ""),
    ("2xx-empty", {"malformed": "empty_200"}, PLAIN, {"delivered": 1}, 1, ""),
    ("400-plain", {"status": 400}, PLAIN, {"rejected": 1}, 0, "invalid_payload"),
    ("400-paying", {"status": 400}, PAYING, {"rejected": 1}, 0, "invalid_payload"),
    ("404", {"status": 404}, PAYING, {"rejected": 1}, 0, "not_found"),
    ("413", {"status": 413}, PLAIN, {"rejected": 1}, 0, "upstream_413"),
    ("422", {"status": 422}, PLAIN, {"rejected": 1}, 0, ""),
    ("502-plain", {"status": 502}, PLAIN, {"delivered": 1}, 1, ""),
    ("502-paying", {"malformed": "html_502"}, PAYING, {"delivered": 1}, 1, ""),
    ("503-paying", {"status": 503}, PAYING, {"delivered": 1}, 1, ""),
    ("500-plain", {"status": 500}, PLAIN, {"delivered": 1}, 1, ""),
    ("500-paying", {"status": 500}, PAYING, {"ambiguous": 1}, 0, ""),
    (
        "500-paying-applied",
        {"status": 500, "at": "after_record"},
        PAYING,
        {"ambiguous": 1},
        1,
        "",
    ),
    ("504-paying", {"status": 504}, PAYING, {"ambiguous": 1}, 0, ""),
    ("504-plain", {"status": 504}, PLAIN, {"delivered": 1}, 1, ""),
    (
        "silence-plain",
        SILENCE,
        PLAIN,
        {"delivered": 1},
        1,
        "",
    ),
    (
        "silence-paying",
        SILENCE,
        PAYING,
        {"ambiguous": 1},
        0,
        "read_timeout",
    ),
    (
        "reset-after-applied-paying",
        {"disconnect": "reset", "at": "after_record"},
        PAYING,
        {"ambiguous": 1},
        1,
        "connection_lost",
    ),
    (
        "reset-after-applied-plain",
        {"disconnect": "reset", "at": "after_record"},
        PLAIN,
        {"delivered": 1},
        2,  # at least once: this is what it means
        "",
    ),
    (
        "closed-paying",
        {"disconnect": "close", "at": "before_record"},
        PAYING,
        {"ambiguous": 1},
        0,
        "",
    ),
]


@pytest.mark.parametrize(
    ("fault", "rule", "outcomes", "recorded", "reason"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
async def test_the_delivery_table(
    delivery: Delivery,
    fault: dict[str, object],
    rule: str,
    outcomes: dict[str, int],
    recorded: int,
    reason: str,
) -> None:
    delivery.sandbox.fail_next(1, **fault)  # type: ignore[arg-type]  # the fault's own keywords
    async with delivery.forwarder():
        await delivery.send("e", rule)
        assert await delivery.settled() == outcomes
    assert len(delivery.sandbox.events) == recorded
    for dead in await delivery.bench.dead():
        assert reason in (dead["reason"], "")


async def test_an_upstream_that_is_not_there_costs_no_event(delivery: Delivery) -> None:
    nowhere = Voucherify(
        base_url="http://127.0.0.1:9",  # discard: nothing listens
        keys=Keys(app_id="a", token=SecretStr("token-of-a-test")),
        origin="https://shop.example",
    )
    up, delivery.upstream = delivery.upstream, nowhere
    async with delivery.forwarder():
        await delivery.send("e", PAYING)

        async def tried() -> bool:
            return (await delivery.bench.gauges())["delayed"] == "1"

        await eventually(tried)
    delivery.upstream = up
    async with delivery.forwarder():
        assert await delivery.settled() == {"delivered": 1}
    await nowhere.aclose()


async def test_a_429_is_obeyed_by_all_and_spends_no_attempt(delivery: Delivery) -> None:
    delivery.sandbox.expect("429")
    delivery.sandbox.fail_next(1, status=429, headers={"Retry-After": "2"})
    await delivery.send("e", PAYING)
    async with delivery.forwarder(concurrency=1):

        async def waits() -> bool:
            return (await delivery.bench.gauges())["delayed"] == "1"

        await eventually(waits)
        pause = await delivery.bench.client.pttl(
            f"{delivery.bench.queue.prefix}:pause:all"
        )
        assert 1_000 < pause <= 2_000
        assert await delivery.settled() == {"delivered": 1}


@pytest.mark.parametrize(
    ("fault", "hold"),
    [
        ({"status": 401}, "auth_hold"),
        ({"status": 403}, "auth_hold"),
        ({"status": 402}, "plan_hold"),
        ({"status": 415}, "config_hold"),
        (
            {
                "status": 429,
                "headers": {
                    "X-Rate-Limit-Type": "api_calls_cycle",
                    "Retry-After": "5",
                },
            },
            "plan_hold",
        ),
    ],
    ids=["401", "403", "402", "415", "cycle"],
)
async def test_a_hold_keeps_the_event(
    delivery: Delivery, fault: dict[str, object], hold: str
) -> None:
    delivery.sandbox.expect("429")
    delivery.sandbox.fail_next(None, **fault)  # type: ignore[arg-type]  # the fault's own keywords
    await delivery.send("e", PAYING)
    async with delivery.forwarder():

        async def held() -> bool:
            gauges = await delivery.bench.gauges()
            return gauges["hold"] == hold and gauges["delayed"] == "1"

        await eventually(held)
    delivery.sandbox.clear_faults()
    # What the hold's own time would bring, at once.
    await delivery.bench.client.hset(
        f"{delivery.bench.queue.prefix}:flow", "probe_at_ms", 0
    )
    async with delivery.forwarder():
        assert await delivery.settled() == {"delivered": 1}
    assert (await delivery.bench.gauges())["hold"] == ""


async def test_a_dead_letter_tells_what_voucherify_said(delivery: Delivery) -> None:
    async with delivery.forwarder():
        body = {"event": "e", "customer": {"id": "registered_10055"}}
        await delivery.bench.take(event("x", name="e", body=json.dumps(body)))
        assert await delivery.settled() == {"rejected": 1}
    [dead] = await delivery.bench.dead()
    said = json.loads(dead["error"])
    assert (dead["status"], dead["reason"]) == ("404", "not_found")
    assert said["key"] == "not_found"
    assert said["request_id"].startswith("v-")


async def test_an_event_that_is_too_old_expires_instead_of_retrying(
    delivery: Delivery,
) -> None:
    delivery.sandbox.fail_next(None, status=503)
    async with delivery.forwarder():
        await delivery.send("e", ttl_ms=500)
        assert await delivery.settled() == {"expired": 1}


class Renewing:
    """An upstream that has had to renew its token for the first calls."""

    def __init__(self, inner: Voucherify, calls: int) -> None:
        self.inner = inner
        self.left = calls

    async def send(self, body: bytes) -> Answer:
        if not self.left:
            return await self.inner.send(body)
        self.left -= 1
        return Answer(verdict=Verdict.RENEWED, reason="oauth_renewed", status=401)


@pytest.mark.parametrize("rule", [PLAIN, PAYING])
async def test_an_event_whose_token_was_renewed_goes_again_at_once(
    delivery: Delivery, rule: str
) -> None:
    bench, prefix = delivery.bench, delivery.bench.queue.prefix
    # More often than what opens the breaker, or strikes an event out.
    upstream = Renewing(delivery.upstream, calls=9)
    for n in range(3):
        await delivery.send(f"e{n}", rule)
    started = time.monotonic()
    async with delivery.forwarder(upstream=upstream, backoff=_never):
        assert await delivery.settled() == {"delivered": 3}
    assert time.monotonic() - started < 2  # no hold, no pause, no backoff
    assert len(delivery.sandbox.events) == 3
    assert await bench.client.exists(f"{prefix}:pause:all", f"{prefix}:sent") == 0
    assert (await bench.gauges())["hold"] == ""


def _never(attempt: int, told_ms: int | None) -> int:
    raise AssertionError(f"attempt {attempt} was spent, told {told_ms}")


async def test_an_event_that_waits_for_a_token_keeps_its_attempts(
    delivery: Delivery,
) -> None:
    upstream = Renewing(delivery.upstream, calls=3)
    delivery.sandbox.fail_next(1, status=400)
    async with delivery.forwarder(upstream=upstream):
        await delivery.send("e", PAYING)
        assert await delivery.settled() == {"rejected": 1}
    [dead] = await delivery.bench.dead()
    assert dead["attempts"] == "0"


async def test_a_probe_that_renewed_the_token_is_followed_by_another_soon(
    delivery: Delivery,
) -> None:
    flow = f"{delivery.bench.queue.prefix}:flow"
    await delivery.send("e", PAYING)
    await delivery.bench.client.hset(
        flow, mapping={"hold": "auth_hold", "probe_at_ms": 0, "probe_delay_ms": 30_000}
    )
    started = time.monotonic()
    async with delivery.forwarder(upstream=Renewing(delivery.upstream, calls=1)):
        assert await delivery.settled() == {"delivered": 1}
    assert 1 <= time.monotonic() - started < 4
    assert (await delivery.bench.gauges())["hold"] == ""


class Stuck:
    """An upstream whose answer comes when the test says so."""

    def __init__(self, inner: Voucherify) -> None:
        self.inner = inner
        self.entered = asyncio.Event()
        self.go = asyncio.Event()

    async def send(self, body: bytes) -> Answer:
        self.entered.set()
        await self.go.wait()
        return await self.inner.send(body)


async def test_a_stop_finishes_what_is_in_flight_and_claims_no_more(
    delivery: Delivery,
) -> None:
    stuck = Stuck(delivery.upstream)
    await delivery.send("in-flight")
    async with delivery.forwarder(upstream=stuck, concurrency=1) as forwarder:
        await stuck.entered.wait()
        await delivery.send("waiting")
        forwarder.stop()
        stuck.go.set()
    assert delivery.sandbox.event_names() == ["in-flight"]
    assert (await delivery.bench.gauges())["queued"] == "1"


@pytest.mark.parametrize(
    ("rule", "outcome"),
    [(PLAIN, {}), (PAYING, {"ambiguous": 1})],
    ids=["plain", "paying"],
)
async def test_a_drain_that_takes_too_long_follows_the_rule(
    delivery: Delivery, rule: str, outcome: dict[str, int]
) -> None:
    stuck = Stuck(delivery.upstream)
    await delivery.send("e", rule)
    async with delivery.forwarder(upstream=stuck, drain_timeout_s=0.05) as forwarder:
        await stuck.entered.wait()
        forwarder.stop()
    assert await delivery.outcomes() == outcome
    gauges = await delivery.bench.gauges()
    assert (gauges["in_flight"], gauges["delayed"]) == ("0", "0" if outcome else "1")


class Broken:
    """An upstream with a fault of our own making in it."""

    async def send(self, body: bytes) -> Answer:
        raise ZeroDivisionError(len(body))


async def test_a_bug_in_delivery_loses_nothing_and_pays_nothing_twice(
    delivery: Delivery,
) -> None:
    await delivery.send("plain")
    await delivery.send("paying", PAYING)
    async with delivery.forwarder(upstream=Broken()):

        async def handled() -> bool:
            return (await delivery.bench.gauges())["queued"] == "0" and (
                await delivery.outcomes() == {"ambiguous": 1}
            )

        await eventually(handled)
    async with delivery.forwarder():
        assert await delivery.settled() == {"delivered": 1, "ambiguous": 1}
    assert delivery.sandbox.event_names() == ["plain"]


async def test_what_was_sent_is_not_sent_again_when_redis_goes_back_in_time(
    delivery: Delivery,
) -> None:
    bench, prefix = delivery.bench, delivery.bench.queue.prefix
    await delivery.send("paying", PAYING, id="order-1")
    before = await bench.client.dump(f"{prefix}:q:normal")
    assert before is not None
    async with delivery.forwarder():
        assert await delivery.settled() == {"delivered": 1}
        # As after a failover to a replica that had not heard of the delivery.
        await bench.client.restore(f"{prefix}:q:normal", 0, before, replace=True)
        await bench.client.hset(f"{prefix}:totals", "delivered", 0)

        async def decided() -> bool:
            return (await delivery.outcomes()) == {"ambiguous": 1}

        await eventually(decided)
    assert delivery.sandbox.event_names() == ["paying"]
    [dead] = await bench.dead()
    assert dead["reason"] == "claimed_again"


async def test_what_stood_still_after_its_mark_is_not_sent_by_it(
    delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have taken it over meanwhile, and have sent it."""
    real = delivery.bench.queue.mark
    marks = 0

    async def mark(consumer: str, claimed: Sequence[Claimed]) -> list[bool]:
        nonlocal marks
        marks += 1
        ours = await real(consumer, claimed)
        if marks == 1:  # the machine stands still, which its own clock may not see
            wall = time.time()
            monkeypatch.setattr(time, "time", lambda: wall + MARK_GOOD_S + 1)
        return ours

    monkeypatch.setattr(delivery.bench.queue, "mark", mark)
    async with delivery.forwarder():
        await delivery.send("paying", PAYING)

        async def given_back() -> bool:
            return (await delivery.bench.gauges())["delayed"] == "1"

        await eventually(given_back)
        assert delivery.sandbox.requests == []
        assert await delivery.settled() == {"delivered": 1}
    assert delivery.sandbox.event_names() == ["paying"]


async def test_a_refused_event_may_be_sent_again(delivery: Delivery) -> None:
    delivery.sandbox.fail_next(2, status=503)
    async with delivery.forwarder():
        await delivery.send("paying", PAYING)
        assert await delivery.settled() == {"delivered": 1}


async def test_one_result_that_cannot_be_settled_holds_up_no_other(
    delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = delivery.bench.queue
    real = queue.settle

    async def settle(consumer: str, results: Sequence[Result]) -> int:
        if any(r.status == 404 for r in results):
            raise ZeroDivisionError
        return await real(consumer, results)

    monkeypatch.setattr(queue, "settle", settle)
    body = json.dumps({"event": "bad", "customer": {"id": "nobody"}})
    await delivery.bench.take(event("bad", name="bad", body=body))
    for n in range(5):
        await delivery.send(f"good-{n}")
    async with delivery.forwarder(look_out_s=0.1):

        async def others() -> bool:
            return (await delivery.outcomes()).get("delivered") == 5

        await eventually(others)
        monkeypatch.setattr(queue, "settle", real)
        # What nobody knew of any more came back by itself and found its end.
        assert await delivery.settled() == {"delivered": 5, "rejected": 1}


async def test_an_answer_lost_on_the_way_from_redis_costs_seconds_not_minutes(
    delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = delivery.bench.queue
    real = queue.tick
    lost: list[str] = []

    async def tick(consumer: str, wanted: int, **more: object) -> Tick:
        told = await real(consumer, wanted, **more)  # type: ignore[arg-type]  # passed on
        if told.claimed and not lost:
            lost.extend(c.id for c in told.claimed)
            raise QueueUnavailable("redis_timeout", "lost")
        return told

    monkeypatch.setattr(queue, "tick", tick)
    await delivery.send("paying", PAYING)
    async with delivery.forwarder(look_out_s=0.1):
        assert await delivery.settled() == {"delivered": 1}
    assert lost


async def test_the_shared_budget_paces_two_forwarders(
    delivery: Delivery, valkey_url: str, prefix: str
) -> None:
    paced = [
        Queue(
            url=valkey_url,
            prefix=prefix,
            budget=parse_budget("4/1s, 1000/1h"),
            timeout=5.0,
        )
        for _ in range(2)
    ]
    for n in range(14):
        await delivery.send(f"e{n}")
    async with (
        delivery.forwarder(queue=paced[0]),
        delivery.forwarder(queue=paced[1]),
    ):
        assert await delivery.settled() == {"delivered": 14}
    for queue in paced:
        await queue.aclose()
    # By Redis' clock, which the budget goes by: a busy machine may stand still between
    # a claim and its call. The wider window has kept when each was claimed.
    told = await delivery.bench.client.lrange(
        "{" + prefix + "}:budget:all:3600000", 0, -1
    )
    at = sorted(map(int, told))
    assert len(at) == 14
    assert all(later - first >= 1000 for first, later in zip(at, at[4:], strict=False))


# --- looked up before it is sent again ---------------------------------------------

VERIFY = "verify:relay_id"


@pytest.fixture
async def asking(valkey_url: str, prefix: str) -> AsyncIterator[Delivery]:
    """The same with the server API, where what may have arrived can be looked up."""
    config = SandboxConfig()
    keys = Keys(app_id=config.server_app_id, token=SecretStr(config.server_app_token))
    queue = Queue(url=valkey_url, prefix=prefix, timeout=5.0, look_up_ms=20)
    async with delivering(valkey_url, queue, config, api="server", keys=keys) as made:
        yield made


async def send_named(
    asking: Delivery, name: str, rule: str = PLAIN, **more: object
) -> None:
    body = {
        "event": name,
        "customer": {"source_id": f"c-{name}"},
        "metadata": {"relay_id": f"id-{name}"},
    }
    made = event(f"id-{name}", name=name, delivery=rule, body=json.dumps(body), **more)  # type: ignore[arg-type]  # event()'s own keywords
    await asking.bench.take(made)


async def noted(delivery: Delivery, field: str) -> int:
    """What this hour has counted; an hour may end in between."""
    keys = [
        key
        async for key in delivery.bench.client.scan_iter(
            f"{delivery.bench.queue.prefix}:hour:*"
        )
    ]
    counts = [await delivery.bench.client.hget(key, field) for key in keys]
    return sum(int(count) for count in counts if count)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500, "at": "after_record"},
        {"disconnect": "reset", "at": "after_record"},
        {"disconnect": "close", "at": "after_record", "delay": TIMEOUT_S + 1},
        {"status": 500},
        {"disconnect": "close", "at": "before_record"},
        {"status": 504},
    ],
    ids=str,
)
async def test_what_may_have_arrived_is_looked_up_and_arrives_once(
    asking: Delivery, fault: dict[str, object]
) -> None:
    asking.sandbox.fail_next(**fault)  # type: ignore[arg-type]  # its own keywords
    async with asking.forwarder():
        await send_named(asking, "a", VERIFY)
        assert await asking.settled() == {"delivered": 1}
    assert asking.sandbox.event_names() == ["a"]
    found = fault.get("at") == "after_record"
    assert await noted(asking, "doubted") == 1
    assert await noted(asking, "doubt_found") == found
    assert await noted(asking, "doubt_absent") == (not found)


async def test_it_may_be_doubtful_again_and_again(asking: Delivery) -> None:
    asking.sandbox.fail_next(2, status=500)
    asking.sandbox.fail_next(status=500, at="after_record")
    asking.sandbox.fail_next(2, status=503, on="activity")
    async with asking.forwarder():
        await send_named(asking, "a", VERIFY)
        assert await asking.settled() == {"delivered": 1}
    assert asking.sandbox.event_names() == ["a"]
    assert await noted(asking, "doubted") == 3


async def test_a_question_that_is_refused_holds_up_nothing_else(
    asking: Delivery,
) -> None:
    asking.sandbox.fail_next(None, status=403, on="activity")
    asking.sandbox.fail_next(status=500, event="a")
    async with asking.forwarder():
        await send_named(asking, "a", VERIFY)

        async def refused() -> bool:
            return any(r.status == 403 for r in asking.sandbox.requests)

        await eventually(refused)
        await send_named(asking, "b")

        async def delivered() -> bool:
            return await asking.outcomes() == {"delivered": 1}

        await eventually(delivered)
    gauges = await asking.bench.gauges()
    assert (gauges["hold"], gauges["delayed"]) == ("", "1")
    assert asking.sandbox.event_names() == ["b"]
    # Ten minutes later; nothing is spent meanwhile.
    delayed = f"{asking.bench.queue.prefix}:delayed"
    now_ms = int(time.time() * 1000)
    assert await asking.bench.client.zcount(delayed, now_ms + 500_000, "+inf") == 1


async def test_another_forwarder_may_find_out_that_it_is_to_be_sent_again(
    asking: Delivery,
) -> None:
    """Who sent it first remembers that, and must not take it for a Redis gone back."""
    asking.sandbox.fail_next(status=500)
    async with asking.forwarder() as first:
        await send_named(asking, "a", VERIFY)

        async def doubted() -> bool:
            return await noted(asking, "doubted") == 1

        await eventually(doubted)
        key = next(iter(first._sent))
        assert first._sent[key] == 0
        assert await asking.settled() == {"delivered": 1}
    # As if another process had looked it up: the first still has it in its memory.
    first = Forwarder(queue=asking.bench.queue, upstream=asking.upstream)
    body = '{"event":"a","customer":{"source_id":"c-a"},"metadata":{"relay_id":"id-a"}}'
    claimed = Claimed("retry", "1-1", key[1], 1, key[0], "a", VERIFY, body)
    first._sent[key] = 0
    await first._deliver(claimed, probe=False, unmarked=None, since=Moment.now())
    assert first._results[0].reason != "claimed_again"
    again = Claimed("retry", "1-2", key[1], 0, key[0], "a", VERIFY, body)
    await first._deliver(again, probe=False, unmarked=None, since=Moment.now())
    assert first._results[-1].reason == "claimed_again"
    first.stop()
    await first.run()


@pytest.mark.parametrize("call", ["mark", "settle"])
async def test_a_fault_at_one_call_to_redis_strands_nothing_and_repeats_nothing(
    delivery: Delivery, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real, calls = getattr(delivery.bench.queue, call), 0

    async def once(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError
        return await real(*args)

    monkeypatch.setattr(delivery.bench.queue, call, once)
    await delivery.send("paying", PAYING, customer="a")
    await delivery.send("plain", customer="b")
    async with delivery.forwarder(look_out_s=0.1, concurrency=2):
        assert await delivery.settled() == {"delivered": 2}
    assert sorted(delivery.sandbox.event_names()) == ["paying", "plain"]


async def test_no_more_is_sent_while_redis_takes_no_results(
    delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go = delivery.bench.queue.settle, asyncio.Event()

    async def settle(consumer: str, results: Sequence[Result]) -> int:
        await go.wait()
        return await real(consumer, results)

    monkeypatch.setattr(delivery.bench.queue, "settle", settle)
    ticks = 0
    tick = delivery.bench.queue.tick

    async def counted(*args: object, **named: object) -> Tick:
        nonlocal ticks
        ticks += 1
        return await tick(*args, **named)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(delivery.bench.queue, "tick", counted)
    for n in range(10):
        await delivery.send(f"e-{n}")
    async with delivery.forwarder(concurrency=3):

        async def some_are_sent() -> bool:
            return len(delivery.sandbox.events) >= 3

        async def ticked_twice_more() -> bool:
            return ticks >= seen + 2

        await eventually(some_are_sent)
        seen = ticks
        await eventually(ticked_twice_more)
        assert len(delivery.sandbox.events) < 2 * 3
        go.set()
        assert await delivery.settled() == {"delivered": 10}
