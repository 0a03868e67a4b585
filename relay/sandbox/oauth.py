"""Voucherify's two token endpoints, both for client credentials.

v1 takes the server keys as headers, v2 takes the credentials of an OAuth Service key
as HTTP Basic and a `project_id` (guide "Authentication"; changelog of July 2026).
Tokens are opaque, live 900 s, and a project may hold 1,000 at once.
"""

import base64
import binascii
import hmac
import random
import string
from dataclasses import dataclass
from urllib.parse import parse_qs

from relay.sandbox.answers import Answer, error, framework_error, ok
from relay.sandbox.config import SandboxConfig

TOKEN_V1 = "/v1/oauth/token"  # noqa: S105  # a path
TOKEN_V2 = "/v2/oauth/token"  # noqa: S105  # a path
INTROSPECT = "/v1/oauth/introspect"
REVOKE = "/v1/oauth/token/revoke"
PATHS = frozenset({TOKEN_V1, TOKEN_V2, INTROSPECT, REVOKE})

# OpenAPI, OAuthTokenGenerateRequestBody.scope
_SCOPE_NAMES = """
api assets async-actions campaigns categories client_api client_consents
client_customers client_events client_promotions client_publish client_qualifications
client_redeem client_redemptions client_validate client_validations client_vouchers
consents customers events exports locations loyalties metadata-schemas orders
product-collections products promotions publications qualifications redemptions
referrals rewards segments skus task-results templates trash-bin
validation-rules-assignments validation-rules validations vouchers
"""
_SCOPES = frozenset(_SCOPE_NAMES.split())
_SCOPES_OF = {
    "client": frozenset({"client_api", "client_events"}),
    "server": frozenset({"api", "events"}),
    "activity": frozenset({"api", "customers"}),
}
_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One access token."""

    value: str
    scope: str
    version: int
    expires_at: float  # Unix seconds

    def opens(self, what: str) -> bool:
        """Tell whether its scope covers custom events of an API, or activity."""
        # v2 scopes are permission codes; the one for events is not published.
        return self.version == 2 or not _SCOPES_OF[what].isdisjoint(self.scope.split())


class Tokens:
    """Mint, check, introspect and revoke access tokens."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._live: dict[str, Token] = {}
        self.minted = 0

    def live(self, value: str, now: float) -> Token | None:
        """Return the token if it exists and has not expired."""
        token = self._live.get(value)
        return token if token is not None and token.expires_at > now else None

    def expire_all(self) -> None:
        """Forget every token: what the project's key being blocked looks like."""
        self._live.clear()

    def answer(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        *,
        now: float,
        config: SandboxConfig,
        request_id: str,
    ) -> Answer:
        """Answer one request to any of the OAuth paths."""
        form = _form(headers, body)
        if not _authenticated(path, headers, config):
            return error("unauthorized", 401, request_id)
        if form is None:
            return framework_error("content_type", 415)
        if path == INTROSPECT:
            return self._introspect(form, now, config)
        if path == REVOKE:
            return self._revoke(form, now)
        return self._mint(path, form, now, config)

    def _mint(
        self, path: str, form: dict[str, str], now: float, config: SandboxConfig
    ) -> Answer:
        if form.get("grant_type") != "client_credentials":
            return _plain_error("invalid_grant_type", "Invalid grant_type")
        scope = form.get("scope", "")
        version = 2 if path == TOKEN_V2 else 1
        wrong = [name for name in scope.split() if not _known(name, version)]
        if wrong or not scope.split():
            return _plain_error("invalid_scope", f"Invalid scope: {','.join(wrong)}")
        if version == 2 and form.get("project_id") != config.project_id:
            return _plain_error("invalid_project", "Invalid project_id")
        self._live = {v: t for v, t in self._live.items() if t.expires_at > now}
        if len(self._live) >= config.oauth_max_tokens:
            # The cap is documented, the answer beyond it is not.
            return _plain_error("too_many_tokens", "Too many active OAuth tokens")
        token = Token(
            value="".join(self._rng.choices(_ALPHABET, k=50)),
            scope=scope,
            version=version,
            expires_at=now + config.oauth_token_seconds,
        )
        self._live[token.value] = token
        self.minted += 1
        return ok("token_issued", _described(token, now, config))

    def _introspect(
        self, form: dict[str, str], now: float, config: SandboxConfig
    ) -> Answer:
        if "access_token" not in form:
            return _plain_error("missing_parameters", "Missing parameters")
        token = self.live(form["access_token"], now)
        if token is None:
            return ok("token_inactive", {"active": False})
        return ok("token_active", _described(token, now, config) | {"active": True})

    def _revoke(self, form: dict[str, str], now: float) -> Answer:
        token = self.live(form.get("access_token", ""), now)
        if token is None:
            return Answer(verdict="not_found", status=404)
        del self._live[token.value]
        return Answer(verdict="token_revoked", status=204)


def bearer(headers: dict[str, str]) -> str | None:
    """Return the token of an `Authorization: Bearer` header."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" and value.strip() else None


def same(given: str | None, expected: str) -> bool:
    """Compare a credential without telling how much of it was right."""
    return hmac.compare_digest((given or "").encode(), expected.encode())


def _authenticated(path: str, headers: dict[str, str], config: SandboxConfig) -> bool:
    if path == TOKEN_V2:
        name, secret = _basic(headers.get("authorization", ""))
        return same(name, config.oauth_app_id) and same(secret, config.oauth_app_secret)
    return same(headers.get("x-app-id"), config.server_app_id) and same(
        headers.get("x-app-token"), config.server_app_token
    )


def _basic(value: str) -> tuple[str, str]:
    scheme, _, encoded = value.partition(" ")
    if scheme.lower() != "basic":
        return "", ""
    try:
        decoded = base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, ValueError):
        return "", ""
    name, _, secret = decoded.partition(":")
    return name, secret


def _form(headers: dict[str, str], body: bytes) -> dict[str, str] | None:
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/x-www-form-urlencoded":
        return None
    parsed = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[-1] for name, values in parsed.items()}


def _known(scope: str, version: int) -> bool:
    return "," not in scope if version == 2 else scope in _SCOPES


def _described(token: Token, now: float, config: SandboxConfig) -> dict[str, object]:
    return {
        "access_token": token.value,
        "client_id": config.oauth_app_id
        if token.version == 2
        else config.server_app_id,
        "expires_at": int(token.expires_at),
        "expires_in": max(0, int(token.expires_at - now)),
        "scope": token.scope,
        "token_type": "Bearer",
    }


def _plain_error(key: str, message: str) -> Answer:
    # The documented OAuth errors carry neither details nor request_id.
    return ok(key, {"code": 400, "key": key, "message": message}, status=400)
