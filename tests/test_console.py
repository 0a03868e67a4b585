"""Words of browsers do not steer the operator's terminal."""

import pytest

from relay.console import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cart_abandoned", "cart_abandoned"),
        ("zoë 👤", "zoë 👤"),
        ("\x1b[2Jx", "\N{REPLACEMENT CHARACTER}[2Jx"),
        ("a\nb\tc", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"),
        ("\x9b31m", "\N{REPLACEMENT CHARACTER}31m"),
        ("\u202eabc", "\N{REPLACEMENT CHARACTER}abc"),
        ("[red]x[/]", "[red]x[/]"),
        (None, ""),
        (7, "7"),
    ],
    ids=repr,
)
def test_what_a_terminal_would_obey_is_replaced(text: object, shown: str) -> None:
    assert plain(text) == shown
