"""What happens on the wire at the end of a request: an answer, or none.

Resetting a connection needs its transport, which ASGI does not show. The protocol
class in server.py hands it over as an ASGI extension, under the name `EXTENSION`.
"""

import asyncio
import os
import socket
import struct
from typing import Literal, cast

from starlette.types import Receive, Scope, Send

from relay.sandbox.answers import Answer

EXTENSION = "relay.sandbox.transport"
LINGER_SECONDS = 1.0


async def send_answer(send: Send, answer: Answer) -> None:
    """Send a whole answer."""
    headers = _encoded(answer, len(answer.body))
    await send(
        {"type": "http.response.start", "status": answer.status, "headers": headers}
    )
    await send({"type": "http.response.body", "body": answer.body})


async def gone_within(receive: Receive, seconds: float) -> bool:
    """Wait, and tell whether the other side hung up meanwhile."""
    try:
        async with asyncio.timeout(seconds):
            await _gone(receive)
    except TimeoutError:
        return False
    return True


async def disconnect(
    how: Literal["reset", "close", "cut_short"],
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    answer: Answer | None,
) -> None:
    """End the connection without an answer, or in the middle of one."""
    transport = _transport(scope)
    if how == "cut_short":
        body = answer.body if answer is not None else b""
        start = {
            "type": "http.response.start",
            "status": answer.status if answer is not None else 200,
            "headers": _encoded(answer, len(body) + 1),
        }
        await send(start)
        await send(
            {
                "type": "http.response.body",
                "body": body[: len(body) // 2],
                "more_body": True,
            }
        )
    if how == "reset":
        _linger_zero(transport)
        transport.abort()
    else:
        await _end(transport, receive)
    await _gone(receive)  # the server wants to see the end before we return


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _transport(scope: Scope) -> asyncio.Transport:
    extension = scope.get("extensions", {}).get(EXTENSION)
    if extension is None:
        msg = (
            "this fault ends the connection, and the server gives no access to it:"
            " run uvicorn with http=relay.sandbox.PROTOCOL"
        )
        raise RuntimeError(msg)
    # uvloop's transports have the methods and not the base class.
    return cast("asyncio.Transport", extension["transport"])


async def _end(transport: asyncio.Transport, receive: Receive) -> None:
    # Closing with something unread makes the kernel send RST (RFC 2525, 2.17), so
    # what is still being sent is read, until the other side has seen our end.
    if transport.can_write_eof():
        transport.write_eof()
        await gone_within(receive, LINGER_SECONDS)
    transport.close()


def _linger_zero(transport: asyncio.Transport) -> None:
    # With SO_LINGER at zero the kernel sends RST instead of FIN (socket(7)). The
    # option belongs to the socket, so a duplicate of the descriptor reaches it
    # whatever the event loop wraps around the original.
    sock = transport.get_extra_info("socket")
    with socket.socket(fileno=os.dup(sock.fileno())) as duplicate:
        duplicate.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )


def _encoded(answer: Answer | None, length: int) -> list[tuple[bytes, bytes]]:
    if answer is None:
        return [(b"content-length", str(length).encode())]
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in answer.headers
    ]
    if answer.status in (204, 304):  # RFC 9110, 8.6: no Content-Length with these
        return headers
    if answer.body:
        headers.append((b"content-type", answer.content_type.encode("latin-1")))
    headers.append((b"content-length", str(length).encode()))
    return headers
