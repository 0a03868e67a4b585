"""What a snippet reports is counted by its browser, and decides nothing."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.browsers import (
    FAMILIES,
    KINDS,
    MAX_AGENT,
    MAX_COUNT,
    counts,
    family,
    read_report,
)

_LINUX = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)"
_IPHONE = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 "
    "(KHTML, like Gecko)"
)
AGENTS = {
    f"{_LINUX} Chrome/131.0.0.0 Safari/537.36": "chrome",
    f"{_IPHONE} CriOS/131.0.6778.73 Mobile/15E148 Safari/604.1": "chrome",
    f"{_LINUX} Chrome/131.0.0.0 Safari/537.36 Edg/131.0.0.0": "edge",
    f"{_LINUX} Chrome/131.0.0.0 Mobile Safari/537.36 EdgA/131.0.0.0": "edge",
    f"{_LINUX} Chrome/131.0.0.0 Safari/537.36 OPR/116.0.0.0": "opera",
    f"{_LINUX} SamsungBrowser/27.0 Chrome/125.0.0.0 Mobile Safari/537.36": "samsung",
    "Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0": "firefox",
    f"{_IPHONE} FxiOS/133.0 Mobile/15E148 Safari/605.1.15": "firefox",
    f"{_IPHONE} Version/18.0 Mobile/15E148 Safari/604.1": "safari",
    f"{_IPHONE} Mobile/15E148": "webview",
    f"{_LINUX} HeadlessChrome/131.0.0.0 Safari/537.36": "bot",
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)": "bot",
    "curl/8.5.0": "other",
    "": "other",
}


@pytest.mark.parametrize(("agent", "expected"), AGENTS.items())
def test_a_browser_is_known_by_its_family(agent: str, expected: str) -> None:
    assert family(agent.encode()) == expected


def test_a_long_agent_is_not_read_to_its_end() -> None:
    assert family(b"x" * MAX_AGENT + b" Firefox/133.0") == "other"


@given(st.binary(max_size=400))
def test_any_agent_has_a_family(agent: bytes) -> None:
    assert family(agent) in FAMILIES


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ({"called": 3, "quota": 1}, {"called": 3, "quota": 1}),
        ({}, {}),
        ({"called": MAX_COUNT}, {"called": MAX_COUNT}),
        ({"called": MAX_COUNT + 1}, {}),
        ({"called": 10**400}, {}),
        ({"called": -1, "full": 0}, {}),
        ({"called": 1.5, "full": "2", "late": True, "quota": None}, {}),
        ({"arrived": 5, "other": 1}, {}),
        ([1], None),
        ("called", None),
        (None, None),
    ],
)
def test_a_report_is_counts_of_known_kinds(told: object, read: object) -> None:
    assert read_report(json.dumps(told).encode()) == read


@given(st.binary(max_size=60))
def test_a_report_that_is_none_costs_nothing(raw: bytes) -> None:
    read = read_report(raw)
    assert read is None or set(read) <= set(KINDS)


def test_an_event_arrives_once_and_only_when_it_need_not_come_again() -> None:
    statuses = ["queued", "invalid", "dropped", "duplicate", "rate_limited"]
    assert counts(b"Firefox/133.0", {"called": 5}, statuses) == [
        ("firefox:called", 5),
        ("firefox:arrived", 3),
    ]
    assert counts(b"", {}, ["duplicate", "unavailable"]) == []
