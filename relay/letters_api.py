"""Dead letters for programs: what `/dead-letters…` of the ops listener does.

The answers as values, without HTTP; ops.py says who may ask. A replay that is begun
here runs as a task of this process, one at a time in the whole relay, and ends with
it: then it can be resumed, here or by the command.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import msgspec
import structlog

from relay.dead_letters import (
    MAX_PAGE,
    WrongField,
    cost,
    drop,
    page,
    read_entry,
    read_letters,
    read_limit,
    read_new_ttl,
    survey,
    told_cost,
    told_reasons,
    told_whole,
)
from relay.digests import Digests
from relay.errors import QueueUnavailable, RelayError
from relay.outcomes import letter_cure
from relay.queue import Letters, Queue
from relay.replay import (
    POLL_S,
    Plan,
    Replay,
    ReplayBusy,
    last_progress,
    told_progress,
)

PAGE = 100
LAST_STEP_S = 2.0  # for a replay to say that it was interrupted, when this ends
FILTERS = ("outcome", "reason", "event", "customer", "since", "until")

MAX_SAID = 160  # characters of a parser's complaint

T = TypeVar("T", bound=msgspec.Struct)
Json = dict[str, object]

log = structlog.get_logger()


class Wanted(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which letters a program means; without any part, all of them."""

    outcome: str | None = None
    reason: str | None = None
    event: str | None = None
    customer: str | None = None
    since: str | None = None
    until: str | None = None
    limit: int | None = None
    ids: list[str] | None = None


class DropWanted(Wanted, kw_only=True):
    all: bool = False  # said when no other part is


class ReplayWanted(Wanted, kw_only=True):
    yes_it_may_pay_twice: bool = False
    new_ttl: int | str | None = None  # seconds, or a duration like "24h"
    dry_run: bool = False
    resume: bool = False


class Refused(RelayError):
    """It is understood, and not done now; `reason` is the code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class LettersApi:
    """The dead letters of one queue. Raises `WrongField`, `Refused`."""

    def __init__(
        self,
        queue: Queue,
        *,
        ttl_ms: int,
        queue_max: int,
        digests: Digests | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self._queue = queue
        self._ttl_ms = ttl_ms
        self._queue_max = queue_max
        self._digests = digests
        self._poll_s = poll_s
        self._running: Replay | None = None
        self._task: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Interrupt what is running."""
        if self._running is None or self._task is None:
            return
        self._running.stop()
        await asyncio.wait({self._task}, timeout=LAST_STEP_S)
        self._task.cancel()  # Redis is away; its lease runs out by itself
        await asyncio.gather(self._task, return_exceptions=True)

    async def list(self, query: Sequence[tuple[str, str]]) -> Json:
        """`GET /dead-letters`: counts with cures on the first page, and the newest."""
        given = _once(query, {*FILTERS, "limit", "after"})
        after = given.pop("after", "")
        if after:
            read_entry("after", after)
        most = read_limit(given.pop("limit", None), most=MAX_PAGE) or PAGE
        letters = await self._letters(**given)
        found, more = await page(self._queue, letters, most=most, after=after)
        told: Json = {"letters": found, "after": more or None}
        if not after:
            seen = await survey(self._queue, letters, ttl_ms=self._ttl_ms)
            told["counts"] = told_reasons(seen)
        return told

    async def show(self, entry: str) -> Json | None:
        """`GET /dead-letters/{id}`: all of one, personal data too."""
        read_entry("id", entry)
        fields = await self._queue.letter(entry)
        if fields is None:
            return None
        told = told_whole(entry, fields)
        cure = letter_cure(fields.get("outcome", ""), fields.get("reason", ""))
        return told | {"cure": cure}

    async def drop(self, body: bytes) -> Json:
        """`POST /dead-letters/drop`."""
        wanted = _decode(body, DropWanted)
        letters, most = await self._wanted(wanted), read_limit(wanted.limit)
        if letters == Letters() and not wanted.all:
            raise WrongField("all", "say true to drop all of them, or give a filter")
        dropped = await drop(self._queue, letters, most=most)
        log.warning("letters.dropped", dropped=dropped)
        return {"dropped": dropped}

    async def progress(self) -> Json:
        """`GET /dead-letters/replay`: how far the last one got, whoever runs it."""
        progress = await last_progress(self._queue)
        return {"replay": told_progress(progress) if progress else None}

    async def replay(self, body: bytes) -> tuple[int, Json]:
        """`POST /dead-letters/replay`: its cost, and that it has begun."""
        wanted = _decode(body, ReplayWanted)
        if wanted.resume:
            running = self._replay()
            await running.resume()
            return 202, self._run(running)
        plan = Plan(
            letters=await self._wanted(wanted),
            limit=read_limit(wanted.limit),
            new_ttl_ms=read_new_ttl(wanted.new_ttl),
            may_pay_twice=wanted.yes_it_may_pay_twice,
        )
        seen = await survey(
            self._queue,
            plan.letters,
            ttl_ms=self._ttl_ms,
            new_ttl_ms=plan.new_ttl_ms,
            may_pay_twice=plan.may_pay_twice,
        )
        price = await cost(self._queue, seen, plan.limit)
        told: Json = {"cost": told_cost(price)}
        if wanted.dry_run:
            return 200, told
        if not price.calls:
            _refuse(seen.skipped())
        running = self._replay()
        await running.begin(plan, price.calls)
        return 202, told | self._run(running)

    def _replay(self) -> Replay:
        if self._task is not None and not self._task.done():
            raise ReplayBusy("A replay is running already: wait for its end.")
        return Replay(
            self._queue,
            ttl_ms=self._ttl_ms,
            queue_max=self._queue_max,
            poll_s=self._poll_s,
        )

    def _run(self, running: Replay) -> Json:
        self._running = running
        self._task = asyncio.create_task(_go(running))
        return {"replay": told_progress(running.progress)}

    async def _wanted(self, wanted: Wanted) -> Letters:
        given = {name: getattr(wanted, name) for name in FILTERS}
        return await self._letters(ids=wanted.ids or (), **given)

    async def _letters(
        self, *, ids: Sequence[str] = (), **filters: str | None
    ) -> Letters:
        now_ms = int((await self._queue.now()).timestamp() * 1000)
        return read_letters(now_ms=now_ms, ids=ids, digests=self._digests, **filters)


async def _go(running: Replay) -> None:
    try:
        async for _ in running.run():
            pass
    except (ReplayBusy, QueueUnavailable) as error:
        log.warning("replay.given_up", error=type(error).__name__)
    except Exception:
        # The top of the task: what it has sent is in the queue, the rest untouched.
        log.exception("replay.failed")


def _refuse(skipped: dict[str, int]) -> NoReturn:
    if "ambiguous" in skipped:
        raise Refused("ambiguous", may_pay_twice(skipped["ambiguous"]))
    counts = ", ".join(f"{n} {why}" for why, n in skipped.items()) or "none fit"
    raise Refused("nothing_to_replay", f"There is nothing to replay: {counts}.")


def may_pay_twice(n: int) -> str:
    """What an operator must do before the ambiguous ones are sent again."""
    return f"{n} may have arrived, and would pay twice. {letter_cure('ambiguous', '')}"


def _once(query: Sequence[tuple[str, str]], known: set[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in query:
        if name not in known:
            names = ", ".join(sorted(known))
            raise WrongField(name[:40], f"is not known here; there are {names}")
        if name in given:
            raise WrongField(name, "give it once")
        given[name] = value
    return given


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        said = str(error)[:MAX_SAID]  # cut: it quotes names that it does not know
        named = re.search(r"\$\.(\w+)|field `(\w+)`", said)
        raise WrongField(named[1] or named[2] if named else "body", said) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise WrongField("body", "must be a JSON object") from None
