"""A shop with the snippet in its pages, in front of a real relay, for browser tests.

Every test has a host of its own (`c7.shop.localhost`), so its own origin, storage and
faults. Browsers take such names for this machine, and for a secure context, as https
would be. The front is what a shop's web server is: it
serves pages, and hands `/track` and the script on to the relay.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import httpx
from playwright.async_api import Browser, async_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from uvicorn._types import ASGIApplication

from relay.snippet import STUB
from tests.browser.test_demo import ARGS
from tests.integration.stack import Stack, stack
from tests.programs import find
from tests.support import serve

TO_HERE = "--host-resolver-rules=MAP * 127.0.0.1"
NONCE = "of-this-page"
STRICT = (
    f"default-src 'none'; script-src 'nonce-{NONCE}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
SCRIPT = '<script async nonce="{nonce}" src="/relay.js" {data}></script>'
INSTALLS = {
    # Called before the script is there, and kept by the stub.
    "stub": f'<script nonce="{NONCE}">{STUB}</script>{{script}}',
    # No stub: the page calls when the script has been loaded.
    "loaded": "{script}",
    "module": f"""<script type="module" nonce="{NONCE}">
      import {{ createRelay }} from "/relay.mjs";
      window.relay = createRelay();
    </script>""",
    # As a tag manager does it: a script that makes the script.
    "manager": f"""<script nonce="{NONCE}">{STUB};(function () {{
      var script = document.createElement("script");
      script.src = "/relay.js"; script.async = true; {{set}}
      document.head.appendChild(script);
    }})()</script>""",
}
PAGE = """<!doctype html><html lang="en"><head><title>{title}</title>
{install}</head><body><h1>{title}</h1><a href="/next">Next</a></body></html>"""


@dataclass
class Front:
    """The shop's web server: pages, and the way to the relay."""

    relay: str = ""  # its URL, once it runs
    module: str = ""  # what npm has of the snippet
    down: set[str] = field(default_factory=set)  # hosts whose relay is away
    others: dict[str, str] = field(default_factory=dict)  # another relay, by host
    pages: dict[str, str] = field(default_factory=dict)  # of a test's own, by path
    requests: Counter[str] = field(default_factory=Counter)  # beacons, by host
    visited: Counter[str] = field(default_factory=Counter)  # pages, by URL
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> ASGIApplication:
        # It lets go of an idle connection before the relay does, after 5 s: a request
        # that crosses that is lost, and a page without its script takes no event.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=4.0)
        self.client = httpx.AsyncClient(trust_env=False, timeout=60.0, limits=limits)
        return cast(
            "ASGIApplication",
            Starlette(
                routes=[
                    Route("/relay.js", self.hand_on),
                    Route("/relay.{version}.js", self.hand_on),
                    Route("/relay.mjs", self.from_npm),
                    Route("/track", self.hand_on, methods=["POST"]),
                    Route("/slow", self.slow, methods=["POST"]),
                    Route("/{page:path}", self.page),
                ]
            ),
        )

    async def page(self, request: Request) -> Response:
        self.visited[str(request.url)] += 1
        if (own := self.pages.get(request.url.path)) is not None:
            return HTMLResponse(own)
        install = request.cookies.get("install", "stub")
        data = request.cookies.get("data", "")
        script = SCRIPT.format(nonce=NONCE, data=data.replace("+", " "))
        html = (
            INSTALLS[install]
            .replace("{script}", script)
            .replace("{set}", f'script.nonce = "{NONCE}";')
        )
        title = request.url.path.strip("/") or "home"
        headers = {"Cache-Control": "max-age=0"}
        if "csp" in request.cookies:
            headers["Content-Security-Policy"] = STRICT
        return HTMLResponse(PAGE.format(title=title, install=html), headers=headers)

    async def from_npm(self, _: Request) -> Response:
        return Response(self.module, media_type="text/javascript")

    async def slow(self, request: Request) -> Response:
        """Keeps a request, and with it a part of the browser's quota."""
        await request.body()
        await self.release.wait()
        return Response(status_code=204)

    async def hand_on(self, request: Request) -> Response:
        host = request.headers["host"].partition(":")[0]
        if request.url.path == "/track":
            self.requests[host] += 1
            if host in self.down:
                await request.body()
                return Response("<h1>502 Bad Gateway</h1>", 502)
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name not in ("host", "connection", "content-length")
        ]
        async with self.client.stream(
            request.method,
            self.others.get(host, self.relay) + request.url.path,
            content=await request.body(),
            headers=headers,
        ) as answer:
            body = b"".join([part async for part in answer.aiter_raw()])
        handed = Response(body, answer.status_code)
        handed.raw_headers = [
            (name.lower(), value)
            for name, value in answer.headers.raw
            if name.lower() not in (b"connection", b"transfer-encoding")
        ]
        return handed


@dataclass
class Shop:
    """Everything that a test needs."""

    stack: Stack
    front: Front
    port: str
    browser: Browser

    def url(self, host: str, path: str = "/") -> str:
        return f"http://{host}.shop.localhost:{self.port}{path}"

    def arrived(self, customer: str) -> Counter[str]:
        """What reached Voucherify of one customer, by the number of each event."""
        return Counter(
            str(cast("dict[str, object]", body["metadata"])["n"])
            for record in self.stack.sandbox.events
            if record.source_id == customer
            and isinstance(body := json.loads(json.dumps(record.body)), dict)
        )


@asynccontextmanager
async def open_shop(
    redis_url: str,
    prefix: str,
    directory: Path,
    *,
    front: Front,
    limits: str = "off",
    signing_keys: str = "",
) -> AsyncIterator[Shop]:
    """Open a shop: its web server, a relay, and a browser for its shoppers."""
    async with serve(front.app()) as pages, async_playwright() as playwright:
        port = pages.rpartition(":")[2]
        async with stack(
            redis_url,
            prefix,
            directory,
            allowed_origins=f"http://*.shop.localhost:{port}",
            limits=limits,
            signing_keys=signing_keys,
        ) as relay:
            serving = relay.start("serve")
            front.relay = (await serving.track_url()).removesuffix("/track")
            browser = await playwright.chromium.launch(
                executable_path=find("chromium"),
                args=[*ARGS, TO_HERE],
                # Shoppers have it; playwright switches it off.
                ignore_default_args=["--disable-back-forward-cache"],
                timeout=15_000,
            )
            try:
                yield Shop(relay, front, port, browser)
            finally:
                front.release.set()
                await browser.close()
                await front.client.aclose()
