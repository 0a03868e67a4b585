"""What the tests share: servers on real sockets, and waiting for a condition."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvicorn
from uvicorn._types import ASGIApplication


@asynccontextmanager
async def serve(app: ASGIApplication, **options: object) -> AsyncIterator[str]:
    """Run `app` on a real socket, lifespan included, and yield its base URL."""
    config = uvicorn.Config(app, port=0, log_level="warning", **options)  # type: ignore[arg-type]  # uvicorn's own keywords
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        if serving.done():  # a failed start-up: show why
            await serving
            msg = "the server stopped before it started"
            raise RuntimeError(msg)
        await asyncio.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await serving


async def eventually(
    probe: Callable[[], Awaitable[object]], *, within: float = 10.0
) -> None:
    """Return once `probe` gives something true; fail with its last value."""
    deadline = time.monotonic() + within
    while not (value := await probe()):
        if time.monotonic() > deadline:
            msg = f"still {value!r} after {within} s"
            raise AssertionError(msg)
        await asyncio.sleep(0.01)
