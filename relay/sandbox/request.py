"""One request as it came off the wire."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec
from starlette.types import Receive, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it came off the wire."""

    method: str
    path: str
    query: str = ""
    ip: str  # of the socket: a forwarded address is not believed
    header_list: tuple[tuple[str, str], ...]  # lower-case names, in order
    headers: dict[str, str]  # the same by name, repeated ones joined
    body: bytes = b""
    json: object = None  # the body of a request to an event route
    malformed: bool = False  # that body is not JSON
    too_large: bool = False


def arrived(scope: Scope) -> Request:
    """Return a request whose body has not been read yet."""
    header_list = tuple(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in scope["headers"]
    )
    client = scope.get("client")
    return Request(
        method=scope["method"],
        path=scope["path"],
        query=scope.get("query_string", b"").decode("latin-1"),
        ip=client[0] if client else "local",  # a unix socket has no address
        header_list=header_list,
        headers=_joined(header_list),
    )


async def with_body(
    request: Request, receive: Receive, *, limit: int, json: bool
) -> Request | None:
    """Return the request with its body; None if the sender hung up before its end."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        return replace(request, too_large=True)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message["body"]
        if len(body) > limit:
            return replace(request, too_large=True)
        if not message["more_body"]:
            return _whole(request, bytes(body), json=json)


def _whole(request: Request, body: bytes, *, json: bool) -> Request:
    if not json or not body:
        return replace(request, body=body)
    try:
        return replace(request, body=body, json=msgspec.json.decode(body))
    except (ValueError, RecursionError):
        return replace(request, body=body, malformed=True)


def _joined(header_list: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return headers by name, as RFC 9110 (5.3) combines repeated ones."""
    headers: dict[str, str] = {}
    for name, value in header_list:
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
