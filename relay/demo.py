"""`relay demo`: the real relay with everything around it, on one machine.

A private Valkey in a temporary directory, a sandbox cluster in Voucherify's place,
and a shop on a port of its own, which hands its events on to the relay
(demo_shop.py). Nothing is kept when it ends.
"""

import asyncio
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from relay.app import App
from relay.assembly import Station, http_url, listen, served, stop_asked
from relay.demo_shop import Shop
from relay.embedded import EmbeddedServer
from relay.sandbox.app import Sandbox
from relay.sandbox.server import serve_sandbox
from relay.serving import server_config
from relay.settings import Role, Settings, load_settings

HOST = "127.0.0.1"
RELAY_PORT, SANDBOX_PORT, SHOP_PORT, OPS_PORT = 8000, 8001, 8002, 9000

EVENT = '{"event":"cart_abandoned","customer":{"source_id":"u1"}}'


def run_demo(say: Callable[[str], None]) -> None:
    """Run until a signal; `say` gets the lines for the person in front of it."""
    with (
        tempfile.TemporaryDirectory(prefix="relay-demo-") as place,
        # The loop is made before there is a server: a signal that meets its making
        # leaves half a loop, which complains as it goes.
        asyncio.Runner() as runner,
        EmbeddedServer(data_dir=Path(place) / "data") as server,
    ):
        runner.run(_demo(server.url, say))
    say("The demo has ended; nothing of it is left.")


async def _demo(redis_url: str, say: Callable[[str], None]) -> None:
    relay, shop, ops = _free(RELAY_PORT), _free(SHOP_PORT), _free(OPS_PORT)
    relay_url, shop_url = http_url(relay), http_url(shop)
    sandbox = Sandbox()
    probe = _free(SANDBOX_PORT)
    sandbox_port = probe.getsockname()[1]
    probe.close()
    with stop_asked() as stopped:
        async with serve_sandbox(
            sandbox=sandbox, host=HOST, port=sandbox_port
        ) as running:
            settings = _settings(sandbox, running.url, shop_url)
            station = Station(
                settings, redis_url=redis_url, forward=True, ops_socket=ops
            )
            front = Shop(
                settings=settings,
                redis_url=redis_url,
                relay=relay_url,
                sandbox=sandbox,
                voucherify=running.url,
            )
            # The sockets listen: what connects before these are up is answered then.
            async with (
                served(front.config(), shop),
                served(server_config(App(station)), relay),
            ):
                for line in _lines(relay_url, running.url, shop_url, http_url(ops)):
                    say(line)
                await stopped.wait()


def _settings(sandbox: Sandbox, url: str, shop: str) -> Settings:
    # Nothing of the person's own settings: a demo must not send to a real project.
    return load_settings(
        Role.SERVE,
        {"RELAY_ENV_FILE": "/dev/null", "HOME": "/nonexistent"},
        cluster=url,
        client_application_id=sandbox.config.application_id,
        client_token=sandbox.config.client_token,
        origin="https://shop.example",
        allowed_origins=f"{shop} {shop.replace(HOST, 'localhost')}",
    )


def _lines(relay: str, sandbox: str, shop: str, ops: str) -> list[str]:
    return [
        "",
        "The demo is ready. Ctrl-C ends it.",
        f"  The shop: start here             {shop}",
        f"  The relay takes beacons on       {relay}/track  ({ops}/readyz)",
        f"  What Voucherify would receive    {sandbox}",
        "",
        "Or send one yourself and look at the last page:",
        f"  curl -X POST -H 'Origin: {shop}' -H 'Content-Type: text/plain' "
        f"--data '{EVENT}' {relay}/track",
        "",
    ]


def _free(port: int) -> socket.socket:
    """The usual port, or any other when something listens there already."""
    try:
        return listen(HOST, port)
    except OSError:
        return listen(HOST, 0)
