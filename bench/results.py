"""Samples by name and round, what is made of them, and where they are kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import cast

from bench.machine import ROOT

PLACE = ROOT / "bench" / "results"  # ignored by git

# What one run of one variant gives: figures by name.
Sample = Mapping[str, float]
# What a section gives: variant, figure, and a value for each round.
Rows = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some rounds, and how far they lie apart."""

    median: float
    low: float
    high: float

    def overlaps(self, other: "Spread") -> bool:
        """Whether each median lies within the other's spread."""
        return (
            self.low <= other.median <= self.high
            and other.low <= self.median <= other.high
        )


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median=median(values), low=min(values), high=max(values))


def add(rows: Rows, name: str, sample: Sample) -> None:
    """Note what a round gave."""
    row = rows.setdefault(name, {})
    for figure, value in sample.items():
        row.setdefault(figure, []).append(value)


def against(sample: Sample, floor: Sample, figures: Mapping[str, str]) -> Sample:
    """Add ratios to the floor of the same round, for the minutes differ too much.

    `figures` names them: ratio to figure.
    """
    told = dict(sample)
    for ratio, figure in figures.items():
        if floor.get(figure) and sample.get(figure):
            told[ratio] = sample[figure] / floor[figure]
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of a section, as it is kept."""

    section: str
    at: str  # UTC
    rounds: int
    quick: bool
    load_before: float  # of the machine, the minute before
    machine: dict[str, str]
    rows: Rows

    def spread(self, name: str, figure: str) -> Spread | None:
        values = self.rows.get(name, {}).get(figure)
        return spread(values) if values else None


def keep(record: Record) -> None:
    """Write a run, and keep the one before it for comparison; a quick one apart."""
    PLACE.mkdir(exist_ok=True)
    path = PLACE / f"{record.section}{'.quick' if record.quick else ''}.json"
    if path.exists() and not record.quick:
        path.replace(PLACE / f"{record.section}.before.json")
    told = {name: getattr(record, name) for name in record.__dataclass_fields__}
    path.write_text(json.dumps(told, indent=1) + "\n")


def kept(section: str, *, before: bool = False) -> Record | None:
    """The last run of a section, or the one before it."""
    path = PLACE / f"{section}{'.before' if before else ''}.json"
    if not path.exists():
        return None
    return Record(**cast("dict[str, object]", json.loads(path.read_text())))  # type: ignore[arg-type]  # as it was written
