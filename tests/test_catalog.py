"""The catalogue: what it reads, and what it refuses; and its document."""

import re
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.catalog import (
    CUSTOMER_FIELDS,
    DELIVERIES,
    EMPTY,
    EVENT_KEYS,
    EXAMPLES,
    ID_TYPES,
    LANES,
    MAX_CHARS,
    MAX_LINE,
    METADATA_TYPES,
    TIME_TYPES,
    TOKEN_RULES,
    UNLISTED,
    Catalog,
    CatalogError,
    Rule,
    metadata_fault,
    parse_catalog,
    quoted,
    span,
)
from relay.events import Customer
from relay.limits import Window

ROOT = Path(__file__).parents[1]
EXAMPLE = (ROOT / "deploy" / "catalog.toml").read_text("utf-8")
DOCUMENT = (ROOT / "docs" / "catalog.md").read_text("utf-8")
DAYS_3 = 3 * 86_400


def parse(text: str) -> Catalog:
    return parse_catalog(text, max_ttl_s=DAYS_3)


def rule(body: str) -> Rule:
    return parse(f"[events.x]\n{body}").rules["x"]


def faults(text: str) -> list[str]:
    with pytest.raises(CatalogError) as caught:
        parse(text)
    assert str(caught.value).splitlines() == caught.value.faults
    return caught.value.faults


def fault(body: str) -> str:
    """The one fault of an event, without its line."""
    [said] = faults(f"[events.x]\n{body}")
    return re.sub(r"^line \d+: ", "", said)


# --- what a file says -----------------------------------------------------------------


@pytest.mark.parametrize("text", ["[defaults]", "[events]\n", "[defaults]\n[events]"])
def test_no_rules_are_as_good_as_no_file(text: str) -> None:
    assert parse(text) == EMPTY


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff", "# our rules\n"])
def test_a_file_that_says_nothing_is_a_fault_and_lifts_no_rule(text: str) -> None:
    assert faults(text) == ["line 1: the file is empty: for no rules write [defaults]"]


def test_a_line_that_would_take_long_to_read_is_refused() -> None:
    """tomllib takes 23 s for 100,000 parts of one key."""
    deep = ".".join("a" * (MAX_LINE // 2 + 1))
    said = f"line 2: the line is longer than {MAX_LINE} characters: break it"
    assert faults(f"[events.x]\n{deep} = 1\n") == [said]
    longest = f"# {'x' * (MAX_LINE - 2)}\n[events.x]\n"
    assert parse(longest).names == ("x",)


def test_without_a_catalogue_every_name_gets_the_defaults() -> None:
    assert EMPTY.rule("whatever") == Rule(name=None, place="defaults")
    assert not EMPTY.needs_keys
    assert EMPTY.names == ()


def test_the_example_is_read_as_it_is_meant() -> None:
    catalog = parse(EXAMPLE)
    assert catalog.warnings == ()
    assert catalog.needs_keys
    assert catalog.names[0] == "cart_abandoned"
    assert catalog.rules["cart_abandoned"] == Rule(
        name="cart_abandoned",
        priority="low",
        ttl_s=7_200,
        coalesce_ms=600_000,
        customer=frozenset({"source_id"}),
        metadata={"value": "number", "currency": "string", "items": "number"},
        place="events.cart_abandoned",
    )
    assert catalog.rules["review_added"] == Rule(
        name="review_added",
        priority="high",
        token="required",
        delivery="at_most_once",
        limit=Window(quota=3, period_ms=86_400_000),
        loyalty=True,
        referral=False,
        metadata={"sku": "string", "rating": "number", "verified": "boolean"},
        place="events.review_added",
    )
    assert catalog.rules["newsletter_joined"].limit_dry_run
    assert catalog.rules["page.viewed"].place == 'events."page.viewed"'


def test_the_example_shows_every_key_lane_and_type() -> None:
    tables = tomllib.loads(EXAMPLE)
    used = {key for table in tables["events"].values() for key in table}
    assert used == set(EVENT_KEYS)
    rules = parse(EXAMPLE).rules.values()
    types = {kind for each in rules for kind in (each.metadata or {}).values()}
    assert types == set(METADATA_TYPES)


def test_a_listed_event_inherits_nothing() -> None:
    catalog = parse('[defaults]\npriority = "low"\nttl = "1h"\n[events.x]\n')
    assert catalog.rule("x") == Rule(name="x", place="events.x")
    assert catalog.rule("y") == Rule(
        name=None, priority="low", ttl_s=3_600, place="defaults"
    )


def test_what_is_not_listed_can_be_refused() -> None:
    catalog = parse('[defaults]\nunlisted = "reject"\n[events.x]\n')
    assert catalog.rule("x") is catalog.rules["x"]
    assert catalog.rule("X") is None


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ('[events.x]\ntoken = "required"', True),
        ('[events.x]\ntoken = "dry_run"', True),
        ('[events.x]\ntoken = "optional"\n[events.y]\ntoken = "off"', False),
        ('[defaults]\ntoken = "required"', True),
        ('[defaults]\ntoken = "required"\nunlisted = "reject"', False),
    ],
)
def test_rules_that_ask_for_tokens_need_keys(text: str, needs: bool) -> None:
    assert parse(text).needs_keys is needs


@pytest.mark.parametrize("name", ["a b", "ä€😀", 'q"\\', "x" * 300, "a.b", "\n", "]"])
def test_any_name_of_1_to_300_characters_can_be_listed(name: str) -> None:
    assert parse(f"[events.{quoted(name)}]").names == (name,)


def test_the_order_is_that_of_the_file() -> None:
    assert parse("[events.b]\n[events.a]\n[events.c]\n").names == ("b", "a", "c")


@pytest.mark.parametrize(
    ("body", "key", "value"),
    [
        ('ttl = "1s"', "ttl_s", 1),
        ('ttl = "3d"', "ttl_s", DAYS_3),
        ('coalesce = "30d"', "coalesce_ms", 2_592_000_000),
        ("customer = []\ntoken = 'required'", "customer", frozenset()),
        ('customer = ["id"]', "customer", frozenset({"id"})),
        ("loyalty = false", "loyalty", False),
        ('metadata = "any"', "metadata", None),
        ("metadata = {}", "metadata", {}),
        ('metadata = { "" = "any" }', "metadata", {"": "any"}),
        ('occurred_at = "at"', "occurred_at", "at"),
        ('occurred_at = "a b\\n"', "occurred_at", "a b\n"),
        ('event_id = "a b\\n"', "event_id", "a b\n"),
        ('delivery = "verify"\nevent_id = "n"', "delivery", "verify"),
    ],
)
def test_a_value_is_read(body: str, key: str, value: object) -> None:
    assert getattr(rule(body), key) == value


def test_a_byte_order_mark_and_windows_lines_do_not_matter() -> None:
    catalog = parse('\ufeff[events.x]\r\nttl = "1h"\r\n')
    assert catalog.rules["x"].ttl_s == 3_600


# --- faults ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("priority = 3", "must be high, normal or low, not a number"),
        ('priority = "hihg"', 'must be high, normal or low, not "hihg"'),
        ("ttl = 7200", "must be a time in quotes, not a number"),
        ('ttl = "2 h"', '"2 h" cannot be read: the time must be a whole number'),
        ('ttl = "2w"', "the unit of time must be s, m, h or d"),
        ('ttl = "0s"', 'must be from 1s to 3d, not "0s"'),
        ('ttl = "4d"', 'from 1s to 3d, not "4d": an id must be remembered for as'),
        ('ttl = "4d"', "raise RELAY_DEDUPE_WINDOW, which is never less than RELAY_TTL"),
        ("ttl = 2030-01-31", "must be a time in quotes, not a date or time"),
        ('coalesce = "31d"', "must be from 1s to 30d"),
        ("coalesce = false", "must be a time in quotes, not false"),
        ("token = true", "must be off, optional, required or dry_run, not true"),
        ('delivery = "twice"', "must be at_least_once, at_most_once or verify"),
        ("event_id = 1", "must be a name in quotes, not a number"),
        ('event_id = ""', "must be the name of a property, not empty"),
        ("limit = 3", "must be a rate in quotes, not a number"),
        ("limit = { quota = 3 }", "must be a rate in quotes, not a table"),
        ('limit = "3"', '"3" cannot be read: it has no window'),
        ('limit = "1001/1d"', "the quota must be from 1 to 1000"),
        ('limit = "3/1d burst 3"', "only `dry_run` may follow"),
        ('customer = "source_id"', 'must be a list of names, not "source_id"'),
        ("customer = [1]", "must be a list of names, and a number is none"),
        ('customer = ["source_id", "emial"]', "no field of a customer: the nearest is"),
        ('customer = ["source_id", "!"]', "there are id, source_id, name,"),
        ('loyalty = "yes"', 'must be true or false, not "yes"'),
        ("referral = 1", "must be true or false, not a number"),
        ("occurred_at = true", "must be a name in quotes, not true"),
        ('occurred_at = ["at"]', "must be a name in quotes, not a list"),
        ('occurred_at = ""', "must be the name of a property, not empty"),
        ("metadata = 3", 'must be a table of types, or "any", not a number'),
        ('metadata = "all"', 'must be a table of types, or "any", not "all"'),
    ],
)
def test_a_fault_says_what_is_wrong_and_shows_how_it_is_written(
    body: str, said: str
) -> None:
    key = body.partition(" ")[0]
    text = fault(body)
    assert text.startswith(f"events.x.{key}: ")
    assert said in text
    assert text.endswith(f". Example: {EXAMPLES[key]}")


def test_the_names_of_metadata_are_told_one_by_one() -> None:
    found = faults('[events.x]\nmetadata = { a = "int", b = "any", "c d" = ["any"] }')
    want = "must be string, number, boolean, date, datetime or any, not"
    assert [text.partition(". Ex")[0] for text in found] == [
        f'line 2: events.x.metadata.a: {want} "int"',
        f'line 2: events.x.metadata."c d": {want} a list',
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[event]", "event: this key is not known: the nearest is events; an event"),
        ("[cart]", "an event is written [events.cart]"),
        ('ttl = "2h"', "ttl: this key is not known: write it under [defaults]"),
        ("[defaults]\ntlt = 1", "defaults.tlt: this key is not known: the nearest is"),
        ("[defaults]\nunlisted = true", "unlisted: must be accept or reject, not true"),
        ("[events.x]\nunlisted = 1", "x.unlisted: this key is not known: write it und"),
        ("[events.x]\nprority = 1", "not known: the nearest is priority"),
        ("[events.x]\nqqq = 1", "not known: there are priority, ttl, coalesce"),
        ("[events.a.b]", 'if the event\'s name has a dot, write [events."a.b"]'),
        ("events = 3", "events: must be a table, not a number: [events.cart_abandone"),
        ("defaults = []", "defaults: must be a table, not a list: [defaults]"),
        ("[events]\nx = 'low'", "events.x: must be a table, not a text: [events.x]"),
        ("[events]\nx = true", "must be a table, not true or false: [events.x]"),
        ("[[events.x]]", "events.x: must be a table, not a list: [events.x]"),
        ('[events.""]', 'events."": the name must have 1 to 300 characters'),
        (f"[events.{'x' * 301}]", "the name must have 1 to 300 characters"),
        ('[events.x]\ncustomer = ["email"]', 'add source_id, or token = "required"'),
        ('[defaults]\ncustomer = []\ntoken = "dry_run"', "defaults.customer: nobody"),
    ],
)
def test_what_cannot_be_meant_is_a_fault(text: str, said: str) -> None:
    [found] = faults(text)
    assert said in found


def test_every_fault_is_told_at_once_in_the_order_of_lines() -> None:
    found = faults("""
[events.b]
limit = "x"
priority = "x"
[defaults]
unlisted = 1
[events.a]
wrong = 1
customer = ["x"]
metadata = { a = 1, b = 2 }
""")
    assert [text.partition(": ")[0] for text in found] == [
        *("line 3", "line 4", "line 6", "line 8", "line 9", "line 10", "line 10"),
    ]


def test_long_values_and_names_are_cut_and_stay_on_their_line() -> None:
    [found] = faults(f'[events."{"n" * 200}\\n"]\nttl = "{"9" * 5_000}\\r\\n\\u2028"')
    assert len(found) < 300
    assert found.isprintable()


def test_a_file_that_is_far_too_large_is_not_read() -> None:
    assert faults("#" * (MAX_CHARS + 1)) == [
        f"line 1: the file is larger than {MAX_CHARS} characters."
    ]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("\n[events.x\n", 2, "Expected ']'"),
        ('[events.x]\nttl = "2h"\nlimit = 3/1d\n', 3, "after a statement (column 10)"),
        (
            "[events.x]\n[events.y]\n[events.'x']",
            3,
            "Write each table and each key once",
        ),
        ("[events.x]\nttl = '1h'\nttl = '2h'\n", 3, "Cannot overwrite a value"),
        ("[events.x]\nttl = '1h'\nttl = '2h'", 3, "Cannot overwrite a value"),
        # What is open until the end of the file is told where it begins.
        ('a = 1\nb = """\n"\nc = 2\n\n', 2, "Unterminated string"),
        ("a = 1\nb = '''\nc = 2\n", 2, ""),
        ("a = 1\nb = [\n1,\n# ]\n\n", 2, ""),
        ("a = 1\nb = " + "[" * 3_900, 2, "too many brackets"),
        (f"[events.{'x' * 1000}]\n" * 2, 2, "Cannot declare"),
        ("a = 1\rb = 2", 1, ""),
        ("a = '\x00'", 1, ""),
    ],
)
def test_what_is_not_toml_is_told_with_its_line(
    text: str, line: int, said: str
) -> None:
    [found] = faults(text)
    assert found.startswith(f"line {line}: this is not TOML: ")
    assert said in found
    assert found.endswith(('quotes: ttl = "2h"', "each key once"))
    assert len(found) < 400


@given(
    st.lists(
        st.sampled_from(
            [
                *("[events.x]", "[[events.x]]", "[defaults]", "events", "x", "."),
                *(" = ", "\n", "\r\n", '"""', "'''", '"', "'", "\\", "[", "]", "{"),
                *("}", ",", "#", "true", "1", "metadata", "ttl", '"2h"', '"any"'),
            ]
        ),
        max_size=40,
    ).map("".join)
    | st.text(max_size=60)
)
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        parse(text)
        found = ["line 1: none"]
    except CatalogError as error:
        found = error.faults
    assert found
    assert all(re.match(r"line \d+: ", line) for line in found)


# --- warnings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            "[events.x]\nloyalty = true\ntoken = 'required'\ndelivery='at_least_once'",
            4,
            "events.x.delivery: points could be paid twice",
        ),
        (
            "[events.x]\ntoken = 'off'\nreferral = true",
            3,
            "events.x.referral: any visitor can mint points",
        ),
        (
            "[events.x]\nloyalty = true\nlimit = '3/1d dry_run'",
            2,
            "events.x.loyalty: unless RELAY_TOKENS is required, any visitor can mint",
        ),
        (
            "[events.x]\ndelivery = 'verify'\nevent_id = 'i'\nttl = '2m'",
            4,
            "events.x.ttl: an event is looked up 120 s after a doubtful call",
        ),
        (
            "[defaults]\nunlisted = 'reject'\nttl = '1h'",
            1,
            "defaults: nothing here counts but unlisted",
        ),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(
    text: str, line: int, said: str
) -> None:
    [warning] = parse(text).warnings
    assert warning.startswith(f"line {line}: {said}")


@pytest.mark.parametrize(
    "body",
    [
        "delivery = 'verify'\nevent_id = 'i'\nttl = '3m'",
        "loyalty = true\ntoken = 'off'\nlimit = '3/1d'",
        "loyalty = true\nreferral = true\ntoken = 'required'",
        "loyalty = false\nreferral = false\ndelivery = 'at_least_once'",
        "token = 'off'",
    ],
)
def test_what_is_guarded_is_no_warning(body: str) -> None:
    assert parse(f"[events.x]\n{body}").warnings == ()


def test_a_fault_in_any_spelling_has_its_line() -> None:
    text = """# ttl = "9d"
events.a.ttl = "9d"
events."b c" = { priority = "low", ttl = "9d" }
events.'d'.metadata.seats = "int"
note = '''
[events.e]
ttl = "9d"
'''
[ events . f ] # ttl
"ttl" = "9d"
customer = [
  # "source_id"
  "source_id",
  "x",
]
"""
    places = [found.partition(": ")[0] for found in faults(text)]
    assert places == [f"line {line}" for line in (2, 3, 4, 5, 10, 11)]


def test_the_lines_of_a_large_faulty_file_are_found_in_time() -> None:
    body = 'ttl = "9d"\npriority = "x"\n# a comment\nmetadata = { a = "b" }\n'
    text = "".join(f'[events."event {n}"]\n{body}' for n in range(400))
    assert len(text.splitlines()) == 2_000
    started = time.process_time()
    assert len(faults(text)) == 1_200
    assert time.process_time() - started < 2  # 0.15 s where this was written


def test_a_text_of_many_lines_costs_no_more() -> None:
    lines = "a = [1, 2, 3]\n" * 15_000
    started = time.process_time()
    assert faults(f'a = """\n{lines}"""\n')[0].startswith("line 1: a: ")
    assert time.process_time() - started < 2


# --- metadata -------------------------------------------------------------------------

TYPED = Rule(
    name="e",
    metadata={kind: kind for kind in METADATA_TYPES},
    place="events.e",
)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("string", ""),
        ("number", 3),
        ("number", -0.5),
        ("number", 10**30),
        ("boolean", False),
        ("date", "2028-02-29"),
        ("datetime", "2020-03-11T09:00:00.000Z"),
        ("datetime", "2020-03-11T09:00:00Z"),
        ("datetime", "2020-03-11T09:00:00.123456789+05:30"),
        ("datetime", "2020-03-11T09:00:00"),
        ("datetime", "2020-03-11T09:00-11:00"),
        ("datetime", "2020-03-11T09"),
        ("datetime", "2020-03-11"),
        ("any", {"deep": [1, None]}),
        *((kind, None) for kind in METADATA_TYPES),
    ],
)
def test_a_value_of_its_type_passes(kind: str, value: object) -> None:
    assert metadata_fault(TYPED, {kind: value}) is None


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("string", 3),
        ("string", ["a"]),
        ("number", "3"),
        ("number", True),
        ("boolean", 1),
        ("boolean", "true"),
        ("date", "2027-02-29"),
        ("date", "20280229"),
        ("date", "2028-W09-2"),
        ("date", "2028-02-29T00:00:00Z"),
        ("date", "2028-02-29\n"),
        ("date", "\u0662028-02-29"),
        ("date", 20280229),
        ("datetime", "2027-02-29T09:00:00Z"),
        ("datetime", "2020-03-11T25:00:00Z"),
        ("datetime", "2020-03-11T09:60Z"),
        ("datetime", "2020-03-11T09:00:00+24:00"),
        ("datetime", "2020-03-11T09:00.5Z"),
        ("datetime", "2020-03-11 09:00:00Z"),
        ("datetime", "2020-03-11T09:00:00Z\n"),
        ("datetime", "2020-03-11Z"),
        ("datetime", "now"),
        ("datetime", 1_583_917_200),
    ],
)
def test_a_value_of_another_type_is_refused(kind: str, value: object) -> None:
    found = metadata_fault(TYPED, {"any": 1, kind: value})
    assert found is not None
    reason, detail = found
    assert reason == "metadata_type"
    assert detail.startswith(f"metadata.{kind} must be ")
    assert detail.endswith(" (catalogue: events.e.metadata).")


def test_a_refusal_names_the_rule() -> None:
    seats = parse(EXAMPLE).rules["referral_signup"]
    assert metadata_fault(seats, {"plan": "pro", "seats": "3"}) == (
        "metadata_type",
        "metadata.seats must be a number (catalogue: events.referral_signup.metadata).",
    )
    assert metadata_fault(seats, {"saets": 3}) == (
        "metadata_field",
        "metadata.saets is not listed (catalogue: events.referral_signup.metadata).",
    )


def test_a_name_that_is_not_listed_is_refused_even_with_null() -> None:
    found = metadata_fault(TYPED, {"other": None})
    assert found is not None
    assert found[0] == "metadata_field"


def test_a_hostile_name_is_cut_and_escaped() -> None:
    found = metadata_fault(TYPED, {"a\n\u202e" + "b" * 10_000: 1})
    assert found is not None
    assert len(found[1]) < 150
    assert found[1].isprintable()


def test_without_a_list_any_metadata_passes() -> None:
    assert metadata_fault(EMPTY.defaults, {"a": object()}) is None
    assert metadata_fault(rule("metadata = {}"), {}) is None


# --- the property that the relay sets ------------------------------------------------


@pytest.mark.parametrize("kind", METADATA_TYPES)
@pytest.mark.parametrize(
    ("key", "what", "types"),
    [("occurred_at", "a time", TIME_TYPES), ("event_id", "an id", ID_TYPES)],
)
def test_a_listed_property_must_be_one_that_what_the_relay_says_fits(
    key: str, what: str, types: tuple[str, ...], kind: str
) -> None:
    text = (
        f'[events.x]\npriority = "low"\n{key} = "a b"\n'
        f'[events.x.metadata]\n"a b" = "{kind}"\n'
    )
    if kind in types:
        assert parse(text).rules["x"].own == ("a b",)
        return
    assert faults(text) == [
        f"line 3: events.x.{key}: metadata lists this name as {kind}, and {what} "
        f"is none: list it as {types[0]}, or leave it out there"
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            'delivery = "verify"',
            "events.x.delivery: an event is found again by a property of its own: name "
            'one, event_id = "relay_id"',
        ),
        (
            'occurred_at = "n"\nevent_id = "n"',
            "events.x.event_id: occurred_at has this name: give it another one",
        ),
    ],
)
def test_what_the_relay_says_itself_must_fit_together(body: str, said: str) -> None:
    assert fault(body) == said


@pytest.mark.parametrize(
    ("text", "verifies"),
    [
        ("[events.x]\n", False),
        ('[events.x]\nevent_id = "n"\n', False),
        ('[events.x]\ndelivery = "verify"\nevent_id = "n"\n', True),
        ('[defaults]\ndelivery = "verify"\nevent_id = "n"\n', True),
        (
            '[defaults]\nunlisted = "reject"\ndelivery = "verify"\nevent_id = "n"\n',
            False,
        ),
    ],
)
def test_a_catalogue_tells_whether_events_are_looked_up(
    text: str, verifies: bool
) -> None:
    assert parse(text).verifies == verifies


@pytest.mark.parametrize(
    "body", ["", "metadata = {}", 'metadata = "any"', 'metadata = { at = "string" }']
)
def test_the_property_need_not_be_listed(body: str) -> None:
    written = parse(f'[defaults]\noccurred_at = "happened"\n{body}')
    assert written.defaults.occurred_at == "happened"
    assert written.warnings == ()


def test_a_listed_event_inherits_no_property() -> None:
    written = parse('[defaults]\noccurred_at = "at"\n[events.x]\n')
    assert written.rules["x"].occurred_at is None


@pytest.mark.parametrize("value", ["then", 5, None, {}, "2030-01-31T09:00:00Z"])
@pytest.mark.parametrize("listed", ["", 'at = "string", '])
@pytest.mark.parametrize("key", ["occurred_at", "event_id"])
def test_what_will_be_overwritten_is_no_fault(
    key: str, value: object, listed: str
) -> None:
    own = rule(f'{key} = "at"\nmetadata = {{ {listed}n = "number" }}')
    assert metadata_fault(own, {"at": value, "n": 1}) is None
    found = metadata_fault(own, {"at": value, "n": "1"})
    assert found is not None
    assert found[0] == "metadata_type"
    found = metadata_fault(own, {"at": value, "At": 1})
    assert found is not None
    assert found[0] == "metadata_field"


# --- words ----------------------------------------------------------------------------


@given(st.text())
def test_a_quoted_text_shows_all_and_is_the_same_text(text: str) -> None:
    written = quoted(text)
    assert written.isprintable()
    if not any(char > "\uffff" and not char.isprintable() for char in text):
        # TOML has no surrogate pairs, which is how JSON escapes the rest.
        assert tomllib.loads(f"a = {written}")["a"] == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "1s"), (90, "90s"), (600, "10m"), (7_200, "2h"), (259_200, "3d")],
)
def test_a_time_is_written_as_it_is_read(seconds: int, text: str) -> None:
    assert span(seconds) == text
    assert rule(f'ttl = "{text}"').ttl_s == seconds


# --- docs/catalog.md ------------------------------------------------------------------


def section(heading: str) -> str:
    parts = re.split(r"^##+ (.+)\n", DOCUMENT, flags=re.MULTILINE)
    return parts[parts.index(heading) + 1]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [row for row in table if row[0].startswith("`")]


def coded(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_example_of_the_document_is_the_file() -> None:
    [block] = re.findall(r"^```toml\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert block == EXAMPLE


def test_the_table_of_keys_is_that_of_the_code() -> None:
    table = rows(section("Keys"))
    assert tuple(coded(row[0])[0] for row in table) == (*EVENT_KEYS, "unlisted")
    for name, *_, example, _ in table:
        assert example == f"`{EXAMPLES[name[1:-1]]}`"
    kinds = {coded(row[0])[0]: coded(row[1]) for row in table}
    assert tuple(kinds["priority"]) == LANES
    assert tuple(kinds["token"]) == TOKEN_RULES
    assert tuple(kinds["delivery"]) == DELIVERIES
    assert tuple(kinds["unlisted"]) == UNLISTED


def test_the_table_of_keys_tells_the_defaults() -> None:
    told = {coded(row[0])[0]: coded(row[2]) for row in rows(section("Keys"))}
    plain = Rule(name="x", place="events.x")
    assert told["priority"] == [plain.priority]
    assert told["unlisted"] == [EMPTY.unlisted]
    assert told["metadata"] == ['"any"']
    assert plain.metadata is None
    # The settings, or who sends it, decide; or there is none.
    assert (told["ttl"], told["token"]) == (["RELAY_TTL"], ["RELAY_TOKENS"])
    for key in ("coalesce", "delivery", "limit", "customer", "loyalty", "referral"):
        assert told[key] == []
    assert told["occurred_at"] == told["event_id"] == []


@pytest.mark.parametrize("key", EVENT_KEYS)
def test_every_example_is_sound_and_has_an_effect(key: str) -> None:
    written = rule(EXAMPLES[key])
    assert written != Rule(name="x", place="events.x")
    assert any(field.name.startswith(key) for field in fields(Rule))


def test_the_types_and_the_fields_are_told() -> None:
    types = rows(section("Types of metadata"))
    assert tuple(coded(row[0])[0] for row in types) == METADATA_TYPES
    listed = section("Fields of the customer").strip().splitlines()[0]
    assert tuple(coded(listed)) == CUSTOMER_FIELDS == Customer.__struct_fields__


def test_the_reasons_of_metadata_are_told() -> None:
    told = {coded(row[0])[0] for row in rows(section("What a refusal looks like"))}
    assert {"metadata_field", "metadata_type"} <= told
    found = metadata_fault(parse(EXAMPLE).rules["referral_signup"], {"seats": "3"})
    assert found is not None
    assert f'"detail":"{found[1]}"' in section("What a refusal looks like")


def test_the_faults_of_the_document_are_real() -> None:
    text = "\n" * 7 + "[events.cart_abandoned]\nprority = 'low'\nttl = 7200\n"
    assert "\n".join(faults(text)) in section("Checking a file")


@pytest.mark.parametrize(
    ("text", "tokens", "strangers"),
    [
        ("[defaults]", "optional", True),
        ("[defaults]", "required", False),
        ('[defaults]\ntoken = "required"', "off", False),
        ('[defaults]\ntoken = "required"\n[events.x]', "off", True),
        ('[events.x]\ntoken = "dry_run"', "required", True),
        ('[defaults]\nunlisted = "reject"\n[events.x]', "optional", True),
        (
            '[defaults]\nunlisted = "reject"\n[events.x]\ntoken = "required"',
            "off",
            False,
        ),
    ],
)
def test_whether_strangers_are_let_in_is_for_rules_and_setting_together(
    text: str, tokens: str, strangers: bool
) -> None:
    assert parse(text).takes_strangers(tokens) is strangers
