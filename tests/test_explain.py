"""`relay explain` says what the relay does: it asks the same edge."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from relay.answers import Response
from relay.assembly import make_catalog, make_digests, make_policy
from relay.edge import Admitted, Edge, Head
from relay.explain import DIALECTS, Request, explain, lines
from relay.settings import CREDENTIALS, Role, Settings, load_settings
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
    head = edge.head("POST", request.headers, "198.51.100.7")
    judged = edge.body(head, body, now=NOW) if isinstance(head, Head) else head
    if isinstance(judged, Response):
        return judged.status, [(str(o), r) for o, r, _ in judged.refusals]
    assert isinstance(judged, Admitted)
    status = 200 if request.route == "sdk" else 202
    return status, [(str(r.outcome), r.reason) for r in judged.refused.values()]


@pytest.mark.parametrize("gpc", ["ignore", "strip", "drop"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_it_says_what_the_edge_does(
    settings: Settings, body: object, request_: Request, gpc: str
) -> None:
    if gpc != "ignore" and not request_.gpc:
        return  # the same as without it
    settings = settings.model_copy(update={"gpc": gpc})
    status, refused = decided(settings, raw(body), request_)
    told = msgspec.to_builtins(explain(settings, raw(body), request_, now=NOW))
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


def test_what_waits_and_what_leaves_is_told(settings: Settings) -> None:
    body = event("few", id="x-1", metadata={"n": 1})
    told = explain(settings, raw(body), REQUESTS["page"], now=NOW)
    [one] = msgspec.to_builtins(told["events"])
    assert one["queue"] == {
        "id": "the sender's",
        "lane": "low",
        "delivery": "at_least_once",
        "ttl_s": 7200,
        "limits": [
            "ip=120/1m burst 60",
            "customer=60/1m burst 30",
            "site=20000/1m burst 5000",
        ],
        "coalesce": "one in 10m of this customer",
        "event_limit": "3 in 1d of this customer",
    }
    assert one["upstream"]["url"] == "https://api.voucherify.io/client/v1/events"
    assert one["upstream"]["body"] == event("few", metadata={"n": 1})


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
