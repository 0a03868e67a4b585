"""Send one event to Voucherify and say what became of it: two APIs, four credentials.

Whatever the upstream does, `Voucherify.send` gives an `Answer` and raises nothing.
An event makes points and has no idempotency key: a failure counts as `retry` only
when the request was certainly not written; in doubt it is `unknown`. One call is one
request at most: a second one would escape the budget that all relays share. Nor does
`Voucherify.look_up`, which asks whether an event of unknown fate has arrived.
"""

import time
from collections.abc import Awaitable, Callable

import httpx

from relay import activity
from relay.cluster import EVENT_PATHS, Api, Keys, cluster_url, event_headers
from relay.grants import Grant
from relay.oauth import OAuth, Token, TokenStore
from relay.replies import Lost
from relay.transport import Transport
from relay.verdicts import Answer, Verdict, read_answer


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
        # As httpx keeps them, and not encoded anew for each event.
        self._headers = httpx.Headers(event_headers(api, origin, keys))
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
        headers = httpx.Headers(headers)
        del headers["Content-Type"]
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

    def _signed(self, token: Token | None) -> tuple[httpx.Headers, list[str]]:
        """The headers with the credentials, and what nobody may be told of them."""
        if token is None:
            return self._headers, self._secrets
        bearer = token.value.get_secret_value()
        signed = httpx.Headers(self._headers)
        signed["Authorization"] = f"Bearer {bearer}"
        return signed, [*self._secrets, bearer]
