"""The hot route as a plain ASGI callable: read, decide, admit, answer.

The decision is `edge.py`'s; this is the adapter between it, ASGI and the queue. It
keeps to one future a request and nothing else: a Starlette route and its middleware
would cost more than the whole admission.

An answer never leaves an unread body behind it: what is refused early is read to its
end within the same time and a bound, or the connection closes. It does not limit the
size of headers or the time they take; a proxy in front does.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import structlog
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from relay.admission import Admission
from relay.answers import Response, Written
from relay.edge import MAX_BODY_BYTES, TAKEN, Admitted, Edge, Fate, Head
from relay.errors import QueueUnavailable
from relay.headers import Fields, fields_of
from relay.limits import Limit
from relay.outcomes import Outcome
from relay.queue import (
    COALESCED,
    DUPLICATE,
    EVENT_LIMITED,
    LIMITED,
    NO_ROOM,
    QUEUED,
    USED_UP,
    Reply,
)
from relay.queueable import Waiting

BODY_TIMEOUT_S = 10.0  # for a whole body of at most 64 KiB
MAX_WAITERS = 100  # answers held back at once by `Prefer: wait`
# Voucherify's client API takes 5 calls in 5 s from one address ("Limits"), so more
# events than this would not all be delivered within the longest wait anyway.
MAX_WAITED_EVENTS = 20
LAST_LOOK_S = 0.01  # for an outcome when the time is up
# What is read of a body that is refused: to close on a sender who still sends makes a
# reset of the answer, and its page sees a network failure without a reason.
MAX_DISCARDED_BYTES = 1024 * 1024

log = structlog.get_logger()

_CLOSE = (b"connection", b"close")
_ONE_QUEUED = [QUEUED, 0]
_DUPLICATE = Fate(status="duplicate")
_COALESCED = Fate(status="coalesced")
_USED_UP = Fate(
    status=str(Outcome.UNAUTHENTICATED),
    reason="token_used_up",
    detail="This token has sent as many events as it may: get a new one.",
)
_NO_ROOM = Fate(
    status="unavailable",
    reason="queue_full",
    detail="The queue is full: try again in a while.",
    retry_after=30,
)
# By the codes of the commit script; the others are limits.
_FATES = {
    QUEUED: TAKEN,
    DUPLICATE: _DUPLICATE,
    COALESCED: _COALESCED,
    USED_UP: _USED_UP,
    NO_ROOM: _NO_ROOM,
}


class Outcomes(Protocol):
    """The part of the queue that `Prefer: wait` needs."""

    async def expect(self, event: Waiting, seconds: int) -> None: ...

    async def outcome(
        self, event: Waiting, seconds: float
    ) -> dict[str, object] | None: ...


class _Submitted(Struct, gc=False):
    """A request whose events are on their way into the queue.

    In place of a `partial`, which takes up three times as much while it waits.
    """

    track: "Track"
    admitted: Admitted
    answer: Callable[[Response | Written], None]

    def settle(self, result: Reply | Exception) -> None:
        """Answer for events that the queue has judged."""
        track, admitted = self.track, self.admitted
        said: Response | Written
        try:
            if isinstance(result, Reply):
                if result.codes == _ONE_QUEUED and admitted.alone():
                    said = track._edge.taken(
                        admitted, result.dimension, result.remaining, result.reset_us
                    )
                    for note in admitted.head.sender.notes:
                        track._admission.note(note)
                else:
                    said = track._answer(admitted, track._fates(result), result)
            elif isinstance(result, QueueUnavailable):
                said = track._away(admitted, result)
            else:
                raise result
        except Exception:
            said = track._failed(admitted.head)
        if type(said) is Response:
            track._count(said)
        self.answer(said)


class Track:
    """`POST` and `OPTIONS` of a path that takes events."""

    def __init__(
        self,
        *,
        edge: Edge,
        admission: Admission,
        outcomes: Outcomes,
        limits: Sequence[Limit],
        body_timeout_s: float = BODY_TIMEOUT_S,
        max_waiters: int = MAX_WAITERS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._edge = edge
        self._admission = admission
        self._outcomes = outcomes
        self._limits = tuple(limits)
        self.body_timeout_s = body_timeout_s
        self._max_waiters = max_waiters
        self._clock = clock
        # Of one limit the seconds are few; of an event's own they may be many.
        self._limited = lru_cache(maxsize=256)(self._fate_of)
        self._waiters = 0
        # One at a time: the queue's connections for such things are few, and the
        # operator's questions go through the same ones.
        self._expecting = asyncio.Lock()
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: Head | None = None
        try:
            client = scope.get("client")
            fields = fields_of(scope["headers"])
            judged = self._edge.head(
                scope["method"], fields, client[0] if client else None
            )
            if isinstance(judged, Head):
                head = judged
                body = await self._read(head, receive)
                if body is None:
                    return  # the sender is gone
                response = (
                    body if isinstance(body, Response) else await self._take(head, body)
                )
            else:
                response = await self._refuse(judged, fields, receive)
        except Exception:
            response = self._failed(head)
        self._count(response)
        await send(
            {
                "type": "http.response.start",
                "status": response.status,
                "headers": response.headers,
            }
        )
        await send({"type": "http.response.body", "body": response.body})

    # --- the short way ----------------------------------------------------------------

    def take(
        self,
        fields: Fields,
        peer: str | None,
        body: bytes,
        answer: Callable[[Response | Written], None],
    ) -> None:
        """Take a POST whose body is at hand, and call `answer` once, now or later.

        Without `Prefer: wait`, which takes the way through ASGI.
        """
        head: Head | None = None
        try:
            judged = self._edge.head("POST", fields, peer)
            if isinstance(judged, Head):
                head = judged
                response = self._submit(head, body, answer)
                if response is None:
                    return
            else:
                response = judged
        except Exception:
            response = self._failed(head)
        self._count(response)
        answer(response)

    def too_slow(self, fields: Fields, peer: str | None) -> Response:
        """The answer where the body does not come."""
        judged = self._edge.head("POST", fields, peer)
        response = self._edge.too_slow(judged) if isinstance(judged, Head) else judged
        if _CLOSE not in response.headers:
            response.own.append(_CLOSE)
        self._count(response)
        return response

    def _submit(
        self, head: Head, body: bytes, answer: Callable[[Response | Written], None]
    ) -> Response | None:
        """Have the events taken in; an answer at once, where there is one."""
        if len(body) > MAX_BODY_BYTES:
            return self._edge.too_large(head)
        admitted = self._edge.body(head, body, self._clock())
        if isinstance(admitted, Response):
            return admitted
        if self.draining:
            return self._draining(admitted)
        try:
            self._admission.submit_then(
                admitted.let_go(), _Submitted(self, admitted, answer).settle
            )
        except QueueUnavailable as error:
            return self._away(admitted, error)
        return None

    def _failed(self, head: Head | None) -> Response:
        """Our bug, which must not take the connection down unseen."""
        response = self._edge.failed(head)
        request_id = dict(response.headers)[b"x-request-id"]
        log.exception("track.failed", request_id=request_id.decode())
        return response

    def _count(self, response: Response) -> None:
        """Have counted what a response stands for, and say how long it is."""
        for refusal in response.refusals:
            self._admission.refuse(*refusal)
        for note in response.notes:
            self._admission.note(note)
        for field, n in response.browser:
            self._admission.note_browser(field, n)
        if response.status != 204:  # which has no such field: RFC 9110, 8.6
            length = b"%d" % len(response.body)
            response.own.append((b"content-length", length))

    # --- the way through ASGI ---------------------------------------------------------

    async def _read(self, head: Head, receive: Receive) -> bytes | Response | None:
        """The body, or the answer to one that is too large or too slow."""
        try:
            async with asyncio.timeout(self.body_timeout_s):
                message = await receive()
                if message["type"] != "http.request":
                    return None
                body: bytes | None = message.get("body", b"")
                ended = not message.get("more_body")
                if not ended:
                    body, ended = await self._read_rest(receive, body or b"")
        except TimeoutError:
            return self._edge.too_slow(head)
        if body is None or len(body) <= MAX_BODY_BYTES:
            return body
        response = self._edge.too_large(head)
        if not ended and not await self._discard(receive, len(body)):
            response.own.append(_CLOSE)
        return response

    async def _read_rest(
        self, receive: Receive, first: bytes
    ) -> tuple[bytes | None, bool]:
        """The body and whether it has ended, which it need not when it is over."""
        chunks, size = [first], len(first)
        while size <= MAX_BODY_BYTES:
            message = await receive()
            if message["type"] != "http.request":
                return None, True
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if not message.get("more_body"):
                return b"".join(chunks), True
        return b"".join(chunks), False

    async def _refuse(
        self, response: Response, fields: Fields, receive: Receive
    ) -> Response:
        """Bring a request that its headers condemn to its end, or close after it.

        Else what comes next on the connection could not be told from the rest of the
        body (RFC 9112, 9.3), and a body that never ends would keep it open.
        """
        if not _worth_reading(fields) or not await self._discard(receive, 0):
            response.own.append(_CLOSE)
        return response

    async def _discard(self, receive: Receive, size: int) -> bool:
        """Read on without keeping anything; whether the body came to its end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.body_timeout_s):
                while size <= MAX_DISCARDED_BYTES:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return True
        return False

    async def _take(self, head: Head, body: bytes) -> Response:
        admitted = self._edge.body(head, body, self._clock())
        if isinstance(admitted, Response):
            return admitted
        if self.draining:
            return self._draining(admitted)
        try:
            if head.wait_s and self._may_wait(admitted):
                reply, fates = await self._submit_and_wait(admitted)
            else:
                head.wait_s = 0
                reply = await self._admission.submit(admitted.request)
                fates = self._fates(reply)
        except QueueUnavailable as error:
            return self._away(admitted, error)
        return self._answer(admitted, fates, reply)

    def _answer(self, admitted: Admitted, fates: list[Fate], reply: Reply) -> Response:
        return self._edge.answer(
            admitted, fates, (reply.dimension, reply.remaining, reply.reset_us)
        )

    def _away(self, admitted: Admitted, error: QueueUnavailable) -> Response:
        # 503 keeps the event with its sender, who repeats it under the same id;
        # refusing for good would lose the sale.
        return self._edge.unavailable(
            admitted, error.reason, error.detail, error.retry_after
        )

    def _draining(self, admitted: Admitted) -> Response:
        return self._edge.unavailable(
            admitted, "draining", "This relay is stopping: try again.", 1
        )

    def _fates(self, reply: Reply) -> list[Fate]:
        """What admission says of each event of a request."""
        codes = reply.codes
        return [
            _FATES.get(code) or self._limited(code, max(1, -(-wait_us // 1_000_000)))
            for code, wait_us in zip(codes[::2], codes[1::2], strict=True)
        ]

    def _fate_of(self, code: int, seconds: int) -> Fate:
        """Over a limit, for so long."""
        dimension = (
            "event" if code == EVENT_LIMITED else self._limits[code - LIMITED].dimension
        )
        return Fate(
            status=str(Outcome.RATE_LIMITED),
            reason=f"rate_limited_{dimension}",
            detail=f"Too many events for this {_OF[dimension]}: "
            f"try again in {seconds} s.",
            retry_after=seconds,
        )

    def _may_wait(self, admitted: Admitted) -> bool:
        few = len(admitted.events) <= MAX_WAITED_EVENTS
        return few and self._waiters < self._max_waiters

    async def _submit_and_wait(self, admitted: Admitted) -> tuple[Reply, list[Fate]]:
        """Take events in as always, and hold the answer for `Prefer: wait`."""
        until = asyncio.get_running_loop().time() + admitted.head.wait_s
        self._waiters += 1
        try:
            with contextlib.suppress(TimeoutError):  # then the answer tells none
                async with asyncio.timeout_at(until), self._expecting:
                    for _, _, event in admitted.events:
                        await self._outcomes.expect(event, admitted.head.wait_s)
            reply = await self._admission.submit(admitted.request)
            fates = self._fates(reply)
            return reply, await self._await_outcomes(admitted, fates, until)
        finally:
            self._waiters -= 1

    async def _await_outcomes(
        self, admitted: Admitted, fates: list[Fate], until: float
    ) -> list[Fate]:
        """Hold the answer until the outcomes are known, or the time is up."""
        loop = asyncio.get_running_loop()
        told = list(fates)
        try:
            for place, (_, _, event) in enumerate(admitted.events):
                if fates[place] in (TAKEN, _COALESCED):
                    # Of those behind a slow one too: what is known by now is told.
                    left = max(until - loop.time(), LAST_LOOK_S)
                    outcome = await self._outcomes.outcome(event, left)
                    told[place] = Fate(status=fates[place].status, outcome=outcome)
        except (QueueUnavailable, asyncio.CancelledError) as error:
            # Redis went away, or the server stops and cancels what is left. The
            # events are in the queue all the same, and their sender must hear it.
            log.warning("track.wait_ended", error=type(error).__name__)
        return told


_OF = {
    "ip": "address",
    "customer": "customer",
    "site": "site",
    "event": "customer and event",
}


def _worth_reading(fields: Fields) -> bool:
    """Whether the rest of a refused request may be short, and comes unasked."""
    if b"expect" in fields:  # 100-continue: the sender waits to be asked
        return False
    length = fields.get(b"content-length", b"")
    return not length.isdigit() or int(length[:19]) <= MAX_DISCARDED_BYTES
