"""The `relay` command.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 a check did not pass.

Each command imports what it runs: all of it takes a second, and most need little.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer

from relay import __version__, logs
from relay.console import (
    CHECK_FAILED,
    FAILED,
    USAGE,
    AsJson,
    in_time,
    on_queue,
    read_settings,
)
from relay.embedded import EmbeddedServer
from relay.errors import QueueUnavailable, RelayError, SettingsError
from relay.letter_commands import letters_app
from relay.limits import parse_duration
from relay.outcomes import CURES
from relay.settings import Role, Settings

if TYPE_CHECKING:  # all of it takes a second to import
    from rich.console import Console
    from rich.table import Table

    from relay.catalog import Catalog
    from relay.queue import Queue

MAX_REASON = 200  # characters, of a hold by hand
STOPS = (signal.SIGTERM, signal.SIGINT)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A browser-facing event relay for Voucherify. Settings come from RELAY_… "
    "variables or a .env file; docs/settings.md lists them.",
)

catalog_app = typer.Typer(
    no_args_is_help=True, help="The event catalogue: docs/catalog.md."
)
app.add_typer(catalog_app, name="catalog")
app.add_typer(letters_app, name="dead-letters")

CatalogPath = Annotated[
    Path | None, typer.Argument(help="The file; default: RELAY_CATALOG.")
]
Workers = Annotated[
    int, typer.Option(min=1, max=64, help="Processes that take and deliver events.")
]
NoForwarder = Annotated[
    bool, typer.Option("--no-forwarder", help="Take events only; a worker delivers.")
]


@app.command()
def serve(workers: Workers = 1, no_forwarder: NoForwarder = False) -> None:
    """Take beacons and deliver them.

    Without RELAY_REDIS_URL it runs a private Valkey under RELAY_DATA_DIR.
    """
    _leave_on_signals()
    from relay.assembly import make_catalog, tell_of_strangers
    from relay.serving import serve_many, serve_one

    settings = read_settings(Role.EDGE if no_forwarder else Role.SERVE)
    # A faulty one ends it here, before anything is started.
    tell_of_strangers(settings, make_catalog(settings).catalog)
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

    settings = read_settings(Role.WORKER)

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
    from relay.counters import stats as read_stats

    shown = asyncio.run(on_queue(read_settings(Role.READ), read_stats))
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
    else:
        _show(shown)


@app.command()
def hold(
    reason: Annotated[
        str,
        typer.Option(help="Why, and who; everybody sees it, so no personal data."),
    ] = "",
) -> None:
    """Hold delivery in every process until `relay resume`; events are taken as before.

    What is on its way to Voucherify finishes.
    """
    from relay.counters import time_of

    if len(reason) > MAX_REASON or not reason.isprintable():
        raise typer.BadParameter(
            f"one line of at most {MAX_REASON} characters.", param_hint="--reason"
        )
    settings = read_settings(Role.READ)
    since_ms, told, _ = asyncio.run(on_queue(settings, lambda q: q.hold(reason)))
    since = time_of(since_ms)
    structlog.get_logger().warning("delivery.held", reason=told, since=since)
    typer.echo(f"Delivery is held since {since}. relay resume lets it go on.")


@app.command()
def resume() -> None:
    """Lift the hold by hand. An automatic one is probed at once, and ends by itself."""
    from relay.counters import time_of

    settings = read_settings(Role.READ)
    since_ms, reason, automatic = asyncio.run(on_queue(settings, lambda q: q.resume()))
    if since_ms:
        since = time_of(since_ms)
        structlog.get_logger().warning("delivery.resumed", reason=reason, since=since)
        typer.echo(f"The hold by hand since {since} is lifted.")
    else:
        typer.echo("Nobody held delivery by hand.")
    if automatic:
        typer.echo(
            f"Delivery is still held: {automatic}. One event is tried at once, and "
            f"delivery goes on when it gets through. {CURES.get(automatic, '')}"
        )


@app.command()
def check(*, as_json: AsJson = False) -> None:
    """Find what would lose events or money: settings, Redis, cluster, clock, budget.

    Sends no event. Exit code 3 when there is a fault.
    """
    from relay.checks import check as find
    from relay.findings import lines

    logs.configure("auto")
    findings, hangs = in_time(find)
    if as_json:
        told = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps({"findings": told}, indent=2))
    else:
        typer.echo("\n".join(lines(findings)))
    faulty = any(finding.level == "fault" for finding in findings)
    if hangs:
        sys.stdout.flush()
        os._exit(CHECK_FAILED if faulty else 0)
    if faulty:
        sys.exit(CHECK_FAILED)


@app.command()
def explain(
    file: Annotated[
        str, typer.Argument(help="A file with an event, or several; - for stdin.")
    ],
    origin: Annotated[
        str | None,
        typer.Option(help="The page's origin; default: the first allowed one."),
    ] = None,
    route: Annotated[
        str, typer.Option(help="track, or sdk for Voucherify's own clients.")
    ] = "track",
    token: Annotated[
        str | None, typer.Option(help="A file with a token of the whole request.")
    ] = None,
    *,
    no_origin: Annotated[
        bool, typer.Option("--no-origin", help="As if no page had sent it.")
    ] = False,
    gpc: Annotated[
        bool, typer.Option("--gpc", help="As if the browser sent Sec-GPC: 1.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show each decision about an event, and what Voucherify would get. Sends nothing.

    Exit code 3 when an event of it would be refused.
    """
    from relay.explain import DIALECTS, Request, lines
    from relay.explain import explain as explained

    if route not in DIALECTS:
        raise typer.BadParameter("track or sdk.", param_hint="--route")
    settings = read_settings(Role.SERVE)
    patterns = settings.allowed_origins.patterns
    exact = [pattern for pattern in patterns if "*" not in pattern]
    # One that a pattern with a star allows: a name in the star's place.
    some = patterns[0].replace("*", "www") if patterns and "//" in patterns[0] else None
    if patterns and some is None:
        some = "https://shop.example"  # * alone allows any
    told = explained(
        settings,
        _read_file(file),
        Request(
            route=route,
            origin=None if no_origin else origin or next(iter(exact), some),
            token=_read_file(token).decode("latin-1").strip() if token else None,
            gpc=gpc,
        ),
        now=time.time(),
    )
    typer.echo(json.dumps(told, indent=2) if as_json else "\n".join(lines(told)))
    if any(step["verdict"] == "refused" for step in _steps(told)):
        sys.exit(CHECK_FAILED)


def _steps(told: dict[str, Any]) -> list[dict[str, str]]:
    events = [step for event in told["events"] for step in event["steps"]]
    return [*told["request"], *events]


def _read_file(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        msg = f"{name} cannot be read ({error.strerror}): correct the path."
        raise RelayError(msg) from error


@app.command()
def forget(
    customer: Annotated[
        str, typer.Argument(help="A source_id, or an id of Voucherify (cust_…).")
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Erase one person from queue, delayed events and dead letters; prints counts.

    Exit code 1 while an event is on its way: ask again in a minute.
    """
    settings = read_settings(Role.READ)
    if not customer:
        raise typer.BadParameter("say whom: a source_id or an id, not empty.")
    try:
        customer.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("the name must be UTF-8, as events are.") from None
    in_flight = asyncio.run(
        on_queue(settings, lambda queue: _erase(queue, settings, customer, as_json))
    )
    if in_flight:
        sys.exit(FAILED)


async def _erase(
    queue: "Queue", settings: Settings, customer: str, as_json: bool
) -> int:
    """Erase, say what was erased, and clean the private server's file."""
    from relay.assembly import make_digests
    from relay.erasure import forget as erase

    if not settings.digest_secret:
        raise RelayError(
            "The digests in limits and marks are keyed with the first secret of "
            "RELAY_AUTH, usually RELAY_CLIENT_TOKEN: set it as for the relay itself."
        )
    digests = make_digests(settings)
    known = [
        digests.customer(id=customer),
        digests.customer(source_id=customer),
        digests.customer(source_id=customer, signed=True),
    ]
    erased = dataclasses.asdict(await erase(queue, customer, digests=known))
    # Said before anything else can fail.
    if as_json:
        typer.echo(json.dumps(erased))
    else:
        for name, n in erased.items():
            typer.echo(f"{n:>7}  {ERASED[name]}")
    if settings.redis_url is None:
        # Else the file keeps for long what is gone from memory. A Redis of somebody
        # else is not ours to keep busy; docs/operations.md says what to do there.
        await queue.rewrite_log()
    return int(erased["in_flight"])


@app.command()
def snippet(
    url: Annotated[
        str,
        typer.Argument(
            help="Where pages see the relay, as https://events.shop.example; default: "
            "the page's own host."
        ),
    ] = "",
    *,
    no_pin: Annotated[
        bool, typer.Option("--no-pin", help="Always the present version, unchecked.")
    ] = False,
    consent: Annotated[
        bool,
        typer.Option("--consent", help="Keep and send nothing before consent."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Explain every event on the console.")
    ] = False,
) -> None:
    """Print the lines that a page needs to send events: docs/snippet.md."""
    from relay.origins import parse_origin_pattern
    from relay.snippet import tag

    settings = read_settings(Role.READ)
    try:
        base = parse_origin_pattern(url.removesuffix("/")) if url else ""
        if "*" in base:
            raise ValueError("one host, no pattern")
    except ValueError as error:
        raise typer.BadParameter(f"{error}: write it like https://host.") from None
    options = {"consent": "required"} if consent else {}
    options |= {"debug": ""} if debug else {}
    track = settings.track_path.removeprefix("/")
    typer.echo(
        tag(
            base=base + settings.path_prefix,
            track=track,
            pin=not no_pin,
            options=options,
        )
    )


@app.command()
def token(
    source_id: Annotated[str, typer.Argument(help="Whose token it is.")],
    event: Annotated[
        list[str] | None, typer.Option(help="An event it may send; default: any.")
    ] = None,
    origin: Annotated[
        str | None, typer.Option(help="The only origin whose pages may use it.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(help="How long it counts: 15m, 24h. RELAY_TOKEN_TTL.")
    ] = None,
    uses: Annotated[
        int | None, typer.Option(min=1, help="How many events it may send in all.")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Make a signed token with the newest of RELAY_SIGNING_KEYS.

    docs/tokens.md tells what it says and how a shop's backend makes one itself.
    """
    from relay.assembly import make_signer

    signer = make_signer(read_settings(Role.READ))
    if signer is None:
        raise RelayError("There is no key to sign with: set RELAY_SIGNING_KEYS.")
    try:
        made, expires_at = signer.sign(
            source_id=source_id,
            events=event or None,
            origin=origin,
            ttl_s=parse_duration(ttl) if ttl is not None else None,
            uses=uses,
            now=time.time(),
        )
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None
    if as_json:
        typer.echo(json.dumps({"token": made, "expires_at": expires_at}))
    else:
        typer.echo(made)


@catalog_app.command("check")
def catalog_check(file: CatalogPath = None) -> None:
    """Read a catalogue as the relay would, and say what is wrong with it."""
    loaded = _catalog(file)
    for warning in loaded.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(
        f"{len(loaded.names)} events; others: {loaded.unlisted}. Nothing is wrong."
    )


@catalog_app.command("types")
def catalog_types(file: CatalogPath = None) -> None:
    """Print TypeScript types of the catalogue's events, for users of the snippet."""
    from relay.typescript import declarations

    typer.echo(declarations(_catalog(file)), nl=False)


def _catalog(file: Path | None) -> "Catalog":
    from relay.catalog import CatalogError
    from relay.reload import CatalogFile

    settings = read_settings(Role.READ)
    path = file or settings.catalog
    if path is None:
        raise RelayError("Name the catalogue's file, or set RELAY_CATALOG.")
    try:
        # A file by itself tells nothing of keys: whether there are some is checked
        # when the relay starts.
        return CatalogFile(
            path, max_ttl_s=max(settings.dedupe_window, settings.ttl), signing=True
        ).catalog
    except CatalogError as error:
        lines = "\n".join(f"  {fault}" for fault in error.faults)
        msg = f"The catalogue {path} is not right:\n{lines}"
        raise RelayError(msg) from None


@app.command()
def keygen() -> None:
    """Print a new random key, for RELAY_SIGNING_KEYS or RELAY_OPS_TOKEN."""
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
        # An edge that is up takes it for "read the catalogue again" (app.py).
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _leave(*_: object) -> None:
    for sign in (*STOPS, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)  # a second one must not break the clean-up
    sys.exit(0)


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
    held = shown["hold"]
    while isinstance(held, dict):
        _show_hold(console, held)
        held = held.get("automatic")
    _show_plan(console, shown)
    last = shown["replay"]
    if isinstance(last, dict) and last["state"] != "done":
        how = "running" if last["alive"] else "unfinished"
        console.print(
            f"A replay of dead letters is {how}: {last['sent']} of {last['planned']} "
            f"sent, {last['failed']} failed. {last['cure']}"
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
    browser = shown["browser"]
    assert isinstance(browser, dict)  # noqa: S101  # likewise
    for day, families in browser.items():
        if families:
            console.print(_browsers(day, families))


def _show_hold(console: "Console", held: dict[str, object]) -> None:
    from rich.markup import escape

    reason = escape(str(held["reason"] or "no reason given"))
    probes = held["hold"] != "by_hand"
    again = f"; next try {held['next_probe'] or 'at once'}" if probes else ""
    if held["ends"]:
        again += f", over at {held['ends']}"
    console.print(
        f"[bold red]Delivery is held: {held['hold']}[/] ({reason}) since "
        f"{held['since']}{again}. {CURES.get(str(held['hold']), '')}"
    )


def _show_plan(console: "Console", shown: dict[str, object]) -> None:
    plan, forecast = shown["plan"], shown["forecast"]
    assert isinstance(plan, list)  # noqa: S101  # as counters.stats makes it
    for window in plan:
        console.print(
            f"Voucherify allows {window['limit']} calls in {window['window_s']} s; "
            f"others were seen to make {window['others']} ({window['heard']})."
        )
    if isinstance(forecast, dict):
        slowed = [
            f"{lane} to one in {every:g} s"
            for lane in ("normal", "low")
            if (every := forecast[f"{lane}_every_s"])
        ]
        console.print(
            "[bold red]At this rate the cycle's calls end on "
            f"{forecast['calls_end']}[/] and come back from "
            f"{forecast['calls_come_back']} on. Slowed down: "
            f"{', '.join(slowed)}. relay check says what to do."
        )


def _browsers(day: str, families: dict[str, dict[str, int]]) -> "Table":
    """What snippets reported on a day: how many events have not left each browser."""
    from rich.table import Table

    from relay.browsers import KINDS

    table = Table(title=f"browsers, {day}", title_justify="left")
    table.add_column("family", style="cyan")
    kinds = (KINDS[0], "arrived", *KINDS[1:])
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name, counts in families.items():
        table.add_row(name, *(str(counts.get(kind, 0)) for kind in kinds))
    return table


# What `relay forget` counts, in words.
ERASED = {
    "waiting": "events that waited, now dropped",
    "delayed": "events that waited for another try, now dropped",
    "dead": "dead letters, gone",
    "spooled": "events in the spool (this version has none)",
    "marks": "marks of limits and ids, gone",
    "in_flight": "events on their way, left alone: ask again in a minute",
    "mentions": "events of others that name this person as referrer, left alone",
}
