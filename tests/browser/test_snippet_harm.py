"""The snippet does no harm: to the page, to the shopper's privacy, to the browser.

Each claim is met in a real Chromium, with the tag as `relay snippet` prints it unless a
test says otherwise.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from playwright.async_api import BrowserContext, Page

from relay.snippet import STUB, present, tag
from tests.browser.snippet_shop import TO_HERE, Front, Shop, open_shop
from tests.browser.test_demo import ARGS
from tests.programs import find, needs
from tests.support import eventually

pytestmark = [
    pytest.mark.anyio,
    *needs("chromium", package="chromium"),
    pytest.mark.timeout(120),
]

HOSTS = (f"h{n}" for n in range(1000))
PAGE = '<!doctype html><html lang="en"><title>A page</title>{}<h1>A page</h1>'
TAG = tag(base="", track="track", pin=True, options={})


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shop(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shop]:
    place, prefix = tmp_path_factory.mktemp("shop"), f"test-{secrets.token_hex(6)}"
    async with open_shop(valkey_url, prefix, place, front=Front()) as shop:
        yield shop


class Visit:
    """One shopper on one host of the shop, and what the browser complains of."""

    def __init__(self, shop: Shop, context: BrowserContext) -> None:
        self.shop, self.context = shop, context
        self.host = next(HOSTS)
        self.who = f"shopper-{secrets.token_hex(4)}"
        self.said: list[str] = []
        self.faults: list[str] = []

    async def open(self, html: str = PAGE.format(TAG), path: str = "/own") -> Page:
        self.shop.front.pages[path] = html
        page = await self.context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._hear)
        await page.goto(self.shop.url(self.host, path))
        return page

    def _hear(self, message: object) -> None:
        text, kind = getattr(message, "text"), getattr(message, "type")  # noqa: B009
        self.said.append(text)
        if kind == "error":
            self.faults.append(text)

    async def track(self, page: Page, n: int = 1, **parts: object) -> None:
        await page.evaluate(
            """([who, n, parts]) => {
              relay("identify", who);
              for (let i = 0; i < n; i++) relay("track", "e", { n: `${i}` }, parts);
            }""",
            [self.who, n, parts],
        )

    async def arrived(self, n: int) -> None:
        """Wait until so many are at the sandbox, each of them once."""

        async def all_there() -> bool:
            return len(self.shop.arrived(self.who)) >= n

        await eventually(all_there, within=20)
        counts = self.shop.arrived(self.who)
        assert (len(counts), max(counts.values())) == (n, 1)

    async def asked(self, n: int) -> None:
        """Wait until the snippet has made so many requests."""

        async def made() -> bool:
            return self.requests >= n

        await eventually(made, within=20)

    @property
    def requests(self) -> int:
        return self.shop.front.requests[f"{self.host}.shop.localhost"]

    async def kept(self, page: Page) -> list[str]:
        keys = await page.evaluate("Object.keys(localStorage)")
        return [
            key for key in cast("list[str]", keys) if key.startswith("relay:event:")
        ]


@pytest.fixture
async def visit(shop: Shop) -> AsyncIterator[Visit]:
    context = await shop.browser.new_context()
    yield Visit(shop, context)
    await context.close()


# The page


async def test_one_name_no_cookie_and_nothing_left_behind(visit: Visit) -> None:
    bare = await visit.open(PAGE.format(""), "/bare")
    names = "Object.getOwnPropertyNames(window)"
    before = set(cast("list[str]", await bare.evaluate(names)))
    page = await visit.open()
    await page.wait_for_function("relay.on")
    await visit.track(page, 3)
    await visit.arrived(3)
    assert set(cast("list[str]", await page.evaluate(names))) - before == {"relay"}
    assert await page.evaluate("document.cookie") == ""
    assert await visit.context.cookies() == []

    async def nothing_kept() -> bool:
        kept = await page.evaluate("localStorage.length + sessionStorage.length")
        return bool(kept == 0)

    await eventually(nothing_kept)
    assert visit.faults == []


async def test_what_the_page_hands_over_never_comes_back_as_an_error(
    visit: Visit,
) -> None:
    page = await visit.open()
    await page.wait_for_function("relay.on")
    thrown = await page.evaluate(
        """() => {
          const circular = {}; circular.self = circular;
          const trap = new Proxy({}, { get() { throw 1 }, ownKeys() { throw 2 } });
          const calls = [[], [null], ["track"], ["track", "e", circular],
            ["track", "e", { n: 1n }], ["track", "e", {}, trap], ["nothing"],
            ["identify", trap], ["consent", trap], ["onerror", 1], ["flush", trap]];
          return calls.filter((call) => {
            try { relay(...call) } catch { return true } }).length;
        }"""
    )
    assert thrown == 0
    await page.evaluate("relay('consent', true)")
    await visit.track(page)
    await visit.arrived(1)
    # An event without a name is refused; the browser tells of that by itself.
    assert [fault for fault in visit.faults if "status of 400" not in fault] == []


async def test_a_script_that_is_not_the_one_of_the_tag_does_not_run(
    visit: Visit,
) -> None:
    wrong = "sha384-" + "A" * 64
    page = await visit.open(PAGE.format(TAG.replace(present().integrity, wrong)))
    await visit.track(page, 2)  # the page's own code goes on

    async def refused() -> bool:
        return any("integrity" in text for text in visit.said)

    await eventually(refused)
    assert await page.evaluate("relay.q.length") == 3
    assert visit.requests == 0


async def test_the_tag_twice_sends_once(visit: Visit) -> None:
    page = await visit.open(PAGE.format(TAG + TAG))
    await page.wait_for_function("relay.on")
    await visit.track(page, 2)
    await visit.arrived(2)


async def test_a_store_that_is_full_is_left_alone_and_loses_nothing(
    visit: Visit,
) -> None:
    page = await visit.open()
    await page.wait_for_function("relay.on")
    full = await page.evaluate(
        """() => {
          for (let size = 4 << 20; size; size >>= 1)
            for (let i = 0; ; i++)
              try { localStorage.setItem(`cart-${size}-${i}`, "x".repeat(size)) }
              catch { break }
          try { localStorage.setItem("more", "x".repeat(99)) } catch { return true }
        }"""
    )
    assert full is True
    await visit.track(page, 5)
    await visit.arrived(5)
    assert visit.faults == []


async def test_offline_for_long_keeps_a_hundred_events_and_what_pays(
    visit: Visit,
) -> None:
    page = await visit.open()
    await page.wait_for_function("relay.on")
    await visit.context.set_offline(True)
    await visit.track(page, 1, loyalty={"code": "CARD-1"})
    await page.evaluate(
        """() => { for (let i = 1; i < 151; i++)
          relay("track", "e", { n: `${i}`, text: "x".repeat(200) }) }"""
    )
    assert len(await visit.kept(page)) <= 100
    size = await page.evaluate(
        "Object.entries(localStorage).reduce((n, [k, v]) => n + 2 * v.length, 0)"
    )
    assert size <= 64 * 1024
    kept = len(await visit.kept(page))
    await visit.context.set_offline(False)

    async def sent() -> bool:
        return len(visit.shop.arrived(visit.who)) >= kept

    await eventually(sent, within=30)
    arrived = visit.shop.arrived(visit.who)
    assert max(arrived.values()) == 1
    assert {"0", "150"} <= set(arrived)  # what pays, and the newest


# Frames


@pytest.mark.parametrize("site", ["same", "other"])
async def test_it_works_in_a_frame(site: str, visit: Visit) -> None:
    visit.shop.front.pages["/inner"] = PAGE.format(TAG)
    host = visit.host if site == "same" else next(HOSTS)
    inner = visit.shop.url(host, "/inner")
    page = await visit.open(PAGE.format(f'<iframe src="{inner}"></iframe>'))
    frame = page.frames[1]
    await frame.wait_for_function("window.relay && relay.on")
    await frame.evaluate("who => relay('identify', who)", visit.who)
    await frame.evaluate("relay('track', 'e', { n: '1' })")
    await visit.arrived(1)
    assert visit.faults == []


async def test_in_a_sandbox_without_an_origin_it_is_refused_and_breaks_nothing(
    visit: Visit,
) -> None:
    """No storage, and the origin `null`, which no relay takes."""
    visit.shop.front.pages["/inner"] = PAGE.format(
        TAG + "<script>relay('onerror', (t) => { window.trouble = t.reason })</script>"
    )
    inner = visit.shop.url(visit.host, "/inner")
    frame_tag = f'<iframe sandbox="allow-scripts" src="{inner}"></iframe>'
    page = await visit.open(PAGE.format(frame_tag))
    frame = page.frames[1]
    await frame.wait_for_function("window.relay && relay.on")
    await frame.evaluate("relay('track', 'e', { n: '1' })")
    await visit.asked(1)
    assert [fault for fault in visit.faults if "CORS" not in fault] in (
        [],
        ["Failed to load resource: net::ERR_FAILED"],
    )
    assert visit.shop.arrived(visit.who) == {}


# Privacy


async def test_nothing_leaves_or_is_kept_before_consent(visit: Visit) -> None:
    html = PAGE.format(
        tag(base="", track="track", pin=True, options={"consent": "required"})
    )
    page = await visit.open(html)
    await page.wait_for_function("relay.on")
    await visit.track(page, 2)
    await page.evaluate("dispatchEvent(new Event('pagehide'))")
    assert await visit.kept(page) == []
    await page.goto(visit.shop.url(visit.host, "/own"))
    await page.wait_for_function("relay.on")
    await visit.track(page, 3)
    await page.evaluate("relay('consent', true)")
    await visit.arrived(3)  # and not the two of a page that is gone
    assert visit.requests == 1


async def test_consent_that_is_withdrawn_forgets_what_waits(visit: Visit) -> None:
    page = await visit.open()
    await page.wait_for_function("relay.on")
    await visit.context.set_offline(True)
    await visit.track(page, 3)
    assert len(await visit.kept(page)) == 3
    await page.evaluate("relay('consent', false)")
    await visit.track(page, 3)
    assert await visit.kept(page) == []
    await visit.context.set_offline(False)
    await page.evaluate("relay('flush')")
    other = await visit.open(path="/other")  # whose event is the first to leave
    await other.wait_for_function("relay.on")
    await visit.track(other)
    await visit.arrived(1)


@pytest.mark.parametrize("ignored", [False, True])
async def test_global_privacy_control_asks_for_consent(
    ignored: bool, visit: Visit
) -> None:
    signal = "Object.defineProperty(navigator, 'globalPrivacyControl', { value: true })"
    await visit.context.add_init_script(signal)
    options = {"gpc": "ignore"} if ignored else {}
    html = PAGE.format(tag(base="", track="track", pin=True, options=options))
    page = await visit.open(html)
    await page.wait_for_function("relay.on")
    await visit.track(page)
    if not ignored:
        await page.evaluate("dispatchEvent(new Event('pagehide'))")
        assert (visit.requests, await visit.kept(page)) == (0, [])
        await page.evaluate("relay('consent', true)")
    await visit.arrived(1)


async def test_a_page_that_is_prerendered_sends_nothing_until_it_is_shown(
    shop: Shop, tmp_path: Path
) -> None:
    """In a Chromium that nobody looks into: one that is, prerenders nothing."""
    host, who = next(HOSTS), f"shopper-{secrets.token_hex(4)}"
    beacons = shop.front.requests
    shop.front.pages["/next"] = PAGE.format(
        f"{TAG}<script>relay('identify', '{who}'); relay('track', 'e', {{ n: '1' }});"
        "const flushed = () => { relay('flush'); fetch('/ready') };"
        "if (document.prerendering) addEventListener('load', flushed)</script>"
    )
    rules = json.dumps({"prerender": [{"urls": ["/next"], "eagerness": "immediate"}]})
    # Goes there as soon as the test has seen that the page is ready.
    shop.front.pages["/start"] = PAGE.format(
        f'<script type="speculationrules">{rules}</script><script>'
        "fetch('/slow', { method: 'POST' }).then(() => { location.href = '/next' })"
        "</script>"
    )
    chromium = await asyncio.create_subprocess_exec(
        str(find("chromium")),
        *(*ARGS, TO_HERE, "--headless", "--remote-debugging-port=0"),
        f"--user-data-dir={tmp_path / 'profile'}",
        shop.url(host, "/start"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:

        async def ready() -> bool:
            return shop.front.visited[shop.url(host, "/ready")] > 0

        await eventually(ready, within=20)
        assert beacons[f"{host}.shop.localhost"] == 0
        shop.front.release.set()

        async def arrived() -> bool:
            return bool(shop.arrived(who))

        await eventually(arrived, within=20)
        # It was shown, and not loaded anew.
        assert shop.front.visited[shop.url(host, "/next")] == 1
    finally:
        shop.front.release.clear()
        chromium.kill()
        await chromium.wait()


# The operator's word, and the developer's


async def test_the_kill_switch_stops_it_for_the_page(visit: Visit) -> None:
    off = visit.shop.stack.start("serve", snippet="off")
    url = (await off.track_url()).removesuffix("/track")
    visit.shop.front.others[f"{visit.host}.shop.localhost"] = url
    page = await visit.open()
    await page.wait_for_function("relay.on")
    await visit.track(page)
    await visit.arrived(1)  # what has come is delivered
    await page.wait_for_function("!localStorage.length")  # and the answer is read
    await visit.track(page, 30)
    await page.evaluate("relay('flush'); dispatchEvent(new Event('pagehide'))")
    assert await visit.kept(page) == []
    assert visit.requests == 1
    assert await off.stop() == 0


async def test_debug_says_what_became_of_every_event(visit: Visit) -> None:
    html = PAGE.format(tag(base="", track="track", pin=True, options={"debug": ""}))
    page = await visit.open(html)
    await page.wait_for_function("relay.on")
    await visit.track(page)
    await page.evaluate("relay('track', 'e', { n: 'x' }, { loyalty: {} })")
    await visit.arrived(1)

    async def explained() -> bool:
        told = "\n".join(visit.said)
        return "queued" in told and "loyalty.code is required" in told

    await eventually(explained)
    await page.evaluate("relay('consent', false); relay('track', 'e')")

    async def skipped() -> bool:
        return any("skipped" in text for text in visit.said)

    await eventually(skipped)


async def test_a_refusal_is_told_to_the_page_with_its_reason(visit: Visit) -> None:
    page = await visit.open()
    await page.evaluate("relay('onerror', (trouble) => { window.trouble = trouble })")
    await visit.track(page, loyalty={})
    await page.wait_for_function("window.trouble")
    told = cast("dict[str, object]", await page.evaluate("window.trouble"))
    assert (told["reason"], told["status"]) == ("code_missing", 400)
    assert "loyalty.code" in str(told["detail"])
    assert cast("dict[str, object]", told["event"])["event"] == "e"


async def test_the_stub_keeps_what_is_called_before_the_script(visit: Visit) -> None:
    early = (
        f"<script>{STUB}</script><script>relay('identify', '{visit.who}');"
        "relay('track', 'e', { n: '1' })</script>"
    )
    script = TAG.splitlines()[1]
    page = await visit.open(PAGE.format(early + script))
    await page.evaluate("relay('track', 'e', { n: '2' })")
    await visit.arrived(2)


# What never left the browser


async def test_what_pages_called_and_what_arrived_is_counted(shop: Shop) -> None:
    queue = shop.stack.bench.queue
    # No other test's: they are all of Chromium without a screen, which counts as a bot.
    context = await shop.browser.new_context(user_agent="Mozilla/5.0 Edg/140.0.0.0")
    visit = Visit(shop, context)

    async def today() -> dict[str, int]:
        told = await queue.hash(f"browser:{await queue.now():%Y%m%d}")
        kinds = ("called", "arrived")
        return {kind: int(told.get(f"edge:{kind}", 0)) for kind in kinds}

    before = await today()
    page = await visit.open()
    await page.wait_for_function("relay.on")
    await visit.track(page, 7)
    await visit.arrived(7)

    async def counted() -> bool:
        now = await today()
        return all(now[kind] - before[kind] == 7 for kind in now)

    await eventually(counted)
    await context.close()
