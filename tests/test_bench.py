"""The benchmark measures the relay that users run, and counts what it says it does."""

import asyncio
import json
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from socket import create_server
from threading import Thread

import pytest

from bench import accept, beacons, load, report, stack
from bench.accept import Variant
from bench.generator import Generator, Plan, read_answer, summary
from bench.load import Load, closed_loop, read_result, together
from bench.machine import ROOT
from bench.peers import HERE, PEERS
from bench.processes import BenchError, free_port
from bench.profile import summed
from bench.results import Record, Spread, against, spread
from bench.sections import SECTIONS
from bench.stack import Counts
from bench.steps import counts
from bench.versions import versions
from relay import events
from relay.settings import Role, Settings, load_settings
from tests.programs import needs

HOSTED = stack.settings(
    port=8000,
    ops_port=9000,
    redis_url="redis://127.0.0.1:6379/0",
    cluster="http://127.0.0.1:8001",
)


# --- the benched configuration is the default one -------------------------------------


def benched() -> Settings:
    return load_settings(Role.SERVE, HOSTED)


def defaults() -> Settings:
    """What the relay does with nothing but what has no default."""
    needed = (
        "RELAY_ALLOWED_ORIGINS",
        "RELAY_CLIENT_APPLICATION_ID",
        "RELAY_CLIENT_TOKEN",
        "RELAY_ORIGIN",
    )
    return load_settings(Role.SERVE, {name: HOSTED[name] for name in needed})


def test_the_benched_configuration_is_the_default_one() -> None:
    mine, usual = benched(), defaults()
    different = {
        field
        for field in Settings.model_fields
        if getattr(mine, field) != getattr(usual, field)
    }
    given = {name.removeprefix("RELAY_").lower() for name in HOSTED}
    assert different <= set(stack.DIFFERENT)
    assert given == set(stack.DIFFERENT)


def test_every_limit_is_on_and_only_the_number_of_the_sites_differs() -> None:
    mine, usual = benched().limits, defaults().limits
    assert [limit.dimension for limit in mine] == ["ip", "customer", "site"]
    assert mine[:2] == usual[:2]
    assert mine[2] == replace(usual[2], quota=mine[2].quota)
    assert not any(limit.dry_run for limit in mine)


def test_no_run_switches_anything_off() -> None:
    for kind in ("json", "text", "batch", "bad_origin", "limited"):
        assert accept.changes_of(Variant(name=kind, kind=kind)) == {}
    token = accept.changes_of(Variant(name="token", kind="token"))
    assert set(token) == {"RELAY_SIGNING_KEYS"}  # a check more


def test_redis_writes_its_file() -> None:
    command = stack.redis_command("redis-server", 1, Path("place"), "everysec")
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--appendfsync") + 1] == "everysec"


# --- what is sent ---------------------------------------------------------------------


@contextmanager
def listener(answer: bytes, *, stall: float = 0.0) -> Iterator[tuple[int, bytearray]]:
    """A server that answers each request alike and keeps what it read.

    After its first hundred requests it does nothing for `stall` seconds, once.
    """
    seen = bytearray()
    sock = create_server(("127.0.0.1", 0), backlog=64)
    loop = asyncio.new_event_loop()
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                [length] = re.findall(rb"Content-Length: (\d+)", head)
                seen.extend(head + await reader.readexactly(int(length)) + b"\0")
                count += 1
                if stall and count == 100:
                    time.sleep(stall)  # noqa: ASYNC251  # the whole server shall hang
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()  # the end of it

    server = loop.run_until_complete(asyncio.start_server(serve, sock=sock))
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield sock.getsockname()[1], seen
    finally:

        async def end() -> None:
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def sent(seen: bytearray) -> list[tuple[dict[str, str], bytes]]:
    """The requests, as headers in lower case and body."""
    found = []
    for request in bytes(seen).split(b"\0")[:-1]:
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [line.partition(": ") for line in head.decode().split("\r\n")[1:]]
        found.append(({name.lower(): value for name, _, value in lines}, body))
    return found


NOTHING = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=needs("wrk", package="wrk"))
        for kind in ("json", "text", "token", "batch", "bad_origin", "limited")
    ],
)
def test_what_wrk_sends_is_a_beacon(kind: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("one\ntwo\n")
    with listener(NOTHING) as (port, seen):
        told = closed_loop(
            f"http://127.0.0.1:{port}/track",
            kind=kind,
            connections=2,
            seconds=1,
            tokens=tokens if kind == "token" else None,
        )
    requests = sent(seen)
    assert 0 <= len(requests) - told.requests <= 2
    assert told.refused == 0
    ids, people = set(), set()
    for headers, body in requests[:200]:
        parsed = events.read_body(body)
        assert len(parsed.events) == (load.BATCH if kind == "batch" else 1)
        for event in json.loads(body).get("events", [json.loads(body)]):
            ids.add(event["id"])
            raw = json.dumps(event | {"customer": {"source_id": "u"}}).encode()
            events.read_event(raw)
        people.add(headers["x-forwarded-for"])
        assert headers["origin"].endswith(".example")
        if kind != "batch":
            assert 200 <= len(body) <= 320
    several = min(len(requests), 200)
    assert len(ids) == several * (load.BATCH if kind == "batch" else 1)
    assert len(people) == (1 if kind == "limited" else several)


@pytest.mark.parametrize(
    "kind", [pytest.param("json", marks=needs("wrk", package="wrk"))]
)
def test_both_senders_send_the_same(kind: str) -> None:
    with listener(NOTHING) as (port, seen):
        closed_loop(
            f"http://127.0.0.1:{port}/track", kind=kind, connections=1, seconds=1
        )
        generator = Generator(
            Plan(port=port, nonce="n" * 12, connections=1, total=1, rate=None)
        )
        generator.run()
    (first, body), (mine, my_body) = sent(seen)[0], sent(seen)[-1]
    assert set(first) == set(mine)
    same = ("content-type", "user-agent", "origin", "accept", "referer")
    assert [first[name] for name in same] == [mine[name] for name in same]
    theirs, ours = json.loads(body), json.loads(my_body)
    assert theirs["metadata"] == ours["metadata"]
    assert len(theirs["id"]) == len(ours["id"])


def test_an_open_loop_charges_a_stall_to_all_who_waited() -> None:
    with listener(NOTHING, stall=0.4) as (port, _):
        plan = Plan(port=port, nonce="n", connections=8, rate=500, seconds=1.0)
        generator = Generator(plan)
        generator.run()
    told = summary(generator)
    assert told["statuses"] == {"204": 500}
    assert told["lost"] == 0
    # 500 a second were due while the server hung for 0.4 s. A closed loop would have
    # had eight requests waiting, and called the other 492 fast.
    assert sum(seconds > 0.05 for seconds in generator.latencies) > 150


def test_a_burst_is_sent_once_and_ends() -> None:
    with listener(NOTHING) as (port, seen):
        generator = Generator(Plan(port=port, nonce="n", connections=5, total=50))
        generator.run()
    bodies = [json.loads(body) for _, body in sent(seen)]
    assert len({body["id"] for body in bodies}) == 50
    assert len({body["customer"]["source_id"] for body in bodies}) == 50
    assert generator.statuses == {204: 50}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (b"HTTP/1.1 204 No Content\r\ndate: x\r\n\r\n", (204, True)),
        (b"HTTP/1.1 202 A\r\ncontent-length: 2\r\n\r\n{}", (202, True)),
        (b"HTTP/1.1 202 A\r\nContent-Length: 2\r\n\r\n{", None),
        (
            b"HTTP/1.1 429 T\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            (429, False),
        ),
        (b"HTTP/1.1 200 O\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", None),
        (
            b"HTTP/1.1 200 O\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            (200, True),
        ),
        (b"HTTP/1.1 20", None),
    ],
)
def test_the_generator_reads_answers(
    said: bytes, read: tuple[int, bool] | None
) -> None:
    assert read_answer(said) == read


# --- what counts ----------------------------------------------------------------------

SEEN = Load(requests=1000, seconds=1.0, refused=0, p50_ms=1, p99_ms=1, cpu_s=0.1)
EMPTY = Counts(received=0, outcomes={}, waiting=0)


def counted(received: int, **outcomes: int) -> Counts:
    waiting = received - sum(outcomes.values())
    return Counts(received=received, outcomes=outcomes, waiting=waiting)


@pytest.mark.parametrize(
    ("seen", "after"),
    [
        pytest.param(SEEN, counted(1065), id="more-than-in-flight"),
        pytest.param(SEEN, counted(999), id="one-lost"),
        pytest.param(SEEN, counted(1010, rate_limited=10), id="some-limited"),
        pytest.param(replace(SEEN, refused=1), counted(1000), id="one-refused"),
    ],
)
def test_a_run_whose_figures_disagree_is_thrown_out(seen: Load, after: Counts) -> None:
    with pytest.raises(BenchError):
        accept.verify(Variant(name="json"), seen, EMPTY, after)


def test_a_run_whose_figures_agree_counts() -> None:
    accept.verify(Variant(name="json"), SEEN, EMPTY, counted(1064, delivered=3))
    # What is in flight at an end is not counted, and there were two.
    twice = together([SEEN, SEEN])
    accept.verify(Variant(name="json"), twice, EMPTY, counted(2128))
    with pytest.raises(BenchError):
        accept.verify(Variant(name="json"), twice, EMPTY, counted(2129))
    limited = Variant(name="limited", kind="limited", outcome="rate_limited")
    refused = replace(SEEN, refused=995)
    accept.verify(limited, refused, EMPTY, counted(1000, rate_limited=995))
    proxy = Variant(name="nginx", server="nginx")
    accept.verify(proxy, SEEN, 5.0, 1010.0)
    with pytest.raises(BenchError):
        accept.verify(proxy, SEEN, 5.0, 1000.0)


def test_runs_together_are_sums_and_medians() -> None:
    slow = replace(SEEN, requests=200, seconds=2.0, refused=3, p50_ms=9, p99_ms=90)
    told = together([SEEN, slow, replace(SEEN, p99_ms=5)])
    assert (told.requests, told.seconds, told.refused) == (2200, 4.0, 3)
    assert (told.p50_ms, told.p99_ms, told.runs) == (1, 5, 3)
    assert told.cpu_s == pytest.approx(0.3)


LOADED_RELAY = [
    *needs("wrk", package="wrk"),
    *needs("redis-server", package="redis-server"),
]


@pytest.mark.parametrize("seconds", [pytest.param(1, marks=LOADED_RELAY)])
def test_two_versions_are_loaded_at_once(seconds: int) -> None:
    said: list[str] = []
    versions(ROOT, rounds=1, seconds=seconds, say=said.append)
    assert re.match(r"round 1  this +[\d.]+  other +[\d.]+ us ", said[0])
    assert re.fullmatch(r"this costs [\d.]+ \(.*\) of the other", said[1])


@pytest.mark.parametrize(
    "server", [pytest.param("floor", marks=needs("wrk", package="wrk"))]
)
def test_a_second_in_which_others_are_busy_is_sent_but_does_not_count(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [Variant(name=name, server=server) for name in ("one", "two")]
    most = iter([1e9, -1e9, 1e9])  # the first of "one", then two of "two"
    said: list[str] = []

    class Most(float):
        def __ge__(self, foreign: float) -> bool:
            return next(most) >= foreign

    monkeypatch.setattr(accept, "FOREIGN_MOST", Most())
    monkeypatch.setattr(accept, "PAUSE_S", 0)
    told = accept.side_by_side(variants, seconds=1, peers={}, say=said.append)
    assert [line.split()[2] for line in said] == ["two:"]
    assert told["one"]["events_per_s"] > 0 < told["two"]["events_per_s"]
    monkeypatch.setattr(accept, "FOREIGN_MOST", -1e9)
    monkeypatch.setattr(accept, "TRIES", 2)
    with pytest.raises(BenchError, match="too busy"):
        accept.side_by_side(variants, seconds=1, peers={}, say=said.append)
    assert len(said) == 3


@pytest.mark.parametrize(
    "said",
    [
        "",
        'RESULT {"requests":0,"microseconds":1,"connect":0,"read":0,"write":0,'
        '"timeout":0,"status":0,"p50":0,"p99":0,"max":0}',
        'RESULT {"requests":9,"microseconds":1,"connect":0,"read":1,"write":0,'
        '"timeout":0,"status":0,"p50":0,"p99":0,"max":0}',
    ],
    ids=["silent", "empty", "broken"],
)
def test_a_broken_load_counts_for_nothing(said: str) -> None:
    with pytest.raises(BenchError):
        read_result(said, cpu_s=0.0)


def test_a_ratio_is_to_the_floor_of_its_own_round() -> None:
    assert against({"rate": 5.0}, {"rate": 10.0}, {"ratio": "rate"})["ratio"] == 0.5
    assert "ratio" not in against({"rate": 5.0}, {}, {"ratio": "rate"})
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)
    assert spread([1.0, 2.0, 3.0]).overlaps(spread([2.0, 2.5, 3.0]))
    assert not spread([1.0, 2.0, 3.0]).overlaps(spread([2.9, 3.5, 4.0]))


def test_what_python_does_for_a_beacon_is_counted_and_not_timed() -> None:
    steps, calls = counts(ROOT)
    assert calls["Policy.judge (policy.py)"] == 1
    assert steps["Policy.judge (policy.py)"] > 50
    assert not any("(steps.py)" in name for name in steps)
    again, _ = counts(ROOT)
    always = {name for name, n in calls.items() if n >= 1}  # the rest is on timers, too
    assert {n: steps[n] for n in always} == {n: again[n] for n in always}


def test_samples_of_a_profile_are_summed_by_function() -> None:
    text = (
        "main (a.py:1);work (b.py:2) 3\nmain (a.py:1);work (b.py:9) 1\nmain (a.py:4) 2"
    )
    alone, with_callees, total = summed(text)
    assert alone == {"work (b.py)": 4, "main (a.py)": 2}
    assert with_callees == {"main (a.py)": 6, "work (b.py)": 4}
    assert total == 6


# --- the report -----------------------------------------------------------------------


def record(**rows: list[float]) -> Record:
    return Record(
        section="accept",
        at="2026-01-01 00:00",
        rounds=3,
        quick=False,
        load_before=0.1,
        machine={"cores": "2"},
        rows={name: {"ratio": ratios} for name, ratios in rows.items()},
    )


def test_the_report_writes_between_its_marks_and_nowhere_else() -> None:
    text = "Before.\n<!-- bench accept -->\nold\n<!-- end -->\nAfter.\n"
    made = report.fill_in(text, report.parts({"accept": record(json=[0.4, 0.5, 0.6])}))
    assert made.startswith("Before.\n<!-- bench accept -->\n")
    assert made.endswith("<!-- end -->\nAfter.\n")
    assert "0.50 (0.40\u20130.60)" in made
    assert "old" not in made
    assert report.fill_in(text, {}) == text


def test_a_goal_is_reached_by_the_median() -> None:
    told = report.goals({"accept": record(json=[0.49, 0.55, 0.7])})
    rows = [row for row in told.splitlines() if "durable" in row]
    assert ["not reached" in row for row in rows] == [False, True, True]


def test_the_picture_is_drawn_for_light_and_dark() -> None:
    kept = replace(record(floor=[1.0], json=[0.5, 0.6], nginx=[1.1]), section="peers")
    picture = report.draw({"peers": kept})
    assert picture is not None
    root = ET.fromstring(picture)  # noqa: S314  # ours
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) == 3
    assert "prefers-color-scheme: dark" in picture
    assert report.draw({}) is None


def test_the_document_has_a_place_for_every_section() -> None:
    text = report.DOCUMENT.read_text("utf-8")
    places = [match[2] for match in report.MARKED.finditer(text)]
    assert sorted(places) == sorted([*SECTIONS, "machine", "goals"])
    assert set(SECTIONS) == set(report.COLUMNS)


def test_every_peer_limits_as_the_relay_does_or_says_that_it_does_not() -> None:
    texts = {
        "nginx": (HERE / "nginx.conf").read_text(),
        "caddy": (HERE / "Caddyfile").read_text(),
        "fastify": (HERE / "fastify" / "server.mjs").read_text(),
        "express": (HERE / "express" / "server.mjs").read_text(),
        "starlette": (HERE / "starlette" / "server.py").read_text(),
    }
    assert set(texts) == set(PEERS)
    for name, text in texts.items():
        assert "120" in text or "limits nothing" in text, name


def test_a_person_of_the_benchmark_has_an_address() -> None:
    assert beacons.address(0) == "10.0.0.0"
    assert beacons.address(70_000) == "10.1.17.112"
    assert free_port() != free_port()
