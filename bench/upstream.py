"""A stand-in for Voucherify's event API that costs little: fast, or slow and limited.

    python -m bench.upstream PORT DELAY_MS [CALLS/SECONDS]

Answers each POST as the API does, after the delay; over the limit with 429 and the
headers that say when to come back. `GET /count` tells what came, `GET /open` lifts
the limit, `GET /ids` how many different events were taken. Not the sandbox: that one
checks every field, which would take the load's core.
"""

import asyncio
import json
import re
import sys
import time
from collections import deque

import httptools
import uvloop

ANSWER = json.dumps(
    {
        "object": "event",
        "type": "cart_abandoned",
        "customer": {"object": "customer", "id": "cust_1", "source_id": "u1"},
        "referral": None,
        "loyalty": None,
        "metadata": {},
    }
).encode()
OK = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    % (len(ANSWER), ANSWER)
)
REFUSAL = b'{"code":429,"key":"too_many_requests","message":"Too many requests"}'
# The customer tells events apart: the relay keeps the sender's id to itself.
WHO = re.compile(rb'"source_id":"([^"]+)"')


class State:
    """What the upstream knows; one for all connections."""

    def __init__(self, delay_s: float, limit: str) -> None:
        self.delay_s = delay_s
        calls, _, seconds = limit.partition("/")
        self.calls, self.seconds = int(calls or 0), float(seconds or 0)
        self.taken = self.refused = 0
        self.first = self.last = 0.0
        self.recent: deque[float] = deque()
        self.ids: dict[bytes, int] = {}

    def judge(self, body: bytes) -> bytes:
        now = time.monotonic()
        if self.calls:
            while self.recent and self.recent[0] <= now - self.seconds:
                self.recent.popleft()
            if len(self.recent) >= self.calls:
                self.refused += 1
                wait = max(1, round(self.recent[0] + self.seconds - now + 0.5))
                return (
                    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: %d\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (wait, len(REFUSAL), REFUSAL)
                )
            self.recent.append(now)
        if self.delay_s:  # the slow one: there is time to look who it is
            match = WHO.search(body)
            who = match[1] if match else b""
            self.ids[who] = self.ids.get(who, 0) + 1
        self.taken += 1
        self.first = self.first or now
        self.last = now
        return OK

    def told(self, path: bytes) -> bytes:
        if path == b"/open":
            self.calls = 0
        body = json.dumps(
            {
                "taken": self.taken,
                "refused": self.refused,
                "seconds": self.last - self.first,
                "different": len(self.ids),
                "twice": sum(n - 1 for n in self.ids.values()),
            }
        ).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Connection(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or True  # uvloop's has no base
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._write(self._state.told(self._path))
            return
        answer = self._state.judge(b"".join(self._body))
        self._body.clear()
        if self._state.delay_s:
            loop = asyncio.get_running_loop()
            loop.call_later(self._state.delay_s, self._write, answer)
        else:
            self._write(answer)

    def _write(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)  # type: ignore[attr-defined]  # uvloop's
        if not self._parser.should_keep_alive():
            self._transport.close()


async def serve(port: int, state: State) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(state), "127.0.0.1", port, backlog=2048
    )
    await server.serve_forever()


def main() -> None:
    """Serve until a signal."""
    port, delay_ms = int(sys.argv[1]), int(sys.argv[2])
    limit = sys.argv[3] if len(sys.argv) > 3 else ""
    uvloop.run(serve(port, State(delay_ms / 1000, limit)))


if __name__ == "__main__":
    main()
