"""The decision about a request, without a server: every refusal and every header."""

import gzip
import json
import re
import tracemalloc
import zlib
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.addresses import TrustedProxies
from relay.answers import Beacons, Dialect, Official, Response
from relay.catalog import EMPTY, Catalog, parse_catalog
from relay.digests import Digests
from relay.edge import (
    MAX_BODY_BYTES,
    MAX_WAIT_S,
    TAKEN,
    Admitted,
    Edge,
    Fate,
    Head,
    inflate,
)
from relay.events import Invalid
from relay.headers import Header, fields_of
from relay.limits import parse_limits
from relay.origins import AllowedOrigins
from relay.outcomes import Outcome
from relay.policy import Policy
from relay.signing import Signer

SHOP = b"https://shop.example"
PEER = "192.0.2.1"
PROXY = "10.0.0.7"
LIMITS = "ip=120/1m burst 60, customer=60/1m burst 30"
POLICY = b'"ip";q=60;w=30, "customer";q=30;w=30'
STATUSES = {202, 204, 400, 403, 405, 413, 415, 429, 503}
EVENT = {"event": "e", "customer": {"source_id": "a"}}


def make(
    *,
    limits: str = LIMITS,
    origins: Sequence[str] = ("https://shop.example", "https://*.shop.example"),
    proxies: Sequence[str] = ("private", "unix"),
    allow_no_origin: bool = False,
    disabled: bool = False,
    signer: Signer | None = None,
    catalog: Catalog = EMPTY,
    dialect: Dialect | None = None,
) -> Edge:
    return Edge(
        dialect=dialect or Beacons(disabled=disabled),
        origins=AllowedOrigins(origins),
        proxies=TrustedProxies(proxies),
        limits=parse_limits(limits),
        digests=Digests(b"k"),
        policy=Policy(ttl_ms=1000, signer=signer, catalog=catalog),
        allow_no_origin=allow_no_origin,
    )


EDGE = make()


def judge(
    *headers: Header,
    method: str = "POST",
    origin: bytes | None = SHOP,
    peer: str | None = PEER,
    edge: Edge = EDGE,
) -> Head | Response:
    origins = [] if origin is None else [(b"origin", origin)]
    return edge.head(method, fields_of([*origins, *headers]), peer)


def accepted(*headers: Header, **how: object) -> Head:
    head = judge(*headers, **how)  # type: ignore[arg-type]  # the test names them right
    assert isinstance(head, Head), head
    return head


def refused(*headers: Header, **how: object) -> Response:
    response = judge(*headers, **how)  # type: ignore[arg-type]  # likewise
    assert isinstance(response, Response), response
    return response


def admitted(body: object, *headers: Header, edge: Edge = EDGE) -> Admitted:
    admission = edge.body(accepted(*headers, edge=edge), raw(body), now=0)
    assert isinstance(admission, Admitted), admission
    return admission


def condemned(body: object, *headers: Header, edge: Edge = EDGE) -> Response:
    response = edge.body(accepted(*headers, edge=edge), raw(body), now=0)
    assert isinstance(response, Response), response
    return response


def raw(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def fields(response: Response) -> dict[str, str]:
    names = [name for name, _ in response.headers]
    assert len(set(names)) == len(names), names  # each header once
    return {name.decode(): value.decode() for name, value in response.headers}


def document(response: Response) -> dict[str, object]:
    """The problem document, with what all of them keep to."""
    told: dict[str, object] = json.loads(response.body)
    assert fields(response)["content-type"] == "application/problem+json"
    assert told["status"] == response.status
    assert isinstance(told["title"], str)
    assert told["title"] != "Refused"
    assert str(told["type"]).endswith(f":{told['reason']}")
    assert re.fullmatch(r"[a-z_]+", str(told["reason"]))
    assert str(told["detail"]).rstrip().endswith(".")
    return told


def reasons(response: Response) -> list[tuple[str, str]]:
    return [(str(outcome), reason) for outcome, reason, _ in response.refusals]


# --- methods and origins ----------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "TRACE", "post"])
def test_any_other_method_is_told_which_are_allowed(method: str) -> None:
    response = refused(method=method)
    assert (response.status, document(response)["reason"]) == (405, "method")
    assert fields(response)["allow"] == "POST, OPTIONS"
    assert response.refusals == []  # nothing was sent, so nothing is counted


@pytest.mark.parametrize(
    "origin",
    [
        b"https://evil.example",
        b"null",
        b"",
        b"*",
        b"http://shop.example",
        b"https://shop.example/",
        b"https://shop.example:443",
        b"https://shop.example.evil.example",
        b"https://evilshop.example",
        b"HTTPS://SHOP.EXAMPLE",
        b"https://shop.example https://shop.example",
        b"https://shop.example, https://shop.example",
        b"https://*.shop.example",
        b"https://.shop.example",
        b"https://shop.example\x00",
        b"\xff\xfe",
        b"https://" + b"a." * 40_000 + b"shop.example",
    ],
)
@pytest.mark.parametrize("wide", [False, True], ids=["listed", "any"])
def test_an_origin_that_is_not_allowed_is_refused_and_never_echoed(
    origin: bytes, wide: bool
) -> None:
    edge = make(origins=["*"]) if wide else EDGE
    if wide and origin in (
        b"https://evil.example",
        b"http://shop.example",
        b"https://shop.example.evil.example",
        b"https://evilshop.example",
    ):
        assert accepted(origin=origin, edge=edge)
        return
    for method, counted in (("POST", [("forbidden", "origin")]), ("OPTIONS", [])):
        response = refused(origin=origin, method=method, edge=edge)
        assert (response.status, document(response)["reason"]) == (403, "origin")
        assert reasons(response) == counted
        assert fields(response)["vary"] == "Origin"
        assert not [n for n in fields(response) if n.startswith("access-control")]


def test_two_origin_headers_are_no_origin() -> None:
    response = refused((b"origin", SHOP))
    assert (response.status, document(response)["reason"]) == (403, "origin")


def test_an_origin_is_not_repeated_in_the_refusal() -> None:
    assert b"evil" not in refused(origin=b"https://evil.example").body


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_no_origin_is_told_apart_from_a_wrong_one(method: str) -> None:
    said = document(refused(origin=None, method=method))
    assert "names no Origin" in str(said["detail"])
    assert "RELAY_ALLOW_NO_ORIGIN" in str(said["detail"])


def test_no_origin_is_taken_where_the_operator_says_so() -> None:
    edge = make(allow_no_origin=True)
    head = accepted(origin=None, edge=edge)
    assert head.form.cors.pairs == ((b"vary", b"Origin"),)
    assert refused(origin=b"null", edge=edge).status == 403


@pytest.mark.parametrize(
    "origin", [SHOP, b"https://a.shop.example", b"https://a.b.shop.example"]
)
def test_an_allowed_origin_is_echoed_exactly(origin: bytes) -> None:
    cors = dict(accepted(origin=origin).form.cors.pairs)
    assert cors[b"access-control-allow-origin"] == origin
    assert cors[b"access-control-allow-credentials"] == b"true"
    assert cors[b"vary"] == b"Origin"
    exposed = {
        name.strip() for name in cors[b"access-control-expose-headers"].split(b",")
    }
    assert {b"Retry-After", b"RateLimit", b"X-Request-Id"} <= exposed
    assert b"*" not in exposed  # which means nothing where credentials are sent


def test_a_preflight_allows_what_a_beacon_needs() -> None:
    response = refused(
        (b"access-control-request-method", b"POST"),
        (
            b"access-control-request-headers",
            b"content-encoding,content-type,relay-token",
        ),
        method="OPTIONS",
    )
    told = fields(response)
    assert (response.status, response.body, response.refusals) == (204, b"", [])
    assert told["access-control-allow-origin"] == SHOP.decode()
    assert told["access-control-allow-methods"] == "POST"
    allowed = set(told["access-control-allow-headers"].split(", "))
    assert allowed == {"content-type", "content-encoding", "prefer", "relay-token"}
    assert int(told["access-control-max-age"]) > 0
    assert told["vary"] == "Origin"


# --- what the body says it is -----------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"text/plain",
        b"text/plain;charset=UTF-8",
        b"application/json",
        b"Application/JSON ; charset=utf-8",
        b"TEXT/PLAIN;CHARSET=iso-8859-1",
        b"application/json;",
    ],
)
def test_json_is_taken_as_json_as_text_or_unnamed(value: bytes | None) -> None:
    headers = [] if value is None else [(b"content-type", value)]
    assert accepted(*headers)


@pytest.mark.parametrize(
    "value",
    [
        b"application/x-www-form-urlencoded",
        b"multipart/form-data; boundary=x",
        b"text/html",
        b"application/jsonp",
        b"application/vnd.api+json",
        b"text/plain, application/json",
        b"*/*",
        b"\xff",
    ],
)
def test_any_other_type_is_told_the_right_ones(value: bytes) -> None:
    response = refused((b"content-type", value))
    assert (response.status, document(response)["reason"]) == (415, "content_type")
    assert fields(response)["accept-post"] == "application/json, text/plain"
    assert reasons(response) == [("invalid", "content_type")]


@pytest.mark.parametrize("value", [b"br", b"gzip, gzip", b"deflate", b"zstd", b"*"])
def test_any_other_coding_is_told_the_right_one(value: bytes) -> None:
    response = refused((b"content-encoding", value))
    assert (response.status, document(response)["reason"]) == (415, "content_encoding")
    assert fields(response)["accept-encoding"] == "gzip"  # RFC 9110, 15.5.16


@pytest.mark.parametrize(
    ("value", "packed"),
    [
        (b"gzip", True),
        (b"GZip", True),
        (b"x-gzip", True),
        (b"identity", False),
        (b"", False),
    ],
)
def test_gzip_has_two_names(value: bytes, packed: bool) -> None:
    assert accepted((b"content-encoding", value)).form.gzip is packed


@pytest.mark.parametrize(
    ("announced", "status"),
    [
        (b"65536", None),
        (b"65537", 413),
        (b"9" * 5000, 413),
        (b"-1", None),
        (b"+5", None),
        (b"many", None),
        (b"\xb2", None),  # a superscript two is a digit to str, not to bytes
    ],
)
def test_the_announced_size_decides_before_the_body(
    announced: bytes, status: int | None
) -> None:
    judged = judge((b"content-length", announced))
    assert (judged.status if isinstance(judged, Response) else None) == status
    if isinstance(judged, Response):
        assert reasons(judged) == [("invalid", "too_large")]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([b"wait=5"], 5),
        ([b"Wait = 5"], 5),
        ([b"respond-async, wait=10"], 10),
        ([b"respond-async;wait=10"], 10),
        ([b"return=minimal", b"wait=7"], 7),
        ([b"wait=7", b"wait=9"], 7),
        ([b"wait=0"], 0),
        ([b"wait=30"], MAX_WAIT_S),
        ([b"wait=31"], MAX_WAIT_S),
        ([b"wait=" + b"9" * 5000], MAX_WAIT_S),
        ([b"wait=-1"], 0),
        ([b"wait=1.5"], 0),
        ([b"wait"], 0),
        ([b"await=5"], 0),
        ([b"wait=5s"], 0),
        ([b"\xff"], 0),
    ],
)
def test_prefer_wait_is_read_as_rfc_7240_writes_it(
    values: list[bytes], seconds: int
) -> None:
    assert accepted(*((b"prefer", value) for value in values)).wait_s == seconds


# --- gzip --------------------------------------------------------------------------


def test_a_bomb_is_given_up_at_the_limit() -> None:
    bomb = gzip.compress(bytes(10_000_000))
    tracemalloc.start()
    try:
        assert inflate(bomb) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One output buffer of the limit and a byte, grown by doubling, and the window.
    assert peak < 4 * MAX_BODY_BYTES
    assert condemned(bomb, (b"content-encoding", b"gzip")).status == 413


@pytest.mark.parametrize(
    ("size", "fits"), [(MAX_BODY_BYTES, True), (MAX_BODY_BYTES + 1, False)]
)
@pytest.mark.parametrize("level", [0, 9], ids=["stored", "packed"])
def test_the_limit_counts_inflated_bytes(size: int, fits: bool, level: int) -> None:
    plain = b"x" * size
    assert inflate(gzip.compress(plain, level)) == (plain if fits else None)


WHOLE = gzip.compress(raw(EVENT))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        WHOLE[:-1],
        WHOLE[:10],
        WHOLE + b"\0",
        WHOLE + WHOLE,
        WHOLE[:-8] + bytes(8),
        raw(EVENT),
        zlib.compress(raw(EVENT)),
        b"\x1f\x8b",
    ],
    ids=[
        "empty",
        "truncated",
        "header-only",
        "trailing-byte",
        "two-members",
        "wrong-checksum",
        "not-gzip",
        "zlib",
        "magic-only",
    ],
)
def test_only_one_whole_gzip_stream_is_inflated(body: bytes) -> None:
    assert isinstance(inflate(body), Invalid)
    response = condemned(body, (b"content-encoding", b"gzip"))
    assert (response.status, document(response)["reason"]) == (400, "bad_gzip")
    assert reasons(response) == [("invalid", "bad_gzip")]


def test_a_packed_body_is_judged_as_its_content() -> None:
    [event] = admitted(WHOLE, (b"content-encoding", b"gzip")).events
    assert json.loads(event[2].body) == EVENT


# --- who asks ----------------------------------------------------------------------


def address(peer: str | None, *forwarded: bytes) -> str:
    lines = [(b"x-forwarded-for", line) for line in forwarded]
    return accepted(*lines, peer=peer).address


def test_x_forwarded_for_counts_only_from_a_trusted_proxy() -> None:
    assert address(PROXY, b"198.51.100.1") == address("198.51.100.1")
    assert address(PEER, b"198.51.100.1") == address(PEER)
    assert address(None, b"198.51.100.1") == address("198.51.100.1")
    assert address(PROXY, b"6.6.6.6, 198.51.100.1") == address("198.51.100.1")
    assert address(PROXY, b"6.6.6.6", b"198.51.100.1") == address("198.51.100.1")
    assert address(PROXY, b"198.51.100.1, 10.1.1.1") == address("198.51.100.1")
    assert address(PROXY, b"rubbish") == address(PROXY)


def test_ipv6_counts_by_the_64() -> None:
    one, two = b"2001:db8:1:2::1", b"2001:db8:1:2:ffff::9"
    assert address(PROXY, one) == address(PROXY, two)
    assert address(PROXY, one) != address(PROXY, b"2001:db8:1:3::1")
    assert address("::ffff:192.0.2.1") == address("192.0.2.1")


def test_nothing_personal_leaves_the_edge_but_in_the_body() -> None:
    [(given, special, event)] = admitted(
        {"event": "e", "customer": {"source_id": "ann@x.example"}}
    ).events
    assert "ann" in event.body
    event.body = ""
    assert "ann" not in str((given, special, event))
    assert PEER not in accepted().address
    assert "ann" not in repr(
        admitted({"event": "e", "customer": {"id": "ann"}}).request[0]
    )


def test_a_customer_is_the_same_in_every_process_with_the_key() -> None:
    one, two = admitted(EVENT, edge=make()), admitted(EVENT, edge=make())
    assert one.events[0][2].customer == two.events[0][2].customer
    other = admitted({"event": "e", "customer": {"id": "a"}})
    assert (
        other.events[0][2].customer != one.events[0][2].customer
    )  # an id is not a source_id


@pytest.mark.parametrize(
    ("peer", "asked", "taken"),
    [
        (PROXY, b"req-1.A_b", True),
        (None, b"req-1", True),
        (PEER, b"req-1", False),
        (PROXY, b"", False),
        (PROXY, b"a" * 65, False),
        (PROXY, b"a\r\nset-cookie: x", False),
        (PROXY, b"a\n", False),
        (PROXY, b"\xff", False),
    ],
)
def test_a_request_id_is_taken_over_from_a_trusted_proxy_alone(
    peer: str | None, asked: bytes, taken: bool
) -> None:
    header = (b"x-request-id", asked)
    assert (accepted(header, peer=peer).request_id == asked) is taken
    elsewhere = EDGE.elsewhere(dict([header]), 404, "Not Found.", peer)
    assert (fields(elsewhere)["x-request-id"].encode() == asked) is taken


def test_request_ids_made_here_are_all_different() -> None:
    made = {
        accepted(edge=edge).request_id for edge in (EDGE, make()) for _ in range(50)
    }
    assert len(made) == 100


# --- what the snippet reports -------------------------------------------------------

AGENT = (b"user-agent", b"Mozilla/5.0 (X11) Gecko/20100101 Firefox/133.0")


def reported(report: object, *fates: str, events: int = 2) -> list[tuple[str, int]]:
    admission = admitted({"events": [EVENT] * events, "report": report}, AGENT)
    told = [Fate(status=fate, reason="r" if fate != "queued" else "") for fate in fates]
    return list(EDGE.answer(admission, told, None).browser)


def test_a_report_is_counted_with_what_has_arrived() -> None:
    assert reported({"called": 3, "full": 1}, "queued", "queued") == [
        ("firefox:called", 3),
        ("firefox:full", 1),
        ("firefox:arrived", 2),
    ]
    assert reported({"called": 3}, "duplicate", "unavailable") == [
        ("firefox:called", 3)
    ]


@pytest.mark.parametrize("report", [None, 7, "called", [], {"called": "x"}, {"a": {}}])
def test_a_faulty_report_costs_no_event(report: object) -> None:
    counted = reported(report, "queued", "queued")
    assert counted in ([], [("firefox:arrived", 2)])


def test_without_a_report_no_browser_is_counted() -> None:
    admission = admitted({"events": [EVENT]}, AGENT)
    assert EDGE.answer(admission, [Fate(status="queued")], None).browser == ()


def test_a_report_counts_when_every_event_was_refused() -> None:
    body = {"events": [{"event": "e"}], "report": {"called": 1}}
    assert list(condemned(body, AGENT).browser) == [
        ("firefox:called", 1),
        ("firefox:arrived", 1),
    ]


def test_the_kill_switch_is_in_every_answer_of_the_route() -> None:
    off = make(disabled=True)
    admission = admitted(EVENT, edge=off)
    taken = off.answer(admission, [Fate(status="queued")], None)
    away = off.unavailable(admitted(EVENT, edge=off), "r", "Away.", 1)
    for response in (taken, away, condemned(b"{", edge=off)):
        assert json.loads(response.body)["disabled"] is True
    assert "disabled" not in json.loads(condemned(b"{").body)


# --- events ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "several"),
    [(EVENT, False), ([EVENT], True), ({"events": [EVENT]}, True)],
    ids=["one", "array", "batch"],
)
def test_one_event_an_array_and_a_batch_are_admitted(
    body: object, several: bool
) -> None:
    admission = admitted(body)
    assert (len(admission.events), admission.several) == (1, several)
    told = json.loads(EDGE.answer(admission, [Fate(status="queued")], None).body)
    assert told == {"events": [{"id": admission.events[0][2].id, "status": "queued"}]}


def test_the_senders_id_is_kept_and_a_missing_one_made() -> None:
    given, made = admitted([{**EVENT, "id": "x-1"}, EVENT]).events
    assert (given[0], given[2].id) == (True, "x-1")
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", made[2].id)
    assert made[0] is False


def test_money_is_never_sent_twice() -> None:
    plain, points, referral = admitted(
        [
            EVENT,
            {**EVENT, "loyalty": {"code": "c"}},
            {**EVENT, "referral": {"code": "c"}},
        ]
    ).events
    assert plain[2].delivery == "at_least_once"
    assert points[2].delivery == referral[2].delivery == "at_most_once"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"{",
        {"event": "e"},
        [],
        [EVENT] * 101,
        b"[" * 60_000,
        b"\xef\xbb\xbf{}",
    ],
)
def test_a_body_without_a_sound_event_is_a_problem(body: object) -> None:
    response = condemned(body)
    said = document(response)
    assert response.status == 400
    assert reasons(response) == [("invalid", said["reason"])]
    assert fields(response)["ratelimit-policy"] == POLICY.decode()


def test_a_single_refused_event_is_named_in_the_problem() -> None:
    said = document(condemned({**EVENT, "id": "x-1", "loyalty": {}}))
    assert said["id"] == "x-1"
    assert "events" not in said


def test_a_batch_of_bad_events_has_a_fate_each() -> None:
    response = condemned([{"id": "x-1"}, {**EVENT, "id": "x-2", "event": ""}, 5])
    said = document(response)
    assert (response.status, said["reason"]) == (400, "event_missing")
    assert str(said["detail"]).startswith("None of the 3 events was accepted: ")
    assert [(e["id"], e["reason"]) for e in told(response)[:2]] == [
        ("x-1", "event_missing"),
        ("x-2", "empty"),
    ]
    assert reasons(response) == [("invalid", e["reason"]) for e in told(response)]


def told(response: Response) -> list[dict[str, object]]:
    events: list[dict[str, object]] = json.loads(response.body)["events"]
    return events


QUEUED = Fate(status="queued")
DUPLICATE = Fate(status="duplicate")
LIMITED = Fate(
    status="rate_limited", reason="rate_limited_ip", detail="Later.", retry_after=7
)
FORBIDDEN = Fate(status="forbidden", reason="catalogue", detail="No.")
UNKNOWN = Fate(status="unauthenticated", reason="token", detail="Who.")
AWAY = Fate(status="unavailable", reason="redis_timeout", detail="Soon.", retry_after=1)


def test_a_hundred_fates_come_in_the_senders_order() -> None:
    kinds = [QUEUED, DUPLICATE, LIMITED, FORBIDDEN, AWAY]
    body: list[object] = []
    fates: list[Fate] = []
    expected: list[tuple[str, str, object]] = []
    for n in range(100):
        if n % 3 == 0:
            body.append({**EVENT, "id": f"x-{n}", "extra": 1})
            expected.append((f"x-{n}", "invalid", "unknown_field"))
            continue
        fate = kinds[n % len(kinds)]
        body.append({**EVENT, "id": f"x-{n}"})
        fates.append(fate)
        expected.append((f"x-{n}", fate.status, fate.reason or None))
    response = EDGE.answer(admitted(body), fates, (0, 3, 1))
    assert response.status == 202
    assert [(e["id"], e["status"], e.get("reason")) for e in told(response)] == expected
    assert fields(response)["retry-after"] == "7"
    assert response.refusals == [(Outcome.INVALID, "unknown_field", "e")] * 34
    # What admission refused is counted by its script, not a second time here.


@pytest.mark.parametrize(
    ("fates", "status", "reason"),
    [
        ([LIMITED, LIMITED], 429, "rate_limited_ip"),
        ([FORBIDDEN, UNKNOWN], 403, "catalogue"),
        ([UNKNOWN, UNKNOWN], 401, "token"),
        ([UNKNOWN, LIMITED], 429, "rate_limited_ip"),
        ([LIMITED, AWAY], 503, "redis_timeout"),
        ([LIMITED, QUEUED], 202, None),
        ([AWAY, DUPLICATE], 202, None),
    ],
)
def test_where_all_are_refused_the_status_is_that_of_the_best_hope(
    fates: list[Fate], status: int, reason: str | None
) -> None:
    admission = admitted([EVENT, {"event": ""}, EVENT])
    response = EDGE.answer(admission, fates, None)
    assert response.status == status
    assert len(told(response)) == 3
    if reason is not None:
        assert document(response)["reason"] == reason
    assert reasons(response) == [("invalid", "empty")]


def test_unavailable_gives_the_ids_and_counts_nothing() -> None:
    admission = admitted([{**EVENT, "id": "x-1"}, EVENT])
    response = EDGE.unavailable(admission, "redis_unreachable", "Soon.", 2)
    assert (response.status, document(response)["reason"]) == (503, "redis_unreachable")
    assert fields(response)["retry-after"] == "2"
    assert [e["id"] for e in told(response)] == [e[2].id for e in admission.events]
    assert response.refusals == []


def test_an_outcome_that_is_known_joins_its_event() -> None:
    fate = Fate(
        status="queued", outcome={"outcome": "rejected", "upstream_status": 400}
    )
    response = EDGE.answer(admitted(EVENT, (b"prefer", b"wait=99")), [fate], None)
    [entry] = told(response)
    assert (entry["status"], entry["outcome"]) == ("queued", "rejected")
    assert fields(response)["preference-applied"] == "wait=30"


# --- headers of every answer -------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "field"),
    [
        ((0, 59, 500_000), '"ip";r=59;t=1'),
        ((1, 0, 1), '"customer";r=0;t=1'),
        ((1, 0, 1_000_000), '"customer";r=0;t=1'),
        ((1, 0, 1_000_001), '"customer";r=0;t=2'),
        ((0, 60, 0), '"ip";r=60;t=0'),
    ],
)
def test_the_tightest_limit_is_told_and_never_too_soon(
    limit: tuple[int, int, int], field: str
) -> None:
    headers = fields(EDGE.answer(admitted(EVENT), [QUEUED], limit))
    assert headers["ratelimit"] == field
    assert headers["ratelimit-policy"] == POLICY.decode()


@pytest.mark.parametrize("limits", ["off", "ip=1/1s dry_run"])
def test_where_nothing_is_enforced_no_limit_is_told(limits: str) -> None:
    edge = make(limits=limits)
    for response in (
        edge.answer(admitted(EVENT, edge=edge), [QUEUED], (-1, -1, 0)),
        refused(origin=b"null", edge=edge),
    ):
        assert not [name for name in fields(response) if name.startswith("ratelimit")]


@pytest.mark.parametrize("status", [404, 405])
def test_what_is_not_a_limited_route_tells_no_limits(status: int) -> None:
    response = EDGE.elsewhere({b"origin": SHOP}, status, "No.")
    assert document(response)["reason"] in ("path", "method")
    assert not [name for name in fields(response) if name.startswith("ratelimit")]


def test_an_answer_elsewhere_echoes_one_allowed_origin_only() -> None:
    def echoed(*origins: bytes) -> str | None:
        headers = [(b"origin", origin) for origin in origins]
        told = fields(EDGE.elsewhere(fields_of(headers), 404, "No."))
        assert told["vary"] == "Origin"
        return told.get("access-control-allow-origin")

    assert echoed(SHOP) == SHOP.decode()
    assert echoed() is None
    assert echoed(b"null") is None
    assert echoed(SHOP, b"https://evil.example") is None


@pytest.mark.parametrize("dialect", [Beacons(), Beacons(disabled=True), Official()])
@pytest.mark.parametrize("limit", [(0, 7, 1_500_000), (-1, -1, 0)])
@pytest.mark.parametrize("own_id", [True, False])
def test_the_usual_answer_is_the_one_that_is_made_at_length(
    dialect: Dialect, limit: tuple[int, int, int], own_id: bool
) -> None:
    edge = make(dialect=dialect)
    head = accepted((b"content-type", b"application/json"), edge=edge)
    event = EVENT | {"id": "a-Z_9"} if own_id else EVENT
    admission = edge.body(head, json.dumps(event).encode(), now=0)
    assert isinstance(admission, Admitted)
    short, long = edge.taken(admission, *limit), edge.answer(admission, [TAKEN], limit)
    assert [*long.refusals, *long.browser] == []
    long.own.append((b"content-length", b"%d" % len(long.body)))  # as endpoints.py does

    def parts(text: bytes) -> tuple[list[bytes], bytes]:
        headers, _, body = text.partition(b"\r\n\r\n")
        return sorted(headers.split(b"\r\n")), body

    assert (short.status, parts(short.text)) == (long.status, parts(long.text))


@pytest.mark.parametrize("dialect", [Beacons(), Beacons(disabled=True), Official()])
@pytest.mark.parametrize("limit", [(0, 0, 1_500_000), (-1, -1, 0)])
@pytest.mark.parametrize("seconds", [2, 61])
def test_the_answer_that_a_flood_gets_is_the_one_that_is_made_at_length(
    dialect: Dialect, limit: tuple[int, int, int], seconds: int
) -> None:
    edge = make(dialect=dialect)
    head = accepted((b"content-type", b"application/json"), edge=edge)
    fate = Fate(
        status="rate_limited",
        reason="rate_limited_ip",
        detail=f'Too many "events": try again in {seconds} s.',
        retry_after=seconds,
    )
    for event_id in ("a-Z_9", "b"):
        body = json.dumps(EVENT | {"id": event_id}).encode()
        admission = edge.body(head, body, now=0)
        assert isinstance(admission, Admitted)
        short = edge.answer(admission, [fate], limit)
        admission.report = {}  # there is more to say than of one event
        assert not admission.alone()
        long = edge.answer(admission, [fate], limit)
        assert (short.status, short.body) == (long.status, long.body)
        assert short.headers == long.headers
        assert (short.refusals, short.notes) == (long.refusals, long.notes)


@pytest.mark.parametrize("fates", [[TAKEN], [TAKEN] * 3])
def test_no_event_goes_without_an_answer_of_its_own(fates: list[Fate]) -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        EDGE.answer(admitted([EVENT, EVENT]), fates, (0, 1, 1))


def every_answer() -> list[Response]:
    head = accepted()
    admission = admitted([EVENT, EVENT])
    return [
        refused(method="GET"),
        refused(method="OPTIONS"),
        refused((b"content-type", b"text/html")),
        refused((b"content-encoding", b"br")),
        refused((b"content-length", b"99999999")),
        condemned(b"?"),
        condemned([{}]),
        EDGE.too_large(head),
        EDGE.too_slow(head),
        EDGE.failed(head),
        EDGE.answer(admission, [QUEUED, LIMITED], (0, 1, 1)),
        EDGE.answer(admission, [LIMITED, LIMITED], (0, 0, 1)),
        EDGE.unavailable(admission, "draining", "Soon.", 1),
        EDGE.elsewhere({b"origin": SHOP}, 404, "No."),
    ]


@pytest.mark.parametrize("response", every_answer(), ids=lambda r: str(r.status))
def test_every_answer_is_readable_by_its_page_and_has_an_id(response: Response) -> None:
    headers = fields(response)
    assert headers["access-control-allow-origin"] == SHOP.decode()
    assert headers["access-control-allow-credentials"] == "true"
    assert headers["vary"] == "Origin"
    assert headers["x-request-id"]
    if response.status >= 400:
        document(response)
    if response.status in (429, 503):
        assert int(headers["retry-after"]) >= 1
    if response.status in (408, 500):
        assert headers["connection"] == "close"


def test_a_failure_before_the_origin_is_known_names_none() -> None:
    headers = fields(EDGE.failed(None))
    assert headers["x-request-id"]
    assert "access-control-allow-origin" not in headers
    assert reasons(EDGE.failed(None)) == [("internal", "internal")]


# --- anything ----------------------------------------------------------------------

KNOWN = {
    b"origin": [SHOP, b"https://x.shop.example", b"null"],
    b"content-type": [b"text/plain", b"application/json", b"text/html"],
    b"content-encoding": [b"gzip", b"identity", b"br"],
    b"content-length": [b"5", b"99999999999", b"9" * 5_000],
    b"x-forwarded-for": [b"2001:db8::1", b"1.2.3.4, 10.0.0.1", b",,,"],
    b"prefer": [b"wait=3", b"wait=" + b"9" * 5_000],
    b"x-request-id": [b"id", b"a\r\nb: c"],
}
HEADERS = st.lists(
    st.sampled_from(sorted(KNOWN)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.sampled_from(KNOWN[name]) | st.binary(max_size=40)
        )
    )
    | st.tuples(st.binary(max_size=10), st.binary(max_size=20)),
    max_size=8,
)
BODIES = (
    st.binary(max_size=200)
    | st.binary(max_size=200).map(gzip.compress)
    | st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "event": st.text(max_size=5) | st.none(),
                "customer": st.fixed_dictionaries({"source_id": st.text(max_size=3)}),
                "id": st.text(max_size=4) | st.integers(),
                "metadata": st.dictionaries(st.text(max_size=3), st.floats()),
                "loyalty": st.just({"code": "c"}) | st.text(max_size=2),
            },
        ),
        max_size=6,
    ).map(lambda events: json.dumps(events).encode())
)
FATES = st.sampled_from([QUEUED, DUPLICATE, LIMITED, FORBIDDEN, AWAY])


@given(
    method=st.sampled_from(["POST", "OPTIONS", "GET"]) | st.text(max_size=5),
    headers=HEADERS,
    peer=st.sampled_from([PEER, PROXY, None, "", "::1"]) | st.text(max_size=8),
    body=BODIES,
    fates=st.lists(FATES, min_size=6, max_size=6),
)
@example(
    "POST", [(b"origin", SHOP)], PEER, json.dumps([EVENT] * 6).encode(), [AWAY] * 6
)
@example("POST", [(b"content-length", b"9" * 5_000)], PEER, b"", [QUEUED] * 6)
def test_any_request_has_an_answer_of_the_documented_kind(
    method: str, headers: list[Header], peer: str | None, body: bytes, fates: list[Fate]
) -> None:
    edge = make(allow_no_origin=True)
    judged = edge.head(method, fields_of(headers), peer)
    response = judged if isinstance(judged, Response) else None
    if isinstance(judged, Head):
        admission = edge.body(judged, body, now=0)
        if isinstance(admission, Admitted):
            response = edge.answer(admission, fates[: len(admission.events)], (0, 1, 1))
        else:
            response = admission
    assert response is not None
    assert response.status in STATUSES
    sound = re.compile(rb"[\x20-\x7e]*\Z")  # none that could break a header block
    assert all(sound.match(value) for _, value in response.headers), response.headers
    fields(response)
    if response.status >= 400:
        document(response)
    elif response.body:
        assert json.loads(response.body)["events"]


def test_a_stranger_is_not_the_customer_whom_a_token_names() -> None:
    signer = Signer(["k" * 32])
    edge = make(signer=signer)
    made, _ = signer.sign(source_id="a", now=1)
    stranger = admitted(EVENT, edge=edge).events[0]
    named = admitted({**EVENT, "token": made}, edge=edge).events[0]
    assert stranger[2].customer != named[2].customer
    # The same to every relay with the key, and to the command that erases.
    assert named[2].customer == Digests(b"k").customer(source_id="a", signed=True)


# --- when it happened -----------------------------------------------------------------

DATED = parse_catalog('[events.e]\noccurred_at = "at"\n', max_ttl_s=86_400)


@pytest.mark.parametrize("dialect", [Beacons(), Official()], ids=["track", "sdk"])
def test_the_time_of_receipt_is_the_one_that_is_handed_in(dialect: Dialect) -> None:
    edge = make(catalog=DATED, dialect=dialect)
    body = json.dumps(EVENT | {"age": 1_000, "metadata": {"at": "mine", "n": 1}})
    for now, at in (
        (0.0, "1969-12-31T23:59:59.000Z"),
        (2.5, "1970-01-01T00:00:01.500Z"),
    ):
        head = accepted((b"content-type", b"application/json"), edge=edge)
        admission = edge.body(head, body.encode(), now=now)
        assert isinstance(admission, Admitted)
        [queued] = admission.events
        sent = EVENT | {"metadata": {"at": at, "n": 1}}
        assert json.loads(queued[2].body) == sent
        # And who asks is told what it said itself, on the route that repeats it.
        response = edge.answer(admission, [Fate(status="queued")], None)
        told = json.loads(response.body)
        assert at not in response.body.decode()
        assert told.get("metadata", {"at": "mine", "n": 1}) == {"at": "mine", "n": 1}


def test_the_official_clients_need_no_age() -> None:
    edge = make(catalog=DATED, dialect=Official())
    only = admitted(EVENT, (b"content-type", b"application/json"), edge=edge)
    assert json.loads(only.events[0][2].body)["metadata"] == {
        "at": "1970-01-01T00:00:00.000Z"
    }


def test_each_event_of_a_batch_has_its_own_age_and_a_faulty_one_costs_no_other() -> (
    None
):
    ages: list[object] = [0, 2_000, "2000", None, -5, 1_000.9]
    body = [EVENT | {"id": f"id-{n}", "age": age} for n, age in enumerate(ages)]
    batch = admitted(body, edge=make(catalog=DATED))
    assert {
        event[2].id: json.loads(event[2].body)["metadata"]["at"]
        for event in batch.events
    } == {
        "id-0": "1970-01-01T00:00:00.000Z",
        "id-1": "1969-12-31T23:59:58.000Z",
        "id-3": "1970-01-01T00:00:00.000Z",
        "id-4": "1970-01-01T00:00:00.000Z",
        "id-5": "1969-12-31T23:59:59.000Z",
    }
    assert {at: (r.reason, r.id) for at, r in batch.refused.items()} == {
        2: ("age_invalid", "id-2")
    }
