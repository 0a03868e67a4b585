"""What would become of an event: every decision, and the request Voucherify would get.

Runs the relay's own edge, so what it says is what the relay does. Sends nothing, asks
neither Redis nor Voucherify: limits, repeats and uses of a token are named, not
looked up. Secrets are masked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from relay.answers import Beacons, Dialect, Official, Response
from relay.assembly import make_catalog, make_digests, make_policy, shown_upstream
from relay.catalog import span
from relay.edge import Admitted, Edge, Head, Queueable
from relay.events import Event, Invalid, Refused, read_body, read_event
from relay.limits import Limit
from relay.policy import Policy, Ruling, Sender
from relay.settings import Settings

DIALECTS: dict[str, Callable[[], Dialect]] = {"track": Beacons, "sdk": Official}

Step = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the sender's request looks like beside its body."""

    route: str = "track"  # or "sdk"
    origin: str | None = None
    token: str | None = None  # in the header Relay-Token
    gpc: bool = False
    content_type: str = "application/json"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        named = {
            "origin": self.origin,
            "content-type": self.content_type,
            "relay-token": self.token,
            "sec-gpc": "1" if self.gpc else None,
        }
        return [
            (name.encode(), value.encode("latin-1", "replace"))
            for name, value in named.items()
            if value is not None
        ]


class _Telling(Policy):
    """The policy in force, which also notes each rule that an event has met."""

    def __init__(self, policy: Policy) -> None:
        self.__dict__.update(vars(policy))
        self.steps: list[Step] = []

    def judge(
        self,
        event: Event,
        sender: Sender,
        *,
        now: float,
        say: Callable[[str, str], None] | None = None,
    ) -> Ruling:
        del say

        def note(rule: str, said: str) -> None:
            self.steps.append({"rule": rule, "verdict": "passes", "detail": said})

        note("schema", "as Voucherify publishes it")
        return super().judge(event, sender, now=now, say=note)


def explain(
    settings: Settings, body: bytes, request: Request, *, now: float
) -> dict[str, object]:
    """Say what the relay would do with a request body.

    `{"request": [step…], "events": [{"event", "status", "steps", "queue"?,
    "upstream"?}…], "answer": {"status", "headers", "body"}}`, a step being
    `{"rule", "verdict": "passes" | "refused", "detail"}`.
    """
    policy = _Telling(make_policy(settings, make_catalog(settings).catalog))
    dialect = DIALECTS[request.route]()
    edge = Edge(
        origins=settings.allowed_origins,
        proxies=settings.trusted_proxies,
        limits=settings.limits,
        digests=make_digests(settings),
        policy=policy,
        dialect=dialect,
        allow_no_origin=settings.allow_no_origin,
    )
    head = edge.head("POST", request.headers, "192.0.2.1")
    if isinstance(head, Response):
        return _refused_whole(head, [])
    steps = [_step("origin", _say_origin(request, head))]
    judged = edge.body(head, body, now=now)
    try:
        read = read_body(body)
    except Invalid:
        read = None
    if read is None or (read.several and not dialect.batches):
        assert isinstance(judged, Response)  # noqa: S101  # the edge says the same
        return _refused_whole(judged, steps)
    steps.append(_step("body", f"{len(read.events)} in {len(body)} bytes"))
    upstream = shown_upstream(settings)
    events = []
    for raw in read.events:
        policy.steps = []
        alone = edge.head("POST", request.headers, "192.0.2.1")
        if isinstance(alone, Head):
            alone.sender.token = read.token or alone.sender.token
            one = edge.body(alone, bytes(raw), now=now)
            events.append(_event(raw, one, policy, settings, upstream))
    return {
        "request": steps,
        "events": events,
        "answer": _answer(judged, request.route),
    }


def _event(
    raw: bytes | msgspec.Raw,
    judged: Admitted | Response,
    policy: _Telling,
    settings: Settings,
    upstream: tuple[str, dict[str, str]],
) -> dict[str, object]:
    name = _name(raw)
    if isinstance(judged, Response):
        [(outcome, reason, _)] = judged.refusals
        said = msgspec.json.decode(judged.body, type=dict[str, object])
        detail = said.get("details") or said.get("detail") or ""
        events = said.get("events")
        if isinstance(events, list):  # accepted as dropped
            detail = events[0]["detail"]
        steps = [*policy.steps, _step(reason, str(detail), verdict="refused")]
        return {"event": name, "status": str(outcome), "steps": steps}
    [queued] = judged.events
    url, headers = upstream
    return {
        "event": name,
        "status": "queued",
        "steps": policy.steps,
        "queue": _queue(queued, settings.limits),
        "upstream": {
            "method": "POST",
            "url": url,
            "headers": headers,
            "body": msgspec.json.decode(queued[7]),
        },
    }


def _queue(queued: Queueable, limits: Sequence[Limit]) -> dict[str, object]:
    """How it would wait, and what it would be charged to."""
    _, given, _, _, lane, delivery, ttl_ms, _, special = queued
    charged = [
        f"{limit.dimension}={limit.quota}/{span(limit.window_s)} burst {limit.burst}"
        + (" (dry run)" if limit.dry_run else "")
        for limit in limits
    ]
    told: dict[str, object] = {
        "id": "the sender's" if given else "made by the relay",
        "lane": lane,
        "delivery": delivery,
        "ttl_s": ttl_ms // 1000,
        "limits": charged,
    }
    if special is not None:
        _, coalesce_ms, quota, period_ms, dry_run, _, uses, _, _ = special
        if coalesce_ms:
            told["coalesce"] = f"one in {span(coalesce_ms // 1000)} of this customer"
        if quota:
            dry = " (dry run)" if dry_run else ""
            told["event_limit"] = (
                f"{quota} in {span(period_ms // 1000)} of this customer{dry}"
            )
        if uses:
            told["token_uses"] = f"one of {uses}"
    return told


def _name(raw: bytes | msgspec.Raw) -> str:
    try:
        return read_event(raw).event
    except Refused as refused:
        return refused.name


def _say_origin(request: Request, head: Head) -> str:
    if request.origin is None:
        return (
            "none, and none is needed (RELAY_ALLOW_NO_ORIGIN)"
            if head.sender.allowed
            else "none: each event needs a valid token"
        )
    return f"{request.origin} is allowed (RELAY_ALLOWED_ORIGINS)"


def _refused_whole(response: Response, steps: list[Step]) -> dict[str, object]:
    said = msgspec.json.decode(response.body, type=dict[str, object])
    detail = str(said.get("details") or said.get("detail") or "")
    refused = _step(str(said["reason"]), detail, verdict="refused")
    return {"request": [*steps, refused], "events": [], "answer": _answer(response)}


def _answer(judged: Admitted | Response, route: str = "track") -> dict[str, object]:
    if isinstance(judged, Admitted):  # the rest is up to Redis
        status = {"track": 202, "sdk": 200}[route]
        return {"status": status, "body": "as limits, ids and room in Redis allow"}
    return {
        "status": judged.status,
        "body": msgspec.json.decode(judged.body),
    }


def _step(rule: str, detail: str, *, verdict: str = "passes") -> Step:
    return {"rule": rule, "verdict": verdict, "detail": detail}


def lines(explained: dict[str, object]) -> list[str]:
    """The same for people, a decision a line."""
    told = msgspec.convert(explained, _Explained)
    found = [*map(_line, told.request)]
    for n, event in enumerate(told.events, start=1):
        found += ["", f"event {n}: {event.event or '(no name)'}"]
        found += map(_line, event.steps)
        for name, value in (event.queue or {}).items():
            shown = "; ".join(value) if isinstance(value, list) else value
            found.append(f"          {name:<14} {shown}")
        if event.upstream is not None:
            found += ["  Voucherify would get:", *_request_lines(event.upstream)]
    body = told.answer.body
    shown = body if isinstance(body, str) else msgspec.json.encode(body).decode()
    return [*found, "", f"answer: {told.answer.status} {shown}"]


class _Answer(msgspec.Struct):
    status: int
    body: object


class _Upstream(msgspec.Struct):
    method: str
    url: str
    headers: dict[str, str]
    body: object


class _Event(msgspec.Struct):
    event: str
    status: str
    steps: list[Step]
    queue: dict[str, object] | None = None
    upstream: _Upstream | None = None


class _Explained(msgspec.Struct):
    request: list[Step]
    events: list[_Event]
    answer: _Answer


def _line(step: Step) -> str:
    mark = "ok     " if step["verdict"] == "passes" else "REFUSED"
    return f"  {mark} {step['rule']:<14} {step['detail']}"


def _request_lines(upstream: _Upstream) -> list[str]:
    return [
        f"    {upstream.method} {upstream.url}",
        *(f"    {name}: {value}" for name, value in upstream.headers.items()),
        f"    {msgspec.json.encode(upstream.body).decode()}",
    ]
