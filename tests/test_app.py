"""The public application: its one path, and everything that is not it."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import cast

import httpx
import pytest
from starlette.types import Message, Scope
from uvicorn._types import ASGIApplication

from relay.app import App
from relay.assembly import Station
from relay.queue import Queue
from relay.settings import Role, Settings, load_settings
from relay.snippet import NAME, present
from tests.support import eventually, serve

pytestmark = pytest.mark.anyio

SHOP = "https://shop.example"
EVENT = {"event": "e", "customer": {"source_id": "customer-1a"}, "id": "x-1"}
NOWHERE = "redis://127.0.0.1:9/0"  # the discard port: nothing listens there

Start = Callable[..., Awaitable[httpx.AsyncClient]]


def settings(prefix: str, **more: str) -> Settings:
    environ = {
        "RELAY_ALLOWED_ORIGINS": SHOP,
        "RELAY_CLIENT_APPLICATION_ID": "app-1",
        "RELAY_CLIENT_TOKEN": "client-token-1a2b3c",
        "RELAY_ORIGIN": "shop.example",
        "RELAY_REDIS_PREFIX": prefix,
        **more,
    }
    return load_settings(Role.EDGE, environ)


@pytest.fixture
async def start(valkey_url: str, prefix: str) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def begin(
            redis_url: str = valkey_url, **variables: str
        ) -> httpx.AsyncClient:
            app = make_app(redis_url, prefix, **variables)
            url = await stack.enter_async_context(
                serve(cast("ASGIApplication", app), proxy_headers=False)
            )
            if redis_url == valkey_url:  # housekeeping has had its first turn
                await eventually(lambda: gauges(valkey_url, prefix))
            return await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, headers={"origin": SHOP}, timeout=20)
            )

        yield begin


def make_app(redis_url: str, prefix: str, **variables: str) -> App:
    made = settings(prefix, RELAY_REDIS_URL=redis_url, **variables)
    return App(Station(made, redis_url=redis_url, forward=False))


async def totals(url: str, prefix: str) -> dict[str, str]:
    return await look(url, prefix, "totals")


async def gauges(url: str, prefix: str) -> dict[str, str]:
    return await look(url, prefix, "gauges")


async def look(url: str, prefix: str, key: str) -> dict[str, str]:
    queue = Queue(url=url, prefix=prefix)
    try:
        return await queue.hash(key)
    finally:
        await queue.aclose()


def assert_nothing_here(response: httpx.Response) -> None:
    said = response.json()
    assert (response.status_code, said["status"], said["reason"]) == (404, 404, "path")
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["access-control-allow-origin"] == SHOP
    assert response.headers["vary"] == "Origin"
    assert response.headers["x-request-id"]
    assert not [name for name in response.headers if name.startswith("ratelimit")]


async def test_an_event_is_taken_on_its_path(
    start: Start, valkey_url: str, prefix: str
) -> None:
    client = await start()
    response = await client.post("/track", json=EVENT)
    assert response.status_code == 202
    assert response.json() == {"events": [{"id": "x-1", "status": "queued"}]}
    assert response.headers["ratelimit-policy"].startswith('"ip";q=60;w=30')
    assert await totals(valkey_url, prefix) == {"received": "1"}


@pytest.mark.parametrize("prefix_path", ["", "/e"])
async def test_the_snippet_is_served_in_every_version_that_is_pinned(
    prefix_path: str, start: Start
) -> None:
    client = await start(**({"RELAY_PATH_PREFIX": prefix_path} if prefix_path else {}))
    for name, age in ((NAME, "max-age=3600"), (present().name, "immutable")):
        for coding in ("br", "gzip", "identity"):
            response = await client.get(
                f"{prefix_path}/{name}", headers={"accept-encoding": coding}
            )
            assert response.status_code == 200
            assert response.headers.get("content-encoding", "identity") == coding
            assert age in response.headers["cache-control"]
            assert response.headers["x-request-id"]
            if coding != "br":  # which the client does not undo
                assert response.content == present().encodings["identity"]
        again = await client.get(
            f"{prefix_path}/{name}",
            headers={
                "accept-encoding": "identity",
                "if-none-match": response.headers["etag"],
            },
        )
        assert (again.status_code, again.content) == (304, b"")
        head = await client.head(f"{prefix_path}/{name}")
        assert (head.status_code, head.content) == (200, b"")
        assert (await client.post(f"{prefix_path}/{name}")).status_code == 405
    assert_nothing_here(await client.get(f"{prefix_path}/relay.{'0' * 16}.js"))


async def test_a_report_of_a_browser_is_counted_by_its_family(
    start: Start, valkey_url: str, prefix: str
) -> None:
    client = await start()
    body = {"events": [EVENT], "report": {"called": 3, "offline": 2}}
    answer = await client.post("/track", json=body, headers={"user-agent": "Edg/131"})
    assert answer.status_code == 202

    async def counted() -> bool:
        queue = Queue(url=valkey_url, prefix=prefix)
        try:
            day = f"{await queue.now():%Y%m%d}"
        finally:
            await queue.aclose()
        told = await look(valkey_url, prefix, f"browser:{day}")
        return told == {"edge:called": "3", "edge:offline": "2", "edge:arrived": "1"}

    await eventually(counted)


async def test_the_snippet_can_be_switched_off_everywhere(start: Start) -> None:
    client = await start(RELAY_SNIPPET="off")
    taken = await client.post("/track", json=EVENT)
    refused = await client.post("/track", json={"event": "e"})
    assert (taken.status_code, taken.json()["disabled"]) == (202, True)
    assert (refused.status_code, refused.json()["disabled"]) == (400, True)
    sdk = await client.post("/client/v1/events", json=EVENT | {"id": "x-2"})
    assert "disabled" not in sdk.json()


async def test_a_query_does_not_change_the_path(start: Start) -> None:
    client = await start()
    assert (await client.post("/track?v=1", json=EVENT)).status_code == 202


@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS", "PUT"])
async def test_any_other_path_is_404_and_never_a_redirect(
    start: Start, method: str
) -> None:
    client = await start()
    for path in (
        "/",
        "/track/",
        "//track",
        "/Track",
        "/track/x",
        "/track%2F",
        "/nothing",
        "/%00",
    ):
        assert_nothing_here(await client.request(method, path))


async def test_a_head_elsewhere_has_no_body(start: Start) -> None:
    client = await start()
    response = await client.head("/nothing")
    assert (response.status_code, response.content) == (404, b"")


async def test_a_404_is_not_readable_by_a_strange_page(start: Start) -> None:
    client = await start()
    response = await client.get("/", headers={"origin": "https://evil.example"})
    assert response.status_code == 404
    assert "access-control-allow-origin" not in response.headers


async def test_the_path_is_the_operators_and_comes_after_the_prefix(
    start: Start,
) -> None:
    client = await start(RELAY_TRACK_PATH="/e", RELAY_PATH_PREFIX="/relay")
    assert (await client.post("/relay/e", json=EVENT)).status_code == 202
    for path in (
        "/e",
        "/relay",
        "/track",
        "/relay/track",
        "/relay/e/",
        "/relay/relay/e",
    ):
        assert_nothing_here(await client.post(path, json=EVENT))


async def test_other_methods_on_the_path_are_405(start: Start) -> None:
    client = await start()
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        response = await client.request(method, "/track")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST, OPTIONS"


async def test_a_preflight_is_answered(start: Start) -> None:
    client = await start()
    asked = {"access-control-request-method": "POST"}
    response = await client.options("/track", headers=asked)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == SHOP


# Voucherify's own clients: their path is theirs, whatever the track path is.

OWN_CLIENT = {
    "x-client-application-id": "whatever",
    "x-client-token": "whatever",
    "x-voucherify-channel": "JavaScript-SDK",
}


async def ask_at(client: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    """Ask for a path as it stands; a client library may tidy slashes up."""
    url = client.base_url.copy_with(raw_path=path.encode())
    headers = OWN_CLIENT if method == "POST" else {}
    return await client.request(
        method, url, json=EVENT if method == "POST" else None, headers=headers
    )


def assert_event_object(response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    said = response.json()
    assert (said["object"], said["type"]) == ("event", "e")
    assert said["customer"] == {"object": "customer", "source_id": "customer-1a"}
    assert response.headers["access-control-allow-origin"] == SHOP


SDK_PATHS = {
    "": ["/client/v1/events", "//client/v1/events"],
    "/relay": [
        "/relay/client/v1/events",
        "/relay//client/v1/events",
        "//relay/client/v1/events",
    ],
    "/a/b": ["/a/b/client/v1/events", "/a/b//client/v1/events"],
}


@pytest.mark.parametrize("before", SDK_PATHS, ids=lambda before: before or "no-prefix")
async def test_voucherifys_own_clients_are_answered_in_their_words(
    start: Start, valkey_url: str, prefix: str, before: str
) -> None:
    client = await start(RELAY_PATH_PREFIX=before, RELAY_TRACK_PATH="/e")
    for path in SDK_PATHS[before]:
        assert_event_object(await ask_at(client, "POST", path))
        assert_event_object(await ask_at(client, "POST", f"{path}?v=1"))
    # The same id each time: one event, and the sender cannot tell.
    total = 2 * len(SDK_PATHS[before])
    counts = {"received": str(total), "duplicate": str(total - 1)}
    assert await totals(valkey_url, prefix) == counts


@pytest.mark.parametrize("before", SDK_PATHS, ids=lambda before: before or "no-prefix")
async def test_a_preflight_of_voucherifys_own_clients_is_answered(
    start: Start, before: str
) -> None:
    client = await start(RELAY_PATH_PREFIX=before)
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": ",".join(sorted(OWN_CLIENT)),
    }
    for path in SDK_PATHS[before]:
        url = client.base_url.copy_with(raw_path=path.encode())
        response = await client.options(url, headers=asked)
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["access-control-allow-origin"] == SHOP
        allowed = response.headers["access-control-allow-headers"].split(", ")
        assert {*OWN_CLIENT, "relay-token", "content-type"} <= set(allowed)
        foreign = asked | {"origin": "https://evil.example"}
        refused = await client.options(url, headers=foreign)
        assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
@pytest.mark.parametrize("before", ["", "/relay"], ids=["no-prefix", "prefix"])
async def test_what_is_only_like_the_path_of_voucherifys_clients_is_404(
    start: Start, before: str, method: str
) -> None:
    client = await start(RELAY_PATH_PREFIX=before)
    elsewhere = [
        f"{before}/client/v1",
        f"{before}/client//v1/events",
        f"{before}/v1/events",
        *(["/relay/relay/track"] if before else []),
    ]
    for path in elsewhere:
        assert_nothing_here(await ask_at(client, method, path))
    # These may be calls of such a client, so it is told in the form that it reads.
    calls = [
        f"{before}/client/v1/events/",
        f"{before}/client/v1/Events",
        f"{before}///client/v1/events",
        f"{before}/client/v1/events/e",
        f"{before}/client/v1/validations",
        *(["/client/v1/events", "//client/v1/events"] if before else []),
    ]
    for path in calls:
        response = await ask_at(client, method, path)
        said = response.json()
        assert (response.status_code, said["code"]) == (404, 404)
        assert (said["key"], said["reason"]) == ("not_found", "path")
        assert said["request_id"] == response.headers["x-request-id"]


async def test_other_methods_on_the_path_of_voucherifys_clients_are_405(
    start: Start,
) -> None:
    client = await start()
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        response = await ask_at(client, method, "/client/v1/events")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST, OPTIONS"


async def test_a_batch_is_for_the_track_path_only(start: Start) -> None:
    client = await start()
    batch = [EVENT, EVENT | {"id": "x-2"}]
    assert (await client.post("/track", json=batch)).status_code == 202
    response = await client.post("/client/v1/events", json=batch)
    said = response.json()
    assert (response.status_code, said["reason"]) == (400, "one_event")
    assert (said["code"], said["key"]) == (400, "invalid_payload")
    assert said["request_id"] == response.headers["x-request-id"]


async def test_one_id_is_one_event_on_both_paths(start: Start) -> None:
    client = await start()
    assert_event_object(await client.post("/client/v1/events", json=EVENT))
    response = await client.post("/track", json=EVENT)
    assert response.json() == {"events": [{"id": "x-1", "status": "duplicate"}]}


async def test_a_relay_that_starts_without_redis_answers_503(start: Start) -> None:
    client = await start(redis_url=NOWHERE)
    response = await client.post("/track", json=EVENT)
    said = response.json()
    assert (response.status_code, said["id"]) == (503, "x-1")
    assert int(response.headers["retry-after"]) >= 1
    assert_nothing_here(await client.get("/"))


async def live(app: App, at_work: Callable[[], Awaitable[object]]) -> None:
    """Take the application through its whole life; it ends once it is at work."""
    said: list[str] = []
    steps = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        if said:
            await eventually(at_work)
        return {"type": next(steps)}

    async def send(message: Message) -> None:
        said.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_request_that_comes_after_the_end_is_told_to_come_again(
    valkey_url: str, prefix: str
) -> None:
    app = make_app(valkey_url, prefix)
    answered: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(EVENT).encode()}

    async def send(message: Message) -> None:
        answered.append(message)

    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/track",
        "headers": [(b"origin", SHOP.encode())],
        "client": ("192.0.2.1", 1),
    }
    await live(app, lambda: gauges(valkey_url, prefix))
    await app(scope, receive, send)
    start, body = answered
    said = json.loads(body["body"])
    assert (start["status"], said["reason"], said["id"]) == (503, "draining", "x-1")
    assert dict(start["headers"])[b"retry-after"] == b"1"
    assert await totals(valkey_url, prefix) == {}
