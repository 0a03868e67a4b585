"""Workers that die at a named step: `python -m tests.doomed`.

One process with everything imported, which forks a worker for each order that it
reads, one JSON a line, and writes a line for what the worker said and one for how it
ended. The worker is the relay's own forwarder, queue and client of Voucherify; the
steps are put around these from here, and the product knows nothing of them.
"""

import asyncio
import contextlib
import gc
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, BinaryIO, cast

import msgspec
import redis.asyncio
from pydantic import SecretStr

from relay import assembly, cli, forwarder
from relay.cluster import Keys
from relay.forwarder import Forwarder
from relay.queue import Claimed, Queue, Result, Scripts, Tick
from relay.verdicts import Answer
from relay.voucherify import Voucherify
from tests.support import eventually

# What a takeover takes, at about a fortieth: 20 s without a heartbeat, a look-out each
# 4 s, and at least a heartbeat a second.
STALE_MS = 500
LOOK_OUT_S = 0.1
LOOK_UP_MS = 100
NAP_S = 0.1
DELIVERED_WITHIN_S = 120.0

LANES = ("high", "normal", "low")
PLACES = (*LANES, "retry", *(f"{lane}:behind" for lane in LANES))


class Order(msgspec.Struct, kw_only=True, frozen=True):
    """One worker: whose events it delivers, and where it dies."""

    run: int
    redis: str
    prefix: str
    cluster: str
    application_id: str
    client_token: str
    origin: str
    server_keys: tuple[str, str] | None = None  # instead: those of the server API
    step: str = ""  # nowhere: it delivers all there is, and ends
    part: float = 0.0  # that leaves at `first bytes`: of the head, beyond 1 of the body
    server: int = 0  # of the Redis that is killed at the step
    survives: bool = False  # it is Redis alone that dies
    wrong: str = ""  # an order of things that loses, or sends twice


class Report(msgspec.Struct, kw_only=True, frozen=True):
    """What became of a worker: something said, or how it ended."""

    run: int
    said: str = ""
    ended: int | None = None  # -9: by SIGKILL


class Death:
    """The step at which a worker dies, and how."""

    def __init__(self, order: Order, said: int) -> None:
        self._order = order
        self._said = said
        self._over = False

    def is_at(self, step: str) -> bool:
        return step == self._order.step and not self._over

    def now(self) -> None:
        """Nothing of this process runs on after the signal."""
        os.write(self._said, self._order.step.encode())
        os.kill(os.getpid(), signal.SIGKILL)

    async def at(self, step: str) -> None:
        if not self.is_at(step):
            return
        self._over = True
        if self._order.server:
            os.kill(self._order.server, signal.SIGKILL)
            await _gone(self._order.redis.removeprefix("unix://"))
        if not self._order.survives:
            self.now()
        os.write(self._said, step.encode())

    def on_the_wire(self, transport: asyncio.Transport) -> asyncio.Transport:
        return cast("asyncio.Transport", Wire(transport, self, self._order.part))


async def _gone(path: str) -> None:
    with contextlib.suppress(OSError):
        while True:
            _, writer = await asyncio.open_unix_connection(path)
            writer.close()


class Wire:
    """A connection to Voucherify that ends before, within or behind a request."""

    def __init__(self, transport: asyncio.Transport, death: Death, part: float) -> None:
        self._transport = transport
        self._death = death
        self._part = part
        self._request = b""

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def writelines(self, parts: Iterable[bytes]) -> None:
        self.write(b"".join(parts))

    def write(self, data: bytes) -> None:
        # asyncio hands to the kernel at once what fits; a request of this size does.
        if self._death.is_at("connected"):
            self._death.now()
        if self._death.is_at("first bytes"):
            self._transport.write(data[: self._first_bytes(data)])
            self._death.now()
        self._transport.write(data)
        self._request += bytes(data)
        head, _, body = self._request.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
        whole = len(body) == int(length or -1)
        if whole and self._death.is_at("whole request"):
            self._death.now()

    def _first_bytes(self, data: bytes) -> int:
        head, found, body = data.partition(b"\r\n\r\n")
        assert body, "head and body have left apart"
        n = min(self._part, 1) * (len(head) + len(found))
        n += max(self._part - 1, 0) * len(body)
        return min(max(int(n), 1), len(data) - 1)


class Loop(asyncio.SelectorEventLoop):
    """Connects over TCP to nobody but Voucherify, and there by a `Wire`."""

    death: Death

    async def create_connection(  # type: ignore[override]  # hands all of it on
        self, factory: Callable[[], asyncio.Protocol], *args: Any, **named: Any
    ) -> object:
        def wired() -> asyncio.Protocol:
            protocol = factory()
            made = protocol.connection_made

            def connection_made(transport: asyncio.BaseTransport) -> None:
                made(self.death.on_the_wire(cast("asyncio.Transport", transport)))

            protocol.connection_made = connection_made  # type: ignore[method-assign]
            return protocol

        return await super().create_connection(wired, *args, **named)


class DoomedQueue(Queue):
    """The queue of a worker that dies before or after a call of it."""

    def __init__(self, order: Order, death: Death) -> None:
        super().__init__(
            url=order.redis,
            prefix=order.prefix,
            timeout=5.0,
            stale_ms=STALE_MS,
            look_up_ms=LOOK_UP_MS,
            scripts=_scripts(),
        )
        self._death = death
        self._wrong = order.wrong
        self._late: list[Claimed] = []

    async def tick(
        self,
        consumer: str,
        wanted: int,
        *,
        look_out: bool,
        held: Iterable[str] = (),
    ) -> Tick:
        tick = await super().tick(consumer, wanted, look_out=look_out, held=held)
        if tick.claimed:
            await self._death.at("claimed")
        if tick.claimed and self._wrong == "settled before it is sent":
            await self._call_delivered(consumer, tick.claimed)
        return tick

    async def _call_delivered(self, consumer: str, claimed: list[Claimed]) -> None:
        early = [
            Result(lane=c.lane, entry=c.entry, verdict="delivered", reason="early")
            for c in claimed
        ]
        await super().settle(consumer, early)

    async def mark(self, consumer: str, claimed: Sequence[Claimed]) -> list[bool]:
        if self._wrong == "marked after it is sent":
            self._late = list(claimed)
            return [True for _ in claimed]
        return await super().mark(consumer, claimed)

    async def settle(self, consumer: str, results: Sequence[Result]) -> int:
        if self._late:
            await super().mark(consumer, self._late)
        await self._death.at("before settle")
        settled = await super().settle(consumer, results)
        await self._death.at("after settle")
        return settled


class DoomedUpstream:
    """Voucherify's client, in a worker that dies before or after a call."""

    def __init__(self, upstream: Voucherify, death: Death) -> None:
        self._upstream = upstream
        self._death = death

    async def send(self, body: bytes) -> Answer:
        await self._death.at("marked")
        answer = await self._upstream.send(body)
        await self._death.at("answered")
        return answer

    async def look_up(self, body: bytes, *, proof: str, since_ms: int) -> Answer:
        await self._death.at("in doubt")
        answer = await self._upstream.look_up(body, proof=proof, since_ms=since_ms)
        await self._death.at("looked up")
        return answer


@cache
def _scripts() -> Scripts:
    return Scripts()


@cache
def _voucherify(url: str, app_id: str, token: str, origin: str | None) -> Voucherify:
    """Made before the fork: it reads every certificate of the machine. It connects
    only when it first sends."""
    return Voucherify(
        base_url=url,
        api="server" if origin is None else "client",
        origin=origin,
        keys=Keys(app_id=app_id, token=SecretStr(token)),
    )


def _upstream(order: Order) -> Voucherify:
    if order.server_keys is not None:
        return _voucherify(order.cluster, *order.server_keys, None)
    return _voucherify(
        order.cluster, order.application_id, order.client_token, order.origin
    )


async def left(client: "redis.asyncio.Redis", prefix: str) -> int:
    """How many events wait or are in flight."""
    async with client.pipeline(transaction=True) as asked:
        for place in PLACES:
            asked.xlen(f"{{{prefix}}}:q:{place}")
        asked.zcard(f"{{{prefix}}}:delayed")
        return sum(cast("list[int]", await asked.execute()))


async def _work(order: Order, death: Death) -> None:
    queue, upstream = DoomedQueue(order, death), _upstream(order)
    # One at a time, so that what else waits is not touched by the death.
    worker = Forwarder(
        queue=queue,
        upstream=DoomedUpstream(upstream, death),
        concurrency=1,
        look_out_s=LOOK_OUT_S,
    )
    working = asyncio.create_task(worker.run())
    async with redis.asyncio.Redis.from_url(order.redis) as client:

        async def empty() -> bool:
            with contextlib.suppress(redis.RedisError):  # killed, and soon back
                return await left(client, order.prefix) == 0
            return False

        await eventually(empty, within=DELIVERED_WITHIN_S)
    worker.stop()
    await working
    await upstream.aclose()
    await queue.aclose()


def _run(order: Order, said: int) -> None:
    loop = Loop()
    loop.death = death = Death(order, said)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(_work(order, death))


def _fork(order: Order) -> tuple[int, BinaryIO]:
    """Start a worker; its process, and where it says at which step it dies."""
    _scripts()
    _upstream(order)
    heard, said = os.pipe()
    pid = os.fork()
    if pid:
        os.close(said)
        return pid, os.fdopen(heard, "rb", buffering=0)
    status = 1
    try:
        os.dup2(2, 1)  # standard output is for reports
        _run(order, said)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _tell(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


class Parent:
    """Forks a worker for each order, and tells what becomes of it."""

    def __init__(self) -> None:
        self._living: dict[int, tuple[Order, BinaryIO]] = {}
        self._waiting = selectors.DefaultSelector()
        self._rest = b""

    def run(self) -> None:
        """Return when there are no more orders; then no worker is left either."""
        self._waiting.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self._waiting.select():
                if key.fd != 0:
                    self._hear(cast("int", key.data))
                elif not self._obey(os.read(0, 1 << 16)):
                    for pid in self._living:
                        os.kill(pid, signal.SIGKILL)
                    return

    def _obey(self, read: bytes) -> bool:
        *lines, self._rest = (self._rest + read).split(b"\n")
        for line in lines:
            order = msgspec.json.decode(line, type=Order)
            pid, ear = _fork(order)
            self._living[pid] = order, ear
            self._waiting.register(ear, selectors.EVENT_READ, pid)
        return bool(read)

    def _hear(self, pid: int) -> None:
        order, ear = self._living[pid]
        if said := ear.read(100):
            return _tell(Report(run=order.run, said=said.decode()))
        self._waiting.unregister(ear)
        ear.close()
        del self._living[pid]
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        return _tell(Report(run=order.run, ended=ended))


def relay() -> None:
    """Run `relay …` whole, with the short times of this module."""
    forwarder.NAP_S = NAP_S
    vars(assembly).update(
        Queue=partial(Queue, stale_ms=STALE_MS, look_up_ms=LOOK_UP_MS),
        Forwarder=partial(Forwarder, look_out_s=LOOK_OUT_S),
    )
    cli.main()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        relay()
    else:
        forwarder.NAP_S = NAP_S
        gc.freeze()  # or each worker would copy what it only reads
        Parent().run()
