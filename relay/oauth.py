"""One access token for all relays of a shop, renewed by one of them at a time.

It is renewed at 80 % of its life, while everyone goes on with the old one, and once
when it is refused. Voucherify allows 1,000 live tokens a project ("Authentication"
guide): whatever happens there is no token for each event, and after a 401 at most one
a minute.

No event is sent late: it was charged to the shared budget when it was claimed, so one
that had to wait for a token passes the budget again (`Verdict.RENEWED`). Redis holds
the token as it is, for as long as it lives; no log, answer or repr shows it.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import httpx
import structlog
from msgspec.structs import replace
from pydantic import SecretStr

from relay.errors import QueueUnavailable
from relay.grants import UNAVAILABLE, Grant, read_issued
from relay.transport import Transport
from relay.verdicts import Answer, Verdict

RENEW_AT = 0.8
LOCK_S = 15.0  # longer than a request takes; frees what a killed relay has locked
POLL_S = 0.05  # while another relay renews
# Shorter than a drain and than the lease of a probe (tick.lua), so neither ends first.
WAIT_S = 5.0
LATE_S = 0.02  # a look into Redis; tick.lua adds 0.1 s to every window of the budget
# A token that is refused at once means the credentials; after this it may be the token.
TRUSTED_S = 60.0
# After a failure nobody here asks again for so long, or longer if told to, but not for
# ever: who holds the credentials may have put them right.
REFUSED_S, AWAY_S, QUIET_MAX_S = 5.0, 2.0, 60.0

log = structlog.get_logger()


class TokenStore(Protocol):
    """What `Queue` does for tokens. A protocol, so that who speaks to Voucherify knows
    nothing of Redis, and the two modules stay side by side."""

    async def token(
        self, name: str, *, who: str, lock_ms: int = 0
    ) -> tuple[dict[str, str], int, bool]: ...

    async def keep_token(
        self,
        name: str,
        fields: Mapping[str, str],
        *,
        who: str,
        replaces: int,
        life_ms: int,
    ) -> int: ...

    async def token_worked(self, name: str, *, who: str, generation: int) -> None: ...

    async def unlock_token(self, name: str, *, who: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token as one process knows it; times are of that process's monotonic clock."""

    value: SecretStr
    generation: int  # grows with each token, over all relays
    replacement: bool  # made because the one before it was refused
    born_at: float
    renew_at: float
    dies_at: float


_RENEWED = Answer(verdict=Verdict.RENEWED, reason="oauth_renewed")
_BUSY = Answer(verdict=Verdict.RENEWED, reason="oauth_busy")


class OAuth:
    """This process's share of the token. Safe to share within one event loop."""

    def __init__(
        self,
        *,
        base_url: str,
        grant: Grant,
        store: TokenStore,
        transport: Transport,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        lock_s: float = LOCK_S,
    ) -> None:
        self._url = httpx.URL(base_url + grant.path)
        self._grant = grant
        self._store = store
        self._transport = transport
        self._wall = wall
        self._clock = monotonic
        self._lock_s = lock_s
        self._name = _name(base_url, grant)
        self._who = secrets.token_hex(8)
        self._token: Token | None = None
        self._worked = 0  # the newest generation that an event got through with
        self._renewing: asyncio.Task[Token | Answer | None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._failure: Answer | None = None  # of the last renewal
        self._quiet_until = float("-inf")  # after it

    async def token(self) -> Token | Answer:
        """A token to send with at once, or what becomes of an event without one."""
        token, now = self._token, self._clock()
        if token is not None and now < token.dies_at:
            if now >= token.renew_at and now >= self._quiet_until:
                self._renew(token, refused=False)  # meanwhile everyone uses this one
            return token
        began = asyncio.get_running_loop().time()
        found = await self._next(token, refused=False)
        if not isinstance(found, Token):
            return found or _BUSY
        late = asyncio.get_running_loop().time() - began > LATE_S
        return _RENEWED if late else found

    async def refused(self, token: Token, answer: Answer) -> Answer:
        """What becomes of an event whose token got `answer`, a 401."""
        if self._token is None or self._token.generation <= token.generation:
            found = await self._next(token, refused=True)
            if not isinstance(found, Token):
                return found or answer
        # What the answer tells of limits stays: it was a call like any other.
        return replace(
            answer, verdict=Verdict.RENEWED, hold=None, reason="oauth_renewed"
        )

    def worked(self, token: Token) -> None:
        """Note, once for each token, that Voucherify took an event with it."""
        if token.generation > self._worked:
            self._worked = token.generation
            # Beside: the event is delivered, and nothing may hold up its settling.
            self._telling = asyncio.create_task(self._tell(token.generation))

    async def _tell(self, generation: int) -> None:
        with suppress(QueueUnavailable):  # then only this process knows
            await self._store.token_worked(
                self._name, who=self._who, generation=generation
            )

    async def aclose(self) -> None:
        """Stop what goes on beside the events; the transport is its owner's."""
        tasks = {task for task in (self._renewing, self._telling) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- within this process: one renewal at a time -----------------------------------

    async def _next(self, old: Token | None, *, refused: bool) -> Token | Answer | None:
        """Wait for a newer token; None: the old one may not be replaced."""
        if (
            self._renewing is None
            and self._failure
            and self._clock() < self._quiet_until
        ):
            return self._failure
        task = self._renew(old, refused=refused)
        # Shared by everyone who waits: who gives up must not end it.
        done, _ = await asyncio.wait({task}, timeout=WAIT_S)
        return task.result() if done and not task.cancelled() else _BUSY

    def _renew(
        self, old: Token | None, *, refused: bool
    ) -> asyncio.Task[Token | Answer | None]:
        if self._renewing is None:
            renewal = self._renewal(old, refused=refused)
            self._renewing = asyncio.create_task(renewal)
            self._renewing.add_done_callback(self._renewed)
        return self._renewing

    def _renewed(self, task: asyncio.Task[Token | Answer | None]) -> None:
        self._renewing = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:  # our bug; who waits sees it too
            log.error("oauth.broken", exc_info=error)
            self._failure, self._quiet_until = None, self._clock() + REFUSED_S

    async def _renewal(
        self, old: Token | None, *, refused: bool
    ) -> Token | Answer | None:
        try:
            found = await self._obtain(old, refused=refused)
        except QueueUnavailable as error:
            found = Answer(verdict=Verdict.RETRY, reason=error.reason)
        if isinstance(found, Token):
            self._token, self._failure = found, None
            self._quiet_until = float("-inf")
        elif found is not None:
            log.warning("oauth.not_renewed", reason=found.reason, status=found.status)
            self._failure, self._quiet_until = found, self._clock() + _quiet_s(found)
        return found

    # --- among all relays: one renewal at a time --------------------------------------

    async def _obtain(
        self, old: Token | None, *, refused: bool
    ) -> Token | Answer | None:
        kept, _ = await self._look()
        if kept is not None and _newer(kept, old):
            return kept
        if refused and old is not None and not self._replaceable(old):
            return None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._lock_s + WAIT_S
        while loop.time() < deadline:
            kept, ours = await self._look(lock_s=self._lock_s)
            try:
                if kept is not None and _newer(kept, old):
                    return kept
                if ours:
                    known = max(t.generation if t else 0 for t in (kept, old))
                    if made := await self._mint(known, replacement=refused):
                        return made
            finally:
                if ours:
                    with suppress(QueueUnavailable):  # then it ends by itself
                        await self._store.unlock_token(self._name, who=self._who)
            await asyncio.sleep(POLL_S)
        return UNAVAILABLE

    def _replaceable(self, token: Token) -> bool:
        """Whether a 401 is the token's fault. A cluster that refuses them all, or now
        and then, is no reason to make one after the other."""
        if self._clock() - token.born_at > TRUSTED_S:
            return True
        return token.generation == self._worked and not token.replacement

    async def _look(self, *, lock_s: float = 0.0) -> tuple[Token | None, bool]:
        """What Redis keeps, by its own clock, and whether the lock is ours."""
        asked_at = self._clock()
        fields, left_ms, ours = await self._store.token(
            self._name, who=self._who, lock_ms=int(lock_s * 1000)
        )
        if left_ms <= 0:
            return None, ours
        life_s = int(fields["life_ms"]) / 1000
        generation = int(fields["generation"])
        if "worked" in fields:
            self._worked = max(self._worked, generation)
        kept = _token(
            fields["value"],
            generation=generation,
            replacement=fields["replacement"] == "1",
            born_at=asked_at + left_ms / 1000 - life_s,
            life_s=life_s,
        )
        return kept, ours

    async def _mint(self, known: int, *, replacement: bool) -> Token | Answer | None:
        """Ask Voucherify for a token and share it; None: another relay was faster."""
        asked_at, grant = self._clock(), self._grant
        said = await self._transport.request(
            "POST", self._url, grant.headers, grant.form
        )
        issued = read_issued(said, grant, now=self._wall())
        if isinstance(issued, Answer):
            return issued
        life_ms = int(issued.expires_in * 1000)
        spent_ms = int((self._clock() - asked_at) * 1000)
        fields = {
            "value": issued.access_token,
            "life_ms": str(life_ms),
            "replacement": "1" if replacement else "0",
        }
        try:
            generation = await self._store.keep_token(
                self._name,
                fields,
                who=self._who,
                replaces=known,
                life_ms=max(1, life_ms - spent_ms),
            )
        except QueueUnavailable as error:
            # Redis went away meanwhile: it serves this process alone, until its time.
            log.warning("oauth.not_shared", reason=error.reason)
            generation = known + 1
        if not generation:
            return None
        log.info("oauth.renewed", life_s=life_ms // 1000)
        return _token(
            issued.access_token,
            generation=generation,
            replacement=replacement,
            born_at=asked_at,
            life_s=life_ms / 1000,
        )


def _token(
    value: str, *, generation: int, replacement: bool, born_at: float, life_s: float
) -> Token:
    return Token(
        value=SecretStr(value),
        generation=generation,
        replacement=replacement,
        born_at=born_at,
        renew_at=born_at + RENEW_AT * life_s,
        dies_at=born_at + life_s,
    )


def _quiet_s(failure: Answer) -> float:
    least = REFUSED_S if failure.verdict is Verdict.HOLD else AWAY_S
    return max(least, min((failure.retry_after_ms or 0) / 1000, QUIET_MAX_S))


def _newer(kept: Token, old: Token | None) -> bool:
    # The value too: the answer that told us the generation of ours may have been lost.
    return old is None or (kept.generation > old.generation and kept.value != old.value)


def _name(base_url: str, grant: Grant) -> str:
    """The same for all relays that ask for the same token, and nothing but a digest."""
    parts = (
        base_url,
        str(grant.version),
        grant.app_id,
        grant.project_id,
        grant.scope,
    )
    return sha256("\0".join(parts).encode()).hexdigest()[:32]
