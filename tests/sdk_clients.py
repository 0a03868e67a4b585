"""Voucherify's own JavaScript clients, as npm ships them."""

import time
from pathlib import Path

from relay.sandbox.record import Record
from relay.signing import Signer
from tests import npm
from tests.integration.stack import ORIGIN, Stack

SDK = Path(__file__).parent / "sdk"
SIGNING_KEY = "a-key-of-the-tests-and-of-nothing-else"
NEEDS = npm.NEEDS


def installed() -> Path:
    """The directory with the pages, the scripts and `node_modules`."""
    return npm.installed(SDK)


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
