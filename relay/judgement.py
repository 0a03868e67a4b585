"""The delivery table: what an answer means for one event in flight.

Pure: an event and an `Answer` in, a `Result` for the settle script out. The delays
between tries are drawn by a function that is handed in, so whoever decides twice with
the same draws decides alike: the forwarder with real time, a simulation with its own.
"""

from collections.abc import Callable

import msgspec

from relay.outcomes import Hold
from relay.queue import Claimed, Result
from relay.verdicts import Answer, Verdict

DEFAULT_PAUSE_MS = 5_000  # a 429 that names no time: the window of the client API
HELD_MS = 1_000
ASK_AGAIN_MS = 600_000  # after a look-up that was refused

# Milliseconds until the next try, from the attempt's number and what Voucherify told.
Backoff = Callable[[int, int | None], int]


def judged(
    claimed: Claimed, answer: Answer, *, probe: bool, backoff: Backoff
) -> Result:
    """What is settled when an answer has come, or surely none will come.

    Of an event in doubt it is the answer to the question whether it is there.
    """
    verdict, delay_ms = _fate(claimed, answer, backoff)
    signal, pause_ms = _signal(answer), _pause_ms(answer)
    if claimed.doubted_ms and signal == "ok":
        signal = "none"  # who may read may still not be able to write
    if _question_refused(claimed, answer):
        verdict, delay_ms, signal = "wait", ASK_AGAIN_MS, "none"
        pause_ms = pause_ms if answer.remaining == 0 else 0
    return Result(
        lane=claimed.lane,
        entry=claimed.entry,
        verdict=verdict,
        reason=answer.reason,
        status=answer.status or 0,
        error=_error(answer),
        delay_ms=delay_ms,
        signal=signal,
        pause_ms=pause_ms,
        probe=probe,
        limit=-1 if answer.limit is None else answer.limit,
        remaining=-1 if answer.remaining is None else answer.remaining,
        limit_type=answer.limit_type or "",
    )


def given_back(claimed: Claimed, reason: str, *, probe: bool) -> Result:
    """Certainly not sent: give it back untouched."""
    return Result(
        lane=claimed.lane,
        entry=claimed.entry,
        verdict="release",
        reason=reason,
        delay_ms=HELD_MS,
        probe=probe,
    )


def interrupted(claimed: Claimed, reason: str) -> Result:
    """It may have left, and no answer will come: its delivery rule decides."""
    may_pay_twice = claimed.once and not claimed.doubted_ms
    return Result(
        lane=claimed.lane,
        entry=claimed.entry,
        verdict="ambiguous" if may_pay_twice else "retry",
        reason=reason,
        delay_ms=HELD_MS,
    )


def not_processed(result: Result) -> bool:
    """Whether the same event may certainly be sent again."""
    return result.verdict in ("retry", "wait", "resend")


def _question_refused(claimed: Claimed, answer: Answer) -> bool:
    """Whether it is the question alone that is refused.

    A key may send events and not be allowed to read them: that holds up nothing else,
    and is asked again later, for a key can be given more rights.
    """
    refused = answer.verdict is Verdict.REJECTED
    return bool(claimed.doubted_ms) and (refused or answer.hold in _OF_THE_KEY)


_OF_THE_KEY = (Hold.AUTH, Hold.CONFIG)


def _fate(claimed: Claimed, answer: Answer, backoff: Backoff) -> tuple[str, int]:
    """Verdict for the settle script, and delay in ms."""
    match answer.verdict:
        case Verdict.DELIVERED:
            return "delivered", 0
        case Verdict.REJECTED:
            return "rejected", 0
        case Verdict.WAIT:
            return "wait", answer.retry_after_ms or DEFAULT_PAUSE_MS
        case Verdict.RENEWED:
            return "wait", 0
        case Verdict.HOLD:
            return "wait", HELD_MS
        case Verdict.ABSENT:
            return "resend", 0
        case Verdict.UNCLEAR:
            return "ambiguous", 0
        case Verdict.UNKNOWN if claimed.once and not claimed.doubted_ms:
            return "ambiguous", 0
        case _:
            attempt = claimed.attempts + 1
            return "retry", backoff(attempt, answer.retry_after_ms)


def _signal(answer: Answer) -> str:
    """What an answer says about Voucherify as a whole."""
    match answer.verdict:
        case Verdict.DELIVERED | Verdict.REJECTED | Verdict.ABSENT:
            return "ok"
        case Verdict.RETRY | Verdict.UNKNOWN:
            return "failed"
        case Verdict.HOLD if answer.hold is not None:
            return str(answer.hold)
        case _:
            return "none"


def _pause_ms(answer: Answer) -> int:
    """How long nobody may call: a 429, or the last call of a window."""
    if answer.verdict is Verdict.WAIT:
        return answer.retry_after_ms or DEFAULT_PAUSE_MS
    if answer.verdict is Verdict.HOLD or answer.remaining == 0:
        return answer.retry_after_ms or 0
    return 0


def _error(answer: Answer) -> str:
    """Voucherify's own words, for the dead letters and `Prefer: wait`."""
    if answer.verdict is Verdict.DELIVERED:
        return ""  # the body of a success is not read
    said = {
        "key": answer.error_key,
        "message": answer.error_message,
        "details": answer.error_details,
        "request_id": answer.request_id,
    }
    known = {name: value for name, value in said.items() if value}
    return msgspec.json.encode(known).decode() if known else ""
