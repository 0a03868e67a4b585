"""Peer of the benchmark: Starlette with slowapi on Redis, forwarding with httpx.

    python server.py PORT UPSTREAM REDIS

Runs in a virtual environment of its own, from requirements.txt beside it.
"""

import contextlib
import socket
import sys
from collections.abc import AsyncIterator

import httpx
import uvicorn
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

port, upstream, redis = sys.argv[1:4]
ADDED = {
    "x-client-application-id": "sandbox-application",
    "x-client-token": "sandbox-token",
    "origin": "https://shop.example",
    "content-type": "application/json",
}


def address(request: Request) -> str:
    return request.headers["x-forwarded-for"].rpartition(",")[2].strip()


limiter = Limiter(key_func=address, storage_uri=redis)
client = httpx.AsyncClient(base_url=upstream, timeout=10.0)


@limiter.limit("120/minute")
async def track(request: Request) -> Response:
    answer = await client.post(
        "/client/v1/events", content=await request.body(), headers=ADDED
    )
    return Response(answer.content, answer.status_code, media_type="application/json")


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    async with client:
        yield


app = Starlette(routes=[Route("/track", track, methods=["POST"])], lifespan=lifespan)
app.state.limiter = limiter
app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)

if __name__ == "__main__":
    sock = socket.create_server(("127.0.0.1", int(port)), backlog=2048)
    config = uvicorn.Config(app, access_log=False, log_level="warning", lifespan="on")
    uvicorn.Server(config).run(sockets=[sock])
