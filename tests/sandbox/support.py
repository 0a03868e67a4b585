"""Requests as a correct relay would send them, and small variations of them."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from relay.sandbox import (
    APPLICATION_ID,
    CLIENT_TOKEN,
    ORIGIN,
    SERVER_APP_ID,
    SERVER_APP_TOKEN,
    RunningSandbox,
    Sandbox,
    SandboxConfig,
    serve_sandbox,
)

CLIENT = "/client/v1/events"
SERVER = "/v1/events"
COMMON = {
    "accept": "application/json",
    "content-type": "application/json",
    "user-agent": "voucherify-relay/0.1.0",
    "x-voucherify-channel": "relay:0.1.0",
}
CLIENT_HEADERS = COMMON | {
    "x-client-application-id": APPLICATION_ID,
    "x-client-token": CLIENT_TOKEN,
    "origin": ORIGIN,
}
SERVER_HEADERS = COMMON | {"x-app-id": SERVER_APP_ID, "x-app-token": SERVER_APP_TOKEN}
EVENT: dict[str, object] = {"event": "e", "customer": {"source_id": "a"}}


class Caller:
    """One client of one running sandbox."""

    def __init__(self, running: RunningSandbox, http: httpx.AsyncClient) -> None:
        self.url = running.url
        self.sandbox: Sandbox = running.sandbox
        self.http = http

    async def send(
        self,
        body: object = EVENT,
        *,
        path: str = CLIENT,
        method: str = "POST",
        headers: dict[str, str | None] | None = None,
    ) -> httpx.Response:
        """Send an event; a header that is None is left out."""
        usual = CLIENT_HEADERS if path == CLIENT else SERVER_HEADERS
        merged: dict[str, str | None] = {**usual, **(headers or {})}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = self.http.build_request(
            method,
            self.url + path,
            content=content,
            headers={name: value for name, value in merged.items() if value},
        )
        for name, value in merged.items():
            if value is None:
                request.headers.pop(name, None)
        return await self.http.send(request)


@asynccontextmanager
async def calling(
    config: SandboxConfig | None = None, *, sandbox: Sandbox | None = None
) -> AsyncIterator[Caller]:
    """Serve a sandbox and yield a caller of it."""
    async with (
        serve_sandbox(config, sandbox=sandbox) as running,
        httpx.AsyncClient() as http,
    ):
        yield Caller(running, http)


def json_of(response: httpx.Response) -> dict[str, object]:
    """Return a JSON object that was answered."""
    body: object = response.json()
    assert isinstance(body, dict)
    return body
