"""An answer of Voucherify, judged: by its status first, and whatever its body is."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.outcomes import Hold
from relay.retry import HOUR_MS, MONTH_MS
from relay.verdicts import MIN_SECRET, Answer, Verdict, read_answer

TABLE: dict[int, tuple[Verdict, Hold | None]] = {
    **dict.fromkeys(range(200, 300), (Verdict.DELIVERED, None)),
    **dict.fromkeys(range(300, 400), (Verdict.HOLD, Hold.CONFIG)),
    **dict.fromkeys(range(400, 500), (Verdict.REJECTED, None)),
    **dict.fromkeys(range(500, 600), (Verdict.UNKNOWN, None)),
    **dict.fromkeys((401, 403), (Verdict.HOLD, Hold.AUTH)),
    402: (Verdict.HOLD, Hold.PLAN),
    **dict.fromkeys((405, 406, 415), (Verdict.HOLD, Hold.CONFIG)),
    **dict.fromkeys((408, 502, 503), (Verdict.RETRY, None)),
    429: (Verdict.WAIT, None),
}


@pytest.mark.parametrize("status", range(200, 600))
def test_the_delivery_table(status: int) -> None:
    # The body's own code is no truth: a documented 400 says 404 in its body.
    answer = read_answer(status, {}, b'{"code": 200, "message": "m"}', now=0)
    assert (answer.verdict, answer.hold) == TABLE[status]
    named = {Verdict.DELIVERED: "delivered", Verdict.WAIT: "rate_limited"}
    assert answer.reason == named.get(answer.verdict, f"upstream_{status}")
    assert answer.status == status


@pytest.mark.parametrize(
    ("status", "limit_type", "hold", "reason", "told"),
    [
        (429, "api_calls_cycle", Hold.PLAN, "upstream_429", 20 * 86_400_000),
        (429, "API_Calls_Cycle ", Hold.PLAN, "upstream_429", 20 * 86_400_000),
        (402, "api_calls", Hold.PLAN, "upstream_402", 20 * 86_400_000),
        (429, "api_calls", None, "rate_limited", HOUR_MS),
        (429, "", None, "rate_limited", HOUR_MS),
        (403, "api_calls_cycle", Hold.AUTH, "upstream_403", HOUR_MS),
        (200, "api_calls_cycle", None, "delivered", HOUR_MS),
    ],
)
def test_a_spent_plan_holds_for_as_long_as_its_cycle(
    status: int, limit_type: str, hold: Hold | None, reason: str, told: int
) -> None:
    headers = {"retry-after": str(20 * 86_400), "x-rate-limit-type": limit_type}
    answer = read_answer(status, headers, b"", now=0)
    assert (answer.hold, answer.reason, answer.retry_after_ms) == (hold, reason, told)


def test_limits_are_read_from_a_delivery_too() -> None:
    now = 1_790_000_000.5
    headers = {
        "x-rate-limit-limit": "2000",
        "x-rate-limit-remaining": "1",
        "x-rate-limit-retry": "1790000013",
    }
    answer = read_answer(200, headers, b"{}", now=now)
    assert (answer.limit, answer.remaining) == (2000, 1)
    assert answer.retry_after_ms == 12_500


@pytest.mark.parametrize("value", ["", "-1", "many", "0x10", "1e9", "²", "9" * 99])
def test_a_senseless_count_is_no_count(value: str) -> None:
    headers = {"x-rate-limit-limit": value, "x-rate-limit-remaining": value}
    answer = read_answer(200, headers, b"", now=0)
    assert (answer.limit, answer.remaining) == (None, None)


# What it says: bodies


def told(status: int, body: bytes) -> tuple[str, str | None, str | None, str | None]:
    answer = read_answer(status, {}, body, now=0)
    return (
        answer.reason,
        answer.error_key,
        answer.error_message,
        answer.error_details,
    )


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        pytest.param(
            400,
            b'{"code":400,"key":"invalid_payload","message":"Invalid payload",'
            b'"details":"Property .referral should have required property \'code\'"}',
            (
                "invalid_payload",
                "invalid_payload",
                "Invalid payload",
                "Property .referral should have required property 'code'",
            ),
            id="voucherify",
        ),
        pytest.param(
            400,
            b'{"statusCode":400,"error":"Bad Request","message":"Invalid JSON format"}',
            ("upstream_400", None, "Invalid JSON format", None),
            id="framework",
        ),
        pytest.param(
            413,
            b'{"statusCode":413,"error":"Request Entity Too Large"}',
            ("upstream_413", None, "Request Entity Too Large", None),
            id="framework-without-message",
        ),
        pytest.param(
            401,
            b'{"code":401,"key":"unauthorized","error":{"message":"Unauthorized"}}',
            ("unauthorized", "unauthorized", "Unauthorized", None),
            id="nested-message",
        ),
        pytest.param(
            502,
            b"<html><head><title>502 Bad Gateway</title></head>\r\n<body/></html>",
            ("upstream_502", None, "502 Bad Gateway", None),
            id="html",
        ),
        pytest.param(
            500,
            b'{"key":"internal_error","message":"m"}',
            ("upstream_500", "internal_error", "m", None),
            id="a-key-names-only-refusals",
        ),
        pytest.param(404, b"", ("upstream_404", None, None, None), id="empty"),
        pytest.param(404, b"[1,2]", ("upstream_404", None, None, None), id="array"),
        pytest.param(404, b"null", ("upstream_404", None, None, None), id="null"),
        pytest.param(404, b"7", ("upstream_404", None, None, None), id="number"),
        pytest.param(404, b'"no"', ("upstream_404", None, "no", None), id="string"),
        pytest.param(
            404,
            b'{"key":7,"message":["x"],"details":{"a":1},"request_id":null}',
            ("upstream_404", None, None, None),
            id="wrong-types",
        ),
        pytest.param(
            404,
            b'{"key":"not_fou',
            ("upstream_404", None, '{"key":"not_fou', None),
            id="truncated",
        ),
        pytest.param(
            404, b"\xff\xfe\x00", ("upstream_404", None, "��", None), id="no-text"
        ),
        pytest.param(
            404,
            b'{"key":"Not Found!\\n","message":"a\\u0000b\\n\\u001b[31mc\\u202e"}',
            ("not_found", "Not Found!", "a b [31mc", None),
            id="control-characters",
        ),
        pytest.param(
            404, b"[" * 60_000, ("upstream_404", None, "[" * 500, None), id="deep"
        ),
        pytest.param(
            404, b"<" * 65_536, ("upstream_404", None, "<" * 500, None), id="brackets"
        ),
        pytest.param(
            422,
            b'{"key":"' + b"k" * 999 + b'","message":"' + b"m" * 9_999 + b'"}',
            ("k" * 64, "k" * 64, "m" * 500, None),
            id="long",
        ),
        pytest.param(
            200,
            b'{"key":"k","message":"m","customer":{"email":"a@b.example"}}',
            ("delivered", None, None, None),
            id="a-delivery-is-not-read",
        ),
    ],
)
def test_errors_are_found_in_any_body(
    status: int, body: bytes, expected: tuple[str, str | None, str | None, str | None]
) -> None:
    started = time.monotonic()
    assert told(status, body) == expected
    assert time.monotonic() - started < 1


def test_the_request_id_is_kept_for_support() -> None:
    body = b'{"code":400,"request_id":"v-0c15694e0e022146dd"}'
    assert read_answer(400, {}, body, now=0).request_id == "v-0c15694e0e022146dd"


HEADERS = (
    "date",
    "retry-after",
    "x-rate-limit-limit",
    "x-rate-limit-remaining",
    "x-rate-limit-retry",
    "x-rate-limit-type",
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
errors = st.dictionaries(
    st.sampled_from(["code", "key", "message", "details", "request_id", "error"]),
    json_values,
)


@given(
    st.integers(min_value=100, max_value=999),
    st.dictionaries(
        st.sampled_from(HEADERS), st.binary().map(lambda b: b.decode("latin-1"))
    ),
    st.binary() | st.text().map(str.encode) | errors.map(repr).map(str.encode),
)
def test_any_answer_is_judged(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    check_bounds(read_answer(status, headers, body, now=1_790_000_000.0))


@given(st.integers(min_value=400, max_value=599), errors)
def test_any_json_error_is_judged(status: int, error: dict[str, object]) -> None:
    check_bounds(read_answer(status, {}, json.dumps(error).encode(), now=0))


def check_bounds(answer: Answer) -> None:
    assert re.fullmatch(r"[a-z0-9_]{1,64}", answer.reason)
    assert answer.limit_type is None or re.fullmatch(r"[a-z0-9_]+", answer.limit_type)
    assert answer.retry_after_ms is None or 0 <= answer.retry_after_ms <= MONTH_MS
    assert (answer.hold is not None) == (answer.verdict is Verdict.HOLD)
    for text in (answer.error_message, answer.error_details, answer.request_id):
        assert text is None or (0 < len(text) <= 500 and text.isprintable())


# Credentials that an answer quotes

TOKEN = "b7c2-token-never-shown"


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(
            dict.fromkeys(("key", "message", "details", "request_id"), f"no {TOKEN}")
        ),
        json.dumps({"error": {"message": f"unknown {TOKEN}"}}),
        f"<html>Authorization: Bearer {TOKEN}</html>",
        # What is cut from a long text is cut after it was hidden.
        json.dumps({"message": " " * 1_990 + TOKEN}),
        json.dumps({"message": "m" * (500 - 9) + TOKEN}),
    ],
    ids=["every-text", "nested", "no-json", "after-spaces", "at-the-cut"],
)
def test_no_answer_quotes_a_credential(body: str) -> None:
    headers = {"x-rate-limit-type": TOKEN}
    answer = read_answer(401, headers, body.encode(), now=0, secrets=["b", TOKEN])
    assert TOKEN[:9] not in repr(answer)
    assert "token" not in repr(answer)
    assert answer.reason == ("no" if '"key"' in body else "upstream_401")


def test_what_is_too_short_for_a_credential_is_an_ordinary_word() -> None:
    body = b'{"message":"to be or not to be"}'
    answer = read_answer(400, {}, body, now=0, secrets=["to", "", "o" * MIN_SECRET])
    assert answer.error_message == "to be or not to be"
