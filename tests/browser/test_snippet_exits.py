"""No event is lost on the way out of the page, however it was installed and left.

A table: how the snippet came into the page, how the shopper leaves, and what is wrong
meanwhile. In each cell a real Chromium calls for events, leaves at once, and every
event arrives at the sandbox, once. docs/snippet.md keeps the table:
`make snippet-table` runs every cell and writes it there.
"""

import asyncio
import json
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from playwright.async_api import BrowserContext, Error, Page

from tests.browser.snippet_shop import Front, Shop, open_shop
from tests.programs import find, needs
from tests.snippet_recipes import workshop
from tests.support import eventually

pytestmark = [
    pytest.mark.anyio,
    *needs("chromium", package="chromium"),
    pytest.mark.timeout(600),
]

INSTALLS = ("stub", "loaded", "module", "manager")
EXITS = ("link", "close", "back", "reload", "crash", "hide", "listener")
CONDITIONS = (
    *("online", "offline", "down", "limited", "quota", "storage", "csp", "fetch"),
    *("tabs", "bfcache"),
)
# What a beacon does not get through.
LATER = ("offline", "down", "limited")
AT_ONCE = 16  # shoppers that do something
PRESENT = 40  # and those who wait for the last of their events, or for a lease to end
WITHIN_S = 45.0
DOCUMENT = Path(__file__).parents[2] / "docs" / "snippet.md"

NO_STORAGE = """Object.defineProperty(window, "localStorage", {
  get() { throw new DOMException("denied", "SecurityError"); } });"""
SHOWN = """addEventListener("pageshow", (event) => {
  window.restored = event.persisted; });"""
LOADED = """performance.getEntriesByType("resource").some(
  (entry) => /relay\\.m?js$/.test(entry.name) && entry.responseStatus == 200)"""
# Why a page came back anew: https://developer.mozilla.org/docs/Web/API/NotRestoredReasons
NOT_RESTORED = """JSON.stringify(
  performance.getEntriesByType("navigation")[0].notRestoredReasons)"""
# That what is meant to be wrong is wrong, or a cell would show nothing.
WRONG = {
    "offline": "!navigator.onLine",
    "quota": "!navigator.sendBeacon('/slow', 'x'.repeat(400))",
    "storage": "(() => { try { localStorage } catch { return true } })()",
    "csp": """(() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = true";  // without the nonce
      document.head.append(script);
      return !window.ran })()""",
    "fetch": "(() => { try { fetch('/slow') } catch { return true } })()",
    "bfcache": "window.restored",
}
PATCHED = """window.fetch = function () { throw new TypeError("patched"); };"""


@dataclass(frozen=True, slots=True)
class Cell:
    install: str
    exit: str
    condition: str

    def __str__(self) -> str:
        return f"{self.install}-{self.exit}-{self.condition}"

    @property
    def runs(self) -> bool:
        """Whether this machine has what it takes: npm's module has to be built."""
        return self.install != "module" or find("npm") is not None

    @property
    def returns(self) -> bool:
        """Whether the shopper has to come back for the last events to leave."""
        if self.exit in ("crash", "close", "hide"):
            return self.exit == "crash" or self.condition in LATER
        return self.condition == "offline"  # there the next page does not load

    @property
    def killed(self) -> bool:
        """Nobody is asked before a crash, and nothing is left without a store."""
        return self.exit == "crash" and self.condition == "storage"


EVERY = [
    Cell(install, exit_, condition)
    for install in INSTALLS
    for exit_ in EXITS
    for condition in CONDITIONS
]
# For every run of the tests: of ways in, ways out and what may be wrong, each with each
# of the others.
SOME = [
    cell
    for cell in EVERY
    if cell.condition == "online"
    or cell.install
    == INSTALLS[
        (EXITS.index(cell.exit) + CONDITIONS.index(cell.condition)) % len(INSTALLS)
    ]
]
CELLS = EVERY if os.environ.get("EVERY_CELL") else SOME

Result = tuple[int, int, int]  # called, arrived, most often
Results = Mapping[Cell, Result | BaseException]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shop(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shop]:
    place, prefix = tmp_path_factory.mktemp("shop"), f"test-{secrets.token_hex(6)}"
    front = Front()
    if find("npm") is not None:
        with workshop() as made:
            front.module = (made.package / "dist" / "relay.mjs").read_text("utf-8")
    async with open_shop(
        valkey_url, prefix, place, front=front, limits="customer=6/1s burst 6"
    ) as shop:
        yield shop


@pytest.fixture(scope="module")
async def results(shop: Shop) -> Results:
    turns, seats = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(PRESENT)

    async def run(cell: Cell) -> Result:
        async with seats:
            return await visit(shop, cell, turns)

    # What waits for the longest goes first.
    cells = sorted((c for c in CELLS if c.runs), key=lambda c: c.exit != "crash")
    done = await asyncio.gather(*(run(cell) for cell in cells), return_exceptions=True)
    return dict(zip(cells, done, strict=True))


def result_of(results: Results, cell: Cell) -> Result:
    """What its visit came to. Raises what went wrong in it, and in no other."""
    found = results[cell]
    if isinstance(found, BaseException):
        raise found
    return found


async def visit(shop: Shop, cell: Cell, turns: asyncio.Semaphore) -> Result:
    """One shopper, from the first page to the last event."""
    host = f"c{EVERY.index(cell)}"
    async with turns:
        context = await shop.browser.new_context()
    try:
        cookies = {"install": cell.install} | ({"csp": "1"} if _is_csp(cell) else {})
        await context.add_cookies(
            [{"name": n, "value": v, "url": shop.url(host)} for n, v in cookies.items()]
        )
        await context.add_init_script(SHOWN)
        if cell.condition == "storage":
            await context.add_init_script(NO_STORAGE)
        if cell.condition == "fetch":
            await context.add_init_script(PATCHED)
        async with turns:
            called = await _visit(shop, cell, host, context)
        return await _result(shop, cell, called)
    finally:
        shop.front.down.discard(f"{host}.shop.localhost")
        await _soon(context.close())


def _is_csp(cell: Cell) -> bool:
    return cell.condition == "csp"


async def _visit(shop: Shop, cell: Cell, host: str, context: BrowserContext) -> int:
    called = 0

    async def call(page: Page, then: str = "") -> None:
        """Call for some events, and do what comes then in the same breath."""
        nonlocal called
        few = 8 if cell.condition == "limited" else 2
        numbers = [str(called + n + 1) for n in range(few)]
        called += few
        calls = page.evaluate(
            """([who, numbers, then]) => {
              relay("identify", who);
              const track = () => {
                for (const n of numbers) relay("track", "e", { n });
              };
              if (then == "listener") addEventListener("pagehide", track);
              else track();
              if (["link", "listener"].includes(then))
                document.querySelector("a").click();
              if (then == "back") history.back();
              if (then == "reload") location.reload();
              if (then == "hide") {
                Object.defineProperty(document, "hidden", { value: true });
                document.dispatchEvent(new Event("visibilitychange"));
              }
            }""",
            [str(cell), numbers, then],
        )
        await _soon(calls)  # the page may be gone before it can answer

    page = await context.new_page()
    if cell.exit == "back":
        await _open(page, shop.url(host, "/before"))
    await _open(page, shop.url(host))
    if cell.condition == "tabs":
        other = await context.new_page()
        await _open(other, shop.url(host, "/other"))
        await call(other)
    if cell.condition == "bfcache":
        await _restore(page, shop.url(host, "/there"))
    if cell.condition == "quota":
        # Most of what the browser lets a page have on its way at once.
        await page.evaluate(
            """() => void fetch("/slow", { method: "POST", keepalive: true,
                 body: "x".repeat(64 * 1024 - 300) })"""
        )
    if cell.condition == "offline":
        await context.set_offline(True)
    if cell.condition == "down":
        shop.front.down.add(f"{host}.shop.localhost")
    if cell.condition in WRONG:
        assert await page.evaluate(WRONG[cell.condition]), cell
    await call(page)
    page = await _leave(shop, context, page, cell, call)
    if cell.condition == "offline":
        await _online(context)
    shop.front.down.discard(f"{host}.shop.localhost")
    if cell.returns:
        page = await context.new_page()
        await _open(page, shop.url(host, "/again"))
    return called


async def _result(shop: Shop, cell: Cell, called: int) -> Result:
    async def all_arrived() -> bool:
        return len(shop.arrived(str(cell))) >= called

    with suppress(AssertionError):
        await eventually(all_arrived, within=5 if cell.killed else WITHIN_S)
    arrived = shop.arrived(str(cell))
    return called, len(arrived), max(arrived.values(), default=0)


async def _online(context: BrowserContext) -> None:
    """The network is back, also while a page of the context is just going."""

    async def told() -> bool:
        with suppress(Error):
            await context.set_offline(False)
            return True
        return False

    await eventually(told)


async def _open(page: Page, url: str) -> None:
    await page.goto(url)
    await page.wait_for_function("typeof relay == 'function'")
    # Or the stub alone would take the events, and they would be gone with the page.
    assert await page.evaluate(LOADED), f"no script in {url}"


async def _restore(page: Page, elsewhere: str) -> None:
    """Leave a page and come back to it as it was.

    It is what the cell begins with and not what it tries, and a browser may always load
    a page anew instead, say when many are open: then it is done again.
    """
    reasons: list[object] = []
    for _ in range(5):
        await _open(page, elsewhere)
        # Not go_back(), which waits for a page to load: this one comes as it was.
        await _soon(page.evaluate("history.back()"))
        # Not by its frames: a restored page may draw none for a while.
        shown = f"location.href != {json.dumps(elsewhere)} && 'restored' in window"
        await page.wait_for_function(shown, polling=100)
        if await page.evaluate("window.restored"):
            return
        reasons.append(await page.evaluate(NOT_RESTORED))
    pytest.fail(f"the page was always loaded anew: {reasons}")


async def _some_arrived(shop: Shop, cell: Cell) -> None:
    """What leaves at once has left; one that arrives only later is waited for later."""

    async def any_arrived() -> bool:
        return bool(shop.arrived(str(cell)))

    with suppress(AssertionError):
        await eventually(any_arrived, within=5)


async def _leave(
    shop: Shop, context: BrowserContext, page: Page, cell: Cell, call: object
) -> Page:
    say = cast("Call", call)
    match cell.exit:
        case "close":
            await say(page)
            await _soon(page.close(run_before_unload=True))
        case "crash":
            await say(page)
            await _crash(context, page)
        case "hide":  # an app switch, and a while later the system takes the memory
            await say(page, cell.exit)
            if cell.condition not in LATER:
                await _some_arrived(shop, cell)
            await _crash(context, page)
        case _:
            await say(page, cell.exit)
    return page


async def _crash(context: BrowserContext, page: Page) -> None:
    crashed = asyncio.Event()
    page.on("crash", lambda _: crashed.set())
    session = await context.new_cdp_session(page)
    asking = asyncio.ensure_future(session.send("Page.crash"))  # never answered
    async with asyncio.timeout(10):
        await crashed.wait()
    await _soon(page.close())
    await _soon(asking)


async def _soon(doing: Awaitable[object]) -> None:
    """Wait for what a page that is going may never answer."""
    with suppress(Error, TimeoutError):
        await asyncio.wait_for(doing, 5)


class Call:
    async def __call__(self, page: Page, then: str = "") -> None: ...


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell,
            id=str(cell),
            marks=needs("npm", package="npm") if cell.install == "module" else (),
        )
        for cell in CELLS
    ],
)
async def test_every_event_arrives_once(cell: Cell, results: Results) -> None:
    called, arrived, most = result_of(results, cell)
    assert most <= 1
    if not cell.killed:
        assert arrived == called


async def test_the_document_has_the_table(results: Results) -> None:
    """Kept by the run of every cell; a run of some must come to what it says."""
    text = DOCUMENT.read_text("utf-8")
    found = re.search(r"<!-- exits -->\n(.*?)<!-- /exits -->", text, re.DOTALL)
    assert found is not None
    if os.environ.get("EVERY_CELL"):
        print(table(results))  # noqa: T201  # what was asked for
        start, end = found.span(1)
        DOCUMENT.write_text(text[:start] + table(results) + text[end:], "utf-8")
        return
    told = {
        (row[0], row[1]): dict(zip(EXITS, row[2:], strict=True))
        for row in (line.strip("| ").split(" | ") for line in found[1].splitlines()[2:])
    }
    assert len(told) == len(INSTALLS) * len(CONDITIONS)
    for cell in results:
        if not cell.killed:
            said = told[cell.install, cell.condition][cell.exit]
            assert said == share(result_of(results, cell))


def table(results: Results) -> str:
    """The delivered share of each cell, as Markdown."""
    rows = [
        "| way in | meanwhile | " + " | ".join(EXITS) + " |",
        "|---" * (len(EXITS) + 2) + "|",
    ]
    for install in INSTALLS:
        for condition in CONDITIONS:
            cells = [Cell(install, exit_, condition) for exit_ in EXITS]
            # Killed: what had not left within its second, which is a matter of luck.
            shares = [
                "†" if cell.killed else share(result_of(results, cell))
                for cell in cells
            ]
            rows.append(f"| {install} | {condition} | " + " | ".join(shares) + " |")
    return "\n".join(rows) + "\n"


def share(result: Result) -> str:
    called, arrived, _ = result
    return f"{100 * arrived / called:.0f} %"
