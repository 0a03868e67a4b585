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
_NO_FIELDS: Fields = {}
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
    fields: Fields
    body: bytes = b""
    more_body: bool = True
    timer: asyncio.TimerHandle | None = None
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

    _tracks: Mapping[bytes, Track] = {}
    _fields: dict[bytes, bytes]
    _peer: str | None = None
    # Since when nothing is asked on this connection, by the loop's clock, and the timer
    # that looks at it. uvicorn sets one for each request, which costs a microsecond.
    _idle_since = 0.0
    _idle_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._tracks = getattr(self.app, "beacons", {})
        self._peer = self.client[0] if self.client else None

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
            fields: Fields = self._fields
            if self.headers:
                fields = fields_of([*fields.items(), *self.headers])
            if self._is_short(fields):
                self.cycle = Beacon(self, track, fields)  # type: ignore[assignment]  # as uvicorn uses it
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
        cycle: object = self.cycle
        if type(cycle) is Beacon:
            cycle.body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        cycle: object = self.cycle
        if type(cycle) is not Beacon:
            super().on_message_complete()
            return
        if cycle.response_complete:  # it was too slow
            return
        cycle.more_body = False
        if cycle.timer is not None:
            cycle.timer.cancel()
        fields, body = cycle.fields, cycle.body
        # Nobody needs them while the answer is waited for, and what all connections
        # hold meanwhile must find room in the processor's cache.
        cycle.fields, cycle.body, self._fields = _NO_FIELDS, b"", {}
        cycle.track.take(fields, self._peer, body, cycle.answer)

    def data_received(self, data: bytes) -> None:
        self._idle_since = 0.0
        _receive(self, data)
        cycle: object = self.cycle
        if type(cycle) is Beacon and cycle.more_body and cycle.timer is None:
            # In most cases the body has come with the headers, and needs no timer.
            cycle.timer = self.loop.call_later(
                cycle.track.body_timeout_s, self._stop_waiting, cycle
            )

    def connection_lost(self, exc: Exception | None) -> None:
        cycle: object = self.cycle
        if type(cycle) is Beacon and cycle.timer is not None:
            cycle.timer.cancel()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        super().connection_lost(exc)
        if type(cycle) is Beacon:
            # It knows this connection, as this does it: neither would go by itself.
            self.cycle = None  # type: ignore[assignment]  # as uvicorn begins with

    def _stop_waiting(self, cycle: Beacon) -> None:
        if not cycle.disconnected and not cycle.response_complete:
            cycle.answer(cycle.track.too_slow(cycle.fields, self._peer))

    def _look_whether_idle(self) -> None:
        self._idle_timer = None
        if not self._idle_since:
            return  # something is asked: its answer sets the next timer
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._look_whether_idle)
        else:
            self.timeout_keep_alive_handler()
