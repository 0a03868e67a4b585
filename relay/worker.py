"""A forwarder on its own: delivers for edges that run elsewhere."""

import asyncio
from collections.abc import Callable

from uvicorn.loops.auto import auto_loop_factory

from relay.assembly import Station, http_url, ops_socket, stop_asked
from relay.settings import Settings


def deliver(
    settings: Settings, *, redis_url: str, announce: Callable[[str], None]
) -> None:
    """Deliver until a signal, then drain; `announce` is told where probes go."""
    with ops_socket(settings) as ops:
        station = Station(settings, redis_url=redis_url, forward=True, ops_socket=ops)
        announce(f"{http_url(ops)}/readyz")
        # The loop that `serve` has as well.
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            runner.run(_until_stopped(station))


async def _until_stopped(station: Station) -> None:
    with stop_asked() as stopped:
        async with station.running():
            await stopped.wait()
