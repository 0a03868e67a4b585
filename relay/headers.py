"""Headers: those of a request as a decision reads them, those of an answer as written.

Names are in lower case. Pure.
"""

from collections.abc import Mapping, Sequence

from msgspec import Struct

Header = tuple[bytes, bytes]
Fields = Mapping[bytes, bytes]  # of a request, by name

# Of what comes several times the last counts, but for these, which are one list
# (RFC 9110, 5.3), and `Origin`: two of them are none that anybody may send from.
_JOINED = ((b"x-forwarded-for", b","), (b"prefer", b","), (b"origin", b" "))


class Block(Struct, frozen=True):
    """Headers that many answers have in common, as they are and as they are written."""

    pairs: tuple[Header, ...] = ()
    wire: bytes = b""


NONE = Block()


def block(*headers: Header) -> Block:
    return Block(headers, b"".join([b"%s: %s\r\n" % header for header in headers]))


def fields_of(headers: Sequence[Header]) -> dict[bytes, bytes]:
    """The headers of a request by their names."""
    fields = dict(headers)
    if len(fields) != len(headers):
        for name, glue in _JOINED:
            if name in fields:
                fields[name] = glue.join([v for n, v in headers if n == name])
    return fields
