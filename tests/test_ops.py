"""Probes get the truth, whoever asks, and nothing else is to be had there."""

import asyncio
import os
from typing import cast

import httpx
import pytest
from uvicorn._types import ASGIApplication

from relay import __version__
from relay.errors import QueueUnavailable
from relay.ops import Check, ops_app
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
