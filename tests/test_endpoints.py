"""The hot route on a real server and a real queue, for honest and hostile senders."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import httpx
import pytest
import redis.asyncio
from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGIApplication

from relay.addresses import TrustedProxies
from relay.admission import Admission
from relay.digests import Digests
from relay.edge import MAX_BODY_BYTES, Edge
from relay.endpoints import MAX_WAITED_EVENTS, Track
from relay.limits import parse_limits
from relay.origins import AllowedOrigins
from relay.policy import Policy
from relay.protocol import BeaconProtocol
from relay.queue import Queue
from tests.listening import of_session
from tests.queues import Bench, Clock, result
from tests.support import eventually, serve

pytestmark = pytest.mark.anyio

SHOP = "https://shop.example"
EVENT = {"event": "e", "customer": {"source_id": "customer-1a"}}
# Nothing listens there: port 9 (discard) of this machine.
# As in production: uvicorn itself would believe the header of any local peer.
SERVER: dict[str, object] = {"lifespan": "off", "proxy_headers": False}
NOWHERE = "redis://127.0.0.1:9/0"


@dataclass(slots=True)
class Answer:
    """What a raw connection got back."""

    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """A connection on which a test says every byte itself."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader, self._writer = reader, writer

    async def say(self, *parts: str | bytes) -> None:
        for part in parts:
            self._writer.write(part if isinstance(part, bytes) else part.encode())
        await self._writer.drain()

    async def post(self, *headers: str, origin: str = SHOP) -> None:
        lines = ["POST /track HTTP/1.1", "host: x", f"origin: {origin}", *headers]
        await self.say("\r\n".join(lines), "\r\n\r\n")

    async def answer(self) -> Answer:
        head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")[:-2]
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("content-length", "0"))
        body = await self._reader.readexactly(length)
        of_session().raw(head + body)
        return Answer(int(first.split()[1]), headers, body)

    async def closed(self) -> bool:
        """Wait for the server to close; False if it says something more."""
        try:
            return await self._reader.read(1) == b""
        except ConnectionResetError:
            return True

    def reset(self) -> None:
        self._writer.transport.abort()


@dataclass(slots=True)
class Relay:
    """The hot route under test, its client, and the queue behind it."""

    url: str
    track: Track
    client: httpx.AsyncClient
    bench: Bench
    admission: Admission
    wires: list[Wire] = field(default_factory=list)

    async def post(
        self, body: object, *, origin: str | None = SHOP, **headers: str
    ) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if origin is not None:
            named["origin"] = origin
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(self.url, content=content, headers=named)

    async def wire(self) -> Wire:
        url = httpx.URL(self.url)
        wire = Wire(*await asyncio.open_connection(url.host, url.port))
        self.wires.append(wire)
        return wire

    def hang_up(self) -> None:
        for wire in self.wires:
            wire.reset()

    async def minute(self) -> dict[str, int]:
        """The counters of this minute and the one before, added up."""
        counted: dict[str, int] = {}
        async for key in self.bench.client.scan_iter(
            f"{self.bench.queue.prefix}:minute:*"
        ):
            window = str(key.decode()).partition(":")[2]
            for name, value in (await self.bench.queue.hash(window)).items():
                counted[name] = counted.get(name, 0) + int(value)
        return counted

    async def counted(self, **totals: int) -> None:
        """Wait until Redis has exactly these totals, which come in half a second."""

        async def same() -> bool:
            return await self.bench.totals() == totals

        await eventually(same)


Start = Callable[..., Awaitable[Relay]]


class Short:
    """The route as an application that uvicorn's protocol may go past."""

    def __init__(self, track: Track) -> None:
        self._track = track
        self.beacons = {b"/track": track}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._track(scope, receive, send)


@pytest.fixture(params=["asgi", "short"])
async def start(
    request: pytest.FixtureRequest,
    valkey_url: str,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Start]:
    """Every promise holds on both ways in."""
    monkeypatch.setattr("relay.admission.REFUSALS_EVERY_S", 0.02)
    short = request.param == "short"
    async with AsyncExitStack() as stack:

        async def begin(
            limits: str = "off",
            *,
            origins: Sequence[str] = (SHOP,),
            proxies: Sequence[str] = (),
            allow_no_origin: bool = False,
            queue_url: str = valkey_url,
            deadline_s: float = 2.0,
            queue_max: int = 1_000_000,
            **options: float,
        ) -> Relay:
            rules = parse_limits(limits)
            queue = Queue(
                url=queue_url,
                prefix=prefix,
                limits=rules,
                queue_max=queue_max,
                timeout=5.0,
            )
            stack.push_async_callback(queue.aclose)
            away = queue_url != valkey_url
            bench = await stack.enter_async_context(
                open_bench(valkey_url, prefix, balanced=not away)
            )
            admission = Admission(queue, deadline_s=deadline_s)
            await admission.start()
            stack.push_async_callback(admission.stop)
            track = Track(
                edge=Edge(
                    origins=AllowedOrigins(origins),
                    proxies=TrustedProxies(proxies),
                    limits=rules,
                    digests=Digests(b"k"),
                    policy=Policy(ttl_ms=3_600_000),
                    allow_no_origin=allow_no_origin,
                ),
                admission=admission,
                outcomes=queue,
                limits=rules,
                **options,  # type: ignore[arg-type]  # the route's own keywords
            )
            app = cast("ASGIApplication", Short(track) if short else track)
            way = {"http": BeaconProtocol} if short else {}
            url = await stack.enter_async_context(serve(app, **SERVER, **way))
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=20))
            relay = Relay(url + "/track", track, client, bench, admission)
            stack.callback(relay.hang_up)
            return relay

        yield begin


@asynccontextmanager
async def open_bench(url: str, prefix: str, *, balanced: bool) -> AsyncIterator[Bench]:
    """Look at the queue from outside; at the end its books must balance."""
    queue = Queue(url=url, prefix=prefix, timeout=5.0)
    bench = Bench(queue, Clock(url, prefix), redis.asyncio.Redis.from_url(url))
    yield bench
    if balanced:
        await bench.balanced()
    await queue.aclose()
    await bench.clock.aclose()
    await bench.client.aclose()


def entries(response: httpx.Response) -> list[dict[str, object]]:
    told: list[dict[str, object]] = response.json()["events"]
    return told


# --- what is taken -----------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [EVENT, [EVENT], {"events": [EVENT]}],
    ids=["one", "array", "batch"],
)
async def test_an_event_is_in_the_queue_when_the_answer_comes(
    start: Start, body: object
) -> None:
    relay = await start()
    response = await relay.post(body, content_type="text/plain;charset=UTF-8")
    [entry] = entries(response)
    assert (response.status_code, entry["status"]) == (202, "queued")
    [claimed] = await relay.bench.claim()
    assert (claimed.id, json.loads(claimed.body)) == (entry["id"], EVENT)


async def test_a_repeat_under_the_same_id_is_a_duplicate_and_accepted(
    start: Start,
) -> None:
    relay = await start()
    event = {**EVENT, "id": "x-1"}
    first, again = await relay.post(event), await relay.post([event, event])
    assert entries(first) == [{"id": "x-1", "status": "queued"}]
    assert (again.status_code, entries(again)) == (
        202,
        [{"id": "x-1", "status": "duplicate"}] * 2,
    )
    await relay.counted(received=3, duplicate=2)


async def test_gzip_is_inflated(start: Start) -> None:
    relay = await start()
    packed = gzip.compress(json.dumps([EVENT] * 100).encode())
    response = await relay.post(packed, content_encoding="gzip")
    assert [entry["status"] for entry in entries(response)] == ["queued"] * 100


def padded(size: int) -> bytes:
    """One event of exactly so many bytes."""
    start, end = json.dumps(EVENT).encode()[:-1], b',"metadata":{"x":"%s"}}'
    return start + end % (b"x" * (size - len(start) - len(end) + 2))


@pytest.mark.parametrize(
    ("size", "status"),
    [(MAX_BODY_BYTES, 202), (MAX_BODY_BYTES + 1, 413)],
    ids=["at-the-limit", "one-byte-over"],
)
@pytest.mark.parametrize("way", ["announced", "chunked", "inflated"])
async def test_the_size_limit_is_exact_however_the_body_comes(
    start: Start, size: int, status: int, way: str
) -> None:
    relay = await start()
    body = padded(size)
    assert len(body) == size

    async def pieces() -> AsyncIterator[bytes]:
        for place in range(0, size, 10_000):
            yield body[place : place + 10_000]

    headers = {"origin": SHOP}
    content: bytes | AsyncIterator[bytes] = body
    if way == "chunked":
        content = pieces()
    elif way == "inflated":
        content, headers["content-encoding"] = gzip.compress(body), "gzip"
    response = await relay.client.post(relay.url, content=content, headers=headers)
    assert response.status_code == status
    if status == 413:
        assert response.json()["reason"] == "too_large"
        assert response.headers["access-control-allow-origin"] == SHOP
        await relay.counted(received=1, invalid=1)


# --- refusals, and that they are counted under their reason ------------------------


@pytest.mark.parametrize(
    ("status", "outcome", "body", "headers"),
    [
        (403, "forbidden", EVENT, {"origin": "https://evil.example"}),
        (403, "forbidden", EVENT, {"origin": "null"}),
        (403, "forbidden", EVENT, {"origin": None}),
        (415, "invalid", EVENT, {"content_type": "text/html"}),
        (415, "invalid", EVENT, {"content_encoding": "br"}),
        (400, "invalid", b"{", {}),
        (400, "invalid", b"", {}),
        (400, "invalid", {"event": "e"}, {}),
        (400, "invalid", b"?", {"content_encoding": "gzip"}),
        (413, "invalid", bytes(70_000), {}),
    ],
)
async def test_a_refusal_is_a_problem_and_counted_under_its_reason(
    start: Start, status: int, outcome: str, body: object, headers: dict[str, str]
) -> None:
    relay = await start()
    response = await relay.post(body, **headers)
    said = response.json()
    assert (response.status_code, said["status"]) == (status, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    assert response.headers["vary"] == "Origin"
    allowed = headers.get("origin", SHOP) == SHOP
    assert ("access-control-allow-origin" in response.headers) is allowed
    await relay.counted(received=1, **{outcome: 1})
    counted = await relay.minute()
    assert [name for name in counted if name.startswith("reason:")] == [
        f"reason:{said['reason']}"
    ]
    assert await relay.bench.claim() == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE"])
async def test_another_method_is_405_with_allow_and_not_counted(
    start: Start, method: str
) -> None:
    relay = await start()
    for origin in (SHOP, "null"):
        response = await relay.client.request(
            method, relay.url, headers={"origin": origin}
        )
        assert response.status_code == 405
        assert response.headers["allow"] == "POST, OPTIONS"
        assert response.headers["x-request-id"]
    assert (response.content == b"") is (method == "HEAD")
    assert await relay.bench.totals() == {}


async def test_a_preflight_has_no_body_and_no_length(start: Start) -> None:
    relay = await start()
    asked = {
        "origin": SHOP,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    response = await relay.client.options(relay.url, headers=asked)
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["access-control-allow-origin"] == SHOP
    # RFC 9110, 8.6 and RFC 9112, 6.1: a 204 has neither.
    assert "content-length" not in response.headers
    assert "transfer-encoding" not in response.headers
    refused = await relay.client.options(relay.url, headers={"origin": "null"})
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    assert await relay.bench.totals() == {}


async def test_a_sender_without_origin_is_let_in_by_the_operator_alone(
    start: Start,
) -> None:
    relay = await start(allow_no_origin=True)
    assert (await relay.post(EVENT, origin=None)).status_code == 202
    assert (await relay.post(EVENT, origin="null")).status_code == 403


async def test_a_batch_of_everything_is_answered_in_the_senders_order(
    start: Start,
) -> None:
    relay = await start("customer=60/1h burst 2")
    body: list[object] = []
    expected: list[tuple[str, str, object]] = []
    for n in range(20):
        who = {"source_id": f"c-{n}"}
        ids = [f"x-{n}-{k}" for k in range(5)]
        body += [
            {"event": "e", "customer": who, "id": ids[0]},
            {"event": "e", "customer": who, "id": ids[1], "extra": 1},
            {"event": "e", "customer": who, "id": ids[0]},
            {"event": "e", "customer": who, "id": ids[3]},
            {"event": "e", "customer": who, "id": ids[4]},
        ]
        expected += [
            (ids[0], "queued", None),
            (ids[1], "invalid", "unknown_field"),
            (ids[0], "duplicate", None),
            (ids[3], "queued", None),
            (ids[4], "rate_limited", "rate_limited_customer"),
        ]
    response = await relay.post(body)
    told = entries(response)
    assert response.status_code == 202
    assert [(e["id"], e["status"], e.get("reason")) for e in told] == expected
    await relay.counted(received=100, duplicate=20, invalid=20, rate_limited=20)
    counted = await relay.minute()
    assert counted["reason:unknown_field"] == 20
    assert counted["reason:rate_limited_customer"] == 20
    # One customer has two, which go one after the other.
    assert (await relay.bench.gauges())["queued"] == "40"


# --- limits ------------------------------------------------------------------------


async def test_retry_after_is_never_earlier_than_the_wait(start: Start) -> None:
    relay = await start("ip=1/2s burst 1")
    first, second = await relay.post(EVENT), await relay.post(EVENT)
    assert first.headers["ratelimit-policy"] == '"ip";q=1;w=2'
    assert first.headers["ratelimit"] in ('"ip";r=0;t=2', '"ip";r=0;t=1')
    assert (second.status_code, second.json()["reason"]) == (429, "rate_limited_ip")
    wait = int(second.headers["retry-after"])
    assert 1 <= wait <= 2
    assert second.headers["access-control-allow-origin"] == SHOP
    await relay.counted(received=2, rate_limited=1)


async def statuses(relay: Relay, *forwarded: str) -> list[int]:
    return [
        (await relay.post(EVENT, x_forwarded_for=line)).status_code
        for line in forwarded
    ]


async def test_addresses_of_one_64_share_a_limit_and_of_two_do_not(
    start: Start,
) -> None:
    relay = await start("ip=1/1h burst 1", proxies=["loopback"])
    assert await statuses(
        relay, "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "192.0.2.1", "192.0.2.2"
    ) == [202, 429, 202, 202, 202]


async def test_only_a_trusted_proxy_may_name_the_sender(start: Start) -> None:
    relay = await start("ip=1/1h burst 1")
    assert await statuses(relay, "192.0.2.1", "192.0.2.2") == [202, 429]
    told = await relay.post(EVENT, x_request_id="mine")
    assert told.headers["x-request-id"] != "mine"


async def test_a_trusted_proxys_request_id_is_taken_over(start: Start) -> None:
    relay = await start(proxies=["loopback"])
    for origin in (SHOP, "null"):
        told = await relay.post(EVENT, origin=origin, x_request_id="mine-1")
        assert told.headers["x-request-id"] == "mine-1"


async def test_a_full_queue_is_503_and_says_when_to_come_back(start: Start) -> None:
    relay = await start(queue_max=1)
    response = await relay.post([EVENT, EVENT])
    assert [e["status"] for e in entries(response)] == ["queued", "unavailable"]
    response = await relay.post({**EVENT, "id": "x-1"})
    assert (response.status_code, response.json()["reason"]) == (503, "queue_full")
    assert response.json()["id"] == "x-1"
    assert int(response.headers["retry-after"]) >= 1
    await relay.counted(received=1)


async def test_draining_is_503_with_the_ids(start: Start) -> None:
    relay = await start()
    relay.track.draining = True
    response = await relay.post([{**EVENT, "id": "x-1"}, EVENT])
    assert (response.status_code, response.json()["reason"]) == (503, "draining")
    assert response.headers["retry-after"] == "1"
    assert response.headers["access-control-allow-origin"] == SHOP
    assert entries(response)[0]["id"] == "x-1"
    assert await relay.bench.totals() == {}


# --- Redis away, and our own faults --------------------------------------------------


async def test_redis_away_is_503_with_the_ids_and_never_500(start: Start) -> None:
    relay = await start(queue_url=NOWHERE, deadline_s=0.05)
    for headers in ({}, {}, {"prefer": "wait=1"}):  # tried, breaker open, waiting
        response = await relay.post([{**EVENT, "id": "x-1"}, EVENT], **headers)
        said = response.json()
        assert (response.status_code, said["reason"]) == (503, "redis_unreachable")
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["access-control-allow-origin"] == SHOP
        assert [e["status"] for e in said["events"]] == ["unavailable"] * 2
        assert said["events"][0]["id"] == "x-1"
    # What needs no Redis is answered as ever.
    assert (await relay.post({})).status_code == 400
    assert (await relay.post(EVENT, origin="null")).status_code == 403


async def test_a_fault_of_ours_is_a_readable_500_and_counted(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    relay = await start()
    # A key of the wrong kind: the script fails on every event, as for a bug of ours.
    await relay.bench.client.set(f"{relay.bench.queue.prefix}:names", "x")
    response = await relay.post(EVENT)
    said = response.json()
    assert (response.status_code, said["reason"]) == (500, "internal")
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["access-control-allow-origin"] == SHOP
    # The log can be found by what the sender was given.
    assert response.headers["x-request-id"] in capsys.readouterr().out
    await relay.bench.client.delete(f"{relay.bench.queue.prefix}:names")
    assert (await relay.post(EVENT)).status_code == 202
    await relay.counted(received=2, internal=1)


# --- senders that do not keep to the rules -------------------------------------------


async def test_a_body_that_does_not_come_is_408_and_the_end(start: Start) -> None:
    relay = await start(body_timeout_s=0.1)
    for sent in (b"", b'{"event":'):
        wire = await relay.wire()
        await wire.post("content-length: 100")
        await wire.say(sent)
        answer = await wire.answer()
        assert (answer.status, json.loads(answer.body)["reason"]) == (408, "timeout")
        assert answer.headers["connection"] == "close"
        assert answer.headers["access-control-allow-origin"] == SHOP
        assert await wire.closed()
    await relay.counted(received=2, invalid=2)


async def test_dripping_does_not_lengthen_the_time_for_a_body(start: Start) -> None:
    relay = await start(body_timeout_s=0.3)
    wire = await relay.wire()
    await wire.post("content-length: 60000")

    async def drip() -> None:
        while True:
            await wire.say(b" ")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(5):
            assert (await wire.answer()).status == 408
    finally:
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["content-length: 50"], 403),
        (["content-length: 70000"], 403),
        (["transfer-encoding: chunked"], 403),
    ],
)
async def test_a_refused_sender_cannot_hold_its_connection(
    start: Start, headers: list[str], status: int
) -> None:
    relay = await start(body_timeout_s=0.1)
    wire = await relay.wire()
    await wire.post(*headers, origin="null")
    answer = await wire.answer()
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert await wire.closed()


async def test_a_refused_request_that_is_whole_leaves_its_connection_open(
    start: Start,
) -> None:
    relay = await start()
    wire = await relay.wire()
    body = json.dumps(EVENT).encode()
    await wire.post("content-type: text/html", f"content-length: {len(body)}")
    await wire.say(body[:5])
    await wire.say(body[5:])
    assert (await wire.answer()).status == 415
    await wire.post(f"content-length: {len(body)}")
    await wire.say(body)
    assert (await wire.answer()).status == 202


@pytest.mark.parametrize("size", [70_000, 900_000])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
async def test_a_careless_page_gets_its_413_and_keeps_its_connection(
    start: Start, size: int, chunked: bool
) -> None:
    relay = await start()
    wire = await relay.wire()
    if chunked:
        await wire.post("transfer-encoding: chunked")
        await wire.say(b"%x\r\n" % size, bytes(size), b"\r\n0\r\n\r\n")
    else:
        await wire.post(f"content-length: {size}")
        await wire.say(bytes(size))
    answer = await wire.answer()
    assert (answer.status, answer.headers.get("connection")) == (413, None)
    await wire.post("content-length: 2")
    await wire.say(b"{}")
    assert (await wire.answer()).status == 400


async def test_nobody_is_read_without_end(start: Start) -> None:
    relay = await start()
    for headers in (["content-length: 99999999999"], ["transfer-encoding: chunked"]):
        wire = await relay.wire()
        await wire.post(*headers)

        async def flood(wire: Wire = wire) -> None:
            while True:
                await wire.say(b"10000\r\n", bytes(65536), b"\r\n")

        flooding = asyncio.create_task(flood())
        done, _ = await asyncio.wait([flooding], timeout=10)
        assert done, "the connection stayed open"
        assert isinstance(flooding.exception(), ConnectionError)
    await relay.counted(received=2, invalid=2)


async def test_a_sender_that_waits_to_be_asked_is_refused_without_being_asked(
    start: Start,
) -> None:
    relay = await start()
    body = json.dumps(EVENT).encode()
    length, expect = f"content-length: {len(body)}", "expect: 100-continue"
    wire = await relay.wire()
    await wire.post(length, expect)
    assert (await wire.answer()).status == 100
    await wire.say(body)
    assert (await wire.answer()).status == 202
    wire = await relay.wire()
    await wire.post(length, expect, origin="null")
    answer = await wire.answer()
    # RFC 9110, 10.1.1: else the next request would be taken for the missing body.
    assert (answer.status, answer.headers["connection"]) == (403, "close")
    assert await wire.closed()


async def test_a_sender_that_goes_away_in_mid_body_changes_nothing(
    start: Start,
) -> None:
    relay = await start()
    for part in (b"", b'{"event":"e"', json.dumps(EVENT).encode()):
        wire = await relay.wire()
        await wire.post("content-length: 1000")
        await wire.say(part)
        wire.reset()
    assert (await relay.post(EVENT)).status_code == 202
    await relay.counted(received=1)


@pytest.mark.parametrize(
    "headers",
    [
        ["origin: https://evil.example"],
        [f"origin: {SHOP}"],
        ["origin:"],
    ],
)
async def test_two_origins_are_none(start: Start, headers: list[str]) -> None:
    relay = await start()
    wire = await relay.wire()
    await wire.post("content-length: 0", *headers)
    answer = await wire.answer()
    assert (answer.status, json.loads(answer.body)["reason"]) == (403, "origin")
    assert "access-control-allow-origin" not in answer.headers


async def test_garbage_in_a_header_is_no_fault_of_ours(start: Start) -> None:
    relay = await start(proxies=["loopback"])
    garbage = "\x80\xff;,=\t\"'" + "a" * 3_000
    for name in (
        "origin",
        "content-type",
        "content-encoding",
        "prefer",
        "x-forwarded-for",
        "x-request-id",
    ):
        wire = await relay.wire()
        body = json.dumps(EVENT)
        await wire.post(f"content-length: {len(body)}")
        await wire.say(body)
        assert (await wire.answer()).status == 202
        await wire.say(
            b"POST /track HTTP/1.1\r\nhost: x\r\n",
            *([] if name == "origin" else [f"origin: {SHOP}\r\n"]),
            name.encode() + b": " + garbage.encode("latin-1"),
            f"\r\ncontent-length: {len(body)}\r\n\r\n{body}",
        )
        expected = {"origin": 403, "content-type": 415, "content-encoding": 415}
        assert (await wire.answer()).status == expected.get(name, 202), name


async def test_pipelined_requests_are_answered_in_their_order(start: Start) -> None:
    relay = await start()
    wire = await relay.wire()
    for n in range(3):
        body = json.dumps({**EVENT, "id": f"x-{n}"})
        await wire.post(f"content-length: {len(body)}")
        await wire.say(body)
    for n in range(3):
        answer = await wire.answer()
        assert json.loads(answer.body)["events"][0]["id"] == f"x-{n}"


# --- Prefer: wait --------------------------------------------------------------------


async def settled(relay: Relay, verdict: str, **parts: object) -> None:
    """Wait for an event in the queue, and give it its outcome."""

    async def claimed() -> bool:
        found = await relay.bench.claim(1)
        for one in found:
            await relay.bench.settle(result(one, verdict, **parts))
        return bool(found)

    await eventually(claimed)


async def test_an_answer_is_held_until_the_outcome_is_known(start: Start) -> None:
    relay = await start()
    asking = asyncio.create_task(relay.post(EVENT, prefer="wait=20"))
    await settled(relay, "delivered", status=200)
    response = await asking
    [entry] = entries(response)
    assert response.status_code == 202
    assert (entry["status"], entry["outcome"]) == ("queued", "delivered")
    assert entry["upstream_status"] == 200
    assert response.headers["preference-applied"] == "wait=20"


async def test_a_refusal_by_voucherify_comes_with_its_error(start: Start) -> None:
    relay = await start()
    batch = [{**EVENT, "id": "x-1"}, {**EVENT, "id": "x-2"}]
    error = '{"key":"not_found","message":"No such card."}'
    asking = asyncio.create_task(relay.post(batch, prefer="wait=20"))
    await settled(relay, "rejected", reason="upstream_400", status=400, error=error)
    await settled(relay, "delivered", status=200)
    told = {entry["id"]: entry for entry in entries(await asking)}
    assert sorted(str(e["outcome"]) for e in told.values()) == ["delivered", "rejected"]
    [bad] = [e for e in told.values() if e["outcome"] == "rejected"]
    assert (bad["reason"], bad["error"]) == ("upstream_400", json.loads(error))
    assert "source_id" not in json.dumps(list(told.values()))


async def test_a_wait_that_ends_without_an_outcome_says_queued(start: Start) -> None:
    relay = await start()
    response = await relay.post([EVENT, EVENT], prefer="wait=1")
    assert [sorted(entry) for entry in entries(response)] == [["id", "status"]] * 2
    assert response.headers["preference-applied"] == "wait=1"


async def test_a_duplicate_does_not_wait(start: Start) -> None:
    relay = await start()
    event = {**EVENT, "id": "x-1"}
    await relay.post(event)
    async with asyncio.timeout(5):  # of 30
        response = await relay.post([event, {}], prefer="wait=30")
    assert [e["status"] for e in entries(response)] == ["duplicate", "invalid"]


async def test_more_waiters_than_allowed_are_answered_at_once(start: Start) -> None:
    relay = await start(max_waiters=2)
    # Together, so that all of them ask before any of them is in the queue.
    async with asyncio.timeout(10):
        asking = [
            asyncio.create_task(relay.post(EVENT, prefer="wait=20")) for _ in range(6)
        ]
        while sum(task.done() for task in asking) < 4:
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
        early = [task for task in asking if task.done()]
        assert len(early) == 4
        for task in early:
            assert "preference-applied" not in (await task).headers
        for _ in range(6):
            await settled(relay, "delivered")
        late = [task for task in asking if task not in early]
        for task in late:
            assert entries(await task)[0]["outcome"] == "delivered"
        # Their places are free again.
        again = asyncio.create_task(relay.post(EVENT, prefer="wait=20"))
        await settled(relay, "delivered")
        assert entries(await again)[0]["outcome"] == "delivered"


async def test_many_waiters_leave_the_queue_its_connections(start: Start) -> None:
    relay = await start()
    async with asyncio.timeout(30):
        asking = [
            asyncio.create_task(relay.post([EVENT] * 5, prefer="wait=25"))
            for _ in range(60)
        ]
        for _ in range(300):
            await settled(relay, "delivered")
        for task in asking:
            response = await task
            assert response.status_code == 202
            assert {e.get("outcome") for e in entries(response)} == {"delivered"}


async def test_a_batch_too_large_to_be_delivered_in_time_is_not_waited_for(
    start: Start,
) -> None:
    relay = await start()
    async with asyncio.timeout(5):  # of 30
        response = await relay.post([EVENT] * (MAX_WAITED_EVENTS + 1), prefer="wait=30")
    assert response.status_code == 202
    assert "preference-applied" not in response.headers
    assert not await relay.bench.client.keys(f"{relay.bench.queue.prefix}:wait:*")


async def test_a_server_that_stops_tells_who_waits_that_the_event_is_taken(
    start: Start,
) -> None:
    relay = await start()
    app = cast("ASGIApplication", relay.track)
    stopping = serve(app, **SERVER, timeout_graceful_shutdown=1)
    async with httpx.AsyncClient(timeout=20) as client:
        async with stopping as url:
            asking = asyncio.create_task(
                client.post(
                    url, json=EVENT, headers={"origin": SHOP, "prefer": "wait=30"}
                )
            )

            async def taken() -> list[object]:
                return list(await relay.bench.claim(1))

            await eventually(taken)
        response = await asking
    assert (response.status_code, entries(response)[0]["status"]) == (202, "queued")


async def test_redis_going_away_does_not_take_back_what_is_taken(start: Start) -> None:
    relay = await start()
    asking = asyncio.create_task(relay.post(EVENT, prefer="wait=20"))

    async def cut() -> bool:
        """Cut the connection on which the answer waits for the outcome."""
        clients = await relay.bench.client.client_list()
        waiting = [client["id"] for client in clients if client["cmd"] == "blpop"]
        for one in waiting:
            await relay.bench.client.client_kill_filter(_id=one)
        return bool(waiting)

    await eventually(cut)
    response = await asking
    assert (response.status_code, entries(response)[0]["status"]) == (202, "queued")
    await relay.counted(received=1)
