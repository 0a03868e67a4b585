"""Origins: what a browser sends, compared exactly."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.origins import (
    CACHE,
    AllowedOrigins,
    parse_origin_pattern,
    parse_upstream_origin,
)

SHOP = AllowedOrigins(
    ["https://shop.example", "https://*.shop.example", "http://localhost:8080"]
)


@pytest.mark.parametrize(
    "origin",
    [
        "https://shop.example",
        "https://www.shop.example",
        "https://a.b.c.shop.example",
        "https://xn--bcher-kva.shop.example",
        "https://under_score.shop.example",
        "http://localhost:8080",
    ],
)
def test_a_listed_origin_may_send(origin: str) -> None:
    assert SHOP.allows(origin)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "*",
        "http://shop.example",
        "https://shop.example:8443",
        "https://shop.example:443",
        "https://shop.example/",
        "https://shop.example.",
        "https://SHOP.example",
        "HTTPS://shop.example",
        " https://shop.example",
        "https://shop.example https://shop.example",
        "https://shop.example, https://shop.example",
        "https://shop.example\n",
        "https://evilshop.example",
        "https://shop.example.evil.example",
        "https://evil.example#.shop.example",
        "https://evil.example/.shop.example",
        "https://evil.example?.shop.example",
        "https://evil.example\\.shop.example",
        "https://user@www.shop.example",
        "https://.shop.example",
        "https://a..shop.example",
        "https://*.shop.example",
        "https://www.shop.example:443",
        "https://www.shop.example:8443",
        "https://www.shop.example/",
        "https://WWW.shop.example",
        "https://bücher.shop.example",
        "https://www.shop.example\x00",
        "http://www.shop.example",
        "http://localhost",
        "https://localhost:8080",
        "https://" + "a." * 150 + "shop.example",
    ],
)
def test_anything_else_may_not(origin: str) -> None:
    assert not SHOP.allows(origin)


def test_a_wildcard_alone_does_not_allow_the_apex() -> None:
    wildcard = AllowedOrigins(["https://*.shop.example:8443"])
    assert wildcard.allows("https://www.shop.example:8443")
    assert not wildcard.allows("https://shop.example:8443")
    assert not wildcard.allows("https://www.shop.example")


def test_a_star_allows_every_web_origin_and_nothing_else() -> None:
    anyone = AllowedOrigins(["*"])
    assert anyone.any
    assert not SHOP.any
    for origin in ("https://a.example", "http://10.0.0.1:81", "http://[::1]:3000"):
        assert anyone.allows(origin)
    for origin in (
        "",
        "null",
        "file://",
        "chrome-extension://abc",
        "https://a.example:443",
        "https://a.example:99999",
        "https://a.example, https://b.example",
        "https://" + "a" * 300,
    ):
        assert not anyone.allows(origin)


def test_nobody_is_allowed_until_someone_is() -> None:
    assert bool(AllowedOrigins()) is False
    assert not AllowedOrigins().allows("https://shop.example")


@given(st.text(max_size=400))
def test_no_text_raises_and_no_odd_text_is_allowed(text: str) -> None:
    anyone = AllowedOrigins(["*"])
    for origin in (text, f"https://{text}", f"https://{text}.shop.example"):
        if SHOP.allows(origin) or anyone.allows(origin):
            assert re.fullmatch(r"https?://[a-z0-9._:\[\]-]{1,290}", origin)


def test_decisions_are_remembered_within_bounds() -> None:
    shop = AllowedOrigins(["https://*.shop.example"])
    for number in range(CACHE * 2):
        assert shop.allows(f"https://a{number}.shop.example")
    assert shop._decide.cache_info().currsize == CACHE


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("https://shop.example", "https://shop.example"),
        (" HTTPS://Shop.EXAMPLE ", "https://shop.example"),
        ("https://shop.example:443", "https://shop.example"),
        ("http://shop.example:80", "http://shop.example"),
        ("http://shop.example:443", "http://shop.example:443"),
        ("https://shop.example:08443", "https://shop.example:8443"),
        ("https://*.Shop.example:443", "https://*.shop.example"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://*.BÜCHER.example", "https://*.xn--bcher-kva.example"),
        ("https://straße.example", "https://xn--strae-oqa.example"),
        ("https://XN--BCHER-KVA.example", "https://xn--bcher-kva.example"),
        ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://[2001:DB8:0:0::1]", "http://[2001:db8::1]"),
        ("http://[::ffff:127.0.0.1]", "http://[::ffff:7f00:1]"),
        ("http://intra_net", "http://intra_net"),
        ("*", "*"),
    ],
)
def test_a_pattern_takes_the_form_that_browsers_send(text: str, pattern: str) -> None:
    assert parse_origin_pattern(text) == pattern
    if "*" not in pattern:
        assert AllowedOrigins([text]).allows(pattern)
        assert AllowedOrigins(["*"]).allows(pattern)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty"),
        ("null", "serve the page from a host"),
        ("shop.example", "needs its scheme"),
        ("*.shop.example", "needs its scheme"),
        ("ftp://shop.example", "http or https"),
        ("https://shop.example/", "leave out the slash at the end"),
        ("https://shop.example/cart", "leave out the path"),
        ("https://shop.example/cart/", "leave out the path"),
        ("https://shop.example?x", "leave out everything from the ? or # on"),
        ("https://shop.example#x", "leave out everything from the ? or # on"),
        ("https://me:pw@shop.example", "leave out the user name"),
        ("https://", "not a valid name"),
        ("https://shop..example", "not a valid name"),
        ("https://shop.example.", "not a valid name"),
        ("https://shop example", "not a valid name"),
        ("https://" + "a" * 64, "not a valid name"),
        ("https://" + "a." * 130 + "example", "not a valid name"),
        ("https://bü..example", "not a valid IDN"),
        ("https://☃\u200d.example", "not a valid IDN"),
        ("https://shop.example:", "the port must be"),
        ("https://shop.example:x", "the port must be"),
        ("https://shop.example:0", "the port must be"),
        ("https://shop.example:65536", "the port must be"),
        ("http://[::1]x", "the port must be"),
        ("http://[::1", "not a valid IPv6"),
        ("http://[::1%eth0]", "not a valid IPv6"),
        ("http://[zz]", "not a valid IPv6"),
        ("http://1.2.3", "not a valid IPv4"),
        ("http://127.0.0.0x1", "not a valid IPv4"),
        ("https://*", "whole subdomains"),
        ("https://www.*.example", "whole subdomains"),
        ("https://*.*.example", "whole subdomains"),
        ("https://*shop.example", "whole subdomains"),
        ("http://*.127.0.0.1", "no subdomains"),
        ("http://*.[::1]", "no subdomains"),
    ],
)
def test_a_faulty_pattern_is_refused_with_its_cure(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        AllowedOrigins(["https://ok.example", text])
    assert str(caught.value).startswith("entry 2: ")
    assert 'write it like "https://shop.example"' in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "shop.example",
        "Shop.Example:8443",
        "localhost:5000",
        "https://shop.example",
        "http://voucherify-swift",
        "https://shop.example:443",
        "[::1]:80",
    ],
)
def test_the_upstream_origin_stays_as_it_was_written(text: str) -> None:
    assert parse_upstream_origin(f" {text}\n") == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty"),
        ("https://shop.example/", "leave out the slash"),
        ("shop.example/cart", "leave out the path"),
        ("shop.example?x", "leave out everything"),
        ("me@shop.example", "leave out the user name"),
        ("*.shop.example", "without a wildcard"),
        ("shop example", "not a valid name"),
        ("shop.example\r\nx-evil: 1", "the port must be"),
        ("bücher.example", "xn-- form"),
        ("1http://shop.example", "the scheme is not valid"),
        ("a" * 301, "too long"),
    ],
)
def test_a_faulty_upstream_origin_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        parse_upstream_origin(text)
    assert str(caught.value).endswith('like "shop.example" or "https://shop.example"')


@given(st.text(max_size=40))
def test_no_fault_repeats_the_text(text: str) -> None:
    for parse in (parse_origin_pattern, parse_upstream_origin):
        try:
            parse(f"Zqx{text}!")
        except ValueError as error:
            assert "Zqx" not in str(error)  # noqa: PT017  # most text fails, some not


def test_it_can_go_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(SHOP))  # noqa: S301  # our own bytes
    assert copy.patterns == SHOP.patterns
    assert copy.allows("https://www.shop.example")
    assert str(copy) == ", ".join(SHOP.patterns)
