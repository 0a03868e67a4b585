"""The parts of the benchmark, in the order in which they run."""

from collections.abc import Callable
from typing import Protocol

from bench.accept import FLOOR, JSON, compare
from bench.results import Rows

Say = Callable[[str], None]


class Section(Protocol):
    """One part: runs for a while, and gives its figures."""

    def __call__(
        self, *, rounds: int, seconds: float, quick: bool, say: Say
    ) -> Rows: ...


def accept(*, rounds: int, seconds: float, quick: bool, say: Say) -> Rows:
    """Single beacons at 64 connections, everything on: what the goals speak of."""
    del quick
    return compare([FLOOR, JSON], rounds=rounds, seconds=seconds, say=say)


SECTIONS: dict[str, Section] = {"accept": accept}
