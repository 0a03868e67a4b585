"""The web server of the demo's shop: its page, and the way to the relay.

It is what a shop's own server is in production. `/track` and the script are handed
on to the relay as they came, `Origin` included, so the relay's own rules decide; the
page has exactly the lines that `relay snippet` prints, under a strict policy.

The rest, under `/demo/`, is the demonstration: where a visitor's events are, and the
switch that takes the sandbox down. A visitor sees nothing of another one's events.
What the visitor's browser says is shown to that visitor only, and never as markup.
"""

import html
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from secrets import token_urlsafe
from typing import cast

import httpx
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from relay.assembly import make_digests, make_queue
from relay.counters import stats
from relay.demo_follower import Follower
from relay.errors import QueueUnavailable
from relay.outcomes import CURES
from relay.sandbox.app import Sandbox
from relay.sandbox.faults import Fault
from relay.settings import Settings
from relay.snippet import NAME, STUB, pinned, tag

VISITOR = "relay_demo_visitor"  # a cookie: whose events the panel shows
OFFLINE = "relay_demo_offline"  # a cookie of the page's: this browser has no network
DOWN = Fault(count=None, status=503)  # what the switch does to the sandbox
MAX_BODY_BYTES = 128 * 1024  # the relay takes 64 KiB, and is to say so itself
# `Prefer: wait` holds an answer for up to 30 s.
TIMEOUT = httpx.Timeout(5.0, read=40.0)
# An idle connection is let go of before the relay does it, after 5 s: a request that
# crosses that is lost.
LIMITS = httpx.Limits(keepalive_expiry=4.0)

# Between two machines only (RFC 9110, 7.6.1), or said by this server itself. The
# shop's cookies are for the shop.
_NOT_ON = {"connection", "keep-alive", "upgrade", "te", "host", "content-length"} | {
    "transfer-encoding",
    "cookie",
}
_NOT_BACK = {b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"}

_HASH = b64encode(sha256(STUB.encode()).digest()).decode()
# What a strict page allows for the snippet: the hash of the first line, its own host
# for the script, and its own host to send to.
_POLICY = (
    f"default-src 'none'; script-src 'self' 'sha256-{_HASH}'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_FRESH = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
_ASSETS = {
    "demo.css": "text/css",
    "demo.js": "text/javascript",
    "demo-panel.js": "text/javascript",
}


class Switch(msgspec.Struct, forbid_unknown_fields=True):
    """What the page says to switch Voucherify off or on."""

    down: bool


class Shop:
    """The shop as an ASGI application (`app`), lifespan included."""

    def __init__(
        self,
        *,
        settings: Settings,
        redis_url: str,
        relay: str,
        sandbox: Sandbox,
        voucherify: str,
    ) -> None:
        self._relay = relay
        self._sandbox = sandbox
        self._origins = settings.allowed_origins
        self._queue = make_queue(settings, redis_url)
        self._follower = Follower(
            self._queue, make_digests(settings), rate=self._queue.rate
        )
        self._page = _page(voucherify)
        self._client = httpx.AsyncClient(
            trust_env=False, timeout=TIMEOUT, limits=LIMITS
        )
        # The visitor's browser says what it takes, and nobody in its name.
        self._client.headers.clear()
        scripts = [Route(f"/{name}", self.hand_on) for name in (NAME, *pinned())]
        assets = [Route(f"/demo/{name}", _asset(name)) for name in _ASSETS]
        self.app = Starlette(
            routes=[
                Route("/", self.home),
                Route(
                    "/track", self.track, methods=["POST"], max_body_size=MAX_BODY_BYTES
                ),
                Route("/demo/panel", self.panel),
                Route(
                    "/demo/voucherify",
                    self.voucherify,
                    methods=["POST"],
                    max_body_size=1024,
                ),
                *scripts,
                *assets,
            ],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._follower.aclose()
            await self._client.aclose()
            await self._queue.aclose()

    def config(self) -> uvicorn.Config:
        """How uvicorn runs it; open pages do not hold up its end."""
        return uvicorn.Config(
            self.app,
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=1,
        )

    # --- the page ------------------------------------------------------------------

    async def home(self, request: Request) -> Response:
        response = HTMLResponse(
            self._page,
            headers={
                **_FRESH,
                "content-security-policy": _POLICY,
                "referrer-policy": "same-origin",
            },
        )
        if not _visitor(request):
            # Lax: a friend's link from elsewhere finds the visitor again.
            response.set_cookie(VISITOR, token_urlsafe(16), httponly=True)
        return response

    async def panel(self, request: Request) -> Response:
        """Where the visitor's events are, and what holds them up."""
        visitor = _visitor(request)
        return _json(
            {
                "events": self._follower.told(visitor) if visitor else [],
                "down": self._down,
                **await self._waiting(),
            }
        )

    async def voucherify(self, request: Request) -> Response:
        """Take the sandbox down, or up again; only the shop's own pages may."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if not self._origins.allows(request.headers.get("origin", "")):
            return _json({"error": "only the shop's own page may do this"}, 403)
        if kind.lower() != "application/json":
            return _json({"error": "send JSON with its content type"}, 415)
        try:
            switch = msgspec.json.decode(await request.body(), type=Switch)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return _json({"error": 'send {"down": true} or {"down": false}'}, 400)
        if switch.down != self._down:
            self._turn(down=switch.down)
        return _json({"down": self._down})

    @property
    def _down(self) -> bool:
        return DOWN in self._sandbox.faults()

    def _turn(self, *, down: bool) -> None:
        # Faults of the sandbox's own page stay as they are.
        others = [fault for fault in self._sandbox.faults() if fault != DOWN]
        self._sandbox.clear_faults()
        for fault in [DOWN, *others] if down else others:
            self._sandbox.inject(fault)

    async def _waiting(self) -> dict[str, object]:
        try:
            await self._queue.reap()  # so that the gauges are a second old at most
            return waiting(await stats(self._queue, minutes=0, days=0))
        except QueueUnavailable as error:
            return {"held": True, "waiting": error.detail}

    # --- the way to the relay ------------------------------------------------------

    async def track(self, request: Request) -> Response:
        """Hand events on, and follow them."""
        body = await request.body()
        if OFFLINE in request.cookies:
            return Response(status_code=503)  # as if nobody were there
        visitor = _visitor(request)
        found = await self._follower.expect(visitor, body) if visitor else []
        response = await self.hand_on(request)
        self._follower.answered(found, response.status_code, bytes(response.body))
        return response

    async def hand_on(self, request: Request) -> Response:
        """The relay's answer to this very request."""
        try:
            async with self._client.stream(
                request.method,
                self._relay + request.url.path,
                content=await request.body(),
                headers=[h for h in request.headers.items() if h[0] not in _NOT_ON],
            ) as answer:
                # As it came: the browser undoes its coding.
                body = b"".join([part async for part in answer.aiter_raw()])
        except httpx.HTTPError:
            return Response("The relay does not answer.", 502)
        response = Response(body, answer.status_code)
        response.raw_headers = [
            (name.lower(), value)
            for name, value in answer.headers.raw
            if name.lower() not in _NOT_BACK
        ]
        return response


def waiting(figures: dict[str, object]) -> dict[str, object]:
    """What waits in the queue, of all visitors, in plain words; and if it is held."""
    gauges = cast("dict[str, int | float | None]", figures["gauges"])
    hold = cast("dict[str, str] | None", figures["hold"])
    n = sum(int(gauges[name] or 0) for name in ("queued", "in_flight", "delayed"))
    said = _said(
        n,
        eta_s=int(gauges["eta_s"] or 0),
        again=bool(gauges["delayed"]),
        hold=hold["hold"] if hold else None,
    )
    return {"held": hold is not None, "waiting": said}


def _said(n: int, *, eta_s: int, again: bool, hold: str | None) -> str:
    events = "1 event waits" if n == 1 else f"{n} events wait"
    if hold not in (None, "by_hand") and n == 0:
        return "Delivery is held; the relay tries again with the next event."
    if hold == "by_hand":
        return f"{events}. {CURES[hold]}"
    if hold == "breaker_open":
        return f"Voucherify is down: {events}; the relay tries again by itself."
    if hold is not None:
        return f"Delivery is held, {events}. {CURES[hold]}"
    if n == 0:
        return "Nothing waits in the relay."
    if again:
        return f"{events} in the relay; what has failed is tried again."
    if n == 1:
        return "1 event waits in the relay."
    return f"{events} in the relay; the last one leaves in about {eta_s} s."


def _page(voucherify: str) -> str:
    lines = tag(base="", track="track", pin=True, options={})
    parts = {
        "tag": lines,
        "tag_shown": html.escape(lines),
        "voucherify": html.escape(voucherify),
    }
    page = _static("demo.html")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page


def _static(name: str) -> str:
    return (files("relay") / "static" / name).read_text("utf-8")


def _asset(name: str) -> Response:
    return Response(_static(name), media_type=_ASSETS[name], headers=_FRESH)


def _visitor(request: Request) -> str:
    return request.cookies.get(VISITOR, "")[:64]


def _json(body: object, status: int = 200) -> Response:
    return Response(
        msgspec.json.encode(body),
        status,
        {**_FRESH, "cache-control": "no-store"},
        "application/json",
    )
