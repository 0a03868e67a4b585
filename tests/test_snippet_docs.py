"""docs/snippet.md says what the snippet does, and shows the recipes as they are."""

import base64
import hashlib
import re

import pytest

from relay.browsers import KINDS
from relay.snippet import STUB, tag
from tests.snippet_recipes import RECIPES
from tests.test_docs import ROOT, coded, read, section, tables

DOCUMENT = "docs/snippet.md"
SOURCE = {name: read(f"snippet/src/{name}.ts") for name in ("relay", "tag", "types")}

# A shop around the recipes, for the tests: a reader has one.
SHOPS = {
    *("react/index.html", "react/main.tsx"),
    *("vue/index.html", "vue/main.ts", "vue/Shop.vue"),
    *("nextjs/app/[sku]/page.tsx", "nextjs/app/Product.tsx"),
}


def shown() -> dict[str, str]:
    """The text in the document of each file that it shows."""
    return dict(
        re.findall(
            r"^\[`[^`]+`\]\(recipes/snippet/([^)]+)\):\n\n```\w+\n(.*?)^```",
            read(DOCUMENT),
            re.MULTILINE | re.DOTALL,
        )
    )


def constant(name: str) -> int:
    """A number of the snippet, as its source computes it."""
    [written] = re.findall(rf"^const {name} = ([\d_ *]+);", SOURCE["relay"], re.M)
    product = 1
    for factor in written.replace("_", "").split("*"):
        product *= int(factor)
    return product


def test_the_document_shows_each_recipe_as_it_is() -> None:
    files = {
        path.relative_to(RECIPES).as_posix(): path.read_text("utf-8")
        for path in RECIPES.rglob("*")
        if path.is_file()
    }
    assert set(files) > SHOPS
    assert shown() == {n: text for n, text in files.items() if n not in SHOPS}


def test_the_component_of_next_js_is_that_of_react() -> None:
    of_react = (RECIPES / "react" / "Product.tsx").read_text("utf-8")
    of_next = (RECIPES / "nextjs" / "app" / "Product.tsx").read_text("utf-8")
    assert of_next == f'"use client";\n\n{of_react}'


def test_the_tag_of_the_document_is_what_the_command_prints() -> None:
    [block] = re.findall(r"```html\n(.*?)```", section(DOCUMENT, "Paste the tag"), re.S)
    printed = tag(base="", track="track", pin=True, options={})
    printed = re.sub(r"relay\.[0-9a-f]{16}\.js", "relay.<hash>.js", printed)
    assert block.strip() == re.sub(r"sha384-[\w+/]{64}", "sha384-…", printed)


def test_the_hash_in_the_policy_is_that_of_the_stub() -> None:
    digest = base64.b64encode(hashlib.sha256(STUB.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in section(DOCUMENT, "Content security policy")


def test_every_call_is_told() -> None:
    calls = set(re.findall(r'command: "(\w+)"', SOURCE["types"]))
    rows = tables(section(DOCUMENT, "Send an event"))
    told = [re.findall(r'relay\("(\w+)"', row[0])[0] for row in rows]
    assert sorted(told) == sorted(calls)


def test_every_option_is_told() -> None:
    [options] = re.findall(
        r"interface Options \{(.*?)^\}", SOURCE["types"], re.M | re.S
    )
    rows = tables(section(DOCUMENT, "Attributes and options"))
    told = [re.split(r"\W", coded(row[1])[0])[0] for row in rows]
    assert told == re.findall(r"^  (\w+)\?:", options, re.MULTILINE)
    for attribute, option, *_ in rows:
        of_tag = [re.split(r"[=\"]", name)[0] for name in coded(attribute)]
        name = re.split(r"\W", coded(option)[0])[0]
        assert of_tag == ([] if name == "onerror" else [f"data-{name}"])


def test_every_kind_of_loss_is_told() -> None:
    rows = tables(section(DOCUMENT, "What is lost, in figures"))
    assert [coded(row[0])[0] for row in rows] == [KINDS[0], "arrived", *KINDS[1:]]


@pytest.mark.parametrize(
    "said",
    [
        f"at most {constant('MAX_EVENTS')} events, and about "
        f"{2 * constant('MAX_CHARS') // 1024} KiB",
        f"wait up to a second for others, and leave at once when there are "
        f"{constant('BATCH')}",
        f"without an answer in {constant('ANSWER_MS') // 1000} s has failed",
        f"of up to 2, 4, 8 and at last {constant('BACKOFF_MS') // 1000} s",
        f"deleted {constant('REPEAT_MS') // 3_600_000} h after it was first sent",
        f"silent for {constant('LEASE_MS') // 1000} s",
        "at most 2,048 bytes",
    ],
)
def test_a_number_is_that_of_the_code(said: str) -> None:
    assert said in read(DOCUMENT)
    assert constant("BATCH_MS") == 1000
    assert "MAX_BYTES = 2048" in read("snippet/build.mjs")


def test_the_marks_of_the_table_are_there() -> None:
    found = re.findall(r"<!-- /?exits -->", read(DOCUMENT))
    assert found == ["<!-- exits -->", "<!-- /exits -->"]


def test_a_readme_is_in_the_package_and_its_licence_is_the_projects() -> None:
    assert (ROOT / "snippet" / "README.md").is_file()
    assert read("snippet/LICENSE") == read("LICENSE")
