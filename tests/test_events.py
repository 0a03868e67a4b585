"""What a sender may say: the published schema, with the field and the rule told."""

import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.events import (
    MAX_AGE_MS,
    MAX_EVENTS,
    Event,
    Invalid,
    age_ms,
    identified,
    occurred_at,
    read_body,
    read_event,
    upstream_body,
)

CUSTOMER = {"source_id": "a"}


def event(**parts: object) -> dict[str, object]:
    return {"event": "e", "customer": CUSTOMER, **parts}


def upstream(event: Event) -> bytes:
    return upstream_body(event, identified(event))


def forwarded(body: object) -> object:
    raw = json.dumps(body).encode() if not isinstance(body, bytes) else body
    [only] = read_all(raw)
    return json.loads(upstream(only))


def refusal(body: object) -> Invalid:
    raw = json.dumps(body).encode() if not isinstance(body, bytes) else body
    with pytest.raises(Invalid) as caught:
        read_all(raw)
    return caught.value


def read_all(raw: bytes) -> list[Event]:
    events = [read_event(one) for one in read_body(raw).events]
    for event in events:
        identified(event)
    return events


DOCUMENTED = [
    # Voucherify's two published examples, number 1 and 2 of the vectors.
    {
        "event": "user_subscribed",
        "customer": {"source_id": "source_customer_event"},
        "referral": {
            "code": "46jL0kYI",
            "referrer_id": "cust_Vzck5i8U3OhcEUFY6MKhN9Rv",
        },
        "metadata": {"login": "bob", "pricing_plan": "PP1", "volume_number": 4},
    },
    {
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
    },
]

ACCEPTED = {
    "1-published-referral": DOCUMENTED[0],
    "2-published-loyalty": DOCUMENTED[1],
    "3-unknown-customer": event(customer={"source_id": "new-1"}),
    "7-300-ascii": event(event="x" * 300),
    "7-300-accents": event(event="é" * 300),
    "7-300-emoji": event(event="😀" * 300),
    "15-customer-id": event(customer={"id": "registered_10055"}),
    "16-both-ids": event(customer={"id": "cust_A", "source_id": "b"}),
    "18-null-address": event(customer={"source_id": "a", "address": None}),
    "22-metadata-of-any-type": event(metadata={"flag": 1, "nested": {"a": [None]}}),
    "31-empty-metadata": event(metadata={}),
    "whole-profile": event(
        customer={
            "source_id": "a",
            "name": "Ann",
            "description": "d",
            "email": "a@b.example",
            "phone": "+48 1",
            "birthdate": "1990-12-31",
            "birthday": "1990-12-31",
            "address": {
                "city": "c",
                "state": "s",
                "line_1": "1",
                "line_2": "2",
                "country": "PL",
                "postal_code": "0",
            },
            "metadata": {"vip": True},
        }
    ),
}


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_voucherify_accepts_is_forwarded_unchanged(body: object) -> None:
    assert forwarded(body) == body


REFUSED: dict[str, tuple[object, str, str]] = {
    "4-no-event": ({"customer": CUSTOMER}, "event_missing", "event is required"),
    "5-no-customer": ({"event": "e"}, "customer_missing", "customer is required"),
    "6-empty-event": (event(event=""), "empty", "event must not be empty"),
    "8-301": (event(event="x" * 301), "too_long", "event is too long"),
    "8-301-emoji": (event(event="😀" * 301), "too_long", "event is too long"),
    "9-referral-without-code": (
        event(referral={"referrer_id": "cust_1"}),
        "code_missing",
        "referral.code is required",
    ),
    "10-loyalty-without-code": (
        event(loyalty={}),
        "code_missing",
        "loyalty.code is required",
    ),
    "11-customer-string": (
        event(customer="bob"),
        "wrong_type",
        "customer must be an object, not a string",
    ),
    "12-event-number": (
        event(event=7),
        "wrong_type",
        "event must be a string, not a number",
    ),
    "13-source-id-number": (
        event(customer={"source_id": 42}),
        "wrong_type",
        "customer.source_id must be a string, not a number",
    ),
    "14-metadata-array": (
        event(metadata=[1]),
        "wrong_type",
        "metadata must be an object, not an array",
    ),
    "17-customer-empty": (
        event(customer={}),
        "customer_unidentified",
        "customer.source_id or customer.id is required",
    ),
    "20-birthdate": (
        event(customer={"source_id": "a", "birthdate": "31/12/1990"}),
        "bad_date",
        "customer.birthdate must be a date written YYYY-MM-DD",
    ),
    "20-no-such-day": (
        event(customer={"source_id": "a", "birthdate": "1990-02-30"}),
        "bad_date",
        "customer.birthdate",
    ),
    "21-back-dating": (
        event(created_at="2020-01-01T00:00:00Z"),
        "unknown_field",
        "created_at is not a known field",
    ),
    "23-cut-off": (b'{"event":"e",', "malformed_json", "not valid JSON"),
    "32-voucherify-js-without-identity": (
        {"event": "evt", "metadata": {"a": 1}, "customer": {}},
        "customer_unidentified",
        "customer.source_id",
    ),
    "customer-null": (event(customer=None), "customer_missing", "customer is required"),
    "customer-empty-source-id": (
        event(customer={"source_id": ""}),
        "customer_unidentified",
        "must not be empty",
    ),
    "unknown-in-customer": (
        event(customer={"source_id": "a", "vip": 1}),
        "unknown_field",
        "customer.vip is not a known field",
    ),
    "unknown-in-referral": (
        event(referral={"code": "c", "x": 1}),
        "unknown_field",
        "referral.x",
    ),
    "unknown-in-loyalty": (
        event(loyalty={"code": "c", "points": 9}),
        "unknown_field",
        "loyalty.points",
    ),
    "id-with-space": (event(id="a b"), "bad_id", "id must be 1 to 64"),
    "id-too-long": (event(id="a" * 65), "bad_id", "id must be 1 to 64"),
    "id-trailing-newline": (event(id="a\n"), "bad_id", "id must be 1 to 64"),
    "not-utf8": (b'{"event":"\xff"}', "malformed_json", "UTF-8"),
    "lone-surrogate": (
        b'{"event":"\\ud800","customer":{"source_id":"a"}}',
        "malformed_json",
        "surrogate",
    ),
    "nan": (
        b'{"event":"e","customer":{"source_id":"a"},"metadata":{"n":NaN}}',
        "malformed_json",
        "not valid JSON",
    ),
    "infinite": (
        b'{"event":"e","customer":{"source_id":"a"},"metadata":{"n":1e999}}',
        "bad_number",
        "too large",
    ),
    "empty-body": (b"", "malformed_json", "not valid JSON"),
    "a-word": (b"hello", "malformed_json", "not valid JSON"),
    "a-number": (b"5", "wrong_type", "An event must be an object"),
    "null": (b"null", "wrong_type", "An event must be an object"),
    "two-documents": (b"{} {}", "event_missing", "event is required"),
    "empty-array": ([], "empty_batch", "at least one"),
    "empty-batch": ({"events": []}, "empty_batch", "at least one"),
    "events-no-array": ({"events": {}}, "wrong_type", "events must be an array"),
    "batch-unknown-key": (
        {"events": [event()], "site": "x"},
        "unknown_field",
        "site is not a known field",
    ),
    "101-events": ([event()] * (MAX_EVENTS + 1), "too_many_events", "at most 100"),
    "101-metadata-keys": (
        event(metadata={str(n): n for n in range(101)}),
        "too_many_metadata_keys",
        "metadata has 101 keys",
    ),
    "101-customer-metadata-keys": (
        event(customer={"source_id": "a", "metadata": {str(n): n for n in range(101)}}),
        "too_many_metadata_keys",
        "customer.metadata has 101 keys",
    ),
    "9-levels": (
        event(metadata={"a": [[[[[[[]]]]]]]}),
        "too_deep",
        "at most 8 levels",
    ),
    "bottomless": (b"[" * 60_000, "too_deep", "at most 8 levels"),
    "bottomless-metadata": (
        b'{"event":"e","customer":{"source_id":"a"},"metadata":' + b'{"a":' * 9_000,
        "too_deep",
        "at most 8 levels",
    ),
}


@pytest.mark.parametrize(("body", "reason", "says"), REFUSED.values(), ids=REFUSED)
def test_what_voucherify_would_refuse_is_refused_with_field_and_rule(
    body: object, reason: str, says: str
) -> None:
    invalid = refusal(body)
    assert (invalid.reason, says in invalid.detail) == (reason, True), invalid.detail


def test_null_for_an_optional_part_counts_as_absent() -> None:  # vector 19
    body = event(
        referral=None, loyalty=None, metadata=None, id=None, token=None, age=None
    )
    assert forwarded(body) == event()


def test_the_relays_own_keys_stay_with_the_relay() -> None:
    assert forwarded(event(id="x-1", token="t", age=1_500)) == event()


def test_eight_levels_are_allowed() -> None:
    body = event(metadata={"a": [[[[[[]]]]]]})  # event 1, metadata 2, arrays 3 to 8
    assert forwarded(body) == body


def test_numbers_keep_their_kind_and_every_digit() -> None:
    raw = (
        b'{"event":"e","customer":{"source_id":"a"},"metadata":'
        b'{"int":123456789012345678901234567890,"float":0.1,"odd":9007199254740993,'
        b'"true":true,"one":1,"text":"1"}}'
    )
    [only] = read_body(raw).events
    assert b'"int":123456789012345678901234567890,"float":0.1' in upstream(
        read_event(only)
    )
    assert upstream(read_event(only)).endswith(
        b'"odd":9007199254740993,"true":true,"one":1,"text":"1"}}'
    )


def test_a_key_said_twice_reaches_voucherify_once() -> None:
    raw = b'{"event":"a","event":"e","customer":{"source_id":"x","source_id":"a"}}'
    [only] = read_body(raw).events
    assert upstream(read_event(only)) == b'{"event":"e","customer":{"source_id":"a"}}'


@pytest.mark.parametrize(
    ("body", "several", "token"),
    [
        (event(), False, None),
        ([event()], True, None),
        ({"events": [event()], "token": "t"}, True, "t"),
        ({"events": [event()]}, True, None),
        (event(metadata={"events": 1}), False, None),
    ],
    ids=["one", "array", "batch", "batch-without-token", "events-in-metadata"],
)
def test_one_event_an_array_and_a_batch_are_told_apart(
    body: object, several: bool, token: str | None
) -> None:
    read = read_body(json.dumps(body).encode())
    assert (len(read.events), read.several, read.token) == (1, several, token)


def test_a_faulty_event_still_tells_its_name_and_id() -> None:
    invalid = refusal(event(event="signup", id="x-1", loyalty={}))
    assert (invalid.name, invalid.id) == ("signup", "x-1")


def explain_or_forward(body: bytes) -> None:
    try:
        events = read_all(body)
    except Invalid as invalid:
        refused = invalid
    else:
        assert all(json.loads(upstream(event)) for event in events)
        return
    assert refused.reason
    assert refused.detail.endswith(".")


@given(st.binary(max_size=400))
@example(
    b'{"event":"e","customer":{"source_id":"a"},"metadata":{"n":' + b"1" * 5_000 + b"}}"
)
@example(b'{"events":')
@example(b'{"events":[{}]')
@example(b'{"event":"\\ud83d\\ude00","customer":{"source_id":"\\u0000"}}')
def test_any_bytes_are_an_event_or_an_explained_refusal(body: bytes) -> None:
    explain_or_forward(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("event", "customer", "referral", "loyalty", "metadata", "id"),
                *("token", "age"),
            ]
        )
        | st.text(max_size=3),
        JSON | st.fixed_dictionaries({"source_id": st.text(max_size=3)}),
    )
)
def test_any_json_is_an_event_or_an_explained_refusal(body: object) -> None:
    explain_or_forward(json.dumps(body).encode())


@pytest.mark.parametrize("cut", range(12, 60, 3))
def test_a_batch_that_was_cut_off_is_told_as_that(cut: int) -> None:
    body = b'{"events":[{"event":"e","customer":{"source_id":"u1"}},{"event":"e"}]}'
    for form in (body, b'{ "token": "t", \n "events" : ' + body[10:]):
        with pytest.raises(Invalid) as caught:
            read_body(form[: cut + len(form) - len(body)])
        assert caught.value.reason == "malformed_json"


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (r"Tasse \ud83d", "Tasse \ufffd"),
        (r"\uDE00 low", "\ufffd low"),
        (r"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\\ud83d", r"\ud83d"),
        (r"\\\ud83d", "\\\ufffd"),
    ],
)
def test_half_an_emoji_costs_no_other_event(said: str, read: str) -> None:
    event = '{"event":"e","customer":{"source_id":"u1"},"metadata":{"t":"%s"}}'
    both = ",".join(event.replace("%s", text) for text in ("plain", said))
    body = f'{{"events":[{both}]}}'
    events = [read_event(raw) for raw in read_body(body.encode()).events]
    assert [event.metadata for event in events] == [{"t": "plain"}, {"t": read}]


# --- age ------------------------------------------------------------------------------

RECEIVED = 1_800_000_000.25  # 2027-01-15T08:00:00.250Z


def aged(age: str) -> Event:
    """An event with an age, as it stands in the JSON."""
    return read_event(
        f'{{"event":"e","id":"x-1","customer":{{"source_id":"a"}},"age":{age}}}'.encode()
    )


@pytest.mark.parametrize(
    ("age", "ms"),
    [
        ("0", 0),
        ("null", 0),
        ("1500", 1_500),
        ("1.5e3", 1_500),
        ("1500.999", 1_500),
        ("0.999", 0),
        ("-0", 0),
        ("-0.5", 0),
        ("-1", 0),
        ("-86400000", 0),
        (f"{MAX_AGE_MS}", MAX_AGE_MS),
        (f"{MAX_AGE_MS + 1}", MAX_AGE_MS),
        (f"{MAX_AGE_MS}.5", MAX_AGE_MS),
        ("1e999", MAX_AGE_MS),
        ("-1e999", 0),
        ("9" * 6_000, MAX_AGE_MS),
        ("-" + "9" * 6_000, 0),
        ("1e-999", 0),
    ],
    ids=lambda part: str(part)[:12],
)
def test_no_clock_costs_an_event(age: str, ms: int) -> None:
    assert age_ms(aged(age)) == ms


def test_without_an_age_it_happened_when_it_was_received() -> None:
    [only] = read_all(json.dumps(event()).encode())
    assert age_ms(only) == 0
    assert occurred_at(only, RECEIVED) == "2027-01-15T08:00:00.250Z"


@pytest.mark.parametrize(
    "age",
    [
        *('"1500"', '""', '"null"', '"nan"', '"1e3"', "true", "false"),
        *("[]", "[1500]", "{}", '{"ms":1}'),
    ],
)
def test_an_age_that_is_no_number_is_told_with_its_cure(age: str) -> None:
    with pytest.raises(Invalid) as caught:
        aged(age)
    invalid = caught.value
    assert (invalid.reason, invalid.name, invalid.id) == ("age_invalid", "e", "x-1")
    assert invalid.detail == (
        "age must be a number: the milliseconds from the event to this request. "
        "Correct it, or leave it out."
    )


@pytest.mark.parametrize("age", ["NaN", "Infinity", "01", "1.", "+1", "1_000", "0x1"])
def test_what_json_has_no_number_for_is_no_json(age: str) -> None:
    with pytest.raises(Invalid) as caught:
        aged(age)
    assert caught.value.reason == "malformed_json"


@pytest.mark.parametrize(
    ("age", "at"),
    [
        (0, "2027-01-15T08:00:00.250Z"),
        (1, "2027-01-15T08:00:00.249Z"),
        (250, "2027-01-15T08:00:00.000Z"),
        (251, "2027-01-15T07:59:59.999Z"),
        (-1, "2027-01-15T08:00:00.250Z"),
        (86_400_000, "2027-01-14T08:00:00.250Z"),
        (MAX_AGE_MS * 2, "2026-12-16T08:00:00.250Z"),
    ],
)
def test_the_time_is_that_of_receipt_less_the_age(age: int, at: str) -> None:
    assert occurred_at(aged(str(age)), RECEIVED) == at


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(), st.data())
def test_the_time_is_whole_and_never_later_than_receipt(
    age: float, data: st.DataObject
) -> None:
    received = data.draw(st.floats(0, 4e9))
    at = occurred_at(aged(json.dumps(age)), received)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at)
    read = datetime.fromisoformat(at)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    ms = int(received * 1000) - int(min(max(age, 0), MAX_AGE_MS))
    assert read == epoch + timedelta(milliseconds=ms)
    assert (read - epoch).total_seconds() <= received


# --- what the relay says itself -------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (None, {"at": "now"}),
        ({}, {"at": "now"}),
        ({"n": 1}, {"n": 1, "at": "now"}),
        ({"at": "yesterday", "n": 1}, {"at": "now", "n": 1}),
        ({"at": None}, {"at": "now"}),
    ],
    ids=["absent", "empty", "beside", "overwritten", "null"],
)
def test_what_the_relay_says_wins_and_the_event_stays_as_sent(
    sent: dict[str, object] | None, said: dict[str, object]
) -> None:
    [only] = read_all(json.dumps(event(metadata=sent)).encode())
    body = upstream_body(only, identified(only), {"at": "now"})
    assert json.loads(body)["metadata"] == said
    assert body.count(b'"at"') == 1
    assert only.metadata == sent


def test_what_the_relay_says_does_not_count_against_the_sender() -> None:
    most = {str(n): n for n in range(100)}
    [only] = read_all(json.dumps(event(metadata=most)).encode())
    body = upstream_body(only, identified(only), {"at": "now"})
    assert json.loads(body)["metadata"] == most | {"at": "now"}


@pytest.mark.parametrize("own", [None, {}])
def test_where_the_relay_says_nothing_no_metadata_is_made(
    own: dict[str, object] | None,
) -> None:
    [only] = read_all(json.dumps(event()).encode())
    assert json.loads(upstream_body(only, identified(only), own)) == event()
