"""Waits grow, spread, stay within bounds, and never undercut the upstream."""

import random
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.retry import HOUR_MS, MONTH_MS, backoff_ms, next_delay_ms, number, told_ms

NOW = 1_790_000_000.0
chance = st.floats(min_value=0, max_value=1, exclude_max=True)


@pytest.mark.parametrize(
    ("attempt", "longest"),
    [(1, 2_000), (2, 4_000), (3, 8_000), (9, 512_000), (10, 600_000), (11, 600_000)],
)
def test_the_span_doubles_from_one_second_to_ten_minutes(
    attempt: int, longest: int
) -> None:
    assert backoff_ms(attempt, random=lambda: 0.0) == 1_000
    almost = backoff_ms(attempt, random=lambda: 1 - 2**-53)
    assert longest - 1 <= almost <= longest


@given(st.integers(min_value=1, max_value=10_000), chance)
@example(10_000, 0.999)
def test_every_wait_is_within_one_second_and_ten_minutes(
    attempt: int, drawn: float
) -> None:
    assert 1_000 <= backoff_ms(attempt, random=lambda: drawn) <= 600_000


def test_jitter_is_full_events_that_failed_together_come_back_apart() -> None:
    source = random.Random(7)
    waits = [backoff_ms(5, random=source.random) for _ in range(4_000)]
    quarters = [0, 0, 0, 0]
    for wait in waits:
        quarters[(wait - 1_000) * 4 // 31_000] += 1
    assert all(900 < count < 1_100 for count in quarters)


@pytest.mark.parametrize("attempt", [0, -1])
def test_an_attempt_below_one_is_refused(attempt: int) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        backoff_ms(attempt, random=random.random)


def test_base_and_cap_can_be_chosen_and_the_base_wins() -> None:
    assert backoff_ms(1, random=lambda: 0.5, base_ms=10, cap_ms=100) == 15
    assert backoff_ms(9, random=lambda: 0.5, base_ms=10, cap_ms=100) == 55
    assert backoff_ms(9, random=lambda: 0.5, base_ms=200, cap_ms=100) == 200


@given(
    st.integers(min_value=1, max_value=100),
    st.none() | st.integers(min_value=0, max_value=MONTH_MS),
    chance,
)
def test_the_next_try_is_never_sooner_than_the_upstream_asked(
    attempt: int, told: int | None, drawn: float
) -> None:
    delay = next_delay_ms(attempt, told, lambda: drawn)
    assert delay == max(told or 0, backoff_ms(attempt, random=lambda: drawn))


def http_date(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(seconds, UTC), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param({"date": http_date(NOW)}, None, id="a-date-alone"),
        pytest.param({"retry-after": "30"}, 30_000, id="seconds"),
        pytest.param({"retry-after": " 30 "}, 30_000, id="seconds-with-spaces"),
        pytest.param({"retry-after": "0"}, 0, id="now"),
        pytest.param({"retry-after": "0.2"}, 1_000, id="a-fraction-rounds-up"),
        pytest.param({"retry-after": "86400"}, HOUR_MS, id="a-day-is-cut-to-an-hour"),
        pytest.param({"retry-after": http_date(NOW + 90)}, 90_000, id="date"),
        pytest.param({"retry-after": http_date(NOW - 90)}, 0, id="past-date"),
        pytest.param(
            {"retry-after": "Monday, 21-Sep-26 14:14:20 GMT", "date": http_date(NOW)},
            60_000,
            id="obsolete-date-form",
        ),
        pytest.param({"retry-after": "-5"}, None, id="negative"),
        pytest.param({"retry-after": "soon"}, None, id="word"),
        pytest.param({"retry-after": ""}, None, id="empty"),
        pytest.param({"retry-after": "5, 7"}, None, id="two-at-once"),
        pytest.param({"retry-after": "1e3"}, None, id="exponent"),
        pytest.param({"retry-after": "٣"}, None, id="other-digits"),
        pytest.param({"retry-after": "9" * 400}, None, id="endless"),
        pytest.param({"retry-after": str(MONTH_MS)}, None, id="centuries"),
        pytest.param(
            {"x-rate-limit-retry": str(int(NOW) + 12)}, 12_000, id="epoch-seconds"
        ),
        pytest.param({"x-rate-limit-retry": str(int(NOW) - 3)}, 0, id="just-over"),
        pytest.param({"x-rate-limit-retry": "12"}, None, id="not-an-epoch"),
        pytest.param(
            {"x-rate-limit-retry": str(int(NOW) * 1000)}, None, id="epoch-milliseconds"
        ),
        pytest.param(
            {"retry-after": "5", "x-rate-limit-retry": str(int(NOW) + 12)},
            12_000,
            id="the-later-is-the-second",
        ),
        pytest.param(
            {"retry-after": "50", "x-rate-limit-retry": str(int(NOW) + 12)},
            50_000,
            id="the-later-is-the-first",
        ),
        pytest.param(
            {"retry-after": "5", "x-rate-limit-retry": "4"}, 5_000, id="one-is-sane"
        ),
        pytest.param(
            {"date": http_date(NOW - 500), "x-rate-limit-retry": str(int(NOW) - 480)},
            20_000,
            id="by-the-upstreams-own-clock",
        ),
        pytest.param(
            {"date": http_date(NOW + 500), "retry-after": http_date(NOW + 503)},
            3_000,
            id="date-by-the-upstreams-own-clock",
        ),
        pytest.param(
            {"date": "yesterday", "x-rate-limit-retry": str(int(NOW) + 12)},
            12_000,
            id="our-clock-when-its-date-is-unreadable",
        ),
    ],
)
def test_what_the_upstream_asks_for(headers: dict[str, str], told: int | None) -> None:
    assert told_ms(headers, now=NOW, cap_ms=HOUR_MS) == told


def test_a_spent_plan_may_ask_for_weeks() -> None:
    headers = {"retry-after": str(20 * 86_400)}
    assert told_ms(headers, now=NOW, cap_ms=MONTH_MS) == 20 * 86_400_000


# Bytes of a header, and things that look like what is expected there.
header = st.one_of(
    st.binary(max_size=40).map(lambda raw: raw.decode("latin-1")),
    st.text(alphabet="0123456789.-+eE ,:", max_size=30),
    st.from_regex(
        r"\A[A-Z][a-z]{2}, [0-9]{1,3} [A-Z][a-z]{2} [0-9]{1,6} "
        r"[0-9]{1,3}:[0-9]{1,3}:[0-9]{1,3} (GMT|[+-][0-9]{1,9})\Z"
    ),
)


@given(
    st.dictionaries(
        st.sampled_from(["date", "retry-after", "x-rate-limit-retry"]), header
    )
)
def test_any_header_gives_a_bounded_wait_or_none(headers: dict[str, str]) -> None:
    told = told_ms(headers, now=NOW, cap_ms=HOUR_MS)
    assert told is None or 0 <= told <= HOUR_MS


@given(header)
def test_any_header_is_a_whole_number_or_nothing(value: str) -> None:
    parsed = number(value)
    assert parsed is None or parsed >= 0
