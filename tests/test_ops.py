"""Probes get the truth, whoever asks, and nothing else is to be had there."""

import asyncio
import json
import os
import random
import time
from typing import cast

import httpx
import pytest
from pydantic import SecretStr
from uvicorn._types import ASGIApplication

from relay import __version__
from relay.errors import QueueUnavailable
from relay.ops import Check, ops_app
from relay.signing import Signer
from tests.programs import RELAY, running
from tests.support import serve

pytestmark = pytest.mark.anyio


async def fine() -> str:
    return "ok"


async def full() -> str:
    return "full: 10 events wait"


async def away() -> str:
    raise QueueUnavailable("redis_unreachable", "Redis cannot be reached.")


async def get(path: str, checks: dict[str, Check]) -> httpx.Response:
    app = cast("ASGIApplication", ops_app(checks))
    async with serve(app) as url, httpx.AsyncClient() as client:
        return await client.get(url + path)


async def test_healthz_says_that_the_process_lives_whatever_else_does() -> None:
    answer = await get("/healthz", {"redis": away})
    assert answer.status_code == 200
    assert answer.json() == {"status": "alive", "version": __version__}


async def test_readyz_is_ready_when_every_check_is_ok() -> None:
    answer = await get("/readyz", {"redis": fine, "queue": fine})
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ready",
        "checks": {"redis": "ok", "queue": "ok"},
    }


async def test_readyz_names_each_check_that_is_not_ok() -> None:
    answer = await get("/readyz", {"redis": away, "queue": full, "disk": fine})
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "unready",
        "checks": {
            "redis": "redis_unreachable: Redis cannot be reached.",
            "queue": "full: 10 events wait",
            "disk": "ok",
        },
    }


async def test_a_crowd_of_probes_is_looked_after_one_by_one() -> None:
    now = most = asked = 0

    async def counting() -> str:
        nonlocal now, most, asked
        now, asked = now + 1, asked + 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return "ok"

    app = cast("ASGIApplication", ops_app({"redis": counting}))
    async with serve(app) as url, httpx.AsyncClient() as client:
        answers = await asyncio.gather(
            *(client.get(f"{url}/readyz") for _ in range(20))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert (most, asked) == (1, 20)


@pytest.mark.parametrize("path", ["/", "/stats", "/metrics", "/track", "/docs"])
async def test_nothing_else_is_served(path: str) -> None:
    assert (await get(path, {})).status_code == 404


def test_off_loopback_the_probes_are_open_and_the_rest_is_not_there(
    valkey_url: str, prefix: str
) -> None:
    token = "S3CRET-of-the-ops-listener"
    env = {
        "RELAY_ENV_FILE": os.devnull,
        "RELAY_REDIS_URL": valkey_url,
        "RELAY_REDIS_PREFIX": prefix,
        "RELAY_ALLOWED_ORIGINS": "https://shop.example",
        "RELAY_CLIENT_TOKEN": "t",
        "RELAY_PORT": "0",
        "RELAY_OPS_HOST": "0.0.0.0",
        "RELAY_OPS_PORT": "0",
        "RELAY_OPS_TOKEN": token,
    }
    with running([*RELAY, "serve", "--no-forwarder"], env=env) as relay:
        url = relay.wait_for(r"Ready\? http://0\.0\.0\.0(:\d+)/")[1]
        for path, status in [("/healthz", 200), ("/readyz", 200), ("/stats", 404)]:
            assert httpx.get(f"http://127.0.0.1{url}{path}").status_code == status
        bearer = {"Authorization": f"Bearer {token}"}
        for headers, status in [({}, 401), (bearer, 409)]:  # 409: no signing key
            answer = httpx.post(f"http://127.0.0.1{url}/tokens", headers=headers)
            assert answer.status_code == status
        assert relay.stop() == 0
        assert token not in relay.said


# --- tokens ---------------------------------------------------------------------------

KEY = "k" * 32
OPS = SecretStr("S3CRET-of-the-ops-listener")


async def ask(
    body: object = None,
    *,
    token: SecretStr | None = None,
    keys: bool = True,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    signer = Signer([KEY], ttl_s=3600) if keys else None
    app = cast("ASGIApplication", ops_app({}, signer=signer, token=token))
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with serve(app) as url, httpx.AsyncClient(trust_env=False) as client:
        return await client.request(
            method, f"{url}/tokens", content=raw, headers=headers
        )


async def test_a_backend_gets_a_token_that_says_what_it_asked_for() -> None:
    asked = {
        "source_id": "zoë",
        "events": ["paid"],
        "origin": "https://shop.example",
        "ttl": "2h",
        "uses": 3,
    }
    answer = await ask(asked)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    told = answer.json()
    said = Signer([KEY]).read(told["token"], now=time.time())
    assert (said.source_id, said.events) == ("zoë", frozenset({"paid"}))
    assert (said.origin, said.uses) == ("https://shop.example", 3)
    assert told["expires_at"] == said.expires_at == said.issued_at + 7200
    plain = (await ask({"source_id": "u1"})).json()
    said = Signer([KEY]).read(plain["token"], now=time.time())
    assert said.expires_at - said.issued_at == 3600


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        ({}, "source_id"),
        ({"source_id": ""}, "source_id"),
        ({"source_id": "u", "more": 1}, "more"),
        ({"source_id": "u", "origin": "shop.example/x"}, "origin"),
        ({"source_id": "u", "events": []}, "events"),
        ({"source_id": "u", "events": "paid"}, "events"),
        ({"source_id": "u", "ttl": 0}, "ttl"),
        ({"source_id": "u", "ttl": 10**12}, "ttl"),
        ({"source_id": "u", "ttl": "soon"}, "time"),
        ({"source_id": "u", "uses": 0}, "uses"),
        (b" " * 70_000, "65536"),
    ],
    ids=str,
)
async def test_a_token_that_cannot_be_made_is_told_why(
    body: object, named: str
) -> None:
    answer = await ask(body)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert named in answer.json()["detail"]


async def test_no_body_makes_a_500() -> None:
    for n in range(60):
        raw = random.Random(n).randbytes(n) + (b'{"source_id":' if n % 2 else b"")
        assert (await ask(raw)).status_code == 400


async def test_with_an_ops_token_a_bearer_is_needed() -> None:
    bearer = f"Bearer {OPS.get_secret_value()}"
    for sent in (None, "Bearer x", bearer[7:]):
        headers = {"Authorization": sent} if sent else {}
        answer = await ask({"source_id": "u"}, token=OPS, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": bearer, "Origin": "https://a.example", "Host": "ops"}
    assert (await ask({"source_id": "u"}, token=OPS, headers=right)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:9000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:9000"}, 200),
        # What a page can do from a browser on this machine.
        ({"Origin": "http://localhost:9000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "attacker.example:9000"}, 403),
        ({"Host": "localhost.attacker.example"}, 403),
        ({"Host": "[x"}, 403),
        ({"Host": ""}, 403),
    ],
    ids=str,
)
async def test_without_an_ops_token_no_web_page_gets_one(
    headers: dict[str, str], status: int
) -> None:
    assert (await ask({"source_id": "u"}, headers=headers)).status_code == status


async def test_without_a_key_and_by_another_method_there_is_none() -> None:
    answer = await ask({"source_id": "u"}, keys=False)
    assert (answer.status_code, answer.json()["reason"]) == (409, "no_signing_key")
    assert (await ask(method="GET")).status_code == 405
