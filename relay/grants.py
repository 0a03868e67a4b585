"""What a request for an access token says, and what its answer means.

Two versions: with a server-side key, or with the key of an OAuth Service ("Oauth 2.0"
in Voucherify's "Authentication" guide; RFC 6749, 4.4). Both answer in the same way.
A failure is an `Answer` for the event that the token was for: it has not been sent.
"""

import base64
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlencode

import msgspec
from msgspec.structs import replace
from pydantic import SecretStr

from relay import __version__
from relay.outcomes import Hold
from relay.replies import Lost, Reply
from relay.verdicts import Answer, Verdict, read_answer

TOKEN_PATHS = {1: "/v1/oauth/token", 2: "/v2/oauth/token"}
# What opens custom events: OpenAPI, security of the two operations. The codes of
# version 2 are not published for events.
EVENT_SCOPES = {"client": "client_events", "server": "events"}
LIFE_S = 900.0  # "Authentication" guide; RFC 6749 (5.1) lets the answer leave it out
LIFE_MIN_S, LIFE_MAX_S = 1.0, 86_400.0  # beyond them is a mistaken unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Who asks, and for what: a server-side key (1), or one of an OAuth Service (2)."""

    version: Literal[1, 2]
    app_id: str
    secret: SecretStr
    scope: str  # several are separated by spaces
    project_id: str = ""  # version 2 only

    def __post_init__(self) -> None:
        named = {"application id": self.app_id, "secret": self._secret}
        if self.version == 2:
            named["project id"] = self.project_id
        for name, value in named.items():
            if not re.fullmatch(r"[!-~]+", value):
                msg = f"the OAuth {name} must be visible ASCII characters: copy it anew"
                raise ValueError(msg)
        if self.version == 2 and ":" in self.app_id:  # RFC 7617, 2
            raise ValueError("the OAuth application id has no colon: copy it anew")
        if not re.fullmatch(r"[!-~]+( [!-~]+)*", self.scope) or "," in self.scope:
            raise ValueError("the OAuth scope must be words with single spaces between")

    @property
    def path(self) -> str:
        return TOKEN_PATHS[self.version]

    @property
    def headers(self) -> dict[str, str]:
        """All headers of the request: it carries no others."""
        return {
            "User-Agent": f"voucherify-relay/{__version__}",
            "Content-Type": "application/x-www-form-urlencoded",
            "Accept": "application/json",
        } | self._credentials

    @property
    def form(self) -> bytes:
        form = {"grant_type": "client_credentials", "scope": self.scope}
        if self.version == 2:
            form["project_id"] = self.project_id
        return urlencode(form).encode()

    @property
    def secrets(self) -> list[str]:
        """What nothing may quote."""
        return [self._secret, self._basic]

    @property
    def _secret(self) -> str:
        return self.secret.get_secret_value()

    @property
    def _basic(self) -> str:
        return base64.b64encode(f"{self.app_id}:{self._secret}".encode()).decode()

    @property
    def _credentials(self) -> dict[str, str]:
        if self.version == 1:
            return {"X-App-Id": self.app_id, "X-App-Token": self._secret}
        return {"Authorization": f"Basic {self._basic}"}


class Issued(msgspec.Struct, kw_only=True):
    """The body of a token answer (OpenAPI, OAuthTokenGenerateResponseBody)."""

    access_token: str
    expires_in: float = LIFE_S
    token_type: str = "Bearer"  # noqa: S105  # its kind

    def __repr__(self) -> str:
        return f"Issued(expires_in={self.expires_in})"


_decode = msgspec.json.Decoder(Issued, strict=False).decode

UNAVAILABLE = Answer(verdict=Verdict.RETRY, reason="oauth_unavailable")
_GARBLED = Answer(verdict=Verdict.HOLD, hold=Hold.CONFIG, reason="oauth_garbled")


def read_issued(said: Reply | Lost, grant: Grant, *, now: float) -> Issued | Answer:
    """The token that was issued, or what becomes of the event that needs one."""
    if isinstance(said, Lost):
        return UNAVAILABLE
    if 200 <= said.status < 300:
        return _read_token(said)
    answer = read_answer(
        said.status, said.headers, said.body, now=now, secrets=grant.secrets
    )
    match answer.verdict:
        case Verdict.WAIT:
            return replace(answer, reason="oauth_limited")
        case Verdict.HOLD:
            return replace(answer, reason="oauth_refused")
        case Verdict.REJECTED:
            hold = Hold.AUTH if said.status == 400 else Hold.CONFIG
            return replace(
                answer, verdict=Verdict.HOLD, hold=hold, reason="oauth_refused"
            )
        case _:
            return replace(answer, verdict=Verdict.RETRY, reason="oauth_unavailable")


def _read_token(said: Reply) -> Issued | Answer:
    if not said.whole:
        return replace(UNAVAILABLE, status=said.status)
    with suppress(msgspec.DecodeError, RecursionError):
        issued = _decode(said.body)
        issued.expires_in = min(issued.expires_in, LIFE_MAX_S)
        if (
            re.fullmatch(r"[!-~]+", issued.access_token)
            and issued.token_type.lower() == "bearer"  # RFC 6749, 5.1: in any case
            and issued.expires_in >= LIFE_MIN_S
        ):
            return issued
    return replace(_GARBLED, status=said.status)
