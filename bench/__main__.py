"""Run the benchmark: `python -m bench [SECTION…] [--quick] [--rounds N]`.

Each section is kept under bench/results/ when it ends, and the report is written
from what is kept, so sections can be run one by one.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench.accept import JSON
from bench.machine import CORES, describe, load_average
from bench.processes import BenchError
from bench.profile import profile
from bench.report import write_report
from bench.results import Record, keep
from bench.sections import SECTIONS
from bench.steps import count_steps
from bench.versions import versions


def say(line: str) -> None:
    """To whoever waits."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "sections",
        nargs="*",
        help=f"of {', '.join(SECTIONS)}; default: all. Or `report`: write what is "
        "kept; or `profile`: where the relay's time goes; or `steps`: how much Python "
        "does for a beacon",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="TREE",
        help="compare this version with the one in another directory, and nothing else",
    )
    parser.add_argument("--only", action="append", default=[], metavar="SECTION")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=int, default=4, help="of load on each, a round"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round: checks the harness"
    )
    asked = parser.parse_args()
    if asked.sections == ["steps"]:
        count_steps(asked.against, say=say)
        return
    if asked.against is not None:
        versions(asked.against, rounds=asked.rounds, seconds=asked.seconds, say=say)
        return
    if asked.sections == ["profile"]:
        profile(JSON, seconds=asked.seconds, say=say)
        return
    if asked.sections == ["report"]:
        say(f"docs/performance.md: {', '.join(write_report())}")
        return
    sections = [*asked.sections, *asked.only] or list(SECTIONS)
    for name in sections:
        if name not in SECTIONS:
            parser.error(f"no section {name}: {', '.join(SECTIONS)}")
    if len(CORES) < 2:
        say("One core only: the server shares it with its load, and ratios mislead.")
    rounds, seconds = (1, 1) if asked.quick else (asked.rounds, asked.seconds)
    for name in sections:
        load_before = load_average()
        say(f"--- {name} (load of the machine {load_before:.2f})")
        try:
            rows = SECTIONS[name](
                rounds=rounds, seconds=seconds, quick=asked.quick, say=say
            )
        except BenchError as error:
            sys.exit(f"{name} is thrown out: {error}")
        keep(
            Record(
                section=name,
                at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
                rounds=rounds,
                quick=asked.quick,
                load_before=load_before,
                machine=describe(),
                rows=rows,
            )
        )
    if not asked.quick:
        write_report()


if __name__ == "__main__":
    main()
