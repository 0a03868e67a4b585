"""Whose request this is: the client's address behind proxies that we trust.

`X-Forwarded-For` is believed only as far as trusted proxies wrote it: walking from
the right, the first address that is not one of theirs is the client. A peer that is
not trusted is the client itself, whatever it sends. No input raises.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from socket import AF_INET, inet_pton
from typing import Self

# What a peer on the unix socket is called: it has no address.
UNIX = "unix"

SHORTHANDS = {
    "loopback": ("127.0.0.0/8", "::1/128"),
    # RFC 1918 and RFC 4193. Loopback and link-local are not among them.
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"),
}

# Longer chains of proxies are not met in practice, and a sender chooses the length.
MAX_HOPS = 32

# The longest address in text is 45 characters; a zone, brackets and a port add some.
MAX_ENTRY = 100

_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")

# Entries each; at most about 1 MB in all.
CACHE = 4096

# With everyone trusted the leftmost entry wins, and any sender can write that.
_EVERYONE = "the whole internet cannot be trusted: list your own proxies"
_FORM = 'write an address, a network like "10.0.0.0/8", unix, loopback or private'


class TrustedProxies:
    """The peers whose `X-Forwarded-For` is believed."""

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self.networks = tuple(text.strip() for text in networks)
        self.unix = False
        parsed: list[IPv4Network | IPv6Network] = []
        for position, text in enumerate(self.networks, start=1):
            name = text.lower()
            if name == UNIX:
                self.unix = True
                continue
            try:
                parsed += [_network(part) for part in SHORTHANDS.get(name, (name,))]
            except ValueError as error:
                msg = f"entry {position}: {error}; {_FORM}"
                raise ValueError(msg) from None
        self._v4 = [net for net in parsed if isinstance(net, IPv4Network)]
        self._v6 = [net for net in parsed if isinstance(net, IPv6Network)]
        runs = [run for net in self._v4 for run in _runs(net)]
        self._runs = tuple(run for run in runs if run.endswith("."))
        self._single = frozenset(run for run in runs if not run.endswith("."))
        self._contains = lru_cache(CACHE)(self._search)
        # Asked for every request, and of one peer or a few.
        self.trusts = lru_cache(CACHE)(self._trusts)

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[str, ...]]]:
        return type(self), (self.networks,)  # a cache cannot go to another process

    def __repr__(self) -> str:
        return f"TrustedProxies({list(self.networks)})"

    def __bool__(self) -> bool:
        return bool(self.networks)

    def __str__(self) -> str:
        return ", ".join(self.networks)

    def _trusts(self, address: str | None) -> bool:
        """Whether this peer may say who the client is; `None` is the unix socket."""
        if not self.networks:
            return False
        if address is None:
            return self.unix
        return self._contains(address[: MAX_ENTRY + 1])

    def trusts_canonical(self, address: str) -> bool:
        """The same of an address in its canonical form."""
        if ":" in address:
            return self._contains(address)
        return address.startswith(self._runs) or address in self._single

    def _search(self, text: str) -> bool:
        address = _parse(text)
        if address is None:
            return False
        if isinstance(address, IPv4Address):
            return any(address in network for network in self._v4)
        return any(address in network for network in self._v6)


def client_address(
    peer: str | None, forwarded_for: str, trusted: TrustedProxies
) -> str:
    """Give the address of the client, in its canonical form.

    `peer` is the other end of the connection, `None` on a unix socket (then the
    answer may be "unix"). `forwarded_for` is `X-Forwarded-For`: several lines are one
    list, as `headers.fields_of` makes it; empty where there is none.
    """
    client = None
    if forwarded_for and trusted.trusts(peer):
        # What one proxy says: an address, which needs no more than this look.
        if _plain_v4(forwarded_for) and not trusted.trusts_canonical(forwarded_for):
            return forwarded_for
        for entry in _from_the_right(forwarded_for):
            address = _canonical(entry)
            if address is None:  # Whoever wrote it, nothing left can be believed.
                break
            client = address
            if not trusted.trusts_canonical(address):
                break
    if client is None:
        return UNIX if peer is None else _peer(peer[: MAX_ENTRY + 1])
    return client


def address_key(address: str) -> str:
    """Give what limits count by: an IPv4 address, or the /64 of an IPv6 one.

    `address` is as `client_address` gives it. A household or a phone has a whole /64
    (RFC 6177, RFC 7934), so counting single IPv6 addresses would limit nobody.
    """
    return _key(address) if ":" in address else address


@lru_cache(CACHE)
def _key(address: str) -> str:
    parsed = _parse(address)
    if parsed is None:  # what a server calls its peer
        return address
    if isinstance(parsed, IPv4Address):
        return str(parsed)
    return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"


def parse_host(text: str) -> str:
    """Check a host to listen on: an address, with or without brackets, or a name."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _parse_ip(bare) is not None:
        return bare
    if not _HOST_NAME.fullmatch(bare) or bare.rpartition(".")[2].isdigit():
        raise ValueError("must be an address or a host name, without a port")
    return bare


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    address = _parse_ip(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def is_any(host: str) -> bool:
    """Whether a listener on `host` takes every address of the machine."""
    address = _parse_ip(host)
    return address is not None and address.is_unspecified


def _runs(network: IPv4Network) -> Iterable[str]:
    """What the addresses of a network begin with, at most 128 runs of whole bytes.

    "10." or "192.168."; an address of four bytes is one itself.
    """
    length = -(-network.prefixlen // 8)
    for part in network.subnets(new_prefix=8 * length):
        run = ".".join(str(part.network_address).split(".")[:length])
        yield run if length == 4 else f"{run}."


def _from_the_right(line: str) -> list[str]:
    # One more split than is read, so that the unsplit rest is never an entry.
    entries = line.rsplit(",", MAX_HOPS)[-MAX_HOPS:]
    stripped = [entry.strip(" \t")[: MAX_ENTRY + 1] for entry in reversed(entries)]
    return [entry for entry in stripped if entry]  # 5.6.1: empty ones are ignored


def _peer(text: str) -> str:
    return _canonical(text) or text


def _plain_v4(text: str) -> bool:
    """Whether this is an IPv4 address as most are written.

    It has no second form (no leading zeros), and to see that costs a tenth of reading
    it as whatever an address may be.
    """
    if ":" in text:
        return False
    try:
        inet_pton(AF_INET, text)
    except (OSError, ValueError):
        return False
    return True


def _canonical(text: str) -> str | None:
    return text if _plain_v4(text) else _canonical_of_any(text)


@lru_cache(CACHE)
def _canonical_of_any(text: str) -> str | None:
    address = _parse(text)
    return None if address is None else str(address)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address with or without brackets, port and zone."""
    if len(text) > MAX_ENTRY:
        return None
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return None
        port = port.removeprefix(":")
        if ":" not in host:
            return None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return None
    if ":" in host:
        host = host.partition("%")[0]
    address = _parse_ip(host)
    # A dual-stack socket shows IPv4 peers as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2).
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _parse_ip(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _network(text: str) -> IPv4Network | IPv6Network:
    if text == "*":
        raise ValueError(_EVERYONE)
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError("this is not a network") from None
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            network = IPv4Network((int(mapped), network.prefixlen - 96))
    if network.prefixlen == 0:
        raise ValueError(_EVERYONE)
    return network
