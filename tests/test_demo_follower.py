"""The demo's panel learns what became of a visitor's events, within bounds."""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import msgspec
import pytest

from relay.demo_follower import MAX_LOOKS, MAX_SHOWN, Followed, Follower
from relay.digests import Digests
from relay.queue import Queue
from relay.queueable import Waiting
from tests.queues import event, result
from tests.support import eventually

pytestmark = pytest.mark.anyio

DIGESTS = Digests(b"of the test")
WHO = DIGESTS.customer(source_id="u1")


@pytest.fixture
async def queue(valkey_url: str, prefix: str) -> AsyncIterator[Queue]:
    made = Queue(url=valkey_url, prefix=prefix)
    yield made
    await made.aclose()


@pytest.fixture
async def follower(queue: Queue) -> AsyncIterator[Follower]:
    made = Follower(queue, DIGESTS, rate=0.8)
    yield made
    await made.aclose()


def body(*ids: str, name: str = "order_placed") -> bytes:
    """What the snippet sends."""
    events = [
        {"event": name, "id": i, "customer": {"source_id": "u1"}, "metadata": {"n": 1}}
        for i in ids
    ]
    return msgspec.json.encode({"events": events, "report": {"called": len(ids)}})


def answer(status: str, *ids: str, **parts: object) -> bytes:
    entries = [{"id": i, "status": status, **parts} for i in ids]
    return msgspec.json.encode({"events": entries})


async def sent(follower: Follower, *ids: str, visitor: str = "v") -> list[Followed]:
    """Events that went through and were queued, as far as the follower knows."""
    found = await follower.expect(visitor, body(*ids))
    follower.answered(found, 202, answer("queued", *ids))
    return found


async def through(queue: Queue, event_id: str, verdict: str, **parts: object) -> None:
    """Have the queue take this event, and come to an end with it."""
    taken = event(event_id, name="order_placed", customer=WHO)
    await queue.commit(f"slot-{event_id}", 1, [("ip", [taken])], [])
    [claimed] = (await queue.tick("a", 10, look_out=False)).claimed
    await queue.settle("a", [result(claimed, verdict, **parts)])


def told(follower: Follower, visitor: str = "v") -> list[tuple[object, object]]:
    return [(e["id"], e["status"]) for e in follower.told(visitor)]


def following() -> int:
    return sum("_follow" in repr(task.get_coro()) for task in asyncio.all_tasks())


async def test_an_outcome_is_told_to_its_own_visitor(
    queue: Queue, follower: Follower
) -> None:
    found = await follower.expect("v", body("1"))
    assert told(follower) == [("1", "sent")]
    follower.answered(found, 202, answer("queued", "1"))
    assert told(follower) == [("1", "queued")]
    await through(queue, "1", "delivered")

    async def delivered() -> bool:
        return told(follower) == [("1", "delivered")]

    await eventually(delivered)
    [shown] = follower.told("v")
    assert shown["event"] == "order_placed"
    assert 0 <= cast("int", shown["took_ms"]) < 10_000
    assert msgspec.json.decode(cast("str", shown["sent"]))["metadata"] == {"n": 1}
    assert follower.told("another") == []
    assert following() == 0


async def test_a_rejection_comes_with_the_words_of_voucherify(
    queue: Queue, follower: Follower
) -> None:
    await sent(follower, "1")
    error = '{"message":"Invalid payload","details":"Loyalty card is unknown"}'
    await through(queue, "1", "rejected", reason="not_found", status=404, error=error)

    async def rejected() -> bool:
        return told(follower) == [("1", "rejected")]

    await eventually(rejected)
    [shown] = follower.told("v")
    assert shown["reason"] == "not_found"
    assert shown["detail"] == "Invalid payload: Loyalty card is unknown"


@pytest.mark.parametrize(
    ("status", "said", "shown"),
    [
        pytest.param(
            400,
            answer("invalid", "1", reason="code_missing", detail="code is required."),
            ("invalid", "code_missing", "code is required."),
            id="its-own-entry",
        ),
        pytest.param(
            202,
            answer("rate_limited", "1", reason="rate_limited_ip", detail="Again."),
            ("rate_limited", "rate_limited_ip", "Again."),
            id="to-come-again",
        ),
        pytest.param(
            403,
            b'{"status":403,"reason":"origin","detail":"Not from here."}',
            ("refused", "origin", "Not from here."),
            id="the-whole-request",
        ),
        pytest.param(
            503,
            b'{"status":503,"reason":"draining","detail":"Try again."}',
            ("unavailable", "draining", "Try again."),
            id="not-now",
        ),
        pytest.param(429, b"[1]", ("unavailable", "", ""), id="too-many"),
        pytest.param(502, b"<h1>502", ("unavailable", "", ""), id="no-relay"),
        pytest.param(
            502, b'{"events":7}', ("unavailable", "", ""), id="something-else"
        ),
    ],
)
async def test_what_the_relay_has_said_is_told_as_it_was(
    follower: Follower, status: int, said: bytes, shown: tuple[str, str, str]
) -> None:
    found = await follower.expect("v", body("1"))
    follower.answered(found, status, said)
    [event] = follower.told("v")
    assert (event["status"], event["reason"], event["detail"]) == shown
    assert following() == 0


async def test_one_that_came_again_is_followed_then(follower: Follower) -> None:
    for said in ("rate_limited", "unavailable"):
        found = await follower.expect("v", body("1"))
        assert told(follower) == [("1", "sent")]
        follower.answered(found, 202, answer(said, "1"))
    await sent(follower, "1")
    assert told(follower) == [("1", "queued")]
    assert following() == 1


async def test_a_repeat_changes_nothing_that_is_known(
    queue: Queue, follower: Follower
) -> None:
    # A beacon, and what the next page sends for want of its answer.
    await sent(follower, "1")
    again = await follower.expect("v", body("1"))
    follower.answered(again, 202, answer("duplicate", "1"))
    assert told(follower) == [("1", "queued")]
    assert following() == 1
    await through(queue, "1", "delivered")

    async def delivered() -> bool:
        return told(follower) == [("1", "delivered")]

    await eventually(delivered)
    again = await follower.expect("v", body("1"))
    follower.answered(again, 202, answer("duplicate", "1"))
    assert told(follower) == [("1", "delivered")]


async def test_a_duplicate_of_what_still_waits_is_followed_too(
    queue: Queue, follower: Follower
) -> None:
    # The answer to the first one never came here.
    found = await follower.expect("v", body("1"))
    follower.answered(found, 502, b"")
    found = await follower.expect("v", body("1"))
    follower.answered(found, 202, answer("duplicate", "1"))
    assert told(follower) == [("1", "duplicate")]
    await through(queue, "1", "delivered")

    async def delivered() -> bool:
        return told(follower) == [("1", "delivered")]

    await eventually(delivered)


async def test_it_says_how_long_those_in_the_queue_wait(follower: Follower) -> None:
    await sent(follower, "1", "2", visitor="first")
    await sent(follower, "3", "4")
    assert [e["wait_s"] for e in follower.told("v")] == [4, 5]


async def test_only_the_newest_are_followed(queue: Queue) -> None:
    follower = Follower(queue, DIGESTS, rate=0.8, most=3)
    await sent(follower, "1", "2")
    await sent(follower, "3", "4", "5", visitor="w")
    assert follower.told("v") == []
    assert [e["id"] for e in follower.told("w")] == ["3", "4", "5"]

    async def let_go() -> bool:
        return following() == 3

    await eventually(let_go)
    # More than it holds in one request: those that fell out are not followed.
    await sent(follower, "6", "7", "8", "9")
    assert [e["id"] for e in follower.told("v")] == ["7", "8", "9"]
    await eventually(let_go)
    await follower.aclose()
    assert following() == 0
    assert follower.told("v") == []


async def test_it_follows_for_a_time(queue: Queue) -> None:
    now = 1000.0
    follower = Follower(queue, DIGESTS, rate=0.8, seconds=10, clock=lambda: now)
    await sent(follower, "1")
    now += 11

    async def given_up() -> bool:
        return told(follower) == [("1", "unfollowed")]

    await eventually(given_up)
    assert following() == 0


async def test_few_look_at_once_and_each_has_its_turn() -> None:
    class Outcomes:
        looking = most = 0
        seen: set[str]

        def __init__(self) -> None:
            self.seen = set()

        async def expect(self, event: Waiting, seconds: int) -> None:
            del event, seconds

        async def outcome(
            self, event: Waiting, seconds: float
        ) -> dict[str, object] | None:
            del seconds
            self.looking += 1
            self.most = max(self.most, self.looking)
            await asyncio.sleep(0)
            self.looking -= 1
            self.seen.add(event.id)
            return None

    outcomes = Outcomes()
    follower = Follower(outcomes, DIGESTS, rate=0.8)
    ids = [str(n) for n in range(2 * MAX_LOOKS + 1)]
    await sent(follower, *ids)

    async def all_seen() -> bool:
        return outcomes.seen == set(ids)

    await eventually(all_seen)
    await follower.aclose()
    assert outcomes.most == MAX_LOOKS


@pytest.mark.parametrize(
    "sent_body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="bytes"),
        pytest.param(b"cart_abandoned", id="text"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'"x"', id="string"),
        pytest.param(b'{"events":{"id":"1"}}', id="no-list"),
        pytest.param(b'{"events":[1,null,"x",[]]}', id="no-events"),
        pytest.param(b'{"event":"e"}', id="no-id"),
        pytest.param(b'{"event":"e","id":7}', id="id-of-another-kind"),
        pytest.param(b'{"event":"e","id":"%s"}' % (b"x" * 65), id="id-too-long"),
    ],
)
async def test_any_other_body_is_followed_by_nobody(
    follower: Follower, sent_body: bytes
) -> None:
    assert await follower.expect("v", sent_body) == []
    assert follower.told("v") == []


@pytest.mark.parametrize(
    "customer",
    [
        pytest.param(b"null", id="null"),
        pytest.param(b'"u1"', id="string"),
        pytest.param(b'{"source_id":7,"id":[]}', id="numbers"),
    ],
)
async def test_a_customer_of_any_kind_does_no_harm(
    follower: Follower, customer: bytes
) -> None:
    found = await follower.expect(
        "v", b'{"event":["x"],"id":"1","customer":%s}' % customer
    )
    follower.answered(found, 400, answer("invalid", "1", detail="No."))
    assert told(follower) == [("1", "invalid")]


async def test_a_single_event_and_an_array_are_followed_and_cut(
    follower: Follower,
) -> None:
    await follower.expect("v", b'{"event":"e","id":"1"}')
    long = "x" * 5000
    await follower.expect("v", b'[{"event":"%s","id":"2"}]' % long.encode())
    first, second = follower.told("v")
    assert (first["event"], first["id"]) == ("e", "1")
    assert second["event"] == long[:300]
    assert len(cast("str", second["sent"])) == MAX_SHOWN


async def test_without_redis_nothing_is_known_and_nothing_fails(prefix: str) -> None:
    queue = Queue(url="redis://127.0.0.1:9", prefix=prefix)
    follower = Follower(queue, DIGESTS, rate=0.8)
    await sent(follower, "1", "2")
    assert told(follower) == [("1", "queued"), ("2", "queued")]
    await follower.aclose()
    await queue.aclose()
    assert following() == 0
