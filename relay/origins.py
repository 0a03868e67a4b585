"""Which web origins may send events, and which origin we send as.

An `Origin` header is compared as browsers serialise it (RFC 6454, 6.2; the WHATWG
URL standard): scheme, host and port, in lower case, without a default port. What is
not exactly that form is never allowed. An error does not repeat the text it is about.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Self

import idna

# A host name has at most 253 characters (RFC 1035), a scheme and a port some more.
MAX_ORIGIN = 300

DEFAULT_PORTS = {"http": 80, "https": 443}

# Decisions about origins that only a wildcard can allow; one is under 500 bytes.
CACHE = 1024

_FORM = 'write it like "https://shop.example" or "https://*.shop.example"'
_UPSTREAM_FORM = 'write it like "shop.example" or "https://shop.example"'

# Browsers allow underscores, and so do some intranets; idna takes care of the rest.
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_SERIALISED = re.compile(
    rf"(https?)://(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:]+\])(?::([1-9][0-9]{{0,4}}))?"
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")


class AllowedOrigins:
    """The origins that pages may send from."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        """Read the patterns; a ValueError names the faulty one by its position."""
        parsed: list[str] = []
        for position, text in enumerate(patterns, start=1):
            try:
                parsed.append(parse_origin_pattern(text))
            except ValueError as error:
                msg = f"entry {position}: {error}"
                raise ValueError(msg) from None
        self.patterns = tuple(dict.fromkeys(parsed))
        self.any = "*" in self.patterns
        self._exact = frozenset(text for text in self.patterns if "*" not in text)
        # ("https://", ".shop.example:8443") for https://*.shop.example:8443; a star
        # alone becomes two empty texts, which every serialised origin has.
        self._wild = tuple(
            (scheme, tail)
            for scheme, star, tail in (text.partition("*") for text in self.patterns)
            if star
        )
        self._decide = lru_cache(CACHE)(self._matches_wildcard)

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[str, ...]]]:
        return type(self), (self.patterns,)  # a cache cannot go to another process

    def __repr__(self) -> str:
        return f"AllowedOrigins({list(self.patterns)})"

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def __str__(self) -> str:
        return ", ".join(self.patterns)

    def allows(self, origin: str) -> bool:
        """Whether a page of this origin may send; `origin` is the header's value."""
        if origin in self._exact:
            return True
        if not self._wild or len(origin) > MAX_ORIGIN:
            return False
        return self._decide(origin)

    def _matches_wildcard(self, origin: str) -> bool:
        match = _SERIALISED.fullmatch(origin)
        if match is None:
            return False
        scheme, port = match.groups()
        if port and (int(port) > 65535 or int(port) == DEFAULT_PORTS[scheme]):
            return False
        return any(
            origin.startswith(start) and origin.endswith(tail)
            for start, tail in self._wild
        )


def parse_origin_pattern(text: str) -> str:
    """Give a pattern in the form in which origins are compared.

    That is an origin as browsers write it, the same with `*.` before its host for
    all subdomains at any depth, or `*` for every http and https origin.
    """
    text = text.strip()
    if text == "*":
        return text
    try:
        return _parse_pattern(text)
    except ValueError as error:
        msg = f"{error}; {_FORM}"
        raise ValueError(msg) from None


def parse_upstream_origin(text: str) -> str:
    """Check the origin that Voucherify is shown, and give it as it was written.

    Voucherify's own examples have it with and without a scheme, and it compares
    with the project's list, so nothing is changed here.
    """
    text = text.strip()
    scheme, separator, authority = text.rpartition("://")
    try:
        if not text:
            raise ValueError("it is empty")
        if len(text) > MAX_ORIGIN:
            raise ValueError("it is too long")
        if not text.isascii():
            raise ValueError("it must be ASCII: write an IDN in its xn-- form")
        if separator and not _SCHEME.fullmatch(scheme.lower()):
            raise ValueError("the scheme is not valid")
        host, _ = _split_port(_only_authority(authority))
        if "*" in host:
            raise ValueError("it must be one origin, without a wildcard")
        _canonical_host(host)
    except ValueError as error:
        msg = f"{error}; {_UPSTREAM_FORM}"
        raise ValueError(msg) from None
    return text


def _parse_pattern(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    if text.lower() == "null":
        # Every sandboxed frame and local file says null: no page can be told by it.
        raise ValueError("null cannot be allowed: serve the page from a host")
    scheme, separator, authority = text.partition("://")
    if not separator:
        raise ValueError("it needs its scheme")
    scheme = scheme.lower()
    if scheme not in DEFAULT_PORTS:
        raise ValueError("the scheme must be http or https")
    authority = _only_authority(authority)
    wildcard = "*." if authority.startswith("*.") else ""
    host, port = _split_port(authority.removeprefix("*."))
    if "*" in host:
        raise ValueError("a wildcard may only stand for whole subdomains, once, first")
    host = _canonical_host(host)
    if wildcard and (host.startswith("[") or _ends_in_number(host)):
        raise ValueError("an address has no subdomains")
    suffix = "" if port in (None, DEFAULT_PORTS[scheme]) else f":{port}"
    origin = f"{scheme}://{wildcard}{host}{suffix}"
    if len(origin) > MAX_ORIGIN:
        raise ValueError("it is too long")
    return origin


def _only_authority(text: str) -> str:
    if "?" in text or "#" in text:
        raise ValueError("leave out everything from the ? or # on")
    if text.endswith("/") and text.count("/") == 1:
        raise ValueError("leave out the slash at the end")
    if "/" in text:
        raise ValueError("leave out the path")
    if "@" in text:
        raise ValueError("leave out the user name and the @")
    return text


def _split_port(authority: str) -> tuple[str, int | None]:
    if authority.startswith("["):
        host, bracket, rest = authority.partition("]")
        host += bracket
    else:
        host, colon, port = authority.partition(":")
        rest = colon + port
    if not rest:
        return host, None
    digits = rest.removeprefix(":")
    # Nothing but a colon and digits may follow the host, also after a bracket.
    if rest == digits or not re.fullmatch(r"[0-9]{1,5}", digits):
        raise ValueError("the port must be a number from 1 to 65535")
    if not 1 <= int(digits) <= 65535:
        raise ValueError("the port must be a number from 1 to 65535")
    return host, int(digits)


def _canonical_host(host: str) -> str:
    if host.startswith("["):
        return _canonical_ipv6(host)
    name = host.lower() if host.isascii() else _punycode(host)
    if not _NAME.fullmatch(name) or len(name) > 253:
        raise ValueError("the host is not a valid name")
    if _ends_in_number(name):
        # The URL standard reads such a host as an IPv4 address or not at all.
        try:
            return str(IPv4Address(name))
        except AddressValueError:
            raise ValueError("the host is not a valid IPv4 address") from None
    return name


def _canonical_ipv6(host: str) -> str:
    try:
        address = IPv6Address(host.removeprefix("[").removesuffix("]"))
    except AddressValueError:
        raise ValueError("the host is not a valid IPv6 address") from None
    if not host.endswith("]") or address.scope_id is not None:
        raise ValueError("the host is not a valid IPv6 address")
    if address.ipv4_mapped:
        # Browsers write the last 32 bits in hexadecimal, newer Pythons with dots.
        bits = int(address.ipv4_mapped)
        return f"[::ffff:{bits >> 16:x}:{bits & 0xFFFF:x}]"
    return f"[{address}]"


def _punycode(host: str) -> str:
    try:
        # UTS 46 without transitional mappings, as browsers do.
        return idna.encode(host, uts46=True).decode("ascii").lower()
    except (idna.IDNAError, UnicodeError):
        msg = "the host is not a valid IDN: write it in its xn-- form"
        raise ValueError(msg) from None


def _ends_in_number(host: str) -> bool:
    last = host.rpartition(".")[2]
    return last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last) is not None
