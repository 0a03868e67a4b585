"""One token for all relays: with real Redis servers, and the sandbox that issues it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
import redis.asyncio
from msgspec import structs
from pydantic import SecretStr
from structlog.testing import capture_logs

from relay import oauth
from relay.grants import Grant
from relay.oauth import OAuth, Token
from relay.outcomes import Hold
from relay.queue import Queue
from relay.sandbox import (
    SERVER_APP_ID,
    SERVER_APP_TOKEN,
    Fault,
    Sandbox,
    SandboxConfig,
    serve_sandbox,
)
from relay.transport import Transport
from relay.verdicts import Answer, Verdict
from tests.servers import start_server
from tests.support import eventually

pytestmark = pytest.mark.anyio

GRANT = Grant(
    version=1,
    app_id=SERVER_APP_ID,
    secret=SecretStr(SERVER_APP_TOKEN),
    scope="client_events",
)
REFUSED = Answer(
    verdict=Verdict.HOLD, hold=Hold.AUTH, reason="unauthorized", status=401
)
LIFE_S = 900.0


@dataclass
class Monotonic:
    """A clock that stands still until a test moves it."""

    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Shop:
    """One cluster and one Redis, and as many relays between them as a test wants."""

    sandbox: Sandbox
    url: str
    redis_url: str
    prefix: str
    clock: Monotonic = field(default_factory=Monotonic)

    @asynccontextmanager
    async def relay(
        self,
        *,
        grant: Grant = GRANT,
        timeout: float = 10.0,
        lock_s: float = oauth.LOCK_S,
    ) -> AsyncIterator[OAuth]:
        queue = Queue(url=self.redis_url, prefix=self.prefix, timeout=5.0)
        transport = Transport(timeout=timeout)
        made = OAuth(
            base_url=self.url,
            grant=grant,
            store=queue,
            transport=transport,
            monotonic=self.clock,
            lock_s=lock_s,
        )
        try:
            yield made
        finally:
            await made.aclose()
            await transport.aclose()
            await queue.aclose()

    @property
    def minted(self) -> int:
        return cast("int", self.sandbox.counts()["tokens_minted"])

    @property
    def asked(self) -> int:
        return len([r for r in self.sandbox.requests if "/oauth/" in r.path])


@pytest.fixture
async def shop(valkey_url: str, prefix: str) -> AsyncIterator[Shop]:
    async with serve_sandbox(SandboxConfig(client_limit=None)) as running:
        yield Shop(running.sandbox, running.url, valkey_url, prefix)
        running.sandbox.assert_clean()


async def have(relay: OAuth) -> Token:
    """The token, as an event gets it that comes again when it is told to."""
    for _ in range(3):
        found = await relay.token()
        if isinstance(found, Token):
            return found
        assert found.verdict is Verdict.RENEWED
    raise AssertionError(found)


async def failing(relay: OAuth) -> Answer:
    found = await relay.token()
    assert isinstance(found, Answer)
    return found


async def renewed(relay: OAuth, old: Token) -> Token:
    """What follows `old`, which everyone goes on with until then."""

    async def new() -> bool:
        return (await have(relay)).generation > old.generation

    await eventually(new)
    return await have(relay)


# Shared by all


async def test_two_hundred_events_of_four_relays_make_one_token(
    redis_url: str, prefix: str
) -> None:
    async with serve_sandbox(SandboxConfig(latency=0.1)) as running:
        shop = Shop(running.sandbox, running.url, redis_url, prefix)
        async with (
            shop.relay() as one,
            shop.relay() as two,
            shop.relay() as three,
            shop.relay() as four,
        ):
            relays = [one, two, three, four] * 50
            found = await asyncio.gather(*(relay.token() for relay in relays))
            tokens = await asyncio.gather(*(have(relay) for relay in relays))
        # Who had to wait must pass the budget again.
        assert {f.verdict for f in found if isinstance(f, Answer)} == {Verdict.RENEWED}
        assert len({token.value.get_secret_value() for token in tokens}) == 1
        assert (shop.asked, shop.minted) == (1, 1)
        running.sandbox.assert_clean()


async def test_a_relay_that_starts_later_takes_what_is_there(shop: Shop) -> None:
    async with shop.relay() as first:
        token = await have(first)
    async with shop.relay() as second:
        taken = await have(second)
    assert (taken.value, taken.generation) == (token.value, token.generation)
    assert shop.minted == 1


async def test_how_old_a_token_is_goes_by_the_clock_of_redis(
    shop: Shop, valkey_url: str
) -> None:
    async with shop.relay() as first:
        await have(first)
    client = redis.asyncio.Redis.from_url(valkey_url)
    [key] = await client.keys(f"{{{shop.prefix}}}:oauth:*")
    assert LIFE_S - 10 < await client.pttl(key) / 1000 <= LIFE_S
    await client.pexpire(key, 200_000)
    shop.clock.now += 5_000_000  # of a process that knows nothing of the first one's
    async with shop.relay() as second:
        token = await have(second)
        assert token.dies_at - shop.clock.now == pytest.approx(200, abs=5)
        assert token.renew_at - shop.clock.now == pytest.approx(20, abs=5)
    await client.aclose()


@pytest.mark.parametrize(
    "change",
    [
        {"scope": "client_api"},
        {"app_id": "another"},
        {"version": 2, "project_id": "proj_1"},
        {"version": 2, "project_id": "proj_2"},
    ],
)
async def test_another_grant_has_a_token_of_its_own(
    shop: Shop, change: dict[str, object]
) -> None:
    other = replace(GRANT, **change)  # type: ignore[arg-type]  # its own keywords
    async with shop.relay() as one, shop.relay(grant=other) as two:
        assert one._name != two._name
        assert {len(one._name), len(two._name)} == {32}


async def test_who_waited_for_a_token_passes_the_budget_again(shop: Shop) -> None:
    shop.sandbox.fail_next(on="oauth", delay=0.2)
    async with shop.relay() as relay:
        assert await failing(relay) == Answer(
            verdict=Verdict.RENEWED, reason="oauth_renewed"
        )
        assert isinstance(await relay.token(), Token)


async def test_who_waits_too_long_goes_back_and_the_renewal_goes_on(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shorter than a drain, and than the lease of a probe.
    assert oauth.WAIT_S < 10
    monkeypatch.setattr(oauth, "WAIT_S", 0.1)
    shop.sandbox.fail_next(on="oauth", delay=0.5)
    async with shop.relay() as relay:
        assert await failing(relay) == Answer(
            verdict=Verdict.RENEWED, reason="oauth_busy"
        )

        async def there() -> bool:
            return isinstance(await relay.token(), Token)

        await eventually(there)
    assert shop.asked == 1


async def test_one_who_gives_up_waiting_ends_nothing_for_the_others(shop: Shop) -> None:
    shop.sandbox.fail_next(on="oauth", delay=0.3)
    async with shop.relay() as relay:
        impatient = asyncio.create_task(relay.token())
        patient = asyncio.create_task(relay.token())
        await eventually(lambda: _true(shop.asked))
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        answer = await patient
        assert isinstance(answer, Answer)
        assert answer.reason == "oauth_renewed"
    assert shop.asked == 1


async def _true(value: object) -> object:
    return value


# Renewed at 80 % of its life


async def test_a_token_is_renewed_at_80_percent_and_nobody_waits(shop: Shop) -> None:
    async with shop.relay() as relay:
        old = await have(relay)
        shop.clock.now += 0.8 * LIFE_S - 1
        assert await relay.token() == old
        assert shop.asked == 1
        shop.sandbox.fail_next(on="oauth", delay=0.3)
        shop.clock.now += 1
        found = await asyncio.gather(*(relay.token() for _ in range(50)))
        assert found == [old] * 50
        await eventually(lambda: _true(shop.asked == 2))
        assert await relay.token() == old  # while it is being renewed
        new = await renewed(relay, old)
        assert new.value != old.value
        assert new.dies_at == shop.clock.now + LIFE_S
        assert (shop.asked, shop.minted) == (2, 2)


async def test_who_comes_to_80_percent_looks_first_what_others_did(shop: Shop) -> None:
    async with shop.relay() as first, shop.relay() as second:
        old = await have(first)
        assert (await have(second)).generation == old.generation
        shop.clock.now += 0.8 * LIFE_S
        new = await renewed(first, old)
        # The first use finds out, the next one has it.
        assert (await renewed(second, old)).generation == new.generation
    assert shop.minted == 2


async def test_a_renewal_that_fails_leaves_the_old_token_in_use(shop: Shop) -> None:
    async with shop.relay() as relay:
        old = await have(relay)
        shop.sandbox.fail_next(None, on="oauth", status=500)
        shop.clock.now += 0.8 * LIFE_S
        for tries in range(2, 5):
            for _ in range(20):
                assert await relay.token() == old
                await asyncio.sleep(0)
            await eventually(lambda tries=tries: _true(shop.asked == tries))  # type: ignore[misc]  # mypy does not infer a lambda with a default
            await eventually(lambda: _true(relay._renewing is None))
            assert await relay.token() == old
            shop.clock.now += oauth.AWAY_S
        shop.sandbox.clear_faults()
        assert (await renewed(relay, old)).value != old.value


async def test_a_renewal_waits_as_long_as_it_is_told(shop: Shop) -> None:
    shop.sandbox.expect("429")
    async with shop.relay() as relay:
        old = await have(relay)
        shop.sandbox.fail_next(on="oauth", status=429, headers={"Retry-After": "30"})
        shop.clock.now += 0.8 * LIFE_S
        await relay.token()
        await eventually(lambda: _true(shop.asked == 2 and relay._renewing is None))
        shop.clock.now += 29
        assert await relay.token() == old
        assert relay._renewing is None
        shop.clock.now += 1
        await renewed(relay, old)
    assert shop.asked == 3


async def test_a_dead_token_is_not_sent(shop: Shop) -> None:
    async with shop.relay() as relay:
        old = await have(relay)
        shop.clock.now += LIFE_S
        assert (await have(relay)).value != old.value
    assert shop.minted == 2


# The token endpoint fails

FAILURES: list[tuple[str, dict[str, object], Verdict, Hold | None, str]] = [
    ("400", {"status": 400}, Verdict.HOLD, Hold.AUTH, "oauth_refused"),
    ("401", {"status": 401}, Verdict.HOLD, Hold.AUTH, "oauth_refused"),
    ("403", {"status": 403}, Verdict.HOLD, Hold.AUTH, "oauth_refused"),
    ("404", {"status": 404}, Verdict.HOLD, Hold.CONFIG, "oauth_refused"),
    ("429", {"status": 429}, Verdict.WAIT, None, "oauth_limited"),
    ("500", {"status": 500}, Verdict.RETRY, None, "oauth_unavailable"),
    ("502", {"malformed": "html_502"}, Verdict.RETRY, None, "oauth_unavailable"),
    ("503", {"status": 503}, Verdict.RETRY, None, "oauth_unavailable"),
    ("reset", {"disconnect": "reset"}, Verdict.RETRY, None, "oauth_unavailable"),
    ("cut", {"disconnect": "cut_short"}, Verdict.RETRY, None, "oauth_unavailable"),
    ("slow", {"delay": 2.0}, Verdict.RETRY, None, "oauth_unavailable"),
    ("text", {"malformed": "text_200"}, Verdict.HOLD, Hold.CONFIG, "oauth_garbled"),
    ("empty", {"malformed": "empty_200"}, Verdict.HOLD, Hold.CONFIG, "oauth_garbled"),
    (
        "half",
        {"malformed": "truncated_json"},
        Verdict.HOLD,
        Hold.CONFIG,
        "oauth_garbled",
    ),
    ("list", {"malformed": "wrong_shape"}, Verdict.HOLD, Hold.CONFIG, "oauth_garbled"),
]


@pytest.mark.parametrize(
    ("fault", "verdict", "hold", "reason"),
    [row[1:] for row in FAILURES],
    ids=[row[0] for row in FAILURES],
)
async def test_a_failure_is_shared_by_all_who_wait_and_remembered_for_a_while(
    shop: Shop,
    fault: dict[str, object],
    verdict: Verdict,
    hold: Hold | None,
    reason: str,
) -> None:
    shop.sandbox.expect("429")
    shop.sandbox.fail_next(None, on="oauth", **fault)  # type: ignore[arg-type]  # the fault's own keywords
    async with shop.relay(timeout=0.3 if "delay" in fault else 10.0) as relay:
        answers = await asyncio.gather(*(failing(relay) for _ in range(32)))
        assert {(a.verdict, a.hold, a.reason) for a in answers} == {
            (verdict, hold, reason)
        }
        assert await failing(relay) == answers[0]
        assert shop.asked == 1
        quiet_s = oauth.REFUSED_S if hold else oauth.AWAY_S
        shop.clock.now += quiet_s - 0.1
        assert await failing(relay) == answers[0]
        assert shop.asked == 1
        shop.sandbox.clear_faults()
        shop.clock.now += 0.1
        await have(relay)
        assert shop.asked == 2


async def test_a_token_endpoint_that_is_not_there_is_a_failure(shop: Shop) -> None:
    shop.url = "http://127.0.0.1:9"  # discard: nothing listens
    async with shop.relay() as relay:
        assert await failing(relay) == Answer(
            verdict=Verdict.RETRY, reason="oauth_unavailable"
        )


async def test_wrong_credentials_are_told_in_voucherifys_words(shop: Shop) -> None:
    shop.sandbox.expect("keys", "oauth")
    wrong = replace(GRANT, secret=SecretStr("wrong-secret"))
    async with shop.relay(grant=wrong) as relay:
        answer = await failing(relay)
        assert (answer.verdict, answer.hold) == (Verdict.HOLD, Hold.AUTH)
        assert (answer.reason, answer.error_key) == ("oauth_refused", "unauthorized")
    async with shop.relay(grant=replace(GRANT, scope="no_such")) as relay:
        answer = await failing(relay)
        assert (answer.reason, answer.error_key) == ("oauth_refused", "invalid_scope")
        assert answer.error_message == "Invalid scope: no_such"


# Refused by the events route


async def test_a_token_that_worked_is_replaced_once_for_all_who_met_the_401(
    shop: Shop,
) -> None:
    async with shop.relay() as relay:
        old = await have(relay)
        relay.worked(old)
        answers = await asyncio.gather(
            *(relay.refused(old, REFUSED) for _ in range(32))
        )
        assert {(a.verdict, a.hold, a.reason) for a in answers} == {
            (Verdict.RENEWED, None, "oauth_renewed")
        }
        assert (await have(relay)).value != old.value
        # Late, from before.
        late = await relay.refused(old, REFUSED)
        assert late.verdict is Verdict.RENEWED
    assert shop.minted == 2


async def test_what_a_401_tells_of_limits_is_passed_on(shop: Shop) -> None:
    async with shop.relay() as relay:
        old = await have(relay)
        relay.worked(old)
        told = structs.replace(REFUSED, remaining=0, retry_after_ms=700)
        answer = await relay.refused(old, told)
        assert (answer.remaining, answer.retry_after_ms) == (0, 700)


async def test_a_fresh_token_that_is_refused_at_once_means_the_credentials(
    shop: Shop,
) -> None:
    async with shop.relay() as relay:
        token = await have(relay)
        assert await relay.refused(token, REFUSED) == REFUSED
        shop.clock.now += oauth.TRUSTED_S
        assert await relay.refused(token, REFUSED) == REFUSED
        assert shop.minted == 1
        shop.clock.now += 1
        answer = await relay.refused(token, REFUSED)
        assert answer.verdict is Verdict.RENEWED
    assert shop.minted == 2


async def test_what_worked_for_one_relay_is_known_to_all(
    shop: Shop, valkey_url: str
) -> None:
    queue = Queue(url=valkey_url, prefix=shop.prefix)
    async with shop.relay() as first, shop.relay() as second:
        old = await have(first)
        same = await have(second)
        first.worked(old)

        async def known() -> bool:
            return "worked" in (await queue.token(first._name, who="looks"))[0]

        await eventually(known)
        answer = await second.refused(same, REFUSED)
        assert answer.verdict is Verdict.RENEWED
        # What worked before says nothing of the new one.
        new = await have(second)
        await queue.token_worked(first._name, who="late", generation=old.generation)
        assert await second.refused(new, REFUSED) == REFUSED
    await queue.aclose()
    assert shop.minted == 2


async def test_a_replacement_is_not_replaced_within_a_minute(shop: Shop) -> None:
    async with shop.relay() as relay:
        first = await have(relay)
        relay.worked(first)
        await relay.refused(first, REFUSED)
        second = await have(relay)
        relay.worked(second)
        assert await relay.refused(second, REFUSED) == REFUSED
    assert shop.minted == 2


async def test_a_token_that_another_relay_has_replaced_is_fetched(shop: Shop) -> None:
    async with shop.relay() as first, shop.relay() as second:
        old = await have(first)
        same = await have(second)
        first.worked(old)
        await first.refused(old, REFUSED)
        answer = await second.refused(same, REFUSED)
        assert answer.verdict is Verdict.RENEWED
        assert (await have(second)).value == (await have(first)).value != old.value
    assert shop.minted == 2


@pytest.mark.parametrize("flapping", [False, True], ids=["always", "now-and-then"])
async def test_a_cluster_that_refuses_tokens_gets_one_a_minute_at_most(
    shop: Shop, flapping: bool
) -> None:
    minutes = 20
    async with shop.relay() as first, shop.relay() as second:
        for relay in (first, second):
            relay.worked(await have(relay))
        for _ in range(minutes * 12):
            for relay in (first, second, first, second):
                token = await have(relay)
                if flapping:
                    relay.worked(token)
                await relay.refused(token, REFUSED)
            shop.clock.now += 5
    assert minutes / 2 < shop.minted <= minutes + 2


# The lock


async def test_a_relay_that_was_killed_while_it_renewed_holds_up_nobody_for_long(
    shop: Shop, valkey_url: str
) -> None:
    assert oauth.LOCK_S > 10  # the most that a request takes
    killed = Queue(url=valkey_url, prefix=shop.prefix)
    async with shop.relay() as relay:
        _, _, ours = await killed.token(relay._name, who="killed", lock_ms=600)
        assert ours
        asked_at = asyncio.get_running_loop().time()
        await have(relay)
        assert asyncio.get_running_loop().time() - asked_at > 0.5
    await killed.aclose()
    assert shop.minted == 1


async def test_the_lock_is_free_after_success_after_failure_and_after_a_stop(
    shop: Shop, valkey_url: str
) -> None:
    queue = Queue(url=valkey_url, prefix=shop.prefix)

    async def free(name: str) -> bool:
        _, _, ours = await queue.token(name, who="looks", lock_ms=1_000)
        await queue.unlock_token(name, who="looks")
        return ours

    async with shop.relay() as relay:
        shop.sandbox.fail_next(on="oauth", status=500)
        await failing(relay)
        assert await free(relay._name)
        shop.clock.now += oauth.AWAY_S
        await have(relay)
        assert await free(relay._name)
        shop.clock.now += LIFE_S
        shop.sandbox.fail_next(on="oauth", delay=30)
        waiting = asyncio.create_task(relay.token())
        await eventually(lambda: _true(shop.asked == 3))
        assert not await free(relay._name)
        await relay.aclose()
        answer = await waiting  # not sent: it comes again
        assert isinstance(answer, Answer)
        assert (answer.verdict, answer.reason) == (Verdict.RENEWED, "oauth_busy")
        assert await free(relay._name)
    await queue.aclose()


async def test_who_lost_the_lock_overwrites_no_newer_token(
    redis_url: str, prefix: str
) -> None:
    queue = Queue(url=redis_url, prefix=prefix)

    async def keep(who: str, value: str, replaces: int = 0) -> int:
        return await queue.keep_token(
            "n", {"value": value}, who=who, replaces=replaces, life_ms=60_000
        )

    assert (await queue.token("n", who="slow", lock_ms=1)) == ({}, -2, True)

    async def taken() -> bool:
        return (await queue.token("n", who="quick", lock_ms=60_000))[2]

    await eventually(taken)
    first = await keep("quick", "quick's")
    assert await keep("slow", "slow's") == 0
    await queue.unlock_token("n", who="slow")  # not theirs
    fields, left_ms, ours = await queue.token("n", who="third", lock_ms=60_000)
    assert (fields, ours) == ({"generation": str(first), "value": "quick's"}, False)
    assert 0 < left_ms <= 60_000
    # Asked again, because the first answer was lost: it is still theirs.
    assert (await queue.token("n", who="quick", lock_ms=60_000))[2]
    second = await keep("quick", "quick's second", replaces=first + 10)
    assert second > first + 10
    await queue.unlock_token("n", who="quick")
    assert (await queue.token("n", who="third", lock_ms=60_000))[2]
    await queue.aclose()


async def test_a_token_can_be_renewed_while_redis_is_full(
    shop: Shop, tmp_path: Path
) -> None:
    with start_server(None, tmp_path) as url:
        client = redis.asyncio.Redis.from_url(url)
        await client.config_set("maxmemory", 1)
        shop.redis_url = url
        async with shop.relay() as relay:
            await have(relay)
        await client.aclose()


# Redis away


async def test_a_token_is_used_while_redis_is_away_and_none_is_made(
    shop: Shop, tmp_path: Path
) -> None:
    with start_server(None, tmp_path) as url:
        shop.redis_url = url
        async with shop.relay() as relay:
            old = await have(relay)
            await _shut_down(url)
            found = await asyncio.gather(*(relay.token() for _ in range(100)))
            assert found == [old] * 100
            shop.clock.now += 0.9 * LIFE_S  # it should be renewed, but cannot be
            assert await relay.token() == old
            await eventually(lambda: _true(relay._failure))
            assert await relay.token() == old
            # Without Redis a 401 cannot be put right; the event comes again.
            answer = await relay.refused(old, REFUSED)
            assert answer.verdict is Verdict.RETRY
            shop.clock.now += LIFE_S
            assert await failing(relay) == Answer(
                verdict=Verdict.RETRY, reason="redis_unreachable"
            )
    assert shop.minted == 1


async def test_a_token_that_cannot_be_shared_serves_the_one_who_has_it(
    shop: Shop, tmp_path: Path
) -> None:
    shop.sandbox.fail_next(on="oauth", delay=0.5)
    with start_server(None, tmp_path) as url:
        shop.redis_url = url
        async with shop.relay() as relay:
            waiting = asyncio.create_task(relay.token())
            await eventually(lambda: _true(shop.asked))
            await _shut_down(url)
            await waiting
            await have(relay)
    assert shop.minted == 1


async def _shut_down(url: str) -> None:
    client = redis.asyncio.Redis.from_url(url)
    with suppress(redis.exceptions.ConnectionError):
        await client.shutdown(nosave=True)
    await client.aclose()


# Secrets


async def test_nothing_shows_the_token_or_the_secret(
    shop: Shop, valkey_url: str
) -> None:
    with capture_logs() as logged:
        async with shop.relay() as relay:
            token = await have(relay)
            relay.worked(token)
            answer = await relay.refused(token, REFUSED)
            shop.clock.now += LIFE_S
            quoting = Fault(on="oauth", status=401, text=f"no {SERVER_APP_TOKEN}")
            shop.sandbox.inject(quoting)
            refused = await failing(relay)
            shown = f"{relay!r} {vars(relay)!r} {token!r} {answer!r} {refused!r}"
    assert {line["event"] for line in logged} == {"oauth.renewed", "oauth.not_renewed"}
    for secret in (token.value.get_secret_value(), SERVER_APP_TOKEN):
        assert secret not in f"{shown} {logged}"
    client = redis.asyncio.Redis.from_url(valkey_url)
    keys = repr(await client.keys(f"{{{shop.prefix}}}*"))
    assert SERVER_APP_ID not in keys
    assert SERVER_APP_TOKEN not in keys
    await client.aclose()


async def test_a_fault_of_ours_is_logged_and_stops_no_other_renewal(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop.relay() as relay:
        old = await have(relay)
        with monkeypatch.context() as patched, capture_logs() as logged:
            patched.setattr(oauth, "read_issued", lambda *_, **__: 1 // 0)
            shop.clock.now += 0.8 * LIFE_S
            assert await relay.token() == old
            await eventually(lambda: _true(logged))
            assert [line["event"] for line in logged] == ["oauth.broken"]
            assert await relay.token() == old
            assert relay._renewing is None
        shop.clock.now += oauth.REFUSED_S
        await renewed(relay, old)
