"""A forwarder on its own: delivers for edges that run elsewhere."""

import asyncio
import signal

from relay.assembly import Station


async def work(station: Station) -> None:
    """Deliver until SIGTERM or SIGINT, then drain."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, stopped.set)
    async with station.running():
        await stopped.wait()
