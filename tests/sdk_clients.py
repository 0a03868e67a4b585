"""Voucherify's own JavaScript clients, as npm ships them.

`installed()` puts what `tests/sdk/package-lock.json` names into
`tests/sdk/node_modules`, once for a lock: hashes are checked, no package runs a
script. Where that fails, tests are skipped, or fail where none may be skipped.
"""

import fcntl
import hashlib
import os
import subprocess
import time
from functools import cache
from pathlib import Path

import pytest

from relay.sandbox.record import Record
from relay.signing import Signer
from tests.integration.stack import ORIGIN, Stack
from tests.programs import needs

SDK = Path(__file__).parent / "sdk"
SIGNING_KEY = "a-key-of-the-tests-and-of-nothing-else"
NEEDS = [*needs("node", package="nodejs"), *needs("npm", package="npm")]

INSTALL = (
    *("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"),
    "--prefer-offline",  # a package is its hash, wherever it comes from
    # npm's own patience with a registry that does not answer is minutes.
    *("--fetch-retries=1", "--fetch-retry-mintimeout=1000"),
)
INSTALL_WITHIN_S = 90.0


def installed() -> Path:
    """The directory with the pages, the scripts and `node_modules`."""
    if fault := _install():
        if os.environ.get("TESTS_MUST_NOT_SKIP"):
            pytest.fail(f"npm could not install tests/sdk:\n{fault}", pytrace=False)
        why = fault.partition("\n")[0]
        pytest.skip(f"needs the packages of tests/sdk, but npm said: {why}")
    return SDK


@cache
def _install() -> str:
    """What went wrong, or nothing; npm is asked once in a session."""
    lock = SDK / "package-lock.json"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    stamp = SDK / "node_modules" / f".installed-{digest[:16]}"
    with lock.open("rb") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two sessions may begin at once
        if stamp.exists():
            return ""
        try:
            npm = subprocess.run(
                INSTALL,
                cwd=SDK,
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


def token(source_id: str) -> str:
    """What the shop's backend puts into the page of a customer who is logged in."""
    return Signer([SIGNING_KEY]).sign(source_id=source_id, now=time.time())[0]


async def arrived(relay: Stack) -> Record:
    """The one request that reached the sandbox since the last look, as the relay's."""
    [record] = await arrivals(relay)
    assert record.status == 200
    # The sandbox has compared the keys and found them the relay's, and would have
    # told of any header that a relay does not send; these are named all the same.
    headers = record.headers
    assert headers["x-client-application-id"] == relay.sandbox.config.application_id
    assert headers["x-voucherify-channel"].startswith("relay:")
    assert headers["user-agent"].startswith("voucherify-relay/")
    assert headers["origin"] == ORIGIN
    of_the_sender = {"authorization", "cookie", "referer", "relay-token"}
    assert not of_the_sender & headers.keys()
    return record


async def arrivals(relay: Stack) -> list[Record]:
    """What reached the sandbox since the last look, once nothing is left to come."""
    await relay.drained()
    relay.sandbox.assert_clean()
    records = relay.sandbox.requests
    relay.sandbox.forget()
    return records


def answer(event: str, metadata: object = None, **customer: object) -> object:
    """What a library reports of an event that was taken: Voucherify's answer, made
    only of what the sender itself has sent."""
    return {
        "resolved": {
            "object": "event",
            "type": event,
            "customer": {"object": "customer", **customer},
            "referral": None,
            "loyalty": None,
            "metadata": metadata or {},
        }
    }


def thrown(told: dict[str, object]) -> dict[str, object]:
    """What it reports of one that was refused."""
    error = told.get("thrown")
    assert isinstance(error, dict), told
    return error
