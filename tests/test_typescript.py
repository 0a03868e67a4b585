"""The catalogue as TypeScript: what it allows, and that no name breaks out of it.

What a compiler makes of it is held here by form: every line has one of few, and what
stands in quotes is what the catalogue has.
"""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.catalog import CUSTOMER_FIELDS, EMPTY, METADATA_TYPES, Catalog, Rule
from relay.catalog import parse_catalog as parse
from relay.typescript import declarations

EXAMPLE = (Path(__file__).parents[1] / "deploy" / "catalog.toml").read_text("utf-8")

_TYPE = r"(?:string|number|boolean|unknown|never|Relay\w+|Record<string, \w+>)"
_QUOTED = r'"(?:[^"\\\x00-\x1f\u2028\u2029]|\\["\\/bfnrt]|\\u[0-9a-f]{4})*"'
_LINES = [
    r"",
    r"// [^\u2028\u2029]*",
    r"\s*/\*\* [\w ().,:-]*(?:`toISOString\(\)`[\w ().,:-]*)?\*/",
    r"export interface Relay\w+ \{",
    r" *\};?",
    rf"  {_QUOTED}: \{{",
    r"    ?  ?metadata\?: \{",
    rf" +\w+\??: {_TYPE}(?: \| null)?;",
    rf" +customer\?: Pick<RelayCustomer, {_QUOTED}(?: \| {_QUOTED})*>;",
    rf"      {_QUOTED}\?: {_TYPE};",
    rf"    {_QUOTED}\?: {_TYPE};",  # of RelayUnlistedEvent
    r"export type RelayEventName = keyof RelayEvents(?: \| \(string & \{\}\))?;",
    r"export type RelayEventParts<Name extends RelayEventName> =",
    r"  (?:Name extends keyof RelayEvents \? )?RelayEvents\[Name\](?: : Relay\w+)?;",
]
_LINE = re.compile("|".join(f"(?:{line})" for line in _LINES))


def catalog(text: str) -> Catalog:
    return parse(text, max_ttl_s=259_200)


def event(text: str, name: str = "x") -> str:
    """What is declared for one event, from its comment to its closing brace."""
    written = declarations(catalog(text))
    match = re.search(
        rf'^  /\*\*[^\n]*\n  "{name}": {{\n.*?^  }};$', written, re.M | re.S
    )
    assert match, written
    return match[0]


def check_form(written: str) -> None:
    assert written.endswith(";\n")
    for line in written.split("\n"):
        assert _LINE.fullmatch(line), line
    bare = re.sub(rf"{_QUOTED}|/\*.*?\*/|//.*", "", written)
    assert bare.count("{") == bare.count("}")


def test_an_event_has_what_a_sender_may_set() -> None:
    assert event("""
[events.x]
priority = "low"
ttl = "2h"
coalesce = "90s"
limit = "3/1d"
token = "required"
customer = ["email", "source_id"]
loyalty = true
referral = false
metadata = { a = "string", b = "number", c = "boolean", d = "date", e = "any" }
""") == (
        """\
  /** Priority low. Needs a token. At most 3 a customer in 1d. One a customer in 90s: \
the last one. Expires after 2h. */
  "x": {
    customer?: Pick<RelayCustomer, "source_id" | "email">;
    loyalty?: RelayLoyalty;
    referral?: never;
    metadata?: {
      "a"?: string;
      "b"?: number;
      "c"?: boolean;
      /** A date, written YYYY-MM-DD. */
      "d"?: string;
      "e"?: unknown;
    };
  };"""
    )


def test_what_the_catalogue_does_not_say_is_open() -> None:
    assert event("[events.x]") == (
        """\
  /** Priority normal. */
  "x": {
    customer?: RelayCustomer;
    loyalty?: RelayLoyalty;
    referral?: RelayReferral;
    metadata?: Record<string, unknown>;
  };"""
    )


def test_nothing_is_not_written_as_an_object_that_takes_everything() -> None:
    text = "[events.x]\ncustomer = []\ntoken = 'required'\nmetadata = {}"
    assert event(text).count("Record<string, never>") == 2


@pytest.mark.parametrize(
    ("metadata", "offered"),
    [
        ('{ at = "datetime", n = "number" }', ['"n"?: number;']),
        ('{ n = "number" }', ['"n"?: number;']),
        ('{ at = "datetime" }', ["metadata?: Record<string, never>;"]),
        ('"any"', ["metadata?: Record<string, unknown>;"]),
    ],
)
def test_what_the_relay_sets_itself_is_not_offered(
    metadata: str, offered: list[str]
) -> None:
    written = event(f"[events.x]\noccurred_at = 'at'\nmetadata = {metadata}")
    assert '"at"' not in written
    assert [line.strip() for line in written.splitlines()[5:-1]] in (
        offered,
        ["metadata?: {", *offered, "};"],
    )


def test_a_rule_on_trial_is_not_told_for_it_refuses_nobody() -> None:
    text = "[events.x]\ntoken = 'dry_run'\nlimit = '1/1d dry_run'"
    assert event(text).startswith("  /** Priority normal. */")


def test_the_customer_has_every_field() -> None:
    written = declarations(EMPTY)
    [customer] = re.findall(r"RelayCustomer \{\n(.*?)^\}", written, re.M | re.S)
    assert tuple(re.findall(r"^  (\w+)\?:", customer, re.M)) == CUSTOMER_FIELDS


@pytest.mark.parametrize(
    ("unlisted", "name"),
    [
        ("accept", "keyof RelayEvents | (string & {})"),
        ("reject", "keyof RelayEvents"),
    ],
)
def test_other_names_are_taken_when_the_relay_takes_them(
    unlisted: str, name: str
) -> None:
    written = declarations(catalog(f"[defaults]\nunlisted = '{unlisted}'\n[events.x]"))
    assert f"export type RelayEventName = {name};" in written
    assert ("RelayUnlistedEvent" in written) is (unlisted == "accept")
    check_form(written)


@pytest.mark.parametrize("given_", [EMPTY, catalog(EXAMPLE)], ids=["empty", "example"])
def test_the_form_is_sound_and_always_the_same(given_: Catalog) -> None:
    written = declarations(given_)
    check_form(written)
    assert written == declarations(given_)


def test_the_order_is_that_of_the_file() -> None:
    written = declarations(catalog(EXAMPLE))
    names = re.findall(r'^  "(.*)": \{$', written, re.M)
    assert tuple(names) == catalog(EXAMPLE).names


NAMES = st.text(min_size=1) | st.sampled_from(
    ["*/", "/*", "//", '"', "\\", "\n", "\u2028", "\u202e", "__proto__", "`${x}`", "}"]
)


@given(st.dictionaries(NAMES, st.sampled_from(METADATA_TYPES), min_size=1))
def test_no_name_breaks_out_of_its_quotes(types: dict[str, str]) -> None:
    rules = {
        name: Rule(name=name, metadata=types, place=f"events.{index}")
        for index, name in enumerate(types)
    }
    written = declarations(
        Catalog(rules=rules, defaults=EMPTY.defaults, unlisted="reject")
    )
    check_form(written)
    assert all(char.isprintable() for char in written.replace("\n", ""))
    names = re.findall(rf"^  ({_QUOTED}): \{{$", written, re.M)
    assert [json.loads(name) for name in names] == list(types)
    assert len(re.findall(rf"^      {_QUOTED}\?: ", written, re.M)) == len(types) ** 2
