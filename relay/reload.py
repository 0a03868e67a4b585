"""The catalogue's file, and which version of it is in force.

A new version takes effect as a whole, once nobody writes into it any more. A faulty,
empty or vanished one changes nothing: the last good one stays in force, and the log
and `/readyz` say so. So does one that is only the beginning of the version in force,
for it was probably cut off, until somebody asks for it (SIGHUP). Looking costs one
`stat`; whoever owns this decides how often.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from relay.catalog import EMPTY, Catalog, CatalogError, parse_catalog

log = structlog.get_logger()

# Written less than this ago, a file may be half there: a prefix of TOML is TOML.
SETTLED_S = 0.5

# Change times of content and of inode (chmod), size, inode.
_Seen = tuple[int, int, int, int]
_NEVER: _Seen = (-1, -1, -1, -1)  # unlike every file, and unlike none


CANNOT_VERIFY = (
    'delivery = "verify" counts as "at_most_once": only RELAY_UPSTREAM_API=server lets '
    "the relay look an event up"
)


class CatalogFile:
    """One catalogue file, or none; `catalog` is what counts now."""

    def __init__(
        self,
        path: Path | None,
        *,
        max_ttl_s: int,
        signing: bool,
        server_api: bool = False,
        text: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Read the file; raises `CatalogError`. `text` is a version that was good."""
        self._path = path
        self._clock = clock
        self._max_ttl_s = max_ttl_s
        self._signing = signing  # whether there are keys to check tokens with
        self._server_api = server_api  # RELAY_UPSTREAM_API=server
        self._seen: _Seen | None = _NEVER
        self.catalog: Catalog = EMPTY
        self.text = ""
        self.refused = ""  # why the file's present version is not in force
        if path is None:
            return
        if text is None:
            self._seen = self._stat()
            self._take(self._read())
        else:  # as the parent process had it; the file may be faulty by now
            self._take(text)

    def poll(self, *, at_once: bool = False) -> bool:
        """Look at the file again; whether another catalogue is in force now.

        `at_once` reads it also when it seems unchanged, or is not settled yet.
        """
        if self._path is None:
            return False
        seen = self._stat()
        if not at_once and (seen == self._seen or self._is_fresh(seen)):
            return False
        self._seen = seen
        before = self.text
        try:
            text = self._read()
            if not at_once and _is_cut(text, before):
                parse_catalog(text, max_ttl_s=self._max_ttl_s)  # its own faults first
                raise CatalogError([_CUT])
            self._take(text)
        except CatalogError as error:
            self.refused = error.faults[0]
            log.error("catalog.refused", file=str(self._path), faults=error.faults)
            return False
        self.refused = ""
        if self.text == before:
            return False
        log.info("catalog.loaded", events=len(self.catalog.names))
        return True

    def _take(self, text: str) -> None:
        catalog = parse_catalog(text, max_ttl_s=self._max_ttl_s)
        if catalog.needs_keys and not self._signing:
            raise CatalogError(
                ["events need tokens, but RELAY_SIGNING_KEYS is missing: set it"]
            )
        for warning in catalog.warnings:
            log.warning("catalog.doubtful", detail=warning)
        if catalog.verifies and not self._server_api:
            log.warning("catalog.doubtful", detail=CANNOT_VERIFY)
        self.catalog, self.text = catalog, text

    def _stat(self) -> _Seen | None:
        try:
            stat = os.stat(self._path or "")
        except OSError:
            return None  # reading it will say why
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino

    def _read(self) -> str:
        assert self._path is not None  # noqa: S101  # checked by both callers
        try:
            return self._path.read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            msg = f"{self._path} cannot be read ({why}): correct the path or the file"
            raise CatalogError([msg]) from None

    def _is_fresh(self, seen: _Seen | None) -> bool:
        """Whether somebody may still be writing. A time to come is another clock's."""
        return seen is not None and 0 <= self._clock() - seen[1] / 1e9 < SETTLED_S


# A prefix of TOML is TOML, and may have lost the line that asks for a token.
_CUT = (
    "it is only the beginning of the version in force, as if it were cut off: write it "
    "whole, or send SIGHUP if it is meant"
)


def _is_cut(text: str, before: str) -> bool:
    return text != before and before.startswith(text.rstrip())
