"""What comes of one request: an answer, or none. Pure."""

import msgspec


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A status that came, and what came with it within bounds."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool  # False: the body was cut, here or on its way

    def __repr__(self) -> str:  # a token may be in the rest, or a person
        return f"Reply(status={self.status}, whole={self.whole})"


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """A request without an answer; not `written`: the server knows nothing of it."""

    reason: str
    written: bool
