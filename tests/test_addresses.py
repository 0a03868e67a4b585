"""Client addresses: nobody chooses their own."""

import ipaddress
import pickle
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.addresses import (
    MAX_HOPS,
    TrustedProxies,
    address_key,
    client_address,
    is_any,
    is_loopback,
    parse_host,
)

PROXIES = TrustedProxies(["10.0.0.0/8", "2001:db8:ffff::/48", "192.0.2.7"])
NOBODY = TrustedProxies()


def told(
    peer: str | None, lines: Sequence[bytes | str], trusted: TrustedProxies
) -> str:
    """What comes of these lines of `X-Forwarded-For`."""
    texts = [x.decode("latin-1") if isinstance(x, bytes) else x for x in lines]
    return client_address(peer, ",".join(texts), trusted)


header_lines = st.lists(st.binary(max_size=80) | st.text(max_size=80), max_size=4)


@pytest.mark.parametrize(
    ("lines", "client"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["198.51.100.1, 203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9, 10.1.1.1"], "203.0.113.9"),
        (["198.51.100.1, 203.0.113.9, 192.0.2.7, 10.1.1.1"], "203.0.113.9"),
        (["198.51.100.1", "203.0.113.9", "10.1.1.1"], "203.0.113.9"),
        ([b"203.0.113.9,10.1.1.1"], "203.0.113.9"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["2001:DB8::1"], "2001:db8::1"),
        (["[2001:db8::1]"], "2001:db8::1"),
        (["[2001:db8::1]:443"], "2001:db8::1"),
        (["fe80::1%eth0"], "fe80::1"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (["[::ffff:203.0.113.9]:80"], "203.0.113.9"),
        (["203.0.113.9, ::ffff:10.1.1.1"], "203.0.113.9"),
        (["203.0.113.9, 2001:db8:ffff::5"], "203.0.113.9"),
        (["203.0.113.9, , 10.1.1.1,"], "203.0.113.9"),
        (["10.2.2.2, 10.1.1.1"], "10.2.2.2"),
        ([], "10.0.0.1"),
        ([""], "10.0.0.1"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_not_trusted(
    lines: list[bytes | str], client: str
) -> None:
    assert told("10.0.0.1", lines, PROXIES) == client


@pytest.mark.parametrize(
    "garbage",
    [
        "unknown",
        "_hidden",
        "203.0.113",
        "203.0.113.09",
        "203.0.113.9:http",
        "203.0.113.9%eth0",
        "[203.0.113.9]:80",
        "[2001:db8::1",
        "[2001:db8::1]443",
        "for=203.0.113.9",
        "2001:db8::1::",
        "203.0.113.9 10.0.0.1",
        "٣.1.1.1",
        "1" * 5_000,
    ],
)
def test_garbage_ends_the_walk_at_the_last_good_address(garbage: str) -> None:
    lines = [f"203.0.113.9, {garbage}, 10.1.1.1"]
    assert told("10.0.0.1", lines, PROXIES) == "10.1.1.1"


def test_only_the_last_hops_are_read() -> None:
    hops = ["203.0.113.9"] + ["10.1.1.1"] * MAX_HOPS
    assert told("10.0.0.1", [",".join(hops)], PROXIES) == "10.1.1.1"
    assert told("10.0.0.1", [",".join(hops[:-1])], PROXIES) == "203.0.113.9"
    assert told("10.0.0.1", hops, PROXIES) == "10.1.1.1"
    assert told("10.0.0.1", hops[:-1], PROXIES) == "203.0.113.9"


@given(header_lines)
def test_a_peer_that_is_not_trusted_has_no_say(lines: list[bytes | str]) -> None:
    for proxies in (PROXIES, NOBODY):
        assert told("203.0.113.1", lines, proxies) == "203.0.113.1"
        assert told(None, lines, proxies) == "unix"
    assert told("10.0.0.1", lines, NOBODY) == "10.0.0.1"


@given(st.none() | st.text(max_size=150), header_lines)
def test_no_bytes_raise(peer: str | None, lines: list[bytes | str]) -> None:
    everyone = TrustedProxies(["unix", "0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"])
    client = told(peer, lines, everyone)
    assert len(address_key(client)) <= 101
    if client not in ("unix", peer):
        ipaddress.ip_address(client)


@given(
    st.lists(st.ip_addresses().map(str), max_size=5),
    st.ip_addresses(v=4, network="203.0.113.0/24").map(str),
    st.lists(st.ip_addresses(v=4, network="10.0.0.0/8").map(str), max_size=5),
)
def test_what_a_client_writes_before_its_own_address_changes_nothing(
    forged: list[str], client: str, proxies: list[str]
) -> None:
    line = ", ".join([*forged, client, *proxies])
    assert told("10.0.0.1", [line], PROXIES) == client


def test_the_unix_socket_is_trusted_only_when_it_is_listed() -> None:
    lines = ["203.0.113.9"]
    assert told(None, lines, TrustedProxies(["unix"])) == "203.0.113.9"
    assert told(None, [], TrustedProxies(["unix"])) == "unix"
    assert told(None, lines, TrustedProxies(["loopback"])) == "unix"
    # It is no address, so nobody can name it in a header.
    assert told("10.0.0.1", ["unix"], PROXIES) == "10.0.0.1"


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("loopback", ["127.0.0.1", "127.9.9.9", "::1"], ["10.0.0.1", "::2"]),
        (
            "private",
            ["10.0.0.1", "172.31.0.1", "192.168.9.9", "fd00::1"],
            ["127.0.0.1", "172.32.0.1", "169.254.0.1", "2001:db8::1"],
        ),
        ("Private", ["10.0.0.1"], []),
        ("10.0.0.1/8", ["10.9.9.9"], ["11.0.0.1"]),
        ("::ffff:10.0.0.0/104", ["10.9.9.9", "::ffff:10.1.1.1"], ["11.0.0.1"]),
        ("2001:db8::/32", ["2001:db8::9"], ["2001:db9::1", "10.0.0.1"]),
        ("unix", [], ["unix", "127.0.0.1", "garbage"]),
    ],
)
def test_networks_and_shorthands(
    name: str, inside: list[str], outside: list[str]
) -> None:
    proxies = TrustedProxies([name])
    assert all(proxies.trusts(address) for address in inside)
    assert not any(proxies.trusts(address) for address in outside)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("10.0.0.0/33", "this is not a network"),
        ("proxy.internal", "this is not a network"),
        ("", "this is not a network"),
        ("10.0.0.1:80", "this is not a network"),
        ("*", "the whole internet"),
        ("0.0.0.0/0", "the whole internet"),
        ("::/0", "the whole internet"),
        ("::ffff:0:0/96", "the whole internet"),
    ],
)
def test_a_faulty_network_is_named_by_its_place_and_not_repeated(
    text: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"entry 2: {problem}") as caught:
        TrustedProxies(["loopback", text])
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:fedc:ba98:7654:3210", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("2001:db8:ffff:ffff::9", "2001:db8:ffff:ffff::/64"),
        ("::1", "::/64"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("unix", "unix"),
        ("not an address", "not an address"),
    ],
)
def test_ipv6_counts_by_its_64(address: str, key: str) -> None:
    assert address_key(address) == key


def test_a_listener_is_an_address_or_a_name() -> None:
    assert parse_host("[::1]") == "::1"
    assert parse_host("relay-1.internal") == "relay-1.internal"
    for text in ("", "a b", "127.0.0.1:80", "999.0.0.1", "http://x", "-x", "[x", "*"):
        with pytest.raises(ValueError, match="without a port"):
            parse_host(text)


def test_what_only_this_machine_reaches_is_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example"]))
    assert all(map(is_any, ["0.0.0.0", "::"]))
    assert not any(map(is_any, ["127.0.0.1", "localhost"]))


def test_it_can_go_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(PROXIES))  # noqa: S301  # our own bytes
    assert copy.networks == PROXIES.networks
    assert copy.trusts("10.0.0.1")
    assert bool(copy) is True
    assert bool(NOBODY) is False
    assert str(copy) == "10.0.0.0/8, 2001:db8:ffff::/48, 192.0.2.7"
