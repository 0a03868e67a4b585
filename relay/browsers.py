"""What a page's snippet tells of the way out of the browser, and which browser it was.

The report counts events since the relay heard last: `called`, and those that never
left, by reason. It is the browser's word, so it is a statistic and decides nothing.
Pure.
"""

import re
from collections.abc import Iterable, Mapping

import msgspec

# Of a report; `arrived` is counted by the relay. docs/snippet.md tells each.
KINDS = ("called", "full", "offline", "quota", "late")
MAX_COUNT = 10_000  # a page that tells more is not believed

# The first that is found counts: most browsers name others after themselves.
_FAMILIES = {
    "bot": r"bot\b|crawl|spider|headless",
    "edge": r"\bedg(?:e|a|ios)?/",
    "opera": r"\bopr/|\bopera\b|\bopt/",
    "samsung": r"\bsamsungbrowser/",
    "firefox": r"\b(?:firefox|fxios)/",
    "chrome": r"\b(?:chrome|chromium|crios)/",
    "safari": r"\bsafari/",
    "webview": r"\bapplewebkit/",  # an app that shows pages, on an iPhone
}
FAMILIES = (*_FAMILIES, "other")
_FAMILY = re.compile(
    "|".join(f"(?P<{name}>{pattern})" for name, pattern in _FAMILIES.items()),
    re.IGNORECASE,
)
MAX_AGENT = 300  # characters of a User-Agent that are looked at


def family(user_agent: bytes) -> str:
    """The family of a browser, one of `FAMILIES`."""
    found = {
        m.lastgroup for m in _FAMILY.finditer(user_agent[:MAX_AGENT].decode("latin-1"))
    }
    return next((name for name in _FAMILIES if name in found), "other")


def read_report(raw: bytes) -> dict[str, int] | None:
    """A report's counts; None when it is none. Never raises: it costs no event."""
    try:
        told = msgspec.json.decode(raw, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    counts = {kind: told.get(kind) for kind in KINDS}
    return {
        kind: n
        for kind, n in counts.items()
        if isinstance(n, int) and not isinstance(n, bool) and 0 < n <= MAX_COUNT
    }


def counts(
    agent: bytes, report: Mapping[str, int], statuses: Iterable[str]
) -> list[tuple[str, int]]:
    """What to count for a batch with a report: `<family>:<kind>` and how many.

    `statuses` are what its events were answered. One that is to come again, or was
    here before, has not arrived now.
    """
    arrived = sum(
        status not in ("duplicate", "rate_limited", "unavailable")
        for status in statuses
    )
    told = {**report, "arrived": arrived}
    named = family(agent)
    return [(f"{named}:{kind}", n) for kind, n in told.items() if n]
