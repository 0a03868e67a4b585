"""What reached the sandbox: each request, its verdict, and counts since the start.

Memory is bounded by number and by size: the oldest records go first, counts stay.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from relay.sandbox.request import Request

# What is not a beacon's size is not kept: the relay itself takes 64 KiB at most.
MAX_KEPT_BODY = 64 * 1024
MAX_KEPT_TEXT = 2048

_MASKED = frozenset(
    {"x-client-token", "x-app-token", "cookie", "proxy-authorization", "x-api-key"}
)


@dataclass(slots=True, kw_only=True)
class Record:
    """One request and what became of it; filled in while it is being answered."""

    seq: int
    received_at: float  # Unix seconds
    method: str
    path: str
    ip: str
    headers: dict[str, str]  # secret values masked
    size: int = 0  # bytes of the body
    body: object = None  # the JSON, when it was JSON and not too large
    text: str | None = None  # the start of a body that was not JSON
    event: str | None = None
    source_id: str | None = None
    customer_id: str | None = None
    recorded: bool = False  # the event was taken, whatever was answered
    skipped: list[str] = field(default_factory=list)  # effects switched off
    verdict: str = "arrived"
    details: str | None = None
    fault: str | None = None
    status: int | None = None  # None: not answered, or not yet
    request_id: str | None = None
    unexpected: list[str] = field(default_factory=list)


class Ledger:
    """The newest records and the counts of all."""

    def __init__(self, *, keep: int, keep_bytes: int) -> None:
        self._requests = _Ring(keep, keep_bytes)
        self._events = _Ring(keep, keep_bytes)
        self._seq = 0
        self.by_verdict: Counter[str] = Counter()
        self.by_status: Counter[str] = Counter()
        self.recorded = 0

    @property
    def requests(self) -> list[Record]:
        """Return the newest requests, the refused ones included."""
        return list(self._requests)

    @property
    def events(self) -> list[Record]:
        """Return the newest recorded events, in the order they were recorded."""
        return list(self._events)

    @property
    def total(self) -> int:
        """Return how many requests were judged."""
        return self.by_verdict.total()

    def open(self, request: Request, received_at: float) -> Record:
        """Start the record of a request."""
        self._seq += 1
        return Record(
            seq=self._seq,
            received_at=received_at,
            method=request.method,
            path=request.path,
            ip=request.ip,
            headers=masked(request.headers),
        )

    def judged(self, record: Record) -> None:
        """Keep a record whose verdict is known; its answer may still be under way."""
        self.by_verdict[record.verdict] += 1
        self._requests.append(record)
        if record.recorded:
            self.recorded += 1
            self._events.append(record)

    def answered(self, record: Record, status: int | None) -> None:
        """Note what was answered; None for a connection that got no answer."""
        record.status = status
        self.by_status[str(status) if status else "none"] += 1


class _Ring:
    """Records, oldest first, within a number and a size."""

    def __init__(self, keep: int, keep_bytes: int) -> None:
        self._records: deque[Record] = deque()
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._bytes = 0

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def append(self, record: Record) -> None:
        self._records.append(record)
        self._bytes += min(record.size, MAX_KEPT_BODY)
        while len(self._records) > self._keep or self._bytes > self._keep_bytes:
            self._bytes -= min(self._records.popleft().size, MAX_KEPT_BODY)


def masked(headers: dict[str, str]) -> dict[str, str]:
    """Return headers fit to be shown: names all, secret values none."""
    shown = {n: "***" if n in _MASKED else v for n, v in headers.items()}
    if "authorization" in headers:
        scheme, separator, _ = headers["authorization"].partition(" ")
        shown["authorization"] = f"{scheme} ***" if separator else "***"
    return shown
