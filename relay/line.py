"""Connections to Redis for the calls that every beacon and every delivery waits for.

redis-py's own connections, with all that they know (TLS, passwords, unix sockets), but
without its pool and its timers: those cost more than the call. Each connection has one
call at a time; as many are kept as were ever needed at once.
"""

import asyncio
import math
from typing import cast

import redis.exceptions as broken
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff


def is_reset(error: RuntimeError) -> bool:
    """Whether a connection was reset, for which uvloop has no other exception."""
    return "the handler is closed" in str(error)


class Line:
    """Calls to one server; raises redis-py's exceptions, and sends nothing twice."""

    def __init__(self, url: str, *, timeout: float) -> None:
        self._timeout = timeout  # seconds for a whole call
        self._client = Redis.from_url(
            url,
            # One timer for the call in place of one for each half of it.
            socket_timeout=None,
            socket_connect_timeout=min(timeout, 2.0),
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            client_name="relay",
        )
        self._idle: list[AbstractConnection] = []

    async def call(self, *command: str | bytes | int) -> object:
        """Send a command, and give what Redis says, bytes undecoded."""
        line = self._idle.pop() if self._idle else self._made()
        try:
            async with asyncio.timeout(self._timeout):
                # Connects if it must: at first, and after anything went wrong.
                await line.send_packed_command(
                    line.pack_command(*command), check_health=False
                )
                said = await line.read_response(disable_decoding=True, timeout=math.inf)
        except TimeoutError:
            await line.disconnect(nowait=True)  # its answer would be the next one's
            raise broken.TimeoutError("no answer in time") from None
        except RuntimeError as error:
            await line.disconnect(nowait=True)
            if is_reset(error):
                raise broken.ConnectionError(str(error)) from error
            raise
        except broken.ResponseError:
            self._idle.append(line)  # an answer, too
            raise
        except BaseException:
            await line.disconnect(nowait=True)
            raise
        self._idle.append(line)
        return said

    async def aclose(self) -> None:
        """Close what is idle; nobody may be calling any more."""
        while self._idle:
            await self._idle.pop().disconnect()
        await self._client.aclose()

    def _made(self) -> AbstractConnection:
        pool = self._client.connection_pool
        return cast("AbstractConnection", pool.make_connection())  # type: ignore[no-untyped-call]  # redis-py's
