"""The line of each table and key, whatever a file looks like."""

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from relay.toml_lines import read_lines

NASTY = [
    "# [events.fake]\n",
    "  \t\n",
    '\t[ events . "a b" ]  # [events.fake]\n',
    'ttl = "2h" # priority = "low"\n',
    "'priority'='low'\n",
    'text = """\n[events.fake]\nttl = "9d"\n\\""" # """""\n',
    "raw = '''\n[events.fake]\nttl = '9d' ''\\'''\n",
    "quotes = [\"\"\"\"a\"\"\"\"\", '''''b''''']\n",
    'list = [ # [\n  "]", \'[\', # "\n\n  { a = "}" },\n]\n',
    'metadata = { "x y" = "[", z = \'{\' , w.v = [\n1 ] }\n',
    'customer.deep . "er" = 1\n',
    "when = 2030-01-31 09:00:00Z\n",
    '[events."\\u005bx\\u005d"]\r\n',
    "ttl = '1h'\r\n",
    "[[events.'l\"i']]\n",
    "limit = 1\n",
    "[[events.'l\"i']]\n",
    "[events.'l\"i'.metadata]\nn = 1\n",
    'events_x.y."z.z" = 1\n',
]


def has(document: object, path: tuple[str, ...]) -> bool:
    if isinstance(document, list):
        return any(has(item, path) for item in document)
    if not path:
        return True
    if not isinstance(document, dict) or path[0] not in document:
        return False
    return has(document[path[0]], path[1:])


def parses(lines: list[str]) -> object:
    try:
        return tomllib.loads("".join(lines))
    except tomllib.TOMLDecodeError:
        return None


def check_lines(text: str) -> None:
    """A path is first said where a prefix of whole lines has it and a shorter has not.

    The line is the first of the statement: the prefixes that end within it are no TOML.
    """
    lines = text.splitlines(keepends=True)
    documents = [parses(lines[:end]) for end in range(len(lines) + 1)]
    for path, first in read_lines(text).items():
        before, within = documents[first - 1], documents[first:]
        assert before is not None, path
        assert not has(before, path), path
        end = next(document for document in within if document is not None)
        assert has(end, path), path


def test_every_line_of_a_nasty_file_is_found() -> None:
    text = "".join(NASTY)
    found = read_lines(text)
    at = {line: path for path, line in reversed(found.items())}
    assert at[3] == ("events",)
    assert found["events", "a b"] == 3
    assert found["events", "a b", "ttl"] == 4
    assert found["events", "a b", "raw"] == 10
    assert found["events", "a b", "metadata", "x y"] == 19
    assert found["events", "[x]", "ttl"] == 24
    assert not any("fake" in path for path in found)
    check_lines(text)


@given(st.permutations(NASTY).map("".join))
def test_lines_are_exact_in_any_layout(text: str) -> None:
    if parses([text]) is not None:
        check_lines(text)


@given(st.lists(st.sampled_from(NASTY), max_size=8).map("".join), st.booleans())
def test_lines_are_exact_in_parts_of_it(text: str, cut: bool) -> None:
    text = text.rstrip("\r\n") if cut else text
    if parses([text]) is not None:
        check_lines(text)
