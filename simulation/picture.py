"""Backlog and budget over time, one small picture a scenario, as one SVG.

Written by hand: two areas and a few words need no library. Colours are chosen to be
readable on white and on black, where a browser prefers either.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from simulation.play import Played, Sample
from simulation.report import lasted

WIDTH, HEIGHT = 760, 150  # of one scenario
LEFT, RIGHT, TOP, GAP = 60, 10, 26, 12
BACKLOG, BUDGET = 62, 22  # heights of the two areas

STYLE = """
svg { font: 12px system-ui, sans-serif; }
text { fill: #333; } .dim { fill: #777; } .axis { stroke: #999; }
.backlog { fill: #4a7fb5; fill-opacity: .55; stroke: #4a7fb5; }
.budget { fill: #c9822b; fill-opacity: .6; stroke: none; }
.hold { fill: #c0392b; fill-opacity: .16; }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd; } .dim { fill: #999; } .axis { stroke: #777; }
  .backlog { fill: #7fb2e5; stroke: #7fb2e5; } .budget { fill: #e0a458; }
  .hold { fill: #e57368; fill-opacity: .25; }
}
""".strip()


def picture(runs: Sequence[Played]) -> str:
    """All scenarios, one below the other."""
    height = HEIGHT * len(runs) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="Backlog and use of the budget over time">',
        f"<style>{STYLE}</style>",
        *(part for at, run in enumerate(runs) for part in _one(run, at * HEIGHT)),
        f'<text class="dim" x="{LEFT}" y="{height - 6}">blue: events that wait · '
        "orange: calls, of what the budget allows · red: delivery is held</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _one(run: Played, top: int) -> Iterator[str]:
    most = max(1, *(sample.waiting for sample in run.samples))
    end_ms = max(1, run.samples[-1].at_ms)
    base = top + TOP + BACKLOG
    low = base + GAP + BUDGET

    def x(sample: Sample) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * sample.at_ms / end_ms

    yield f'<text x="{LEFT}" y="{top + 16}">{escape(run.title)}</text>'
    yield from _holds(run.samples, x_of=x, top=top + TOP, height=low - top - TOP)
    waiting = [(x(s), base - BACKLOG * s.waiting / most) for s in run.samples]
    yield _area("backlog", waiting, base)
    used = [(x(s), low - BUDGET * min(s.used, 1.0)) for s in run.samples]
    yield _area("budget", used, low)
    for y in (base, low):
        yield f'<path class="axis" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
    yield _label(top + TOP + 10, f"{most:,}")
    yield _label(base, "0")
    yield _label(low - BUDGET + 8, "100 %")
    end = lasted(end_ms)
    yield (
        f'<text class="dim" text-anchor="end" x="{WIDTH - RIGHT}" y="{low + 14}">'
        f"{end}</text>"
    )


def _area(kind: str, points: Sequence[tuple[float, float]], base: float) -> str:
    line = "".join(f"L{x:.1f} {y:.1f}" for x, y in points)
    first, last = points[0][0], points[-1][0]
    return f'<path class="{kind}" d="M{first:.1f} {base}{line}L{last:.1f} {base}Z"/>'


def _holds(
    samples: Sequence[Sample],
    *,
    x_of: Callable[[Sample], float],
    top: float,
    height: float,
) -> Iterator[str]:
    for begin, end in _spans(samples):
        left, width = x_of(begin), max(1.0, x_of(end) - x_of(begin))
        yield (
            f'<rect class="hold" x="{left:.1f}" y="{top}" width="{width:.1f}" '
            f'height="{height}"/>'
        )


def _spans(samples: Iterable[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """Where delivery is held, from the first point that says so to the next one."""
    begin = None
    last = None
    for sample in samples:
        if sample.hold and begin is None:
            begin = sample
        if begin is not None and not sample.hold:
            yield begin, sample
            begin = None
        last = sample
    if begin is not None and last is not None:
        yield begin, last


def _label(y: float, text: str) -> str:
    return f'<text class="dim" text-anchor="end" x="{LEFT - 6}" y="{y}">{text}</text>'
