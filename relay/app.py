"""The public application: the hot route, and Starlette for everything else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relay.admission import Admission
from relay.assembly import Station, digest_key
from relay.edge import Edge
from relay.endpoints import Track


class App:
    """One edge process as an ASGI application, lifespan included."""

    def __init__(self, station: Station) -> None:
        settings = station.settings
        self._station = station
        self._admission = Admission(station.queue)
        self._edge = Edge(
            origins=settings.allowed_origins,
            proxies=settings.trusted_proxies,
            limits=settings.limits,
            digest_key=digest_key(settings),
            ttl_ms=settings.ttl * 1000,
            allow_no_origin=settings.allow_no_origin,
        )
        self._track = Track(
            edge=self._edge,
            admission=self._admission,
            outcomes=station.queue,
            limits=settings.limits,
        )
        self._track_path = settings.path_prefix + settings.track_path
        self._rest = Starlette(
            lifespan=self._lifespan,
            exception_handlers={HTTPException: self._http_error},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._track_path:
            await self._track(scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self._station.running():
            await self._admission.start()
            yield
            # uvicorn has let go of every request by now.
            self._track.draining = True
            await self._admission.stop()

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # as registered above
        said = self._edge.elsewhere(
            request.scope["headers"],
            error.status_code,
            str(error.detail),
            request.client.host if request.client else None,
        )
        response = Response(said.body, said.status)
        response.raw_headers = [
            *said.headers,
            (b"content-length", b"%d" % len(said.body)),
        ]
        return response
