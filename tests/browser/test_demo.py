"""`relay demo` as a person meets it: its page in a real browser, click by click."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

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

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}

# Label: what the page then shows of the answer.
BUTTONS = {
    "View a product": ("202", "product_viewed", "queued"),
    "Abandon the cart": ("202", "cart_abandoned", "queued"),
    "Write a review": ("202", "review_added", "queued"),
    "Join the newsletter": ("newsletter_joined", "handed to the browser"),
    "Open the sale": ("202", "sale_joined", "20 queued"),
    "Send a faulty event": ("400", "broken", "loyalty.code is required."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The addresses that the demo has printed."""

    shop: str
    track: str
    voucherify: str


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with running([*RELAY, "demo"]) as program:
        program.wait_for("^  curl ")

        def address(line: str) -> str:
            return program.wait_for(rf"^  {re.escape(line)} +(http://\S+)")[1]

        yield Demo(
            shop=address("A shop's page with buttons"),
            track=address("The relay takes beacons on"),
            voucherify=address("What Voucherify would receive"),
        )
        assert program.stop() == 0, program.said


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find("chromium"), args=ARGS, timeout=15_000
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A page in a profile of its own; errors that it did not expect fail the test."""
    with chromium.new_context() as context:
        opened = context.new_page()
        opened.set_default_timeout(10_000)
        errors: list[str] = []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on(
            "console",
            lambda said: errors.append(said.text) if said.type == "error" else None,
        )
        yield opened
        assert [e for e in errors if "status of 400" not in e] == []


def arrived(demo: Demo) -> dict[str, dict[str, object]]:
    """What the sandbox has recorded: the bodies by event name."""
    answer = httpx.get(f"{demo.voucherify}/_sandbox/events", trust_env=False)
    return {record["event"]: record["body"] for record in answer.json()["events"]}


def assert_fits(page: Page, picture: Path) -> None:
    """Nothing is wider than the window, on a phone and on a desk."""
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.screenshot(path=f"{picture}-{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_button_does_what_it_says(demo: Demo, page: Page, tmp_path: Path) -> None:
    page.goto(demo.shop)
    expect(page.locator("#where")).to_have_text(demo.track)
    assert page.get_by_role("button").count() == len(BUTTONS)
    page.get_by_label("Customer").fill("u-browser")
    answers = page.locator("#answers li")
    for number, (label, parts) in enumerate(BUTTONS.items(), start=1):
        page.get_by_role("button", name=label).click()
        expect(answers).to_have_count(number)
        for part in parts:
            expect(answers.first).to_contain_text(part)
    answers.first.locator("summary").click()
    expect(answers.first.locator("pre")).to_contain_text('"reason": "code_missing"')
    assert_fits(page, tmp_path / "shop")

    # The four before the sale are what Voucherify takes at once.
    page.goto(demo.voucherify)
    expect(page.locator("#rows")).to_contain_text("newsletter_joined")
    assert_fits(page, tmp_path / "voucherify")
    bodies = arrived(demo)
    assert bodies["product_viewed"] == {
        "event": "product_viewed",
        "customer": {"source_id": "u-browser"},
        "metadata": {"sku": "A-1"},
    }
    assert bodies["review_added"]["loyalty"] == {"code": "LOYALTY-1"}
    assert {"cart_abandoned", "newsletter_joined"} <= bodies.keys()
    assert "broken" not in bodies
