"""The public application: the hot routes, and Starlette for everything else."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from relay.admission import Admission
from relay.answers import Beacons, Dialect, Official
from relay.assembly import (
    Station,
    hung_up,
    make_catalog,
    make_digests,
    make_policy,
    tell_of_strangers,
)
from relay.catalog import Catalog
from relay.collector import pass_over_what_stays
from relay.edge import Edge
from relay.endpoints import Track
from relay.errors import QueueUnavailable
from relay.headers import fields_of
from relay.snippet import NAME, Script, pinned, present
from relay.values import SDK_PATH

LOOK_EVERY_S = 1.0  # at the catalogue's file
SDK_ROOT = SDK_PATH.removesuffix("events")

log = structlog.get_logger()


class App:
    """One edge process as an ASGI application, lifespan included."""

    def __init__(self, station: Station, *, catalog_text: str | None = None) -> None:
        settings = station.settings
        self._station = station
        self._admission = Admission(station.queue)
        self._file = make_catalog(settings, catalog_text)
        beacons = self._edge(Beacons(disabled=settings.snippet == "off"))
        official = self._edge(Official())
        self._edges = (beacons, official)
        self._track, sdk = self._route(beacons), self._route(official)
        self._tracks = (self._track, sdk)
        prefix = settings.path_prefix
        self._routes = {
            prefix + settings.track_path: self._track,
            prefix + SDK_PATH: sdk,
            # A base URL that ends with a slash, which the SDKs do not take off.
            f"{prefix}/{SDK_PATH}": sdk,
            f"/{prefix}{SDK_PATH}": sdk,
        }
        # By the URL as it comes, for what needs no look at it.
        self.beacons = {path.encode(): track for path, track in self._routes.items()}
        self._rest = Starlette(
            routes=[
                Route(f"{prefix}/{name}", self._script(script, pinned=name != NAME))
                for name, script in {NAME: present(), **pinned()}.items()
            ],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: self._http_error},
        )

    def _edge(self, dialect: Dialect) -> Edge:
        settings = self._station.settings
        return Edge(
            origins=settings.allowed_origins,
            proxies=settings.trusted_proxies,
            limits=settings.limits,
            digests=make_digests(settings),
            policy=make_policy(settings, self._file.catalog),
            dialect=dialect,
            allow_no_origin=settings.allow_no_origin,
        )

    def _route(self, edge: Edge) -> Track:
        return Track(
            edge=edge,
            admission=self._admission,
            outcomes=self._station.queue,
            limits=self._station.settings.limits,
        )

    def _script(
        self, script: Script, *, pinned: bool
    ) -> Callable[[Request], Awaitable[Response]]:
        """The route of one version of the snippet."""

        async def serve(request: Request) -> Response:
            asked = request.headers
            status, headers, body = script.answer(
                asked.get("accept-encoding", "").encode("latin-1"),
                asked.get("if-none-match", "").encode("latin-1"),
                pinned=pinned,
            )
            request_id = self._edges[0].request_id(
                asked.get("x-request-id", "").encode("latin-1"),
                request.client.host if request.client else None,
            )
            response = Response(body, status)
            response.raw_headers = [*headers, (b"x-request-id", request_id)]
            if status != 304:
                length = (b"content-length", b"%d" % len(body))
                response.raw_headers.append(length)
            return response

        return serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is not None:
            await route(scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._station.notes = {"catalog": self._catalog_check}
        async with self._station.running():
            await self._admission.start()
            pass_over_what_stays()
            with _on_hangup() as asked:
                tasks = [
                    asyncio.create_task(self._watch(asked)),
                    asyncio.create_task(self._tell_names()),
                ]
                try:
                    yield
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
            # uvicorn has let go of every request by now.
            for track in self._tracks:
                track.draining = True
            await self._admission.stop()

    # --- the catalogue ------------------------------------------------------------

    async def _watch(self, asked: asyncio.Event) -> None:
        """Take a new catalogue when its file changes, or at SIGHUP."""
        while True:
            at_once = asked.is_set()
            asked.clear()
            try:
                await self._look(at_once=at_once)
            except Exception:
                # The top of the loop: the catalogue in force stays in force.
                log.exception("catalog.failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await asked.wait()

    async def _look(self, *, at_once: bool) -> None:
        # In a thread: to read a large one takes longer than a beacon should wait.
        if await asyncio.to_thread(self._file.poll, at_once=at_once):
            settings = self._station.settings
            tell_of_strangers(settings, self._file.catalog)
            policy = make_policy(settings, self._file.catalog)
            for edge in self._edges:  # between two requests: none sees half of it
                edge.policy = policy

    async def _tell_names(self) -> None:
        """Have the catalogue's events counted by name, however rare they are.

        By itself, for a Redis that hangs must not hold up a new catalogue.
        """
        told: Catalog | None = None
        while True:
            catalog = self._file.catalog
            if catalog is not told:
                with contextlib.suppress(QueueUnavailable):  # then at the next look
                    await self._station.queue.keep_names(catalog.names)
                    told = catalog
            await asyncio.sleep(LOOK_EVERY_S)

    async def _catalog_check(self) -> str:
        if not self._file.refused:
            return "ok"
        return f"ok, but the old one is in force: {self._file.refused}"

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # as registered above
        # A client of Voucherify's that asks for another of its calls is told so in the
        # form that it reads.
        of_sdk = SDK_ROOT in request.url.path
        said = self._edges[of_sdk].elsewhere(
            fields_of(request.scope["headers"]),
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


@contextlib.contextmanager
def _on_hangup() -> Iterator[asyncio.Event]:
    """An event that SIGHUP sets; with its terminal gone the process ends instead."""
    asked = asyncio.Event()

    def heard() -> None:
        if hung_up():
            os.kill(os.getpid(), signal.SIGTERM)
        asked.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, heard)
    try:
        yield asked
    finally:
        # The loop would leave the default behind, which kills; what is still to be
        # done after it is done whatever comes.
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
