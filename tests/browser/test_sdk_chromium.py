"""Voucherify's own clients in a page of a shop, unmodified, sending to a relay.

The page and the relay are two hosts of one site, as www and events would be: what
the clients send is asked for by a preflight, and the shop's cookies go along with
what `voucherify.js` sends. All names lead to this machine.
"""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Page, async_playwright
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from uvicorn._types import ASGIApplication

from tests.browser.test_demo import ARGS
from tests.integration.stack import Stack, stack
from tests.programs import find, needs
from tests.sdk_clients import (
    NEEDS,
    SIGNING_KEY,
    answer,
    arrivals,
    arrived,
    installed,
    thrown,
    token,
)
from tests.support import eventually, serve

pytestmark = [
    pytest.mark.anyio,
    *needs("chromium", package="chromium"),
    *NEEDS,
    pytest.mark.timeout(120),
]

SHOP, EVENTS = "www.shop.example", "events.shop.example"
ELSEWHERE = "www.elsewhere.example"
TO_HERE = "--host-resolver-rules=MAP * 127.0.0.1"

PREFLIGHT = "content-type,x-client-application-id,x-client-token,x-voucherify-channel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A page of `tests/sdk`, and what its library does."""

    page: str
    credentials: bool  # cookies go along
    tells: tuple[str, ...]  # what of an error the page gets to know
    unreachable: str  # its words for a network failure


SDK = Client(
    page="sdk",
    credentials=False,
    tells=("code", "key", "details", "retry_after"),
    unreachable="Network Error",
)
VOUCHERIFY_JS = Client(
    page="voucherify-js",
    credentials=True,
    tells=("code",),
    unreachable="XHR error happened.",
)
WITH_JQUERY = Client(
    page="voucherify-js-jquery",
    credentials=True,
    tells=SDK.tells,
    unreachable=VOUCHERIFY_JS.unreachable,
)
CLIENTS = pytest.mark.parametrize(
    "client", [SDK, VOUCHERIFY_JS, WITH_JQUERY], ids=lambda client: client.page
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """The shop's pages, in a browser, and the relay that they may send to."""

    relay: Stack
    url: str  # the relay's
    port: str  # the pages'
    browser: Browser


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shop(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shop]:
    files = StaticFiles(directory=installed())
    pages = cast("ASGIApplication", Starlette(routes=[Mount("/", files)]))
    place, prefix = tmp_path_factory.mktemp("shop"), f"test-{secrets.token_hex(6)}"
    async with serve(pages) as page_url, async_playwright() as playwright:
        port = page_url.rpartition(":")[2]
        async with stack(
            valkey_url,
            prefix,
            place,
            allowed_origins=f"http://{SHOP}:{port}",
            limits="customer=1/1h",  # each test is a customer of its own
            signing_keys=SIGNING_KEY,  # strangers may only say who they are
        ) as relay:
            serving = relay.start("serve")
            browser = await playwright.chromium.launch(
                executable_path=find("chromium"), args=[*ARGS, TO_HERE], timeout=15_000
            )
            url = f"http://{EVENTS}:{urlsplit(await serving.track_url()).port}"
            yield Shop(relay=relay, url=url, port=port, browser=browser)
            await browser.close()


@asynccontextmanager
async def opened(
    shop: Shop, client: Client, *, host: str = SHOP
) -> AsyncIterator[Page]:
    """Open the library's page, in a profile that has a cookie of the shop."""
    context = await shop.browser.new_context()
    try:
        await context.add_cookies(
            [{"name": "session", "value": "s", "domain": ".shop.example", "path": "/"}]
        )
        page = await context.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        await page.goto(f"http://{host}:{shop.port}/{client.page}.html")
        yield page
        assert faults == []
    finally:
        await context.close()


async def track(page: Page, shop: Shop, **parts: object) -> dict[str, object]:
    """What the library in the page reports of one event."""
    job = {"url": shop.url, "event": "viewed", "metadata": {}, **parts}
    told: dict[str, object] = await page.evaluate("job => run(job)", job)
    return told


@asynccontextmanager
async def preflights(page: Page) -> AsyncIterator[list[str]]:
    """The headers that the browser asks for; there is at least one such request."""
    asked: list[str] = []

    def sent(told: dict[str, dict[str, dict[str, str]]]) -> None:
        if wanted := told["request"]["headers"].get("Access-Control-Request-Headers"):
            asked.append(wanted)

    async def seen() -> list[str]:
        return asked

    # Playwright's own events leave preflights out.
    session = await page.context.new_cdp_session(page)
    session.on("Network.requestWillBeSent", sent)
    await session.send("Network.enable")
    yield asked
    await eventually(seen)  # told of now and then after the answer
    await session.detach()


def somebody() -> dict[str, str]:
    return {"source_id": f"u-{secrets.token_hex(4)}"}


@CLIENTS
async def test_an_event_is_taken_as_voucherify_would_and_delivered_once(
    shop: Shop, client: Client
) -> None:
    customer, metadata = somebody(), {"sku": "A-1", "price": 12.5, "gift": False}
    async with opened(shop, client) as page, preflights(page) as asked:
        async with page.expect_request("**/client/v1/events") as sent:
            told = await track(page, shop, customer=customer, metadata=metadata)
        cookie = await (await sent.value).header_value("cookie")
    assert told == answer("viewed", metadata, **customer)
    assert asked == [PREFLIGHT]
    assert cookie == ("session=s" if client.credentials else None)
    record = await arrived(shop.relay)  # without the cookie
    assert record.body == {
        "event": "viewed",
        "customer": customer,
        "metadata": metadata,
    }


@CLIENTS
async def test_the_clients_identity_names_the_customer(
    shop: Shop, client: Client
) -> None:
    name = somebody()["source_id"]
    async with opened(shop, client) as page:
        told = await track(page, shop, customer={}, identity=name)
    assert told == answer("viewed", source_id=name)
    assert (await arrived(shop.relay)).source_id == name


@CLIENTS
async def test_a_faulty_event_is_told_to_the_page(shop: Shop, client: Client) -> None:
    async with opened(shop, client) as page:
        error = thrown(await track(page, shop, event="", customer=somebody()))
    assert_tells(client, error, code=400, key="invalid_payload", about="event")
    assert await arrivals(shop.relay) == []


@CLIENTS
async def test_a_forbidden_event_is_told_to_the_page(
    shop: Shop, client: Client
) -> None:
    profile = {**somebody(), "email": "someone@else.example"}
    async with opened(shop, client) as page:
        error = thrown(await track(page, shop, customer=profile))
    assert_tells(client, error, code=403, key="forbidden", about="customer.email")
    assert await arrivals(shop.relay) == []


@CLIENTS
async def test_too_many_events_are_told_when_to_come_back(
    shop: Shop, client: Client
) -> None:
    customer = somebody()
    async with opened(shop, client) as page:
        await track(page, shop, customer=customer)
        await arrived(shop.relay)
        error = thrown(await track(page, shop, customer=customer))
    assert_tells(client, error, code=429, key="too_many_requests", about="customer")
    if "retry_after" in client.tells:  # a header, exposed to the page
        assert 3500 < int(str(error["retry_after"])) <= 3600
    assert await arrivals(shop.relay) == []


def assert_tells(
    client: Client, error: dict[str, object], *, code: int, key: str, about: str
) -> None:
    assert error["code"] == code
    if "key" in client.tells:
        assert error["key"] == key
        assert about in str(error["details"])


@CLIENTS
async def test_a_page_of_another_origin_can_send_nothing(
    shop: Shop, client: Client
) -> None:
    async with opened(shop, client, host=ELSEWHERE) as page:
        error = thrown(await track(page, shop, customer=somebody()))
    assert error["message"] == client.unreachable  # the browser tells no more
    assert await arrivals(shop.relay) == []


async def test_headers_that_the_page_adds_reach_the_relay_and_end_there(
    shop: Shop,
) -> None:
    customer, loyalty = somebody(), {"code": "LOYALTY-1"}
    added = {
        "Authorization": "Bearer of-the-page",
        "Relay-Token": token(customer["source_id"]),  # without it: no points
    }
    async with opened(shop, SDK) as page, preflights(page) as asked:
        options = {"customHeaders": added}
        told = await track(
            page, shop, customer=customer, loyalty=loyalty, options=options
        )
    assert told == answer("viewed", **customer)
    [wanted] = asked
    assert {"authorization", "relay-token"} < set(wanted.split(","))
    record = await arrived(shop.relay)  # without both
    assert record.body == {
        "event": "viewed",
        "customer": customer,
        "metadata": {},
        "loyalty": loyalty,
    }
