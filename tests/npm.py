"""Packages of npm, as the lock file of a directory names them.

`installed()` puts them into its `node_modules`, once for a lock: hashes are checked,
no package runs a script. Where that fails, tests are skipped, or fail where none may
be skipped.
"""

import fcntl
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.programs import needs

ROOT = Path(__file__).parents[1]
NEEDS = [*needs("node", package="nodejs"), *needs("npm", package="npm")]

INSTALL = (
    *("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"),
    "--prefer-offline",  # a package is its hash, wherever it comes from
    # npm's own patience with a registry that does not answer is minutes.
    *("--fetch-retries=1", "--fetch-retry-mintimeout=1000"),
)
INSTALL_WITHIN_S = 90.0


def installed(place: Path) -> Path:
    """`place`, with `node_modules` in it."""
    if fault := _install(place):
        name = place.relative_to(ROOT)
        if os.environ.get("TESTS_MUST_NOT_SKIP"):
            pytest.fail(f"npm could not install {name}:\n{fault}", pytrace=False)
        why = fault.partition("\n")[0]
        pytest.skip(f"needs the packages of {name}, but npm said: {why}")
    return place


@cache
def _install(place: Path) -> str:
    """What went wrong, or nothing; npm is asked once in a session."""
    lock = place / "package-lock.json"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    stamp = place / "node_modules" / f".installed-{digest[:16]}"
    with lock.open("rb") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two sessions may begin at once
        if stamp.exists():
            return ""
        try:
            npm = subprocess.run(
                INSTALL,
                cwd=place,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_WITHIN_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"nothing within {INSTALL_WITHIN_S:g} s"
        if npm.returncode != 0:
            return npm.stderr.strip() or f"exit code {npm.returncode}"
        stamp.touch()
    return ""
