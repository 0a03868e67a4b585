"""The demo's shop: a strict page, a way to the relay that changes nothing, a panel."""

import hashlib
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from html import unescape
from importlib.resources import files
from typing import cast

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGIApplication

from relay.app import App
from relay.assembly import Station
from relay.demo_shop import DOWN, MAX_BODY_BYTES, OFFLINE, VISITOR, Shop, waiting
from relay.sandbox.app import Sandbox
from relay.sandbox.faults import Fault
from relay.sandbox.server import serve_sandbox
from relay.settings import Role, Settings, load_settings
from relay.snippet import STUB, present, tag
from tests.support import eventually, serve

pytestmark = pytest.mark.anyio

ORIGIN = "http://shop.localhost"
EVENT = b'{"events":[{"event":"e","id":"1","customer":{"source_id":"u1"}}]}'
BEACON = {"Origin": ORIGIN, "Content-Type": "text/plain;charset=UTF-8"}


def settings(prefix: str, cluster: str, sandbox: Sandbox) -> Settings:
    return load_settings(
        Role.SERVE,
        {"RELAY_ENV_FILE": "/dev/null", "HOME": "/nowhere"},
        cluster=cluster,
        client_application_id=sandbox.config.application_id,
        client_token=sandbox.config.client_token,
        origin="https://shop.example",
        allowed_origins=ORIGIN,
        redis_prefix=prefix,
    )


@dataclass
class Whole:
    """A shop in front of a relay in front of a sandbox."""

    shop: httpx.AsyncClient
    relay: httpx.AsyncClient
    sandbox: Sandbox

    async def panel(self) -> dict[str, object]:
        return cast("dict[str, object]", (await self.shop.get("/demo/panel")).json())

    async def shown(self, *parts: str) -> list[tuple[object, ...]]:
        events = cast("list[dict[str, object]]", (await self.panel())["events"])
        return [tuple(event[part] for part in parts) for event in events]


@asynccontextmanager
async def shop(
    redis_url: str, prefix: str, relay: str, sandbox: Sandbox | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    sandbox = sandbox or Sandbox()
    made = Shop(
        settings=settings(prefix, NOBODY, sandbox),
        redis_url=redis_url,
        relay=relay,
        sandbox=sandbox,
        voucherify="http://127.0.0.1:8001/?a&b",
    )
    async with (
        serve(cast("ASGIApplication", made.app)) as url,
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as client,
    ):
        yield client


NOBODY = "http://127.0.0.1:9"


@pytest.fixture
async def front(valkey_url: str, prefix: str) -> AsyncIterator[httpx.AsyncClient]:
    """A shop alone, for what needs no relay."""
    async with shop(valkey_url, prefix, NOBODY) as client:
        yield client


@pytest.fixture
async def whole(valkey_url: str, prefix: str) -> AsyncIterator[Whole]:
    sandbox = Sandbox()
    async with serve_sandbox(sandbox=sandbox) as running:
        station = Station(
            settings(prefix, running.url, sandbox), redis_url=valkey_url, forward=True
        )
        async with (
            serve(cast("ASGIApplication", App(station))) as url,
            httpx.AsyncClient(base_url=url, trust_env=False) as relay,
            shop(valkey_url, prefix, url, sandbox) as client,
        ):
            yield Whole(client, relay, sandbox)


@dataclass
class Recorder:
    """In the place of the relay: notes what it is handed."""

    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.body())
        self.paths.append(request.url.path)
        headers = {"X-Request-Id": "r1", "Keep-Alive": "timeout=5", "Retry-After": "7"}
        await Response(b"as it was", 418, headers)(scope, receive, send)


@pytest.fixture
async def recorded(
    valkey_url: str, prefix: str
) -> AsyncIterator[tuple[httpx.AsyncClient, Recorder]]:
    recorder = Recorder()
    async with (
        serve(cast("ASGIApplication", recorder), lifespan="off") as url,
        shop(valkey_url, prefix, url) as client,
    ):
        yield client, recorder


# The page


async def test_the_page_has_the_very_lines_under_a_strict_policy(
    front: httpx.AsyncClient,
) -> None:
    page = await front.get("/")
    lines = tag(base="", track="track", pin=True, options={})
    assert page.text.count(lines) == 1
    assert unescape(page.text).count(lines) == 2  # and once to be read
    assert "{{" not in page.text
    assert 'href="http://127.0.0.1:8001/?a&amp;b"' in page.text
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in page.headers["content-security-policy"].split(";")
    )
    stub = b64encode(hashlib.sha256(STUB.encode()).digest()).decode()
    assert policy["script-src"] == f"'self' 'sha256-{stub}'"
    assert policy["connect-src"] == "'self'"
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]
    # Nothing of the page's own is inline, which the policy would forbid.
    own = page.text.replace(lines, "")
    assert " style=" not in own
    assert "<style" not in own
    assert own.count("<script") == own.count('<script src="/demo/')


async def test_the_script_is_the_one_that_the_page_pins(whole: Whole) -> None:
    script = await whole.shop.get(f"/{present().name}")
    digest = b64encode(hashlib.sha384(script.content).digest()).decode()
    assert present().integrity == f"sha384-{digest}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("demo.css", "text/css"),
        ("demo.js", "text/javascript"),
        ("demo-panel.js", "text/javascript"),
    ],
)
async def test_the_page_needs_nothing_of_another_host(
    front: httpx.AsyncClient, name: str, kind: str
) -> None:
    asset = await front.get(f"/demo/{name}")
    assert asset.status_code == 200
    assert asset.headers["content-type"].startswith(kind)
    assert asset.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in asset.text
    assert "https://" not in asset.text


async def test_a_visitor_is_known_again(front: httpx.AsyncClient) -> None:
    first = await front.get("/")
    cookie = first.headers["set-cookie"]
    assert cookie.startswith(f"{VISITOR}=")
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "set-cookie" not in (await front.get("/")).headers


# The way to the relay


@pytest.mark.parametrize("coding", ["br", "gzip", "identity", None])
async def test_the_script_comes_as_the_relay_gives_it(
    whole: Whole, coding: str | None
) -> None:
    def ask(client: httpx.AsyncClient) -> httpx.Request:
        request = client.build_request("GET", "/relay.js")
        request.headers.pop("accept-encoding")
        if coding:
            request.headers["accept-encoding"] = coding
        return request

    here = await whole.shop.send(ask(whole.shop), stream=True)
    there = await whole.relay.send(ask(whole.relay), stream=True)
    assert [p async for p in here.aiter_raw()] == [p async for p in there.aiter_raw()]
    same = ("etag", "cache-control", "content-type", "vary", "content-length")
    for name in (*same, "content-encoding", "cross-origin-resource-policy"):
        assert here.headers.get(name) == there.headers.get(name), name
    assert len(here.headers.get_list("date")) == 1
    again = await whole.shop.get(
        "/relay.js",
        headers={
            "If-None-Match": here.headers["etag"],
            "Accept-Encoding": coding or "identity",
        },
    )
    assert (again.status_code, again.content) == (304, b"")


async def test_a_request_is_handed_on_as_it_came(
    recorded: tuple[httpx.AsyncClient, Recorder],
) -> None:
    client, recorder = recorded
    body = b"\x1f\x8b not what it says"
    answer = await client.post(
        "/track",
        content=body,
        headers={
            **BEACON,
            "Cookie": f"session=of-the-shop; {VISITOR}=v",
            "Content-Encoding": "gzip",
            "Prefer": "wait=5",
            "User-Agent": "Browser/1",
            "Accept-Encoding": "br",
        },
    )
    assert (answer.status_code, answer.text) == (418, "as it was")
    assert answer.headers["x-request-id"] == "r1"
    assert answer.headers["retry-after"] == "7"
    assert "keep-alive" not in answer.headers
    assert recorder.bodies == [body]
    assert recorder.paths == ["/track"]
    [headers] = recorder.headers
    assert headers.pop("host") != client.base_url.netloc.decode()
    headers.pop("accept")
    assert headers == {
        "origin": ORIGIN,
        "content-type": "text/plain;charset=UTF-8",
        "content-encoding": "gzip",
        "content-length": str(len(body)),
        "prefer": "wait=5",
        "user-agent": "Browser/1",
        "accept-encoding": "br",
    }


async def test_nothing_is_said_in_the_name_of_the_browser(
    recorded: tuple[httpx.AsyncClient, Recorder],
) -> None:
    client, recorder = recorded
    request = client.build_request("POST", "/track", content=b"{}")
    for name in ("accept", "accept-encoding", "user-agent"):
        request.headers.pop(name)
    await client.send(request)
    assert recorder.headers[0].keys() == {"host", "content-length"}


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        pytest.param({}, 403, "origin", id="no-origin"),
        pytest.param({"Origin": "https://evil.example"}, 403, "origin", id="foreign"),
        pytest.param(
            {"Origin": ORIGIN, "Content-Type": "text/html"},
            415,
            "content_type",
            id="html",
        ),
        pytest.param({"Origin": ORIGIN}, 400, "malformed_json", id="not-json"),
    ],
)
async def test_the_rules_of_the_relay_decide(
    whole: Whole, headers: dict[str, str], status: int, reason: str
) -> None:
    await whole.shop.get("/")
    answer = await whole.shop.post("/track", content=b"not JSON", headers=headers)
    direct = await whole.relay.post("/track", content=b"not JSON", headers=headers)
    assert answer.status_code == direct.status_code == status
    assert answer.json()["reason"] == direct.json()["reason"] == reason
    assert (await whole.panel())["events"] == []


async def test_a_body_too_large_is_for_the_relay_to_refuse_up_to_a_bound(
    whole: Whole,
) -> None:
    answer = await whole.shop.post("/track", content=b"x" * 70_000, headers=BEACON)
    assert answer.json()["reason"] == "too_large"
    answer = await whole.shop.post(
        "/track", content=b"x" * (MAX_BODY_BYTES + 1), headers=BEACON
    )
    assert answer.status_code == 413


async def test_no_relay_is_a_502(front: httpx.AsyncClient) -> None:
    await front.get("/")
    answer = await front.post("/track", content=EVENT, headers=BEACON)
    assert answer.status_code == 502
    [event] = (await front.get("/demo/panel")).json()["events"]
    assert event["status"] == "unavailable"


# The panel


async def test_the_panel_follows_an_event_to_voucherify(whole: Whole) -> None:
    await whole.shop.get("/")
    answer = await whole.shop.post("/track", content=EVENT, headers=BEACON)
    assert answer.json() == {"events": [{"id": "1", "status": "queued"}]}

    async def delivered() -> bool:
        return await whole.shown("id", "event", "status") == [("1", "e", "delivered")]

    await eventually(delivered)
    assert whole.sandbox.event_names() == ["e"]
    panel = await whole.panel()
    assert panel["waiting"] == "Nothing waits in the relay."
    assert (panel["down"], panel["held"]) == (False, False)

    del whole.shop.cookies[VISITOR]  # another visitor
    assert await whole.shown("id") == []
    await whole.shop.get("/")
    assert await whole.shown("id") == []


async def test_a_sender_who_is_no_visitor_is_served_and_not_followed(
    whole: Whole,
) -> None:
    headers = {**BEACON, "Prefer": "wait=10"}
    answer = await whole.shop.post("/track", content=EVENT, headers=headers)
    assert answer.json()["events"][0]["outcome"] == "delivered"
    assert (await whole.panel())["events"] == []


async def test_a_refusal_is_shown_as_the_relay_said_it(whole: Whole) -> None:
    await whole.shop.get("/")
    faulty = EVENT.replace(b'"id"', b'"loyalty":{},"id"')
    answer = await whole.shop.post("/track", content=faulty, headers=BEACON)
    assert answer.status_code == 400
    assert await whole.shown("status", "reason", "detail") == [
        ("invalid", "code_missing", "loyalty.code is required.")
    ]


async def test_an_offline_visitor_does_not_get_through(whole: Whole) -> None:
    await whole.shop.get("/")
    whole.shop.cookies.set(OFFLINE, "1")
    answer = await whole.shop.post("/track", content=EVENT, headers=BEACON)
    assert (answer.status_code, answer.content) == (503, b"")
    assert await whole.shown("id") == []
    del whole.shop.cookies[OFFLINE]
    answer = await whole.shop.post("/track", content=EVENT, headers=BEACON)
    assert answer.status_code == 202


async def test_without_redis_the_panel_says_so(prefix: str) -> None:
    async with shop("redis://127.0.0.1:9", prefix, NOBODY) as client:
        panel = (await client.get("/demo/panel")).json()
    assert panel["held"] is True
    assert panel["waiting"] == "Redis cannot be reached: try again soon."


# The switch


async def test_the_switch_takes_voucherify_down_and_up_again(whole: Whole) -> None:
    await whole.shop.get("/")
    of_its_page = Fault(count=3, status=500, event="another")
    whole.sandbox.inject(of_its_page)
    for down in (True, True, False, False, True):  # twice is once
        answer = await whole.shop.post(
            "/demo/voucherify", json={"down": down}, headers={"Origin": ORIGIN}
        )
        assert answer.json() == {"down": down}
        assert (await whole.panel())["down"] is down
        assert whole.sandbox.faults() == [DOWN, of_its_page][not down :]

    await whole.shop.post("/track", content=EVENT, headers=BEACON)

    async def waits() -> bool:
        said = (await whole.panel())["waiting"]
        return said == "1 event waits in the relay; what has failed is tried again."

    await eventually(waits)
    assert await whole.shown("status") == [("queued",)]
    await whole.shop.post(
        "/demo/voucherify", json={"down": False}, headers={"Origin": ORIGIN}
    )

    async def delivered() -> bool:
        return await whole.shown("status") == [("delivered",)]

    await eventually(delivered, within=20)
    assert len(whole.sandbox.events) == 1


@pytest.mark.parametrize(
    ("origin", "kind", "body", "status"),
    [
        pytest.param("", "application/json", '{"down":true}', 403, id="no-origin"),
        pytest.param(
            "http://evil.example", "application/json", '{"down":true}', 403, id="other"
        ),
        pytest.param(ORIGIN, "text/plain", '{"down":true}', 415, id="beacon"),
        pytest.param(ORIGIN, "application/json", '{"down":1}', 400, id="number"),
        pytest.param(ORIGIN, "application/json", "down", 400, id="not-json"),
        pytest.param(ORIGIN, "application/json", '{"down":true,"x":1}', 400, id="more"),
        pytest.param(ORIGIN, "application/json", " " * 2000, 413, id="too-large"),
    ],
)
async def test_only_the_page_itself_may_switch(
    front: httpx.AsyncClient, origin: str, kind: str, body: str, status: int
) -> None:
    headers = {"Content-Type": kind} | ({"Origin": origin} if origin else {})
    answer = await front.post("/demo/voucherify", content=body, headers=headers)
    assert answer.status_code == status
    assert (await front.get("/demo/panel")).json()["down"] is False


# What waits, in words


def figures(
    hold: str | None = None, eta_s: int | None = 0, **gauges: int | None
) -> dict[str, object]:
    none = {"queued": 0, "in_flight": 0, "delayed": 0, "eta_s": eta_s}
    return {"gauges": none | gauges, "hold": {"hold": hold} if hold else None}


CASES = [
    pytest.param(figures(), "Nothing waits in the relay.", id="nothing"),
    pytest.param(
        figures(None, None, queued=None, in_flight=None, delayed=None),
        "Nothing waits in the relay.",
        id="never-counted",
    ),
    pytest.param(figures(in_flight=1), "1 event waits in the relay.", id="one"),
    pytest.param(
        figures(eta_s=20, queued=14, in_flight=2),
        "16 events wait in the relay; the last one leaves in about 20 s.",
        id="several",
    ),
    pytest.param(
        figures(queued=1, delayed=1),
        "2 events wait in the relay; what has failed is tried again.",
        id="failed",
    ),
    pytest.param(
        figures("breaker_open", delayed=6),
        "Voucherify is down: 6 events wait; the relay tries again by itself.",
        id="down",
    ),
    pytest.param(
        figures("breaker_open"),
        "Delivery is held; the relay tries again with the next event.",
        id="down-and-empty",
    ),
    pytest.param(
        figures("by_hand"),
        "0 events wait. Somebody held delivery: `relay resume` lets it go on.",
        id="by-hand-and-empty",
    ),
    pytest.param(
        figures("config_hold", queued=1),
        "Delivery is held, 1 event waits. This is not the API the relay speaks: check "
        "RELAY_CLUSTER.",
        id="held",
    ),
]


@pytest.mark.parametrize(("told", "said"), CASES)
def test_what_waits_is_said_in_plain_words(told: dict[str, object], said: str) -> None:
    assert waiting(told)["waiting"] == said
    assert waiting(told)["held"] is (told["hold"] is not None)


def test_what_the_page_refers_to_within_itself_is_there() -> None:
    """No browser complains of a drawing, a label or a place that is missing."""
    page = (files("relay") / "static" / "demo.html").read_text("utf-8")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    named = re.findall(r'(?:aria-labelledby|aria-describedby|for)="([^"]+)"', page)
    assert {*re.findall(r'href="#([^"]+)"', page), *named} <= set(ids)
    scripts = "".join(
        (files("relay") / "static" / name).read_text("utf-8")
        for name in ("demo.js", "demo-panel.js")
    )
    assert set(re.findall(r'byId\("([^"]+)"\)', scripts)) <= set(ids)
