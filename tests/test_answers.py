"""The same decision in the words of two routes: the relay's own and Voucherify's."""

import gzip
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from relay.addresses import TrustedProxies
from relay.answers import DONE, STATUS, Beacons, Official, Refusal, Response
from relay.catalog import EMPTY, Catalog, parse_catalog
from relay.digests import Digests
from relay.edge import MAX_BODY_BYTES, Admitted, Edge, Fate, Head
from relay.headers import Header, fields_of
from relay.limits import parse_limits
from relay.origins import AllowedOrigins
from relay.outcomes import Outcome
from relay.policy import Policy
from relay.signing import Signer

NOW = 1_800_000_000
SHOP = b"https://shop.example"
PEER = "192.0.2.1"
SIGNER = Signer(["k" * 40])
TOKEN, _ = SIGNER.sign(source_id="u1", now=NOW)
FORGED, _ = Signer(["o" * 40]).sign(source_id="u1", now=NOW)
JSON_TYPE = (b"content-type", b"application/json")
ORIGIN = (b"origin", SHOP)
PLAIN = [ORIGIN, JSON_TYPE]
EVENT: dict[str, object] = {"event": "e", "customer": {"source_id": "u1"}}
QUEUED = Fate(status="queued")

# Everything that Voucherify would keep, and all that the relay keeps to itself.
FULL: dict[str, object] = {
    "event": "signed_up",
    "id": "x-1",
    "customer": {
        "id": "cust_1",
        "source_id": "u1",
        "name": "Ann",
        "email": "ann@shop.example",
        "metadata": {"vip": True},
    },
    "referral": {"code": "R-1", "referrer_id": "cust_2"},
    "loyalty": {"code": "L-1"},
    "metadata": {"plan": "pro", "seats": 3, "tags": ["a"], "note": None},
}


def route(
    dialect: Beacons | Official,
    *,
    catalog: Catalog = EMPTY,
    tokens: str = "optional",
    restricted: bool = False,
    gpc: str = "ignore",
    limits: str = "off",
) -> Edge:
    return Edge(
        origins=AllowedOrigins([SHOP.decode()]),
        proxies=TrustedProxies(["private"]),
        limits=parse_limits(limits),
        digests=Digests(b"k"),
        policy=Policy(
            ttl_ms=1000,
            catalog=catalog,
            signer=SIGNER,
            tokens=tokens,
            restricted=restricted,
            gpc=gpc,
        ),
        dialect=dialect,
    )


def raw(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def judged(
    edge: Edge, body: object, headers: list[Header], method: str = "POST"
) -> Admitted | Response:
    head = edge.head(method, fields_of(headers), PEER)
    return edge.body(head, raw(body), now=NOW) if isinstance(head, Head) else head


def answered(
    edge: Edge,
    body: object = EVENT,
    headers: list[Header] = PLAIN,
    fate: Fate = QUEUED,
) -> Response:
    """The answer, where admission says the same of every event."""
    found = judged(edge, body, headers)
    if isinstance(found, Response):
        return found
    return edge.answer(found, [fate] * len(found.events), None)


def fields(response: Response) -> dict[str, str]:
    names = [name for name, _ in response.headers]
    assert len(set(names)) == len(names), names  # each header once
    return {name.decode(): value.decode() for name, value in response.headers}


def said(response: Response) -> dict[str, object]:
    told: dict[str, object] = json.loads(response.body)
    return told


def entries(response: Response) -> list[dict[str, object]]:
    told: list[dict[str, object]] = json.loads(response.body)["events"]
    return told


SDK = route(Official())
TRACK = route(Beacons())


# --- success, as Voucherify says it -----------------------------------------------


def test_a_success_is_the_event_object_to_the_letter() -> None:
    response = answered(SDK, FULL)
    assert response.status == 200
    assert fields(response)["content-type"] == "application/json"
    assert response.body == (
        b'{"object":"event","type":"signed_up","customer":{"object":"customer",'
        b'"id":"cust_1","source_id":"u1"},"referral":null,"loyalty":null,'
        b'"metadata":{"plan":"pro","seats":3,"tags":["a"],"note":null}}'
    )


@pytest.mark.parametrize(
    ("customer", "told"),
    [
        ({"source_id": "u1"}, {"source_id": "u1"}),
        ({"id": "i"}, {"id": "i"}),
        ({"id": "i", "source_id": "u1"}, {"id": "i", "source_id": "u1"}),
        ({"id": "", "source_id": "u1"}, {"source_id": "u1"}),
        ({"id": None, "source_id": "u1"}, {"source_id": "u1"}),
        ({"source_id": "u1", "email": "a@b.example"}, {"source_id": "u1"}),
        ({"source_id": "u1", "address": {"city": "c"}}, {"source_id": "u1"}),
    ],
)
def test_of_a_customer_only_the_names_are_told(
    customer: object, told: dict[str, str]
) -> None:
    response = answered(SDK, {"event": "e", "customer": customer})
    assert said(response)["customer"] == {"object": "customer", **told}


@pytest.mark.parametrize("metadata", [{}, None, {"metadata": {}}, {"metadata": None}])
def test_metadata_is_an_object_also_when_it_is_absent(metadata: object) -> None:
    parts = metadata if isinstance(metadata, dict) else {}
    assert said(answered(SDK, {**EVENT, **parts}))["metadata"] == {}


@pytest.mark.parametrize("status", ["queued", "duplicate", "coalesced"])
def test_whatever_the_sender_is_done_with_is_a_success(status: str) -> None:
    response = answered(SDK, fate=Fate(status=status))
    assert (response.status, said(response)["object"]) == (200, "event")
    assert response.body == answered(SDK).body  # and tells nobody which it was
    own = answered(TRACK, fate=Fate(status=status))
    assert own.status == 202
    assert entries(own) == [{"id": entries(own)[0]["id"], "status": status}]


def test_the_outcome_of_a_wait_is_told_on_the_own_route_alone() -> None:
    known = Fate(status="queued", outcome={"outcome": "rejected", "error": "secret"})
    waiting = [*PLAIN, (b"prefer", b"wait=5")]
    own, official = (answered(edge, EVENT, waiting, known) for edge in (TRACK, SDK))
    assert b"rejected" in own.body
    assert official.body == answered(SDK).body
    for response in (own, official):
        assert fields(response)["preference-applied"] == "wait=5"


def test_a_token_is_not_repeated_and_its_customer_is() -> None:
    response = answered(SDK, {"event": "e", "token": TOKEN})
    assert TOKEN.encode() not in response.body
    assert said(response)["customer"] == {"object": "customer", "source_id": "u1"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    name=st.text(min_size=1, max_size=30),
    source_id=st.text(min_size=1, max_size=30),
    metadata=st.none() | st.dictionaries(st.text(max_size=9), json_values, max_size=4),
)
def test_an_answer_is_made_of_the_senders_own_words(
    name: str, source_id: str, metadata: object
) -> None:
    body = {"event": name, "customer": {"source_id": source_id}, "metadata": metadata}
    found = judged(SDK, body, PLAIN)
    if isinstance(found, Response):  # nested too deeply
        assert found.refusals[0][1] == "too_deep"
        return
    told = said(SDK.answer(found, [QUEUED], None))
    assert list(told) == [
        "object",
        "type",
        "customer",
        "referral",
        "loyalty",
        "metadata",
    ]
    assert told["type"] == name
    assert told["customer"] == {"object": "customer", "source_id": source_id}
    assert told["metadata"] == (metadata or {})


# --- errors, as Voucherify says them ----------------------------------------------

NEEDS_TOKEN = route(Official(), tokens="required")
LIMITED = Fate(
    status="rate_limited",
    reason="rate_limited_customer",
    detail="Too many events for this customer: try again in 7 s.",
    retry_after=7,
)
AWAY = Fate(
    status="unavailable", reason="redis_full", detail="Try again soon.", retry_after=2
)


def errors() -> dict[str, tuple[int, str, str, Response]]:
    """For each error: its status, Voucherify's key, our reason, and the answer."""
    head = SDK.head("POST", dict(PLAIN), PEER)
    assert isinstance(head, Head)
    wrong = SDK.head("GET", dict(PLAIN), PEER)
    assert isinstance(wrong, Response)
    text = [ORIGIN, (b"content-type", b"text/plain")]
    stranger = [(b"origin", b"https://evil.example"), JSON_TYPE]
    return {
        "invalid": (400, "invalid_payload", "malformed_json", answered(SDK, b"{")),
        "batch": (400, "invalid_payload", "one_event", answered(SDK, [EVENT])),
        "no-token": (401, "unauthorized", "token_missing", answered(NEEDS_TOKEN)),
        "used-up": (
            401,
            "unauthorized",
            "token_used_up",
            answered(
                SDK,
                fate=Fate(
                    status="unauthenticated", reason="token_used_up", detail="Get one."
                ),
            ),
        ),
        "origin": (403, "forbidden", "origin", answered(SDK, EVENT, stranger)),
        "path": (
            404,
            "not_found",
            "path",
            SDK.elsewhere({}, 404, "Not here."),
        ),
        "method": (405, "method_not_allowed", "method", wrong),
        "slow": (408, "request_timeout", "timeout", SDK.too_slow(head)),
        "large": (413, "payload_too_large", "too_large", SDK.too_large(head)),
        "type": (
            415,
            "unsupported_media_type",
            "content_type",
            answered(SDK, EVENT, text),
        ),
        "limited": (
            429,
            "too_many_requests",
            "rate_limited_customer",
            answered(SDK, fate=LIMITED),
        ),
        "fault": (500, "internal_error", "internal", SDK.failed(head)),
        "away": (503, "service_unavailable", "redis_full", answered(SDK, fate=AWAY)),
    }


@pytest.mark.parametrize("kind", errors())
def test_an_error_is_voucherifys_with_our_reason(kind: str) -> None:
    status, key, reason, response = errors()[kind]
    told = said(response)
    assert list(told) == ["code", "key", "message", "details", "request_id", "reason"]
    assert response.status == status
    assert told["code"] == status
    assert type(told["code"]) is int
    assert (told["key"], told["reason"]) == (key, reason)
    assert told["message"]
    assert str(told["details"]).endswith(".")
    headers = fields(response)
    assert told["request_id"] == headers["x-request-id"] != ""
    assert headers["content-type"] == "application/json"
    assert headers["vary"] == "Origin"


def test_every_status_of_a_refusal_has_words_in_both_dialects() -> None:
    statuses = {status for status, _, _, _ in errors().values()}
    assert statuses >= set(STATUS.values())
    for status in sorted(statuses):
        _, own = Beacons().refuse(status, "r", "D.", request_id=b"i")
        _, official = Official().refuse(status, "r", "D.", request_id=b"i")
        assert json.loads(own)["title"] != "Refused"
        assert json.loads(official)["key"] != "refused"


@pytest.mark.parametrize("edge", [SDK, TRACK], ids=["sdk", "track"])
@pytest.mark.parametrize(("fate", "seconds"), [(LIMITED, "7"), (AWAY, "2")])
def test_who_may_come_back_is_told_when(edge: Edge, fate: Fate, seconds: str) -> None:
    assert fields(answered(edge, fate=fate))["retry-after"] == seconds


@pytest.mark.parametrize("dialect", [Official(), Beacons()], ids=["sdk", "track"])
def test_a_401_names_its_scheme_and_no_other_answer_does(
    dialect: Beacons | Official,
) -> None:
    edge = route(dialect, tokens="required")
    spent = Fate(status="unauthenticated", reason="token_used_up", detail="New one.")
    with_token = {**EVENT, "token": TOKEN}
    for response in (
        answered(edge),
        answered(edge, {**EVENT, "token": FORGED}),
        answered(edge, with_token, fate=spent),
    ):
        assert response.status == 401
        assert fields(response)["www-authenticate"] == "Relay-Token"
    for response in (
        answered(edge, with_token),
        answered(edge, with_token, fate=LIMITED),
        answered(edge, b"{"),
        answered(edge, {"event": "e", "token": TOKEN, "customer": {"id": "i"}}),
    ):
        assert response.status != 401
        assert "www-authenticate" not in fields(response)


# --- the same request on both routes ----------------------------------------------

CATALOG = parse_catalog(
    """
    [defaults]
    unlisted = "reject"
    [events.e]
    [events.money]
    token = "required"
    loyalty = true
    [events.few]
    customer = ["source_id"]
    loyalty = false
    metadata = { n = "number" }
    [events.trial]
    token = "dry_run"
    """,
    max_ttl_s=86_400,
)
NO_ORIGIN = [JSON_TYPE]
GPC = [*PLAIN, (b"sec-gpc", b"1")]
PACKED = [*PLAIN, (b"content-encoding", b"gzip")]
WHO = {"source_id": "u1"}
CODE = {"code": "c"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, and what both routes are to make of it; "" where it is taken."""

    reason: str = ""
    body: object = None
    headers: list[Header] | None = None
    method: str = "POST"


def of(name: str, **parts: object) -> dict[str, object]:
    return {"event": name, "customer": WHO, **parts}


BOTH = {
    "plain": Asked(body=EVENT),
    "full": Asked(body={**FULL, "event": "e"}, reason="customer_field"),
    "not-json": Asked(body=b"{", reason="malformed_json"),
    "nothing": Asked(body=b"", reason="malformed_json"),
    "not-utf8": Asked(body=b'{"event":"\xff"}', reason="malformed_json"),
    "no-name": Asked(body={"customer": WHO}, reason="event_missing"),
    "empty-name": Asked(body=of(""), reason="empty"),
    "long-name": Asked(body=of("e" * 301), reason="too_long"),
    "a-number": Asked(body=b"5", reason="wrong_type"),
    "unknown-field": Asked(body=of("e", extra=1), reason="unknown_field"),
    "bad-id": Asked(body=of("e", id="a b"), reason="bad_id"),
    "no-code": Asked(body=of("e", loyalty={}), reason="code_missing"),
    "no-customer": Asked(body={"event": "e"}, reason="customer_missing"),
    "nobody": Asked(
        body={"event": "e", "customer": {}}, reason="customer_unidentified"
    ),
    "many-keys": Asked(
        body=of("e", metadata={f"k{n}": n for n in range(101)}),
        reason="too_many_metadata_keys",
    ),
    "unlisted": Asked(body=of("other"), reason="event_unlisted"),
    "no-token": Asked(body=of("money"), reason="token_missing"),
    "forged": Asked(body=of("e", token=FORGED), reason="token_forged"),
    "malformed-token": Asked(body=of("e", token=""), reason="token_malformed"),
    "token": Asked(body=of("money", token=TOKEN, loyalty=CODE)),
    "token-in-header": Asked(
        body=of("money"), headers=[*PLAIN, (b"relay-token", TOKEN.encode())]
    ),
    "body-before-header": Asked(
        body=of("money", token=FORGED),
        headers=[*PLAIN, (b"relay-token", TOKEN.encode())],
        reason="token_forged",
    ),
    "another": Asked(
        body={"event": "e", "token": TOKEN, "customer": {"source_id": "u2"}},
        reason="customer_mismatch",
    ),
    "shut-loyalty": Asked(body=of("few", loyalty=CODE), reason="loyalty"),
    "anonymous-referral": Asked(body=of("e", referral=CODE), reason="referral"),
    "metadata-field": Asked(body=of("few", metadata={"x": 1}), reason="metadata_field"),
    "metadata-type": Asked(body=of("few", metadata={"n": "1"}), reason="metadata_type"),
    "trial": Asked(body=of("trial", token=FORGED)),
    "gpc": Asked(body=EVENT, headers=GPC, reason="gpc"),
    "gpc-off": Asked(body=EVENT, headers=[*PLAIN, (b"sec-gpc", b"0")]),
    "packed": Asked(body=gzip.compress(raw(EVENT)), headers=PACKED),
    "not-packed": Asked(body=EVENT, headers=PACKED, reason="bad_gzip"),
    "bomb": Asked(
        body=gzip.compress(bytes(MAX_BODY_BYTES + 1)),
        headers=PACKED,
        reason="too_large",
    ),
    "announced": Asked(
        body=b"", headers=[*PLAIN, (b"content-length", b"65537")], reason="too_large"
    ),
    "coding": Asked(
        body=EVENT,
        headers=[*PLAIN, (b"content-encoding", b"br")],
        reason="content_encoding",
    ),
    "html": Asked(
        body=EVENT,
        headers=[ORIGIN, (b"content-type", b"text/html")],
        reason="content_type",
    ),
    "stranger": Asked(
        body=EVENT,
        headers=[(b"origin", b"null"), JSON_TYPE],
        reason="origin",
    ),
    "no-origin": Asked(body=EVENT, headers=NO_ORIGIN, reason="origin"),
    "no-origin-token": Asked(body=of("e", token=TOKEN), headers=NO_ORIGIN),
    "no-origin-forged": Asked(
        body=of("e", token=FORGED), headers=NO_ORIGIN, reason="token_forged"
    ),
    "charset": Asked(
        body=EVENT,
        headers=[ORIGIN, (b"content-type", b"Application/JSON; charset=utf-8")],
    ),
    "method": Asked(body=b"", method="PUT", reason="method"),
}


def shared(dialect: Beacons | Official) -> Edge:
    return route(dialect, catalog=CATALOG, restricted=True, gpc="drop")


@pytest.mark.parametrize("kind", BOTH)
def test_both_routes_decide_alike(kind: str) -> None:
    asked = BOTH[kind]
    found = []
    for dialect in (Beacons(), Official()):
        edge = shared(dialect)
        admission = judged(edge, asked.body, asked.headers or PLAIN, asked.method)
        taken: list[object] = []
        if isinstance(admission, Admitted):
            # The id is the relay's own where the sender gave none.
            taken = [
                (given, special, replace(event, id=""))
                for given, special, event in admission.events
            ]
            admission = edge.answer(admission, [QUEUED], None)
        found.append((taken, admission))
    (taken, own), (taken_too, official) = found
    assert taken == taken_too
    assert bool(taken) is (asked.reason == "")
    assert own.refusals == official.refusals
    assert list(own.notes) == list(official.notes)
    assert (own.status, official.status) == (202, 200) or own.status == official.status
    if own.status >= 400:
        one, two = said(own), said(official)
        assert one["reason"] == two["reason"] == asked.reason
        # Of types each route names those that it takes.
        assert one["detail"] == two["details"] or one["reason"] == "content_type"
    assert [reason for _, reason, _ in own.refusals] == (
        [asked.reason] if asked.reason not in ("", "method") else []
    )
    # But for what each is, the headers are the same, in the same order.
    told, told_too = fields(own), fields(official)
    assert list(told) == list(told_too)
    for name in set(told) - {"content-type", "x-request-id", "accept-post"}:
        assert told[name] == told_too[name], name


def test_the_table_meets_every_outcome_of_the_edge() -> None:
    met: set[Refusal | str] = set()
    for asked in BOTH.values():
        response = judged(shared(Official()), asked.body, asked.headers or PLAIN)
        if isinstance(response, Response):
            met |= {outcome for outcome, _, _ in response.refusals}
    assert met == {
        Outcome.INVALID,
        Outcome.UNAUTHENTICATED,
        Outcome.FORBIDDEN,
        Outcome.DROPPED,
    }


# --- what the official route takes, and how it is asked ---------------------------


@pytest.mark.parametrize(
    "body",
    [
        [EVENT],
        [EVENT, EVENT],
        {"events": [EVENT]},
        {"events": [EVENT], "token": TOKEN},
        [{}],
    ],
)
def test_the_official_route_takes_one_event(body: object) -> None:
    response = answered(SDK, body)
    assert (response.status, said(response)["reason"]) == (400, "one_event")
    assert response.refusals == [(Outcome.INVALID, "one_event", "")]


@pytest.mark.parametrize(
    "kind", [None, b"", b"text/plain", b"text/plain;charset=UTF-8", b"text/json"]
)
def test_the_official_route_takes_json_alone(kind: bytes | None) -> None:
    headers = [ORIGIN] if kind is None else [ORIGIN, (b"content-type", kind)]
    response = answered(SDK, EVENT, headers)
    assert (response.status, said(response)["reason"]) == (415, "content_type")
    assert fields(response)["accept-post"] == "application/json"
    assert said(response)["details"] == "Send JSON as application/json."


def preflight(edge: Edge, origin: bytes = SHOP) -> Response:
    asked = [
        (b"origin", origin),
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", b"content-type,x-client-token"),
    ]
    response = edge.head("OPTIONS", dict(asked), PEER)
    assert isinstance(response, Response)
    return response


# What @voucherify/sdk 2 and 3 and voucherify.js send, and what the relay adds.
ASKED_FOR = {
    "authorization",
    "content-type",
    "user-agent",
    "x-client-application-id",
    "x-client-token",
    "x-voucherify-api-version",
    "x-voucherify-channel",
    "relay-token",
}


def test_a_preflight_allows_what_voucherifys_clients_send() -> None:
    response = preflight(SDK)
    told = fields(response)
    assert (response.status, response.body, response.refusals) == (204, b"", [])
    assert told["access-control-allow-origin"] == SHOP.decode()
    assert told["access-control-allow-methods"] == "POST"
    assert told["access-control-allow-credentials"] == "true"
    assert told["vary"] == "Origin"
    allowed = told["access-control-allow-headers"].split(", ")
    assert set(allowed) >= ASKED_FOR
    assert allowed == sorted(allowed)
    own = fields(preflight(TRACK))
    few = set(own.pop("access-control-allow-headers").split(", "))
    assert few < set(allowed)
    assert list(own) == [n for n in told if n != "access-control-allow-headers"]


def test_a_preflight_of_a_stranger_is_refused_and_not_counted() -> None:
    response = preflight(SDK, b"https://evil.example")
    assert (response.status, said(response)["key"]) == (403, "forbidden")
    assert response.refusals == []
    assert not [name for name in fields(response) if name.startswith("access-control")]


# --- what is dropped --------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "status"), [(Beacons(), 202), (Official(), 200)], ids=["track", "sdk"]
)
def test_what_is_dropped_is_done_with_and_not_queued(
    dialect: Beacons | Official, status: int
) -> None:
    edge = route(dialect, gpc="drop")
    response = judged(edge, FULL, GPC)
    assert isinstance(response, Response)  # nothing is left to be queued
    assert response.status == status
    assert response.refusals == [(Outcome.DROPPED, "gpc", "signed_up")]
    assert "retry-after" not in fields(response)
    if status == 202:
        [entry] = entries(response)
        assert (entry["id"], entry["status"], entry["reason"]) == (
            "x-1",
            "dropped",
            "gpc",
        )
    else:
        assert response.body == answered(SDK, FULL).body


def test_a_batch_is_dropped_whole() -> None:
    edge = route(Beacons(), gpc="drop")
    response = judged(edge, [FULL, {"event": ""}, EVENT], GPC)
    assert isinstance(response, Response)
    assert response.status == 202
    statuses = [entry["status"] for entry in entries(response)]
    assert statuses == ["dropped", "invalid", "dropped"]


def test_dropped_is_among_what_a_sender_is_done_with() -> None:
    assert set(STATUS).isdisjoint(DONE)
    assert "dropped" in DONE


def test_what_is_stripped_is_queued_without_it_and_noted() -> None:
    for dialect in (Beacons(), Official()):
        edge = route(dialect, gpc="strip")
        found = judged(edge, FULL, GPC)
        assert isinstance(found, Admitted)
        [event] = found.events
        assert json.loads(event[2].body) == {
            "event": "signed_up",
            "customer": {"id": "cust_1", "source_id": "u1"},
            "referral": FULL["referral"],
            "loyalty": FULL["loyalty"],
        }
        assert list(edge.answer(found, [QUEUED], None).notes) == ["gpc_stripped"]


# --- the relay's own words --------------------------------------------------------


def test_an_own_success_has_an_entry_for_each_event() -> None:
    body = [{**EVENT, "id": "x-1"}, {**EVENT, "id": "x-2", "extra": 1}]
    response = answered(TRACK, body)
    assert response.status == 202
    assert fields(response)["content-type"] == "application/json"
    taken, refused = entries(response)
    assert taken == {"id": "x-1", "status": "queued"}
    assert list(refused) == ["id", "status", "reason", "detail"]
    assert (refused["id"], refused["reason"]) == ("x-2", "unknown_field")


def test_an_own_problem_is_that_of_rfc_9457() -> None:
    response = answered(TRACK, of("e", id="x-1", extra=1))
    assert fields(response)["content-type"] == "application/problem+json"
    assert said(response) == {
        "type": "urn:voucherify-relay:problem:unknown_field",
        "title": "Not valid",
        "status": 400,
        "detail": "extra is not a known field: remove it, or put it into metadata.",
        "reason": "unknown_field",
        "id": "x-1",
    }


def test_limits_are_told_on_both_routes_alike() -> None:
    told = []
    for dialect in (Beacons(), Official()):
        edge = route(dialect, limits="ip=60/1m burst 5")
        found = judged(edge, EVENT, PLAIN)
        assert isinstance(found, Admitted)
        headers = fields(edge.answer(found, [QUEUED], (0, 4, 1_000_000)))
        told.append((headers["ratelimit"], headers["ratelimit-policy"]))
    assert told == [('"ip";r=4;t=1', '"ip";q=5;w=5')] * 2
