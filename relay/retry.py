"""How long to wait before the next try: what the upstream told, and our own backoff.

Pure: the clock and the random source are handed in, nothing is kept. Whether there
is to be a next try at all is decided elsewhere.
"""

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

# Voucherify asks for exponential backoff on 429 and 5xx ("Take loyalty to
# production"). At most ten minutes: after an outage the queue must not idle long.
BASE_MS = 1_000
CAP_MS = 600_000

HOUR_MS = 3_600_000
# The longest cycle in which a plan counts its calls is a month ("API limits").
MONTH_MS = 31 * 24 * HOUR_MS


def backoff_ms(
    attempt: int,
    *,
    random: Callable[[], float],
    base_ms: int = BASE_MS,
    cap_ms: int = CAP_MS,
) -> int:
    """Draw the wait after failure number `attempt`, counted from 1.

    Uniform from `base_ms` up to `base_ms * 2 ** attempt`, at most `cap_ms`: 1 to 2 s,
    1 to 4 s, 1 to 8 s, … 1 s to 10 min. `random` gives numbers from 0.0 up to 1.0.
    """
    if attempt < 1:
        msg = f"attempts are counted from 1, this one is {attempt}"
        raise ValueError(msg)
    # Full jitter spreads events that failed together over the whole span; a fixed or
    # half fixed wait would bring them back together. It starts at the base and not
    # at zero, so an upstream that has just failed gets one second without us.
    # "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    doublings = min(attempt, cap_ms.bit_length())  # 2 ** 10_000 is of no use
    ceiling = max(base_ms, min(cap_ms, base_ms << doublings))
    return base_ms + int(random() * (ceiling - base_ms))


def next_delay_ms(
    attempt: int, told_ms: int | None, random: Callable[[], float]
) -> int:
    """Draw the wait after failure number `attempt`, never less than `told_ms`."""
    return max(told_ms or 0, backoff_ms(attempt, random=random))


def told_ms(headers: Mapping[str, str], *, now: float, cap_ms: int) -> int | None:
    """Read from an answer's headers when the next call is welcome; None if unsaid.

    `Retry-After` is seconds or a date (RFC 9110, 10.2.3), `X-Rate-Limit-Retry` Unix
    seconds (Voucherify, "API limits"). When both make sense, the later one counts.
    """
    retry_after = headers.get("retry-after")
    allowed_at = number(headers.get("x-rate-limit-retry"))
    if retry_after is None and allowed_at is None:
        return None
    # Moments are by the upstream's clock, and its Date header shows that one.
    here = _moment(headers.get("date")) or now
    waits: list[float] = []
    if (seconds := number(retry_after)) is not None:
        waits.append(seconds)
    elif (moment := _moment(retry_after)) is not None:
        waits.append(moment - here)
    if allowed_at is not None:
        waits.append(allowed_at - here)
    # A moment in 1970 or in the year 50000 is a mistaken unit, not a wish.
    sane = [wait for wait in waits if abs(wait) * 1000 <= MONTH_MS]
    if not sane:
        return None
    return max(0, min(math.ceil(max(sane) * 1000), cap_ms))


def number(value: str | None) -> int | None:
    """Read a header's number, a fraction rounded up; None for anything else."""
    if value is None or not re.fullmatch(r"\s*[0-9]{1,15}(\.[0-9]{1,9})?\s*", value):
        return None
    return math.ceil(float(value))


def _moment(value: str | None) -> float | None:
    if not value:
        return None
    try:
        moment = parsedate_to_datetime(value)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
