"""Tokens: minted, used, expired, introspected and revoked."""

import base64

import httpx
import pytest

from relay.sandbox import (
    APPLICATION_ID,
    CLIENT_TOKEN,
    OAUTH_APP_ID,
    OAUTH_APP_SECRET,
    PROJECT_ID,
    SERVER_APP_ID,
    SERVER_APP_TOKEN,
    Sandbox,
)
from tests.sandbox.support import CLIENT, SERVER, Caller, calling, json_of

pytestmark = pytest.mark.anyio

KEYS = {
    "x-app-id": SERVER_APP_ID,
    "x-app-token": SERVER_APP_TOKEN,
    "user-agent": "voucherify-relay/0.1.0",
}
NO_KEYS: dict[str, str | None] = {
    "x-client-application-id": None,
    "x-client-token": None,
    "x-app-id": None,
    "x-app-token": None,
}


async def mint(caller: Caller, scope: str = "client_events") -> httpx.Response:
    form = {"grant_type": "client_credentials", "scope": scope}
    return await caller.http.post(
        f"{caller.url}/v1/oauth/token", data=form, headers=KEYS
    )


async def mint_v2(
    caller: Caller, *, secret: str = OAUTH_APP_SECRET, project: str = PROJECT_ID
) -> httpx.Response:
    form = {
        "grant_type": "client_credentials",
        "scope": "events.write",
        "project_id": project,
    }
    basic = base64.b64encode(f"{OAUTH_APP_ID}:{secret}".encode()).decode()
    headers = {"authorization": f"Basic {basic}", "user-agent": "voucherify-relay/0.1"}
    return await caller.http.post(
        f"{caller.url}/v2/oauth/token", data=form, headers=headers
    )


async def send(caller: Caller, token: object, path: str = CLIENT) -> httpx.Response:
    headers = NO_KEYS | {"authorization": f"Bearer {token}"}
    return await caller.send(path=path, headers=headers)


async def test_a_token_opens_the_events_and_needs_no_keys(caller: Caller) -> None:
    answer = json_of(await mint(caller))
    assert answer["token_type"] == "Bearer"
    assert answer["expires_in"] == 900
    assert answer["scope"] == "client_events"
    assert (await send(caller, answer["access_token"])).status_code == 200
    caller.sandbox.assert_clean()


async def test_a_v2_token_opens_the_events(caller: Caller) -> None:
    token = json_of(await mint_v2(caller))["access_token"]
    assert (await send(caller, token)).status_code == 200
    assert (await send(caller, token, SERVER)).status_code == 200
    caller.sandbox.assert_clean()


@pytest.mark.parametrize(
    ("scope", "path", "status"),
    [
        ("client_events", CLIENT, 200),
        ("client_api", CLIENT, 200),
        ("vouchers client_events", CLIENT, 200),
        ("events", SERVER, 200),
        ("api", SERVER, 200),
        ("client_events", SERVER, 403),
        ("events", CLIENT, 403),
        ("vouchers", CLIENT, 403),
    ],
)
async def test_a_scope_opens_its_own_api(
    caller: Caller, scope: str, path: str, status: int
) -> None:
    token = json_of(await mint(caller, scope))["access_token"]
    assert (await send(caller, token, path)).status_code == status


async def test_a_token_ends_with_its_life() -> None:
    now = [1_800_000_000.0]
    sandbox = Sandbox(wall=lambda: now[0])
    async with calling(sandbox=sandbox) as caller:
        token = json_of(await mint(caller))["access_token"]
        now[0] += 899.9
        assert (await send(caller, token)).status_code == 200
        now[0] += 0.1
        expired = await send(caller, token)
        assert expired.status_code == 401
        assert json_of(expired)["key"] == "unauthorized"


async def test_all_tokens_can_be_ended_at_once(caller: Caller) -> None:
    token = json_of(await mint(caller))["access_token"]
    caller.sandbox.expire_tokens()
    assert (await send(caller, token)).status_code == 401


async def test_keys_beside_a_token_are_a_switch(caller: Caller) -> None:
    token = json_of(await mint(caller))["access_token"]
    both: dict[str, str | None] = {
        "authorization": f"Bearer {token}",
        "x-client-application-id": APPLICATION_ID,
        "x-client-token": CLIENT_TOKEN,
    }
    assert (await caller.send(headers=both)).status_code == 200
    assert [f.kind for f in caller.sandbox.unexpected()] == ["keys_and_bearer"]
    wrong = both | {"x-client-token": "nope"}
    assert (await caller.send(headers=wrong)).status_code == 401
    caller.sandbox.configure(keys_with_bearer="reject")
    assert (await caller.send(headers=both)).status_code == 401


async def test_the_origin_beside_a_token_is_a_switch(caller: Caller) -> None:
    token = json_of(await mint(caller))["access_token"]
    headers = NO_KEYS | {"authorization": f"Bearer {token}", "origin": None}
    assert (await caller.send(headers=headers)).status_code == 401
    caller.sandbox.configure(origin_with_bearer="ignore")
    assert (await caller.send(headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("form", "body"),
    [
        (
            {"grant_type": "password", "scope": "api"},
            {"code": 400, "key": "invalid_grant_type", "message": "Invalid grant_type"},
        ),
        (
            {"grant_type": "client_credentials", "scope": "vouchers,campaigns"},
            {
                "code": 400,
                "key": "invalid_scope",
                "message": "Invalid scope: vouchers,campaigns",
            },
        ),
        (
            {"grant_type": "client_credentials"},
            {"code": 400, "key": "invalid_scope", "message": "Invalid scope: "},
        ),
    ],
    ids=["grant-type", "comma", "no-scope"],
)
async def test_a_wrong_token_request_is_refused(
    caller: Caller, form: dict[str, str], body: dict[str, object]
) -> None:
    answer = await caller.http.post(
        f"{caller.url}/v1/oauth/token", data=form, headers=KEYS
    )
    assert (answer.status_code, json_of(answer)) == (400, body)


async def test_a_token_request_needs_a_form_and_the_server_keys(caller: Caller) -> None:
    url = f"{caller.url}/v1/oauth/token"
    assert (await caller.http.post(url, json={}, headers=KEYS)).status_code == 415
    assert (await caller.http.post(url, data={})).status_code == 401
    client_keys = {"x-app-id": APPLICATION_ID, "x-app-token": CLIENT_TOKEN}
    wrong = await caller.http.post(url, data={}, headers=client_keys)
    assert wrong.status_code == 401
    assert (await caller.http.get(url, headers=KEYS)).status_code == 405


async def test_v2_needs_its_own_credentials_and_the_project(caller: Caller) -> None:
    assert (await mint_v2(caller, secret="nope")).status_code == 401
    assert (await mint_v2(caller, project="proj_other")).status_code == 400
    for garbage in ("Basic !!!", "Basic /w==", "Bearer x", "Basic"):
        answer = await caller.http.post(
            f"{caller.url}/v2/oauth/token",
            data={},
            headers={"authorization": garbage},
        )
        assert answer.status_code == 401


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/oauth/token", "x-voucherify-channel"),
        ("/v1/oauth/token", "authorization"),
        ("/v1/oauth/token", "x-client-token"),
        ("/v2/oauth/token", "x-voucherify-channel"),
        ("/v2/oauth/token", "x-app-token"),
        ("/v2/oauth/token", "origin"),
    ],
)
async def test_a_token_request_with_more_than_it_needs_is_found(
    caller: Caller, path: str, name: str
) -> None:
    usual = {} if path == "/v2/oauth/token" else KEYS
    await caller.http.post(caller.url + path, data={}, headers=usual | {name: "x"})
    details = [found.detail for found in caller.sandbox.unexpected()]
    assert f"header {name}" in details


async def test_a_project_holds_a_bounded_number_of_tokens(caller: Caller) -> None:
    caller.sandbox.configure(oauth_max_tokens=2)
    answers = [(await mint(caller)).status_code for _ in range(3)]
    assert answers == [200, 200, 400]
    assert caller.sandbox.counts()["tokens_minted"] == 2


async def test_introspect_and_revoke(caller: Caller) -> None:
    token = str(json_of(await mint(caller))["access_token"])

    async def post(path: str, **form: str) -> httpx.Response:
        url = f"{caller.url}/v1/oauth/{path}"
        return await caller.http.post(url, data=form, headers=KEYS)

    known = json_of(await post("introspect", access_token=token))
    assert (known["active"], known["scope"]) == (True, "client_events")
    assert json_of(await post("introspect", x="1"))["key"] == "missing_parameters"
    revoked = await post("token/revoke", access_token=token)
    assert (revoked.status_code, revoked.content) == (204, b"")
    again = await post("token/revoke", access_token=token)
    assert (again.status_code, again.content) == (404, b"")
    inactive = json_of(await post("introspect", access_token=token))
    assert inactive == {"active": False}
    assert (await send(caller, token)).status_code == 401


async def test_no_record_keeps_a_credential(caller: Caller) -> None:
    token = str(json_of(await mint(caller))["access_token"])
    await send(caller, token)
    await mint_v2(caller)
    kept = repr(caller.sandbox.requests)
    assert "Bearer ***" in kept
    for secret in (token, SERVER_APP_TOKEN, OAUTH_APP_SECRET):
        assert secret not in kept
