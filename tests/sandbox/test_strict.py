"""What a correct relay would never send is found at the end of a test."""

import httpx
import pytest

from relay.sandbox import UnexpectedTraffic
from tests.sandbox.support import CLIENT, SERVER, Caller

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", [CLIENT, SERVER])
async def test_a_correct_relay_is_clean(caller: Caller, path: str) -> None:
    body = {
        "event": "e",
        "customer": {"source_id": "a", "address": None},
        "loyalty": {"code": "L"},
        "metadata": {"anything": [None, {"deep": True}]},
    }
    assert (await caller.send(body, path=path)).status_code == 200
    caller.sandbox.assert_clean()


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("cookie", "session=1", "forbidden_header"),
        ("referer", "https://shop.example/cart", "forbidden_header"),
        ("x-forwarded-for", "203.0.113.1", "forbidden_header"),
        ("x-forwarded-proto", "https", "forbidden_header"),
        ("forwarded", "for=203.0.113.1", "forbidden_header"),
        ("x-real-ip", "203.0.113.1", "forbidden_header"),
        ("accept-language", "pl", "forbidden_header"),
        ("x-app-token", "secret", "forbidden_header"),
        ("authorization", "Basic abc", "keys_and_bearer"),
        ("user-agent", "Mozilla/5.0", "user_agent"),
        ("user-agent", "", "user_agent"),
        ("x-voucherify-channel", "Browser-ClientSide-SDK-v2.9.4", "channel"),
        ("x-voucherify-channel", None, "channel"),
    ],
)
async def test_headers_of_the_shopper_are_found(
    caller: Caller, name: str, value: str | None, kind: str
) -> None:
    await caller.send(headers={name: value})
    assert kind in [found.kind for found in caller.sandbox.unexpected()]


async def test_a_repeated_header_is_found(caller: Caller) -> None:
    await caller.http.post(
        caller.url + SERVER,
        content=b"{}",
        headers=httpx.Headers([("accept", "*/*"), ("accept", "application/json")]),
    )
    details = [found.detail for found in caller.sandbox.unexpected()]
    assert "header accept more than once" in details


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"event": "e"}, "invalid_body"),
        (b"{", "invalid_body"),
        ({"event": "e", "customer": {"source_id": "a"}, "id": "ev_1"}, "unknown_field"),
        ({"event": "e", "customer": {"source_id": "a", "x": 1}}, "unknown_field"),
        (
            {
                "event": "e",
                "customer": {"source_id": "a"},
                "loyalty": {"code": "", "x": 1},
            },
            "unknown_field",
        ),
        ({"event": "e", "customer": {"source_id": "a", "name": None}}, "null_field"),
        ({"event": "e", "customer": {"email": "a@b.example"}}, "customer_missing"),
        ({"event": "e", "customer": {"source_id": ""}}, "customer_missing"),
    ],
)
async def test_bodies_that_a_relay_must_stop_are_found(
    caller: Caller, body: object, kind: str
) -> None:
    await caller.send(body)
    assert kind in [found.kind for found in caller.sandbox.unexpected()]


async def test_the_check_names_each_request_and_the_way_out(caller: Caller) -> None:
    await caller.send(headers={"cookie": "session=s3cret"})
    with pytest.raises(UnexpectedTraffic) as caught:
        caller.sandbox.assert_clean()
    message = str(caught.value)
    assert "request 1: forbidden_header: header cookie" in message
    assert "sandbox.expect(KIND)" in message
    assert "s3cret" not in message


async def test_what_is_expected_is_let_through(caller: Caller) -> None:
    caller.sandbox.expect("429")
    for _ in range(6):
        await caller.send()
    caller.sandbox.assert_clean()
    await caller.send(path="/track")
    with pytest.raises(UnexpectedTraffic, match="unknown_path"):
        caller.sandbox.assert_clean()
    caller.sandbox.forget()
    caller.sandbox.assert_clean()


async def test_a_fault_is_not_the_relays_doing(caller: Caller) -> None:
    for status in (400, 401, 429, 503):
        caller.sandbox.fail_next(1, status=status)
        assert (await caller.send()).status_code == status
    caller.sandbox.assert_clean()


async def test_an_unknown_kind_is_refused_with_the_known_ones(caller: Caller) -> None:
    with pytest.raises(ValueError, match="'rate' is no kind; use one of 429, accept"):
        caller.sandbox.expect("rate")
