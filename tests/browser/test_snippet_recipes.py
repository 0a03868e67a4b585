"""Each recipe of docs/snippet.md, built as its reader builds it, in a real browser.

A shopper opens the page, clicks, and goes on to another product; what the recipe
tracks arrives at Voucherify, each event once and with this body, and the console
stays clean.
"""

import json
import mimetypes
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.async_api import Page
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from relay.snippet import tag
from tests.browser.snippet_shop import Front, Shop, open_shop
from tests.npm import NEEDS
from tests.programs import needs, running
from tests.sdk_clients import SIGNING_KEY, token
from tests.snippet_recipes import NEXT, QUIET, RECIPES, Workshop, workshop
from tests.support import eventually

pytestmark = [
    pytest.mark.anyio,
    *needs("chromium", package="chromium"),
    *NEEDS,
    pytest.mark.timeout(180),  # the first test of a recipe builds it
]

# What a tag manager does with the HTML that was pasted into it: scripts that come by
# innerHTML do not run, so it makes them anew, and not always with their attributes.
CONTAINER = """
const place = document.createElement("div");
place.innerHTML = PASTED;
document.body.append(place);
for (const pasted of place.querySelectorAll("script")) {
  const script = document.createElement("script");
  script.text = pasted.text;
  if (pasted.src) script.src = pasted.src;
  pasted.replaceWith(script);
}
"""
MANAGED = """<!doctype html><html lang="en" data-shopper="u1"><title>Cup</title>
<h1>Cup</h1><button data-sku="cup">Add to cart</button>
<script src="/container.js"></script></html>"""
POLICY = re.compile("Content-Security-Policy: (.+) -->")


@dataclass
class Recipes(Front):
    """The shop's web server, with a host for each recipe."""

    # The files of each host; what has none is asked for from Next.js.
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    next_url: str = ""

    def have(self, host: str, directory: Path) -> None:
        """Let a host have the files of a directory."""
        self.files[host] = {
            "/" if file.name == "index.html" else f"/{file.name}": file.read_text()
            for file in directory.iterdir()
        }

    async def page(self, request: Request) -> Response:
        host = request.headers["host"].partition(".")[0]
        path = request.url.path
        if path == "/favicon.ico":
            return Response(status_code=204)
        if host not in self.files:
            return await self._from_next(request)
        # The backend, which knows who is logged in, and writes it into the page.
        customer = token(request.cookies["session"])
        text = self.files[host][path].replace('"u1"', f'"{customer}"')
        headers = {"Content-Security-Policy": self.policies.get(host, "")}
        if path == "/":
            return HTMLResponse(text, headers=headers)
        return Response(text, media_type=mimetypes.guess_type(path)[0])

    async def _from_next(self, request: Request) -> Response:
        url = f"{self.next_url}{request.url.path}?{request.url.query}"
        answer = await self.client.get(url, headers=request.headers.items())
        kind = answer.headers.get("content-type")
        return Response(answer.content, answer.status_code, media_type=kind)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def made() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture(scope="module")
def next_url(made: Workshop) -> Iterator[str]:
    command = [
        *NEXT,
        "start",
        str(made.nextjs),
        "--hostname",
        "127.0.0.1",
        "--port",
        "0",
    ]
    with running(command, env={**QUIET, "TOKEN_KEY": SIGNING_KEY}) as program:
        yield program.wait_for(r"Local: +(http://\S+)")[1]


@pytest.fixture(scope="module")
async def shop(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shop]:
    place, prefix = tmp_path_factory.mktemp("shop"), f"test-{secrets.token_hex(6)}"
    async with open_shop(
        valkey_url,
        prefix,
        place,
        front=Recipes(),
        signing_keys=SIGNING_KEY,  # strangers may only say who they are
    ) as shop:
        yield shop


@dataclass(frozen=True, slots=True)
class Visit:
    """One shopper on a recipe's page, and what arrived of hers."""

    shop: Shop
    page: Page
    customer: str

    async def arrives(self, *events: tuple[str, str]) -> None:
        """Wait for these events, each a name and a product; fail if there are more."""
        expected = [
            {
                "event": name,
                "customer": {"source_id": self.customer},
                "metadata": {"sku": sku},
            }
            for name, sku in events
        ]

        async def enough() -> bool:
            return len(self.bodies()) >= len(expected)

        await eventually(enough)
        # The page has been told of each event, and so will send none again.
        await self.page.wait_for_function(
            "!Object.keys(localStorage).some((key) => key.startsWith('relay:event:'))"
        )
        await self.shop.stack.drained()
        # Voucherify is not told events in their order.
        assert sorted(self.bodies(), key=str) == sorted(expected, key=str)

    def bodies(self) -> list[object]:
        return [
            json.loads(json.dumps(record.body))
            for record in self.shop.stack.sandbox.events
            if record.source_id == self.customer
        ]


@asynccontextmanager
async def visited(shop: Shop, host: str, path: str = "/") -> AsyncIterator[Visit]:
    """Open a recipe's page; fail if anything is said on its console."""
    customer = f"{host}-{secrets.token_hex(6)}"
    context = await shop.browser.new_context()
    said: list[str] = []
    try:
        url = shop.url(host, path)
        await context.add_cookies([{"name": "session", "value": customer, "url": url}])
        page = await context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        await page.goto(url)
        yield Visit(shop, page, customer)
        assert said == []
    finally:
        await context.close()


@pytest.mark.parametrize("pin", [False, True], ids=["any-version", "pinned"])
async def test_the_tag_in_a_plain_page(shop: Shop, pin: bool) -> None:
    host = "pinned" if pin else "plain"
    lines = tag(base="", track="track", pin=False, options={})
    parts = indented(lines), indented(tag(base="", track="track", pin=pin, options={}))
    assert html("plain.html").count(parts[0]) == 1
    front(shop).files[host] = {"/": html("plain.html").replace(*parts)}
    async with visited(shop, host) as visit:
        await add_to_cart(visit)
        await visit.arrives(("product_viewed", "cup"), ("added_to_cart", "cup"))


async def test_a_page_whose_policy_allows_no_script_in_it(shop: Shop) -> None:
    text = html("strict.html")
    [front(shop).policies["strict"]] = POLICY.findall(text)
    front(shop).files["strict"] = {"/": text, "/shop.js": html("strict.js")}
    async with visited(shop, "strict") as visit:
        await add_to_cart(visit)
        await visit.arrives(("added_to_cart", "cup"))


async def test_a_tag_in_a_tag_manager(shop: Shop) -> None:
    pasted = json.dumps(html("tag-manager.html"))
    container = f"const PASTED = {pasted};{CONTAINER}"
    front(shop).files["managed"] = {"/": MANAGED, "/container.js": container}
    async with visited(shop, "managed") as visit:
        # The button is older than the tag, which comes when it comes.
        await visit.page.wait_for_function("typeof relay == 'function'")
        await add_to_cart(visit)
        await visit.arrives(("added_to_cart", "cup"))


async def test_a_component_of_react(made: Workshop, shop: Shop) -> None:
    front(shop).have("react", made.react)
    await shops_in_an_app(shop, "react", "/")


async def test_a_component_of_vue(made: Workshop, shop: Shop) -> None:
    front(shop).have("vue", made.vue)
    await shops_in_an_app(shop, "vue", "/")


async def test_an_app_of_next_js(next_url: str, shop: Shop) -> None:
    front(shop).next_url = next_url
    await shops_in_an_app(shop, "nextjs", "/cup")


async def shops_in_an_app(shop: Shop, host: str, path: str) -> None:
    """Shop for two products, one after the other, in one document."""
    async with visited(shop, host, path) as visit:
        await visit.page.evaluate("window.isTheFirst = true")
        await add_to_cart(visit)
        await visit.page.get_by_text("Next product").click()
        await visit.page.get_by_role("heading", name="plate").wait_for()
        await add_to_cart(visit)
        await visit.arrives(
            ("product_viewed", "cup"),
            ("added_to_cart", "cup"),
            ("product_viewed", "plate"),
            ("added_to_cart", "plate"),
        )
        assert visit.page.url.endswith("/plate")
        assert await visit.page.evaluate("window.isTheFirst")


async def add_to_cart(visit: Visit) -> None:
    await visit.page.get_by_role("button", name="Add to cart").click()


def front(shop: Shop) -> Recipes:
    assert isinstance(shop.front, Recipes)
    return shop.front


def html(name: str) -> str:
    return (RECIPES / name).read_text("utf-8")


def indented(lines: str) -> str:
    return "\n    ".join(lines.split("\n"))
