"""Probes get the truth, whoever asks, and nothing else is to be had there."""

import asyncio
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from uvicorn._types import ASGIApplication

from relay import __version__
from relay.errors import QueueUnavailable
from relay.ops import MAX_BODY_BYTES, PROXIED, Check, Stats, ops_app
from relay.outcomes import Outcome
from relay.signing import MAX_TTL_S, Identity, Signer
from tests.programs import RELAY, running
from tests.support import serve

pytestmark = pytest.mark.anyio


async def fine() -> str:
    return "ok"


async def full() -> str:
    return "full: 10 events wait"


async def away() -> str:
    raise QueueUnavailable("redis_unreachable", "Redis cannot be reached.")


async def get(path: str, checks: dict[str, Check]) -> httpx.Response:
    app = cast("ASGIApplication", ops_app(checks))
    async with serve(app) as url, httpx.AsyncClient() as client:
        return await client.get(url + path)


async def test_healthz_says_that_the_process_lives_whatever_else_does() -> None:
    answer = await get("/healthz", {"redis": away})
    assert answer.status_code == 200
    assert answer.json() == {"status": "alive", "version": __version__}


async def test_readyz_is_ready_when_every_check_is_ok() -> None:
    answer = await get("/readyz", {"redis": fine, "queue": fine})
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ready",
        "checks": {"redis": "ok", "queue": "ok"},
    }


async def test_readyz_names_each_check_that_is_not_ok() -> None:
    answer = await get("/readyz", {"redis": away, "queue": full, "disk": fine})
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "unready",
        "checks": {
            "redis": "redis_unreachable: Redis cannot be reached.",
            "queue": "full: 10 events wait",
            "disk": "ok",
        },
    }


async def test_a_crowd_of_probes_is_looked_after_one_by_one() -> None:
    now = most = asked = 0

    async def counting() -> str:
        nonlocal now, most, asked
        now, asked = now + 1, asked + 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return "ok"

    app = cast("ASGIApplication", ops_app({"redis": counting}))
    async with serve(app) as url, httpx.AsyncClient() as client:
        answers = await asyncio.gather(
            *(client.get(f"{url}/readyz") for _ in range(20))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert (most, asked) == (1, 20)


@pytest.mark.parametrize("path", ["/", "/stats", "/metrics", "/track", "/docs"])
async def test_nothing_else_is_served(path: str) -> None:
    assert (await get(path, {})).status_code == 404


def test_off_loopback_the_probes_are_open_and_the_rest_is_not_there(
    valkey_url: str, prefix: str
) -> None:
    token = "S3CRET-of-the-ops-listener"
    env = {
        "RELAY_ENV_FILE": os.devnull,
        "RELAY_REDIS_URL": valkey_url,
        "RELAY_REDIS_PREFIX": prefix,
        "RELAY_ALLOWED_ORIGINS": "https://shop.example",
        "RELAY_CLIENT_TOKEN": "client-token-1",
        "RELAY_PORT": "0",
        "RELAY_OPS_HOST": "0.0.0.0",
        "RELAY_OPS_PORT": "0",
        "RELAY_OPS_TOKEN": token,
    }
    with running([*RELAY, "serve", "--no-forwarder"], env=env) as relay:
        url = relay.wait_for(r"Ready\? http://0\.0\.0\.0(:\d+)/")[1]
        for path, status in [("/healthz", 200), ("/readyz", 200), ("/stats", 404)]:
            assert httpx.get(f"http://127.0.0.1{url}{path}").status_code == status
        bearer = {"Authorization": f"Bearer {token}"}
        for headers, status in [({}, 401), (bearer, 409)]:  # 409: no signing key
            answer = httpx.post(f"http://127.0.0.1{url}/tokens", headers=headers)
            assert answer.status_code == status
        assert relay.stop() == 0
        assert token not in relay.said


# --- tokens ---------------------------------------------------------------------------

KEY = "k" * 32
OPS = SecretStr("S3CRET-of-the-ops-listener")
BEARER = {"Authorization": f"Bearer {OPS.get_secret_value()}"}
SHOP = "https://shop.example"


@contextmanager
def listener(
    *, key: bool = True, token: SecretStr | None = None
) -> Iterator[httpx.Client]:
    """The ops listener on a real socket, and a backend that talks to it."""
    signer = Signer([KEY], ttl_s=3600) if key else None
    app = cast("ASGIApplication", ops_app({"redis": fine}, signer=signer, token=token))
    with (
        start_blocking_portal("asyncio") as portal,
        portal.wrap_async_context_manager(serve(app)) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def open_ops() -> Iterator[httpx.Client]:
    with listener() as client:
        yield client


@pytest.fixture(scope="module")
def guarded_ops() -> Iterator[httpx.Client]:
    with listener(token=OPS) as client:
        yield client


def ask(client: httpx.Client, body: object, **headers: str) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/tokens", content=raw, headers=headers)


def read(answer: httpx.Response) -> Identity:
    """What the token in an answer says, to a relay with the same key."""
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told.keys() == {"token", "expires_at"}
    identity = Signer([KEY]).read(told["token"], now=time.time())
    assert told["expires_at"] == identity.expires_at
    return identity


def assert_problem(answer: httpx.Response, status: int, reason: str) -> str:
    """The answer is a problem document (RFC 9457); gives its `detail`."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert (said["status"], said["reason"]) == (status, reason)
    assert said["type"] == f"urn:voucherify-relay:problem:{reason}"
    return str(said["detail"])


def test_a_backend_gets_a_token_that_says_what_it_asked_for(
    open_ops: httpx.Client,
) -> None:
    asked = {
        "source_id": "zoë",
        "events": ["paid"],
        "origin": SHOP,
        "ttl": "2h",
        "uses": 3,
    }
    answer = ask(open_ops, asked)
    said = read(answer)
    assert answer.headers["cache-control"] == "no-store"
    assert (said.source_id, said.events) == ("zoë", frozenset({"paid"}))
    assert (said.origin, said.uses) == (SHOP, 3)
    assert said.expires_at - said.issued_at == 7200


def test_only_the_source_id_is_needed(open_ops: httpx.Client) -> None:
    before = int(time.time())
    said = read(ask(open_ops, {"source_id": "u1"}))
    assert (said.source_id, said.events, said.origin, said.uses) == (
        *("u1", None),
        *(None, None),
    )
    assert before <= said.issued_at <= time.time()
    assert said.expires_at - said.issued_at == 3600  # RELAY_TOKEN_TTL
    nulls = dict.fromkeys(["events", "origin", "ttl", "uses"])
    assert read(ask(open_ops, {"source_id": "u1", **nulls})).uses is None


def test_two_tokens_of_one_second_do_not_share_their_uses(
    open_ops: httpx.Client,
) -> None:
    wanted = {"source_id": "u1", "uses": 1}
    digests = {read(ask(open_ops, wanted)).digest for _ in range(20)}
    assert len(digests) == 20


def test_the_content_type_is_not_looked_at(open_ops: httpx.Client) -> None:
    for kind in ("application/json", "text/plain", ""):
        read(ask(open_ops, {"source_id": "u1"}, **{"Content-Type": kind}))


CANNOT_BE_SIGNED: list[tuple[object, str]] = [
    (b"", "JSON object"),
    (b"{", "JSON object"),
    (b'{"source_id": "u"} x', "JSON object"),
    (b'{"source_id": "\xff"}', "JSON object"),
    (b'{"source_id": "\\ud800"}', "JSON object"),
    (b"[" * 50_000, "object"),
    ([{"source_id": "u"}], "object"),
    ("u", "object"),
    (None, "object"),
    ({}, "source_id"),
    ({"source_id": ""}, "source_id"),
    ({"source_id": None}, "source_id"),
    ({"source_id": 1}, "source_id"),
    ({"source_id": "u" * 513}, "source_id"),
    ({"source_id": "u", "more": 1}, "more"),
    ({"source_id": "u", "id": "mine"}, "id"),
    ({"source_id": "u", "expires_at": 1}, "expires_at"),
    ({"source_id": "u", "origin": ""}, "origin"),
    ({"source_id": "u", "origin": "*"}, "origin"),
    ({"source_id": "u", "origin": "null"}, "origin"),
    ({"source_id": "u", "origin": "shop.example"}, "origin"),
    ({"source_id": "u", "origin": "https://shop.example/x"}, "origin"),
    ({"source_id": "u", "origin": "https://*.shop.example"}, "origin"),
    ({"source_id": "u", "origin": ["https://shop.example"]}, "origin"),
    ({"source_id": "u", "events": []}, "events"),
    ({"source_id": "u", "events": "paid"}, "events"),
    ({"source_id": "u", "events": [""]}, "events"),
    ({"source_id": "u", "events": [1]}, "events"),
    ({"source_id": "u", "events": ["e" * 301]}, "events"),
    ({"source_id": "u", "events": [f"{n * 7919}" for n in range(5000)]}, "events"),
    ({"source_id": "u", "ttl": 0}, "ttl"),
    ({"source_id": "u", "ttl": -1}, "ttl"),
    ({"source_id": "u", "ttl": 1.5}, "ttl"),
    ({"source_id": "u", "ttl": True}, "ttl"),
    ({"source_id": "u", "ttl": MAX_TTL_S + 1}, "ttl"),
    ({"source_id": "u", "ttl": 10**30}, "ttl"),
    ({"source_id": "u", "ttl": "0s"}, "ttl"),
    ({"source_id": "u", "ttl": "367d"}, "ttl"),
    ({"source_id": "u", "ttl": "soon"}, "ttl"),
    ({"source_id": "u", "ttl": "3600"}, "ttl"),
    ({"source_id": "u", "ttl": ""}, "ttl"),
    ({"source_id": "u", "ttl": "9" * 5000 + "s"}, "ttl"),
    ({"source_id": "u", "uses": 0}, "uses"),
    ({"source_id": "u", "uses": 1_000_001}, "uses"),
    ({"source_id": "u", "uses": "3"}, "uses"),
    (b" " * (MAX_BODY_BYTES + 1), "65536"),
    (b" " * 5_000_000, "65536"),
]


@pytest.mark.parametrize(
    ("body", "named"), CANNOT_BE_SIGNED, ids=lambda part: str(part)[:60]
)
def test_a_token_that_cannot_be_made_is_told_why(
    open_ops: httpx.Client, body: object, named: str
) -> None:
    detail = assert_problem(ask(open_ops, body), 400, "invalid")
    assert re.search(rf"\b{named}\b", detail), detail


def test_what_is_just_allowed_is_signed(open_ops: httpx.Client) -> None:
    for parts in (
        {"source_id": "\N{GRINNING FACE}" * 512},
        {"ttl": 1},
        {"ttl": "1s"},
        {"ttl": MAX_TTL_S},
        {"ttl": "366d"},
        {"uses": 1},
        {"uses": 1_000_000},
        {"events": ["e" * 300]},
        {"origin": "HTTPS://Shop.Example:443"},
    ):
        said = read(ask(open_ops, {"source_id": "u", **parts}))
        assert said.origin in (None, SHOP)
    small = b'{"source_id":"u"}'
    read(ask(open_ops, small + b" " * (MAX_BODY_BYTES - len(small))))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
CLAIMS = st.sampled_from(["source_id", "events", "origin", "ttl", "uses", "id", "x"])
BODIES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(CLAIMS, VALUES).map(lambda claims: json.dumps(claims).encode()),
    st.dictionaries(CLAIMS, VALUES).map(
        lambda claims: json.dumps({**claims, "source_id": "u"}).encode()
    ),
)


def test_no_body_makes_a_500(open_ops: httpx.Client) -> None:
    @settings(max_examples=150)
    @given(BODIES)
    def signed_or_told_why(body: bytes) -> None:
        answer = ask(open_ops, body)
        if answer.status_code == 200:
            read(answer)
        else:
            assert_problem(answer, 400, "invalid")

    signed_or_told_why()


async def test_a_backend_that_hangs_up_is_no_fault_of_the_relay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = cast("ASGIApplication", ops_app({}, signer=Signer([KEY])))
    async with serve(app, log_config=None) as url, httpx.AsyncClient() as client:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = "POST /tokens HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        writer.write(head.encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await client.get(f"{url}/healthz")).status_code == 200
    assert [line.getMessage() for line in caplog.records if line.exc_info] == []


# Who may ask


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Bearer",
        "Bearer x",
        OPS.get_secret_value(),
        f"Basic {OPS.get_secret_value()}",
        f"Bearer {OPS.get_secret_value()}x",
        f"Bearer {OPS.get_secret_value()[:-1]}",
        f"Bearer {OPS.get_secret_value().lower()}",
        "Bearer \xfc\xff",
    ],
    ids=repr,
)
def test_with_an_ops_token_no_other_bearer_gets_one(
    guarded_ops: httpx.Client, sent: str | None
) -> None:
    headers = {} if sent is None else {"Authorization": sent.encode("latin-1")}
    # Neither a sound body nor a broken one makes a difference.
    for body in (b'{"source_id": "u"}', b"{"):
        answer = guarded_ops.post(
            "/tokens", content=body, headers=cast("dict[str, str]", headers)
        )
        detail = assert_problem(answer, 401, "ops_token")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert OPS.get_secret_value() not in detail


def test_the_ops_token_is_enough_from_anywhere(guarded_ops: httpx.Client) -> None:
    for more in ({}, {"Host": "ops.internal"}, {"Origin": SHOP}):
        read(ask(guarded_ops, {"source_id": "u"}, **BEARER, **more))


def test_with_an_ops_token_the_probes_stay_open(guarded_ops: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        assert guarded_ops.get(path).status_code == 200
        foreign = {"Host": "10.0.0.5:9000", "Origin": SHOP}
        assert guarded_ops.get(path, headers=foreign).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:9000",
        "LOCALHOST:9000",
        "127.0.0.1",
        "127.0.0.1:9000",
        "127.1.2.3",
        "[::1]",
        "[::1]:9000",
    ],
)
def test_without_an_ops_token_programs_of_this_machine_get_one(
    open_ops: httpx.Client, host: str
) -> None:
    read(ask(open_ops, {"source_id": "u"}, Host=host))


@pytest.mark.parametrize(
    "headers",
    [
        # A page in a browser on this machine, by its own request…
        {"Origin": "http://localhost:9000"},
        {"Origin": "http://127.0.0.1:9000", "Host": "127.0.0.1:9000"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": SHOP},
        # …and by a name of its own that points here.
        {"Host": "attacker.example"},
        {"Host": "attacker.example:9000"},
        {"Host": "localhost.attacker.example"},
        {"Host": "127.0.0.1.attacker.example:9000"},
        {"Host": "localhost@attacker.example"},
        {"Host": "10.0.0.5:9000"},
        {"Host": "0.0.0.0:9000"},
        {"Host": "[::]:9000"},
        {"Host": "[2001:db8::1]:9000"},
        {"Host": "2130706433"},
        {"Host": "[x"},
        {"Host": "::1"},
        {"Host": ""},
    ],
    ids=lambda headers: " ".join(f"{n}={v}" for n, v in headers.items()),
)
def test_without_an_ops_token_no_web_page_gets_one(
    open_ops: httpx.Client, headers: dict[str, str]
) -> None:
    detail = assert_problem(
        ask(open_ops, {"source_id": "u"}, **headers), 403, "ops_host"
    )
    assert "localhost or 127.0.0.1" in detail
    # A bearer that nobody asked for opens nothing either.
    assert ask(open_ops, {"source_id": "u"}, **BEARER, **headers).status_code == 403


def test_without_an_ops_token_the_probes_are_open_to_any_name(
    open_ops: httpx.Client,
) -> None:
    for path in ("/healthz", "/readyz"):
        headers = {"Host": "relay.internal:9000", "Origin": SHOP}
        assert open_ops.get(path, headers=headers).status_code == 200


def test_without_a_signing_key_it_is_told_which_setting_is_missing() -> None:
    with listener(key=False) as client:
        detail = assert_problem(ask(client, {"source_id": "u"}), 409, "no_signing_key")
        assert "RELAY_SIGNING_KEYS" in detail
        # Whether there is a key is not for strangers to know.
        assert ask(client, {"source_id": "u"}, Origin=SHOP).status_code == 403
    with listener(key=False, token=OPS) as client:
        assert ask(client, {"source_id": "u"}).status_code == 401
        assert ask(client, {"source_id": "u"}, **BEARER).status_code == 409


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_a_token_is_had_by_post_only(open_ops: httpx.Client, method: str) -> None:
    answer = open_ops.request(method, "/tokens", headers={"Origin": SHOP})
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    # Not even a preflight tells a page that it might.
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("name", PROXIED)
def test_what_a_proxy_passes_on_gets_no_token(
    name: str, open_ops: httpx.Client, guarded_ops: httpx.Client
) -> None:
    said = assert_problem(
        ask(open_ops, {"source_id": "u1"}, **{name: "203.0.113.1"}), 403, "ops_host"
    )
    assert "RELAY_OPS_TOKEN" in said
    bearer = f"Bearer {OPS.get_secret_value()}"
    answer = ask(
        guarded_ops, {"source_id": "u1"}, **{name: "203.0.113.1"}, authorization=bearer
    )
    assert answer.status_code == 200


# --- metrics --------------------------------------------------------------------------


async def figures() -> dict[str, object]:
    return {
        "totals": {"received": 1, **dict.fromkeys(map(str, Outcome), 0)},
        "gauges": {},
        "plan": [],
        "forecast": None,
    }


async def no_figures() -> dict[str, object]:
    raise QueueUnavailable("redis_unreachable", "Redis cannot be reached.")


async def test_metrics_are_for_whoever_may_ask_for_tokens() -> None:
    token = SecretStr("a-long-enough-token")
    app = cast("ASGIApplication", ops_app({}, token=token, stats=figures))
    async with serve(app) as url, httpx.AsyncClient() as client:
        refused = await client.get(f"{url}/metrics")
        bearer = {"Authorization": f"Bearer {token.get_secret_value()}"}
        told = await client.get(f"{url}/metrics", headers=bearer)
    assert (refused.status_code, refused.json()["reason"]) == (401, "ops_token")
    assert told.status_code == 200
    assert told.headers["content-type"].startswith("text/plain; version=")
    assert "relay_received_events_total 1.0" in told.text


@pytest.mark.parametrize(("stats", "status"), [(None, 404), (no_figures, 503)])
async def test_metrics_that_are_not_there_say_why(
    stats: Stats | None, status: int
) -> None:
    app = cast("ASGIApplication", ops_app({}, stats=stats))
    async with serve(app) as url, httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/metrics")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
