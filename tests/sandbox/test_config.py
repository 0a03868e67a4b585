"""Settings and the switch for each thing the documentation leaves open."""

import re
from dataclasses import dataclass, field

import pytest

from relay.sandbox import Property, SandboxConfig
from relay.sandbox.config import changed
from tests.sandbox.support import Caller, json_of

NOBODY: dict[str, object] = {"event": "e", "customer": {}}
UNKNOWN_KEY: dict[str, object] = {"event": "e", "customer": {"source_id": "a"}, "x": 1}
NULLS: dict[str, object] = {
    "event": "e",
    "customer": {"source_id": "a", "name": None},
    "referral": None,
    "metadata": None,
}
NUMBER: dict[str, object] = {"event": "e", "customer": {"source_id": 42}}
BIRTHDATE: dict[str, object] = {
    "event": "e",
    "customer": {"source_id": "a", "birthdate": "1/2/90"},
}
LOYALTY: dict[str, object] = {
    "event": "e",
    "customer": {"source_id": "a"},
    "loyalty": {"code": "L"},
}
REFERRAL: dict[str, object] = {
    "event": "e",
    "customer": {"source_id": "a"},
    "referral": {"code": "R"},
}
EVENT: dict[str, object] = {"event": "e", "customer": {"source_id": "a"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    body: dict[str, object]
    status: int
    changes: dict[str, object]
    headers: dict[str, str | None] = field(default_factory=dict)


def case(
    body: dict[str, object], status: int, *, origin: str | None = "", **changes: object
) -> Case:
    headers = {} if origin == "" else {"origin": origin}
    return Case(body=body, status=status, changes=changes, headers=headers)


ELSEWHERE = "https://elsewhere.example"
CASES = {
    "bad-origin-401": case(EVENT, 401, origin=ELSEWHERE, bad_origin_status=401),
    "bad-origin-403": case(EVENT, 403, origin=ELSEWHERE, bad_origin_status=403),
    "no-origin-403": case(EVENT, 403, origin=None, bad_origin_status=403),
    "undefined-event-accept": case(EVENT, 200, undefined_event="accept"),
    "undefined-event-reject": case(EVENT, 400, undefined_event="reject"),
    "defined-event": case(EVENT, 200, undefined_event="reject", events={"e": {}}),
    "empty-customer-accept": case(NOBODY, 200, empty_customer="accept"),
    "empty-customer-reject": case(NOBODY, 400, empty_customer="reject"),
    "unknown-fields-ignore": case(UNKNOWN_KEY, 200, unknown_fields="ignore"),
    "unknown-fields-reject": case(UNKNOWN_KEY, 400, unknown_fields="reject"),
    "null-fields-accept": case(NULLS, 200, null_fields="accept"),
    "null-fields-reject": case(NULLS, 400, null_fields="reject"),
    "source-id-number-coerce": case(NUMBER, 200, source_id_number="coerce"),
    "source-id-number-reject": case(NUMBER, 400, source_id_number="reject"),
    "birthdate-accept": case(BIRTHDATE, 200, birthdate_format="accept"),
    "birthdate-reject": case(BIRTHDATE, 400, birthdate_format="reject"),
    "loyalty-off-refuse": case(LOYALTY, 403, client_loyalty_events_enabled=False),
    "referral-off-refuse": case(REFERRAL, 403, client_loyalty_events_enabled=False),
    "plain-event-with-loyalty-off": case(
        EVENT, 200, client_loyalty_events_enabled=False
    ),
    "create-off-refuse": case(EVENT, 403, client_create_customer_enabled=False),
}


@pytest.mark.anyio
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_each_unknown_is_a_switch(caller: Caller, case: Case) -> None:
    caller.sandbox.configure(**case.changes)
    answer = await caller.send(case.body, headers=case.headers)
    assert answer.status_code == case.status
    assert len(caller.sandbox.events) == (case.status == 200)


@pytest.mark.anyio
async def test_a_coerced_source_id_is_stored_as_a_string(caller: Caller) -> None:
    caller.sandbox.configure(source_id_number="coerce")
    await caller.send(NUMBER)
    assert caller.sandbox.customers[0].source_id == "42"


@pytest.mark.anyio
async def test_loyalty_switched_off_can_skip_its_effect(caller: Caller) -> None:
    caller.sandbox.configure(client_loyalty_events_enabled=False, when_disabled="skip")
    assert (await caller.send(LOYALTY)).status_code == 200
    assert caller.sandbox.events[0].skipped == ["loyalty"]


@pytest.mark.anyio
async def test_customer_creation_switched_off_can_skip_it(caller: Caller) -> None:
    caller.sandbox.configure(client_create_customer_enabled=False, when_disabled="skip")
    answer = json_of(await caller.send(EVENT))
    assert answer["customer"] == {"object": "customer"}
    assert caller.sandbox.customers == []
    caller.sandbox.add_customer(source_id="a")
    known = json_of(await caller.send(EVENT))
    assert known["customer"] != {"object": "customer"}


@pytest.mark.anyio
async def test_client_side_settings_do_not_gate_the_server_api(caller: Caller) -> None:
    caller.sandbox.configure(
        client_loyalty_events_enabled=False, client_create_customer_enabled=False
    )
    assert (await caller.send(LOYALTY, path="/v1/events")).status_code == 200


@pytest.mark.anyio
async def test_the_answer_can_lack_metadata_as_the_published_example(
    caller: Caller,
) -> None:
    caller.sandbox.configure(response_metadata=False)
    assert "metadata" not in json_of(await caller.send(EVENT))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "value", "fits"),
    [
        ("string", "x", True),
        ("string", 1, False),
        ("number", 1, True),
        ("number", 1.5, True),
        ("number", True, False),
        ("number", "1", False),
        ("boolean", False, True),
        ("boolean", 0, False),
        ("date", "2022-12-01", True),
        ("date", "20221201", False),
        ("date", "2022-13-01", False),
        ("date", "2022-12-01T00:00:00Z", False),
        ("datetime", "2022-12-01T09:24:33.061Z", True),
        ("datetime", "2022-12-01", False),
        ("datetime", 1669888800, False),
        ("string", None, False),
    ],
)
async def test_metadata_follows_its_definition(
    caller: Caller, kind: str, value: object, fits: bool
) -> None:
    caller.sandbox.configure(events={"e": {"p": {"type": kind}}})
    answer = await caller.send(EVENT | {"metadata": {"p": value, "undefined": 1}})
    assert answer.status_code == (200 if fits else 400)
    if not fits:
        body = json_of(answer)
        assert body["key"] == "metadata_validation_failed"
        assert body["message"] == "Metadata validation failed"
        assert str(body["details"]).startswith(f"p: must be a {kind}, property is req")
    caller.sandbox.assert_clean()  # a relay cannot know the definitions


@pytest.mark.anyio
async def test_an_optional_property_may_be_absent_but_not_wrong(caller: Caller) -> None:
    caller.sandbox.configure(events={"e": {"p": Property(type="date", optional=True)}})
    assert (await caller.send(EVENT)).status_code == 200
    wrong = json_of(await caller.send(EVENT | {"metadata": {"p": "soon"}}))
    assert wrong["details"] == "p: must be a date (actual value is 'soon')"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"client_limitt": 5}, "client_limitt: no such setting; known are"),
        ({"client_limit": 0}, "client_limit: use 1 or more, or null for no limit"),
        ({"client_limit": "5"}, "client_limit"),
        ({"client_limit_seconds": 0}, "client_limit_seconds: use more than 0 seconds"),
        ({"keep_requests": 0}, "keep_requests: use 1 or more"),
        ({"latency": [2, 1]}, "latency: use seconds, or [least, most]"),
        ({"latency": -1}, "latency: use seconds"),
        ({"bad_origin_status": 404}, "bad_origin_status"),
        ({"undefined_event": "ignore"}, "undefined_event"),
        ({"events": {"e": {"p": {"type": "list"}}}}, "events"),
    ],
)
def test_a_wrong_setting_is_named_with_its_cure(
    changes: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        changed(SandboxConfig(), changes)


def test_changes_leave_the_other_settings_alone() -> None:
    config = SandboxConfig(events={"e": {"p": Property(type="date")}}, latency=(0, 1))
    assert changed(config, {"per_minute": 3}).events == config.events
    assert changed(config, {"latency": 0.5}).latency == 0.5


def test_secrets_are_in_no_repr() -> None:
    config = SandboxConfig(
        client_token="s3cret", server_app_token="s3cret", oauth_app_secret="s3cret"
    )
    assert "s3cret" not in repr(config)
