"""The proof itself: each scenario in small, and a referee that is not fooled."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from relay.limits import parse_budget
from relay.queue import QUEUED, Claimed, Queue, Result
from relay.queueable import Queueable
from relay.verdicts import Answer, Verdict
from simulation import report
from simulation.__main__ import DOCS
from simulation.clock import Clock, SimulatedScripts
from simulation.picture import picture
from simulation.play import Played, play
from simulation.referee import Finding, Left, Referee, most_within, span
from simulation.scenarios import SCENARIOS, shorter
from simulation.timeline import Timeline
from simulation.voucherify import Heard
from tests.queues import event

pytestmark = pytest.mark.anyio

SEED = 11
PAYING = "at_most_once"


async def run(url: str, name: str, seed: int = SEED) -> Played:
    return await play(shorter(SCENARIOS[name]), url=url, seed=seed)


# --- the scenarios --------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
async def test_every_promise_is_kept_in(valkey_url: str, name: str) -> None:
    played = await run(valkey_url, name)
    broken = {f.check for f in played.findings if not f.kept}
    if (
        name != "sale"
    ):  # in small, a few tries more or less are a large part of the time
        broken.discard("eta")
    assert broken == set()
    assert played.accepted > 500
    assert played.waiting == 0
    assert played.emptied_ms is not None
    assert sum(played.outcomes.values()) == played.sent
    checked = {finding.check for finding in played.findings}
    assert {"windows", "once", "accounted", "in_order", "one_at_a_time"} <= checked


async def test_the_same_seed_gives_the_same_result(valkey_url: str) -> None:
    first = await run(valkey_url, "rotation")
    assert await run(valkey_url, "rotation") == first
    other = await run(valkey_url, "rotation", SEED + 1)
    assert other.samples != first.samples


async def test_a_budget_that_is_too_wide_is_found(valkey_url: str) -> None:
    """The scenario's own referee sees what Voucherify's limits would have refused."""
    scenario = shorter(SCENARIOS["rotation"])
    fleets = (replace(scenario.fleets[0], budget="9/5s"), scenario.fleets[1])
    wide = await play(replace(scenario, fleets=fleets), url=valkey_url, seed=SEED)
    assert wide.turned_away > 0
    assert max(f.found for f in wide.findings if f.check == "windows") > 5


# --- the referee ----------------------------------------------------------------------


def claim(name: str, delivery: str = PAYING) -> Claimed:
    return Claimed("high", f"{name}-0", 0, 0, name, "e", delivery, "{}")


def refereed(*names: str, delivery: str = PAYING, customer: str = "") -> Referee:
    referee = Referee()
    for at_ms, name in enumerate(names):
        referee.accepted(
            name,
            at_ms=at_ms,
            customer=customer or name,
            lane="high",
            delivery=delivery,
            ttl_ms=1_000,
            value=1,
        )
    return referee


def called(referee: Referee, name: str, *moments: int, taken: bool = True) -> None:
    answer = Answer(verdict=Verdict.DELIVERED, reason="delivered", status=200)
    referee.marked(claim(name))
    for at_ms in moments:
        referee.departed(claim(name), at_ms)
        heard = Heard(answer=answer, after_ms=1, processed=taken)
        referee.arrived(claim(name), heard, "all", at_ms)
        referee.ended(claim(name))


def left(*waiting: str, dead: tuple[tuple[str, str], ...] = (), **totals: int) -> Left:
    return Left(waiting=waiting, dead=dead, totals=totals)


def broken(referee: Referee, left: Left) -> dict[str, float]:
    return {f.check: f.found for f in referee.promises(left) if not f.kept}


def test_a_clean_day_has_no_finding() -> None:
    referee = refereed("a", "b", "c")
    called(referee, "a", 5)
    called(referee, "b", 6, taken=False)
    end = left("c", dead=(("b", "ambiguous"),), received=3, delivered=1, ambiguous=1)
    assert broken(referee, end) == {}


def test_an_event_that_pays_twice_is_found() -> None:
    referee = refereed("a")
    called(referee, "a", 5, 6)
    assert broken(referee, left(received=1, delivered=1)) == {"once": 1}
    assert referee.duplicates("at_least_once") == 0


def test_a_repeat_of_what_may_be_repeated_is_counted_and_allowed() -> None:
    referee = refereed("a", delivery="at_least_once")
    called(referee, "a", 5, 6, 7)
    assert broken(referee, left(received=1, delivered=1)) == {}
    assert referee.duplicates("at_least_once") == 2


@pytest.mark.parametrize(
    ("end", "found"),
    [
        (left(received=2, delivered=1), {"accounted", "lost"}),
        (left(received=1, delivered=1), {"accounted", "lost"}),
        (left("a", "a", received=2), {"one_outcome", "lost"}),
        (
            left("a", dead=(("a", "ambiguous"),), received=2, ambiguous=1),
            {"one_outcome", "lost"},
        ),
        (left(received=2, delivered=2), {"lost"}),
        (
            left(dead=(("a", "expired"),), received=2, delivered=1, expired=1),
            {"true_outcome", "lost"},
        ),
        (
            left(dead=(("b", "rejected"),), received=2, delivered=1, rejected=1),
            {"true_outcome"},
        ),
        (
            left(dead=(("b", "ambiguous"),), received=2, delivered=1, ambiguous=1),
            {"true_outcome"},
        ),
        (
            left("b", dead=(("x", "expired"),), received=2, delivered=1, expired=1),
            {"true_outcome", "accounted"},
        ),
    ],
    ids=[
        "one-is-gone",
        "one-was-never-received",
        "one-waits-twice",
        "one-waits-and-is-dead",
        "one-was-never-sent",
        "one-arrived-and-is-too-old",
        "one-was-never-refused",
        "one-never-left",
        "a-stranger-is-dead",
    ],
)
def test_a_wrong_end_is_found(end: Left, found: set[str]) -> None:
    referee = refereed("a", "b")
    called(referee, "a", 5)
    assert set(broken(referee, end)) == found


def test_calls_side_by_side_and_out_of_order_are_found() -> None:
    referee = refereed("a", "b", "c", customer="ann")
    for name in ("a", "c", "b"):
        referee.claimed(claim(name))
    referee.departed(claim("a"), 1)
    referee.departed(claim("b"), 2)
    referee.ended(claim("a"))
    referee.ended(claim("b"))
    referee.departed(claim("c"), 3)
    found = broken(referee, left("a", "b", "c", received=3))
    assert found == {"one_at_a_time": 1, "in_order": 1}


def test_a_call_too_many_is_found_to_the_millisecond() -> None:
    for last, most in ((4_999, 3), (5_000, 2)):
        referee = refereed("a", "b", "c")
        for name, at_ms in (("a", 0), ("b", 10), ("c", last)):
            called(referee, name, at_ms)
        [found] = referee.windows({"all": parse_budget("2/5s")})
        assert (found.found, found.kept) == (most, most <= 2)


def test_a_flood_that_takes_a_lane_is_found() -> None:
    referee = refereed(*(f"f{n}" for n in range(300)), customer="flood")
    for n in range(300):
        referee.accepted(
            f"o{n}",
            at_ms=0,
            customer=f"o{n}",
            lane="high",
            delivery=PAYING,
            ttl_ms=9_000,
            value=1,
        )
    for n in range(150):
        called(referee, f"f{n}", 1_000 + n)
    assert referee.fairness("flood").found == 1
    assert referee.fairness("o1").kept


def test_value_counts_when_it_is_in_time_and_could_be_taken() -> None:
    referee = refereed("good", "late", "never", "refused")
    called(referee, "good", 1_000)
    called(referee, "late", 1_002)
    refusal = Result(lane="high", entry="1-0", verdict="rejected", reason="not_found")
    referee.judged(claim("refused"), refusal)
    assert referee.in_time("high") == pytest.approx(1 / 3)
    assert referee.in_time("low") is None


@given(
    st.lists(st.integers(0, 60), max_size=40).map(sorted),
    st.integers(1, 30),
)
def test_most_within_is_the_plain_count(times: list[int], window: int) -> None:
    plain = [sum(at <= t < at + window for t in times) for at in times]
    assert most_within(times, window) == max(plain, default=0)


# --- time -----------------------------------------------------------------------------


@pytest.fixture
async def simulated(valkey_url: str, prefix: str) -> AsyncIterator[tuple[Queue, Clock]]:
    clock = Clock()
    queue = Queue(url=valkey_url, prefix=prefix, scripts=SimulatedScripts(clock))
    yield queue, clock
    await queue.aclose()


async def take(queue: Queue, seq: int, event: Queueable) -> int:
    [reply] = await queue.commit("w:0", seq, [("ip", [event])], [])
    return reply.codes[0]


async def test_keys_expire_in_simulated_time(
    simulated: tuple[Queue, Clock], valkey_url: str
) -> None:
    queue, clock = simulated
    special = ("digest", 600_000, 0, 0, False, "", 0, 0, False)
    one = event("1", customer="c", lane="low", ttl_ms=9_000_000, special=special)
    window = f"{queue.prefix}:coalesce:c:digest"
    client = redis.asyncio.Redis.from_url(valkey_url)
    try:
        assert await take(queue, 1, one) == QUEUED
        assert await queue.tick("a", 1, look_out=False)
        clock.now_ms += 599_999
        await queue.reap()
        assert await client.exists(window)
        clock.now_ms += 1
        await queue.tick("a", 0, look_out=False)
        assert not await client.exists(window)
    finally:
        await client.aclose()


async def test_a_key_made_anew_does_not_inherit_an_end(
    simulated: tuple[Queue, Clock], valkey_url: str
) -> None:
    queue, clock = simulated
    client = redis.asyncio.Redis.from_url(valkey_url)
    await queue.keep_token("t", {"v": "1"}, who="me", replaces=0, life_ms=1_000)
    _, left_ms, _ = await queue.token("t", who="me", lock_ms=5_000)
    assert left_ms == 1_000
    await queue.unlock_token("t", who="me")
    clock.now_ms += 999
    assert (await queue.token("t", who="me"))[0]["v"] == "1"
    clock.now_ms += 1
    assert (await queue.token("t", who="me"))[0] == {}
    assert await client.zcard(f"{queue.prefix}:simulated:ends") == 0
    await client.aclose()


async def test_things_happen_in_their_order() -> None:
    timeline, seen = Timeline(Clock()), []
    start = timeline.now_ms

    def note(name: str) -> None:
        async def happen() -> None:
            seen.append((name, timeline.now_ms - start))

        timeline.after({"late": 9, "past": -5}.get(name, 3), happen)

    for name in ("late", "one", "two", "past"):
        note(name)
    await timeline.run(lambda: False)
    assert seen == [("past", 0), ("one", 3), ("two", 3), ("late", 9)]


# --- what is told ---------------------------------------------------------------------


async def test_the_picture_is_sound_and_the_table_is_whole(valkey_url: str) -> None:
    played = await run(valkey_url, "rotation")
    root = ET.fromstring(picture([played]))  # noqa: S314  # our own
    assert root.tag.endswith("svg")
    assert "hold" in picture([played])
    cells = report.row(played)
    assert len(cells) == len(report.COLUMNS)
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    written = report.put_in(document, report.markdown([played]))
    assert written.startswith(f"before\n{report.BEGIN}\n| scenario |")
    assert written.endswith(f"{report.END}\nafter\n")
    assert report.put_in(written, "x") == document.replace("old", "x")
    with pytest.raises(ValueError, match="no place for the table"):
        report.put_in("nothing", "x")


async def test_what_is_not_as_expected_is_told(valkey_url: str) -> None:
    played = await run(valkey_url, "rotation")
    played.findings[:] = [f for f in played.findings if f.check != "eta"]
    played.findings.append(Finding(check="eta", found=0.01, most=0.1, said="eta_s"))
    assert list(report.shortcomings([played])) == []
    played.findings.append(Finding(check="once", found=1, most=0, said="x"))
    assert list(report.shortcomings([played])) == [
        "`rotation`: x: 1 of 0: **a fault**."
    ]
    [eta] = report.measures([played])
    assert eta == "`rotation`: eta_s: 0.010, at most 0.100."


def test_the_command_plays_one_and_says_it_as_json() -> None:
    documents = {path: path.read_bytes() for path in DOCS.glob("delivery.*")}
    asked = ["--scenario", "checkout", "--short", "--json"]
    said = subprocess.run(
        [sys.executable, "-m", "simulation", *asked],
        cwd=DOCS.parent,
        capture_output=True,
        check=True,
    )
    [played] = json.loads(said.stdout)
    assert played["name"] == "checkout"
    assert {path: path.read_bytes() for path in DOCS.glob("delivery.*")} == documents


@pytest.mark.parametrize(
    ("ms", "said"),
    [(5_000, "5 s"), (60_000, "1 min"), (2_592_000_000, "30 d"), (1_500, "1.5 s")],
)
def test_a_length_is_told_in_its_unit(ms: int, said: str) -> None:
    assert span(ms) == said
