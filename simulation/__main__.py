"""`python -m simulation`: play the scenarios, show what they found, write it down."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import redis
import structlog
from rich.console import Console

from relay.embedded import EmbeddedServer
from simulation.histories import check
from simulation.picture import picture
from simulation.play import Played, play
from simulation.report import markdown, put_in, shortcomings, show
from simulation.scenarios import SCENARIOS, Scenario, shorter

DOCS = Path(__file__).parents[1] / "docs"
SEED = 7
HISTORIES, STEPS = 300, 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 as expected, 1 a check is not kept, 2 wrong arguments."""
    asked = _parser().parse_args(arguments)
    names = asked.scenario or list(SCENARIOS)
    scenarios = [SCENARIOS[name] for name in names]
    if asked.short:
        scenarios = [shorter(scenario) for scenario in scenarios]
    # The table and the picture are of one run of everything, always the same one.
    whole = not (asked.scenario or asked.short or asked.json) and asked.seed == SEED
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    console = Console(stderr=asked.json)
    runs = _play(scenarios, asked.seed, console, histories=whole)
    if asked.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(runs)).decode() + "\n")
    else:
        show(runs, console)
    if whole:
        _write(runs)
    # In small there is too little of everything for some of the figures.
    return 0 if asked.short else bool([*shortcomings(runs)])


def _play(
    scenarios: Sequence[Scenario], seed: int, console: Console, *, histories: bool
) -> list[Played]:
    runs = []
    with (
        tempfile.TemporaryDirectory(prefix="relay-simulation-") as place,
        EmbeddedServer(data_dir=Path(place)) as server,
    ):
        # Nothing outlives the run, so nothing has to reach the disk.
        redis.Redis.from_url(server.url).config_set("appendonly", "no")
        for scenario in scenarios:
            began = time.monotonic()
            runs.append(asyncio.run(play(scenario, url=server.url, seed=seed)))
            took = time.monotonic() - began
            console.print(f"{scenario.name}: played in {took:.1f} s", style="dim")
        if histories:
            check(server.url, examples=HISTORIES, steps=STEPS, repeatable=False)
            console.print(f"{HISTORIES} random histories keep the promises")
    return runs


def _write(runs: Sequence[Played]) -> None:
    document = DOCS / "delivery.md"
    text = document.read_text("utf-8")
    document.write_text(put_in(text, markdown(runs)), "utf-8")
    (DOCS / "delivery.svg").write_text(picture(runs), "utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulation",
        description="Play days of traffic against the real queue in simulated time. "
        "Without options it writes the table and the picture of docs/delivery.md.",
    )
    parser.add_argument(
        "--scenario", action="append", choices=list(SCENARIOS), help="only this one"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"default {SEED}")
    parser.add_argument("--short", action="store_true", help="in small, as the tests")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
