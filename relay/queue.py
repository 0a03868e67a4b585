"""The durable queue in Redis: its scripts, and the one place that knows redis-py.

Every change of an event's state is one Lua script, so a crash leaves it before or
after, never between; counters move in the same script as the event they count.
The contract of each script is the header of its file in `lua/`.

Raises `QueueUnavailable` for whatever Redis is or lacks, never a redis exception;
an error inside a script is our bug and passes through.
"""

import asyncio
import re
import socket
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha1
from importlib.resources import files
from typing import cast

import msgspec
import redis.exceptions as broken
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from relay import forecast
from relay.errors import QueueUnavailable, RelayError
from relay.forecast import LANES, Facts
from relay.limits import Limit, Window
from relay.line import Line, Then, is_reset
from relay.queueable import Request, Waiting

STALE_MS = 20_000  # no heartbeat for so long: dead; with the look-out below < 30 s
LOOK_UP_MS = 120_000  # from an event of unknown fate until it is looked up
DEATHS_MAX = 5  # an event that took so many forwarders with it is set aside
IDLE_CONSUMER_MS = 3_600_000
OPS_CONNECTIONS = 16
REWRITE_WAIT_S = 60.0  # a file of 1 GB, the private server's bound, is written sooner
SERVER_CLOCK = "call('TIME')"  # where lib.lua reads it

_pack = msgspec.msgpack.Encoder().encode


class Claimed(msgspec.Struct, array_like=True):
    """An event in flight; lane and entry are its place, the rest is the event."""

    lane: str
    entry: str
    received_ms: int
    attempts: int  # spent before this one
    id: str
    name: str
    delivery: str  # at_least_once, at_most_once, or verify: and a property
    body: str  # for Voucherify
    doubted_ms: int = 0  # to be looked for from then on, before anything; 0: to be sent

    @property
    def place(self) -> str:
        return f"{self.lane}:{self.entry}"

    @property
    def once(self) -> bool:
        """Whether it must not be sent again when it may have arrived."""
        return self.delivery != "at_least_once"

    @property
    def proof(self) -> str:
        """The property of metadata that names it in Voucherify, if its rule has one."""
        return self.delivery.partition(":")[2]


class Tick(msgspec.Struct, array_like=True):
    """What may be sent now, and when to ask again (-1: when the doorbell rings)."""

    claimed: list[Claimed]
    wait_ms: int
    probe: bool
    doorbell: list[str]  # last id of the lanes high, normal, low; empty: not idle


class Reply(msgspec.Struct, gc=False, array_like=True):
    """What admission says to one request: the tightest limit, and each event."""

    dimension: int  # index into the limits; -1: none
    remaining: int
    reset_us: int
    codes: list[int]  # code and wait in microseconds, in turns, for each event


class Step(msgspec.Struct, array_like=True):
    """How far erasing one person got; see erasure.py."""

    cursor: str  # where to go on; empty at the end
    erased: int
    in_flight: int
    mentions: int


class Letters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which dead letters are meant: all that fit every part that is given."""

    outcome: str = ""
    reason: str = ""
    event: str = ""
    customers: tuple[str, ...] = ()  # digests: any of them
    since_ms: int | None = None  # when it died
    until_ms: int | None = None
    ids: tuple[str, ...] = ()  # of the letters: those alone

    def packed(self) -> bytes:
        """As letters.lua reads it."""
        span = [
            "-" if self.since_ms is None else str(self.since_ms),
            "+" if self.until_ms is None else str(self.until_ms),
        ]
        parts = [self.outcome, self.reason, self.event, self.customers]
        return _pack([*parts, *span, self.ids])


class Counted(msgspec.Struct, array_like=True):
    """Dead letters that have all this in common."""

    outcome: str
    reason: str
    event: str
    obstacle: str  # why they cannot be replayed; empty: they can
    n: int


class Result(msgspec.Struct, array_like=True, kw_only=True):
    """What one call came to, for the settle script."""

    lane: str
    entry: str
    verdict: str
    reason: str
    status: int = 0
    error: str = ""
    delay_ms: int = 0
    signal: str = "none"
    pause_ms: int = 0
    probe: bool = False
    limit: int = -1  # what the answer's headers told of the plan; -1: nothing
    remaining: int = -1
    limit_type: str = ""


Packed = bytes  # a request as the commit script reads it
# Outcome, reason, name or "", how many. Without an outcome it only counts the reason.
Refused = tuple[str, str, str, int]

EVENT_LIMITED, USED_UP, COALESCED = -3, -2, -1
# Whoever waits for a commit: its replies, or why there are none.
Told = Callable[[list[Reply] | QueueUnavailable | None], None]

QUEUED, DUPLICATE, NO_ROOM, LIMITED = 0, 1, 2, 3  # LIMITED + index of the limit

_decode_tick = msgspec.msgpack.Decoder(Tick).decode
_decode_facts = msgspec.msgpack.Decoder(Facts, strict=False).decode
_decode_step = msgspec.msgpack.Decoder(Step).decode
_decode_counts = msgspec.msgpack.Decoder(tuple[str, list[Counted]]).decode
_decode_list = msgspec.msgpack.Decoder(
    tuple[str, list[tuple[str, list[str]]]], strict=False
).decode
_decode_dropped = msgspec.msgpack.Decoder(tuple[str, int]).decode
_decode_replies = msgspec.msgpack.Decoder(list[Reply]).decode


class Script:
    """One script with the shared parts in front, run by its hash."""

    def __init__(self, name: str, *, clock: str, parts: Sequence[str] = ()) -> None:
        home = files("relay") / "lua"
        first, _, rest = (home / f"{name}.lua").read_text("utf-8").partition("\n")
        texts = [(home / f"{part}.lua").read_text("utf-8") for part in ("lib", *parts)]
        shared = "\n".join(texts).replace(SERVER_CLOCK, clock)
        # The interpreter line must stay the first one.
        self.source = f"{first}\n{shared}\n{rest}"
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, client: Redis, prefix: str, *args: object) -> object:
        run = client.evalsha(self.sha, 1, prefix, *cast("tuple[str, ...]", args))
        try:
            return await cast("Awaitable[object]", run)
        except broken.NoScriptError:  # a new or flushed server: nothing was run
            again = client.eval(self.source, 1, prefix, *cast("tuple[str, ...]", args))
            return await cast("Awaitable[object]", again)

    async def on(self, line: Line, prefix: str, *args: str | bytes | int) -> object:
        """The same over a line of its own."""
        try:
            return await line.call("EVALSHA", self.sha, 1, prefix, *args)
        except broken.NoScriptError:
            return await line.call("EVAL", self.source, 1, prefix, *args)

    def now(
        self, line: Line, prefix: str, *args: str | bytes | int, then: Then
    ) -> bool:
        """The same at once, if that can be; who does not know it is not told it."""
        return line.ask("EVALSHA", self.sha, 1, prefix, *args, then=then)


class Scripts:
    """All scripts. A simulation hands in its own clock, as Lua for lib.lua."""

    def __init__(self, *, clock: str = SERVER_CLOCK) -> None:
        self.commit = Script("commit", clock=clock)
        self.tick = Script("tick", clock=clock, parts=["flight", "budget"])
        self.mark = Script("mark", clock=clock, parts=["flight"])
        self.settle = Script("settle", clock=clock, parts=["flight", "budget"])
        self.reap = Script("reap", clock=clock, parts=["flight", "budget"])
        self.forecast = Script("forecast", clock=clock)
        self.token = Script("token", clock=clock)
        self.forget = Script("forget", clock=clock, parts=["flight"])
        self.hold = Script("hold", clock=clock)
        self.dead = Script("dead", clock=clock, parts=["letters"])
        self.replay = Script("replay", clock=clock, parts=["letters"])


def connect(
    url: str, *, timeout: float, connections: int, connect_timeout: float = 2.0
) -> Redis:
    """A client that does what it is told once: redis-py's own retries run a
    timed-out script again, eleven times with its defaults."""
    return Redis.from_url(
        url,
        socket_timeout=timeout,
        socket_connect_timeout=min(timeout, connect_timeout),
        retry=Retry(NoBackoff(), 0),
        retry_on_error=[],
        max_connections=connections,
        health_check_interval=0,
        client_name="relay",
    )


class Queue:
    """The queue of one prefix. Safe to share by everything in one event loop."""

    def __init__(
        self,
        *,
        url: str,
        prefix: str,
        limits: Sequence[Limit] = (),
        budget: Sequence[Window] = (),
        egress: str = "all",
        reserve: float = 0.0,
        queue_max: int = 1_000_000,
        dedupe_ms: int = 86_400_000,
        timeout: float = 1.0,
        stale_ms: int = STALE_MS,
        look_up_ms: int = LOOK_UP_MS,
        scripts: Scripts | None = None,
    ) -> None:
        self._scripts = scripts or Scripts()
        self.prefix = "{" + prefix + "}"
        self.egress = egress
        self.look_up_ms = look_up_ms
        self.limits = tuple(limits)
        self.rate = min((w.quota * 1000 / w.period_ms for w in budget), default=0.0)
        # Commits have connections of their own, and so has delivery: neither stands
        # before the other, nor a dashboard before either.
        self._hot = Line(url, timeout=timeout)
        self._delivery = Line(url, timeout=max(timeout, 2.0))
        patience = max(timeout, 2.0)
        self._ops = connect(
            url,
            timeout=patience,
            connections=OPS_CONNECTIONS,
            connect_timeout=patience,
        )
        # redis-py's pool raises at its limit, which would look like a Redis away.
        self._turns = asyncio.Semaphore(OPS_CONNECTIONS)
        # Blocking reads must outlast their BLOCK; one per waiting request at most.
        self._patient = connect(url, timeout=40.0, connections=256)
        self._commit_settings = _pack(
            [
                queue_max,
                dedupe_ms,
                [
                    [d.dimension, d.emission_us, d.tolerance_us, d.dry_run]
                    for d in limits
                ],
            ]
        )
        self._delivery_settings = _pack(
            [
                egress,
                [[w.quota, w.period_ms] for w in budget],
                reserve,
                stale_ms,
                DEATHS_MAX,
                look_up_ms,
            ]
        )

    async def aclose(self) -> None:
        for client in (self._hot, self._delivery, self._ops, self._patient):
            await client.aclose()

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Wait for one of the few connections for everything else."""
        async with self._turns:
            with _translated():
                yield

    async def commit(
        self,
        slot: str,
        seq: int,
        requests: Sequence[Request | Packed],
        refused: list[Refused],
    ) -> list[Reply]:
        """Take requests in. Sending the same slot and number again is harmless."""
        packed = [r if isinstance(r, bytes) else pack_request(r) for r in requests]
        args = self._commit(slot, seq, packed, refused)
        with _translated():
            said = await self._scripts.commit.on(self._hot, self.prefix, *args)
        return _decode_replies(cast("bytes", said))

    def commit_now(
        self,
        slot: str,
        seq: int,
        requests: Sequence[Packed],
        refused: list[Refused],
        then: Told,
    ) -> bool:
        """The same at once and without a task, if a connection is idle.

        Gives whether it was sent. `then` gets the replies, or why there are none; None
        where that is no matter of Redis' being away, and `commit` will say or mend it.
        """

        def told(said: object) -> None:
            result: list[Reply] | QueueUnavailable | None = None
            if isinstance(said, bytes):
                with suppress(msgspec.MsgspecError):
                    result = _decode_replies(said)
            elif isinstance(said, broken.RedisError) and (reason := _reason(said)):
                result = QueueUnavailable(reason, _SAYS[reason])
            then(result)

        args = self._commit(slot, seq, requests, refused)
        return self._scripts.commit.now(self._hot, self.prefix, *args, then=told)

    def _commit(
        self, slot: str, seq: int, requests: Sequence[Packed], refused: list[Refused]
    ) -> tuple[str, int, bytes, bytes, bytes]:
        settings = self._commit_settings
        return slot, seq, settings, b"".join(requests), _pack(refused)

    async def tick(
        self,
        consumer: str,
        wanted: int,
        *,
        look_out: bool,
        held: Iterable[str] = (),
    ) -> Tick:
        """Claim what may be sent now.

        With `look_out`, take over what dead forwarders left, and give back what this
        one has been given without learning of it: all but `held` ("lane:entry").
        """
        with _translated():
            said = await self._scripts.tick.on(
                self._delivery,
                self.prefix,
                consumer,
                wanted,
                self._delivery_settings,
                "1" if look_out else "0",
                _pack(list(held)),
            )
        return _decode_tick(cast("bytes", said))

    async def mark(self, consumer: str, claimed: Sequence[Claimed]) -> list[bool]:
        """Note durably that these are about to be sent. False: no longer ours."""
        places = [part for c in claimed for part in (c.lane, c.entry)]
        with _translated():
            said = await self._scripts.mark.on(
                self._delivery, self.prefix, consumer, *places
            )
        return [mine == 1 for mine in cast("list[int]", said)]

    async def settle(self, consumer: str, results: Sequence[Result]) -> int:
        """Give each its outcome or its next try; returns how many were still ours."""
        with _translated():
            said = await self._scripts.settle.on(
                self._delivery,
                self.prefix,
                consumer,
                self._delivery_settings,
                _pack(list(results)),
            )
        return cast("int", said)

    async def reap(self) -> dict[str, str]:
        """Keep house, and look ahead; returns the gauges, at most a second old."""
        async with self._asking():
            said = await self._scripts.reap(
                self._ops, self.prefix, self._delivery_settings, IDLE_CONSUMER_MS
            )
        flat, packed = cast("tuple[list[bytes], bytes]", said)
        gauges = _named([part.decode() for part in flat])
        return gauges | await self._look_ahead(packed) if packed else gauges

    async def _look_ahead(self, packed: bytes) -> dict[str, str]:
        """Forecast from one look at the queue, and say it where all can read it."""
        facts = _decode_facts(packed)
        held = forecast.pace(facts)
        etas = forecast.etas_s(facts, held) or [facts.wait_ms // 1000] * len(LANES)
        gauges = {"eta_s": max(etas)}
        gauges |= {f"eta_s_{n}": eta for n, eta in zip(LANES, etas, strict=True)}
        paces = {**msgspec.structs.asdict(held), "at_ms": facts.now_ms}
        said = [
            _pack([part for pair in fields.items() for part in pair])
            for fields in (gauges, paces)
        ]
        async with self._asking():
            await self._scripts.forecast(self._ops, self.prefix, *said)
        return {name: str(value) for name, value in gauges.items()}

    async def hold(self, reason: str) -> tuple[int, str, str]:
        """Hold delivery by hand, for every process, until `resume`.

        Gives since when in ms, the reason that stands, and the automatic hold or "".
        """
        return await self._by_hand("hold", reason)

    async def resume(self) -> tuple[int, str, str]:
        """Lift the hold by hand, and let an automatic one probe at once.

        Gives since when it was held by hand in ms, 0 if it was not; likewise the rest.
        """
        return await self._by_hand("resume", "")

    async def _by_hand(self, what: str, reason: str) -> tuple[int, str, str]:
        async with self._asking():
            said = await self._scripts.hold(self._ops, self.prefix, what, reason)
        since_ms, told, automatic = cast("tuple[int, bytes, bytes]", said)
        return since_ms, told.decode(), automatic.decode()

    async def doorbell(self, last: Sequence[str], block_ms: int) -> None:
        """Return when a lane has an entry newer than `last`, or after `block_ms`.

        Reads without the group: cancelling it strands nothing.
        """
        lanes = dict(
            zip(
                (f"{self.prefix}:q:{lane}" for lane in LANES),
                last,
                strict=True,
            )
        )
        with _translated():
            await self._patient.xread(
                cast(
                    "dict[bytes | str | memoryview, int | bytes | str | memoryview]",
                    lanes,
                ),
                count=1,
                block=max(1, block_ms),
            )

    async def expect(self, event: Waiting, seconds: int) -> None:
        """Ask for the outcome of an event to be told; before it is committed."""
        async with self._asking():
            await self._ops.set(self._wait_key(event), "", px=(seconds + 5) * 1000)

    def _wait_key(self, event: Waiting) -> str:
        customer, digest = event.customer, id_digest(event.id)
        return f"{self.prefix}:wait:{customer}:{digest}"

    async def outcome(self, event: Waiting, seconds: float) -> dict[str, object] | None:
        """Wait for an expected outcome; None when it is not known by then.

        `{"outcome", "reason"?, "upstream_status"?, "error"?: {"key"?, "message"?,
        "details"?, "request_id"?}}`
        """
        key = f"{self._wait_key(event)}:outcome"
        with _translated():
            told = await cast(
                "Awaitable[list[bytes] | None]",
                self._patient.blpop([key], timeout=seconds),
            )
        if told is None:
            return None
        outcome = msgspec.json.decode(told[1], type=dict[str, object])
        if error := outcome.get("error"):  # Voucherify's words, packed as JSON
            with suppress(msgspec.DecodeError):
                outcome["error"] = msgspec.json.decode(str(error))
        return outcome

    async def ping(self) -> None:
        """Fail if Redis does not answer."""
        async with self._asking():
            await self._ops.ping()

    async def hash(self, key: str) -> dict[str, str]:
        """One of the documented hashes: `totals`, `gauges`, `minute:…`, `hour:…`."""
        async with self._asking():
            found = await cast(
                "Awaitable[dict[bytes, bytes]]",
                self._ops.hgetall(f"{self.prefix}:{key}"),
            )
        return {name.decode(): value.decode() for name, value in found.items()}

    async def keep_names(self, names: Sequence[str]) -> None:
        """Count these events by name always; others only while they are frequent."""
        key = f"{self.prefix}:catalog"
        async with self._asking(), self._ops.pipeline(transaction=True) as pipe:
            pipe.delete(key)
            if names:
                pipe.sadd(key, *names)
            await pipe.execute()

    async def now(self) -> datetime:
        """The server's clock, which every window and every age goes by."""
        async with self._asking():
            seconds, micros = await cast("Awaitable[list[int]]", self._ops.time())
        return datetime.fromtimestamp(seconds + micros / 1e6, UTC)

    async def probe(self) -> list[str]:
        """Look at the server once, at start. Returns warnings, each with its cure.

        Raises `RelayError` for a server that would lose events: too old, or one
        that evicts keys when its memory is full.
        """
        async with self._asking():
            info = cast(
                "dict[str, object]", await cast("Awaitable[object]", self._ops.info())
            )
        return _judge(info)

    async def server(self) -> dict[str, str]:
        """What the server says of itself; `unfit` says why it may not be used."""
        async with self._asking():
            info = cast(
                "dict[str, object]", await cast("Awaitable[object]", self._ops.info())
            )
        told = {name: str(value) for name, value in info.items()}
        try:
            _judge(info)
        except RelayError as error:
            told["unfit"] = str(error)
        return told

    async def forget(
        self, place: str, cursor: str, size: int, customer: str, needle: str
    ) -> Step:
        """Erase a person's events from the next `size` entries of one place."""
        async with self._asking():
            said = await self._scripts.forget(
                self._ops, self.prefix, place, cursor, size, customer, needle
            )
        return _decode_step(cast("bytes", said))

    async def count_letters(
        self,
        letters: Letters,
        cursor: str,
        size: int,
        *,
        ttl_ms: int,
        new_ttl_ms: int,
        may_pay_twice: bool,
    ) -> tuple[str, list[Counted]]:
        """Count among the next `size` dead letters; the cursor is empty at the end."""
        twice = "1" if may_pay_twice else "0"
        said = await self._dead(
            "count", letters, cursor, size, ttl_ms, new_ttl_ms, twice
        )
        return _decode_counts(said)

    async def list_letters(
        self, letters: Letters, cursor: str, size: int, most: int
    ) -> tuple[str, list[tuple[str, dict[str, str]]]]:
        """Give the newest dead letters without their bodies, and the cursor."""
        said = await self._dead("list", letters, cursor, size, most)
        after, found = _decode_list(said)
        return after, [(entry, _named(flat)) for entry, flat in found]

    async def drop_letters(
        self, letters: Letters, cursor: str, size: int, most: int
    ) -> tuple[str, int]:
        """Drop up to `most` of the next `size` dead letters; cursor, and how many."""
        return _decode_dropped(await self._dead("drop", letters, cursor, size, most))

    async def _dead(self, what: str, letters: Letters, *args: object) -> bytes:
        async with self._asking():
            said = await self._scripts.dead(
                self._ops, self.prefix, what, letters.packed(), *args
            )
        return cast("bytes", said)

    async def letter(self, entry: str) -> dict[str, str] | None:
        """One dead letter whole, with its body."""
        async with self._asking():
            found = await self._ops.xrange(f"{self.prefix}:dead", entry, entry)
        fields = cast("list[tuple[bytes, dict[bytes, bytes]]]", found)
        if not fields:
            return None
        return {
            n.decode(): v.decode("utf-8", "replace") for n, v in fields[0][1].items()
        }

    async def replay(self, what: str, run: str, owner: str, *args: object) -> list[str]:
        """One step of a replay; replay.py has the only use, replay.lua the contract."""
        async with self._asking():
            said = await self._scripts.replay(
                self._ops, self.prefix, what, run, owner, *args
            )
        return [part.decode() for part in cast("list[bytes]", said)]

    async def forget_marks(self, digests: Sequence[str]) -> int:
        """Erase what limits and the comparison of ids keep under these digests."""
        wanted = {digest.encode() for digest in digests}
        erased = 0
        if not wanted:
            return 0
        dimension = "customer"
        for key in (
            f"{self.prefix}:limit:{dimension}",
            f"{self.prefix}:limit:{dimension}:before",
        ):
            async with self._asking():
                erased += await self._ops.hdel(key, *wanted)
        # The newest one first: meanwhile it may become the one before.
        for key in (
            f"{self.prefix}:seen",
            f"{self.prefix}:seen:before",
            f"{self.prefix}:seen:oldest",
            f"{self.prefix}:made",
            f"{self.prefix}:made:before",
        ):
            for digest in digests:
                erased += await self._forget_fields(key, f"{digest}:*")
        # Of the whole server, since Redis cannot look for keys in another way; in
        # steps, so that others come between.
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", self.prefix) + ":*"
        cursor = 0
        while True:
            async with self._asking():
                cursor, keys = await self._ops.scan(cursor, match=pattern, count=1000)
                # A row behind a lane names events, and goes with the last of them.
                theirs = [
                    key
                    for key in cast("list[bytes]", keys)
                    if not wanted.isdisjoint(parts := key.split(b":"))
                    and b"behind" not in parts
                ]
                if theirs:
                    erased += await self._ops.unlink(*theirs)
            if cursor == 0:
                return erased

    async def _forget_fields(self, key: str, pattern: str) -> int:
        """Take the fields of this form out of a hash, in steps."""
        erased = cursor = 0
        while True:
            async with self._asking():
                cursor, found = await self._ops.hscan(
                    key, cursor, match=pattern, count=1000
                )
                if found:
                    erased += await self._ops.hdel(key, *found)
            if cursor == 0:
                return erased

    async def rewrite_log(self) -> None:
        """Have Redis write its append-only file anew, without what was erased, and
        empty its slow log, which keeps what slow commands were called with.

        Returns when it has begun; only for a server that is the relay's alone.
        """
        async with self._asking():
            await self._ops.slowlog_reset()
        deadline = time.monotonic() + REWRITE_WAIT_S
        while time.monotonic() < deadline:
            try:
                async with self._asking():
                    await self._ops.bgrewriteaof()
                    return
            except broken.ResponseError as error:
                if "in progress" not in str(error):
                    msg = f"Redis does not write its file anew: {error}."
                    raise RelayError(msg) from error
            # One is under way, and what it writes is from before.
            await asyncio.sleep(0.1)
        raise QueueUnavailable(
            "redis_busy", "Redis is still writing its file: run it again in a minute."
        )

    async def token(
        self, name: str, *, who: str, lock_ms: int = 0
    ) -> tuple[dict[str, str], int, bool]:
        """The token that all relays share under a name, the ms it lives on, and
        whether `who` has the lock now; `lock_ms` asks for it."""
        async with self._asking():
            said = await self._scripts.token(
                self._ops, self.prefix, name, who, "look", lock_ms
            )
        flat, left_ms, mine = cast("tuple[list[bytes], int, int]", said)
        parts = [part.decode() for part in flat]
        return dict(zip(parts[::2], parts[1::2], strict=True)), left_ms, mine == 1

    async def keep_token(
        self,
        name: str,
        fields: Mapping[str, str],
        *,
        who: str,
        replaces: int,
        life_ms: int,
    ) -> int:
        """Share a token; its generation, or 0 if there is a newer one already."""
        flat = [part for pair in fields.items() for part in pair]
        async with self._asking():
            said = await self._scripts.token(
                self._ops, self.prefix, name, who, "keep", replaces, life_ms, *flat
            )
        return cast("int", said)

    async def token_worked(self, name: str, *, who: str, generation: int) -> None:
        """Note for all relays that Voucherify takes this token."""
        async with self._asking():
            await self._scripts.token(
                self._ops, self.prefix, name, who, "worked", generation
            )

    async def unlock_token(self, name: str, *, who: str) -> None:
        """Let others renew it, if `who` still has the lock."""
        async with self._asking():
            await self._scripts.token(self._ops, self.prefix, name, who, "unlock")


def _named(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _judge(info: dict[str, object]) -> list[str]:
    version = str(info.get("valkey_version") or info.get("redis_version", "0"))
    least = (7, 2) if "valkey_version" in info else (7, 0)
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        msg = (
            f"The Redis server is version {version}: Redis 7.0 or Valkey 7.2 is the "
            "least. Update it, or leave RELAY_REDIS_URL out for the embedded one."
        )
        raise RelayError(msg)
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys"):
        msg = (
            f"The Redis server evicts keys when its memory is full ({policy}), and "
            "with them accepted events: set `maxmemory-policy noeviction`."
        )
        raise RelayError(msg)
    warnings = []
    if policy != "noeviction":
        warnings.append(
            f"Redis may evict limits and duplicate marks ({policy}): set "
            "`maxmemory-policy noeviction`."
        )
    if not info.get("aof_enabled"):
        warnings.append(
            "Redis keeps no append-only file: a restart loses accepted events. Set "
            "`appendonly yes`."
        )
    return warnings


def id_digest(event_id: str) -> str:
    """What stands for an event's id in a key; lib.lua has the same."""
    return sha1(event_id.encode(), usedforsecurity=False).hexdigest()[:20]


def pack_request(request: Request) -> Packed:
    """A request as commit.lua reads it."""
    address, events = request
    parts: list[object] = [len(events), address]
    for event in events:
        parts += event
    return _pack(parts)


def consumer_name() -> str:
    """A name for this forwarder that no other has had."""
    return f"{socket.gethostname()[:40]}-{time.time_ns():x}"


# Answers of a server that is there but cannot take anything now.
_NOT_NOW = {
    "OOM": "redis_full",
    "MISCONF": "redis_disk",
    "READONLY": "redis_readonly",
    "LOADING": "redis_loading",
    "BUSY": "redis_busy",
    "MASTERDOWN": "redis_readonly",
    "NOREPLICAS": "redis_readonly",
    "CLUSTERDOWN": "redis_unreachable",
    "TRYAGAIN": "redis_unreachable",
    "STALE": "redis_timeout",
    "NOAUTH": "redis_auth",
    "WRONGPASS": "redis_auth",
    "NOPERM": "redis_auth",
}
# redis-py strips the prefix of some answers and raises a class instead.
_CLASSES: list[tuple[type[Exception], str]] = [
    (broken.OutOfMemoryError, "redis_full"),
    (broken.ReadOnlyError, "redis_readonly"),
    (broken.BusyLoadingError, "redis_loading"),
    (broken.AuthenticationError, "redis_auth"),
    (broken.AuthorizationError, "redis_auth"),
    (broken.NoPermissionError, "redis_auth"),
    (broken.TimeoutError, "redis_timeout"),
    (broken.ConnectionError, "redis_unreachable"),
    (broken.InvalidResponse, "redis_foreign"),
]
_SAYS = {
    "redis_full": "Redis is out of memory",
    "redis_disk": "Redis cannot write to its disk",
    "redis_readonly": "Redis takes no writes now",
    "redis_loading": "Redis is loading its data",
    "redis_busy": "Redis is busy with a script",
    "redis_timeout": "Redis did not answer in time",
    "redis_unreachable": "Redis cannot be reached",
    "redis_foreign": "What answers there does not speak Redis' protocol",
    "redis_auth": "Redis refuses the relay's credentials",
}


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except broken.RedisError as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise QueueUnavailable(reason, f"{_SAYS[reason]}: try again soon.") from error
    except (OSError, RuntimeError) as error:
        # A connection that broke outside redis-py's own code.
        if isinstance(error, RuntimeError) and not is_reset(error):
            raise
        raise QueueUnavailable(
            "redis_unreachable", f"{_SAYS['redis_unreachable']}: try again soon."
        ) from error
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        # redis-py swallows a cancellation that meets it at certain points; the task
        # would go on, and whoever cancelled it would wait for ever.
        raise asyncio.CancelledError


def _reason(error: broken.RedisError) -> str | None:
    """The code for an answer or a failure; None for an error of our own making."""
    for kind, reason in _CLASSES:
        if isinstance(error, kind):
            return reason
    return _NOT_NOW.get(str(error).partition(" ")[0])
