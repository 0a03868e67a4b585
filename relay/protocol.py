"""A short way for beacons: from the parser to the edge and back, past ASGI.

uvicorn's own protocol class does everything else, connections, pipelining and shutdown
included. What takes the short way is a plain POST of known, small length to a path for
events, on a connection that has nothing else to answer. Its answer is one write. The
checks are the same: `endpoints.Track` has both ways in.
"""

import asyncio
from collections.abc import Mapping

from msgspec import Struct
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from relay.answers import Response, Written
from relay.edge import MAX_BODY_BYTES
from relay.endpoints import Track
from relay.headers import Fields, fields_of


class _Nobody:
    """In the place of the event that uvicorn wakes its request with."""

    def set(self) -> None: ...


_NOBODY = _Nobody()
_ASKS_MORE = frozenset({b"prefer", b"transfer-encoding", b"expect", b"upgrade"})
_receive = HttpToolsProtocol.data_received  # `super()` is made anew at each call
_CLOSE = (b"connection", b"close")
_CLOSES = b"connection: close\r\n"


class _Usual(Struct):
    """uvicorn's own headers, made anew each second for the date, and as written."""

    headers: object = None
    wire: bytes = b""


_usual = _Usual()


class Beacon(Struct):
    """A request on the short way, with what uvicorn asks of a request."""

    protocol: "BeaconProtocol"
    track: Track
    keep_alive: bool = True
    disconnected: bool = False
    response_complete: bool = False
    message_event: _Nobody = _NOBODY

    def answer(self, said: Response | Written) -> None:
        """Answer it, once, and leave the connection to uvicorn again.

        What comes later is for nobody.
        """
        if self.disconnected or self.response_complete:
            return
        self.response_complete = True
        protocol = self.protocol
        headers, closes = protocol.server_state.default_headers, not self.keep_alive
        if headers is not _usual.headers:
            _usual.headers = headers
            _usual.wire = b"".join(b"%s: %s\r\n" % pair for pair in headers)
        usual = _usual.wire
        if type(said) is Response and _CLOSE in said.own:
            closes = True
        elif closes:
            usual += _CLOSES
        protocol.transport.write(b"".join((STATUS_LINE[said.status], usual, said.text)))
        if closes:
            protocol.transport.close()
        if protocol.pipeline:
            protocol.on_response_complete()
            return
        protocol.server_state.total_requests += 1
        # The connection may idle for as long as uvicorn would let it.
        protocol._idle_since = protocol.loop.time()
        if protocol._idle_timer is None:
            protocol._idle_timer = protocol.loop.call_later(
                protocol.timeout_keep_alive, protocol._look_whether_idle
            )


class BeaconProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with the short way."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._tracks: Mapping[bytes, Track] = getattr(self.app, "beacons", {})
        self._peer = self.client[0] if self.client else None
        # Of the request that is read, and for a beacon whether its end is to come.
        self._fields: dict[bytes, bytes] = {}
        self._body, self._unread = b"", False
        self._body_timer: asyncio.TimerHandle | None = None
        # Since when nothing is asked, by the loop's clock, and the timer that looks at
        # it. uvicorn sets one for each request, which costs a microsecond.
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    def on_message_begin(self) -> None:
        # Here too: what came in one piece with another begins after that is answered.
        self._idle_since = 0.0
        # The rest is only needed where ASGI is.
        self.url = b""
        self._fields = {}
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        # By name at once, and apart what comes again: but for nothing or a single
        # character, which is one object and says no more the second time.
        if self._fields.setdefault(name.lower(), value) is not value:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        track = self._tracks.get(self.url)
        if track is not None:
            fields = self._fields
            if self.headers:
                fields = fields_of([*fields.items(), *self.headers])
            if self._is_short(fields):
                self._fields, self._unread = fields, True
                self.cycle = Beacon(self, track)  # type: ignore[assignment]  # as uvicorn uses it
                return
        url, headers = self.url, [*self._fields.items(), *self.headers]
        super().on_message_begin()
        self.url = url
        for header in headers:  # into the list that the scope has
            super().on_header(*header)
        super().on_headers_complete()

    def _is_short(self, fields: Fields) -> bool:
        """Whether a request to a path for events takes the short way.

        Not what asks for more than an answer to a body at hand.
        """
        parser, cycle = self.parser, self.cycle
        length = fields.get(b"content-length", b"")
        return (
            length.isdigit()
            and (len(length) < 5 or (len(length) < 8 and int(length) <= MAX_BODY_BYTES))
            and _ASKS_MORE.isdisjoint(fields)
            and parser.get_method() == b"POST"
            and parser.should_keep_alive()  # 1.0 asks for that in a header
            and (b"connection" not in fields or parser.get_http_version() == "1.1")
            and (cycle is None or cycle.response_complete)
            and not self.flow.write_paused  # who reads no answers waits, as ASGI does
        )

    def on_body(self, body: bytes) -> None:
        if self._unread:
            self._body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._unread:
            super().on_message_complete()
            return
        self._unread = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        fields, body = self._fields, self._body
        # Nobody needs them while the answer is waited for, and what all connections
        # hold meanwhile must find room in the processor's cache.
        self._fields, self._body = {}, b""
        beacon: Beacon = self.cycle  # type: ignore[assignment]  # what is unread is one
        beacon.track.take(fields, self._peer, body, beacon.answer)

    def data_received(self, data: bytes) -> None:
        self._idle_since = 0.0
        _receive(self, data)
        if self._unread and self._body_timer is None:
            # In most cases the body has come with the headers, and needs no timer.
            beacon: Beacon = self.cycle  # type: ignore[assignment]  # what is unread is one
            self._body_timer = self.loop.call_later(
                beacon.track.body_timeout_s, self._stop_waiting, beacon
            )

    def connection_lost(self, exc: Exception | None) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        super().connection_lost(exc)
        cycle: object = self.cycle
        if type(cycle) is Beacon:
            # It knows this connection, as this does it: neither would go by itself.
            self.cycle = None  # type: ignore[assignment]  # as uvicorn begins with

    def _stop_waiting(self, beacon: Beacon) -> None:
        self._unread, self._body_timer = False, None
        beacon.answer(beacon.track.too_slow(self._fields, self._peer))

    def _look_whether_idle(self) -> None:
        self._idle_timer = None
        if not self._idle_since:
            return  # something is asked: its answer sets the next timer
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._look_whether_idle)
        else:
            self.timeout_keep_alive_handler()
