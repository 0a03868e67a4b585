"""Dead letters: which are meant, what they are, what a replay of them would cost.

Reads, and drops what an operator does not want any more; replay.py sends again. In
bounded steps, so that nobody else waits for it. Nothing here prints.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from relay.digests import Digests
from relay.limits import parse_duration
from relay.outcomes import DEAD, held_by, letter_cure
from relay.queue import Counted, Letters, Queue

# Entries looked at in one call: their bodies are read, though not sent here. As
# erasure.py measured it, 100 keep Redis for some milliseconds.
BATCH = 100
MAX_IDS = 1000
MAX_PAGE = 1000
MAX_EVENTS = 20  # names of events that a cost shows
MAX_TEXT = 300  # characters; Voucherify's own bound of an event's name
MAX_NEW_TTL_S = 30 * 86_400
LAST_MS = 253_402_300_799_999  # the end of the year 9999, which ISO can still write

# Why a letter is not replayed, as letters.lua has it, and what is said of it.
OBSTACLES = {
    "too_old": "past their time to live: a new one (--new-ttl) sends them all the same",
    "ambiguous": "ambiguous: they may have arrived, and might pay twice",
    "same_id": "of an event that was replayed already",
    "gone": "not there (any more)",
    "unreadable": "not written by a relay",
}

_ENTRY = re.compile(r"[0-9]{1,15}-[0-9]{1,10}")


class WrongField(ValueError):
    """What an operator has given cannot be used; names the field and the cure."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field, self.why = field, why


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Dead letters by what they have in common."""

    groups: tuple[Counted, ...]

    @property
    def matched(self) -> int:
        return sum(n for _, _, n in self.by_reason())

    @property
    def free(self) -> int:
        """How many a replay would send."""
        return sum(group.n for group in self.groups if not group.obstacle)

    def skipped(self) -> dict[str, int]:
        """How many a replay would leave, and why."""
        counts: Counter[str] = Counter()
        for group in self.groups:
            if group.obstacle:
                counts[group.obstacle] += group.n
        return dict(counts.most_common())

    def by_reason(self) -> list[tuple[str, str, int]]:
        """Outcome, reason and number, most first."""
        counts: Counter[tuple[str, str]] = Counter()
        for group in self.groups:
            if group.obstacle != "gone":
                counts[group.outcome, group.reason] += group.n
        return [(*pair, n) for pair, n in counts.most_common()]

    def by_event(self) -> list[tuple[str, int]]:
        """The events that a replay would send, by name, most first."""
        counts: Counter[str] = Counter()
        for group in self.groups:
            if not group.obstacle:
                counts[group.event] += group.n
        return counts.most_common()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a replay would take, before it is begun."""

    survey: Survey
    calls: int  # at least: what fails for a moment is tried again
    minutes: float | None  # at the present budget, what waits before them included
    budget_per_s: float  # 0: no limit
    waiting_s: float  # of the minutes: what waits already
    hold: str  # what holds delivery now, or empty


async def survey(
    queue: Queue,
    letters: Letters,
    *,
    ttl_ms: int,
    new_ttl_ms: int = 0,
    may_pay_twice: bool = False,
    batch: int = BATCH,
) -> Survey:
    """Count the letters that are meant."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    cursor = ""
    while True:
        cursor, found = await queue.count_letters(
            letters,
            cursor,
            batch,
            ttl_ms=ttl_ms,
            new_ttl_ms=new_ttl_ms,
            may_pay_twice=may_pay_twice,
        )
        for one in found:
            counts[one.outcome, one.reason, one.event, one.obstacle] += one.n
        if not cursor:
            groups = tuple(Counted(*key, n) for key, n in counts.most_common())
            return Survey(groups=groups)


async def cost(queue: Queue, seen: Survey, limit: int | None) -> Cost:
    """Say what it takes to replay what was seen, by the gauges of now."""
    gauges = await queue.hash("gauges")
    calls = min(seen.free, limit) if limit is not None else seen.free
    rate = float(gauges.get("budget_per_s") or 0)
    waiting_s = float(gauges.get("eta_s") or 0)
    return Cost(
        survey=seen,
        calls=calls,
        minutes=(calls / rate + waiting_s) / 60 if rate else None,
        budget_per_s=rate,
        waiting_s=waiting_s,
        hold=held_by(await queue.hash("flow")),
    )


def told_reasons(seen: Survey) -> list[dict[str, object]]:
    """What failed, why, and what to do: most first."""
    return [
        {
            "n": n,
            "outcome": outcome,
            "reason": reason,
            "cure": letter_cure(outcome, reason),
        }
        for outcome, reason, n in seen.by_reason()
    ]


def told_cost(price: Cost) -> dict[str, object]:
    """The same for programs."""
    seen = price.survey
    events = [{"event": name, "n": n} for name, n in seen.by_event()[:MAX_EVENTS]]
    return {
        "matched": seen.matched,
        "calls": price.calls,
        "minutes": price.minutes,
        "budget_per_s": price.budget_per_s,
        "waiting_s": price.waiting_s,
        "hold": price.hold or None,
        "reasons": told_reasons(seen),
        "events": events,
        "skipped": seen.skipped(),
    }


async def page(
    queue: Queue, letters: Letters, *, most: int, after: str = "", batch: int = BATCH
) -> tuple[list[dict[str, object]], str]:
    """The newest letters, without what customers have sent, and where to go on."""
    found: list[dict[str, object]] = []
    cursor = after
    while len(found) < most:
        cursor, some = await queue.list_letters(
            letters, cursor, batch, most - len(found)
        )
        found += [told(entry, fields) for entry, fields in some]
        if not cursor:
            break
    return found, cursor


async def drop(
    queue: Queue, letters: Letters, *, most: int | None = None, batch: int = BATCH
) -> int:
    """Take letters out for good, the oldest first; how many. Their outcome stays."""
    gone, cursor = 0, ""
    while most is None or gone < most:
        left = batch if most is None else most - gone
        cursor, some = await queue.drop_letters(letters, cursor, batch, left)
        gone += some
        if not cursor:
            break
    return gone


def told(entry: str, fields: Mapping[str, str]) -> dict[str, object]:
    """A letter for a list: nothing in it is of the customer."""
    error = _error(fields.get("error", ""))
    return {
        "id": entry,
        "event_id": fields.get("id", ""),
        "event": fields.get("event", ""),
        "outcome": fields.get("outcome", ""),
        "reason": fields.get("reason", ""),
        "status": _number(fields.get("status")) or None,
        "request_id": error.get("request_id") if isinstance(error, dict) else None,
        "attempts": _number(fields.get("attempts")),
        "received_ms": _number(fields.get("received_ms")),
        "died_ms": _number(entry.partition("-")[0]),
        "lane": fields.get("lane", ""),
        "delivery": fields.get("delivery", ""),
        "replay_of": fields.get("replay_of") or None,
    }


def told_whole(entry: str, fields: Mapping[str, str]) -> dict[str, object]:
    """All of a letter, personal data too."""
    return told(entry, fields) | {
        "ttl_ms": _number(fields.get("ttl_ms")),
        "doubted_ms": _number(fields.get("doubted_ms")),
        "customer": fields.get("customer", ""),
        "error": _error(fields.get("error", "")),
        "body": _json(fields.get("body", "")),
    }


def _error(text: str) -> object:
    """Voucherify's own words: `{"key", "message", "details", "request_id"}`."""
    return _json(text) if text else None


def _json(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


# --- what an operator gives -----------------------------------------------------------


def read_letters(
    *,
    now_ms: int,
    outcome: str | None = None,
    reason: str | None = None,
    event: str | None = None,
    customer: str | None = None,
    since: str | None = None,
    until: str | None = None,
    ids: Sequence[str] = (),
    digests: Digests | None = None,
) -> Letters:
    """Read filters as commands and the ops listener take them, or `WrongField`."""
    if outcome and outcome not in DEAD:
        raise WrongField("outcome", f"must be one of {', '.join(sorted(DEAD))}")
    for field, text in {"reason": reason, "event": event, "customer": customer}.items():
        _check_text(field, text or "")
    span = {"since": since, "until": until}
    times = {field: read_time(field, text, now_ms) for field, text in span.items()}
    if (times["since"] or 0) > (times["until"] or LAST_MS):
        raise WrongField("until", "must not be before since")
    return Letters(
        outcome=outcome or "",
        reason=reason or "",
        event=event or "",
        customers=_digests_of(customer, digests) if customer else (),
        since_ms=times["since"],
        until_ms=times["until"],
        ids=tuple(dict.fromkeys(read_entry("ids", one) for one in _few(ids))),
    )


def _check_text(field: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise WrongField(field, f"has over {MAX_TEXT} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WrongField(field, "must be UTF-8, as events are") from None


def _digests_of(customer: str, digests: Digests | None) -> tuple[str, ...]:
    if digests is None:
        raise WrongField(
            "customer",
            "digests are keyed with the first secret of RELAY_AUTH, usually "
            "RELAY_CLIENT_TOKEN: set it as for the relay itself",
        )
    return (
        digests.customer(source_id=customer),
        digests.customer(source_id=customer, signed=True),
        digests.customer(id=customer),
    )


def _few(ids: Sequence[str]) -> Sequence[str]:
    if len(ids) > MAX_IDS:
        raise WrongField("ids", f"at most {MAX_IDS} at once: use a filter")
    return ids


def read_entry(field: str, text: str) -> str:
    """The id of a dead letter, as a list shows it."""
    if not _ENTRY.fullmatch(text):
        raise WrongField(field, "write it as the list shows it: 1700000000000-0")
    return text


def read_time(field: str, text: str | None, now_ms: int) -> int | None:
    """A duration before now, or an ISO time (UTC unless it says otherwise), in ms."""
    if not text:
        return None
    try:
        ms = now_ms - parse_duration(text) * 1000
    except ValueError:
        ms = _iso_ms(field, text)
    if not 0 <= ms <= LAST_MS:
        raise WrongField(field, "lies outside of 1970 to 9999")
    return ms


def _iso_ms(field: str, text: str) -> int:
    try:
        at = datetime.fromisoformat(text)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return int(at.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise WrongField(
            field, 'write a time before now ("30m", "12h", "7d") or 2026-11-26T03:00'
        ) from None


def read_new_ttl(text: str | int | None) -> int:
    """A new time to live in ms; 0 for none."""
    if text is None or text == "":
        return 0
    try:
        seconds = text if isinstance(text, int) else parse_duration(text)
    except ValueError as error:
        raise WrongField("new_ttl", str(error)) from None
    if not 1 <= seconds <= MAX_NEW_TTL_S:
        raise WrongField("new_ttl", "must be from 1 second to 30 days")
    return seconds * 1000


def read_limit(value: int | str | None, *, most: int | None = None) -> int | None:
    """How many at most; None for all."""
    if value is None or value == "":
        return None
    text = str(value)
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise WrongField("limit", "must be a whole number of at least 1")
    if most is not None and int(text) > most:
        raise WrongField("limit", f"must be at most {most}")
    return int(text)
