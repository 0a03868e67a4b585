"""Words of browsers do not steer the operator's terminal; nothing keeps it waiting."""

import asyncio
import threading
import time

import pytest

from relay.console import in_time, plain


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


def test_what_hangs_in_a_thread_is_left_behind() -> None:
    over = threading.Event()

    async def work() -> str:
        hanging = asyncio.to_thread(over.wait, 30)
        try:
            await asyncio.wait_for(hanging, 0.05)
        except TimeoutError:
            return "found"
        return "never"

    began = time.monotonic()
    try:
        assert in_time(work) == ("found", True)
        assert time.monotonic() - began < 20
    finally:
        over.set()


def test_what_ends_is_waited_for_and_what_fails_is_raised() -> None:
    async def fine() -> int:
        return 7

    async def wrong() -> int:
        raise ValueError("no")

    assert in_time(fine) == (7, False)
    with pytest.raises(ValueError, match="no"):
        in_time(wrong)
