"""Dead letters on the ops listener: whoever may, gets the truth, and no 500."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import cast

import httpx
import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from uvicorn._types import ASGIApplication

from relay.dead_letters import MAX_IDS, WrongField
from relay.digests import Digests
from relay.letters_api import LettersApi
from relay.ops import ops_app
from relay.outcomes import letter_cure
from relay.queue import Queue
from relay.replay import Plan, Replay
from tests.queues import Bench, Clock, event, result
from tests.support import eventually, serve

pytestmark = pytest.mark.anyio

TTL_MS = 3_600_000
TOKEN = SecretStr("S3CRET-of-the-ops-listener")
DIGESTS = Digests(b"k")


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    queue = Queue(url=redis_url, prefix=prefix, timeout=5.0)
    client = redis.asyncio.Redis.from_url(redis_url)
    made = Bench(queue, Clock(redis_url, prefix), client)
    yield made
    await made.balanced()
    await made.aclose()


@pytest.fixture
async def api(bench: Bench) -> AsyncIterator[LettersApi]:
    made = LettersApi(
        bench.queue, ttl_ms=TTL_MS, queue_max=1_000, digests=DIGESTS, poll_s=0.001
    )
    yield made
    await made.aclose()


@pytest.fixture
async def client(api: LettersApi) -> AsyncIterator[httpx.AsyncClient]:
    app = cast("ASGIApplication", ops_app({}, letters=api))
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as asking:
        yield asking


async def bury(bench: Bench, n: int, verdict: str = "rejected", **more: object) -> None:
    reason = str(more.pop("reason", verdict))
    await bench.take(*(event(**more) for _ in range(n)))  # type: ignore[arg-type]
    while n:  # one customer's go one at a time
        claimed = await bench.claim(n)
        await bench.settle(*(result(c, verdict, reason=reason) for c in claimed))
        n -= len(claimed)


def assert_problem(answer: httpx.Response, status: int, reason: str) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert (said["status"], said["reason"]) == (status, reason)
    return dict(said)


async def replayed(client: httpx.AsyncClient) -> dict[str, object]:
    answer = await client.get("/dead-letters/replay")
    assert answer.status_code == 200
    return dict(answer.json()["replay"])


async def test_letters_are_listed_in_pages_with_counts_first(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    digest = DIGESTS.customer(source_id="u1")
    await bury(bench, 3, reason="bad", customer=digest, body='{"a":"zoe"}')
    await bury(bench, 2, "expired", reason="ttl")
    answer = await client.get("/dead-letters", params={"limit": "2"})
    assert answer.headers["cache-control"] == "no-store"
    assert "zoe" not in answer.text
    told = answer.json()
    assert told["counts"] == [
        {"n": n, "outcome": o, "reason": r, "cure": letter_cure(o, r)}
        for n, o, r in ((3, "rejected", "bad"), (2, "expired", "ttl"))
    ]
    seen = told["letters"]
    while told["after"]:
        more = {"limit": "2", "after": told["after"]}
        told = (await client.get("/dead-letters", params=more)).json()
        assert "counts" not in told
        seen += told["letters"]
    assert [one["reason"] for one in seen] == ["ttl", "ttl", "bad", "bad", "bad"]
    for query, n in [
        ({"customer": "u1"}, 3),
        ({"reason": "ttl", "since": "1h"}, 2),
        ({"until": "1h"}, 0),
        ({"outcome": "ambiguous"}, 0),
    ]:
        told = (await client.get("/dead-letters", params=query)).json()
        assert len(told["letters"]) == n, query


async def test_one_letter_is_shown_whole(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await bury(bench, 1, reason="bad", body='{"a":"zoe"}')
    [letter] = (await client.get("/dead-letters")).json()["letters"]
    answer = await client.get(f"/dead-letters/{letter['id']}")
    assert answer.json()["body"] == {"a": "zoe"}
    assert answer.json()["cure"] == letter_cure("rejected", "bad")
    assert answer.headers["cache-control"] == "no-store"
    assert_problem(await client.get("/dead-letters/1-1"), 404, "no_letter")
    for wrong in ("x", "drop", "1", "1-1-1", "%00", "9" * 40 + "-1"):
        said = assert_problem(
            await client.get(f"/dead-letters/{wrong}"), 400, "invalid"
        )
        assert said["field"] == "id"


async def test_a_dry_run_says_what_it_costs_and_does_nothing(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await bury(bench, 12, name="paid", reason="bad")
    await bury(bench, 1, "ambiguous")
    answer = await client.post("/dead-letters/replay", json={"dry_run": True})
    assert answer.status_code == 200
    cost = answer.json()["cost"]
    assert (cost["matched"], cost["calls"], cost["skipped"]) == (
        13,
        12,
        {"ambiguous": 1},
    )
    assert cost["events"] == [{"event": "paid", "n": 12}]
    assert "replay" not in answer.json()
    assert len(await bench.dead()) == 13
    assert (await client.get("/dead-letters/replay")).json() == {"replay": None}


async def test_a_replay_runs_behind_the_answer_and_tells_how_far_it_is(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await bury(bench, 25)
    answer = await client.post("/dead-letters/replay", json={"reason": "rejected"})
    assert answer.status_code == 202
    assert answer.json()["cost"]["calls"] == 25
    assert answer.json()["replay"]["state"] == "running"
    busy = await client.post("/dead-letters/replay", content=b"")
    assert_problem(busy, 409, "replay_busy")

    async def done() -> bool:
        claimed = await bench.claim(10)
        await bench.settle(*(result(c, "delivered") for c in claimed))
        return (await replayed(client))["state"] == "done"

    await eventually(done)
    told = await replayed(client)
    assert (told["sent"], told["delivered"], told["failed"]) == (25, 25, 0)
    again = await client.post("/dead-letters/replay", json={"resume": True})
    assert_problem(again, 409, "no_replay")


async def test_another_process_is_busy_with_it(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await bury(bench, 1)
    elsewhere = Replay(bench.queue, ttl_ms=TTL_MS, queue_max=9)
    await elsewhere.begin(Plan(), 1)
    for body in ({}, {"resume": True}):
        answer = await client.post("/dead-letters/replay", json=body)
        assert_problem(answer, 409, "replay_busy")
    assert (await replayed(client))["alive"] is True


async def test_ambiguous_ones_are_refused_with_where_to_look(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await bury(bench, 2, "ambiguous")
    answer = await client.post("/dead-letters/replay", json={})
    assert (
        letter_cure("ambiguous", "")
        in assert_problem(answer, 409, "ambiguous")["detail"]
    )
    body = {"yes_it_may_pay_twice": True, "limit": 1}
    answer = await client.post("/dead-letters/replay", json=body)
    assert answer.status_code == 202

    async def sent() -> bool:
        return (await replayed(client))["sent"] == 1

    await eventually(sent)
    assert len(await bench.dead()) == 1


async def test_nothing_to_replay_is_told(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    answer = await client.post("/dead-letters/replay", json={})
    assert "none fit" in assert_problem(answer, 409, "nothing_to_replay")["detail"]
    await bury(bench, 1)
    answer = await client.post("/dead-letters/replay", json={"ids": ["1-1"]})
    assert "1 gone" in assert_problem(answer, 409, "nothing_to_replay")["detail"]


async def test_a_process_that_ends_leaves_a_replay_that_can_be_resumed(
    bench: Bench,
) -> None:
    await bury(bench, 12)
    first, second = (
        LettersApi(bench.queue, ttl_ms=TTL_MS, queue_max=99, poll_s=0.001)
        for _ in range(2)
    )
    await first.replay(b"{}")

    async def sent() -> bool:
        return (await bench.queue.hash("replay"))["sent"] == "10"

    await eventually(sent)
    await first.aclose()
    state = await bench.queue.hash("replay")
    assert (state["state"], state["why"]) == ("stopped", "interrupted")
    status, told = await second.replay(b'{"resume": true}')
    assert (status, cast("dict[str, object]", told["replay"])["sent"]) == (202, 10)

    async def done() -> bool:
        claimed = await bench.claim(10)
        await bench.settle(*(result(c, "delivered") for c in claimed))
        return (await bench.queue.hash("replay"))["state"] == "done"

    await eventually(done)
    await second.aclose()


async def test_letters_are_dropped_when_it_is_said_which(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await bury(bench, 3, reason="bad")
    await bury(bench, 2, reason="worse")
    said = assert_problem(await client.post("/dead-letters/drop"), 400, "invalid")
    assert said["field"] == "all"
    for body, n in [
        ({"reason": "bad", "limit": 1}, 1),
        ({"reason": "bad"}, 2),
        ({"all": True}, 2),
        ({"all": True}, 0),
    ]:
        answer = await client.post("/dead-letters/drop", json=body)
        assert (answer.status_code, answer.json()) == (200, {"dropped": n})
    assert await bench.totals() == {"received": 5, "rejected": 5}


WRONG: list[tuple[object, str]] = [
    (b"{", "body"),
    (b"[]", "body"),
    (b"null", "body"),
    (b'{"reason": "\\ud800"}', "body"),
    (b"[" * 50_000, "body"),
    ({"more": 1}, "more"),
    ({"outcome": "delivered"}, "outcome"),
    ({"outcome": 1}, "outcome"),
    ({"reason": "x" * 301}, "reason"),
    ({"event": ["e"]}, "event"),
    ({"customer": "u" * 301}, "customer"),
    ({"since": "soon"}, "since"),
    ({"since": 5}, "since"),
    ({"until": "1969-01-01"}, "until"),
    ({"limit": 0}, "limit"),
    ({"limit": "5"}, "limit"),
    ({"limit": 10**30}, "limit"),
    ({"limit": True}, "limit"),
    ({"ids": "1-1"}, "ids"),
    ({"ids": ["x"]}, "ids"),
    ({"ids": [1]}, "ids"),
    ({"ids": ["1-1"] * (MAX_IDS + 1)}, "ids"),
]


@pytest.mark.parametrize("path", ["drop", "replay"])
@pytest.mark.parametrize(("body", "field"), WRONG, ids=lambda part: str(part)[:40])
async def test_wrong_input_is_a_problem_that_names_the_field(
    client: httpx.AsyncClient, path: str, body: object, field: str
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post(f"/dead-letters/{path}", content=raw)
    assert assert_problem(answer, 400, "invalid")["field"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"new_ttl": "1"}, "new_ttl"),
        ({"new_ttl": 0}, "new_ttl"),
        ({"new_ttl": 1.5}, "new_ttl"),
        ({"yes_it_may_pay_twice": 1}, "yes_it_may_pay_twice"),
        ({"dry_run": "yes"}, "dry_run"),
        ({"resume": None}, "resume"),
    ],
    ids=str,
)
async def test_what_only_a_replay_takes_is_checked_too(
    client: httpx.AsyncClient, body: object, field: str
) -> None:
    answer = await client.post("/dead-letters/replay", json=body)
    assert assert_problem(answer, 400, "invalid")["field"] == field


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("x=1", "x"),
        ("ids=1-1", "ids"),
        ("reason=a&reason=b", "reason"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=%00", "limit"),
        ("after=1", "after"),
        ("since=soon", "since"),
        ("outcome=%ff", "outcome"),
        ("since=1h&until=2h", "until"),
    ],
)
async def test_a_wrong_query_names_the_field(
    client: httpx.AsyncClient, query: str, field: str
) -> None:
    answer = await client.get(f"/dead-letters?{query}")
    assert assert_problem(answer, 400, "invalid")["field"] == field


async def test_without_the_secret_no_customer_is_looked_for(bench: Bench) -> None:
    api = LettersApi(bench.queue, ttl_ms=TTL_MS, queue_max=9)
    with pytest.raises(WrongField, match="RELAY_CLIENT_TOKEN"):
        await api.list([("customer", "u1")])


FIELDS = st.sampled_from(
    [
        *("outcome", "reason", "event", "customer", "since", "until", "limit", "ids"),
        *("all", "yes_it_may_pay_twice", "new_ttl", "dry_run", "resume", "x"),
    ]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.text(max_size=8), max_size=3),
)
BODIES = st.one_of(
    st.binary(max_size=100),
    st.dictionaries(FIELDS, VALUES).map(lambda body: json.dumps(body).encode()),
)


async def test_no_input_makes_a_500(client: httpx.AsyncClient) -> None:
    loop = asyncio.get_running_loop()

    async def ask(path: str, body: bytes, query: dict[str, str]) -> list[int]:
        answers = [
            await client.post(f"/dead-letters/{path}", content=body),
            await client.get("/dead-letters", params=query),
        ]
        return [answer.status_code for answer in answers]

    @settings(
        max_examples=80,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    @given(
        st.sampled_from(["drop", "replay"]),
        BODIES,
        st.dictionaries(FIELDS, st.text(max_size=20), max_size=2),
    )
    def answered(path: str, body: bytes, query: dict[str, str]) -> None:
        asked = asyncio.run_coroutine_threadsafe(ask(path, body, query), loop)
        assert set(asked.result(20)) <= {200, 202, 400, 409}

    await asyncio.to_thread(answered)


async def test_only_who_may_ask_for_tokens_may_ask(api: LettersApi) -> None:
    asked = [
        ("GET", "/dead-letters"),
        ("GET", "/dead-letters/1-1"),
        ("GET", "/dead-letters/replay"),
        ("POST", "/dead-letters/replay"),
        ("POST", "/dead-letters/drop"),
    ]
    for token, headers, status, reason in [
        (TOKEN, {}, 401, "ops_token"),
        (TOKEN, {"Authorization": "Bearer x"}, 401, "ops_token"),
        (None, {"Origin": "https://shop.example"}, 403, "ops_host"),
        (None, {"Host": "attacker.example"}, 403, "ops_host"),
    ]:
        app = cast("ASGIApplication", ops_app({}, letters=api, token=token))
        async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
            for method, path in asked:
                answer = await client.request(method, path, headers=headers)
                assert_problem(answer, status, reason)
            if token is not None:
                bearer = {"Authorization": f"Bearer {token.get_secret_value()}"}
                answer = await client.get("/dead-letters", headers=bearer)
                assert answer.status_code == 200


async def test_a_redis_that_is_away_is_a_503(prefix: str) -> None:
    queue = Queue(url="redis://127.0.0.1:9", prefix=prefix)  # the discard port
    api = LettersApi(queue, ttl_ms=TTL_MS, queue_max=9)
    app = cast("ASGIApplication", ops_app({}, letters=api))
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        for method, path in (("GET", ""), ("POST", "/replay"), ("GET", "/1-1")):
            answer = await client.request(method, f"/dead-letters{path}")
            assert_problem(answer, 503, "redis_unreachable")
            assert answer.headers["retry-after"] == "1"
    await queue.aclose()
