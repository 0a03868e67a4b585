"""Who may say what: every rule of the policy, and what its refusals tell."""

import ast
import base64
import hmac
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import relay.catalog
import relay.events
import relay.policy
import relay.signing
from relay.catalog import CUSTOMER_FIELDS, EMPTY, Catalog, parse_catalog
from relay.events import Customer, Event, Refused, read_event, upstream_body
from relay.outcomes import Outcome
from relay.policy import Policy, Ruling, Sender
from relay.signing import LEEWAY_S, PURPOSE, Signer

NOW = 1_800_000_000
OWN_ID = "own-1"
SHOP = "https://shop.example"
KEY, OTHER_KEY = "k" * 40, "o" * 40
SIGNER = Signer([KEY])
TTL_MS = 3_600_000
MODES = ("off", "optional", "required", "dry_run")


def token(
    source_id: str = "u1",
    *,
    events: list[str] | None = None,
    origin: str | None = None,
    uses: int | None = None,
    ttl_s: int = 600,
    at: int = NOW,
    key: str = KEY,
) -> str:
    made, _ = Signer([key]).sign(
        source_id=source_id,
        events=events,
        origin=origin,
        uses=uses,
        ttl_s=ttl_s,
        now=at,
    )
    return made


def signed(claims: dict[str, object]) -> str:
    """A token of our key with any claims, as docs/tokens.md has it."""

    def base64url(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    derived = hmac.digest(KEY.encode(), PURPOSE.encode(), "sha256")
    text = f"{base64url(json.dumps(claims).encode())}.{base64url(NOW.to_bytes(4))}"
    return f"{text}.{base64url(hmac.digest(derived, text.encode(), 'sha256'))}"


TOKENS: dict[str, str | None] = {
    "none": None,
    "valid": token(),
    "expired": token(at=NOW - 600),
    "forged": token(key=OTHER_KEY),
    "malformed": "not a token",
    "empty": "",
    "cut": token()[:-1],
    "void-claim": signed({"source_id": "u1", "event": ["e"]}),
    "not-yet-valid": token(at=NOW + LEEWAY_S + 1),
}
REASONS = {
    "none": "token_missing",
    "expired": "token_expired",
    "forged": "token_forged",
    "malformed": "token_malformed",
    "empty": "token_malformed",
    "cut": "token_malformed",
    "void-claim": "token_malformed",
    "not-yet-valid": "token_not_yet_valid",
}


def catalog(rules: str = "", *, top: str = "") -> Catalog:
    """A catalogue with `rules` for the event `e`, and `top` for all others."""
    text = f"[defaults]\n{top}\n[events.e]\n{rules}\n"
    return parse_catalog(text, max_ttl_s=86_400 * 30)


def policy(
    tokens: str = "optional",
    *,
    rules: Catalog = EMPTY,
    signer: Signer | None = SIGNER,
    restricted: bool = False,
    gpc: str = "ignore",
) -> Policy:
    return Policy(
        ttl_ms=TTL_MS,
        catalog=rules,
        signer=signer,
        tokens=tokens,
        restricted=restricted,
        gpc=gpc,
    )


def event(name: str = "e", customer: object = "default", **parts: object) -> Event:
    body: dict[str, object] = {"event": name, "id": "x-1", **parts}
    if customer is not None:
        body["customer"] = {"source_id": "u1"} if customer == "default" else customer
    return read_event(json.dumps(body).encode())


def sender(
    said: str | None = None,
    *,
    origin: str | None = SHOP,
    allowed: bool = True,
    gpc: bool = False,
) -> Sender:
    return Sender(origin=origin, allowed=allowed, token=said, gpc=gpc)


def passed(
    rules: Policy, what: Event | None = None, who: Sender | None = None
) -> Ruling:
    return rules.judge(what or event(), who or sender(), event_id=OWN_ID, now=NOW)


def refused(
    rules: Policy, what: Event | None = None, who: Sender | None = None
) -> Refused:
    """The refusal, with what all of them keep to."""
    what = what or event()
    with pytest.raises(Refused) as caught:
        rules.judge(what, who or sender(), event_id=OWN_ID, now=NOW)
    refusal = caught.value
    assert (refusal.name, refusal.id) == (what.event, what.id)
    assert re.fullmatch(r"[a-z_]+", refusal.reason)
    assert refusal.detail == str(refusal)
    return refusal


def verdict(
    rules: Policy, what: Event | None = None, who: Sender | None = None
) -> tuple[Outcome, str] | None:
    """Outcome and reason; None when it may pass."""
    try:
        passed(rules, what, who)
    except Refused as refusal:
        return refusal.outcome, refusal.reason
    return None


def unauthenticated(reason: str) -> tuple[Outcome, str]:
    return Outcome.UNAUTHENTICATED, reason


def forbidden(reason: str) -> tuple[Outcome, str]:
    return Outcome.FORBIDDEN, reason


# --- the token rule ---------------------------------------------------------------


def ruled(mode: str, kind: str, *, key: bool = True) -> str | None:
    """The reason that the documents give for this token under this rule."""
    if mode == "off" or (mode == "optional" and kind == "none"):
        return None
    if kind != "none" and not key:
        return "token_unexpected"
    return REASONS.get(kind)


@pytest.mark.parametrize("place", ["event", "sender"])
@pytest.mark.parametrize("key", [True, False], ids=["key", "no-key"])
@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("mode", MODES)
def test_the_token_rule(mode: str, kind: str, key: bool, place: str) -> None:
    rules = policy(mode, signer=SIGNER if key else None)
    what, who = event(), sender()
    (what if place == "event" else who).token = TOKENS[kind]
    reason = ruled(mode, kind, key=key)
    noted = ["would_refuse:token"] if mode == "dry_run" and reason else []
    expected = unauthenticated(reason) if reason and not noted else None
    assert verdict(rules, what, who) == expected
    assert who.notes == noted


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("setting", MODES)
@pytest.mark.parametrize("rule", MODES)
def test_the_catalogues_token_rule_wins_over_the_setting(
    rule: str, setting: str, kind: str
) -> None:
    rules = policy(setting, rules=catalog(f'token = "{rule}"'))
    alone = policy(rule)
    one, other = sender(TOKENS[kind]), sender(TOKENS[kind])
    assert verdict(rules, who=one) == verdict(alone, who=other)
    assert one.notes == other.notes
    # And the setting goes on to decide for events that the rule is not about.
    assert verdict(rules, event("f"), sender(TOKENS[kind])) == verdict(
        policy(setting), event("f"), sender(TOKENS[kind])
    )


def test_the_rule_of_the_defaults_wins_over_the_setting_too() -> None:
    rules = policy("off", rules=catalog(top='token = "required"'))
    assert verdict(rules, event("f")) == unauthenticated("token_missing")
    assert verdict(rules, event("e")) is None  # listed: inherits nothing


def test_the_token_of_an_event_wins_over_that_of_its_request() -> None:
    what = event(customer=None, token=token("mine"))
    assert passed(policy(), what, sender(token("all"))).customer.source_id == "mine"
    broken = event(token="not a token")
    assert verdict(policy(), broken, sender(token())) == unauthenticated(
        "token_malformed"
    )


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        (NOW - 599, None),
        (NOW - 600, "token_expired"),
        (NOW + LEEWAY_S, None),
        (NOW + LEEWAY_S + 1, "token_not_yet_valid"),
    ],
)
def test_the_time_is_the_callers(at: int, reason: str | None) -> None:
    expected = unauthenticated(reason) if reason else None
    assert verdict(policy("required"), who=sender(token(at=at))) == expected


# --- whose event it is ------------------------------------------------------------


@pytest.mark.parametrize(
    "customer",
    [None, {}, {"source_id": "u1"}, {"source_id": None}, {"email": "a@b.example"}],
    ids=["absent", "empty", "same", "null", "profile-only"],
)
@pytest.mark.parametrize("mode", ["optional", "required", "dry_run"])
def test_with_a_token_the_customer_is_the_tokens(mode: str, customer: object) -> None:
    what, who = event(customer=customer), sender(token())
    ruling = passed(policy(mode), what, who)
    assert (ruling.customer.source_id, ruling.customer.id) == ("u1", None)
    assert who.notes == []
    body = json.loads(upstream_body(what, ruling.customer))
    assert body["customer"]["source_id"] == "u1"
    assert "id" not in body["customer"]
    assert "token" not in body


@pytest.mark.parametrize(
    "customer",
    [
        {"source_id": "u2"},
        {"source_id": ""},
        {"source_id": "U1"},
        {"source_id": "u1 "},
        {"id": "u1"},
        {"id": "cust_1", "source_id": "u1"},
        {"id": ""},
        {"id": "", "source_id": "u1"},
    ],
    ids=[
        "another",
        "empty",
        "other-case",
        "trailing-blank",
        "id-alone",
        "id-beside-the-same",
        "empty-id",
        "empty-id-beside-the-same",
    ],
)
@pytest.mark.parametrize("mode", ["optional", "required"])
def test_a_body_that_names_another_customer_is_refused(
    mode: str, customer: object
) -> None:
    found = verdict(policy(mode), event(customer=customer), sender(token()))
    assert found == forbidden("customer_mismatch")


def test_a_token_that_is_not_looked_at_names_nobody() -> None:
    what = event(customer=None)
    assert verdict(policy("off"), what, sender(token())) == (
        Outcome.INVALID,
        "customer_missing",
    )
    other = event(customer={"id": "cust_1"})
    ruling = passed(policy("off"), other, sender(token()))
    assert (ruling.customer.id, ruling.customer.source_id) == ("cust_1", None)


@pytest.mark.parametrize(
    ("customer", "reason"),
    [
        (None, "customer_missing"),
        ({}, "customer_unidentified"),
        ({"source_id": ""}, "customer_unidentified"),
        ({"id": "", "source_id": ""}, "customer_unidentified"),
        ({"email": "a@b.example"}, "customer_unidentified"),
    ],
)
@pytest.mark.parametrize("mode", ["off", "optional", "dry_run"])
def test_without_a_token_the_body_must_name_somebody(
    mode: str, customer: object, reason: str
) -> None:
    refusal = refused(policy(mode), event(customer=customer))
    assert (refusal.outcome, refusal.reason) == (Outcome.INVALID, reason)


# --- what a token may not be used for ---------------------------------------------


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_a_token_may_send_its_events_alone(mode: str) -> None:
    who = sender(token(events=["e", "f"]))
    assert verdict(policy(mode), event("e"), who) is None
    assert verdict(policy(mode), event("f"), who) is None
    for name in ("g", "E", "e ", "ef"):
        assert verdict(policy(mode), event(name), who) == forbidden("token_event")


@pytest.mark.parametrize(
    "origin",
    [None, "null", "https://other.example", "http://shop.example", f"{SHOP}/", ""],
)
@pytest.mark.parametrize("allowed", [True, False])
def test_a_token_of_one_origin_counts_on_its_pages_alone(
    origin: str | None, allowed: bool
) -> None:
    said = token(origin=SHOP)
    assert verdict(policy(), who=sender(said)) is None
    found = verdict(policy(), who=sender(said, origin=origin, allowed=allowed))
    assert found == forbidden("token_origin")


@pytest.mark.parametrize(
    ("said", "customer"),
    [
        (token(events=["other"]), {"source_id": "u1"}),
        (token(origin="https://other.example"), {"source_id": "u1"}),
        (token("u2"), {"source_id": "u1"}),
    ],
    ids=["event", "origin", "customer"],
)
def test_in_dry_run_what_a_token_forbids_is_only_noted(
    said: str, customer: object
) -> None:
    who = sender(said)
    ruling = passed(policy("dry_run"), event(customer=customer), who)
    assert who.notes == ["would_refuse:token"]
    assert ruling.customer.source_id == "u1"  # the body's: as if it had no token


def test_in_dry_run_the_event_goes_on_as_anonymous() -> None:
    rules = policy("dry_run", restricted=True)
    what = event(customer={"source_id": "u1", "email": "a@b.example"})
    who = sender(token(key=OTHER_KEY))
    assert verdict(rules, what, who) == forbidden("customer_field")
    assert who.notes == ["would_refuse:token"]
    good = sender(token())
    assert verdict(rules, what, good) is None
    assert good.notes == []


def test_in_dry_run_a_refused_token_leaves_its_customer_out() -> None:
    what = event(customer=None, token=token(events=["other"]))
    assert verdict(policy("dry_run"), what) == (Outcome.INVALID, "customer_missing")


def test_each_event_of_a_batch_is_noted() -> None:
    who, rules = sender(), policy("dry_run")
    for _ in range(3):
        passed(rules, event(), who)
    passed(rules, event(token=token()), who)
    assert who.notes == ["would_refuse:token"] * 3


# --- senders without an Origin ----------------------------------------------------


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("mode", MODES)
def test_a_sender_that_is_not_allowed_needs_a_valid_token(mode: str, kind: str) -> None:
    who = sender(TOKENS[kind], origin=None, allowed=False)
    found = verdict(policy(mode), who=who)
    reason = ruled(mode, kind)
    if kind == "valid" and mode != "off":
        assert found is None
    elif reason is None or mode == "dry_run":
        assert found == forbidden("origin")
    else:
        assert found == unauthenticated(reason)


def test_in_a_batch_without_origin_each_event_needs_its_token() -> None:
    who, rules = sender(origin=None, allowed=False), policy()
    found = [
        verdict(rules, event(token=said), who)
        for said in (token(), None, token(key=OTHER_KEY), token("u2"), token())
    ]
    assert found == [
        None,
        forbidden("origin"),
        unauthenticated("token_forged"),
        forbidden("customer_mismatch"),
        None,
    ]


def test_an_allowed_sender_needs_no_token() -> None:
    assert verdict(policy(), who=sender(origin=None)) is None


# --- what anonymous senders may set -----------------------------------------------

FULL: dict[str, object] = {
    "source_id": "u1",
    "name": "n",
    "description": "d",
    "email": "a@b.example",
    "phone": "1",
    "birthday": "2000-01-01",
    "birthdate": "2000-01-01",
    "address": {"city": "c"},
    "metadata": {"k": 1},
}
PROFILE = sorted(set(FULL) - {"source_id"})


def test_the_table_of_fields_is_whole() -> None:
    assert {*FULL, "id"} == set(CUSTOMER_FIELDS)


@pytest.mark.parametrize("name", PROFILE)
def test_restricted_senders_set_no_field_of_the_profile(name: str) -> None:
    what = event(customer={"source_id": "u1", name: FULL[name]})
    assert verdict(policy(restricted=True), what) == forbidden("customer_field")
    assert verdict(policy(), what) is None
    assert verdict(policy(restricted=True), what, sender(token())) is None


def test_null_and_absent_are_the_same_but_for_an_address() -> None:
    nothing = dict.fromkeys(PROFILE)
    del nothing["address"]
    what = event(customer={"source_id": "u1", **nothing}, loyalty=None, referral=None)
    assert verdict(policy(restricted=True), what) is None
    # The schema gives this null a meaning, so to say it needs what any address needs.
    erased = event(customer={"source_id": "u1", "address": None})
    assert verdict(policy(restricted=True), erased) == forbidden("customer_field")
    ruling = passed(policy(), erased)
    body = json.loads(upstream_body(erased, ruling.customer))
    assert body["customer"]["address"] is None


@pytest.mark.parametrize("key", ["id", "source_id"])
def test_restricted_senders_may_name_somebody(key: str) -> None:
    assert verdict(policy(restricted=True), event(customer={key: "u1"})) is None


@pytest.mark.parametrize("part", ["loyalty", "referral"])
@pytest.mark.parametrize(
    ("rule", "anonymous", "known", "trusted"),
    [
        (None, False, True, True),
        ("true", True, True, True),
        ("false", False, False, False),
    ],
    ids=["not-said", "opened", "shut"],
)
def test_loyalty_and_referral(
    part: str, rule: str | None, anonymous: bool, known: bool, trusted: bool
) -> None:
    rules = catalog(f"{part} = {rule}" if rule else "")
    what = event(**{part: {"code": "c"}})  # type: ignore[arg-type]  # its own keywords
    for restricted, who, may in (
        (True, sender(), anonymous),
        (True, sender(token()), known),
        (False, sender(), trusted),
        (False, sender(token()), known),
    ):
        found = verdict(policy(rules=rules, restricted=restricted), what, who)
        assert found == (None if may else forbidden(part))
    assert verdict(policy(rules=rules, restricted=True), event()) is None


def test_opening_one_part_opens_no_other() -> None:
    rules = policy(rules=catalog("loyalty = true"), restricted=True)
    code = {"code": "c"}
    assert verdict(rules, event(loyalty=code)) is None
    assert verdict(rules, event(loyalty=code, referral=code)) == forbidden("referral")
    wide = event(customer={"source_id": "u1", "email": "a@b.example"}, loyalty=code)
    assert verdict(rules, wide) == forbidden("customer_field")
    assert verdict(rules, event("f", loyalty=code)) == forbidden("loyalty")


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["token", "anonymous"])
def test_the_catalogues_fields_count_for_everybody(
    restricted: bool, known: bool
) -> None:
    rules = policy(
        rules=catalog('customer = ["source_id", "email"]'), restricted=restricted
    )
    for name in PROFILE:
        what = event(customer={"source_id": "u1", name: FULL[name]})
        who = sender(token() if known else None)
        expected = None if name == "email" else forbidden("customer_field")
        assert verdict(rules, what, who) == expected


def test_a_catalogue_may_shut_even_a_way_to_name_somebody() -> None:
    rules = policy(rules=catalog('customer = ["source_id"]'))
    assert verdict(rules, event(customer={"id": "u1"})) == forbidden("customer_field")
    assert verdict(rules) is None


def test_a_token_names_the_customer_whatever_the_list_says() -> None:
    rules = policy(rules=catalog('token = "required"\ncustomer = ["email"]'))
    for customer in (None, {"source_id": "u1"}, {"email": "a@b.example"}):
        assert verdict(rules, event(customer=customer), sender(token())) is None
    assert verdict(rules, event(customer={"phone": "1"}), sender(token())) == forbidden(
        "customer_field"
    )


def test_a_refused_field_is_named_with_its_rule() -> None:
    what = event(customer={"source_id": "u1", "phone": "1"})
    by_setting = refused(policy(restricted=True), what).detail
    assert by_setting.startswith("customer.phone may not be set: ")
    assert "RELAY_ANONYMOUS" in by_setting
    listed = catalog('customer = ["source_id", "email"]')
    by_rule = refused(policy(rules=listed), what).detail
    assert "events.e.customer lists email, source_id" in by_rule


# --- metadata, names --------------------------------------------------------------

TYPES = (
    'metadata = { s = "string", n = "number", b = "boolean", d = "date", '
    't = "datetime", a = "any" }'
)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, None),
        (None, None),
        (dict.fromkeys("snbdta"), None),
        ({"s": "x", "n": 1.5, "b": False, "d": "2030-01-31", "a": [1]}, None),
        ({"t": "2030-01-31T09:00:00Z"}, None),
        ({"s": 1}, "metadata_type"),
        ({"n": "1"}, "metadata_type"),
        ({"n": True}, "metadata_type"),
        ({"b": 1}, "metadata_type"),
        ({"d": "2030-02-30"}, "metadata_type"),
        ({"t": "yesterday"}, "metadata_type"),
        ({"x": 1}, "metadata_field"),
        ({"x": None}, "metadata_field"),
        ({"S": "x"}, "metadata_field"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["token", "anonymous"])
def test_metadata_keeps_to_the_listed_names_and_types(
    metadata: object, reason: str | None, known: bool
) -> None:
    found = verdict(
        policy(rules=catalog(TYPES)),
        event(metadata=metadata),
        sender(token() if known else None),
    )
    assert found == (forbidden(reason) if reason else None)


def test_an_event_that_is_not_listed_is_refused_where_the_catalogue_says_so() -> None:
    rules = policy(rules=catalog(top='unlisted = "reject"'))
    assert verdict(rules, event("e")) is None
    for name in ("f", "E", "events.e", "e "):
        for said in (None, token(), "not a token"):
            assert verdict(rules, event(name), sender(said)) == forbidden(
                "event_unlisted"
            )


# --- the privacy signal -----------------------------------------------------------


def whole() -> Event:
    return event(
        customer=FULL,
        metadata={"k": 1},
        loyalty={"code": "l"},
        referral={"code": "r", "referrer_id": "i"},
    )


def test_a_signal_that_is_ignored_changes_nothing() -> None:
    what, who = whole(), sender(gpc=True)
    passed(policy(gpc="ignore"), what, who)
    assert what == whole()
    assert who.notes == []


@pytest.mark.parametrize("gpc", ["ignore", "strip", "drop"])
def test_without_a_signal_nothing_is_taken_out(gpc: str) -> None:
    what, who = whole(), sender()
    passed(policy(gpc=gpc), what, who)
    assert what == whole()
    assert who.notes == []


@pytest.mark.parametrize("said", [None, token()], ids=["anonymous", "token"])
def test_strip_keeps_what_the_event_is_and_whose(said: str | None) -> None:
    what, who = whole(), sender(said, gpc=True)
    ruling = passed(policy(gpc="strip"), what, who)
    assert json.loads(upstream_body(what, ruling.customer)) == {
        "event": "e",
        "customer": {"source_id": "u1"},
        "loyalty": {"code": "l"},
        "referral": {"code": "r", "referrer_id": "i"},
    }
    assert who.notes == ["gpc_stripped"]
    assert what.id == "x-1"


def test_strip_keeps_both_names_of_a_customer() -> None:
    what = event(customer={"id": "i", "source_id": "s", "email": "a@b.example"})
    ruling = passed(policy(gpc="strip"), what, sender(gpc=True))
    assert ruling.customer == Customer(id="i", source_id="s")


def test_what_was_stripped_is_not_refused() -> None:
    rules = policy(
        rules=catalog('customer = ["source_id"]\nmetadata = {}'),
        restricted=True,
        gpc="strip",
    )
    what = event(customer=FULL, metadata={"k": 1})
    assert verdict(rules, what, sender(gpc=True)) is None


def test_strip_without_a_customer_leaves_it_to_the_token() -> None:
    ruling = passed(
        policy(gpc="strip"), event(customer=None), sender(token(), gpc=True)
    )
    assert ruling.customer == Customer(source_id="u1")


@pytest.mark.parametrize(
    "rules", [EMPTY, catalog(top='unlisted = "reject"')], ids=["empty", "reject"]
)
@pytest.mark.parametrize("name", ["e", "f"])
def test_drop_is_an_outcome_of_its_own_and_comes_first(
    rules: Catalog, name: str
) -> None:
    dropping = policy("required", rules=rules, gpc="drop")
    refusal = refused(dropping, event(name), sender(gpc=True, allowed=False))
    assert (refusal.outcome, refusal.reason) == (Outcome.DROPPED, "gpc")


# --- the ruling -------------------------------------------------------------------


def test_without_a_catalogue_the_defaults_count() -> None:
    ruling = passed(policy())
    assert ruling == Ruling(
        customer=Customer(source_id="u1"),
        lane="normal",
        delivery="at_least_once",
        ttl_ms=TTL_MS,
        special=None,
        signed=False,
    )


@pytest.mark.parametrize(
    ("rule", "parts", "delivery"),
    [
        ("", (), "at_least_once"),
        ("", ("loyalty",), "at_most_once"),
        ("", ("referral",), "at_most_once"),
        ("", ("loyalty", "referral"), "at_most_once"),
        ('delivery = "at_least_once"', ("loyalty",), "at_least_once"),
        ('delivery = "at_most_once"', (), "at_most_once"),
    ],
)
def test_money_is_delivered_once_at_most_unless_the_catalogue_says(
    rule: str, parts: tuple[str, ...], delivery: str
) -> None:
    what = event(**{part: {"code": "c"} for part in parts})  # type: ignore[arg-type]  # its own keywords
    assert passed(policy(rules=catalog(rule)), what).delivery == delivery


def test_priority_and_ttl_are_the_catalogues() -> None:
    rules = policy(
        rules=catalog(
            'priority = "high"\nttl = "2h"', top='priority = "low"\nttl = "90s"'
        )
    )
    listed, other = passed(rules, event("e")), passed(rules, event("f"))
    assert (listed.lane, listed.ttl_ms) == ("high", 7_200_000)
    assert (other.lane, other.ttl_ms) == ("low", 90_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """The ruling's tuple with names."""

    name: str
    coalesce_ms: int
    quota: int
    period_ms: int
    limit_dry_run: bool
    token: str
    uses: int
    life_ms: int
    token_dry_run: bool

    @classmethod
    def of(cls, ruling: Ruling) -> "Special":
        assert ruling.special is not None
        names = cls.__dataclass_fields__
        return cls(**dict(zip(names, ruling.special, strict=True)))  # type: ignore[arg-type]  # a tuple of mixed types


def test_most_events_have_nothing_special() -> None:
    plain = catalog('priority = "high"\ntoken = "required"\nloyalty = true')
    assert passed(policy(rules=plain), who=sender(token())).special is None
    assert passed(policy("dry_run"), who=sender(token())).special is None


def test_what_admission_has_to_count() -> None:
    rules = policy(rules=catalog('coalesce = "10m"\nlimit = "3/1d dry_run"'))
    special = Special.of(passed(rules))
    assert (special.coalesce_ms, special.quota, special.period_ms) == (
        600_000,
        3,
        86_400_000,
    )
    assert special.limit_dry_run
    assert (special.token, special.uses, special.life_ms) == ("", 0, 0)
    assert not special.token_dry_run


@pytest.mark.parametrize("mode", ["optional", "required", "dry_run"])
def test_uses_are_counted_under_the_token_for_as_long_as_it_counts(mode: str) -> None:
    said = token(uses=5, ttl_s=600, at=NOW - 100)
    special = Special.of(passed(policy(mode), who=sender(said)))
    assert (special.token, special.uses) == (SIGNER.read(said, now=NOW).digest, 5)
    assert 500_000 <= special.life_ms <= 500_000 + LEEWAY_S * 1000
    assert special.token_dry_run == (mode == "dry_run")
    assert special.token not in said


def test_a_token_that_does_not_count_has_no_uses() -> None:
    said = token(uses=5)
    assert passed(policy("off"), who=sender(said)).special is None
    forged = sender(token(uses=5, key=OTHER_KEY))
    assert passed(policy("dry_run"), who=forged).special is None


def test_two_tokens_of_one_moment_have_uses_of_their_own() -> None:
    one, two = (
        Special.of(passed(policy(), who=sender(token(uses=1)))).token for _ in range(2)
    )
    assert one != two


def test_events_are_told_apart_by_a_digest_of_their_name() -> None:
    rules = policy(rules=catalog(top='limit = "3/1d"'))
    names = ["f", "F", "f ", "f:g", "\0", "f" * 300, "f" * 299, "ﬀ", "ff"]
    made = {Special.of(passed(rules, event(name))).name for name in names}
    assert len(made) == len(names)
    assert all(re.fullmatch(r"[0-9a-f]{18}", digest) for digest in made)


# --- the property that says when it happened --------------------------------------

AT, LATER = "2027-01-15T08:00:00.000Z", "2027-01-15T07:59:58.500Z"


def own(
    rules: Catalog,
    what: Event | None = None,
    who: Sender | None = None,
    *,
    gpc: str = "ignore",
) -> object:
    """What the relay says itself, as Voucherify gets it; None for no metadata."""
    what = what or event()
    ruling = passed(policy(rules=rules, gpc=gpc), what, who)
    body = upstream_body(what, ruling.customer, ruling.own)
    assert b"age" not in body
    return json.loads(body).get("metadata")


@pytest.mark.parametrize("known", [True, False], ids=["token", "anonymous"])
@pytest.mark.parametrize(
    ("name", "rule", "top"),
    [
        ("e", 'occurred_at = "at"', ""),
        ("E ", 'occurred_at = "at"', ""),
        ("f", "", 'occurred_at = "at"'),
    ],
    ids=["listed", "like-a-listed-one", "not-listed"],
)
def test_the_relay_says_when_it_happened(
    name: str, rule: str, top: str, known: bool
) -> None:
    rules = catalog(rule, top=top)
    cases: list[tuple[dict[str, object], object]] = [
        ({}, {"at": AT}),
        ({"age": 1_500}, {"at": LATER}),
        ({"age": 1_500, "metadata": {"n": 1}}, {"n": 1, "at": LATER}),
        ({"metadata": {"at": "never"}}, {"at": AT}),
    ]
    for parts, said in cases:
        what = event(name, **parts)
        assert own(rules, what, sender(token() if known else None)) == said


@pytest.mark.parametrize("rule", ["", 'metadata = { at = "datetime" }'])
def test_without_the_rule_nothing_is_said_and_the_age_goes_no_further(
    rule: str,
) -> None:
    rules = catalog(rule, top='occurred_at = "at"')
    assert own(rules, event(age=1_500)) is None
    what = event(age=1_500, metadata={"at": LATER})
    assert own(rules, what) == {"at": LATER}
    assert passed(policy(rules=rules), event(age=1_500)).own is None


VERIFY = 'delivery = "verify"\nevent_id = "n"'


def test_the_relay_says_the_id_of_the_event() -> None:
    rules = catalog('event_id = "n"\noccurred_at = "at"')
    assert own(rules, event(metadata={"n": "forged"})) == {"n": OWN_ID, "at": AT}


@pytest.mark.parametrize(
    ("server", "signal", "metadata", "delivery"),
    [
        (True, False, None, "verify:n"),
        (True, False, {"n": "forged"}, "verify:n"),
        # Nobody to ask, or nothing to find it by: then never a second time.
        (False, False, None, "at_most_once"),
        (True, True, {"n": "forged"}, "at_most_once"),
    ],
)
def test_only_what_can_be_found_again_is_looked_up(
    server: bool, signal: bool, metadata: object, delivery: str
) -> None:
    rules = Policy(ttl_ms=1, catalog=catalog(VERIFY), gpc="strip", verifies=server)
    ruling = passed(rules, event(metadata=metadata), sender(gpc=signal))
    assert ruling.delivery == delivery
    assert ruling.own == ({} if signal else {"n": OWN_ID})


def test_what_a_page_says_in_its_place_is_not_looked_at() -> None:
    rules = catalog('occurred_at = "at"\nmetadata = { n = "number" }')
    values: list[object] = ["never", 5, None, [{}]]
    for said in values:
        assert own(rules, event(metadata={"at": said, "n": 1})) == {"at": AT, "n": 1}
    for metadata, reason in (
        ({"x": 1}, "metadata_field"),
        ({"n": ""}, "metadata_type"),
    ):
        what = event(metadata={"at": "never", **metadata})
        assert verdict(policy(rules=rules), what) == forbidden(reason)


@pytest.mark.parametrize("gpc", ["ignore", "strip"])
@pytest.mark.parametrize("signal", [True, False])
def test_where_metadata_is_stripped_the_time_is_left_out_too(
    gpc: str, signal: bool
) -> None:
    rules = catalog('occurred_at = "at"')
    what = event(age=1_500, metadata={"n": 1})
    stripped = signal and gpc == "strip"
    said = own(rules, what, sender(gpc=signal), gpc=gpc)
    assert said == (None if stripped else {"n": 1, "at": LATER})


@pytest.mark.parametrize(
    ("gpc", "said"),
    [
        ("ignore", f'occurred_at: "at" in metadata is {LATER} (events.e.occurred_at)'),
        ("strip", "own metadata: left out: the privacy signal takes all metadata"),
    ],
)
def test_what_the_relay_says_itself_is_told_with_its_rule(gpc: str, said: str) -> None:
    told: list[str] = []
    rules = policy(rules=catalog('occurred_at = "at"'), gpc=gpc)
    rules.judge(
        event(age=1_500),
        sender(gpc=True),
        event_id=OWN_ID,
        now=NOW,
        say=lambda rule, came: told.append(f"{rule}: {came}"),
    )
    assert told[-1] == said


# --- what people are told ---------------------------------------------------------


def test_each_rule_that_was_met_is_said() -> None:
    said: list[tuple[str, str]] = []
    rules = policy(rules=catalog("loyalty = true"), restricted=True, gpc="strip")
    rules.judge(
        event(),
        sender(token(), gpc=True),
        event_id=OWN_ID,
        now=NOW,
        say=lambda rule, came: said.append((rule, came)),
    )
    assert [rule for rule, _ in said] == [
        "privacy signal",
        "catalogue",
        "token",
        "fields",
    ]
    assert "events.e" in said[1][1]
    told = repr(said)
    assert "u1" not in told
    assert token() not in told


def test_what_says_no_is_the_last_that_is_said() -> None:
    said: list[str] = []
    with pytest.raises(Refused):
        policy("required").judge(
            event(),
            sender(),
            event_id=OWN_ID,
            now=NOW,
            say=lambda rule, _: said.append(rule),
        )
    assert said == ["catalogue"]


# --- every refusal ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How an event meets a refusal."""

    outcome: Outcome = Outcome.FORBIDDEN
    rules: Policy
    what: Callable[[], Event] = event
    who: Callable[[], Sender] = sender


PART = {"code": "c"}
CASES: dict[str, Case] = {
    "gpc": Case(
        outcome=Outcome.DROPPED,
        rules=policy(gpc="drop"),
        who=lambda: sender(gpc=True),
    ),
    "event_unlisted": Case(
        rules=policy(rules=catalog(top='unlisted = "reject"')),
        what=lambda: event("f"),
    ),
    "token_missing": Case(outcome=Outcome.UNAUTHENTICATED, rules=policy("required")),
    "token_unexpected": Case(
        outcome=Outcome.UNAUTHENTICATED,
        rules=policy(signer=None),
        who=lambda: sender(token()),
    ),
    **{
        reason: Case(
            outcome=Outcome.UNAUTHENTICATED,
            rules=policy(),
            who=lambda kind=kind: sender(TOKENS[kind]),  # type: ignore[misc]  # bound now
        )
        for kind, reason in REASONS.items()
        if kind != "none"
    },
    "token_event": Case(rules=policy(), who=lambda: sender(token(events=["other"]))),
    "token_origin": Case(
        rules=policy(), who=lambda: sender(token(origin="https://other.example"))
    ),
    "customer_mismatch": Case(rules=policy(), who=lambda: sender(token("u2"))),
    "origin": Case(rules=policy(), who=lambda: sender(origin=None, allowed=False)),
    "customer_missing": Case(
        outcome=Outcome.INVALID, rules=policy(), what=lambda: event(customer=None)
    ),
    "customer_unidentified": Case(
        outcome=Outcome.INVALID, rules=policy(), what=lambda: event(customer={})
    ),
    "customer_field": Case(
        rules=policy(restricted=True), what=lambda: event(customer=FULL)
    ),
    "loyalty": Case(rules=policy(restricted=True), what=lambda: event(loyalty=PART)),
    "referral": Case(rules=policy(restricted=True), what=lambda: event(referral=PART)),
    "metadata_field": Case(
        rules=policy(rules=catalog(TYPES)), what=lambda: event(metadata={"x": 1})
    ),
    "metadata_type": Case(
        rules=policy(rules=catalog(TYPES)), what=lambda: event(metadata={"s": 1})
    ),
}


@pytest.mark.parametrize("reason", CASES)
def test_a_refusal_has_its_outcome_and_a_whole_sentence(reason: str) -> None:
    case = CASES[reason]
    refusal = refused(case.rules, case.what(), case.who())
    assert (refusal.outcome, refusal.reason) == (case.outcome, reason)
    assert refusal.detail.endswith(".")
    assert "  " not in refusal.detail
    assert refusal.detail.isprintable()


def test_a_refusal_by_the_catalogue_names_the_key_in_it() -> None:
    shut = policy(rules=catalog("loyalty = false"))
    assert "events.e.loyalty is false" in refused(shut, event(loyalty=PART)).detail
    few = policy(restricted=True)
    assert "defaults.loyalty = true" in refused(few, event(loyalty=PART)).detail


def reasons_in(*functions: object) -> set[str]:
    """Every reason code that the sources of these write down."""
    found: set[str] = set()
    for function in functions:
        source = inspect.getsource(function)  # type: ignore[arg-type]  # modules too
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            place = {"Refused": 1, "_named": 1}.get(node.func.id, 0)
            if node.func.id not in (
                "Refused",
                "_named",
                "_forbidden",
                "_unauthenticated",
                "TokenRefused",
            ):
                continue
            if len(node.args) > place and isinstance(node.args[place], ast.Constant):
                found.add(str(node.args[place].value))  # type: ignore[attr-defined]  # just looked
    return found


def test_no_reason_is_missing_from_the_table() -> None:
    written = reasons_in(relay.policy, relay.signing, relay.events.identified)
    fault = inspect.getsource(relay.catalog.metadata_fault)
    written |= set(re.findall(r'reason = "(\w+)"', fault))
    assert written | {"loyalty", "referral"} == set(CASES)


# --- what a refusal must not tell -------------------------------------------------

CANARY = "CANARY"
canaries = st.integers(0, 999).map(lambda n: f"{CANARY}-{n}")
parts = st.fixed_dictionaries({}, optional={"code": canaries, "referrer_id": canaries})
anything = (
    canaries
    | st.lists(canaries, max_size=2)
    | st.dictionaries(st.sampled_from("ab"), canaries, max_size=2)
)
events_said = st.fixed_dictionaries(
    {"event": canaries | st.sampled_from("ef")},
    optional={
        "customer": st.fixed_dictionaries(
            {},
            optional={
                "metadata": st.dictionaries(st.sampled_from("ab"), anything),
                "address": st.fixed_dictionaries({"city": canaries}),
                **{
                    name: canaries
                    for name in CUSTOMER_FIELDS
                    if name not in ("metadata", "address", "birthday", "birthdate")
                },
            },
        ),
        "loyalty": st.fixed_dictionaries({"code": canaries}),
        "referral": parts.filter(lambda part: "code" in part),
        "metadata": st.dictionaries(st.sampled_from([*"snbdtax"]), anything),
    },
)
tokens_said = st.sampled_from(
    [
        None,
        token(f"{CANARY}-1"),
        token(f"{CANARY}-1", events=[f"{CANARY}-event"]),
        token(f"{CANARY}-1", origin=f"https://{CANARY.lower()}.example"),
        token(f"{CANARY}-1", at=NOW - 9_999),
        token(f"{CANARY}-1", at=NOW + 9_999),
        token(f"{CANARY}-1", key=OTHER_KEY),
        token(f"{CANARY}-1")[:-1],
        signed({"source_id": f"{CANARY}-1", "ttl": CANARY}),
        signed({"source_id": [CANARY]}),
        signed({"source_id": CANARY, "origin": CANARY}),
        signed({"source_id": CANARY, "events": CANARY}),
        f"{CANARY}.{CANARY}.{CANARY}",
        "é" + CANARY,
        CANARY * 1_000,
    ]
)
policies = st.builds(
    policy,
    st.sampled_from(MODES),
    rules=st.sampled_from(
        [
            EMPTY,
            catalog(TYPES),
            catalog('customer = ["source_id"]', top='unlisted = "reject"'),
            catalog("loyalty = false", top="referral = false\nmetadata = {}"),
            catalog('token = "required"\ncustomer = ["email"]'),
        ]
    ),
    signer=st.sampled_from([SIGNER, None]),
    restricted=st.booleans(),
    gpc=st.sampled_from(["ignore", "strip", "drop"]),
)


@given(
    rules=policies,
    body=events_said,
    mine=tokens_said,
    theirs=tokens_said,
    allowed=st.booleans(),
    gpc=st.booleans(),
)
@example(
    rules=policy(rules=catalog(TYPES)),
    body={
        "event": "e",
        "customer": {"id": CANARY},
        "metadata": {"n": CANARY},
    },
    mine=None,
    theirs=None,
    allowed=True,
    gpc=False,
)
def test_no_refusal_repeats_a_value_or_a_token(
    rules: Policy,
    body: dict[str, object],
    mine: str | None,
    theirs: str | None,
    allowed: bool,
    gpc: bool,
) -> None:
    what = read_event(json.dumps({**body, "token": mine}).encode())
    origin = f"https://{CANARY.lower()}.other.example" if allowed else None
    who = sender(theirs, origin=origin, allowed=allowed, gpc=gpc)
    said: list[str] = []
    try:
        ruling = rules.judge(
            what,
            who,
            event_id=OWN_ID,
            now=NOW,
            say=lambda rule, came: said.extend((rule, came)),
        )
    except Refused as refusal:
        said.append(refusal.detail)
        known = CASES[refusal.reason].outcome is refusal.outcome
        named = (refusal.name, refusal.id) == (what.event, what.id)
        sound = known and named
    else:
        sound = True
        assert CANARY not in repr(ruling.special)
        assert (mine or theirs) is not None or who.allowed
        body_sent = upstream_body(what, ruling.customer).decode()
        for secret in (mine, theirs):
            assert secret is None or secret not in body_sent
    assert sound
    told = " ".join([*said, *who.notes])
    assert CANARY.lower() not in told.lower()
    for secret in (mine, theirs):
        assert not secret or secret not in told


# --- what nobody gets round --------------------------------------------------------


def trial(ruling: Ruling) -> bool:
    """Whether a token that is used up would only be counted."""
    assert ruling.special is not None
    return ruling.special[-1]


@pytest.mark.parametrize(
    ("parts", "allowed", "expected"),
    [
        ({}, True, True),
        ({"loyalty": {"code": "L"}}, True, False),
        ({"customer": {"email": "a@shop.example"}}, True, False),
        ({}, False, False),
        ({"customer": None}, True, False),
    ],
    ids=["as-anybody", "loyalty", "profile", "no-origin", "nobody-named"],
)
def test_a_trial_lets_a_used_up_token_pass_only_where_none_would_do(
    parts: dict[str, object], allowed: bool, expected: bool
) -> None:
    rules = policy("dry_run", restricted=True)
    who = sender(token(uses=1), allowed=allowed)
    what = event(**parts)  # type: ignore[arg-type]  # its own keywords
    assert trial(passed(rules, what, who)) is expected


@pytest.mark.parametrize("name", [" e", "e ", "E", "\te"])
def test_a_name_that_looks_like_a_listed_one_meets_its_rule(name: str) -> None:
    rules = policy(rules=catalog('token = "required"'))
    assert verdict(rules, event(name)) == unauthenticated("token_missing")
    assert verdict(rules, event("else")) is None


def test_every_spelling_of_a_name_counts_against_one_limit() -> None:
    rules = policy(rules=catalog('limit = "3/1d"'))
    digests = {
        special[0]
        for name in ("e", "E", " e", "e\t")
        if (special := passed(rules, event(name)).special) is not None
    }
    assert len(digests) == 1


def test_a_customer_that_a_token_names_is_told_apart() -> None:
    assert passed(policy(), event(), sender(token())).signed is True
    assert passed(policy()).signed is False
