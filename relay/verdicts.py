"""What an answer of Voucherify means for the event that was sent.

Pure: an answer's status, headers and body in, an `Answer` out. The status decides;
headers and body only say more about it. Texts are cut to length, and no credential
that an answer may quote gets into them.
"""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from relay.outcomes import Hold
from relay.retry import HOUR_MS, MONTH_MS, number, told_ms

# What is shorter is no credential, and would blacken every other word.
MIN_SECRET = 8


class Verdict(StrEnum):
    """What an answer, or the lack of one, means for the event that was sent."""

    DELIVERED = "delivered"  # 2xx, whatever the body says.
    RETRY = "retry"  # Not processed: it was not sent, or 408, 502, 503.
    WAIT = "wait"  # 429: again when told; spends no attempt.
    RENEWED = "renewed"  # Not processed, for want of a token: at once, with a new one.
    UNKNOWN = "unknown"  # May have been processed: 500, 504, silence after sending.
    REJECTED = "rejected"  # 400, 404, 413, 422, …: the same event would fail again.
    HOLD = "hold"  # No event gets through until somebody acts; see `Answer.hold`.
    ABSENT = "absent"  # Looked up: it was not processed.
    UNCLEAR = "unclear"  # Looked up: nobody can tell.


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What Voucherify said to one event. Texts are one line each and cut to length."""

    verdict: Verdict
    reason: str  # snake_case, for counters and logs
    status: int | None = None  # None: there was no answer
    hold: Hold | None = None
    # What the upstream asked for: at most 1 h, or 31 days while the plan is spent.
    # With a 2xx it is when the calls that `remaining` counts are restored.
    retry_after_ms: int | None = None
    error_key: str | None = None
    error_message: str | None = None  # may quote the customer's id: not for logs
    error_details: str | None = None
    request_id: str | None = None  # what Voucherify's support asks for
    limit: int | None = None
    remaining: int | None = None
    limit_type: str | None = None


_BY_STATUS: dict[int, tuple[Verdict, Hold | None]] = {
    401: (Verdict.HOLD, Hold.AUTH),
    402: (Verdict.HOLD, Hold.PLAN),
    403: (Verdict.HOLD, Hold.AUTH),
    405: (Verdict.HOLD, Hold.CONFIG),
    406: (Verdict.HOLD, Hold.CONFIG),
    408: (Verdict.RETRY, None),
    415: (Verdict.HOLD, Hold.CONFIG),
    429: (Verdict.WAIT, None),
    502: (Verdict.RETRY, None),
    503: (Verdict.RETRY, None),
}
_BY_CLASS: dict[int, tuple[Verdict, Hold | None]] = {
    2: (Verdict.DELIVERED, None),
    3: (Verdict.HOLD, Hold.CONFIG),  # the API redirects nobody: this is not the API
    4: (Verdict.REJECTED, None),
}

_REASONS = {Verdict.DELIVERED: "delivered", Verdict.WAIT: "rate_limited"}


def read_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: float,
    secrets: Sequence[str] = (),
) -> Answer:
    """Judge an answer by its status; `secrets` are what it must not be quoted with."""
    limit_type = _code(_hidden(headers.get("x-rate-limit-type"), secrets))
    fate = _BY_STATUS.get(status) or _BY_CLASS.get(status // 100)
    verdict, hold = fate or (Verdict.UNKNOWN, None)
    if status == 429 and limit_type == "api_calls_cycle":
        # Spent until the plan's cycle ends: that takes days, not a minute.
        verdict, hold = Verdict.HOLD, Hold.PLAN
    cap_ms = MONTH_MS if hold is Hold.PLAN else HOUR_MS
    # The body of a 2xx shows the customer's stored profile: it is not looked at.
    error = {} if verdict is Verdict.DELIVERED else _read_error(body)
    said = {name: _hidden(value, secrets) for name, value in error.items()}
    key = _text(said.get("key"), 64)
    named = _code(key) if verdict in (Verdict.REJECTED, Verdict.HOLD) else None
    return Answer(
        verdict=verdict,
        reason=_REASONS.get(verdict) or named or f"upstream_{status}",
        status=status,
        hold=hold,
        retry_after_ms=told_ms(headers, now=now, cap_ms=cap_ms),
        error_key=key,
        error_message=_text(said.get("message"), 500),
        error_details=_text(said.get("details"), 500),
        request_id=_text(said.get("request_id"), 64),
        limit=number(headers.get("x-rate-limit-limit")),
        remaining=number(headers.get("x-rate-limit-remaining")),
        limit_type=limit_type,
    )


def _read_error(body: bytes) -> dict[str, object]:
    # Voucherify's own is {code, key, message, details, request_id}, its framework's
    # {statusCode, error, message} (400 for unreadable JSON, 413). The balancer and the
    # firewall in front speak HTML or plain text, or say nothing.
    try:
        error: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return {"message": re.sub(r"<[^<>]*>", " ", body.decode(errors="replace"))}
    if not isinstance(error, dict):
        return {"message": error}
    if "message" not in error:
        nested = error.get("error")
        error["message"] = nested.get("message") if isinstance(nested, dict) else nested
    return error


def _hidden(value: object, secrets: Sequence[str]) -> str | None:
    """A text without the credentials in it; None for anything else."""
    if not isinstance(value, str):
        return None
    for secret in secrets:
        if len(secret) >= MIN_SECRET:
            value = value.replace(secret, "***")
    return value


def _text(value: str | None, most: int) -> str | None:
    """One line of printable characters, fit for a terminal; None when empty."""
    if not value:
        return None
    visible = "".join(c if c.isprintable() else " " for c in value[: 4 * most])
    return " ".join(visible.split())[:most] or None


def _code(text: str | None) -> str | None:
    if not text:
        return None
    return re.sub(r"[^a-z0-9]+", "_", text[:64].lower()).strip("_") or None
