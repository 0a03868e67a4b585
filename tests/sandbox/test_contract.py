"""The published contract of Voucherify's custom events, one case for each promise.

Sources: Voucherify OpenAPI "Track Custom Event", guides "Authentication", "Limits"
and "Errors", documentation page "Security".
"""

import random
from dataclasses import dataclass, field

import pytest

from relay.sandbox import Property
from tests.sandbox.support import CLIENT, EVENT, SERVER, Caller, json_of

pytestmark = pytest.mark.anyio

PUBLISHED_EXAMPLE = {
    "event": "user_subscribed",
    "customer": {"source_id": "source_customer_event"},
    "referral": {"code": "46jL0kYI", "referrer_id": "cust_Vzck5i8U3OhcEUFY6MKhN9Rv"},
    "metadata": {"login": "bob", "pricing_plan": "PP1", "volume_number": 4},
}
LOYALTY_EXAMPLE = {
    "event": "cart_abandoned",
    "customer": {"source_id": "s1"},
    "loyalty": {"code": "6CB4KDAu"},
    "metadata": {
        "date": "2022-12-01",
        "flag": True,
        "text": "Cart abandoned event",
        "date_time": "2022-12-01T09:24:33.061Z",
        "number": 1,
    },
}
# Only what a correct relay would never send has to be expected by a test.
BAD_BODY = ("invalid_body",)


def with_(**changes: object) -> dict[str, object]:
    return EVENT | changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    body: object = field(default_factory=lambda: dict(EVENT))
    status: int = 200
    details: str | None = None
    expected: tuple[str, ...] = ()
    headers: dict[str, str | None] = field(default_factory=dict)


def refused(body: object, details: str, *also: str) -> Case:
    return Case(body=body, status=400, details=details, expected=(*BAD_BODY, *also))


CASES = {
    "01-published-referral-example": Case(body=PUBLISHED_EXAMPLE),
    "02-published-loyalty-example": Case(body=LOYALTY_EXAMPLE),
    "03-unknown-customer": Case(body=with_(customer={"source_id": "new-1"})),
    "04-no-event": refused(
        {"customer": {"source_id": "a"}},
        "Payload should have required property 'event'",
    ),
    "05-no-customer": refused(
        {"event": "e"}, "Payload should have required property 'customer'"
    ),
    "06-empty-event": refused(
        with_(event=""), "Property .event should NOT be shorter than 1 characters"
    ),
    "07-event-of-300": Case(body=with_(event="x" * 300)),
    "07-event-of-300-two-bytes-each": Case(body=with_(event="é" * 300)),
    "07-event-of-300-code-points": Case(body=with_(event="😀" * 300)),
    "08-event-of-301": refused(
        with_(event="x" * 301),
        "Property .event should NOT be longer than 300 characters",
    ),
    "09-referral-without-code": refused(
        with_(referral={"referrer_id": "cust_1"}),
        "Property .referral should have required property 'code'",
    ),
    "10-loyalty-without-code": refused(
        with_(loyalty={}), "Property .loyalty should have required property 'code'"
    ),
    "11-customer-a-string": refused(
        with_(customer="bob"), "Property .customer should be object"
    ),
    "12-event-a-number": refused(with_(event=7), "Property .event should be string"),
    "13-source-id-a-number": refused(
        with_(customer={"source_id": 42}),
        "Property .customer.source_id should be string",
    ),
    "14-metadata-a-list": refused(
        with_(metadata=[1]), "Property .metadata should be object"
    ),
    "15-id-of-nobody": Case(
        body=with_(customer={"id": "registered_10055"}),
        status=404,
        details="Cannot find customer with id registered_10055",
    ),
    "16-id-beats-source-id": Case(
        body=with_(customer={"id": "cust_A", "source_id": "b"})
    ),
    "17-empty-customer": Case(body=with_(customer={}), expected=("customer_missing",)),
    "18-null-address": Case(body=with_(customer={"source_id": "a", "address": None})),
    "19-null-optionals": refused(
        with_(referral=None, loyalty=None),
        "Property .referral should be object",
        "null_field",
    ),
    "20-birthdate-in-another-form": refused(
        with_(customer={"source_id": "a", "birthdate": "31/12/1990"}),
        'Property .customer.birthdate should match format "date"',
    ),
    "21-unknown-top-level-key": Case(
        body=with_(created_at="2020-01-01T00:00:00Z"), expected=("unknown_field",)
    ),
    "22-metadata-of-another-type": Case(
        body={
            "event": "defined",
            "customer": {"source_id": "a"},
            "metadata": {"flag": 1},
        },
        status=400,
        details="flag: must be a boolean, property is required (actual value is 1)",
    ),
    "22-metadata-missing": Case(
        body={"event": "defined", "customer": {"source_id": "a"}},
        status=400,
        details=(
            "flag: must be a boolean, property is required (actual value is undefined)"
        ),
    ),
    "23-not-json": Case(
        body=b'{"event":"e",',
        status=400,
        details="Invalid request payload JSON format",
        expected=BAD_BODY,
    ),
    "24-one-byte-over": Case(
        body=b'"' + b"x" * 10_485_759 + b'"',
        status=413,
        details="Payload content length greater than maximum allowed: 10485760",
        expected=("too_large",),
    ),
    "24-exactly-the-maximum": refused(
        b'"' + b"x" * 10_485_758 + b'"', "Payload should be object"
    ),
    "25-text-plain": Case(
        headers={"content-type": "text/plain"}, status=415, expected=("content_type",)
    ),
    "26-wrong-token": Case(
        headers={"x-client-token": "nope"}, status=401, expected=("keys",)
    ),
    "26-no-keys": Case(
        headers={"x-client-application-id": None, "x-client-token": None},
        status=401,
        expected=("keys",),
    ),
    "27-origin-elsewhere": Case(
        headers={"origin": "https://evil.example"}, status=401, expected=("origin",)
    ),
    "27-origin-absent": Case(
        headers={"origin": None}, status=401, expected=("origin",)
    ),
    "28-unknown-bearer": Case(
        headers={
            "authorization": "Bearer expired",
            "x-client-application-id": None,
            "x-client-token": None,
        },
        status=401,
        expected=("token",),
    ),
    "31-sdk-2-track": Case(
        body={"event": "evt", "metadata": {}, "customer": {"source_id": "abc"}}
    ),
    "32-voucherify-js-without-identity": Case(
        body={"event": "evt", "metadata": {"a": 1}, "customer": {}},
        expected=("customer_missing",),
    ),
    "accept-html": Case(
        headers={"accept": "text/html"}, status=406, expected=("accept",)
    ),
    "accept-as-axios": Case(headers={"accept": "application/json, text/plain, */*"}),
    "content-type-with-charset": Case(
        headers={"content-type": "application/json; charset=utf-8"}
    ),
    "list": refused([EVENT], "Payload should be object"),
    "no-body": refused(b"", "Payload should be object"),
    "not-utf-8": Case(
        body=b'{"event":"\xff"}',
        status=400,
        details="Invalid request payload JSON format",
        expected=BAD_BODY,
    ),
    "too-deep": Case(
        body=b"[" * 100_000,
        status=400,
        details="Invalid request payload JSON format",
        expected=BAD_BODY,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_voucherify_answers_as_documented(caller: Caller, case: Case) -> None:
    caller.sandbox.configure(events={"defined": {"flag": Property(type="boolean")}})
    caller.sandbox.add_customer(id="cust_A")
    answer = await caller.send(case.body, headers=case.headers)
    [record] = caller.sandbox.requests
    assert (answer.status_code, record.details) == (case.status, case.details)
    assert record.recorded == (case.status == 200)
    assert {found.kind for found in caller.sandbox.unexpected()} == {*case.expected}
    caller.sandbox.expect(*case.expected)
    caller.sandbox.assert_clean()


async def test_29_the_sixth_call_within_five_seconds_is_refused(caller: Caller) -> None:
    statuses = [(await caller.send()).status_code for _ in range(5)]
    sixth = await caller.send()
    assert statuses == [200] * 5
    assert sixth.status_code == 429
    assert sixth.content == (
        b'{"code":429,"message":"Too many requests hit the API too quickly."}'
    )
    assert 1 <= int(sixth.headers["retry-after"]) <= 5
    assert [found.kind for found in caller.sandbox.unexpected()] == ["429"]


async def test_30_the_same_body_twice_is_two_events(caller: Caller) -> None:
    first, second = await caller.send(), await caller.send()
    assert first.content == second.content
    assert len(caller.sandbox.events) == 2


async def test_the_server_api_has_no_origin_and_no_limit_per_address(
    caller: Caller,
) -> None:
    answers = [await caller.send(path=SERVER) for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    assert "x-rate-limit-limit" not in answers[0].headers
    caller.sandbox.assert_clean()


async def test_the_server_api_does_not_open_with_client_keys(caller: Caller) -> None:
    client_keys: dict[str, str | None] = {
        "x-app-id": "sandbox-application",
        "x-app-token": "sandbox-token",
    }
    answer = await caller.send(path=SERVER, headers=client_keys)
    assert answer.status_code == 401


async def test_the_answer_has_the_documented_shape(caller: Caller) -> None:
    profile = {"source_id": "s", "name": "John", "email": "john@shop.example"}
    body = {"event": "e", "customer": profile, "metadata": {"n": 1}}
    answer = json_of(await caller.send(body))
    [customer] = caller.sandbox.customers
    assert customer.id.startswith("cust_")
    assert list(answer.items()) == [
        ("object", "event"),
        ("type", "e"),
        (
            "customer",
            {
                "id": customer.id,
                "source_id": "s",
                "name": "John",
                "email": "john@shop.example",
                "metadata": {},
                "object": "customer",
            },
        ),
        ("referral", None),
        ("loyalty", None),
        ("metadata", {"n": 1}),
    ]


async def test_an_error_has_the_documented_shape(caller: Caller) -> None:
    unknown = {"event": "e", "customer": {"id": "registered_10055"}}
    not_found = json_of(await caller.send(unknown))
    request_id = not_found.pop("request_id")
    assert isinstance(request_id, str)
    assert request_id.startswith("v-")
    assert len(request_id) == len("v-0c15694e0e022146dd")
    assert not_found == {
        "code": 404,
        "key": "not_found",
        "message": "Resource not found",
        "details": "Cannot find customer with id registered_10055",
        "resource_id": "registered_10055",
        "resource_type": "customer",
    }
    invalid = json_of(await caller.send({"event": "e"}))
    assert (invalid["code"], invalid["key"]) == (400, "invalid_payload")
    assert invalid["message"] == "Invalid payload"
    wrong = json_of(await caller.send(headers={"x-client-token": "nope"}))
    assert wrong.pop("request_id")
    assert wrong == {"code": 401, "key": "unauthorized", "message": "Unauthorized"}


async def test_errors_before_the_api_have_the_frameworks_shape(caller: Caller) -> None:
    assert json_of(await caller.send(b"{")) == {
        "statusCode": 400,
        "error": "Bad Request",
        "message": "Invalid request payload JSON format",
    }
    assert json_of(await caller.send(b"x" * 10_485_761)) == {
        "statusCode": 413,
        "error": "Request Entity Too Large",
        "message": "Payload content length greater than maximum allowed: 10485760",
    }


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
async def test_only_post_is_taken(caller: Caller, method: str) -> None:
    answer = await caller.send(method=method)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


async def test_a_preflight_makes_nothing_and_is_expected(caller: Caller) -> None:
    answer = await caller.send(method="OPTIONS")
    assert (answer.status_code, answer.content) == (204, b"")
    assert caller.sandbox.events == []
    assert caller.sandbox.unexpected() == []


@pytest.mark.parametrize(
    "path",
    ["/track", "/client/v1/events/", "//client/v1/events", "/client/v1/redemptions"],
)
async def test_other_paths_do_not_exist(caller: Caller, path: str) -> None:
    answer = await caller.send(path=path)
    assert answer.status_code == 404
    assert [found.kind for found in caller.sandbox.unexpected()] == ["unknown_path"]


async def test_customers_are_created_once_and_updated_by_the_last_write(
    caller: Caller,
) -> None:
    one = {"source_id": "s", "name": "Ann", "metadata": {"a": 1, "b": 1}}
    two = {"source_id": "s", "phone": "1", "name": "Bea", "metadata": {"b": 2}}
    for customer in (one, two):
        await caller.send({"event": "e", "customer": customer})
    [stored] = caller.sandbox.customers
    assert stored.fields == {"name": "Bea", "phone": "1"}
    assert stored.metadata == {"a": 1, "b": 2}
    assert {record.customer_id for record in caller.sandbox.events} == {stored.id}


async def test_a_known_id_is_used_and_its_source_id_never_changes(
    caller: Caller,
) -> None:
    known = caller.sandbox.add_customer(id="cust_A", source_id="a")
    await caller.send({"event": "e", "customer": {"id": "cust_A", "source_id": "b"}})
    assert caller.sandbox.customers == [known]
    assert (known.source_id, known.events) == ("a", 1)


@pytest.mark.parametrize(
    ("origin", "domains", "taken"),
    [
        pytest.param("https://shop.example", ["shop.example"], True, id="https"),
        pytest.param("http://shop.example:8080", ["shop.example"], True, id="port"),
        pytest.param("shop.example", ["shop.example"], True, id="bare"),
        pytest.param("localhost:5000", ["localhost"], True, id="bare-with-port"),
        pytest.param("localhost:5000", ["localhost:5000"], True, id="same-port"),
        pytest.param("localhost:5001", ["localhost:5000"], False, id="other-port"),
        pytest.param("http://[::1]:8000", ["[::1]"], True, id="ipv6"),
        pytest.param("https://SHOP.example", ["Shop.Example"], True, id="case"),
        pytest.param("https://www.shop.example", ["shop.example"], False, id="apex"),
        pytest.param("https://www.shop.example", [".shop.example"], True, id="sub"),
        pytest.param("https://a.b.shop.example", [".shop.example"], True, id="deep"),
        pytest.param("https://shop.example", [".shop.example"], False, id="not-apex"),
        pytest.param("https://evilshop.example", [".shop.example"], False, id="suffix"),
        pytest.param("https://anything.example", ["*"], True, id="any"),
        pytest.param("", ["*"], False, id="empty"),
        pytest.param("https://shop.example/", ["shop.example"], False, id="path"),
        pytest.param("https://a@shop.example", ["shop.example"], False, id="user"),
        pytest.param("https://shop.example", [], False, id="no-domains"),
    ],
)
async def test_trusted_domains(
    caller: Caller, origin: str, domains: list[str], taken: bool
) -> None:
    caller.sandbox.configure(trusted_domains=domains)
    answer = await caller.send(headers={"origin": origin})
    assert answer.status_code == (200 if taken else 401)


async def test_an_event_name_may_come_in_any_order_of_keys(caller: Caller) -> None:
    keys = list(PUBLISHED_EXAMPLE.items())
    random.Random(7).shuffle(keys)
    assert (await caller.send(dict(keys), path=CLIENT)).status_code == 200
