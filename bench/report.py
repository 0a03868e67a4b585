"""Write what is kept into docs/performance.md and its picture.

Only what stands between `<!-- bench NAME -->` and `<!-- end -->` is written; the rest
of the document is prose, and stays. A quick run is never reported.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from bench.machine import ROOT
from bench.results import Record, Spread, kept

DOCUMENT = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance.svg"
MARKED = re.compile(r"(<!-- bench (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Number = Callable[[float], str]


def whole(value: float) -> str:
    return f"{value:,.0f}"


def tenth(value: float) -> str:
    return f"{value:.1f}"


def hundredth(value: float) -> str:
    return f"{value:.2f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a section, as the table shows it."""

    title: str
    figure: str
    number: Number = whole


RATE = Column(title="events/s", figure="events_per_s")
RATIO = Column(title="× floor", figure="ratio", number=hundredth)
P99 = Column(title="p99 ms", figure="p99_ms", number=tenth)
SERVER = Column(title="server µs", figure="server_us_per_event", number=tenth)
CLOSED = [
    *(RATE, RATIO, P99),
    Column(title="× floor's p99", figure="p99_ratio", number=tenth),
    SERVER,
    Column(title="Redis µs", figure="redis_us_per_event", number=tenth),
    Column(title="load µs", figure="load_us_per_event", number=tenth),
    Column(title="server core", figure="server_busy", number=percent),
    Column(title="other core", figure="other_busy", number=percent),
]
PROXIES = [
    *CLOSED[:-3],
    Column(title="upstream µs", figure="upstream_us_per_event", number=tenth),
    *CLOSED[-3:],
]
COLUMNS: dict[str, list[Column]] = {
    "accept": CLOSED,
    "connections": CLOSED,
    "kinds": CLOSED,
    "refusals": CLOSED,
    "durability": CLOSED,
    "workers": CLOSED,
    "peers": PROXIES,
    "latency": [
        Column(title="p50 ms", figure="p50_ms", number=hundredth),
        Column(title="p99 ms", figure="p99_ms", number=hundredth),
        Column(title="p99.9 ms", figure="p999_ms", number=hundredth),
        Column(title="× floor's p99", figure="p99_ratio", number=tenth),
        Column(title="sender late, p99 ms", figure="late_p99_ms", number=hundredth),
    ],
    "burst": [
        Column(title="answered 2xx", figure="accepted"),
        Column(title="refused", figure="refused"),
        Column(title="no answer", figure="unanswered"),
        Column(title="seconds", figure="seconds", number=tenth),
        Column(title="arrived by then", figure="arrived"),
        Column(title="arrived in the end", figure="arrived_in_the_end"),
        Column(title="twice", figure="twice"),
    ],
    "delivery": [
        RATE,
        Column(title="× bare client", figure="ratio", number=hundredth),
        Column(title="forwarder µs", figure="server_us_per_event"),
    ],
    "ceiling": [
        RATE,
        Column(title="Redis µs", figure="redis_us_per_event", number=tenth),
        Column(title="Redis at most, events/s", figure="ceiling_per_s"),
    ],
    "depth": [
        *(RATE, RATIO, P99, SERVER),
        Column(title="relay MB", figure="relay_mb"),
        Column(title="Redis bytes an event", figure="redis_bytes_per_event"),
        Column(title="of them the queue's", figure="queue_bytes_per_event"),
        Column(title="on top for a minute, limits'", figure="limit_bytes_per_event"),
        Column(title="idle relay MB", figure="relay_idle_mb"),
    ],
    "startup": [
        Column(title="first event, s", figure="first_event_s", number=hundredth),
        Column(title="largest process, MB", figure="largest_mb"),
        Column(title="import, s", figure="import_s", number=hundredth),
    ],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a figure shall reach."""

    text: str
    section: str
    row: str
    figure: str
    wanted: float
    at_most: bool = False
    number: Number = hundredth

    def reached(self, found: Spread) -> bool:
        if self.at_most:
            return found.median <= self.wanted
        return found.median >= self.wanted


def _accept(text: str, wanted: float) -> Goal:
    return Goal(text=text, section="accept", row="json", figure="ratio", wanted=wanted)


GOALS = [
    _accept("durable accepts, × floor: the least", 0.50),
    _accept("durable accepts, × floor: the goal", 0.60),
    _accept("durable accepts, × floor: beyond", 0.90),
    Goal(
        text="p99, × floor's, closed loop",
        section="accept",
        row="json",
        figure="p99_ratio",
        wanted=3,
        at_most=True,
    ),
    Goal(
        text="p99, × floor's, open loop at 2,000/s",
        section="latency",
        row="relay everysec at 2000/s",
        figure="p99_ratio",
        wanted=3,
        at_most=True,
    ),
    Goal(
        text="events/s in batches of 20, × single",
        section="kinds",
        row="batch",
        figure="of_json",
        wanted=5,
    ),
    Goal(
        text="delivery, × bare client, fast upstream",
        section="delivery",
        row="relay, fast",
        figure="ratio",
        wanted=0.8,
    ),
    Goal(
        text="delivery, × bare client, 100 ms",
        section="delivery",
        row="relay, 100 ms",
        figure="ratio",
        wanted=0.8,
    ),
    Goal(
        text="a process, MB, 1,000,000 events waiting",
        section="depth",
        row="1,000,000 waiting",
        figure="relay_idle_mb",
        wanted=90,
        at_most=True,
        number=tenth,
    ),
    Goal(
        text="a process under load, MB, 600,000 waiting",
        section="depth",
        row="600,000 waiting",
        figure="relay_mb",
        wanted=90,
        at_most=True,
        number=tenth,
    ),
    Goal(
        text="a waiting event in Redis, bytes of the queue",
        section="depth",
        row="1,000,000 waiting",
        figure="queue_bytes_per_event",
        wanted=600,
        at_most=True,
        number=whole,
    ),
    Goal(
        text="a waiting event in Redis, bytes with its id",
        section="depth",
        row="1,000,000 waiting",
        figure="redis_bytes_per_event",
        wanted=600,
        at_most=True,
        number=whole,
    ),
    Goal(
        text="start to first event, s",
        section="startup",
        row="relay",
        figure="first_event_s",
        wanted=1.0,
        at_most=True,
    ),
    Goal(
        text="the same with the embedded server, s",
        section="startup",
        row="relay, embedded server",
        figure="first_event_s",
        wanted=1.5,
        at_most=True,
    ),
]


def write_report() -> list[str]:
    """Renew the document and the picture; gives the sections that were written."""
    found = {name: kept(name) for name in COLUMNS}
    records = {n: record for n, record in found.items() if record and not record.quick}
    text = DOCUMENT.read_text("utf-8")
    DOCUMENT.write_text(fill_in(text, parts(records)), "utf-8")
    if (picture := draw(records)) is not None:
        PICTURE.write_text(picture, "utf-8")
    return list(records)


def parts(records: dict[str, Record]) -> dict[str, str]:
    """The text between the markers, by name; what is not kept is not touched."""
    told = {name: section(record) for name, record in records.items()}
    if records:
        told["machine"] = machine(list(records.values()))
        told["goals"] = goals(records)
    return told


def fill_in(text: str, told: dict[str, str]) -> str:
    """Put each part between its markers, and leave the rest alone."""

    def put(match: re.Match[str]) -> str:
        name = match[2]
        return f"{match[1]}{told[name]}\n{match[4]}" if name in told else match[0]

    return MARKED.sub(put, text)


def section(record: Record) -> str:
    """A table of medians, with the least and the most of all rounds."""
    columns = [
        column
        for column in COLUMNS[record.section]
        if any(column.figure in row for row in record.rows.values())
    ]
    rows = [
        [name, *(cell(record.spread(name, c.figure), c.number) for c in columns)]
        for name in record.rows
    ]
    head = ["", *(column.title for column in columns)]
    rounds = f"{record.rounds} rounds" if record.section != "burst" else "one run"
    note = (
        f"{record.at} UTC, {rounds}; load of the machine before: "
        f"{record.load_before:.2f}."
    )
    return f"{table(head, rows)}\n\n{note}"


def cell(found: Spread | None, number: Number) -> str:
    """A median with its spread, or the value itself where all are alike."""
    if found is None:
        return "–"
    low, middle, high = (number(v) for v in (found.low, found.median, found.high))
    return middle if low == high else f"{middle} ({low}–{high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(records: list[Record]) -> str:
    """What the figures were taken on, by the newest of them."""
    newest = max(records, key=lambda record: record.at)
    return table(["", ""], [[name, told] for name, told in newest.machine.items()])


def goals(records: dict[str, Record]) -> str:
    """Reached or not, by the median; and whether the run before says the same."""
    rows = []
    for goal in GOALS:
        record = records.get(goal.section)
        found = record.spread(goal.row, goal.figure) if record else None
        if found is None:
            continue
        earlier = kept(goal.section, before=True)
        before = earlier.spread(goal.row, goal.figure) if earlier else None
        agrees = "–"
        if before is not None:
            agrees = cell(before, goal.number)
            if found.low < found.high:  # one value has no spread
                same = "within" if found.overlaps(before) else "outside"
                agrees += f": {same} each other's spread"
        sign = "≤" if goal.at_most else "≥"
        rows.append(
            [
                goal.text,
                f"{sign} {goal.number(goal.wanted)}",
                cell(found, goal.number),
                "reached" if goal.reached(found) else "**not reached**",
                agrees,
            ]
        )
    return table(["goal", "wanted", "measured", "", "the run before"], rows)


# --- the picture ----------------------------------------------------------------------

WIDTH, LEFT, BAR, GAP, TOP = 760, 190, 20, 12, 46


def draw(records: dict[str, Record]) -> str | None:
    """Rates as bars, as a share of the floor; the line is the spread."""
    bars = [
        (label, found)
        for label, name, row in BARS
        if (record := records.get(name)) and (found := record.spread(row, "ratio"))
    ]
    if not bars:
        return None
    most = max(found.high for _, found in bars)
    scale = (WIDTH - LEFT - 110) / most
    height = TOP + len(bars) * (BAR + GAP) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="Events a second, as a share of the floor">',
        STYLE,
        '<text class="title" x="8" y="22">Events a second on one core, 64 connections, '
        "as a share of a bare uvicorn application</text>",
    ]
    for n, (label, found) in enumerate(bars):
        y = TOP + n * (BAR + GAP)
        middle = y + BAR / 2
        kind = "relay" if label.startswith("relay") else "other"
        low, high = (LEFT + v * scale for v in (found.low, found.high))
        parts.append(
            f'<text class="label" x="{LEFT - 10}" y="{middle + 4:.0f}">'
            f"{escape(label)}</text>"
            f'<rect class="{kind}" x="{LEFT}" y="{y}" height="{BAR}" '
            f'width="{max(1.0, found.median * scale):.1f}"/>'
            f'<path class="spread" d="M{low:.1f} {middle}H{high:.1f}'
            f'M{low:.1f} {y + 5}v{BAR - 10}M{high:.1f} {y + 5}v{BAR - 10}"/>'
            f'<text class="value" x="{high + 8:.1f}" y="{middle + 4:.0f}">'
            f"{found.median:.2f}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


BARS = [
    ("bare uvicorn", "peers", "floor"),
    ("relay, durable", "peers", "json"),
    ("relay, batches of 20", "kinds", "batch"),
    ("nginx, limit_req", "peers", "nginx"),
    ("Caddy, no limit", "peers", "caddy"),
    ("Fastify", "peers", "fastify"),
    ("Express", "peers", "express"),
    ("Starlette, slowapi", "peers", "starlette"),
]
STYLE = """<style>
  text { font: 13px system-ui, sans-serif; fill: #24292f; }
  .title { font-weight: 600; }
  .label { text-anchor: end; }
  .relay { fill: #1f6feb; }
  .other { fill: #8c959f; }
  .spread { stroke: #24292f; fill: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .other { fill: #6e7681; }
    .spread { stroke: #e6edf3; }
  }
</style>"""
