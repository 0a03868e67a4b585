"""Run a sandbox on a real socket, with uvicorn.

`async with serve_sandbox() as running:` is for tests; `SandboxServer(server_config(
sandbox, …)).serve()` is for a program of its own.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from relay.sandbox.app import Sandbox
from relay.sandbox.config import SandboxConfig
from relay.sandbox.connection import EXTENSION


class SandboxProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, showing each request's transport to the sandbox."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: {"transport": self.transport}}


PROTOCOL = SandboxProtocol  # for uvicorn.Config(http=…)


class SandboxServer(uvicorn.Server):
    """A uvicorn server that does not wait for delayed answers when it stops."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            transport = cast("HttpToolsProtocol", connection).transport
            transport.abort()
        await super().shutdown(sockets)


class _Embedded(SandboxServer):
    """Within another program, whose signals are its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSandbox:
    """A sandbox that is being served."""

    url: str
    sandbox: Sandbox


def server_config(
    sandbox: Sandbox, *, host: str = "127.0.0.1", port: int = 0
) -> uvicorn.Config:
    """Return what uvicorn needs to serve `sandbox` faithfully."""
    return uvicorn.Config(
        sandbox.app,
        host=host,
        port=port,
        http=PROTOCOL,
        ws="none",
        # Limits are per source address, and a forwarded one is anybody's to write.
        proxy_headers=False,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
    )


@contextlib.asynccontextmanager
async def serve_sandbox(
    config: SandboxConfig | None = None,
    *,
    sandbox: Sandbox | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[RunningSandbox]:
    """Serve a sandbox, given or made from `config`; port 0 takes a free one."""
    served = sandbox or Sandbox(config)
    server = _Embedded(server_config(served, host=host, port=port))
    # Bound here, because uvicorn ends the whole program when a port is taken.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=2048)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        if serving.done():  # a failed start-up: show why
            await serving
            msg = "the sandbox stopped before it started"
            raise RuntimeError(msg)
        await asyncio.sleep(0.005)
    bound_port = listener.getsockname()[1]
    shown_host = f"[{host}]" if ":" in host else host
    try:
        yield RunningSandbox(url=f"http://{shown_host}:{bound_port}", sandbox=served)
    finally:
        server.should_exit = True
        await serving
