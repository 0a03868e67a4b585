"""What a run has found, as Markdown for docs/delivery.md and for a terminal."""

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from simulation.play import Played
from simulation.referee import Finding
from simulation.scenarios import OWN_CHECKS

BEGIN, END = "<!-- simulation: begin -->", "<!-- simulation: end -->"

COLUMNS = (
    "scenario",
    "events in",
    "calls (refused by a limit)",
    "most calls in any window",
    "value in time: high, normal, low",
    "delivered",
    "expired",
    "ambiguous",
    "rejected",
    "sent twice: at least once, at most once",
    "unaccounted",
    "backlog gone after",
)


def markdown(runs: Sequence[Played]) -> str:
    """The table, and below it what single scenarios are judged by."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    rows += [f"| {' | '.join(row(run))} |" for run in runs]
    return "\n".join([*rows, "", *(f"* {line}" for line in _lines(runs))])


def shortcomings(runs: Iterable[Played]) -> Iterator[str]:
    """What a run has found beyond what may be, one line each."""
    for run in runs:
        for finding in run.findings:
            if not finding.kept:
                said = f"{figure(finding.found)} of {figure(finding.most)}"
                yield f"`{run.name}`: {finding.said}: {said}: **a fault**."


def measures(runs: Iterable[Played]) -> Iterator[str]:
    """What only some scenarios are judged by, one line each."""
    for run in runs:
        for finding in run.findings:
            if finding.check in OWN_CHECKS and finding.kept:
                said = f"{figure(finding.found)}, at most {figure(finding.most)}"
                yield f"`{run.name}`: {finding.said}: {said}."


def row(run: Played) -> list[str]:
    """One scenario in the order of `COLUMNS`."""
    outcomes = run.outcomes
    twice = [run.duplicates[rule] for rule in ("at_least_once", "at_most_once")]
    return [
        f"`{run.name}`",
        f"{run.sent:,}",
        f"{run.calls:,} ({run.turned_away:,})",
        "; ".join(_windows(run.findings)),
        ", ".join(_share(run.in_time.get(lane)) for lane in ("high", "normal", "low")),
        *(
            f"{outcomes.get(name, 0):,}"
            for name in ("delivered", "expired", "ambiguous", "rejected")
        ),
        ", ".join(f"{n:,}" for n in twice),
        next(figure(f.found) for f in run.findings if f.check == "accounted"),
        "-" if run.emptied_ms is None else lasted(run.emptied_ms),
    ]


def show(runs: Sequence[Played], console: Console) -> None:
    """The same for a terminal: a scenario is a column, for there are many figures."""
    table = Table(show_lines=False)
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    rows = [row(run) for run in runs]
    for number, name in enumerate(COLUMNS[1:], 1):
        table.add_row(name, *(cells[number] for cells in rows))
    console.print(table)
    for run in runs:
        console.print(
            f"{run.name}: {run.title}; {lasted(run.lasted_ms)}, seed {run.seed}"
        )
    for line in measures(runs):
        console.print(line)
    for line in shortcomings(runs):
        console.print(f"[bold red]{line}[/bold red]")


def _lines(runs: Sequence[Played]) -> Iterator[str]:
    yield from shortcomings(runs)
    yield from measures(runs)


def put_in(document: str, table: str) -> str:
    """The document with the table between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"the document has no place for the table: {BEGIN} … {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", document)


def lasted(ms: int) -> str:
    """A time for people: 13 h 2 min."""
    minutes = round(ms / 60_000)
    days, rest = divmod(minutes, 1440)
    hours, minutes = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    shown = [f"{n} {unit}" for n, unit in parts if n][:2]
    return " ".join(shown) or "0 min"


def figure(number: float) -> str:
    """A count as such, a share with its fraction."""
    return f"{number:,.0f}" if number == int(number) else f"{number:.3f}"


def _windows(findings: Iterable[Finding]) -> Iterator[str]:
    for finding in findings:
        if finding.check == "windows":
            window = finding.said.removeprefix("calls in ")
            yield f"{finding.found:,.0f} of {finding.most:,.0f} in {window}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f} %"
