"""The `relay` command.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 a check did not pass.

Each command imports what it runs: all of it takes a second, and most need little.
"""

import asyncio
import contextlib
import json
import secrets
import signal
import sys
from collections.abc import Iterator
from typing import Annotated

import structlog
import typer

from relay import __version__, logs
from relay.embedded import EmbeddedServer, running_url
from relay.errors import QueueUnavailable, RelayError, SettingsError
from relay.settings import Role, Settings, load_settings

FAILED, USAGE = 1, 2
STOPS = (signal.SIGTERM, signal.SIGINT)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A browser-facing event relay for Voucherify. Settings come from RELAY_… "
    "variables or a .env file; docs/settings.md lists them.",
)

Workers = Annotated[
    int, typer.Option(min=1, max=64, help="Processes that take and deliver events.")
]
NoForwarder = Annotated[
    bool, typer.Option("--no-forwarder", help="Take events only; a worker delivers.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def serve(workers: Workers = 1, no_forwarder: NoForwarder = False) -> None:
    """Take beacons and deliver them.

    Without RELAY_REDIS_URL it runs a private Valkey under RELAY_DATA_DIR.
    """
    _leave_on_signals()
    from relay.serving import serve_many, serve_one

    settings = _settings(Role.EDGE if no_forwarder else Role.SERVE)
    forward = not no_forwarder

    def announce(where: str, ready: str) -> None:
        whither = _whither(settings, forward=forward)
        typer.echo(f"Taking events on {where}, {whither}. Ready? {ready}")

    with _redis(settings) as url:
        if workers == 1:
            serve_one(settings, redis_url=url, forward=forward, announce=announce)
        else:
            serve_many(
                settings,
                redis_url=url,
                forward=forward,
                workers=workers,
                announce=announce,
            )


@app.command()
def worker() -> None:
    """Deliver events that edges elsewhere have queued in the same Redis."""
    _leave_on_signals()
    from relay.worker import deliver

    settings = _settings(Role.WORKER)

    def announce(ready: str) -> None:
        whither = _whither(settings, forward=True)
        typer.echo(f"A worker, {whither}. Ready? {ready}")

    with _redis(settings) as url:
        deliver(settings, redis_url=url, announce=announce)


@app.command()
def demo() -> None:
    """Run everything on this machine: relay, private Valkey, a Voucherify stand-in.

    Prints the addresses; nothing is kept when it ends.
    """
    _leave_on_signals()
    from relay.demo import run_demo

    logs.configure("auto")
    run_demo(typer.echo)


@app.command()
def sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any.")] = 8001,
) -> None:
    """Run a fake Voucherify cluster, as strict as its documentation.

    Set RELAY_CLUSTER to its URL. docs/sandbox.md tells its credentials, limits,
    switches and faults.
    """
    _leave_on_signals()
    from relay.assembly import bind, http_url
    from relay.sandbox.app import Sandbox
    from relay.sandbox.server import SandboxServer, server_config

    logs.configure("auto")
    fake = Sandbox()
    sock = bind(host, port, setting="--port")
    url = http_url(sock)
    typer.echo(
        f"A fake Voucherify listens on {url} and shows there what it receives.\n"
        f"For the relay: RELAY_CLUSTER={url} "
        f"RELAY_CLIENT_APPLICATION_ID={fake.config.application_id} "
        f"RELAY_CLIENT_TOKEN={fake.config.client_token} "
        "RELAY_ORIGIN=https://shop.example"
    )
    SandboxServer(server_config(fake, host=host, port=port)).run(sockets=[sock])


@app.command()
def stats(*, as_json: AsJson = False) -> None:
    """Show what is queued, what became of every event, and what holds delivery."""
    settings = _settings(Role.READ)
    try:
        shown = asyncio.run(_read_stats(settings))
    except QueueUnavailable as error:
        where = (
            "at RELAY_REDIS_URL"
            if settings.redis_url
            else f"in {settings.data_dir} (RELAY_DATA_DIR; or set RELAY_REDIS_URL)"
        )
        msg = f"{error.detail} Does the relay run, and keep its events {where}?"
        raise RelayError(msg) from error
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
    else:
        _show(shown)


@app.command()
def keygen() -> None:
    """Print a new random key, for RELAY_OPS_TOKEN and the like."""
    typer.echo(secrets.token_urlsafe(32))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command; every failure ends with a message and a cure, no traceback."""
    try:
        app()
    except SettingsError as error:
        typer.echo("The settings are not right:", err=True)
        for fault in error.faults:
            typer.echo(f"  {fault}", err=True)
        sys.exit(USAGE)
    except RelayError as error:
        typer.echo(str(error), err=True)
        sys.exit(FAILED)


def _leave_on_signals() -> None:
    """Let the signals that stop a program end this one cleanly.

    As an exception they let the private server stop, too; uvicorn raises the one
    that stopped it once more when it is done. A terminal that closes is one of them.
    """
    for sign in STOPS:
        signal.signal(sign, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _leave(*_: object) -> None:
    for sign in STOPS:
        signal.signal(sign, signal.SIG_IGN)  # a second one must not break the clean-up
    sys.exit(0)


def _settings(role: Role) -> Settings:
    settings = load_settings(role)
    logs.configure(settings.log_format)
    for warning in settings.warnings:
        structlog.get_logger().warning("settings.doubtful", detail=warning)
    return settings


@contextlib.contextmanager
def _redis(settings: Settings) -> Iterator[str]:
    """The Redis to use: the one that is set, or a private one while this runs."""
    if settings.redis_url is not None:
        url = settings.redis_url.get_secret_value()
        _judge_redis(settings, url)
        yield url
        return
    with EmbeddedServer(data_dir=settings.data_dir) as server:
        typer.echo(server.line)
        yield server.url


def _judge_redis(settings: Settings, url: str) -> None:
    """Refuse a Redis that would lose events; one that is away may come later."""
    from relay.assembly import make_queue

    async def probe() -> None:
        queue = make_queue(settings, url)
        try:
            await queue.probe()
        except QueueUnavailable:
            pass  # said by the process itself, and by /readyz until it is there
        finally:
            await queue.aclose()

    # A stop waits for the two seconds that it may take: as an exception in the middle
    # of it, it would leave tracebacks of the client's tasks.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        asyncio.run(probe())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


async def _read_stats(settings: Settings) -> dict[str, object]:
    from relay.counters import stats as read_stats
    from relay.queue import Queue

    url = (
        settings.redis_url.get_secret_value()
        if settings.redis_url
        else running_url(settings.data_dir)
    )
    queue = Queue(url=url, prefix=settings.redis_prefix)
    try:
        return await read_stats(queue)
    finally:
        await queue.aclose()


def _whither(settings: Settings, *, forward: bool) -> str:
    if not forward:
        return "not delivering (--no-forwarder)"
    budget = ", ".join(
        f"{w.quota} calls in {w.period_ms / 1000:g} s"
        for w in (settings.upstream_budget)
    )
    return f"delivering to {settings.upstream_url} ({budget or 'no budget'})"


def _show(shown: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    hold = shown["hold"]
    if isinstance(hold, dict):
        console.print(
            f"[bold red]Delivery is held: {hold['hold']}[/] ({hold['reason']}) since "
            f"{hold['since']}; next try {hold['next_probe']}. "
            f"{CURES.get(str(hold['hold']), '')}"
        )
    for title in ("gauges", "totals"):
        values = shown[title]
        assert isinstance(values, dict)  # noqa: S101  # as counters.stats makes it
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="cyan")
        table.add_column(justify="right")
        for name, value in values.items():
            table.add_row(name, "" if value is None else str(value))
        console.print(table)


# What the operator does about a hold; the same words in docs/operations.md.
CURES = {
    "auth_hold": "Voucherify refuses the credentials or the origin: compare "
    "RELAY_CLIENT_APPLICATION_ID, RELAY_CLIENT_TOKEN and RELAY_ORIGIN with Project "
    "Settings in Voucherify's dashboard.",
    "plan_hold": "The plan's calls are spent: raise the plan, or wait for the next "
    "cycle; the queue is kept.",
    "config_hold": "This is not the API the relay speaks: check RELAY_CLUSTER.",
    "breaker_open": "Voucherify is down or unreachable: see its status page; the "
    "relay tries again by itself.",
}
