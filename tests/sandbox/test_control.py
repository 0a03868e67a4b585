"""The control routes and the page: for the owner, never counted as traffic."""

import re

import httpx
import pytest

from relay.sandbox import Sandbox, SandboxConfig
from tests.sandbox.support import CLIENT_HEADERS, Caller, calling, json_of

pytestmark = pytest.mark.anyio


async def get(caller: Caller, path: str, name: str) -> list[dict[str, object]]:
    answer = await caller.http.get(f"{caller.url}/_sandbox/{path}")
    assert answer.status_code == 200
    listed = json_of(answer)[name]
    assert isinstance(listed, list)
    return listed


async def test_events_are_listed_with_all_that_matters(caller: Caller) -> None:
    await caller.send({"event": "a", "customer": {"source_id": "s"}})
    await caller.send({"event": "b"})
    [event] = await get(caller, "events", "events")
    assert (event["event"], event["source_id"], event["status"]) == ("a", "s", 200)
    assert event["body"] == {"event": "a", "customer": {"source_id": "s"}}
    assert event["verdict"] == "recorded"
    assert event["customer_id"] == caller.sandbox.customers[0].id
    assert isinstance(event["received_at"], float)
    headers = event["headers"]
    assert isinstance(headers, dict)
    assert headers["x-client-token"] == "***"
    assert headers["origin"] == CLIENT_HEADERS["origin"]

    both = await get(caller, "requests", "requests")
    assert [row["verdict"] for row in both] == ["recorded", "invalid_payload"]
    assert [row["seq"] for row in both] == [1, 2]
    [customer] = await get(caller, "customers", "customers")
    assert (customer["source_id"], customer["events"]) == ("s", 1)


async def test_lists_can_be_narrowed(caller: Caller) -> None:
    for name in ("a", "b", "a", "c"):
        await caller.send({"event": name, "customer": {"source_id": name}})

    async def seqs(query: str) -> list[object]:
        return [row["seq"] for row in await get(caller, f"events?{query}", "events")]

    assert await seqs("event=a") == [1, 3]
    assert await seqs("source_id=c") == [4]
    assert await seqs("after=2") == [3, 4]
    assert await seqs("limit=1") == [4]
    assert await seqs("verdict=invalid_payload") == []
    for wrong in ("limit=0", "limit=x", "after=-1", "limit=" + "9" * 20):
        answer = await caller.http.get(f"{caller.url}/_sandbox/events?{wrong}")
        assert (answer.status_code, "whole number" in answer.text) == (400, True)


async def test_control_is_never_traffic(caller: Caller) -> None:
    for path in ("", "counts", "events", "requests", "customers", "faults", "config"):
        await caller.http.get(f"{caller.url}/_sandbox/{path}".rstrip("/"))
    await caller.http.get(f"{caller.url}/")
    await caller.http.get(f"{caller.url}/_sandbox/unknown")
    counts = json_of(await caller.http.get(f"{caller.url}/_sandbox/counts"))
    assert counts["requests"] == 0
    assert caller.sandbox.requests == []
    caller.sandbox.assert_clean()


async def test_faults_by_control(caller: Caller) -> None:
    url = f"{caller.url}/_sandbox/faults"
    made = await caller.http.post(url, json={"count": 2, "status": 503})
    assert made.status_code == 201
    assert (await caller.send()).status_code == 503
    [waiting] = await get(caller, "faults", "faults")
    assert (waiting["count"], waiting["status"]) == (1, 503)
    assert (await caller.http.delete(url)).status_code == 204
    assert (await caller.send()).status_code == 200


async def test_settings_by_control_show_no_secret(caller: Caller) -> None:
    url = f"{caller.url}/_sandbox/config"
    changes = {"per_minute": 1, "client_token": "another-s3cret"}
    changed = await caller.http.patch(url, json=changes)
    assert (changed.status_code, json_of(changed)["per_minute"]) == (200, 1)
    assert "s3cret" not in changed.text
    assert (await caller.send()).status_code == 401
    token: dict[str, str | None] = {"x-client-token": "another-s3cret"}
    assert (await caller.send(headers=token)).status_code == 200
    assert (await caller.send(headers=token)).status_code == 429


@pytest.mark.parametrize(
    ("method", "path", "body", "named"),
    [
        ("PATCH", "config", b'{"per_minutee":1}', "per_minutee: no such setting"),
        ("PATCH", "config", b'{"per_minute":"1"}', "per_minute"),
        ("PATCH", "config", b"[]", "object"),
        ("POST", "faults", b"{", "not JSON"),
        ("PATCH", "config", b'{"x":' + b"[" * 100_000, "not JSON"),
        ("POST", "faults", b'{"status":1}', "status: use 200 to 599"),
        ("POST", "customers", b'{"name":"x"}', "name"),
    ],
)
async def test_a_wrong_control_request_says_what_is_wrong(
    caller: Caller, method: str, path: str, body: bytes, named: str
) -> None:
    answer = await caller.http.request(
        method,
        f"{caller.url}/_sandbox/{path}",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert named in str(json_of(answer)["error"])


async def test_a_page_elsewhere_cannot_change_anything(caller: Caller) -> None:
    # What a form or a script of another site can send without being asked.
    for path in ("faults", "customers"):
        answer = await caller.http.post(
            f"{caller.url}/_sandbox/{path}",
            content=b"{}",
            headers={"content-type": "text/plain"},
        )
        assert answer.status_code == 415
    for path in ("events", "faults", "config"):
        answer = await caller.http.options(f"{caller.url}/_sandbox/{path}")
        assert answer.status_code == 405
        assert "access-control-allow-origin" not in answer.headers


async def test_customers_and_tokens_by_control(caller: Caller) -> None:
    url = f"{caller.url}/_sandbox"
    made = await caller.http.post(f"{url}/customers", json={"id": "cust_A"})
    assert (made.status_code, json_of(made)["id"]) == (201, "cust_A")
    known = await caller.send({"event": "e", "customer": {"id": "cust_A"}})
    assert known.status_code == 200
    assert (await caller.http.delete(f"{url}/tokens")).status_code == 204


async def test_forgetting_keeps_customers_and_a_reset_keeps_nothing(
    caller: Caller,
) -> None:
    caller.sandbox.configure(per_minute=100)
    await caller.send()
    caller.sandbox.fail_next(None, status=500)
    url = f"{caller.url}/_sandbox"
    assert (await caller.http.delete(f"{url}/events")).status_code == 204
    assert (caller.sandbox.events, len(caller.sandbox.customers)) == ([], 1)
    assert len(caller.sandbox.faults()) == 1
    assert (await caller.http.delete(url)).status_code == 204
    assert (caller.sandbox.faults(), caller.sandbox.customers) == ([], [])
    assert caller.sandbox.config == SandboxConfig()
    assert caller.sandbox.counts()["requests"] == 0


async def test_unexpected_traffic_is_listed(caller: Caller) -> None:
    await caller.send(headers={"cookie": "session=1"})
    [found] = await get(caller, "unexpected", "unexpected")
    assert found == {"kind": "forbidden_header", "seq": 1, "detail": "header cookie"}


async def test_records_are_bounded_and_counts_are_not() -> None:
    config = SandboxConfig(keep_requests=3, keep_customers=2, client_limit=None)
    async with calling(config) as caller:
        for n in range(5):
            await caller.send({"event": f"e{n}", "customer": {"source_id": f"{n}"}})
        assert caller.sandbox.event_names() == ["e2", "e3", "e4"]
        assert len(caller.sandbox.requests) == 3
        assert [c.source_id for c in caller.sandbox.customers] == ["3", "4"]
        counts = caller.sandbox.counts()
        assert (counts["events"], counts["customers_created"]) == (5, 5)
        assert counts["by_status"] == {"200": 5}


async def test_records_are_bounded_by_size_too() -> None:
    async with calling(SandboxConfig(keep_bytes=100_000)) as caller:
        for n in range(4):
            body = {
                "event": f"e{n}",
                "customer": {"source_id": "a", "name": "x" * 40_000},
            }
            await caller.send(body)
        assert caller.sandbox.event_names() == ["e2", "e3"]


async def test_a_body_too_large_to_keep_is_still_judged(caller: Caller) -> None:
    body = {"event": "e", "customer": {"source_id": "a", "name": "x" * 70_000}}
    assert (await caller.send(body)).status_code == 200
    [record] = caller.sandbox.events
    assert (record.event, record.body) == ("e", None)
    assert record.size > 70_000


async def test_a_refused_body_that_is_no_json_is_shown_as_text(caller: Caller) -> None:
    await caller.send(b"<script>alert(1)</script>")
    [record] = caller.sandbox.requests
    assert (record.body, record.text) == (None, "<script>alert(1)</script>")


async def test_the_page_allows_its_own_script_and_nothing_else(caller: Caller) -> None:
    page = await caller.http.get(f"{caller.url}/")
    policy = page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    # No attribute that the policy would block, no markup made from strings.
    assert not re.search(r"\son\w+=|style=|innerHTML|outerHTML|insertAdj", page.text)
    assert not re.search(r"https?://|src=|@import|url\(", page.text)


async def test_a_sandbox_can_stand_under_another_server_without_resets() -> None:
    sandbox = Sandbox()
    transport = httpx.ASGITransport(app=sandbox.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://s") as http:
        answer = await http.post(
            "/client/v1/events",
            json={"event": "e", "customer": {"source_id": "a"}},
            headers=CLIENT_HEADERS,
        )
        assert answer.status_code == 200
        sandbox.fail_next(1, disconnect="reset")
        with pytest.raises(RuntimeError, match=r"http=relay\.sandbox\.PROTOCOL"):
            await http.post(
                "/client/v1/events",
                json={"event": "e", "customer": {"source_id": "a"}},
                headers=CLIENT_HEADERS,
            )
