"""What an answer means for an event in doubt: the rest of the table is in others."""

import pytest

from relay.judgement import ASK_AGAIN_MS, interrupted, judged
from relay.queue import Claimed
from relay.verdicts import Answer, Verdict, read_answer

LAST_CALL = {"x-rate-limit-remaining": "0", "retry-after": "7"}


def doubted(since_ms: int = 1) -> Claimed:
    return Claimed("retry", "1-1", 1, 1, "id", "e", "verify:n", "{}", since_ms)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 406, 415, 301])
@pytest.mark.parametrize(
    ("headers", "pause_ms"), [({}, 0), ({"retry-after": "7"}, 0), (LAST_CALL, 7_000)]
)
def test_a_refused_question_holds_up_itself_alone(
    status: int, headers: dict[str, str], pause_ms: int
) -> None:
    answer = read_answer(status, headers, b"", now=0)
    result = judged(doubted(), answer, probe=False, backoff=lambda *_: 1)
    assert (result.verdict, result.delay_ms) == ("wait", ASK_AGAIN_MS)
    # The end of a window is the end of it for everybody, and is told in seconds.
    assert (result.signal, result.pause_ms) == ("none", pause_ms)
    sent = judged(doubted(0), answer, probe=False, backoff=lambda *_: 1)
    assert sent.delay_ms != ASK_AGAIN_MS
    assert sent.signal != "none"


@pytest.mark.parametrize(
    ("answer", "verdict", "signal"),
    [
        # Who may read may still not be able to write.
        (Answer(verdict=Verdict.DELIVERED, reason="found"), "delivered", "none"),
        (Answer(verdict=Verdict.ABSENT, reason="not_found"), "resend", "none"),
        (Answer(verdict=Verdict.UNCLEAR, reason="why"), "ambiguous", "none"),
        (Answer(verdict=Verdict.UNKNOWN, reason="why"), "retry", "failed"),
        (Answer(verdict=Verdict.RETRY, reason="why"), "retry", "failed"),
        (read_answer(402, {}, b"", now=0), "wait", "plan_hold"),
        (read_answer(429, {}, b"", now=0), "wait", "none"),
    ],
)
def test_what_is_heard_of_an_event_in_doubt(
    answer: Answer, verdict: str, signal: str
) -> None:
    result = judged(doubted(), answer, probe=False, backoff=lambda *_: 1)
    assert (result.verdict, result.signal) == (verdict, signal)


def test_an_interrupted_question_is_put_again_and_an_interrupted_call_is_not() -> None:
    assert interrupted(doubted(), "why").verdict == "retry"
    assert interrupted(doubted(0), "why").verdict == "ambiguous"


@pytest.mark.parametrize("told_ms", [None, 5_000])
def test_an_event_whose_token_was_renewed_goes_at_once(told_ms: int | None) -> None:
    answer = Answer(verdict=Verdict.RENEWED, reason="why", retry_after_ms=told_ms)
    for claimed in (doubted(), doubted(0)):
        result = judged(claimed, answer, probe=False, backoff=lambda *_: 1)
        assert (result.verdict, result.delay_ms) == ("wait", 0)
