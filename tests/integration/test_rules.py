"""Tokens and the catalogue through whole relays: keys rotate, rules reload."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.signing import Signer
from tests.integration.stack import ORIGIN, Process, stack

pytestmark = pytest.mark.anyio

OLD, NEW = "old-key-of-thirty-two-characters", "new-key-of-thirty-two-characters"
REFUSED = '[defaults]\nunlisted = "reject"\n[events.other]\n'
TAKEN = "[events.e]\n"


def token(key: str, source_id: str = "customer-u1", **claims: object) -> str:
    made, _ = Signer([key]).sign(source_id=source_id, now=time.time(), **claims)  # type: ignore[arg-type]
    return made


async def post(
    url: str, body: object, **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    sent = {"Origin": ORIGIN, "Content-Type": "application/json"} | headers
    sent = {name: value for name, value in sent.items() if value}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=json.dumps(body), headers=sent) as answer,
    ):
        return answer.status, await answer.json(content_type=None), dict(answer.headers)


def event(n: int | str, **parts: object) -> dict[str, object]:
    made = {
        "event": "e",
        "customer": {"source_id": "customer-u1"},
        "metadata": {"n": str(n)},
    }
    return made | parts


async def sdk_url(process: Process) -> str:
    return (await process.track_url()).replace("/track", "/client/v1/events")


async def test_a_token_from_the_ops_listener_counts_on_both_routes(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(
        valkey_url, prefix, tmp_path, signing_keys=NEW, tokens="required"
    ) as relay:
        process = relay.start("serve")
        url = await process.track_url()
        tokens = (await process.ready_url()).replace("/readyz", "/tokens")
        status, told, _ = await post(tokens, {"source_id": "zoë"}, Origin="")
        assert status == 200
        made = str(told["token"])
        body = event(1, customer=None, token=made, loyalty={"code": "C"})
        assert (await post(url, body))[0] == 202
        body = event(2, customer=None)
        official = await sdk_url(process)
        assert (await post(official, body, **{"Relay-Token": made}))[0] == 200
        # Not even an Origin is needed with it, and without it nothing gets in.
        assert (await post(url, event(3, customer=None, token=made), Origin=""))[
            0
        ] == 202
        for bad, reason in [
            (None, "token_missing"),
            (token(OLD), "token_forged"),
            (made[:-4], "token_malformed"),
            (made[:-43] + token(NEW)[-43:], "token_forged"),
        ]:
            status, told, headers = await post(url, event("bad", token=bad))
            assert (status, told["reason"]) == (401, reason)
            assert headers["WWW-Authenticate"] == "Relay-Token"
        await relay.drained()
        assert sorted(relay.delivered_ids()) == ["1", "2", "3"]
        assert {record.source_id for record in relay.sandbox.events} == {"zoë"}
        assert made not in process.text


async def test_uses_are_counted_once_for_all_relays(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path, signing_keys=NEW) as relay:
        processes = [relay.start("serve"), relay.start("serve", "--no-forwarder")]
        urls = [await process.track_url() for process in processes]
        twice = token(NEW, uses=2)
        answers = await asyncio.gather(
            *(post(urls[n % 2], event(n, token=twice)) for n in range(20))
        )
        assert [status for status, _, _ in answers].count(202) == 2
        reasons = {told.get("reason") for status, told, _ in answers if status == 401}
        assert reasons == {"token_used_up"}
        await relay.drained()
        assert len(relay.delivered_ids()) == 2


# --- the catalogue --------------------------------------------------------------------


async def test_the_catalogue_decides_lane_limit_and_coalescing(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(
        '[events.low]\npriority = "low"\n[events.high]\npriority = "high"\n'
        '[events.once]\ncoalesce = "1h"\n[events.twice]\nlimit = "2/1d"\n'
    )
    async with stack(valkey_url, prefix, tmp_path, catalog=str(path)) as relay:
        edge = relay.start("serve", "--no-forwarder")
        url = await edge.track_url()
        names = ["low", "high", "once", "once", "twice", "twice", "twice"]
        batch = [event(n, event=name) for n, name in enumerate(names)]
        status, told, _ = await post(url, batch)
        entries = told["events"]
        assert isinstance(entries, list)
        assert status == 202
        assert [entry["status"] for entry in entries] == [
            *("queued", "queued", "queued", "coalesced", "queued", "queued"),
            "rate_limited",
        ]
        assert entries[-1]["reason"] == "rate_limited_event"
        assert 86_000 < entries[-1]["retry_after"] <= 86_400
        relay.start("worker", concurrency="1")
        await relay.drained()
        order = relay.sandbox.event_names()
        assert order.index("high") < order.index("low")
        assert sorted(order) == ["high", "low", "once", "twice", "twice"]
