"""The sandbox as an ASGI application, and as an object for tests.

Traffic takes a plain ASGI path, because throughput is measured against it; the
control routes under `/_sandbox` and the page at `/` are never counted as traffic.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Literal

from starlette.types import Receive, Scope, Send

from relay.sandbox import oauth
from relay.sandbox.activity import named_in
from relay.sandbox.answers import Answer, framework_error
from relay.sandbox.cluster import EVENT_PATHS, Cluster
from relay.sandbox.config import SandboxConfig, changed, latency_range
from relay.sandbox.connection import disconnect, gone_within, send_answer
from relay.sandbox.control import control_app
from relay.sandbox.customers import Customer
from relay.sandbox.faults import Fault, FaultPlan, Malformed, Moment, Route
from relay.sandbox.record import MAX_KEPT_BODY, MAX_KEPT_TEXT, Ledger, Record
from relay.sandbox.request import Request, arrived, with_body
from relay.sandbox.strict import Unexpected, UnexpectedTraffic, Watch


class Sandbox:
    """One fake cluster: `app` is what a server runs, the rest is for its owner."""

    def __init__(
        self,
        config: SandboxConfig | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._first_config = config or SandboxConfig()
        self._monotonic = monotonic
        self._wall = wall
        self._control = control_app(self)
        self._faults = FaultPlan()
        self.reset()

    @property
    def app(self) -> Callable[..., Awaitable[None]]:
        """Return what a server runs; typed so that any server's checker takes it."""
        return self

    # What it received

    @property
    def events(self) -> list[Record]:
        """Return the recorded events, in the order they were recorded."""
        return self._ledger.events

    @property
    def requests(self) -> list[Record]:
        """Return every request, the refused ones included."""
        return self._ledger.requests

    @property
    def customers(self) -> list[Customer]:
        """Return the stored customers."""
        return self._cluster.customers.all()

    def event_names(self) -> list[str]:
        """Return the names of the recorded events, in order."""
        return [record.event or "" for record in self._ledger.events]

    def counts(self) -> dict[str, object]:
        """Return counts since the start; they outlive the records."""
        ledger = self._ledger
        return {
            "requests": ledger.total,
            "events": ledger.recorded,
            "by_verdict": dict(ledger.by_verdict),
            "by_status": dict(ledger.by_status),
            "customers_created": self._cluster.customers.created,
            "tokens_minted": self._cluster.tokens.minted,
            "faults_waiting": len(self._faults.waiting()),
            "unexpected": len(self._watch.unexpected()),
        }

    # What a test sets up

    @property
    def config(self) -> SandboxConfig:
        """Return the settings in force."""
        return self._cluster.config

    def configure(self, **changes: object) -> SandboxConfig:
        """Change settings while it runs; ValueError names the field and its cure."""
        self._cluster.config = changed(self._cluster.config, changes)
        return self._cluster.config

    def add_customer(
        self,
        *,
        id: str | None = None,  # noqa: A002  # the field's name
        source_id: str | None = None,
    ) -> Customer:
        """Store a customer, as if the shop had created it before."""
        return self._cluster.customers.add(id=id, source_id=source_id)

    def expire_tokens(self) -> None:
        """Make every OAuth token invalid at once."""
        self._cluster.tokens.expire_all()

    def fail_next(
        self,
        count: int | None = 1,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        malformed: Malformed | None = None,
        disconnect: Literal["reset", "close", "cut_short"] | None = None,
        delay: float = 0.0,
        at: Moment | None = None,
        event: str | None = None,
        source_id: str | None = None,
        on: Route = "events",
    ) -> None:
        """Let the next `count` requests (None: all, until cleared) meet a fault."""
        self.inject(
            Fault(
                count=count,
                status=status,
                headers=headers or {},
                malformed=malformed,
                disconnect=disconnect,
                delay=delay,
                at=at,
                event=event,
                source_id=source_id,
                on=on,
            )
        )

    def inject(self, fault: Fault) -> None:
        """Let the next requests meet `fault`."""
        self._faults.add(fault)

    def faults(self) -> list[Fault]:
        """Return the faults that still wait, with what is left of their counts."""
        return self._faults.waiting()

    def clear_faults(self) -> None:
        """Forget the faults that still wait."""
        self._faults.clear()

    def forget(self) -> None:
        """Forget what was received, counts included; customers and limits stay."""
        config = self._cluster.config
        self._ledger = Ledger(keep=config.keep_requests, keep_bytes=config.keep_bytes)
        self._watch.forget()

    def reset(self) -> None:
        """Start over: as it was made, with nothing received and nothing to fail."""
        self._cluster = Cluster(
            self._first_config, monotonic=self._monotonic, wall=self._wall
        )
        self._faults.clear()
        self._watch = Watch()
        self.forget()

    # The check at the end of a test

    def expect(self, *kinds: str) -> None:
        """Say that these kinds of unexpected traffic are meant to happen."""
        self._watch.expect(*kinds)

    def unexpected(self) -> list[Unexpected]:
        """Return what reached it that a correct relay would not have sent."""
        return self._watch.unexpected()

    def assert_clean(self) -> None:
        """Raise UnexpectedTraffic, which names everything unexpected."""
        found = self._watch.unexpected()
        if found:
            lines = [f"  request {f.seq}: {f.kind.value}: {f.detail}" for f in found]
            lines.append("if it is meant to happen: sandbox.expect(KIND)")
            raise UnexpectedTraffic("\n".join(["unexpected traffic", *lines]))

    # Traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_control(scope["path"]):
            await self._control(scope, receive, send)
        else:
            await self._traffic(scope, receive, send)

    async def _traffic(self, scope: Scope, receive: Receive, send: Send) -> None:
        ledger = self._ledger  # a reset meanwhile begins another one
        request = arrived(scope)
        record = ledger.open(request, self._wall())
        route = _route(request.path)
        fault = answer = None
        if route is not None and request.method in ("POST", "GET"):
            fault = self._faults.take(route, before_body=True)
        if fault is not None:
            answer = fault.answer(None, self._cluster.request_id())
        elif whole := await with_body(
            request,
            receive,
            limit=self.config.max_body_bytes,
            json=route == "events",
        ):
            request = whole
            _note_body(record, request)
            answer, fault = self._decide(request, record, route)
        _note_verdict(record, answer, fault)
        self._watch.inspect(request, record)
        ledger.judged(record)

        if await self._held_until_gone(receive, fault):
            ledger.answered(record, None)
        elif fault is not None and fault.disconnect is not None:
            ledger.answered(record, None)
            await disconnect(fault.disconnect, scope, receive, send, answer=answer)
        elif answer is not None:
            # Noted first, so that who has the answer also finds it here.
            ledger.answered(record, answer.status)
            await send_answer(send, answer)
        else:
            ledger.answered(record, None)  # the sender hung up within the body

    def _decide(
        self, request: Request, record: Record, route: Route | None
    ) -> tuple[Answer | None, Fault | None]:
        if route is None:
            return framework_error("unknown_path", 404), None
        if route == "events" and request.method == "OPTIONS":
            # What a browser asks first; it makes nothing, and whether it counts as a
            # call is not documented.
            return Answer(verdict="preflight", status=204), None
        if route == "oauth":
            return self._decide_other("oauth", request, self._cluster.token)
        if route == "activity":
            return self._decide_other("activity", request, self._cluster.activity)
        verdict = self._cluster.judge(request)
        if isinstance(verdict, Answer):
            return verdict, None
        fault = self._faults.take(
            "events",
            before_body=False,
            event=verdict.event,
            source_id=_string(verdict.customer.get("source_id")),
        )
        if fault is not None and fault.moment == "before_record":
            return fault.answer(None, self._cluster.request_id()), fault
        answer, record.customer_id = self._cluster.apply(verdict)
        record.recorded, record.skipped = True, list(verdict.skipped)
        if fault is None:
            return answer, None
        return fault.answer(answer, self._cluster.request_id()), fault

    def _decide_other(
        self, route: Route, request: Request, decide: Callable[[Request], Answer]
    ) -> tuple[Answer | None, Fault | None]:
        fault = self._faults.take(route, before_body=False)
        if fault is not None and fault.moment == "before_record":
            return fault.answer(None, self._cluster.request_id()), fault
        answer = decide(request)
        if fault is None:
            return answer, None
        return fault.answer(answer, self._cluster.request_id()), fault

    async def _held_until_gone(self, receive: Receive, fault: Fault | None) -> bool:
        low, high = latency_range(self.config.latency)
        delay = self._cluster.rng.uniform(low, high) + (fault.delay if fault else 0.0)
        return delay > 0 and await gone_within(receive, delay)


def _is_control(path: str) -> bool:
    return path in ("/", "/favicon.ico", "/_sandbox") or path.startswith("/_sandbox/")


def _route(path: str) -> Route | None:
    if path in EVENT_PATHS:
        return "events"
    if path in oauth.PATHS:
        return "oauth"
    return "activity" if named_in(path) is not None else None


def _note_body(record: Record, request: Request) -> None:
    record.size = len(request.body)
    if request.malformed:
        record.text = request.body[:MAX_KEPT_TEXT].decode("utf-8", "replace")
    if record.size <= MAX_KEPT_BODY:
        record.body = request.json
    if isinstance(request.json, dict):
        record.event = _string(request.json.get("event"))
        customer = request.json.get("customer")
        if isinstance(customer, dict):
            record.source_id = _string(customer.get("source_id"))


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _note_verdict(record: Record, answer: Answer | None, fault: Fault | None) -> None:
    record.verdict = "fault" if fault is not None else "client_gone"
    if answer is not None:
        record.verdict = answer.verdict
        record.details, record.request_id = answer.details, answer.request_id
    if fault is not None:
        what = fault.malformed or fault.disconnect or fault.status or "delay"
        record.fault = f"{what} {fault.moment}"
