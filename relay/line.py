"""Connections to Redis for the calls that every beacon and every delivery waits for.

redis-py makes them, with all that it knows (TLS, passwords, unix sockets); then they
are read and written here with hiredis, for its streams, pool and timers cost more than
the call. Each connection has one call at a time; as many are kept as were ever needed
at once.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import cast

import hiredis
import redis.exceptions as broken
from redis._parsers.base import BaseParser
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

_MORE = object()  # for an answer whose rest is still to come

# Whoever waits for what Redis says, or for what failed. Must not raise.
Then = Callable[[object], None]


def is_reset(error: RuntimeError) -> bool:
    """Whether a connection was reset, for which uvloop has no other exception."""
    return "the handler is closed" in str(error)


async def _cut(made: AbstractConnection) -> None:
    """Close a connection without TLS' farewell, which a loop that ends never hears."""
    if made._writer is not None:
        made._writer.transport.abort()
    await made.disconnect(nowait=True)


class _Wire(asyncio.Protocol):
    """One connection, with one call at a time."""

    def __init__(self, made: AbstractConnection) -> None:
        self._made = made  # which would close it if it were let go
        assert made._writer is not None  # noqa: S101  # it has just been connected
        self._transport = cast("asyncio.Transport", made._writer.transport)
        self._transport.set_protocol(self)
        self.loop = asyncio.get_running_loop()  # a call of the system, each time
        self._reader = hiredis.Reader(
            protocolError=broken.InvalidResponse,
            replyError=BaseParser.parse_error,
            notEnoughData=_MORE,
        )
        # Or what is to be sent next would wait for all that is to be read now.
        self._transport.set_write_buffer_limits(high=0)
        self._answer: asyncio.Future[object] | None = None
        self._then: Then | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.lost = False

    def ask(self, command: bytes) -> asyncio.Future[object]:
        """Send a command, and give what will be said to it."""
        self._transport.write(command)
        self._answer = self.loop.create_future()  # not before: nobody would wait for it
        return self._answer

    def ask_then(self, command: bytes, timeout: float, then: Then) -> None:
        """The same for who needs no future: `then` gets what is said, once."""
        self._transport.write(command)
        self._then = then
        self._timer = self.loop.call_later(timeout, self.give_up)

    def _tell(self, said: object) -> bool:
        """Give it to whoever waits for it, if anybody does."""
        if self._then is not None and self._timer is not None:
            then, self._then = self._then, None
            self._timer.cancel()
            then(said)
        elif self._answer is None or self._answer.done():
            return False
        elif isinstance(said, Exception):
            self._answer.set_exception(said)
        else:
            self._answer.set_result(said)
        return True

    def fail(self, error: Exception) -> None:
        """End the call that waits, if one does: its answer would be the next one's."""
        self.lost = True
        self._tell(error)

    def give_up(self) -> None:
        self.fail(broken.TimeoutError("no answer in time"))

    async def close(self) -> None:
        self.lost = True
        await _cut(self._made)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            said = self._reader.gets()
        except broken.InvalidResponse as error:
            said = error
        if said is _MORE:
            return
        if isinstance(said, broken.InvalidResponse) or self._reader.has_data():
            self._end()  # more than was asked for, and nobody's
        if not self._tell(said):
            # To nothing that was asked: what comes next could be taken for an answer.
            self._end()

    def _end(self) -> None:
        self.lost = True
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(broken.ConnectionError(f"the connection ended: {exc or 'closed'}"))


class Line:
    """Calls to one server; raises redis-py's exceptions, and sends nothing twice."""

    def __init__(self, url: str, *, timeout: float) -> None:
        self._timeout = timeout  # seconds for a whole call
        self._client = Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            client_name="relay",
            protocol=2,  # in which a server says nothing unasked
        )
        self._idle: list[_Wire] = []
        self._ended: list[_Wire] = []  # to be closed

    def ask(self, *command: str | bytes | int, then: Then) -> bool:
        """Send a command at once, if a connection is idle; gives whether one was.

        `then` gets what Redis says, bytes undecoded, or an exception of redis-py's.
        """
        if not self._idle or self._idle[-1].lost:
            return False
        wire = self._idle.pop()
        packed = hiredis.pack_command(command)  # type: ignore[arg-type]  # any length
        try:
            wire.ask_then(packed, self._timeout, partial(self._told, wire, then))
        except RuntimeError:  # uvloop's, of one that has ended: nothing was sent
            wire.lost = True
            self._ended.append(wire)
            return False
        return True

    def _told(self, wire: _Wire, then: Then, said: object) -> None:
        (self._ended if wire.lost else self._idle).append(wire)
        then(said)

    async def call(self, *command: str | bytes | int) -> object:
        """Send a command, and give what Redis says, bytes undecoded."""
        wire = self._idle.pop() if self._idle else await self._connected()
        while wire.lost:  # before anything was sent
            await wire.close()
            wire = self._idle.pop() if self._idle else await self._connected()
        packed = hiredis.pack_command(command)  # type: ignore[arg-type]  # any length
        timer = wire.loop.call_later(self._timeout, wire.give_up)
        try:
            said = await wire.ask(packed)
        except broken.ResponseError:
            self._idle.append(wire)  # an answer, too
            raise
        except RuntimeError as error:
            await wire.close()
            if is_reset(error):
                raise broken.ConnectionError(str(error)) from error
            raise
        except BaseException:
            await wire.close()  # its answer would be the next one's
            raise
        finally:
            timer.cancel()
        self._idle.append(wire)
        return said

    async def aclose(self) -> None:
        """Close what is idle; nobody may be calling any more."""
        self._ended += self._idle
        self._idle = []
        await self._close_ended()
        await self._client.aclose()

    async def _close_ended(self) -> None:
        while self._ended:
            await self._ended.pop().close()

    async def _connected(self) -> _Wire:
        await self._close_ended()
        pool = self._client.connection_pool
        made = cast("AbstractConnection", pool.make_connection())  # type: ignore[no-untyped-call]  # redis-py's
        try:
            async with asyncio.timeout(self._timeout):
                await made.connect()  # type: ignore[no-untyped-call]  # redis-py's
                if await made.can_read():  # an end, too: whoever reads next is not told
                    raise broken.ConnectionError("the connection ended: closed")
        except BaseException as error:  # a cancellation, too: nothing half made stays
            await _cut(made)
            if isinstance(error, TimeoutError):
                raise broken.TimeoutError("not connected in time") from None
            if isinstance(error, RuntimeError) and is_reset(error):
                raise broken.ConnectionError(str(error)) from error
            raise
        return _Wire(made)
