"""What would become of an event: every decision, and the request Voucherify would get.

Runs the relay's own edge once over the whole request, so what it says is what the
relay does. Sends nothing, asks neither Redis nor Voucherify: limits, repeats and uses
of a token are named, not looked up. Secrets are masked.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from relay.answers import Beacons, Dialect, Official, Response
from relay.assembly import make_catalog, make_digests, make_policy, shown_upstream
from relay.catalog import span
from relay.edge import Admitted, Edge, Head
from relay.events import Event, Invalid, Refused, read_body, read_event
from relay.headers import Fields
from relay.limits import Limit
from relay.policy import Policy, Ruling, Sender
from relay.queueable import Queueable
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

    def headers(self, body: bytes) -> Fields:
        named = {
            "origin": self.origin,
            "content-type": self.content_type,
            # As every client sends it: the edge refuses what is too large by this.
            "content-length": str(len(body)),
            "relay-token": self.token,
            "sec-gpc": "1" if self.gpc else None,
        }
        return {
            name.encode(): value.encode("latin-1", "replace")
            for name, value in named.items()
            if value is not None
        }


class _Telling(Policy):
    """The policy in force, which also notes each rule that an event has met."""

    def __init__(self, policy: Policy) -> None:
        self.__dict__.update(vars(policy))
        self.told: list[tuple[list[Step], Refused | None]] = []  # of each event

    def judge(
        self,
        event: Event,
        sender: Sender,
        event_id: str,
        now: float,
        say: Callable[[str, str], None] | None = None,
    ) -> Ruling:
        del say
        steps = [_step("schema", "as Voucherify publishes it")]
        counted = len(sender.notes)
        try:
            ruling = super().judge(
                event,
                sender,
                event_id=event_id,
                now=now,
                say=lambda rule, said: steps.append(_step(rule, said)),
            )
        except Refused as refused:
            self.told.append((steps, refused))
            raise
        # A rule in dry run, or a privacy signal that took something out.
        steps += [
            _step(note, "counted, and stops nothing") for note in sender.notes[counted:]
        ]
        self.told.append((steps, None))
        return ruling


def explain(
    settings: Settings, body: bytes, request: Request, *, now: float
) -> dict[str, object]:
    """Say what the relay would do with a request body.

    `{"request": [step…], "events": [{"event", "id", "status", "steps", "queue"?,
    "upstream"?}…], "answer": {"status", "body"}}`, a step being
    `{"rule", "verdict": "passes" | "refused", "detail"}`. An `id` is the sender's, or
    null where the relay makes one; a `status` is `queued` or a refusing outcome.
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
    # An address of nobody (RFC 5737).
    head = edge.head("POST", request.headers(body), "192.0.2.1")
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
    queued = iter(judged.events if isinstance(judged, Admitted) else ())
    told = iter(policy.told)
    return {
        "request": steps,
        "events": [_event(raw, told, queued, settings) for raw in read.events],
        "answer": _answer(judged, request.route),
    }


def _event(
    raw: bytes | msgspec.Raw,
    told: Iterator[tuple[list[Step], Refused | None]],
    queued: Iterator[Queueable],
    settings: Settings,
) -> dict[str, object]:
    """What became of the next event, in the order in which the edge met them."""
    steps: list[Step] = []
    refused: Refused | None
    try:
        event = read_event(raw)
    except Refused as fault:  # it never met the policy
        refused, name, own_id = fault, fault.name, fault.id
    else:
        (steps, refused), name, own_id = next(told), event.event, event.id
    of_event: dict[str, object] = {"event": name, "id": own_id}
    if refused is not None:
        no = _step(refused.reason, refused.detail, verdict="refused")
        return {**of_event, "status": str(refused.outcome), "steps": [*steps, no]}
    accepted = next(queued)
    url, headers = shown_upstream(settings)
    return {
        **of_event,
        "status": "queued",
        "steps": steps,
        "queue": _queue(accepted, settings.limits),
        "upstream": {
            "method": "POST",
            "url": url,
            "headers": headers,
            "body": msgspec.json.decode(accepted[2].body),
        },
    }


# Whom one event of a limit is charged to.
CHARGED = {
    "ip": "the sender's address",
    "customer": "the customer",
    "site": "the whole shop",
}


def _queue(queued: Queueable, limits: Sequence[Limit]) -> dict[str, object]:
    """How it would wait, and what it would be charged to."""
    _, special, waiting = queued
    charged = [
        f"{limit.dimension}={limit.quota}/{span(limit.window_s)} burst {limit.burst}"
        + (" (dry run)" if limit.dry_run else "")
        + f": charged to {CHARGED[limit.dimension]}"
        for limit in limits
    ]
    told: dict[str, object] = {
        "lane": waiting.lane,
        "delivery": waiting.delivery,
        "ttl_s": waiting.ttl_ms // 1000,
        "limits": charged,
    }
    if special is not None:
        _, coalesce_ms, quota, period_ms, dry_run, _, uses, _, _ = special
        if coalesce_ms:
            told["coalesce"] = (
                f"one in {span(coalesce_ms // 1000)} of this customer: the last one"
            )
        if quota:
            dry = " (dry run)" if dry_run else ""
            told["event_limit"] = (
                f"{quota} in {span(period_ms // 1000)} of this customer{dry}"
            )
        if uses:
            told["token_uses"] = f"one of {uses}"
    return told


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
        if event.status == "queued":
            own = f"{event.id} (the sender's)" if event.id else "made by the relay"
            found.append(f"          {'id':<14} {own}")
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
    id: str | None
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
