"""A short way for beacons: from the parser to the edge and back, past ASGI.

uvicorn's own protocol class does everything else, connections, keep-alive, pipelining
and shutdown included. What takes the short way is a plain POST of known, small length
to a path for events, on a connection that has nothing else to answer. Its answer is
one write. The checks are the same: `endpoints.Track` has both ways in.
"""

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from relay.answers import Response
from relay.edge import MAX_BODY_BYTES
from relay.endpoints import Track


class _Nobody:
    """In the place of the event that uvicorn wakes its request with."""

    def set(self) -> None: ...


_NOBODY = _Nobody()


class Beacon:
    """A request on the short way, with what uvicorn asks of a request."""

    __slots__ = (
        *("body", "disconnected", "headers", "keep_alive", "message_event"),
        *("more_body", "response_complete", "timer", "track"),
    )

    def __init__(self, track: Track, headers: list[tuple[bytes, bytes]]) -> None:
        self.track = track
        self.headers = headers
        self.body = b""
        self.more_body = True
        self.timer: asyncio.TimerHandle | None = None
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NOBODY


class BeaconProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with the short way."""

    # Of the last headers that uvicorn adds to each answer, and how they are written.
    _usual: tuple[object, bytes] = (None, b"")

    def on_message_begin(self) -> None:
        # The rest is only needed where ASGI is.
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        track = self._short_way()
        if track is not None:
            self.cycle = cast("object", Beacon(track, self.headers))  # type: ignore[assignment]  # as uvicorn uses it
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers  # the scope has this list
        super().on_headers_complete()

    def _short_way(self) -> Track | None:
        """Who takes this request on the short way; None: it goes through ASGI."""
        tracks: dict[bytes, Track] = getattr(self.app, "beacons", {})
        track = tracks.get(self.url)
        parser = self.parser
        if (
            track is None
            or self.expect_100_continue
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or not parser.should_keep_alive()
            or parser.should_upgrade()
            or (self.cycle is not None and not self.cycle.response_complete)
        ):
            return None
        length = b""
        for name, value in self.headers:
            if name == b"content-length":
                length = value
            elif name in (b"prefer", b"transfer-encoding"):
                return None
        small = length.isdigit() and len(length) < 8 and int(length) <= MAX_BODY_BYTES
        return track if small else None

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
        if not cycle.more_body or cycle.response_complete:
            return
        cycle.more_body = False
        if cycle.timer is not None:
            cycle.timer.cancel()
        cycle.track.take(
            cycle.headers, self._peer(), cycle.body, lambda said: self._say(cycle, said)
        )

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
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
        super().connection_lost(exc)

    def _peer(self) -> str | None:
        return self.client[0] if self.client else None

    def _stop_waiting(self, cycle: Beacon) -> None:
        if not cycle.disconnected and not cycle.response_complete:
            self._say(cycle, cycle.track.too_slow(cycle.headers, self._peer()))

    def _say(self, cycle: Beacon, said: Response) -> None:
        """Write the answer, and leave the connection to uvicorn again."""
        if cycle.disconnected or cycle.response_complete:
            return
        cycle.response_complete = True
        parts = [STATUS_LINE[said.status], self._usual_headers()]
        told = False
        for name, value in said.headers:
            parts += (name, b": ", value, b"\r\n")
            told = told or name == b"connection"  # of ours it is always close
        if not cycle.keep_alive and not told:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", said.body)
        self.transport.write(b"".join(parts))
        if told or not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _usual_headers(self) -> bytes:
        """uvicorn's own headers; it makes them anew each second, for the date."""
        headers = self.server_state.default_headers
        known, text = BeaconProtocol._usual
        if known is not headers:
            text = b"".join(b"%s: %s\r\n" % pair for pair in headers)
            BeaconProtocol._usual = (headers, text)
        return text
