"""Whether an event has arrived: asked of the sandbox's server API, on a real socket."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr

from relay import activity
from relay.activity import CUSTOM_EVENT, MOST, Asked
from relay.cluster import Keys
from relay.outcomes import Hold
from relay.sandbox.app import Sandbox
from relay.sandbox.config import SandboxConfig
from relay.sandbox.faults import Fault
from relay.sandbox.server import serve_sandbox
from relay.verdicts import Answer, Verdict
from relay.voucherify import Voucherify

pytestmark = pytest.mark.anyio

PROOF = "relay_id"


def sent(value: object = "id-1", **customer: object) -> bytes:
    """An event as the relay has sent it."""
    who = customer or {"source_id": "c"}
    return json.dumps(
        {"event": "e", "customer": who, "metadata": {PROOF: value}}
    ).encode()


@asynccontextmanager
async def cluster(
    **settings: object,
) -> AsyncIterator[tuple[Sandbox, Voucherify]]:
    config = SandboxConfig(**settings)  # type: ignore[arg-type]  # its own fields
    async with serve_sandbox(config) as running:
        upstream = Voucherify(
            base_url=running.url,
            api="server",
            keys=Keys(
                app_id=config.server_app_id, token=SecretStr(config.server_app_token)
            ),
        )
        yield running.sandbox, upstream
        await upstream.aclose()
        running.sandbox.assert_clean()


async def ask(
    upstream: Voucherify, body: bytes, since_s: float | None = None
) -> Answer:
    since_ms = int((time.time() if since_s is None else since_s) * 1000)
    return await upstream.look_up(body, proof=PROOF, since_ms=since_ms)


# --- over the wire ----------------------------------------------------------------


@pytest.mark.parametrize("shape", ["nested", "flat"])
@pytest.mark.parametrize("source_id", ["c", "a/b?c=d&e#f %2F+ü", "activity"])
async def test_what_has_arrived_is_found(shape: str, source_id: str) -> None:
    async with cluster(activity_shape=shape) as (sandbox, upstream):
        body = sent(source_id=source_id)
        for other in (sent("id-2", source_id=source_id), sent("id-1", source_id="x")):
            assert (await upstream.send(other)).verdict is Verdict.DELIVERED
        assert (await ask(upstream, body)).verdict is Verdict.ABSENT
        assert (await upstream.send(body)).verdict is Verdict.DELIVERED
        answer = await ask(upstream, body)
        assert (answer.verdict, answer.reason) == (Verdict.DELIVERED, "found")
        [customer, _] = sandbox.customers[::-1][:2]
        by_id = sent(id=customer.id, source_id="somebody else's")
        assert (await ask(upstream, by_id)).verdict is Verdict.DELIVERED


async def test_who_is_not_known_has_done_nothing() -> None:
    async with cluster() as (_, upstream):
        answer = await ask(upstream, sent())
        assert (answer.verdict, answer.status) == (Verdict.ABSENT, 404)


async def test_another_404_says_nothing_of_the_customer() -> None:
    async with cluster() as (sandbox, upstream):
        for fault in (
            Fault(on="activity", status=404, body={"statusCode": 404, "message": "?"}),
            Fault(on="activity", status=404, text="<h1>404</h1>"),
        ):
            sandbox.inject(fault)
            assert (await ask(upstream, sent())).verdict is Verdict.REJECTED


async def test_only_what_is_shown_by_now_is_found_and_nothing_from_before() -> None:
    async with cluster(activity_delay_seconds=3600.0) as (sandbox, upstream):
        assert (await upstream.send(sent())).verdict is Verdict.DELIVERED
        assert (await ask(upstream, sent())).verdict is Verdict.ABSENT
        sandbox.configure(activity_delay_seconds=0)
        assert (await ask(upstream, sent())).verdict is Verdict.DELIVERED
        # Clocks may differ by minutes; what is older is another event.
        later = time.time() + activity.SKEW_MS / 1000
        assert (await ask(upstream, sent(), later - 60)).verdict is Verdict.DELIVERED
        assert (await ask(upstream, sent(), later + 60)).verdict is Verdict.ABSENT


async def test_among_too_many_nobody_can_tell() -> None:
    async with cluster() as (_, upstream):
        for n in range(MOST + 1):
            await upstream.send(sent(f"n-{n}"))
        assert (await ask(upstream, sent(f"n-{MOST - 1}"))).reason == "found"
        for body in (sent(f"n-{MOST}"), sent("none")):
            answer = await ask(upstream, body)
            assert answer.verdict is Verdict.UNCLEAR
            assert answer.reason == "look_up_incomplete"


def test_a_profile_is_no_proof() -> None:
    """Any sender may have put something into it."""
    asked = activity.asked(sent(), proof=PROOF, since_ms=0)
    assert asked is not None
    who = {"source_id": "c", "metadata": {PROOF: asked.value}}
    entry = {"type": activity.CUSTOM_EVENT, "data": {"customer": who}}
    said = json.dumps({"data": [entry], "has_more": False}).encode()
    answer = Answer(verdict=Verdict.DELIVERED, reason="delivered", status=200)
    assert activity.judged(asked, answer, said, whole=True).verdict is Verdict.ABSENT


async def test_the_client_api_shows_nobody_anything() -> None:
    upstream = Voucherify(
        base_url="http://127.0.0.1:9",
        origin="https://shop.example",
        keys=Keys(app_id="a", token=SecretStr("client-token-of-the-test")),
    )
    answer = await ask(upstream, sent())
    assert answer.verdict is Verdict.UNCLEAR
    assert answer.reason == "look_up_needs_server_api"
    await upstream.aclose()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b'{"customer":{},"metadata":{"relay_id":"x"}}',
        sent(None),
        sent(1),
        sent(""),
        # Every client takes these for a way up, however they are written.
        sent(source_id=".."),
        sent(id="."),
        # In the path, this is somebody else's own id.
        sent(source_id="cust_1"),
    ],
)
async def test_what_carries_no_proof_cannot_be_looked_up(body: bytes) -> None:
    async with cluster() as (sandbox, upstream):
        answer = await ask(upstream, body)
        assert answer.verdict is Verdict.UNCLEAR
        assert answer.reason == "look_up_impossible"
        assert sandbox.requests == []


async def test_a_plan_that_is_spent_is_told_as_of_any_call() -> None:
    async with cluster(per_minute=1) as (sandbox, upstream):
        sandbox.expect("429")
        verdicts = {(await ask(upstream, sent())).verdict for _ in range(3)}
        assert verdicts == {Verdict.ABSENT, Verdict.WAIT}


@pytest.mark.parametrize(
    ("fault", "verdict", "reason"),
    [
        ({"status": 403}, Verdict.HOLD, "missing_required_permission"),
        ({"status": 502}, Verdict.RETRY, "upstream_502"),
        ({"status": 500}, Verdict.UNKNOWN, "upstream_500"),
        ({"disconnect": "reset"}, Verdict.RETRY, "connection_lost"),
        ({"malformed": "text_200"}, Verdict.REJECTED, "look_up_garbled"),
        ({"malformed": "empty_200"}, Verdict.REJECTED, "look_up_garbled"),
        ({"malformed": "truncated_json"}, Verdict.REJECTED, "look_up_garbled"),
        ({"malformed": "wrong_shape"}, Verdict.REJECTED, "look_up_garbled"),
        ({"disconnect": "cut_short"}, Verdict.RETRY, "look_up_cut_short"),
    ],
)
async def test_a_question_without_an_answer_is_never_a_no(
    fault: dict[str, object], verdict: Verdict, reason: str
) -> None:
    async with cluster() as (sandbox, upstream):
        await upstream.send(sent("another"))
        sandbox.fail_next(on="activity", **fault)  # type: ignore[arg-type]  # its own
        answer = await ask(upstream, sent())
        assert (answer.verdict, answer.reason) == (verdict, reason)
        assert len(sandbox.requests) == 2
        assert (answer.hold is Hold.AUTH) == (verdict is Verdict.HOLD)
        assert (await ask(upstream, sent())).verdict is Verdict.ABSENT


# --- what an answer means ---------------------------------------------------------

OK = Answer(verdict=Verdict.DELIVERED, reason="delivered", status=200)
QUESTION = Asked(path="", params={}, proof=PROOF, value="id-1")


def read(page: object, *, whole: bool = True) -> Answer:
    return activity.judged(QUESTION, OK, json.dumps(page).encode(), whole=whole)


def of(data: object, kind: str = CUSTOM_EVENT) -> dict[str, object]:
    return {"id": "evcus_1", "type": kind, "data": data}


@pytest.mark.parametrize(
    "data",
    [
        {"metadata": {PROOF: "id-1"}},
        {"custom_event": {"type": "e", "metadata": {PROOF: "id-1", "n": 1}}},
        {"data": {"event": {"metadata": {PROOF: "id-1"}}, "customer": {}}},
    ],
)
def test_the_proof_is_found_wherever_the_event_lies(data: object) -> None:
    page = {"object": "list", "data": [of({}), of(data)], "has_more": True}
    assert read(page).reason == "found"


@pytest.mark.parametrize(
    "entry",
    [
        of({"metadata": {PROOF: "id-10"}}),
        of({"metadata": {PROOF: ["id-1"]}}),
        of({"metadata": {"Relay_id": "id-1"}}),
        of({"metadata": ["id-1"]}),
        of({PROOF: "id-1"}),
        of({"metadata": {PROOF: "id-1"}}, "customer.updated"),
        of("id-1"),
        of(None),
    ],
)
def test_anything_else_is_not_the_event(entry: object) -> None:
    assert read({"data": [entry], "has_more": False}).verdict is Verdict.ABSENT
    assert read({"data": [entry], "has_more": True}).verdict is Verdict.UNCLEAR


def test_a_full_page_that_does_not_say_whether_there_is_more_says_nothing() -> None:
    assert read({"data": [of({})] * MOST}).verdict is Verdict.UNCLEAR
    assert read({"data": [of({})] * (MOST - 1)}).verdict is Verdict.ABSENT
    assert read({"data": [], "total": 0}).verdict is Verdict.ABSENT


def test_deep_answers_end() -> None:
    deep: object = {"metadata": {PROOF: "id-1"}}
    for _ in range(100):
        deep = {"data": deep}
    assert read({"data": [of(deep)], "has_more": False}).verdict is Verdict.ABSENT


def test_a_question_begins_before_the_call_and_asks_for_the_oldest_first() -> None:
    asked = activity.asked(sent(), proof=PROOF, since_ms=1_800_000_000_123)
    assert asked is not None
    assert asked.path == "/v1/customers/c/activity"
    assert asked.params == {
        "limit": "100",
        "order": "created_at",
        "type": "customer.custom_event",
        "start_date": "2027-01-15T07:55:00.123Z",
    }
    early = activity.asked(sent(), proof=PROOF, since_ms=1)
    assert early is not None
    assert early.params["start_date"] == "1970-01-01T00:00:00.000Z"
