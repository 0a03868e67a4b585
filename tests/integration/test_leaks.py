"""A relay whose every secret is known, two customers, and all that can go wrong.

What it says meanwhile holds none of the secrets, and to each customer nothing of the
other one. tests/test_leaks.py looks at the rest of the suite in the same way.
"""

import asyncio
import json
import secrets
import time
from pathlib import Path

import aiohttp
import pytest
import redis

from relay.embedded import EmbeddedServer
from relay.sandbox.config import (
    OAUTH_APP_ID,
    PROJECT_ID,
    SERVER_APP_ID,
    SandboxConfig,
)
from relay.sandbox.faults import Fault
from relay.signing import Signer
from tests.integration.stack import ORIGIN, Process, Stack, stack
from tests.leaks import Kind
from tests.listening import of_session, where
from tests.support import eventually

pytestmark = pytest.mark.anyio

# What Voucherify is sent, and could quote.
SENT = {
    "keys+oauth1": ("client_token", "server_app_token"),
    "oauth2": ("oauth_app_secret",),
}


def secret(name: str) -> str:
    """A value that stands for one secret, with what URLs and JSON write otherwise."""
    return f"{name}-{secrets.token_hex(8)}/+%22~"


def profile(name: str) -> dict[str, object]:
    drawn = secrets.token_hex(4)
    return {
        "source_id": f"{name}-{drawn}",
        "name": f"{name.title()} ó'{drawn}",
        "email": f"{name}.{drawn}@example.com",
        "phone": f"+44{secrets.randbelow(10**9):09}",
        "address": {"line_1": f"{name} street {drawn}", "city": f"city of {drawn}"},
        "metadata": {"note": f"note on {name} {drawn}"},
    }


class Shop:
    """One relay, its secrets, and pages of two customers."""

    def __init__(self, relay: Stack, keys: dict[str, str]) -> None:
        self.relay, self.keys = relay, keys
        self.track = self.ready = ""
        self.jane, self.joe = profile("jane"), profile("joe")

    async def start(self) -> Process:
        process = self.relay.start("serve")
        self.track = await process.track_url()
        self.ready = await process.ready_url()
        return process

    def token(self, customer: dict[str, object]) -> str:
        signer = Signer([self.keys["signing_keys"]])
        made, _ = signer.sign(source_id=str(customer["source_id"]), now=time.time())
        return made

    async def post(self, url: str, body: object, **headers: str) -> tuple[int, str]:
        sent = {
            "Origin": ORIGIN,
            "Content-Type": "application/json",
            "Prefer": "wait=5",
        }
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=json.dumps(body), headers=sent) as answer,
        ):
            return answer.status, await answer.text()

    async def send(self, customer: object, **parts: object) -> tuple[int, str]:
        n = secrets.token_hex(3)
        body = {"event": "bought", "customer": customer, "metadata": {"n": n}} | parts
        return await self.post(self.track, body)

    async def run(self, *command: str, **settings: str) -> Process:
        process = self.relay.start(*command, **settings)

        async def ended() -> bool:
            return process.popen.poll() is not None

        await eventually(ended, within=30)
        return process


def everything(
    scheme: str, redis_password: str
) -> tuple[dict[str, str], SandboxConfig]:
    """A value for each secret that a relay can have, and a cluster that knows them."""
    keys = {
        name: secret(name)
        for name in ("client_token", "server_app_token", "signing_keys", "ops_token")
    }
    keys["oauth_app_secret"] = f"oauth-{redis_password[::-1]}"
    config = SandboxConfig(
        client_limit=None,
        client_token=keys["client_token"],
        server_app_token=keys["server_app_token"],
        oauth_app_secret=keys["oauth_app_secret"],
    )
    keys |= {"auth": scheme, "server_app_id": SERVER_APP_ID}
    if scheme == "oauth2":
        keys |= {
            "oauth_app_id": OAUTH_APP_ID,
            "oauth_project_id": PROJECT_ID,
            "oauth_scope": "events.create",
        }
    return keys, config


@pytest.mark.parametrize(
    ("scheme", "log_format"), [("keys+oauth1", "json"), ("oauth2", "console")]
)
async def test_a_relay_in_all_its_troubles_gives_nothing_away(
    scheme: str, log_format: str, prefix: str, tmp_path: Path
) -> None:
    password = secrets.token_hex(12)
    keys, config = everything(scheme, password)
    with EmbeddedServer(data_dir=tmp_path / "data") as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.acl_setuser(
                "relay",
                enabled=True,
                passwords=[f"+{password}"],
                keys="*",
                channels="*",
                categories=["+@all"],
            )
        url = server.url.replace("unix://", f"unix://relay:{password}@")
        async with stack(
            url, prefix, tmp_path, sandbox=config, log_format=log_format, **keys
        ) as relay:
            relay.sandbox.expect("keys_and_bearer")  # as the scheme says
            shop = Shop(relay, keys)
            process = await shop.start()
            await bought(shop)
            await quoted(shop)
            await refused(shop)
            await asked(shop)
            await commanded(shop)
            await relay.drained()
            assert await process.stop() == 0
        listener = of_session()
        listener.keys(server.url, "{" + prefix + "}")
    listener.look()
    assert listener.recorder.leaks(of=where()) == []
    assert listener.recorder.kinds(of=where()) >= {
        Kind.ANSWER,
        Kind.OUTPUT,
        Kind.METRIC,
        Kind.EVENT,
    }


async def bought(shop: Shop) -> None:
    """Both buy; then a page that knows no more than a name asks in Jane's."""
    sdk = shop.track.replace("/track", "/client/v1/events")
    for customer in (shop.jane, shop.joe):
        token = shop.token(customer)
        status, said = await shop.send(customer, token=token, loyalty={"code": "L-1"})
        assert (status, "delivered" in said) == (202, True), said
        body = {"event": "seen", "customer": customer, "metadata": {"n": "1"}}
        status, said = await shop.post(sdk, body, Relay_Token=token)
        assert (status, str(customer["source_id"]) in said) == (200, True), said
    # Voucherify answers with the profile that it has stored.
    named = {"source_id": shop.jane["source_id"]}
    status, said = await shop.send(named)
    assert (status, "delivered" in said) == (202, True), said
    body = {"event": "seen", "customer": named, "metadata": {"n": "2"}}
    assert (await shop.post(sdk, body))[0] == 200


async def quoted(shop: Shop) -> None:
    """Voucherify refuses, and says in its error whatever it has been sent."""
    bench = shop.relay.bench
    [key] = await bench.client.keys(f"{bench.queue.prefix}:oauth:*")
    minted = str(await bench.client.hget(key, "value"))[2:-1]
    sent = SENT[shop.keys["auth"]]
    values = [minted, *(shop.keys[name] for name in sent)]
    said = {"code": 400, "key": "invalid", "message": f"Wrong: {' and '.join(values)}"}
    shop.relay.sandbox.inject(Fault(status=400, body=said))
    token = shop.token(shop.joe)
    status, answer = await shop.send(shop.joe, token=token)
    assert (status, "rejected" in answer, "***" in answer) == (202, True, True), answer
    [letter] = await shop.relay.bench.dead()
    assert str(shop.joe["email"]) in str(letter)  # a dead letter is the whole event
    shop.relay.sandbox.inject(Fault(status=500, body=said))
    assert "delivered" in (await shop.send(shop.joe, token=token))[1]


async def refused(shop: Shop) -> None:
    """The relay refuses: what is said, who says it, and where."""
    mine, theirs = shop.token(shop.jane), shop.token(shop.joe)
    forged = theirs[:-4] + ("AAAA" if theirs[-4:] != "AAAA" else "BBBB")
    assert (await shop.send(shop.joe, token=forged))[0] == 401
    assert (await shop.send(shop.joe, token=mine))[0] == 403
    assert (await shop.send(shop.joe))[0] == 403
    assert (await shop.send(shop.joe | {"email": 7}, token=theirs))[0] == 400
    assert (await shop.send(shop.joe | {shop.keys["ops_token"][:9]: 1}))[0] == 400
    page = {"event": "bought", "customer": shop.joe}
    assert (await shop.post(shop.track, page, Origin="https://else.example"))[0] == 403
    assert (await shop.post(f"{shop.track}/else", page))[0] == 404
    async with aiohttp.ClientSession() as session, session.get(shop.track) as answer:
        assert answer.status == 405
        await answer.read()
    host, port = shop.track.split("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{shop.keys['client_token']} {shop.jane['email']}\r\n\r\n".encode())
    of_session().raw(await reader.read())
    writer.close()
    await writer.wait_closed()


async def asked(shop: Shop) -> None:
    """The ops listener answers probes, and tokens to those who may have them."""
    tokens = shop.ready.replace("/readyz", "/tokens")
    body = {"source_id": shop.jane["source_id"]}
    for given, status in [("", 401), ("wrong", 401), (shop.keys["ops_token"], 200)]:
        bearer = f"Bearer {given}"
        assert (await shop.post(tokens, body, Authorization=bearer))[0] == status
    async with aiohttp.ClientSession() as session:
        for path in ("/readyz", "/healthz", "/metrics", "/"):
            async with session.get(shop.ready.replace("/readyz", path)) as answer:
                await answer.read()


async def commanded(shop: Shop) -> None:
    """The commands that read, and a start with settings that are all wrong."""
    event = shop.relay.directory / "event.json"
    event.write_text('{"event":"bought","customer":{"source_id":"u1"}}')
    erased = str(shop.jane["source_id"])
    told = await asyncio.gather(
        shop.run("stats"),
        shop.run("stats", "--json"),
        shop.run("check"),
        shop.run("explain", str(event)),
        shop.run("forget", erased),
    )
    assert {process.popen.returncode for process in told} <= {0, 3}
    garbled = {
        name: f"\x07{value}" for name, value in shop.keys.items() if len(value) > 20
    }
    wrong = await shop.run("serve", **garbled)
    assert (wrong.popen.returncode, wrong.text[:12]) == (2, "The settings")
