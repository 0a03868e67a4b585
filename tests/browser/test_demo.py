"""`relay demo` as a person meets it: the shop in a real browser, by role and label.

Each test is a shopper in a browser profile of its own, with a guest's name of its own.
The order of the tests counts for one thing only: the burst comes last, because it
takes the calls of half a minute.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.programs import RELAY, find, needs, running

pytestmark = needs("chromium", package="chromium")

# Root, as in containers, has no sandbox of Chromium's; the others keep it from
# calling home.
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]

# The first is what a desktop at 400 % has (WCAG 2.2, 1.4.10).
SIZES = {"narrow": (320, 640), "phone": (390, 844), "desktop": (1280, 900)}
# What the browser itself says of answers that are meant to happen: an event refused,
# and a beacon of one who is offline.
MEANT = re.compile(r"status of (400|503)")
# Voucherify takes 4 calls in 5 s of all tests together, and the breaker's first probes
# come after 1, 2 and 4 s.
SOON_MS = 20_000

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The addresses that the demo has printed."""

    shop: str
    voucherify: str

    def arrived(self, page: Page) -> list[Json]:
        """The bodies that Voucherify has of this page's guest, in their order."""
        guest = page.evaluate("JSON.parse(localStorage['shop:guest'])")
        answer = httpx.get(
            f"{self.voucherify}/_sandbox/events",
            params={"source_id": guest},
            trust_env=False,
        )
        return [record["body"] for record in answer.json()["events"]]


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with running([*RELAY, "demo"]) as program:
        program.wait_for("^  curl ", within=30)

        def address(line: str) -> str:
            return program.wait_for(rf"^  {re.escape(line)} +(http://\S+)")[1]

        yield Demo(
            shop=address("The shop: start here"),
            voucherify=address("What Voucherify would receive"),
        )
        assert program.stop() == 0, program.said
        assert "Traceback" not in program.said, program.said


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find("chromium"), args=ARGS, timeout=15_000
        )
        yield browser
        browser.close()


@contextmanager
def shopper(browser: Browser, demo: Demo, path: str = "/") -> Iterator[Page]:
    """A page in a profile of its own; errors that it did not expect fail the test.

    What breaks the page's policy is such an error, and so is a request to another host.
    """
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(f"{said.type}: {said.text}"))
        page.on("request", lambda request: elsewhere(errors, request.url, demo))
        page.goto(demo.shop + path)
        yield page
        assert [e for e in errors if not MEANT.search(e)] == []


def elsewhere(errors: list[str], url: str, demo: Demo) -> None:
    if not url.startswith((demo.shop, demo.voucherify, "data:")):
        errors.append(f"request to {url}")


@pytest.fixture
def page(chromium: Browser, demo: Demo) -> Iterator[Page]:
    with shopper(chromium, demo) as page:
        yield page


# The words of a person in front of it


def add(page: Page, product: str) -> None:
    page.get_by_role("button", name=f"Add {product} to the cart").click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def switch(page: Page, name: str) -> Locator:
    return page.get_by_role("switch", name=name)


def turn(page: Page, name: str, *, on: bool) -> None:
    switch(page, name).click()
    expect(switch(page, name)).to_be_checked(checked=on)


def row(page: Page, name: str) -> Locator:
    """The panel's line of the newest event of this name."""
    listed = page.get_by_role("list", name="Your events").get_by_role("listitem")
    return listed.filter(has=page.get_by_text(name, exact=True)).first


def becomes(page: Page, name: str, text: str, within_ms: int = SOON_MS) -> None:
    expect(row(page, name)).to_contain_text(text, timeout=within_ms)


def bodies(demo: Demo, page: Page, name: str) -> list[Json]:
    return [body for body in demo.arrived(page) if body["event"] == name]


# A visit


def test_a_purchase_with_the_card_is_followed_to_voucherify(
    demo: Demo, page: Page, tmp_path: Path
) -> None:
    button = page.get_by_role("button", name="Add Monstera to the cart")
    # In the very click: a second later it has left.
    assert "Kept in the browser" in button.evaluate(
        "it => { it.click(); return document.getElementById('rows').innerText }"
    )
    add(page, "Stone mug")
    press(page, "One Stone mug more")
    cart = page.get_by_role("region", name="Your cart")
    expect(cart).to_contain_text("€53.00")
    press(page, "One Monstera less")
    expect(cart).to_contain_text("€29.00")
    expect(page.get_by_role("link", name="Cart 2")).to_be_visible()
    press(page, "Check out")
    expect(cart).to_contain_text("Thank you")
    expect(page.get_by_role("heading", name="Your cart")).to_be_focused()
    becomes(page, "order_placed", "Delivered after")
    becomes(page, "order_placed", "Worth something: delivered once at most.")
    becomes(page, "product_removed", "Delivered after")

    [order] = bodies(demo, page, "order_placed")
    assert order["loyalty"] == {"code": "MOSS-1000-0001"}
    assert "referral" not in order
    metadata = cast("Json", order["metadata"])
    assert (metadata["items"], metadata["total"]) == (2, 29)
    row(page, "order_placed").locator("summary").click()
    expect(row(page, "order_placed").locator("pre")).to_contain_text("MOSS-1000-0001")

    page.get_by_role("link", name="what the fake Voucherify has received").click()
    expect(page).to_have_url(demo.voucherify + "/")
    expect(page.locator("#rows")).to_contain_text("order_placed")
    assert_fits(page, tmp_path / "voucherify")


def test_a_friend_signs_up_and_orders_without_the_card(
    demo: Demo, chromium: Browser
) -> None:
    with shopper(chromium, demo) as page:
        link = page.get_by_role("link", name="FRIEND-OF-GUEST").get_attribute("href")
        assert link is not None
    with shopper(chromium, demo, link.removeprefix(demo.shop)) as page:
        expect(page.get_by_text("A friend sent you")).to_be_visible()
        page.get_by_label("Your email").fill("friend@example.com")
        press(page, "Sign up")
        expect(
            page.get_by_text("The letter will go to friend@example.com.")
        ).to_have_count(2)
        page.get_by_label("Earn points with my order").uncheck()
        add(page, "Cactus")
        press(page, "Check out")
        becomes(page, "newsletter_joined", "Delivered after")
        becomes(page, "order_placed", "Delivered after")
        [letter] = bodies(demo, page, "newsletter_joined")
        assert cast("Json", letter["customer"])["email"] == "friend@example.com"
        assert letter["referral"] == {"code": "FRIEND-OF-GUEST"}
        [order] = bodies(demo, page, "order_placed")
        assert order["referral"] == {"code": "FRIEND-OF-GUEST"}
        assert "loyalty" not in order


def test_who_signs_in_is_named_in_every_event(demo: Demo, page: Page) -> None:
    page.get_by_label("Signed in as").select_option("Robin")
    expect(page.get_by_text("MOSS-4021-7730")).to_be_visible()
    becomes(page, "signed_in", "Delivered after")
    page.reload()
    expect(page.get_by_label("Signed in as")).to_have_value("robin")
    becomes(page, "signed_in", "Delivered after")  # still known here
    assert bodies(demo, page, "signed_in") == []  # as the guest
    answer = httpx.get(f"{demo.voucherify}/_sandbox/events?source_id=robin")
    assert [r["event"] for r in answer.json()["events"]] == ["signed_in"]


def test_a_faulty_event_is_refused_with_the_rule(demo: Demo, page: Page) -> None:
    press(page, "Send a faulty event")
    becomes(page, "review_added", "Refused")
    becomes(page, "review_added", "loyalty.code is required. (code_missing)")
    expect(page.locator("#news")).to_have_text("review added: refused.")
    assert demo.arrived(page) == []


def test_the_last_event_of_a_page_leaves_with_it(demo: Demo, page: Page) -> None:
    add(page, "Cactus")
    page.get_by_role("link", name="Leave the page").click()
    expect(page.get_by_text("The page you left is gone.")).to_be_visible()
    expect(page.get_by_role("link", name="Cart 1")).to_be_visible()
    becomes(page, "shop_left", "Delivered after")
    becomes(page, "product_added", "Delivered after")
    assert len(demo.arrived(page)) == 2


# What goes wrong


def test_events_of_one_who_is_offline_leave_later_and_once(
    demo: Demo, page: Page
) -> None:
    turn(page, "Offline", on=True)
    add(page, "Cactus")
    becomes(page, "product_added", "It leaves when the network is back.")
    expect(page.locator("#news")).to_have_text("product added: kept in the browser.")
    page.reload()
    expect(switch(page, "Offline")).to_be_checked()
    press(page, "Check out")
    becomes(page, "order_placed", "It leaves when the network is back.")
    becomes(page, "product_added", "It leaves when the network is back.")
    page.reload()
    becomes(page, "order_placed", "Kept in the browser")
    assert demo.arrived(page) == []
    turn(page, "Offline", on=False)
    becomes(page, "order_placed", "Delivered after")
    becomes(page, "product_added", "Delivered after")
    assert len(demo.arrived(page)) == 2


def test_what_voucherify_cannot_take_waits_and_is_delivered(
    demo: Demo, chromium: Browser, page: Page
) -> None:
    turn(page, "Voucherify is down", on=True)
    add(page, "Snake plant")
    press(page, "Check out")
    becomes(page, "order_placed", "Waits in the relay")
    expect(page.get_by_text(re.compile("events wait"))).to_be_visible()
    with shopper(chromium, demo) as other:
        # It is down for all; but of the events one sees one's own only.
        expect(switch(other, "Voucherify is down")).to_be_checked()
        expect(other.get_by_text("Nothing yet.")).to_be_visible()
        turn(other, "Voucherify is down", on=False)
    becomes(page, "order_placed", "Delivered after")
    becomes(page, "product_added", "Delivered after")
    expect(page.get_by_text("Nothing waits in the relay.")).to_be_visible()
    assert len(demo.arrived(page)) == 2


# For everyone


def test_a_purchase_by_keyboard_alone(demo: Demo, page: Page) -> None:
    def tab_to(target: Locator) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if target.evaluate("it => it === document.activeElement"):
                # Where one is can be seen.
                assert (
                    target.evaluate("it => getComputedStyle(it).outlineStyle") != "none"
                )
                return
        pytest.fail(f"no way by Tab to {target}")

    skip = page.get_by_role("link", name="Skip to your events")
    tab_to(skip)
    expect(skip).to_be_in_viewport()
    tab_to(page.get_by_role("button", name="Add Espresso beans to the cart"))
    page.keyboard.press("Enter")
    tab_to(page.get_by_role("checkbox", name="Earn points with my order"))
    page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Check out")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Your cart")).to_be_focused()
    tab_to(switch(page, "Offline"))
    for on in (True, False):
        page.keyboard.press("Space")
        expect(switch(page, "Offline")).to_be_checked(checked=on)
    becomes(page, "order_placed", "Delivered after")
    tab_to(row(page, "order_placed").locator("summary"))
    page.keyboard.press("Enter")
    expect(row(page, "order_placed").locator("pre")).to_be_visible()
    assert "loyalty" not in bodies(demo, page, "order_placed")[0]


FAINT = """(() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const seen = (color) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    return pen.getImageData(0, 0, 1, 1).data;
  };
  const light = ([r, g, b]) =>
    [r, g, b].map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (it) => {
    for (; it; it = it.parentElement) {
      if (getComputedStyle(it).backgroundImage !== "none") return null;
      const color = seen(getComputedStyle(it).backgroundColor);
      if (color[3] === 255) return color;
    }
    return seen("white");
  };
  return [...document.querySelectorAll("body *")]
    .filter((it) => it.checkVisibility() && !it.closest("svg, option, .unseen"))
    .filter((it) => [...it.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((it) => {
      const ground = behind(it);
      if (!ground) return false;
      const [a, b] = [light(seen(getComputedStyle(it).color)), light(ground)];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
    })
    .map((it) => it.outerHTML.slice(0, 200));
})()"""


# What a finger cannot hit.
SMALL = """[...document.querySelectorAll("button, summary, select, .button")]
  .filter((it) => it.checkVisibility())
  .filter((it) => it.getBoundingClientRect().height < 40)
  .map((it) => it.outerHTML)"""
CONTROLS = {"button", "link", "switch", "checkbox", "textbox", "combobox"}


def assert_fits(page: Page, picture: Path) -> None:
    """Nothing is wider than the window, on a phone and on a desk."""
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.screenshot(path=f"{picture}-{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def announced(page: Page) -> list[tuple[str, str]]:
    """Role and name of everything, as Chromium tells a screen reader."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_heard_by_everyone(
    page: Page, scheme: Literal["light", "dark"], tmp_path: Path
) -> None:
    page.emulate_media(color_scheme=scheme)
    turn(page, "Offline", on=True)
    for product in ("Monstera", "Cactus"):
        add(page, product)
    press(page, "Send a faulty event")
    row(page, "review_added").locator("summary").click()

    nodes = announced(page)
    assert [node for node in nodes if node[0] in CONTROLS and not node[1].strip()] == []
    roles = Counter(role for role, _ in nodes)
    for landmark in ("banner", "main", "complementary", "contentinfo"):
        assert roles[landmark] == 1
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(it => it.id)")
    assert len(ids) == len(set(ids))
    headings = page.get_by_role("heading").evaluate_all(
        "all => all.map(h => h.tagName)"
    )
    assert headings.count("H1") == 1
    assert all(b <= a or int(b[1]) == int(a[1]) + 1 for a, b in pairwise(headings))
    assert page.evaluate(FAINT) == []
    assert_fits(page, tmp_path / scheme)
    assert page.evaluate(SMALL) == []


def test_the_page_shows_the_lines_that_it_has(demo: Demo, page: Page) -> None:
    page.get_by_text("The two lines in this page that do it").click()
    shown = page.get_by_label("The two lines").inner_text()
    assert shown.count("<script") == 2
    assert shown in httpx.get(demo.shop, trust_env=False).text


def test_a_burst_is_taken_at_once_and_delivered_in_turn(demo: Demo, page: Page) -> None:
    press(page, "Open the sale")
    rows = page.get_by_role("list", name="Your events").get_by_role("listitem")
    expect(rows).to_have_count(20)
    waits = page.get_by_text(
        re.compile(r"events wait in the relay; the last one leaves")
    )
    expect(waits).to_be_visible()
    expect(page.locator(".way [data-stop=browser] dd")).to_have_text("0")
    expect(rows.first).to_contain_text(re.compile(r"lot 20\s*Queued, about \d+ s"))
    expect(rows.last).to_contain_text(re.compile(r"lot 1\s*Delivered after"))
    # Two more rounds of the budget; each lot once, and the first ones first.
    expect(rows.nth(11)).to_contain_text("Delivered after", timeout=30_000)
    lots = [cast("Json", body["metadata"])["lot"] for body in demo.arrived(page)]
    assert sorted(cast("list[int]", lots))[:9] == list(range(1, 10))
    counts = page.locator(".way dd").all_inner_texts()
    assert sum(map(int, counts)) == 20
