"""Dead letters are found by what they have in common, and told without customers."""

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.dead_letters import (
    MAX_IDS,
    OBSTACLES,
    WrongField,
    cost,
    drop,
    page,
    read_entry,
    read_letters,
    read_limit,
    read_new_ttl,
    read_time,
    survey,
    told_whole,
)
from relay.digests import Digests
from relay.outcomes import DEAD, letter_cure
from relay.queue import Letters
from tests.queues import Bench, event, result, simulated

pytestmark = pytest.mark.anyio

TTL_MS = 3_600_000
NOW_MS = 1_800_000_000_000
DIGESTS = Digests(b"k")


@pytest.fixture
async def bench(redis_url: str, prefix: str) -> AsyncIterator[Bench]:
    async with simulated(redis_url, prefix) as made:
        yield made


async def bury(bench: Bench, n: int = 1, **parts: object) -> None:
    """Make `n` dead letters; `reason`, `verdict` and `error` are what they died of."""
    verdict = str(parts.pop("verdict", "rejected"))
    died = {name: parts.pop(name) for name in ("reason", "error") if name in parts}
    await bench.take(*(event(**parts) for _ in range(n)))  # type: ignore[arg-type]
    while n:  # one customer's go one at a time
        claimed = await bench.claim(n)
        await bench.settle(*(result(c, verdict, **died) for c in claimed))
        n -= len(claimed)


async def count(bench: Bench, **parts: object) -> int:
    letters = Letters(**parts)  # type: ignore[arg-type]  # its own fields
    return (await survey(bench.queue, letters, ttl_ms=TTL_MS, batch=2)).matched


async def test_letters_are_found_by_every_part(bench: Bench) -> None:
    await bury(bench, 3, reason="bad", name="paid", customer="d1")
    await bury(bench, 2, verdict="ambiguous", reason="read_timeout", customer="d2")
    await bury(bench, 1, verdict="expired", reason="bad", name="seen", customer="d1")
    assert await count(bench) == 6
    assert await count(bench, outcome="rejected") == 3
    assert await count(bench, reason="bad") == 4
    assert await count(bench, event="paid") == 3
    assert await count(bench, customers=("d1", "other")) == 4
    assert await count(bench, customers=("other",)) == 0
    assert await count(bench, reason="bad", outcome="expired", customers=("d1",)) == 1


async def test_letters_are_found_by_when_they_died(bench: Bench) -> None:
    key = f"{bench.queue.prefix}:dead"
    for at in ("1000-0", "1000-7", "2000-0"):
        await bench.client.xadd(key, {"id": at}, id=at)
    assert await count(bench, since_ms=1000) == 3
    assert await count(bench, since_ms=1001) == 1
    assert await count(bench, until_ms=1000) == 2
    assert await count(bench, until_ms=999) == 0
    assert await count(bench, since_ms=1000, until_ms=2000) == 3
    found, after = await page(bench.queue, Letters(until_ms=1000), most=9, batch=1)
    assert ([one["id"] for one in found], after) == (["1000-7", "1000-0"], "")


async def test_a_survey_says_what_a_replay_would_do(bench: Bench) -> None:
    await bury(bench, 2, reason="bad", name="paid")
    await bury(bench, 1, verdict="ambiguous", reason="read_timeout")
    await bury(bench, 3, verdict="expired", reason="ttl", ttl_ms=1_000)
    await bench.clock.pass_ms(1_000)
    seen = await survey(bench.queue, Letters(), ttl_ms=TTL_MS, batch=1)
    assert (seen.matched, seen.free) == (6, 2)
    assert seen.skipped() == {"too_old": 3, "ambiguous": 1}
    assert seen.by_reason() == [
        ("expired", "ttl", 3),
        ("rejected", "bad", 2),
        ("ambiguous", "read_timeout", 1),
    ]
    assert seen.by_event() == [("paid", 2)]
    all_of_it = await survey(
        bench.queue, Letters(), ttl_ms=TTL_MS, new_ttl_ms=1, may_pay_twice=True
    )
    assert (all_of_it.free, all_of_it.skipped()) == (6, {})
    assert set(seen.skipped()) <= set(OBSTACLES)


async def test_ids_that_are_not_there_are_told(bench: Bench) -> None:
    await bury(bench)
    [letter] = (await page(bench.queue, Letters(), most=1))[0]
    ids = ("5-5", str(letter["id"]))
    seen = await survey(bench.queue, Letters(ids=ids), ttl_ms=TTL_MS, batch=1)
    assert (seen.matched, seen.free, seen.skipped()) == (1, 1, {"gone": 1})


async def test_the_cost_is_calls_and_minutes_behind_what_waits(bench: Bench) -> None:
    await bury(bench, 12)
    seen = await survey(bench.queue, Letters(), ttl_ms=TTL_MS)
    told = await cost(bench.queue, seen, None)
    assert (told.calls, told.minutes, told.hold) == (12, None, "")  # no budget known
    gauges = f"{bench.queue.prefix}:gauges"
    await bench.client.hset(gauges, mapping={"budget_per_s": "0.1", "eta_s": "60"})
    await bench.queue.hold("")
    told = await cost(bench.queue, seen, None)
    assert (told.minutes, told.waiting_s, told.hold) == (3.0, 60.0, "by_hand")
    assert (await cost(bench.queue, seen, 6)).calls == 6


async def test_a_page_is_the_newest_and_says_where_to_go_on(bench: Bench) -> None:
    for n in range(7):
        reason = "odd" if n % 2 else "even"
        await bury(bench, 1, id=f"id-{n}", reason=reason)
    seen: list[object] = []
    after = ""
    while True:
        found, after = await page(
            bench.queue, Letters(reason="even"), most=3, after=after, batch=2
        )
        seen.append([one["event_id"] for one in found])
        if not after:
            break
    assert seen in ([["id-6", "id-4", "id-2"], ["id-0"]],)
    assert await page(bench.queue, Letters(event="none"), most=3) == ([], "")


async def test_a_list_has_nothing_of_the_customer_and_the_whole_has_all(
    bench: Bench,
) -> None:
    error = {"key": "bad", "message": "about zoë", "request_id": "v-1"}
    body = {"event": "e", "customer": {"source_id": "zoë"}}
    await bury(bench, 1, reason="bad", error=json.dumps(error), body=json.dumps(body))
    [told] = (await page(bench.queue, Letters(), most=1))[0]
    assert "zo" not in json.dumps(told)
    assert (told["reason"], told["request_id"]) == ("bad", "v-1")
    entry = str(told["id"])
    letter = await bench.queue.letter(entry)
    assert letter is not None
    whole = told_whole(entry, letter)
    assert (whole["body"], whole["error"]) == (body, error)
    assert whole["ttl_ms"] == TTL_MS
    assert whole["received_ms"] == bench.clock.us // 1000
    assert await bench.queue.letter("1-1") is None


async def test_letters_no_relay_wrote_are_listed_too(bench: Bench) -> None:
    key = f"{bench.queue.prefix}:dead"
    await bench.client.xadd(key, {"body": "{", "attempts": "x", "error": "{"})
    [told] = (await page(bench.queue, Letters(), most=1))[0]
    letter = await bench.queue.letter(str(told["id"]))
    assert letter is not None
    whole = told_whole(str(told["id"]), letter)
    assert (whole["body"], whole["error"], whole["attempts"]) == ("{", "{", None)


async def test_to_drop_is_counted_and_leaves_the_outcomes(bench: Bench) -> None:
    await bury(bench, 5, reason="bad")
    await bury(bench, 2, reason="worse")
    assert await drop(bench.queue, Letters(reason="bad"), most=3, batch=2) == 3
    assert await drop(bench.queue, Letters(reason="bad"), batch=1) == 2
    assert await drop(bench.queue, Letters(reason="bad")) == 0
    assert await count(bench) == 2
    assert await bench.totals() == {"received": 7, "rejected": 7}
    stamp = f"{datetime.fromtimestamp(bench.clock.us / 1e6, UTC):%Y%m%d%H%M}"
    minute = await bench.queue.hash(f"minute:{stamp}")
    assert minute["dead_letters_dropped"] == "5"


# --- what an operator gives -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("30m", NOW_MS - 1_800_000),
        ("0s", NOW_MS),
        ("1970-01-01T00:00", 0),
        ("2026-11-26", 1_795_651_200_000),
        ("2026-11-26T03:00:00+01:00", 1_795_658_400_000),
        ("2026-11-26T02:00:00Z", 1_795_658_400_000),
    ],
)
def test_a_time_is_a_span_before_now_or_iso(text: str, ms: int) -> None:
    assert read_time("since", text, NOW_MS) == ms


@pytest.mark.parametrize(
    ("given_parts", "field"),
    [
        ({"outcome": "delivered"}, "outcome"),
        ({"reason": "x" * 301}, "reason"),
        ({"event": "\udc80"}, "event"),
        ({"customer": "u1"}, "customer"),  # without the key of the digests
        ({"since": "soon"}, "since"),
        ({"since": "999999999d"}, "since"),
        ({"until": "1969-12-31"}, "until"),
        ({"until": "2026-13-01"}, "until"),
        ({"since": "1h", "until": "2h"}, "until"),
        ({"ids": ["1"]}, "ids"),
        ({"ids": ["1-1\n"]}, "ids"),
        ({"ids": ["9" * 30 + "-0"]}, "ids"),
        ({"ids": ["1-1"] * (MAX_IDS + 1)}, "ids"),
    ],
    ids=str,
)
def test_what_cannot_be_used_names_the_field(
    given_parts: dict[str, object], field: str
) -> None:
    with pytest.raises(WrongField) as caught:
        read_letters(now_ms=NOW_MS, **given_parts)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@given(st.text(max_size=30))
def test_no_text_breaks_a_reader(text: str) -> None:
    for read in (
        lambda: read_time("since", text, NOW_MS),
        lambda: read_entry("ids", text),
        lambda: read_limit(text),
        lambda: read_new_ttl(text),
    ):
        with suppress(WrongField):
            read()


def test_a_customer_is_looked_for_under_every_name() -> None:
    letters = read_letters(now_ms=NOW_MS, customer="u1", digests=DIGESTS)
    by_name = (
        DIGESTS.customer(source_id="u1"),
        DIGESTS.customer(source_id="u1", signed=True),
        DIGESTS.customer(id="u1"),
    )
    assert letters.customers == by_name


@pytest.mark.parametrize("text", ["0s", "31d", "soon", 0, 10**9])
def test_a_new_time_to_live_is_bounded(text: str | int) -> None:
    with pytest.raises(WrongField, match="new_ttl: "):
        read_new_ttl(text)
    assert (read_new_ttl("30d"), read_new_ttl(None)) == (30 * 86_400_000, 0)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "9999999999", 0])
def test_a_limit_is_a_whole_number(text: str | int) -> None:
    with pytest.raises(WrongField, match="limit: "):
        read_limit(text)
    with pytest.raises(WrongField, match="at most 5"):
        read_limit(6, most=5)
    assert (read_limit(5, most=5), read_limit(None)) == (5, None)


@pytest.mark.parametrize("outcome", sorted(DEAD))
def test_every_dead_letter_has_a_cure(outcome: str) -> None:
    for reason in ("ttl", "upstream_503", "upstream_400", "redis_full", "oauth_busy"):
        assert letter_cure(outcome, reason).endswith(".")
    assert "--yes-it-may-pay-twice" in letter_cure("ambiguous", "ttl")
