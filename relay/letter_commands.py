"""`relay dead-letters`: look at what was not delivered, send it again, or drop it."""

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import structlog
import typer

from relay.console import FAILED, AsJson, on_queue, plain, read_settings
from relay.counters import time_of
from relay.dead_letters import (
    MAX_PAGE,
    OBSTACLES,
    Cost,
    WrongField,
    cost,
    drop,
    page,
    read_entry,
    read_letters,
    read_limit,
    read_new_ttl,
    survey,
    told_reasons,
    told_whole,
)
from relay.digests import Digests
from relay.errors import QueueUnavailable, RelayError
from relay.outcomes import CURES, letter_cure
from relay.queue import Letters, Queue
from relay.replay import REPLAY_CURES, Plan, Progress, Replay
from relay.settings import Role, Settings

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

SHOWN_EVENTS = 10

letters_app = typer.Typer(
    no_args_is_help=True,
    help="Events that were refused, expired or may have arrived, kept whole: "
    "docs/operations.md, Dead letters.",
)

Ids = Annotated[
    list[str] | None, typer.Argument(help="Ids of letters, as the list shows them.")
]
Outcome = Annotated[str, typer.Option(help="rejected, expired or ambiguous.")]
Reason = Annotated[str, typer.Option(help="The reason, as the list shows it.")]
Event = Annotated[str, typer.Option(help="The name of the event.")]
Customer = Annotated[str, typer.Option(help="A source_id, or an id of Voucherify.")]
Since = Annotated[
    str, typer.Option(help="Died since: 30m, 12h, 7d ago, or 2026-11-26T03:00 (UTC).")
]
Until = Annotated[str, typer.Option(help="Died until then; written likewise.")]
Limit = Annotated[int | None, typer.Option(min=1, help="How many at most.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without being asked.")]


@letters_app.command("list")
def list_letters(
    ids: Ids = None,
    outcome: Outcome = "",
    reason: Reason = "",
    event: Event = "",
    customer: Customer = "",
    since: Since = "",
    until: Until = "",
    limit: Annotated[
        int, typer.Option(min=1, max=MAX_PAGE, help="How many of the newest to show.")
    ] = 20,
    *,
    as_json: AsJson = False,
) -> None:
    """Show what failed, why, and what to do; then the newest, without their bodies."""
    settings = read_settings(Role.READ)
    filters = _filters(outcome, reason, event, customer, since, until)

    async def look(queue: Queue) -> None:
        letters = await _letters(queue, settings, ids, filters)
        seen = await survey(queue, letters, ttl_ms=settings.ttl * 1000)
        found, _ = await page(queue, letters, most=limit)
        if as_json:
            told = {"counts": told_reasons(seen), "letters": found}
            typer.echo(json.dumps(told, indent=2))
        elif not seen.matched:
            typer.echo("There are no dead letters of this kind.")
        else:
            _show_reasons(told_reasons(seen))
            _show_letters(found, seen.matched)

    _run(settings, look)


@letters_app.command()
def show(
    letter: Annotated[str, typer.Argument(metavar="ID", help="As the list shows it.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Show one whole, with its body. That is personal data: mind who sees it."""
    settings = read_settings(Role.READ)

    async def look(queue: Queue) -> None:
        fields = await queue.letter(read_entry("ID", letter))
        if fields is None:
            raise RelayError(f"There is no dead letter {letter} (any more).")
        told = told_whole(letter, fields)
        told["cure"] = letter_cure(fields.get("outcome", ""), fields.get("reason", ""))
        if as_json:
            typer.echo(json.dumps(told, indent=2))
            return
        for name, value in told.items():
            _show_field(name, value)

    _run(settings, look)


@letters_app.command("drop")
def drop_letters(
    ids: Ids = None,
    outcome: Outcome = "",
    reason: Reason = "",
    event: Event = "",
    customer: Customer = "",
    since: Since = "",
    until: Until = "",
    limit: Limit = None,
    *,
    yes: Yes = False,
) -> None:
    """Take letters out for good, the oldest first. The totals stay as they are."""
    settings = read_settings(Role.READ)
    filters = _filters(outcome, reason, event, customer, since, until)

    async def take_out(queue: Queue) -> None:
        letters = await _letters(queue, settings, ids, filters)
        seen = await survey(queue, letters, ttl_ms=settings.ttl * 1000)
        n = min(seen.matched, limit or seen.matched)
        if not n:
            typer.echo("There are no dead letters of this kind.")
            return
        _show_reasons(told_reasons(seen))
        _ask(f"Drop {n} of them for good?", yes=yes)
        gone = await drop(queue, letters, most=n)
        structlog.get_logger().warning("letters.dropped", dropped=gone)
        typer.echo(f"{gone} dead letters are gone; their outcome stays counted.")

    _run(settings, take_out)


@letters_app.command()
def replay(
    ids: Ids = None,
    outcome: Outcome = "",
    reason: Reason = "",
    event: Event = "",
    customer: Customer = "",
    since: Since = "",
    until: Until = "",
    limit: Limit = None,
    new_ttl: Annotated[
        str, typer.Option(help="Give each this time to live from now on: 24h.")
    ] = "",
    *,
    twice: Annotated[
        bool,
        typer.Option("--yes-it-may-pay-twice", help="Send ambiguous ones, too."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last one instead.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and end.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Send letters again as new events: ten first, and the rest if those get through.

    Says first what that costs. Ctrl-C stops it; --resume goes on. Exit code 1 when it
    stopped before its end.
    """
    settings = read_settings(Role.READ)
    filters = _filters(outcome, reason, event, customer, since, until)
    if resume and (ids or limit or new_ttl or twice or any(filters.values())):
        raise typer.BadParameter("--resume goes on as it was begun: no filters here.")

    async def send(queue: Queue) -> bool:
        running = Replay(
            queue, ttl_ms=settings.ttl * 1000, queue_max=settings.queue_max
        )
        if resume:
            await running.resume()
            return await _follow(running)
        plan = Plan(
            letters=await _letters(queue, settings, ids, filters),
            limit=read_limit(limit),
            new_ttl_ms=read_new_ttl(new_ttl),
            may_pay_twice=twice,
        )
        price = await _price(queue, settings, plan)
        _show_cost(price, limit)
        if dry_run or not price.calls:
            return dry_run or not price.survey.skipped()
        _ask(f"Send {price.calls} again?", yes=yes)
        await running.begin(plan, price.calls)
        return await _follow(running)

    if not _run(settings, send):
        sys.exit(FAILED)


async def _price(queue: Queue, settings: Settings, plan: Plan) -> Cost:
    seen = await survey(
        queue,
        plan.letters,
        ttl_ms=settings.ttl * 1000,
        new_ttl_ms=plan.new_ttl_ms,
        may_pay_twice=plan.may_pay_twice,
    )
    return await cost(queue, seen, plan.limit)


# --- what was given -------------------------------------------------------------------


def _filters(*values: str) -> dict[str, str]:
    names = ("outcome", "reason", "event", "customer", "since", "until")
    return dict(zip(names, values, strict=True))


async def _letters(
    queue: Queue,
    settings: Settings,
    ids: Sequence[str] | None,
    filters: dict[str, str],
) -> Letters:
    now_ms = int((await queue.now()).timestamp() * 1000)
    digests = _digests(settings) if filters["customer"] else None
    return read_letters(now_ms=now_ms, ids=ids or (), digests=digests, **filters)


def _digests(settings: Settings) -> Digests | None:
    from relay.assembly import make_digests  # all of the relay with it

    return make_digests(settings) if settings.digest_secret else None


def _run(settings: Settings, work: Callable[[Queue], Awaitable[T]]) -> T:
    try:
        return asyncio.run(on_queue(settings, work))
    except WrongField as error:
        option = f"--{error.field.replace('_', '-')}"
        raise typer.BadParameter(f"{error.why}.", param_hint=option) from None


def _ask(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise RelayError("Nobody can be asked here: say --yes to do it.")
    if not typer.confirm(question):
        raise RelayError("Nothing was done.")


# --- what is shown --------------------------------------------------------------------


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(markup=False, highlight=False).print(table)


def _show_reasons(reasons: Sequence[dict[str, object]]) -> None:
    table = _table("what failed, why, and what to do", "n", "outcome", "reason", "do")
    for one in reasons:
        cells = (one["n"], one["outcome"], one["reason"], one["cure"])
        table.add_row(*(plain(cell) for cell in cells))
    _print(table)


def _show_letters(found: Sequence[dict[str, object]], matched: int) -> None:
    title = f"the newest {len(found)} of {matched}"
    table = _table(title, "id", "died", "event", "outcome", "reason", "status")
    for one in found:
        died = one["died_ms"]
        when = time_of(died) if isinstance(died, int) else ""
        names = ("event", "outcome", "reason", "status")
        table.add_row(plain(one["id"]), when, *(plain(one[name]) for name in names))
    _print(table)
    typer.echo("relay dead-letters show ID has all of one, personal data too.")


def _show_field(name: str, value: object) -> None:
    if isinstance(value, dict | list):
        text = json.dumps(value, indent=2, ensure_ascii=False)
        typer.echo(f"{name}:")
        for line in text.splitlines():
            typer.echo(f"    {plain(line)}")
    elif name.endswith("_ms") and name != "ttl_ms" and isinstance(value, int):
        typer.echo(f"{name}: {value} ({time_of(value)})")
    else:
        typer.echo(f"{name}: {plain(value)}")


def _show_cost(price: Cost, limit: int | None) -> None:
    if price.survey.matched:
        _show_reasons(told_reasons(price.survey))
    typer.echo(f"{price.survey.matched} dead letters are meant.")
    for why, n in price.survey.skipped().items():
        typer.echo(f"  {n} are skipped: {OBSTACLES[why]}.")
    if "ambiguous" in price.survey.skipped():
        typer.echo(f"  {letter_cure('ambiguous', '')}")
    by_event = price.survey.by_event()
    for name, n in by_event[:SHOWN_EVENTS]:
        typer.echo(f"  {n} are {plain(name)}")
    if len(by_event) > SHOWN_EVENTS:
        rest = sum(n for _, n in by_event[SHOWN_EVENTS:])
        typer.echo(f"  {rest} are of {len(by_event) - SHOWN_EVENTS} other names")
    if not price.calls:
        typer.echo("So there is nothing to send.")
        return
    first = f", the oldest {price.calls} of {price.survey.free}" if limit else ""
    typer.echo(f"To send{first}: {price.calls} calls, {_minutes(price)}.")
    if price.hold:
        typer.echo(f"Delivery is held ({price.hold}). {CURES.get(price.hold, '')}")


def _minutes(price: Cost) -> str:
    if price.minutes is None:
        return "with no budget known: the relay has none, or does not run"
    ahead = f", {price.waiting_s / 60:.1f} of them for what waits already"
    return (
        f"about {price.minutes:.1f} minutes at {price.budget_per_s:g} calls a second"
        f"{ahead if price.waiting_s else ''}"
    )


# --- while it runs --------------------------------------------------------------------


async def _follow(running: Replay) -> bool:
    """Show how far it got until it ends; whether that is the end of it."""
    loop = asyncio.get_running_loop()
    stops = (signal.SIGINT, signal.SIGTERM)
    for sign in stops:
        loop.add_signal_handler(sign, running.stop)
    try:
        await _show_progress(running)
    except QueueUnavailable as error:
        _say_end(running.progress)
        msg = f"{error.detail} Then: relay dead-letters replay --resume"
        raise RelayError(msg) from error
    finally:
        for sign in stops:
            loop.remove_signal_handler(sign)
    _say_end(running.progress)
    return running.progress.state == "done"


async def _show_progress(running: Replay) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", markup=False),
    )
    told = running.progress
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(told.phase, total=told.planned, told="")
        said = ""
        async for told in running.run():
            bar.update(
                task,
                description=told.phase,
                completed=told.sent,
                told=_counts(told),
            )
            # Where there is no bar, a line for each part that was sent.
            line = f"{told.phase}: {told.sent} of {told.planned} sent"
            line += f", and delivery is held: {told.hold}" if told.hold else ""
            if not console.is_terminal and line != said:
                typer.echo(line)
                said = line


def _counts(told: Progress) -> str:
    parts = [f"{told.delivered} delivered", f"{told.failed} failed"]
    parts.append(f"{told.pending} on their way")
    if told.hold:
        parts.append(f"held: {told.hold}")
    return ", ".join(parts)


def _say_end(told: Progress) -> None:
    typer.echo(f"{told.sent} of {told.planned} sent: {_counts(told)}.")
    for why, n in told.skipped.items():
        typer.echo(f"  {n} were skipped: {OBSTACLES[why]}.")
    for name, n in told.failures.items():
        outcome, _, reason = name.partition(":")
        typer.echo(f"  {n} died again: {outcome}, {plain(reason)}.")
    if told.why:
        typer.echo(f"It stopped ({told.why}). {REPLAY_CURES[told.why]}")
        typer.echo("To go on: relay dead-letters replay --resume")
    elif told.state == "running":
        typer.echo("To go on: relay dead-letters replay --resume")
    elif told.pending:
        typer.echo("What is on its way is counted in relay stats.")
