"""Faults on demand, and what is recorded when they strike."""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable

import httpx
import msgspec
import pytest
import uvloop

from relay.sandbox import Fault, SandboxConfig
from tests.sandbox.support import SERVER, Caller, calling, json_of
from tests.support import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def without_limit(request: pytest.FixtureRequest) -> None:
    if "caller" in request.fixturenames:
        request.getfixturevalue("caller").sandbox.configure(client_limit=None)


async def statuses(caller: Caller, count: int) -> list[int]:
    return [(await caller.send()).status_code for _ in range(count)]


async def test_the_next_requests_fail_and_then_no_more(caller: Caller) -> None:
    caller.sandbox.fail_next(2, status=503)
    assert await statuses(caller, 3) == [503, 503, 200]
    assert len(caller.sandbox.events) == 1
    assert [record.fault for record in caller.sandbox.requests] == [
        "503 before_record",
        "503 before_record",
        None,
    ]
    caller.sandbox.assert_clean()


async def test_a_fault_without_count_lasts_until_cleared(caller: Caller) -> None:
    caller.sandbox.fail_next(None, status=500)
    assert await statuses(caller, 5) == [500] * 5
    caller.sandbox.clear_faults()
    assert await statuses(caller, 1) == [200]


async def test_faults_wait_in_line(caller: Caller) -> None:
    caller.sandbox.fail_next(1, status=500)
    caller.sandbox.fail_next(1, status=502)
    assert await statuses(caller, 3) == [500, 502, 200]


async def test_a_fault_can_be_meant_for_one_event_or_one_customer(
    caller: Caller,
) -> None:
    caller.sandbox.fail_next(1, status=500, event="b")
    caller.sandbox.fail_next(1, status=502, source_id="2")
    seen = [
        (await caller.send({"event": name, "customer": {"source_id": who}})).status_code
        for name, who in (("a", "1"), ("b", "1"), ("b", "1"), ("a", "2"))
    ]
    assert seen == [200, 500, 200, 502]


async def test_a_request_that_is_refused_anyway_uses_no_fault_up(
    caller: Caller,
) -> None:
    caller.sandbox.fail_next(1, status=503)
    assert (await caller.send({"event": "e"})).status_code == 400
    assert (await caller.send()).status_code == 503


async def test_a_status_can_come_after_the_event_was_recorded(caller: Caller) -> None:
    caller.sandbox.fail_next(1, status=500, at="after_record")
    assert await statuses(caller, 1) == [500]
    assert len(caller.sandbox.events) == 1


@pytest.mark.parametrize(
    ("status", "key"),
    [
        (400, "invalid_payload"),
        (401, "unauthorized"),
        (402, "missing_required_feature"),
        (403, "missing_required_permission"),
        (404, "not_found"),
        (500, "internal_error"),
    ],
)
async def test_a_status_has_its_usual_body(
    caller: Caller, status: int, key: str
) -> None:
    caller.sandbox.fail_next(1, status=status)
    body = json_of(await caller.send())
    assert (body["code"], body["key"]) == (status, key)


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_load_balancer_speaks_html(caller: Caller, status: int) -> None:
    caller.sandbox.fail_next(1, status=status)
    answer = await caller.send()
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html")
    assert f"{status} " in answer.text


async def test_body_headers_and_content_type_can_be_given(caller: Caller) -> None:
    fault = Fault(
        status=418,
        body={"teapot": True},
        headers={"X-Extra": "1"},
        content_type="application/problem+json",
    )
    caller.sandbox.inject(fault)
    answer = await caller.send()
    assert (answer.status_code, answer.json()) == (418, {"teapot": True})
    assert answer.headers["x-extra"] == "1"
    assert answer.headers["content-type"] == "application/problem+json"
    caller.sandbox.inject(Fault(status=429, text="API calls limit exceeded."))
    assert (await caller.send()).text == "API calls limit exceeded."


@pytest.mark.parametrize(
    "value",
    ["-5", "99999999999", "soon", "", "Wed, 21 Oct 2026 07:28:00 GMT", "1.5"],
    ids=["negative", "huge", "garbage", "empty", "http-date", "fraction"],
)
async def test_retry_after_can_be_anything(caller: Caller, value: str) -> None:
    caller.sandbox.fail_next(1, status=429, headers={"Retry-After": value})
    answer = await caller.send()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, value)


async def test_headers_alone_change_the_usual_answer(caller: Caller) -> None:
    caller.sandbox.configure(per_minute=1000)
    caller.sandbox.fail_next(1, headers={"X-Rate-Limit-Remaining": "0"})
    answer = await caller.send()
    assert answer.status_code == 200
    assert answer.headers.get_list("x-rate-limit-remaining") == ["0"]


async def test_malformed_answers(caller: Caller) -> None:
    caller.sandbox.fail_next(1, malformed="html_502")
    caller.sandbox.fail_next(1, malformed="text_200")
    caller.sandbox.fail_next(1, malformed="empty_200")
    caller.sandbox.fail_next(1, malformed="truncated_json")
    caller.sandbox.fail_next(1, malformed="wrong_shape")
    answers = [await caller.send() for _ in range(5)]
    assert [answer.status_code for answer in answers] == [502, 200, 200, 200, 200]
    assert [len(answer.content) > 0 for answer in answers] == [1, 1, 0, 1, 1]
    assert isinstance(answers[4].json(), list)
    with pytest.raises(ValueError, match="Unterminated string"):
        answers[3].json()
    # A 2xx says that the event was taken, so each of the four was.
    assert len(caller.sandbox.events) == 4


async def test_a_200_can_be_a_lie(caller: Caller) -> None:
    caller.sandbox.fail_next(1, malformed="text_200", at="before_record")
    assert (await caller.send()).status_code == 200
    assert caller.sandbox.events == []


async def test_the_answer_can_be_late_and_the_event_is_recorded(caller: Caller) -> None:
    caller.sandbox.fail_next(1, delay=30)
    with pytest.raises(httpx.ReadTimeout):
        await caller.http.post(
            caller.url + SERVER,
            json={"event": "e", "customer": {"source_id": "a"}},
            headers={
                "x-app-id": "sandbox-server-application",
                "x-app-token": "sandbox-server-token",
            },
            timeout=0.2,
        )
    [record] = caller.sandbox.events

    async def noticed() -> object:
        return caller.sandbox.counts()["by_status"] == {"none": 1}

    await eventually(noticed)
    assert record.status is None


async def test_a_delayed_answer_arrives(caller: Caller) -> None:
    caller.sandbox.fail_next(1, delay=0.2)
    began = time.monotonic()
    assert await statuses(caller, 1) == [200]
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize(
    ("at", "recorded"),
    [("before_body", 0), ("before_record", 0), ("after_record", 1)],
)
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_connection_can_be_lost_at_three_moments(
    loop: Callable[[], asyncio.AbstractEventLoop], how: str, at: str, recorded: int
) -> None:
    async def lose() -> None:
        async with calling() as caller:
            fault = msgspec.convert({"disconnect": how, "at": at}, Fault)
            caller.sandbox.inject(fault)
            # A reset shows as a read error, a close as an end without an answer.
            lost = httpx.ReadError if how == "reset" else httpx.RemoteProtocolError
            with pytest.raises(lost):
                await caller.send()
            assert len(caller.sandbox.events) == recorded
            assert caller.sandbox.requests[0].status is None
            assert (await caller.send()).status_code == 200
            caller.sandbox.assert_clean()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(lose())


async def test_a_reset_is_a_reset_on_the_wire(caller: Caller) -> None:
    caller.sandbox.fail_next(1, disconnect="reset", at="before_body")
    host, port = caller.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()


async def test_an_answer_can_be_cut_short(caller: Caller) -> None:
    caller.sandbox.fail_next(1, disconnect="cut_short")
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
        await caller.send()
    assert len(caller.sandbox.events) == 1


async def test_many_requests_at_once_use_up_exactly_the_count(caller: Caller) -> None:
    caller.sandbox.configure(latency=(0.0, 0.01))
    caller.sandbox.fail_next(7, status=503)
    answers = await asyncio.gather(*(caller.send() for _ in range(50)))
    seen = sorted(answer.status_code for answer in answers)
    assert seen == [200] * 43 + [503] * 7
    assert len(caller.sandbox.events) == 43


async def test_latency_can_be_fixed_or_drawn_from_a_range() -> None:
    async with calling(SandboxConfig(latency=0.1, seed=1)) as caller:
        began = time.monotonic()
        await caller.send()
        assert time.monotonic() - began >= 0.1


async def test_a_stopping_server_does_not_wait_for_late_answers() -> None:
    began = time.monotonic()
    async with calling() as caller:
        caller.sandbox.fail_next(1, delay=600)
        waiting = asyncio.create_task(caller.send())

        async def arrived() -> object:
            return caller.sandbox.requests

        await eventually(arrived)
    with pytest.raises(httpx.HTTPError):
        await waiting
    assert time.monotonic() - began < 10


async def test_a_token_request_can_fail_too(caller: Caller) -> None:
    caller.sandbox.fail_next(1, status=500, on="oauth")
    assert (await caller.send()).status_code == 200
    assert (await caller.send(path="/v1/oauth/token")).status_code == 500


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"count": 0, "status": 500}, "count: use 1 or more, or null"),
        ({"status": 99}, "status: use 200 to 599"),
        ({"delay": -1}, "delay: use 0 or more seconds"),
        ({"status": 500, "disconnect": "reset"}, "use one of: status"),
        ({"body": {}, "malformed": "text_200"}, "use one of: status"),
        ({"body": {}, "text": ""}, "body, text: use one of them"),
        (
            {"disconnect": "reset", "at": "before_body", "event": "e"},
            "event, source_id: they are in the body",
        ),
        (
            {"status": 500, "on": "oauth", "event": "e"},
            "only requests to an event route",
        ),
        ({"delay": 1, "at": "before_record"}, "the fault is after_record"),
        ({"status": 200, "at": "before_body"}, "the fault is after_record"),
        ({"disconnect": "cut_short", "at": "before_record"}, "comes after_record"),
        ({"headers": {"a b": "c"}}, "headers: 'a b' cannot be sent"),
        ({"headers": {"a": "b\r\nc: d"}}, "headers: 'a' cannot be sent"),
        ({"headers": {"Content-Length": "1"}}, "headers: Content-Length is the"),
        ({"statuss": 500}, "statuss"),
        ({"malformed": "xml"}, "malformed"),
    ],
)
def test_a_wrong_fault_is_refused_with_its_cure(
    fault: dict[str, object], named: str
) -> None:
    with pytest.raises(msgspec.ValidationError, match=re.escape(named)):
        msgspec.convert(fault, Fault)
