"""Send one event to Voucherify and say what became of it: two APIs, four credentials.

Whatever the upstream does, `Voucherify.send` gives an `Answer` and raises nothing.
An event makes points and has no idempotency key: a failure counts as `retry` only
when the request was certainly not written; in doubt it is `unknown`. One call is one
request at most: a second one would escape the budget that all relays share. Nor does
`Voucherify.look_up`, which asks whether an event of unknown fate has arrived.
"""

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import httpx
from pydantic import SecretStr

from relay import __version__, activity
from relay.grants import Grant
from relay.oauth import OAuth, Token, TokenStore
from relay.transport import Lost, Transport
from relay.verdicts import Answer, Verdict, read_answer

Api = Literal["client", "server"]

EVENT_PATHS: dict[Api, str] = {"client": "/client/v1/events", "server": "/v1/events"}
# Voucherify's "Authentication" guide: publishable keys for the one, secret ones for
# the other.
KEY_HEADERS: dict[Api, tuple[str, str]] = {
    "client": ("X-Client-Application-Id", "X-Client-Token"),
    "server": ("X-App-Id", "X-App-Token"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A pair of keys: client-side ones for `client`, server-side ones for `server`."""

    app_id: str
    token: SecretStr


class Voucherify:
    """One of the event APIs of one project, over one pool of kept connections."""

    def __init__(
        self,
        *,
        base_url: str,
        api: Api = "client",
        origin: str | None = None,  # for the client API, with any credentials
        keys: Keys | None = None,
        grant: Grant | None = None,
        store: TokenStore | None = None,  # where relays share the token of `grant`
        max_connections: int = 32,
        connect_timeout: float = 3.0,  # for the pool, DNS, TCP and TLS together
        timeout: float = 10.0,  # from the call to the last byte read
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_url = cluster_url(base_url)
        self._api: Api = api
        self._origin = origin
        self._url = httpx.URL(self._base_url + EVENT_PATHS[api])
        self._headers = _headers(api, origin, keys)
        self._secrets = [keys.token.get_secret_value()] if keys else []
        self._secrets += grant.secrets if grant else []  # the cluster knows them, too
        self._wall = wall
        self._transport = Transport(
            # The token's request never waits for those of the events.
            max_connections=max_connections + (grant is not None),
            connect_timeout=connect_timeout,
            timeout=timeout,
        )
        self._oauth = None
        if grant is not None and store is not None:
            self._oauth = OAuth(
                base_url=self._base_url,
                grant=grant,
                store=store,
                transport=self._transport,
                wall=wall,
                monotonic=monotonic,
            )
        elif grant is not None or keys is None:
            raise ValueError("give keys, or a grant with the store of its token")

    def __repr__(self) -> str:
        return (
            f"Voucherify(base_url={self._base_url!r}, api={self._api!r}, "
            f"origin={self._origin!r})"
        )

    async def send(self, body: bytes) -> Answer:
        """Send one event, JSON in `body`, and say what became of it."""
        if not body:
            raise ValueError("an event has a body: there is nothing to send")
        return await self._with_token(lambda token: self._post(body, token))

    async def look_up(self, body: bytes, *, proof: str, since_ms: int) -> Answer:
        """Look for an event in its customer's activity: whether it has arrived.

        `body` is as it was sent, `proof` the property of its metadata whose value no
        other event has, `since_ms` Unix time in ms before the first byte left. The
        verdict is DELIVERED, ABSENT or UNCLEAR, or what there was instead of an answer.
        """
        if self._api != "server":
            return Answer(verdict=Verdict.UNCLEAR, reason="look_up_needs_server_api")
        asked = activity.asked(body, proof=proof, since_ms=since_ms)
        if asked is None:
            return Answer(verdict=Verdict.UNCLEAR, reason="look_up_impossible")
        return await self._with_token(lambda token: self._get(asked, token))

    async def _with_token(
        self, call: Callable[[Token | None], Awaitable[Answer]]
    ) -> Answer:
        if self._oauth is None:
            return await call(None)
        token = await self._oauth.token()
        if isinstance(token, Answer):
            return token
        answer = await call(token)
        if answer.status == 401:
            return await self._oauth.refused(token, answer)
        if answer.verdict in (Verdict.DELIVERED, Verdict.ABSENT):
            self._oauth.worked(token)
        return answer

    async def aclose(self) -> None:
        """Close the pool. What is in flight ends without an answer."""
        if self._oauth is not None:
            await self._oauth.aclose()
        await self._transport.aclose()

    async def _post(self, body: bytes, token: Token | None) -> Answer:
        headers, secrets = self._signed(token)
        said = await self._transport.request("POST", self._url, headers, body)
        if isinstance(said, Lost):
            fate = Verdict.UNKNOWN if said.written else Verdict.RETRY
            return Answer(verdict=fate, reason=said.reason)
        return read_answer(
            said.status, said.headers, said.body, now=self._wall(), secrets=secrets
        )

    async def _get(self, asked: activity.Asked, token: Token | None) -> Answer:
        headers, secrets = self._signed(token)
        headers.pop("Content-Type")
        said = await self._transport.request(
            "GET",
            httpx.URL(self._base_url + asked.path, params=asked.params),
            headers,
            most=activity.MAX_BYTES,
            body_seconds=activity.BODY_SECONDS,
        )
        if isinstance(said, Lost):  # a question may be put again, whatever became of it
            return Answer(verdict=Verdict.RETRY, reason=said.reason)
        answer = read_answer(
            said.status, said.headers, said.body, now=self._wall(), secrets=secrets
        )
        return activity.judged(asked, answer, said.body, whole=said.whole)

    def _signed(self, token: Token | None) -> tuple[dict[str, str], list[str]]:
        """The headers with the credentials, and what nobody may be told of them."""
        if token is None:
            return dict(self._headers), self._secrets
        bearer = token.value.get_secret_value()
        signed = self._headers | {"Authorization": f"Bearer {bearer}"}
        return signed, [*self._secrets, bearer]


def _headers(api: Api, origin: str | None, keys: Keys | None) -> dict[str, str]:
    """What every event is sent with, but for the bearer token."""
    headers = {
        # Voucherify's audit log shows and filters it as the channel.
        "X-Voucherify-Channel": f"relay:{__version__}",
        "User-Agent": f"voucherify-relay/{__version__}",
        "Content-Type": "application/json",
        "Accept": "application/json",
    }
    if api == "client":
        headers["origin"] = _header("origin", origin or "")
    if keys is not None:
        app_id, token = KEY_HEADERS[api]
        headers[app_id] = _header("application id", keys.app_id)
        headers[token] = _header(f"{api} token", keys.token.get_secret_value())
    return headers


def shown_request(
    *,
    base_url: str,
    api: Api,
    origin: str | None,
    keys: Keys | None,
    bearer: bool,
) -> tuple[str, dict[str, str]]:
    """The URL and the headers that an event is sent with, secrets masked."""
    headers = _headers(api, origin, keys)
    if keys is not None:
        headers[KEY_HEADERS[api][1]] = "***"
    if bearer:
        headers["Authorization"] = "Bearer ***"
    return cluster_url(base_url) + EVENT_PATHS[api], headers


def _header(name: str, value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError(f"the {name} must be visible ASCII characters: copy it anew")
    return value


_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_URL = re.compile(rf"(https?)://({_LABEL}(?:\.{_LABEL})*|\[::1\])(:[1-9]\d{{0,4}})?/?")
_NO_NAME = re.compile(r".*voucherify\.io|localhost|(?:\d+\.){3}\d+")
_LOOPBACK = re.compile(r"localhost|\[::1\]|127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}")


def cluster_url(cluster: str) -> str:
    """Give the base URL of a cluster, named in short or in full, or ValueError."""
    # The messages never show the value: it may hold a password by mistake.
    cure = (
        "write the cluster's name (api, us1.api, as1.api) or its address (https://host "
        "or https://host:port, no path; http:// only to 127.0.0.1, [::1] or localhost)"
    )
    url = cluster.lower() if cluster.isascii() else ""
    if "://" not in url and not _NO_NAME.fullmatch(url):
        url = f"https://{url}.voucherify.io"
    match = _URL.fullmatch(url)
    if match is None or int((match[3] or ":1")[1:]) > 65_535:
        raise ValueError(f"this is not a cluster: {cure}")
    scheme, host, port = match.groups()
    if scheme == "http" and not _LOOPBACK.fullmatch(host):
        raise ValueError(f"http:// would show the client token to others: {cure}")
    if f".{host}".endswith(".download.voucherify.io"):
        raise ValueError(f"a download host never takes events: {cure}")
    return f"{scheme}://{host}{port or ''}"
