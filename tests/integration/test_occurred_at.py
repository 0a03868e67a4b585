"""Voucherify is told when an event happened, however late it arrives there."""

import json
import time
from datetime import datetime
from pathlib import Path

import aiohttp
import pytest

from relay.sandbox.config import Property, SandboxConfig
from tests.integration.stack import HEADERS, Stack, beacon, stack

pytestmark = pytest.mark.anyio

CATALOG = '[events.e]\noccurred_at = "happened_at"\n'
# As a shop defines it in Voucherify, which then refuses what is no time.
DEFINED = {"e": {"happened_at": Property(type="datetime")}}
HOUR_MS = 3_600_000


async def post(url: str, body: object, kind: str = "text/plain") -> int:
    headers = HEADERS | {"Content-Type": kind}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=json.dumps(body), headers=headers) as answer,
    ):
        await answer.read()
        return answer.status


def made(n: str, **parts: object) -> dict[str, object]:
    body: dict[str, object] = json.loads(beacon(n, **parts))  # type: ignore[arg-type]  # its own keywords
    return body


def arrived(relay: Stack) -> dict[str, dict[str, object]]:
    """The metadata of what Voucherify has, by the number of the event."""
    found: dict[str, dict[str, object]] = {}
    for record in relay.sandbox.events:
        assert isinstance(record.body, dict)
        assert not {"age", "id"} & set(record.body)
        metadata = record.body["metadata"]
        found[metadata["n"]] = metadata
    return found


def seconds(metadata: dict[str, object]) -> float:
    return datetime.fromisoformat(str(metadata["happened_at"])).timestamp()


async def test_when_it_happened_arrives_however_late_the_event_does(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    rules = tmp_path / "catalog.toml"
    rules.write_text(CATALOG)
    config = SandboxConfig(client_limit=None, events=DEFINED)
    async with stack(
        valkey_url, prefix, tmp_path, sandbox=config, catalog=str(rules)
    ) as relay:
        # One is refused, so that it comes by a replay; another is tried again.
        relay.sandbox.fail_next(1, status=400, source_id="c-before")
        relay.sandbox.fail_next(1, status=503, source_id="c-now")
        url = await relay.start("serve").track_url()
        begun = time.time()
        before = made("before", age=HOUR_MS)
        before["metadata"] = {"n": "before", "happened_at": "the page says so"}
        ahead = made("ahead", age=-HOUR_MS)
        plain = made("plain", name="plain", age=HOUR_MS)
        assert await post(url, [made("now"), before, ahead, plain]) == 202
        sdk = url.replace("/track", "/client/v1/events")
        body = made("sdk")
        del body["id"]
        assert await post(sdk, body, "application/json") == 200
        taken = time.time()
        await relay.drained()
        assert set(arrived(relay)) == {"now", "ahead", "plain", "sdk"}
        again = relay.start("dead-letters", "replay", "--yes")
        await again.says("1 of 1 sent: 1 delivered")
        told = arrived(relay)
        # A millisecond more or less: the text has no smaller ones.
        for n in ("now", "ahead", "sdk"):
            assert begun - 0.001 <= seconds(told[n]) <= taken, n
        hour = HOUR_MS / 1000
        assert begun - hour - 0.001 <= seconds(told["before"]) <= taken - hour
        assert set(told["plain"]) == {"n", "note"}
