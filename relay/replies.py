"""What comes of one request: an answer, or none. Pure."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A status that came, and what came with it within bounds."""

    status: int
    headers: dict[str, str] = field(repr=False)  # a token may be in it, or a person
    body: bytes = field(repr=False)
    whole: bool  # False: the body was cut, here or on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A request without an answer; not `written`: the server knows nothing of it."""

    reason: str
    written: bool
