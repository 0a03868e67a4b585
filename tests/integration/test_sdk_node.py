"""@voucherify/sdk in Node, unmodified, with its `apiUrl` pointing to a relay.

It is 2.9.0, the newest that `npm view @voucherify/sdk versions` told when the lock
was made; 3.x was not in that list. `voucherify.js` needs a window: it is tested in a
browser only, as both are in `tests/browser/test_sdk_chromium.py`.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.integration.stack import ORIGIN, Stack, stack
from tests.programs import find
from tests.sdk_clients import (
    NEEDS,
    SIGNING_KEY,
    answer,
    arrivals,
    arrived,
    installed,
    thrown,
    token,
)

pytestmark = [pytest.mark.anyio, *NEEDS, pytest.mark.timeout(120)]

EDGE = ("serve", "--no-forwarder")
CUSTOMER = {"source_id": "u-1"}
LOYALTY = {"code": "LOYALTY-1"}
METADATA = {"sku": "A-1", "price": 12.5, "gift": False, "at": "2025-11-28"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """One stack, and three public listeners that differ in one setting."""

    stack: Stack
    plain: str
    signed: str  # under /vf, with a key: strangers may only say who they are
    limited: str  # one event from an address


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def relay(
    valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Relay]:
    installed()
    place = tmp_path_factory.mktemp("sdk-node")
    async with stack(valkey_url, f"test-{secrets.token_hex(6)}", place) as made:
        processes = (
            made.start("serve"),
            made.start(*EDGE, path_prefix="/vf", signing_keys=SIGNING_KEY),
            made.start(*EDGE, limits="ip=1/1h"),
        )
        plain, signed, limited = [
            (await process.track_url()).removesuffix("/track") for process in processes
        ]
        yield Relay(stack=made, plain=plain, signed=signed, limited=limited)


async def track(url: str, /, **parts: object) -> dict[str, object]:
    """What the library reports of one event."""
    job = {"url": url, "origin": ORIGIN, "event": "viewed", "customer": CUSTOMER}
    work = json.dumps(job | parts).encode()
    node = await asyncio.create_subprocess_exec(
        str(find("node")),
        str(installed() / "track.js"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaint = await node.communicate(work)
    assert (node.returncode, complaint) == (0, b"")
    told: dict[str, object] = json.loads(said)
    return told


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"metadata": METADATA},
        {"referral": {"code": "FRIEND-1", "referrer_id": "u-0"}},
        {"metadata": METADATA, "loyalty": LOYALTY},
    ],
    ids=["customer", "metadata", "referral", "loyalty"],
)
async def test_an_event_is_taken_as_voucherify_would_and_delivered_once(
    relay: Relay, parts: dict[str, object]
) -> None:
    told = await track(relay.plain, **parts)
    assert told == answer("viewed", parts.get("metadata"), source_id="u-1")
    record = await arrived(relay.stack)
    always = {"event": "viewed", "customer": CUSTOMER, "metadata": {}}
    assert record.body == always | parts


@pytest.mark.parametrize("tail", ["", "/"], ids=["bare", "slash"])
@pytest.mark.parametrize("prefix", ["", "/vf"], ids=["root", "prefix"])
async def test_an_api_url_may_have_a_path_and_end_with_a_slash(
    relay: Relay, prefix: str, tail: str
) -> None:
    """The library trims nothing: its own path begins with two slashes then."""
    url = (relay.signed if prefix else relay.plain) + tail
    assert url.endswith(prefix + tail)
    told = await track(url)
    assert told == answer("viewed", source_id="u-1")
    await arrived(relay.stack)


@pytest.mark.parametrize(
    "how",
    [{"options": {"trackingId": "t-1"}}, {"identity": "t-1"}],
    ids=["trackingId", "setIdentity"],
)
async def test_the_clients_identity_names_the_customer(
    relay: Relay, how: dict[str, object]
) -> None:
    told = await track(relay.plain, customer={}, **how)
    assert told == answer("viewed", source_id="t-1")
    assert (await arrived(relay.stack)).source_id == "t-1"


async def test_what_a_sender_adds_stays_with_the_relay(relay: Relay) -> None:
    """Neither its keys nor its headers are looked at or passed on."""
    options = {
        "clientApplicationId": "theirs",
        "clientSecretKey": "theirs",
        "customHeaders": {
            "Authorization": "Bearer theirs",
            "Cookie": "session=theirs",
            "X-App-Token": "theirs",
            "X-Voucherify-Channel": "theirs",
            "User-Agent": "theirs",
        },
    }
    told = await track(relay.plain, options=options)
    assert told == answer("viewed", source_id="u-1")
    record = await arrived(relay.stack)
    assert "theirs" not in json.dumps([record.headers, record.body])


@pytest.mark.parametrize(
    ("parts", "about"),
    [
        pytest.param({"event": ""}, "event", id="no-name"),
        pytest.param({"referral": {"referrer_id": "u-0"}}, "referral.code", id="code"),
        pytest.param({"customer": {"source_id": ""}}, "source_id", id="nobody"),
    ],
)
async def test_a_faulty_event_is_an_invalid_payload(
    relay: Relay, parts: dict[str, object], about: str
) -> None:
    error = thrown(await track(relay.plain, **parts))
    assert (error["code"], error["key"]) == (400, "invalid_payload")
    assert error["name"] == "Error"  # the library's own, not its transport's
    assert error["message"]
    assert about in str(error["details"])
    assert error["request_id"]
    assert await arrivals(relay.stack) == []


async def test_another_origin_is_forbidden(relay: Relay) -> None:
    elsewhere = "https://elsewhere.example"
    error = thrown(await track(relay.plain, origin=elsewhere))
    assert (error["code"], error["key"]) == (403, "forbidden")
    assert "RELAY_ALLOWED_ORIGINS" in str(error["details"])
    assert await arrivals(relay.stack) == []


async def test_too_many_events_are_told_when_to_come_back(relay: Relay) -> None:
    told = await track(relay.limited)
    assert told == answer("viewed", source_id="u-1")
    await arrived(relay.stack)
    error = thrown(await track(relay.limited))
    assert (error["code"], error["key"]) == (429, "too_many_requests")
    assert 3500 < int(str(error["retry_after"])) <= 3600
    assert await arrivals(relay.stack) == []


async def test_a_signed_token_goes_into_a_custom_header(relay: Relay) -> None:
    """As it may say more than a stranger, here points are asked for."""
    options = {"customHeaders": {"Relay-Token": token("u-1")}}
    told = await track(relay.signed, loyalty=LOYALTY, options=options)
    assert told == answer("viewed", source_id="u-1")
    record = await arrived(relay.stack)
    assert record.body == {
        "event": "viewed",
        "customer": CUSTOMER,
        "metadata": {},
        "loyalty": LOYALTY,
    }


@pytest.mark.parametrize(
    ("sent", "code", "key"),
    [
        pytest.param(None, 403, "forbidden", id="none"),
        pytest.param("no-token", 401, "unauthorized", id="broken"),
        pytest.param(token("u-2"), 403, "forbidden", id="of-another"),
    ],
)
async def test_points_need_a_token_of_the_customer(
    relay: Relay, sent: str | None, code: int, key: str
) -> None:
    options = {"customHeaders": {"Relay-Token": sent} if sent else {}}
    error = thrown(await track(relay.signed, loyalty=LOYALTY, options=options))
    assert (error["code"], error["key"]) == (code, key)
    assert error["details"]
    assert await arrivals(relay.stack) == []
