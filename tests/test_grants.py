"""Token requests as they are on the wire, and every answer to them."""

import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from relay import __version__
from relay.grants import EVENT_SCOPES, LIFE_MAX_S, LIFE_S, Grant, Issued, read_issued
from relay.outcomes import Hold
from relay.replies import Lost, Reply
from relay.retry import HOUR_MS
from relay.transport import Transport
from relay.verdicts import Answer, Verdict
from tests.support import serve

SECRET = "91ac-secret-never-shown"
V1 = Grant(version=1, app_id="app-1", secret=SecretStr(SECRET), scope="client_events")
V2 = Grant(
    version=2,
    app_id="app-2",
    secret=SecretStr(SECRET),
    scope="events.create customers.read",
    project_id="proj_1",
)
BASIC = base64.b64encode(f"app-2:{SECRET}".encode()).decode()


@dataclass
class Recorder:
    """A server that takes down what it gets, byte for byte."""

    path: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    @property
    def app(self) -> Callable[..., Awaitable[None]]:
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path = f"{scope['method']} {scope['path']}"
        self.headers = [(n.decode(), v.decode()) for n, v in scope["headers"]]
        self.body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("grant", "path", "credentials", "form"),
    [
        (
            V1,
            "/v1/oauth/token",
            {"x-app-id": "app-1", "x-app-token": SECRET},
            {"grant_type": "client_credentials", "scope": "client_events"},
        ),
        (
            V2,
            "/v2/oauth/token",
            {"authorization": f"Basic {BASIC}"},
            {
                "grant_type": "client_credentials",
                "scope": "events.create customers.read",
                "project_id": "proj_1",
            },
        ),
    ],
    ids=["v1", "v2"],
)
async def test_a_token_request_carries_exactly_this(
    grant: Grant, path: str, credentials: dict[str, str], form: dict[str, str]
) -> None:
    recorder, transport = Recorder(), Transport()
    async with serve(recorder.app, lifespan="off") as url:
        await transport.request(
            "POST", httpx.URL(url + grant.path), grant.headers, grant.form
        )
        await transport.aclose()
    assert recorder.path == f"POST {path}"
    assert dict(recorder.headers) == credentials | {
        "host": url.removeprefix("http://"),
        "content-length": str(len(recorder.body)),
        "content-type": "application/x-www-form-urlencoded",
        "user-agent": f"voucherify-relay/{__version__}",
        "accept": "application/json",
    }
    assert len(recorder.headers) == 5 + len(credentials)
    assert dict(parse_qsl(recorder.body.decode(), strict_parsing=True)) == form


def test_each_api_has_the_scope_of_its_events() -> None:
    assert EVENT_SCOPES == {"client": "client_events", "server": "events"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"secret": SecretStr("")}, "OAuth secret must be visible ASCII"),
        ({"secret": SecretStr("hunter2 \n")}, "OAuth secret must be visible ASCII"),
        ({"app_id": "ä"}, "OAuth application id must be visible ASCII"),
        ({"app_id": "a:b"}, "has no colon"),
        ({"project_id": ""}, "OAuth project id must be visible ASCII"),
        ({"scope": ""}, "OAuth scope must be words"),
        ({"scope": "a,b"}, "OAuth scope must be words"),
        ({"scope": "a  b"}, "OAuth scope must be words"),
        ({"scope": "a\r\nb"}, "OAuth scope must be words"),
    ],
)
def test_what_cannot_be_asked_with_is_refused_unseen(
    change: dict[str, object], says: str
) -> None:
    given = {name: getattr(V2, name) for name in Grant.__slots__}
    with pytest.raises(ValueError, match=says) as error:
        Grant(**(given | change))
    assert "hunter2" not in str(error.value)


# What comes back


def said(status: int, body: object = b"", *, whole: bool = True, **more: str) -> Reply:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    return Reply(status=status, headers=headers, body=raw, whole=whole)


ISSUED: dict[str, object] = {
    "access_token": "T0k.en-_~+/=",
    "client_id": "app-1",
    "expires_at": 1_790_000_900,
    "expires_in": 900,
    "scope": "client_events",
    "token_type": "Bearer",
}


@pytest.mark.parametrize(
    ("change", "life_s"),
    [
        ({}, 900.0),
        ({"expires_in": 12.5}, 12.5),
        ({"expires_in": "300"}, 300.0),
        ({"expires_in": 900_000}, LIFE_MAX_S),
        ({"token_type": "bearer"}, 900.0),
        ({"something": {"new": []}}, 900.0),
    ],
)
def test_a_token_is_read(change: dict[str, object], life_s: float) -> None:
    issued = read_issued(said(200, ISSUED | change), V1, now=0)
    assert isinstance(issued, Issued)
    assert (issued.access_token, issued.expires_in) == ("T0k.en-_~+/=", life_s)
    assert issued.access_token not in repr(issued)


def test_a_token_that_says_no_more_lives_as_long_as_is_documented() -> None:
    issued = read_issued(said(201, {"access_token": "abc"}), V2, now=0)
    assert isinstance(issued, Issued)
    assert issued.expires_in == LIFE_S == 900


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"OK",
        b"[]",
        b'{"access_token":"abc","expires_in":9',
        b"[" * 60_000,
        {},
        ISSUED | {"access_token": ""},
        ISSUED | {"access_token": None},
        ISSUED | {"access_token": "a b"},
        ISSUED | {"access_token": "a\r\nX-App-Token: b"},
        ISSUED | {"access_token": "ä"},
        ISSUED | {"expires_in": 0},
        ISSUED | {"expires_in": -900},
        ISSUED | {"expires_in": "soon"},
        ISSUED | {"expires_in": None},
        ISSUED | {"token_type": "mac"},
    ],
)
def test_a_success_without_a_usable_token_is_garbled(body: object) -> None:
    assert read_issued(said(200, body), V1, now=0) == Answer(
        verdict=Verdict.HOLD, hold=Hold.CONFIG, reason="oauth_garbled", status=200
    )


@pytest.mark.parametrize(
    ("reply", "verdict", "hold", "reason"),
    [
        (said(400), Verdict.HOLD, Hold.AUTH, "oauth_refused"),
        (said(401), Verdict.HOLD, Hold.AUTH, "oauth_refused"),
        (said(402), Verdict.HOLD, Hold.PLAN, "oauth_refused"),
        (said(403), Verdict.HOLD, Hold.AUTH, "oauth_refused"),
        (said(404), Verdict.HOLD, Hold.CONFIG, "oauth_refused"),
        (said(405), Verdict.HOLD, Hold.CONFIG, "oauth_refused"),
        (said(415), Verdict.HOLD, Hold.CONFIG, "oauth_refused"),
        (said(307), Verdict.HOLD, Hold.CONFIG, "oauth_refused"),
        (said(408), Verdict.RETRY, None, "oauth_unavailable"),
        (said(429), Verdict.WAIT, None, "oauth_limited"),
        (
            said(429, x_rate_limit_type="api_calls_cycle"),
            Verdict.HOLD,
            Hold.PLAN,
            "oauth_refused",
        ),
        (said(500), Verdict.RETRY, None, "oauth_unavailable"),
        (said(502), Verdict.RETRY, None, "oauth_unavailable"),
        (said(504), Verdict.RETRY, None, "oauth_unavailable"),
        (said(999), Verdict.RETRY, None, "oauth_unavailable"),
        (said(200, ISSUED, whole=False), Verdict.RETRY, None, "oauth_unavailable"),
    ],
    ids=lambda part: str(part.status) if isinstance(part, Reply) else None,
)
def test_whatever_is_answered_the_event_was_not_sent(
    reply: Reply, verdict: Verdict, hold: Hold | None, reason: str
) -> None:
    answer = read_issued(reply, V1, now=0)
    assert isinstance(answer, Answer)
    assert (answer.verdict, answer.hold, answer.reason) == (verdict, hold, reason)
    assert answer.status == reply.status


@pytest.mark.parametrize("written", [True, False])
def test_no_answer_at_all_means_that_the_event_was_not_sent(written: bool) -> None:
    lost = Lost(reason="read_timeout", written=written)
    assert read_issued(lost, V1, now=0) == Answer(
        verdict=Verdict.RETRY, reason="oauth_unavailable"
    )


def test_a_429_says_when_to_come_back() -> None:
    answer = read_issued(said(429, retry_after="7"), V1, now=0)
    assert isinstance(answer, Answer)
    assert answer.retry_after_ms == 7_000
    answer = read_issued(said(429, retry_after="999999"), V1, now=0)
    assert isinstance(answer, Answer)
    assert answer.retry_after_ms == HOUR_MS


@pytest.mark.parametrize("grant", [V1, V2], ids=["v1", "v2"])
def test_what_voucherify_says_is_kept_without_the_credentials(grant: Grant) -> None:
    body = {
        "code": 400,
        "key": "invalid_scope",
        "message": f"Invalid scope for {SECRET} ({BASIC})",
    }
    answer = read_issued(said(400, body), grant, now=0)
    assert isinstance(answer, Answer)
    assert answer.error_key == "invalid_scope"
    assert answer.error_message is not None
    assert answer.error_message.startswith("Invalid scope for ***")
    assert SECRET not in repr(answer)
    if grant is V2:
        assert BASIC not in repr(answer)


def test_nothing_prints_a_credential() -> None:
    shown = f"{V1!r} {V2} {said(200, ISSUED)!r}"
    for secret in (SECRET, BASIC, "T0k.en"):
        assert secret not in shown
