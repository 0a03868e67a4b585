"""What browsers ask before they let Voucherify's clients send: all of it is allowed.

One list of headers for each client; `tests/browser/test_sdk_chromium.py` sees the
first of them come from a browser.
"""

from pathlib import Path

import aiohttp
import pytest

from tests.integration.stack import ORIGIN, stack

pytestmark = pytest.mark.anyio

KEYS = "x-client-application-id,x-client-token"
ASKED = {
    "2.9, voucherify.js": f"content-type,{KEYS},x-voucherify-channel",
    "2.9 with customHeaders": f"authorization,relay-token,{KEYS}",
    # Where a page may set User-Agent, as in Firefox, 3.x does so and it is asked for;
    # with OAuth it sends Authorization beside the keys.
    "3.x": f"content-type,{KEYS}",
    "3.x in Firefox": f"content-type,user-agent,{KEYS}",
    "3.x in Firefox with OAuth": f"authorization,content-type,user-agent,{KEYS}",
}


def names(field: str) -> set[str]:
    return {name.strip().lower() for name in field.split(",")}


async def test_a_preflight_of_each_client_is_allowed(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with stack(valkey_url, prefix, tmp_path) as relay:
        edge = relay.start("serve", "--no-forwarder")
        base = (await edge.track_url()).removesuffix("/track")
        async with aiohttp.ClientSession() as session:
            for path in ("/client/v1/events", "//client/v1/events"):
                for client, asked in ASKED.items():
                    headers = {
                        "Origin": ORIGIN,
                        "Access-Control-Request-Method": "POST",
                        "Access-Control-Request-Headers": asked,
                    }
                    async with session.options(
                        base + path, headers=headers, allow_redirects=False
                    ) as answer:
                        said = answer.headers
                    assert answer.ok, client
                    # Credentials rule out a star: each is to be named.
                    assert said["Access-Control-Allow-Origin"] == ORIGIN
                    assert said["Access-Control-Allow-Credentials"] == "true"
                    assert "Origin" in said["Vary"]
                    assert "POST" in said["Access-Control-Allow-Methods"]
                    allowed = names(said["Access-Control-Allow-Headers"])
                    assert names(asked) <= allowed, client
