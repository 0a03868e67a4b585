"""Who may say what: each rule, each reason, and what passes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.catalog import EMPTY, Catalog, parse_catalog
from relay.events import Event, Refused, read_event
from relay.outcomes import Outcome
from relay.policy import Policy, Ruling, Sender
from relay.signing import LEEWAY_S, Signer

NOW = 1_800_000_000
KEY, OTHER = "k" * 32, "o" * 32
SHOP = "https://shop.example"
SIGNER = Signer([KEY])


def token(source_id: str = "u1", *, now: int = NOW, **claims: object) -> str:
    signed, _ = SIGNER.sign(source_id=source_id, now=now, **claims)  # type: ignore[arg-type]
    return signed


FORGED, _ = Signer([OTHER]).sign(source_id="u1", now=NOW)
EXPIRED = token(now=NOW - 7200, ttl_s=3600)
EARLY = token(now=NOW + LEEWAY_S + 10)


def catalog(text: str) -> Catalog:
    return parse_catalog(text, max_ttl_s=259_200)


def policy(
    text: str = "", *, signer: Signer | None = SIGNER, **rules: object
) -> Policy:
    return Policy(
        ttl_ms=1000,
        catalog=catalog(text) if text else EMPTY,
        signer=signer,
        **rules,  # type: ignore[arg-type]  # the test names them right
    )


def event(**parts: object) -> Event:
    made = {"event": "e", "customer": {"source_id": "u1"}, **parts}
    return read_event(json.dumps(made).encode())


def passes(of: Policy, made: Event, sender: Sender | None = None) -> Ruling:
    return of.judge(made, sender or Sender(origin=SHOP), now=NOW)


def refused(
    of: Policy, made: Event, sender: Sender | None = None
) -> tuple[Outcome, str]:
    with pytest.raises(Refused) as caught:
        passes(of, made, sender)
    fault = caught.value
    assert (fault.name, fault.id) == (made.event, made.id)
    assert fault.detail.endswith(".")
    return fault.outcome, fault.reason


UNKNOWN, FORBIDDEN = Outcome.UNAUTHENTICATED, Outcome.FORBIDDEN

# --- the token ------------------------------------------------------------------------

TOKENS = {
    "none": (None, "token_missing"),
    "valid": (token(), None),
    "expired": (EXPIRED, "token_expired"),
    "forged": (FORGED, "token_forged"),
    "malformed": ("no token", "token_malformed"),
    "empty": ("", "token_malformed"),
    "early": (EARLY, "token_not_yet_valid"),
}


@pytest.mark.parametrize("rule", ["off", "optional", "required", "dry_run"])
@pytest.mark.parametrize("by", ["setting", "catalogue"])
@pytest.mark.parametrize(("given_", "reason"), TOKENS.values(), ids=TOKENS)
def test_the_token_rule(
    given_: str | None, reason: str | None, by: str, rule: str
) -> None:
    of = (
        policy(tokens=rule)
        if by == "setting"
        # The catalogue wins, whatever the setting says.
        else policy(
            f'[events.e]\ntoken = "{rule}"\n',
            tokens="off" if rule == "required" else "required",
        )
    )
    sender = Sender(origin=SHOP)
    made = event(token=given_)
    if rule == "off" or reason is None or (rule == "optional" and given_ is None):
        passes(of, made, sender)
        assert sender.notes == []
    elif rule == "dry_run":
        passes(of, made, sender)
        assert sender.notes == ["would_refuse:token"]
    else:
        assert refused(of, made, sender) == (UNKNOWN, reason)


def test_a_token_that_cannot_be_checked_is_refused_and_not_ignored() -> None:
    of = policy(signer=None)
    assert refused(of, event(token=token())) == (UNKNOWN, "token_unexpected")
    passes(of, event())
    passes(policy(signer=None, tokens="off"), event(token=token()))


@pytest.mark.parametrize(
    "customer", [None, {}, {"source_id": "u1"}, {"name": "Zoë"}], ids=str
)
def test_with_a_token_the_customer_is_the_tokens(customer: object) -> None:
    ruling = passes(policy(), event(customer=customer, token=token("u1")))
    assert ruling.customer.source_id == "u1"


@pytest.mark.parametrize(
    "customer",
    [
        {"source_id": "u2"},
        {"source_id": ""},
        {"source_id": "u1", "id": "cust_2"},
        {"id": "cust_2"},
    ],
    ids=str,
)
def test_a_body_that_names_another_customer_is_forbidden(customer: object) -> None:
    made = event(customer=customer, token=token("u1"))
    assert refused(policy(), made) == (FORBIDDEN, "customer_mismatch")


def test_a_token_counts_for_its_events_and_its_origin_only() -> None:
    narrow = token(events=["paid"])
    assert refused(policy(), event(token=narrow)) == (FORBIDDEN, "token_event")
    passes(policy(), event(event="paid", token=narrow))
    tied = event(token=token(origin=SHOP))
    passes(policy(), tied)
    for origin in ("https://other.example", None):
        sender = Sender(origin=origin)
        assert refused(policy(), tied, sender) == (FORBIDDEN, "token_origin")


def test_the_events_own_token_goes_before_that_of_the_request() -> None:
    sender = Sender(origin=SHOP, token=token("u2"))
    assert passes(policy(), event(customer=None), sender).customer.source_id == "u2"
    made = event(customer=None, token=token("u1"))
    assert passes(policy(), made, sender).customer.source_id == "u1"


def test_without_an_allowed_origin_a_valid_token_is_needed() -> None:
    nobody = Sender(allowed=False)
    assert refused(policy(), event(), nobody) == (FORBIDDEN, "origin")
    passes(policy(), event(token=token()), nobody)
    # Not even in a dry run, which takes an event as if it had no token.
    trial = policy(tokens="dry_run")
    assert refused(trial, event(token=FORGED), nobody) == (FORBIDDEN, "origin")
    assert refused(policy(tokens="off"), event(token=token()), nobody) == (
        FORBIDDEN,
        "origin",
    )


def test_without_a_token_the_customer_must_be_named() -> None:
    outcome = Outcome.INVALID
    assert refused(policy(), event(customer=None)) == (outcome, "customer_missing")
    assert refused(policy(), event(customer={})) == (outcome, "customer_unidentified")


# --- fields ---------------------------------------------------------------------------

PROFILE = {"source_id": "u1", "email": "a@b.example"}
FIELDS = {
    "customer_field": {"customer": PROFILE},
    "loyalty": {"loyalty": {"code": "C"}},
    "referral": {"referral": {"code": "C"}},
}
OPENED = (
    '[events.e]\ncustomer = ["source_id", "email"]\nloyalty = true\nreferral = true'
)


@pytest.mark.parametrize(("reason", "parts"), FIELDS.items(), ids=FIELDS)
def test_what_an_anonymous_sender_may_set(
    reason: str, parts: dict[str, object]
) -> None:
    restricted = policy(restricted=True)
    assert refused(restricted, event(**parts)) == (FORBIDDEN, reason)
    passes(policy(), event(**parts))  # trusted
    passes(policy(OPENED, restricted=True), event(**parts))
    passes(restricted, event(**parts, token=token()))


@pytest.mark.parametrize("name", ["id", "source_id"])
def test_a_restricted_sender_may_say_who_it_is_and_send_metadata(name: str) -> None:
    made = event(customer={name: "u1"}, metadata={"n": 1})
    assert passes(policy(restricted=True), made).delivery == "at_least_once"


@pytest.mark.parametrize("part", ["loyalty", "referral"])
def test_what_the_catalogue_closes_is_closed_for_everyone(part: str) -> None:
    of = policy(f"[events.e]\n{part} = false\n")
    made = event(**{part: {"code": "C"}, "token": token()})
    assert refused(of, made) == (FORBIDDEN, part)


def test_the_catalogues_list_of_fields_counts_with_a_token_too() -> None:
    of = policy('[events.e]\ntoken = "required"\ncustomer = ["email"]\n')
    passes(of, event(customer=PROFILE, token=token()))
    more = event(customer=PROFILE | {"name": "Zoë"}, token=token())
    assert refused(of, more) == (FORBIDDEN, "customer_field")
    # Null says something, too: it empties the address at Voucherify.
    gone = event(customer={"source_id": "u1", "address": None}, token=token())
    assert refused(of, gone) == (FORBIDDEN, "customer_field")


def test_metadata_is_held_to_its_names_and_types() -> None:
    of = policy('[events.e]\nmetadata = { n = "number" }\n')
    passes(of, event(metadata={"n": 1}))
    assert refused(of, event(metadata={"n": "1"})) == (FORBIDDEN, "metadata_type")
    assert refused(of, event(metadata={"m": 1})) == (FORBIDDEN, "metadata_field")


def test_unlisted_events_can_be_refused() -> None:
    of = policy('[defaults]\nunlisted = "reject"\n[events.known]\n')
    assert refused(of, event()) == (FORBIDDEN, "event_unlisted")
    passes(of, event(event="known"))


# --- the privacy signal ---------------------------------------------------------------

WHOLE = {
    "customer": PROFILE | {"name": "Zoë"},
    "metadata": {"n": 1},
    "loyalty": {"code": "L"},
    "referral": {"code": "R"},
}


def test_the_privacy_signal_takes_the_profile_and_keeps_who_it_is() -> None:
    made, sender = event(**WHOLE), Sender(origin=SHOP, gpc=True)
    ruling = passes(policy(gpc="strip"), made, sender)
    assert made.metadata is None
    assert (ruling.customer.source_id, ruling.customer.email) == ("u1", None)
    assert ruling.customer.name is None
    assert made.loyalty is not None
    assert made.referral is not None
    assert sender.notes == ["gpc_stripped"]


def test_the_privacy_signal_can_drop_before_anything_else_is_looked_at() -> None:
    of = policy(gpc="drop", tokens="required")
    sender = Sender(origin=SHOP, gpc=True)
    assert refused(of, event(token=FORGED), sender) == (Outcome.DROPPED, "gpc")


@pytest.mark.parametrize(("gpc", "signal"), [("ignore", True), ("strip", False)])
def test_no_signal_and_no_rule_change_nothing(gpc: str, signal: bool) -> None:
    made = event(**WHOLE)
    assert passes(policy(gpc=gpc), made, Sender(gpc=signal)).customer.name == "Zoë"
    assert made.metadata == {"n": 1}


# --- how it is handled ----------------------------------------------------------------


def test_the_catalogue_says_how_an_event_is_handled() -> None:
    text = """[events.e]
priority = "low"
ttl = "2h"
delivery = "at_least_once"
coalesce = "10m"
limit = "3/1d dry_run"
loyalty = true
"""
    ruling = passes(policy(text), event(loyalty={"code": "C"}))
    assert (ruling.lane, ruling.ttl_ms) == ("low", 7_200_000)
    assert ruling.delivery == "at_least_once"
    assert ruling.special is not None
    assert ruling.special[1:] == (600_000, 3, 86_400_000, True, "", 0, 0, False)


def test_what_pays_is_sent_once_by_default() -> None:
    for part in ("loyalty", "referral"):
        ruling = passes(policy(), event(**{part: {"code": "C"}}))
        assert ruling.delivery == "at_most_once"
    plain = passes(policy(), event())
    assert (plain.lane, plain.delivery) == ("normal", "at_least_once")
    assert (plain.ttl_ms, plain.special) == (1000, None)


def test_the_uses_of_a_token_are_counted_longer_than_it_lives() -> None:
    made = token(uses=2, ttl_s=60)
    special = passes(policy(), event(token=made)).special
    assert special is not None
    digest = SIGNER.read(made, now=NOW).digest
    assert special[5:] == (digest, 2, (60 + LEEWAY_S) * 1000, False)
    # Without uses nothing has to be counted.
    assert passes(policy(), event(token=token())).special is None


def test_each_rule_that_is_met_is_told() -> None:
    told: list[str] = []
    sender = Sender(origin=SHOP, gpc=True)
    policy().judge(event(), sender, now=NOW, say=lambda rule, _: told.append(rule))
    assert told == ["privacy signal", "catalogue", "token", "fields"]


def detail(of: Policy, made: Event) -> str:
    try:
        passes(of, made)
    except Refused as fault:
        return fault.detail
    return ""


CANARY = st.text("cånary", min_size=6, max_size=12)


@given(CANARY, CANARY, st.sampled_from(["optional", "required"]), st.booleans())
def test_no_refusal_shows_what_was_sent(
    person: str, value: str, tokens: str, restricted: bool
) -> None:
    of = policy(
        '[events.e]\nmetadata = { n = "number" }\ncustomer = ["source_id", "phone"]\n',
        tokens=tokens,
        restricted=restricted,
    )
    for parts in (
        {"metadata": {"n": value}},
        {"customer": {"source_id": person, "email": value}},
        {"customer": {"source_id": person}, "token": token("somebody")},
        {"customer": {"source_id": person}, "token": value},
        {"customer": {"source_id": person}, "loyalty": {"code": value}},
    ):
        said = detail(of, event(**parts))
        assert person not in said
        assert value not in said


def test_a_rule_is_found_by_the_whole_name() -> None:
    of = policy('[defaults]\ntoken = "required"\n[events."a.b"]\ntoken = "off"\n')
    passes(of, event(event="a.b"))
    assert refused(of, event(event="a")) == (UNKNOWN, "token_missing")
