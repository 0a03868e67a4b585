"""Headers of requests by name, and those of answers as they are written."""

import pytest

from relay.headers import Header, block, fields_of


@pytest.mark.parametrize(
    ("headers", "name", "value"),
    [
        ([(b"a", b"1"), (b"b", b"2")], b"b", b"2"),
        # The last one counts: as most servers have it.
        ([(b"sec-gpc", b"0"), (b"sec-gpc", b"1")], b"sec-gpc", b"1"),
        ([(b"user-agent", b"x"), (b"user-agent", b"y")], b"user-agent", b"y"),
        # A list in several lines is one list, in their order.
        (
            [(b"x-forwarded-for", b"a, b"), (b"x", b"y"), (b"x-forwarded-for", b"c")],
            b"x-forwarded-for",
            b"a, b,c",
        ),
        ([(b"prefer", b"a=1"), (b"prefer", b"wait=2")], b"prefer", b"a=1,wait=2"),
        # Two origins are no origin that could be allowed.
        ([(b"origin", b"https://a"), (b"origin", b"https://b")], b"origin", None),
        # Repeated headers change nothing about the others.
        ([(b"x", b"1"), (b"origin", b"https://a"), (b"x", b"2")], b"origin", b""),
    ],
)
def test_each_name_has_one_value(
    headers: list[Header], name: bytes, value: bytes | None
) -> None:
    told = fields_of(headers)[name]
    if value is None:
        assert told == b"https://a https://b"
    else:
        assert told == (value or b"https://a")


def test_a_block_is_written_as_it_is() -> None:
    both = block((b"vary", b"Origin"), (b"allow", b"POST"))
    assert both.wire == b"vary: Origin\r\nallow: POST\r\n"
    assert both.pairs == ((b"vary", b"Origin"), (b"allow", b"POST"))
    assert block().wire == b""
