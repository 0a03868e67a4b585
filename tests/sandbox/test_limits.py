"""Limits, exact at their boundaries."""

import asyncio
import random

import pytest

from relay.sandbox import Sandbox, SandboxConfig
from relay.sandbox.limits import Plan, SlidingWindow
from tests.sandbox.support import SERVER, Caller, calling

NOON = 1_800_000_000.0  # a whole minute and a whole hour


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def take(window: SlidingWindow, now: float) -> float:
    return window.take("ip", now, calls=5, seconds=5.0)


def test_the_window_is_open_again_at_exactly_five_seconds() -> None:
    window = SlidingWindow()
    assert [take(window, 0.0) for _ in range(5)] == [0.0] * 5
    assert take(window, 0.0) == 5.0
    assert take(window, 4.75) == 0.25
    assert take(window, 5.0) == 0.0


def test_the_window_slides_rather_than_resets() -> None:
    window = SlidingWindow()
    for at in (0.0, 4.0, 4.0, 4.0, 4.0):
        assert take(window, at) == 0.0
    assert take(window, 5.0) == 0.0  # the one of 0.0 has left
    assert take(window, 5.0) == 4.0  # the four of 4.0 are still there


def test_a_refused_call_spends_nothing() -> None:
    window = SlidingWindow()
    for _ in range(5):
        take(window, 0.0)
    for tenth in range(1, 50):
        assert take(window, tenth / 10) > 0
    assert take(window, 5.0) == 0.0


def test_never_more_than_five_in_any_five_seconds() -> None:
    rng, window, now = random.Random(1), SlidingWindow(), 1000.0
    taken: list[float] = []
    for _ in range(5000):
        now += rng.expovariate(2.0)
        if take(window, now) == 0.0:
            taken.append(now)
    assert all(b - a >= 5.0 for a, b in zip(taken, taken[5:], strict=False))
    assert len(taken) > 0.8 * (now - 1000.0)  # and close to what is allowed


def test_the_wait_it_names_is_the_one_it_keeps() -> None:
    rng, window, now = random.Random(2), SlidingWindow(), 1000.0
    for _ in range(2000):
        now += rng.random() / 3
        if wait := take(window, now):
            assert take(window, now + wait * 0.999) > 0
            now += wait + 1e-9
            assert take(window, now) == 0.0


def test_addresses_have_windows_of_their_own() -> None:
    window = SlidingWindow()
    for address in ("a", "b"):
        for _ in range(5):
            assert window.take(address, 0.0, calls=5, seconds=5.0) == 0.0
        assert window.take(address, 0.0, calls=5, seconds=5.0) > 0


def test_the_plan_starts_afresh_with_the_minute() -> None:
    plan, config = Plan(cycle_start=NOON), SandboxConfig(per_minute=2)
    answers = [plan.take(NOON + second, config) for second in (58, 59, 59.9, 60)]
    assert [a is not None and a.refused for a in answers] == [False, False, True, False]
    third = answers[2]
    assert third is not None
    assert dict(third.headers(NOON + 59.9)) == {
        "X-Rate-Limit-Limit": "2",
        "X-Rate-Limit-Remaining": "0",
        "X-Rate-Limit-Retry": str(int(NOON) + 60),
        "Retry-After": "1",
        "X-Rate-Limit-Type": "api_calls",
    }


def test_a_call_is_charged_to_every_period_or_to_none() -> None:
    plan = Plan(cycle_start=NOON)
    config = SandboxConfig(per_minute=1, per_hour=3, per_cycle=100)
    refused = []
    for minute in range(4):
        for _ in range(3):
            state = plan.take(NOON + 60 * minute, config)
            assert state is not None
            refused.append(state.refused)
    # One a minute: refused ones did not spend the hour, so its three last 3 minutes.
    assert refused == [False, True, True] * 3 + [True, True, True]


def test_the_period_that_lasts_longest_is_named() -> None:
    plan = Plan(cycle_start=NOON)
    config = SandboxConfig(per_minute=1, per_cycle=1, cycle_seconds=86400)
    plan.take(NOON, config)
    state = plan.take(NOON, config)
    assert state is not None
    assert (state.type, state.resets_at) == ("api_calls_cycle", NOON + 86400)


def test_the_headers_show_the_tightest_period() -> None:
    plan = Plan(cycle_start=NOON)
    state = plan.take(NOON, SandboxConfig(per_minute=100, per_hour=10))
    assert state is not None
    assert dict(state.headers(NOON)) == {
        "X-Rate-Limit-Limit": "10",
        "X-Rate-Limit-Remaining": "9",
        "X-Rate-Limit-Retry": str(int(NOON)),
    }


@pytest.mark.anyio
async def test_a_limit_is_open_again_when_the_answer_said() -> None:
    monotonic, wall = Clock(100.0), Clock(NOON)
    sandbox = Sandbox(monotonic=monotonic, wall=wall)
    async with calling(sandbox=sandbox) as caller:
        for _ in range(5):
            assert (await caller.send()).status_code == 200
        monotonic.now += 1.5
        refused = await caller.send()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "4"
        assert refused.headers["x-rate-limit-retry"] == str(int(NOON) + 4)
        assert "x-rate-limit-type" not in refused.headers
        monotonic.now = 104.999
        assert (await caller.send()).status_code == 429
        monotonic.now = 105.0
        assert (await caller.send()).status_code == 200


@pytest.mark.anyio
async def test_calls_at_once_get_exactly_what_the_limit_allows(caller: Caller) -> None:
    answers = await asyncio.gather(*(caller.send() for _ in range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 45
    assert len(caller.sandbox.events) == 5


@pytest.mark.anyio
async def test_the_limit_per_address_can_come_without_headers(caller: Caller) -> None:
    caller.sandbox.configure(client_limit=1, client_limit_headers=False)
    await caller.send()
    refused = await caller.send()
    assert refused.status_code == 429
    assert not [name for name in refused.headers if "retry" in name or "rate" in name]


@pytest.mark.anyio
async def test_the_limit_per_address_can_be_changed_and_turned_off(
    caller: Caller,
) -> None:
    caller.sandbox.configure(client_limit=2, client_limit_seconds=60.0)
    assert [(await caller.send()).status_code for _ in range(3)] == [200, 200, 429]
    caller.sandbox.configure(client_limit=None)
    assert [(await caller.send()).status_code for _ in range(20)] == [200] * 20


@pytest.mark.anyio
async def test_a_forwarded_address_is_not_believed(caller: Caller) -> None:
    statuses = [
        (await caller.send(headers={"x-forwarded-for": f"203.0.113.{n}"})).status_code
        for n in range(6)
    ]
    assert statuses == [200] * 5 + [429]


@pytest.mark.anyio
async def test_the_plan_covers_both_apis_and_shows_on_every_answer(
    caller: Caller,
) -> None:
    caller.sandbox.configure(per_hour=3)
    seen = [
        await caller.send(),
        await caller.send({"event": "e"}),  # a refusal that is no 429 spends a call
        await caller.send(path=SERVER),
        await caller.send(path=SERVER),
    ]
    assert [answer.status_code for answer in seen] == [200, 400, 200, 429]
    remaining = [answer.headers["x-rate-limit-remaining"] for answer in seen]
    assert remaining == ["2", "1", "0", "0"]
    assert seen[3].headers["x-rate-limit-type"] == "api_calls"
    assert seen[3].content == (
        b'{"code":429,"message":"Too many requests hit the API too quickly."}'
    )


@pytest.mark.anyio
async def test_the_cycle_is_named_when_it_is_spent(caller: Caller) -> None:
    caller.sandbox.configure(per_cycle=1)
    await caller.send()
    refused = await caller.send()
    assert refused.headers["x-rate-limit-type"] == "api_calls_cycle"
    assert int(refused.headers["retry-after"]) > 29 * 86400


@pytest.mark.anyio
async def test_wrong_keys_spend_no_quota_of_the_plan(caller: Caller) -> None:
    caller.sandbox.configure(per_hour=1)
    await caller.send(path=SERVER, headers={"x-app-token": "nope"})
    assert (await caller.send(path=SERVER)).status_code == 200
