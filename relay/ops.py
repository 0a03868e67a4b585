"""The ops listener: is it alive, can it take events. Never on the public port.

`/healthz` and `/readyz` are open, since probes carry no secrets and get none.
"""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from relay import __version__
from relay.errors import QueueUnavailable

Check = Callable[[], Awaitable[str]]


def ops_app(checks: dict[str, Check]) -> Starlette:
    """The application; each check returns "ok" or says what is wrong."""
    # One look at a time: the queue's connections to Redis are few, and a crowd of
    # probes that took them all would refuse beacons and report a Redis that is away.
    looking = asyncio.Lock()

    async def healthz(_: Request) -> JSONResponse:
        return JSONResponse({"status": "alive", "version": __version__})

    async def readyz(_: Request) -> JSONResponse:
        async with looking:
            said = {name: await _said(check) for name, check in checks.items()}
        ready = all(word == "ok" for word in said.values())
        return JSONResponse(
            {"status": "ready" if ready else "unready", "checks": said},
            200 if ready else 503,
        )

    return Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz)])


async def _said(check: Check) -> str:
    try:
        return await check()
    except QueueUnavailable as error:
        return f"{error.reason}: {error.detail}"
