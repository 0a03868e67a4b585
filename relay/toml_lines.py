"""Where each table and key of a TOML file stands: tomllib keeps no lines for values.

Pure: text in, numbers out. Lines count from 1.
"""

import re
import tomllib
from collections.abc import Iterator

Path = tuple[str, ...]  # ("events", "cart_abandoned", "ttl")

# In sound TOML a statement ends with its line, unless a bracket or a string is open.
_TOKEN = re.compile(
    r"""
      \#[^\n]*
    | \"{3} (?:\\.|[^\\])*? (?:\"{3}\"{0,2}|\Z)   # may end with quotes of its own
    | '{3} .*? (?:'{3}'{0,2}|\Z)
    | "(?:\\.|[^"\\\n])*" | '[^'\n]*'
    | [^\#"'\[\]{}\n]+ | .
    """,
    re.DOTALL | re.VERBOSE,
)
_DEEP = 4  # events, its name, metadata, a name in it: no message is about more


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Every statement of a file with the number of its first line."""
    line, start, depth = 1, 0, 0
    for token in _TOKEN.finditer(text):
        char = token[0]
        if char in ("[", "{"):
            depth += 1
        elif char in ("]", "}"):
            depth -= 1
        elif char == "\n" and depth <= 0:
            statement = text[start : token.end()]
            yield line, statement
            line, start, depth = line + statement.count("\n"), token.end(), 0
    yield line, text[start:]


def read_lines(text: str) -> dict[Path, int]:
    """The line that first says each table and key, for text that is sound TOML.

    Each statement is read by tomllib alone, so quotes and dots mean what they do to
    it; the dictionary that it gives is the path.
    """
    lines: dict[Path, int] = {}
    table: Path = ()
    for line, statement in _statements(text):
        said = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = _header(said)
        elif said:  # not only a comment
            for key in reversed(table):
                said = {key: said}
        for path in _paths(said, ()):
            lines.setdefault(path, line)
    return lines


def _paths(said: object, above: Path) -> Iterator[Path]:
    if isinstance(said, dict) and len(above) < _DEEP:
        for key, inner in said.items():
            yield (*above, key)
            yield from _paths(inner, (*above, key))


def _header(said: object) -> Path:
    path: list[str] = []
    while isinstance(said, dict | list) and said and len(path) < _DEEP:
        if isinstance(said, dict):
            [(key, said)] = said.items()
            path.append(key)
        else:  # [[…]]: a list of one table
            [said] = said
    return tuple(path)


def first_broken(text: str) -> int:
    """The line of the first statement that is not TOML, in a text that is not."""
    line = 1
    for line, statement in _statements(text):
        try:
            tomllib.loads(statement)
        except (ValueError, RecursionError):
            return line
    return line
