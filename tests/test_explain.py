"""`relay explain` says what the relay does: it asks the same edge."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import httpx
import msgspec
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from uvicorn._types import ASGIApplication

from relay.answers import Response
from relay.app import App
from relay.assembly import Station, make_catalog, make_digests, make_policy, make_signer
from relay.edge import Admitted, Edge, Head
from relay.explain import DIALECTS, Request, explain, lines
from relay.settings import CREDENTIALS, Role, Settings, load_settings
from relay.values import SDK_PATH
from tests.support import serve
from tests.test_cli import relay

KEY = "S3CRET-signing-key-of-32-characters"
ENVIRON = {
    "RELAY_ENV_FILE": os.devnull,
    "HOME": "/nowhere",
    "RELAY_ALLOWED_ORIGINS": "https://shop.example",
    "RELAY_CLIENT_APPLICATION_ID": "application-1",
    "RELAY_CLIENT_TOKEN": "S3CRET-client",
    "RELAY_SERVER_APP_ID": "server-1",
    "RELAY_SERVER_APP_TOKEN": "S3CRET-server",
    "RELAY_OAUTH_APP_ID": "service-1",
    "RELAY_OAUTH_APP_SECRET": "S3CRET-service",
    "RELAY_OAUTH_PROJECT_ID": "proj_1",
    "RELAY_OAUTH_SCOPE": "events",
    "RELAY_ORIGIN": "shop.example",
    "RELAY_SIGNING_KEYS": KEY,
}
CATALOG = """
[defaults]
unlisted = "reject"
[events.plain]
[events.few]
priority = "low"
ttl = "2h"
coalesce = "10m"
limit = "3/1d"
customer = ["source_id"]
metadata = { n = "number" }
[events.paid]
token = "required"
[events.dated]
occurred_at = "at"
metadata = { n = "number" }
"""
NOW = 1_800_000_000.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    path = tmp_path / "catalog.toml"
    path.write_text(CATALOG)
    return load_settings(Role.SERVE, ENVIRON, catalog=str(path))


def event(name: str = "plain", **parts: object) -> dict[str, object]:
    return {"event": name, "customer": {"source_id": "u1"}, **parts}


BODIES: dict[str, object] = {
    "plain": event(),
    "few": event("few", metadata={"n": 1}),
    "batch": {"events": [event(), event("few"), event("no"), {"event": 7}, event("")]},
    "array": [event("paid"), event(loyalty={"code": "C"})],
    "all-refused": [event("paid"), event("no"), {}],
    "dated": event("dated", age=1_500, metadata={"n": 1, "at": "never"}),
    "age": event("dated", age="1500"),
    "unlisted": event("no"),
    "field": event("few", customer={"source_id": "u1", "email": "a@b.example"}),
    "metadata": event("few", metadata={"n": "1"}),
    "token-missing": event("paid"),
    "token-forged": event("paid", token="a.b.c"),
    "restricted": event(referral={"code": "C"}),
    "no-customer": {"event": "plain"},
    "no-event": {"customer": {}},
    "unknown-field": event(more=1),
    "empty-batch": {"events": []},
    "empty-token": {"events": [event("paid")], "token": ""},
    "own-token-empty": event("paid", token=""),
    "batch-in-a-batch": [{"events": [event()]}],
    "three-in-one": [{"events": [event(), event("no"), event("no")]}],
    "array-in-an-array": [[event()], []],
    "no-events-at-all": [1, None, "event", {}],
    "events-in-metadata": event(metadata={"events": [event()]}),
    "too-many": [event()] * 101,
    "not-json": b"{",
    "empty": b"",
    "huge": b" " * 70_000,
}
REQUESTS = {
    "page": Request(origin="https://shop.example"),
    "sdk": Request(origin="https://shop.example", route="sdk"),
    "text": Request(origin="https://shop.example", content_type="text/plain"),
    "foreign": Request(origin="https://other.example"),
    "nobody": Request(),
    "xml": Request(origin="https://shop.example", content_type="text/xml"),
    "token": Request(origin="https://shop.example", token="no token"),
    "gpc": Request(origin="https://shop.example", gpc=True),
}


def raw(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def headers(request: Request, body: bytes) -> dict[str, str]:
    """What a client with this request sends, written down once more."""
    sent = {"content-type": request.content_type, "content-length": str(len(body))}
    if request.origin is not None:
        sent["origin"] = request.origin
    if request.token is not None:
        sent["relay-token"] = request.token
    return sent | ({"sec-gpc": "1"} if request.gpc else {})


def decided(
    settings: Settings, body: bytes, request: Request
) -> tuple[int, list[tuple[str, str]]]:
    """Status and the refused events (outcome, reason), by an edge of our own."""
    edge = Edge(
        origins=settings.allowed_origins,
        proxies=settings.trusted_proxies,
        limits=settings.limits,
        digests=make_digests(settings),
        policy=make_policy(settings, make_catalog(settings).catalog),
        dialect=DIALECTS[request.route](),
    )
    sent = {n.encode(): v.encode() for n, v in headers(request, body).items()}
    head = edge.head("POST", sent, "198.51.100.7")
    judged = edge.body(head, body, now=NOW) if isinstance(head, Head) else head
    if isinstance(judged, Response):
        return judged.status, [(str(o), r) for o, r, _ in judged.refusals]
    assert isinstance(judged, Admitted)
    status = 200 if request.route == "sdk" else 202
    return status, [(str(r.outcome), r.reason) for r in judged.refused.values()]


def assert_told(settings: Settings, body: bytes, request: Request) -> None:
    status, refused = decided(settings, body, request)
    told = msgspec.to_builtins(explain(settings, body, request, now=NOW))
    assert told["answer"]["status"] == status
    said = [
        (event["status"], event["steps"][-1]["rule"])
        for event in told["events"]
        if event["status"] != "queued"
    ]
    if not said and refused:  # the whole request
        [(_, reason)] = refused
        assert told["request"][-1]["rule"] == reason
        assert told["request"][-1]["verdict"] == "refused"
    else:
        assert said == refused
    assert lines(told)


@pytest.mark.parametrize("gpc", ["ignore", "strip", "drop"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_it_says_what_the_edge_does(
    settings: Settings, body: object, request_: Request, gpc: str
) -> None:
    if gpc != "ignore" and not request_.gpc:
        return  # the same as without it
    assert_told(settings.model_copy(update={"gpc": gpc}), raw(body), request_)


words = st.sampled_from(["event", "events", "customer", "token", "id", "source_id"])
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner),
    max_leaves=8,
)
likely = st.builds(
    event,
    st.sampled_from(["plain", "few", "paid", "dated", "no", ""]),
    metadata=st.none() | odd | st.just({"n": 1}),
    age=st.none() | st.just(1_500) | odd,
    id=st.none() | st.just("x-1") | odd,
    token=st.none() | st.just("") | st.just("a.b.c"),
)
several = st.lists(likely | odd, max_size=4)
bodies = (
    likely | several | odd | st.fixed_dictionaries({"events": several, "token": odd})
)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    path = tmp_path_factory.mktemp("explain") / "catalog.toml"
    path.write_text(CATALOG)
    return load_settings(Role.SERVE, ENVIRON, catalog=str(path))


@drawn(bodies, st.sampled_from([*REQUESTS.values()]))
def test_it_says_what_the_edge_does_with_any_body(
    made_once: Settings, body: object, request_: Request
) -> None:
    assert_told(made_once, raw(body), request_)


@pytest.fixture
async def running(
    tmp_path: Path, valkey_url: str, prefix: str
) -> AsyncIterator[tuple[Settings, httpx.AsyncClient]]:
    """A relay that answers, with nothing that only Redis could know."""
    path = tmp_path / "catalog.toml"
    path.write_text(CATALOG.replace('limit = "3/1d"', ""))
    own = {"limits": "off", "redis_prefix": prefix, "redis_url": valkey_url}
    settings = load_settings(Role.SERVE, ENVIRON, catalog=str(path), **own)
    app = App(Station(settings, redis_url=valkey_url, forward=False))
    async with (
        serve(cast("ASGIApplication", app), proxy_headers=False) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        yield settings, client


@pytest.mark.anyio
async def test_it_says_what_a_running_relay_answers(
    running: tuple[Settings, httpx.AsyncClient],
) -> None:
    settings, client = running
    for name, request_ in REQUESTS.items():
        for what, body in BODIES.items():
            answer = await client.post(
                SDK_PATH if request_.route == "sdk" else "/track",
                content=raw(body),
                headers=headers(request_, raw(body)),
            )
            told = msgspec.to_builtins(explain(settings, raw(body), request_, now=NOW))
            assert told["answer"]["status"] == answer.status_code, (name, what)
            shown = answer.json()
            if "reason" in shown and "events" not in shown:
                rules = [
                    *told["request"],
                    *(s for e in told["events"] for s in e["steps"]),
                ]
                assert rules[-1]["rule"] == shown["reason"], (name, what)
            for one, entry in zip(
                told["events"], shown.get("events", told["events"]), strict=True
            ):
                # Only Redis knows of a repeat.
                known = {"duplicate": "queued", "coalesced": "queued"}
                assert one["status"] == known.get(entry["status"], entry["status"])
                if "reason" in entry and one["status"] != "queued":
                    assert one["steps"][-1]["rule"] == entry["reason"], (name, what)


def test_what_waits_and_what_leaves_is_told(settings: Settings) -> None:
    body = event("few", id="x-1", metadata={"n": 1})
    told = explain(settings, raw(body), REQUESTS["page"], now=NOW)
    [one] = msgspec.to_builtins(told["events"])
    assert (one["event"], one["id"], one["status"]) == ("few", "x-1", "queued")
    assert one["queue"] == {
        "lane": "low",
        "delivery": "at_least_once",
        "ttl_s": 7200,
        "limits": [
            "ip=120/1m burst 60: charged to the sender's address",
            "customer=60/1m burst 30: charged to the customer",
            "site=20000/1m burst 5000: charged to the whole shop",
        ],
        "coalesce": "one in 10m of this customer: the last one",
        "event_limit": "3 in 1d of this customer",
    }
    assert one["upstream"]["url"] == "https://api.voucherify.io/client/v1/events"
    assert one["upstream"]["body"] == event("few", metadata={"n": 1})


def test_what_the_relay_says_itself_is_told_with_its_rule(settings: Settings) -> None:
    told = explain(settings, raw(BODIES["dated"]), REQUESTS["page"], now=NOW)
    [one] = msgspec.to_builtins(told["events"])
    at = "2027-01-15T07:59:58.500Z"
    assert one["steps"][-1] == {
        "rule": "occurred_at",
        "verdict": "passes",
        "detail": f'"at" in metadata is {at} (events.dated.occurred_at)',
    }
    assert one["upstream"]["body"] == event("dated", metadata={"n": 1, "at": at})
    assert f'  ok      occurred_at    "at" in metadata is {at}' in "\n".join(
        lines(told)
    )
    stripping = settings.model_copy(update={"gpc": "strip"})
    told = explain(stripping, raw(BODIES["dated"]), REQUESTS["gpc"], now=NOW)
    [one] = msgspec.to_builtins(told["events"])
    assert "own metadata" in [step["rule"] for step in one["steps"]]
    assert one["upstream"]["body"] == event("dated")


def test_a_token_is_read_and_its_uses_are_told(settings: Settings) -> None:
    signer = make_signer(settings)
    assert signer is not None
    token, _ = signer.sign(source_id="u1", uses=5, now=NOW)
    for name, sender in {
        "header": Request(origin="https://shop.example", token=token),
        "nobody": Request(token=token),
    }.items():
        told = explain(settings, raw({"event": "paid"}), sender, now=NOW)
        [one] = msgspec.to_builtins(told["events"])
        assert one["status"] == "queued", name
        assert one["queue"]["token_uses"] == "one of 5"
        assert one["upstream"]["body"]["customer"] == {"source_id": "u1"}
        assert token not in repr(told)


def test_what_a_dry_run_would_refuse_is_told(settings: Settings) -> None:
    trial = settings.model_copy(update={"tokens": "dry_run", "anonymous": "trusted"})
    told = explain(trial, raw(event()), REQUESTS["page"], now=NOW)
    [one] = msgspec.to_builtins(told["events"])
    assert one["status"] == "queued"
    assert one["steps"][-1]["rule"] == "would_refuse:token"


@pytest.mark.parametrize(("api", "auth"), list(CREDENTIALS))
def test_no_scheme_shows_its_secret(api: str, auth: str) -> None:
    settings = load_settings(Role.SERVE, ENVIRON, upstream_api=api, auth=auth)
    told = explain(settings, raw(event()), REQUESTS["page"], now=NOW)
    assert "S3CRET" not in repr(told)
    assert "S3CRET" not in "\n".join(lines(told))
    [one] = msgspec.to_builtins(told["events"])
    headers = one["upstream"]["headers"]
    masked = {name for name, value in headers.items() if "***" in value}
    named = {"Authorization"} if "oauth" in auth else set()
    if "keys" in auth:
        named |= {"X-Client-Token"} if api == "client" else {"X-App-Token"}
    assert masked == named
    assert ("origin" in headers) == (api == "client")


def test_the_command_reads_a_file_and_sends_nothing(tmp_path: Path) -> None:
    given = {n.removeprefix("RELAY_").lower(): v for n, v in ENVIRON.items()}
    given = {n: v for n, v in given.items() if n not in ("env_file", "home")}
    # Nothing listens there: whoever asked Redis or Voucherify would say so.
    given |= {"redis_url": "redis://127.0.0.1:9", "cluster": "http://127.0.0.1:9"}
    (tmp_path / "event.json").write_text(json.dumps(event()))
    done = relay(tmp_path, "explain", "event.json", **given)
    assert done.returncode == 0, done.stderr
    assert "Voucherify would get:" in done.stdout
    assert "S3CRET" not in done.stdout + done.stderr
    (tmp_path / "event.json").write_text(json.dumps(event(loyalty={"code": "C"})))
    done = relay(tmp_path, "explain", "event.json", "--json", **given)
    assert done.returncode == 3
    assert json.loads(done.stdout)["events"][0]["status"] == "forbidden"
    done = relay(tmp_path, "explain", "absent.json", **given)
    assert (done.returncode, done.stdout) == (1, "")
    assert "absent.json cannot be read" in done.stderr
    done = relay(tmp_path, "explain", "event.json", "--route", "other", **given)
    assert done.returncode == 2
