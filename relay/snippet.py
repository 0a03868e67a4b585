"""The snippet as the relay serves it: what `snippet/` builds, and the tag to paste.

`/relay.js` is always the present one; `/relay.<hash>.js` never changes, so a page may
pin it with `integrity`. A pinned version must outlive its release, or shops that
pinned it would send nothing: whoever releases a new one keeps the old file in
`static/former`.
"""

import gzip
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256, sha384
from html import escape
from importlib.resources import files

Header = tuple[bytes, bytes]

NAME = "relay.js"
# An hour: what a shop without a pinned version waits for a new one.
_FRESH = b"public, max-age=3600"
_FOR_EVER = b"public, max-age=31536000, immutable"  # RFC 8246
_ALWAYS = [
    (b"content-type", b"text/javascript; charset=utf-8"),
    (b"vary", b"Accept-Encoding"),
    # For every page; it holds nothing secret. CORS is what `integrity` asks for.
    (b"access-control-allow-origin", b"*"),
    (b"cross-origin-resource-policy", b"cross-origin"),
    (b"x-content-type-options", b"nosniff"),
]

# Two lines: calls are kept in `q` until the script is there.
STUB = "window.relay=window.relay||function(){(relay.q=relay.q||[]).push(arguments)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One version, in every encoding that browsers take."""

    digest: str  # of its name
    integrity: str  # of the tag (Subresource Integrity)
    encodings: Mapping[str, bytes]  # br, gzip, identity

    @property
    def name(self) -> str:
        return f"relay.{self.digest}.js"

    def answer(
        self, accept: bytes, if_none_match: bytes, *, pinned: bool
    ) -> tuple[int, list[Header], bytes]:
        """Status, headers and body for a GET."""
        coding = _coding(accept, self.encodings)
        tag = f'"{self.digest}-{coding}"'.encode()
        headers = [
            *_ALWAYS,
            (b"etag", tag),
            (b"cache-control", _FOR_EVER if pinned else _FRESH),
        ]
        if any(_opaque(sent) in (tag, b"*") for sent in if_none_match.split(b",")):
            return 304, headers, b""
        if coding != "identity":
            headers.append((b"content-encoding", coding.encode()))
        return 200, headers, self.encodings[coding]


@cache
def present() -> Script:
    """The version that this relay came with."""
    home = files("relay") / "static"
    return _script((home / NAME).read_bytes(), (home / f"{NAME}.br").read_bytes())


@cache
def pinned() -> dict[str, Script]:
    """Every version that a page may have pinned, by name."""
    former = files("relay") / "static" / "former"
    scripts = [present()]
    if former.is_dir():
        scripts += [
            _script(file.read_bytes(), None)
            for file in former.iterdir()
            if file.name.endswith(".js")
        ]
    return {script.name: script for script in scripts}


def tag(*, base: str, track: str, pin: bool, options: Mapping[str, str]) -> str:
    """The lines to paste into a page.

    `base` is where pages see the relay, `https://…` or a path; `track` is the last
    part of the path that takes events.
    """
    script = present()
    attributes = {"src": f"{base}/{script.name if pin else NAME}"}
    if track != "track":
        attributes["data-url"] = f"{base}/{track}"
    attributes |= {f"data-{name}": value for name, value in options.items()}
    if pin:
        attributes["integrity"] = script.integrity
        attributes["crossorigin"] = "anonymous"
    said = " ".join(
        f'{name}="{escape(value)}"' if value else name
        for name, value in attributes.items()
    )
    return f"<script>{STUB}</script>\n<script async {said}></script>"


def _script(plain: bytes, brotli: bytes | None) -> Script:
    encodings = {"br": brotli} if brotli is not None else {}
    return Script(
        digest=sha256(plain).hexdigest()[:16],
        integrity=f"sha384-{b64encode(sha384(plain).digest()).decode()}",
        # In the order of preference; the same bytes at every start.
        encodings={
            **encodings,
            "gzip": gzip.compress(plain, 9, mtime=0),
            "identity": plain,
        },
    )


def _coding(accept: bytes, encodings: Mapping[str, bytes]) -> str:
    """The best encoding that a browser takes (RFC 9110, 12.5.3)."""
    taken = {}
    for part in accept.decode("latin-1").lower().split(","):
        name, _, weight = part.partition(";")
        taken[name.strip()] = weight.strip().replace(" ", "")
    refused = {name for name, weight in taken.items() if _is_zero(weight)}
    for name in encodings:
        if name in taken and name not in refused:
            return name
    return "identity"


def _is_zero(weight: str) -> bool:
    return weight.startswith("q=0") and not weight.strip("q=0.")


def _opaque(sent: bytes) -> bytes:
    return sent.strip().removeprefix(b"W/")
