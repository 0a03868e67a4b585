"""Play one scenario from its first event to its last outcome."""

import random
from bisect import bisect_right
from collections.abc import Callable
from typing import cast

import msgspec
from redis.asyncio import Redis

from relay.forecast import LANES
from relay.limits import Window, parse_budget
from relay.outcomes import Outcome
from relay.queue import Queue
from relay.sandbox.config import SandboxConfig
from simulation.clock import START_MS, Clock, SimulatedScripts
from simulation.forwarders import Forwarder, Watch
from simulation.link import Link
from simulation.referee import Finding, Left, Referee
from simulation.scenarios import Scenario
from simulation.shop import Shop, arrivals
from simulation.timeline import Action, Timeline
from simulation.voucherify import Voucherify

EGRESS, RESERVE = "all", 0.2
RESTART_MS = 5_000
CHECKOUT_STEP_MS = 1_000
HOUSE_MS = 60_000  # between two looks of the housekeeping, at the least
LEAST_ETA_S, LEAST_WAITING = 600, 50
HIGH_LANE_LOST = 0.01  # of its value, while lower lanes have some to give
CHECKOUT_LOST = 0.01  # of its calls, for want of some

STREAMS = (
    "high",
    "normal",
    "low",
    "retry",
    "high:behind",
    "normal:behind",
    "low:behind",
)

# Ids in every place where an event can wait; Redis' own reader of what its scripts
# packed, but nothing of the scripts.
_LEFT = """
local ids = {}
local function add(packed)
  local event = cmsgpack.unpack(packed)
  if #event == 9 then  -- it has the place of whichever came last
    local kept = redis.call('HMGET', ARGV[1] .. event[3] .. ':' .. event[8], 'id', 'e')
    if kept[1] == event[1] and kept[2] then event = cmsgpack.unpack(kept[2]) end
  end
  ids[#ids + 1] = event[1]
end
for i = 2, #KEYS do
  for _, item in ipairs(redis.call('XRANGE', KEYS[i], '-', '+')) do
    for f = 1, #item[2], 2 do
      if item[2][f] == 'e' then add(item[2][f + 1]) end
    end
  end
end
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  add(cmsgpack.unpack(member)[1])
end
return ids
"""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the picture."""

    at_ms: int
    waiting: int
    used: float  # share of the budget since the last point
    hold: str


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """What a scenario came to."""

    name: str
    title: str
    seed: int
    lasted_ms: int
    sent: int  # by pages, repeats included
    accepted: int
    refused: dict[str, int]  # at admission
    calls: int
    turned_away: int  # 429
    outcomes: dict[str, int]
    waiting: int
    in_time: dict[str, float | None]  # share of value by lane, `all` for all
    duplicates: dict[str, int]  # by delivery rule
    emptied_ms: int | None  # after the trouble was over; None: not within the time
    checkout_calls: int
    checkout_refused: int
    findings: list[Finding]
    samples: list[Sample]


async def play(scenario: Scenario, *, url: str, seed: int) -> Played:
    """Play a scenario on the server at `url`, under keys of its own, then gone."""
    prefix = f"simulation-{scenario.name}-{seed}"
    client = Redis.from_url(url)
    try:
        await wipe(client, prefix)
        stage = _Stage(scenario, client=client, url=url, prefix=prefix, seed=seed)
        try:
            return await stage.play()
        finally:
            await stage.aclose()
            await wipe(client, prefix)
    finally:
        await client.aclose()


class _Stage:
    def __init__(
        self, scenario: Scenario, *, client: Redis, url: str, prefix: str, seed: int
    ) -> None:
        self._scenario = scenario
        self._seed = seed
        self._client = client
        self._clock = Clock()
        self._timeline = Timeline(self._clock)
        # Each part draws its own numbers, so that a change of one moves no other.
        self._rngs = {
            part: random.Random(f"{seed}-{part}")
            for part in ("shop", "voucherify", "link", "forwarders", "checkout")
        }
        self._referee = Referee()
        scripts = SimulatedScripts(self._clock)
        self._budgets = [parse_budget(fleet.budget) for fleet in scenario.fleets]
        self._queues = [
            Queue(
                url=url,
                prefix=prefix,
                budget=budget,
                egress=EGRESS,
                reserve=RESERVE,
                dedupe_ms=3 * 86_400_000,
                timeout=30.0,
                scripts=scripts,
            )
            for budget in self._budgets
        ]
        self._links = [
            Link(
                queue,
                referee=self._referee,
                rng=self._rngs["link"],
                lost=scenario.lost,
            )
            for queue in self._queues
        ]
        self._shop = Shop(
            clock=self._clock,
            rng=self._rngs["shop"],
            referee=self._referee,
            customers=scenario.customers,
        )
        config = SandboxConfig(
            per_minute=scenario.per_minute, per_cycle=scenario.per_cycle, seed=seed
        )
        self._voucherify = Voucherify(
            config,
            clock=self._clock,
            rng=self._rngs["voucherify"],
            api=scenario.api,
            spells=scenario.spells,
        )
        self._watch = Watch()
        self._crews: list[list[Forwarder]] = [[] for _ in scenario.fleets]
        self._hired = 0
        self._samples: list[Sample] = []
        self._emptied_ms: int | None = None
        self._etas: dict[str, tuple[int, list[str]]] = {}  # by lane: s, who waits
        self._over = False

    async def play(self) -> Played:
        scenario, at = self._scenario, self._timeline.at
        for which, fleet in enumerate(scenario.fleets):
            for _ in range(fleet.forwarders):
                self._hire(which)
        self._open_shop()
        self._open_checkout()
        for moment in scenario.kills:
            at(START_MS + moment, self._kill)
        for moment, by_ms in scenario.steps:
            at(START_MS + moment, self._step(by_ms))
        at(START_MS, self._look)
        at(START_MS, self._housekeeping)
        at(START_MS + self._forecast_ms, self._forecast)
        at(START_MS + scenario.most_ms, self._end)
        await self._timeline.run(lambda: self._over)
        return await self._played()

    async def aclose(self) -> None:
        for queue in self._queues:
            await queue.aclose()

    # --- what happens ---------------------------------------------------------------

    def _hire(self, which: int) -> None:
        fleet = self._scenario.fleets[which]
        self._hired += 1
        forwarder = Forwarder(
            f"forwarder-{self._hired}",
            link=self._links[which],
            voucherify=self._voucherify,
            timeline=self._timeline,
            watch=self._watch,
            rng=self._rngs["forwarders"],
            concurrency=fleet.concurrency,
            egress=EGRESS,
            idle=self._idle,
        )
        self._crews[which].append(forwarder)
        forwarder.start()

    async def _kill(self) -> None:
        self._crews[0].pop(0).kill()

        async def restart() -> None:
            self._hire(0)

        self._timeline.after(RESTART_MS, restart)

    def _step(self, by_ms: int) -> Action:
        async def step() -> None:
            self._clock.off_ms += by_ms

        return step

    def _open_shop(self) -> None:
        scenario = self._scenario
        moments = arrivals(scenario.rates, scenario.step_ms, self._rngs["shop"])
        left = scenario.flood

        async def open_() -> None:
            nonlocal left
            for at_ms, n in moments:
                flood = min(left, n * 3 // 4)
                left -= flood
                await self._arrive(n - flood, flood)
                self._timeline.at(START_MS + at_ms + scenario.step_ms, open_)
                return
            self._timeline.at(START_MS + scenario.ends_ms, self._ring)

        self._timeline.at(START_MS, open_)

    async def _arrive(self, n: int, flood: int) -> None:
        for requests in self._shop.commits(n, flood=flood):
            replies = await self._links[0].commit(requests)
            for request, reply in zip(requests, replies, strict=True):
                self._shop.heard(request, reply.codes)
        await self._ring()

    async def _ring(self) -> None:
        for crew in self._crews:
            for forwarder in crew:
                forwarder.rung()

    def _open_checkout(self) -> None:
        scenario, rng = self._scenario, self._rngs["checkout"]
        if not scenario.checkout_per_s:
            return
        end_ms = START_MS + scenario.checkout_ms

        async def sell() -> None:
            self._voucherify.checkout()
            wait_s = rng.expovariate(scenario.checkout_per_s)
            at_ms = self._timeline.now_ms + max(1, round(wait_s * 1000))
            if at_ms < end_ms:
                self._timeline.at(at_ms, sell)

        self._timeline.at(START_MS, sell)

    # --- what is looked at ----------------------------------------------------------

    @property
    def _forecast_ms(self) -> int:
        return self._scenario.forecast_ms or self._scenario.relief_ms

    @property
    def _since_ms(self) -> int:
        return self._timeline.now_ms - START_MS

    def _idle(self) -> None:
        """A forwarder has found nothing at all to do."""
        if self._watch.in_hand or self._since_ms < self._scenario.relief_ms:
            return
        if self._emptied_ms is None:
            self._emptied_ms = self._since_ms - self._scenario.relief_ms
        if self._since_ms >= self._scenario.ends_ms:
            self._over = True

    async def _housekeeping(self) -> None:
        await self._keep_house()
        every_ms = max(HOUSE_MS, self._scenario.sample_ms // 12)
        self._timeline.after(every_ms, self._housekeeping)

    async def _look(self) -> None:
        gauges = await self._queues[0].reap()
        if gauges["unaccounted"] != "0":
            raise AssertionError(f"{gauges['unaccounted']} unaccounted: {gauges}")
        self._samples.append(self._sample(gauges))
        self._timeline.after(self._scenario.sample_ms, self._look)

    def _sample(self, gauges: dict[str, str]) -> Sample:
        calls = self._referee.calls[EGRESS]
        from_ms = self._timeline.now_ms - self._scenario.sample_ms
        recent = len(calls) - bisect_right(calls, from_ms)
        return Sample(
            at_ms=self._since_ms,
            waiting=sum(int(gauges[g]) for g in ("queued", "in_flight", "delayed")),
            used=recent / (self._allowed_per_ms() * self._scenario.sample_ms),
            hold=gauges["hold"],
        )

    def _allowed_per_ms(self) -> float:
        windows = [w for budget in self._budgets for w in budget]
        return min(w.quota / w.period_ms for w in windows)

    async def _forecast(self) -> None:
        await self._keep_house()
        gauges = await self._queues[0].hash("gauges")
        left = await leave(self._client, self._queues[0])
        for lane in LANES:
            waiting = [i for i in left.waiting if self._referee.events[i].lane == lane]
            self._etas[lane] = (int(gauges[f"eta_s_{lane}"]), waiting)

    async def _keep_house(self) -> None:
        """As every relay does, each second; here it is enough to do it now and then."""
        for queue in self._queues:
            await queue.reap()

    async def _end(self) -> None:
        self._over = True

    # --- what is told ---------------------------------------------------------------

    async def _played(self) -> Played:
        scenario, referee = self._scenario, self._referee
        left = await leave(self._client, self._queues[0])
        lanes = sorted({event.lane for event in referee.events.values()})
        calls = sum(len(times) for times in referee.calls.values())
        return Played(
            name=scenario.name,
            title=scenario.title,
            seed=self._seed,
            lasted_ms=self._since_ms,
            sent=len(referee.events) + sum(referee.refused.values()),
            accepted=len(referee.events),
            refused=dict(sorted(referee.refused.items())),
            calls=calls,
            turned_away=referee.turned_away,
            outcomes={
                name: left.totals[name]
                for name in map(str, Outcome)
                if name in left.totals
            },
            waiting=len(left.waiting),
            in_time={name: referee.in_time(name) for name in lanes}
            | {"all": referee.in_time()},
            duplicates={
                rule: referee.duplicates(rule)
                for rule in ("at_least_once", "at_most_once")
            },
            emptied_ms=self._emptied_ms,
            checkout_calls=self._voucherify.checkout_calls,
            checkout_refused=self._voucherify.checkout_refused,
            findings=[
                *referee.windows({EGRESS: self._widest()}),
                *referee.promises(left),
                *self._own_checks(left),
            ],
            samples=self._samples,
        )

    def _widest(self) -> list[Window]:
        """Of each length the widest window; a narrower fleet counts all calls, too."""
        widest: dict[int, int] = {}
        for budget in self._budgets:
            for window in budget:
                known = widest.get(window.period_ms, 0)
                widest[window.period_ms] = max(known, window.quota)
        return [Window(quota=q, period_ms=ms) for ms, q in sorted(widest.items())]

    def _own_checks(self, left: Left) -> list[Finding]:
        made: dict[str, Callable[[], Finding]] = {
            "fair": lambda: self._referee.fairness(self._shop.flood),
            "eta": self._eta,
            "checkout_unharmed": self._checkout_unharmed,
            "high_lane": self._high_lane,
            "probes": lambda: self._referee.probes(left),
        }
        return [made[name]() for name in sorted(self._scenario.checks)]

    def _eta(self) -> Finding:
        """The worst of the lanes; few events, or few minutes, tell nothing."""
        from_ms, worst = START_MS + self._forecast_ms, 0.0
        for eta_s, waiting in self._etas.values():
            took_s = (self._referee.gone_ms(waiting) - from_ms) / 1000
            if took_s > LEAST_ETA_S and len(waiting) >= LEAST_WAITING:
                worst = max(worst, abs(eta_s - took_s) / took_s)
        said = "relative error of eta_s, of the worst lane, after the trouble"
        return Finding(check="eta", found=round(worst, 3), most=0.1, said=said)

    def _checkout_unharmed(self) -> Finding:
        return Finding(
            check="checkout_unharmed",
            found=round(
                self._voucherify.checkout_refused / self._voucherify.checkout_calls, 4
            ),
            most=CHECKOUT_LOST,
            said="share of the checkout's calls that were refused",
        )

    def _high_lane(self) -> Finding:
        lost = 1 - (self._referee.in_time("high") or 0)
        said = "share of value that the high lane lost"
        return Finding(
            check="high_lane", found=round(lost, 3), most=HIGH_LANE_LOST, said=said
        )


async def leave(client: Redis, queue: Queue) -> Left:
    """What Redis holds of a queue."""
    # By name: to look for them would mean to look at every key of the server.
    streams = [f"{queue.prefix}:q:{name}" for name in STREAMS]
    keys = [f"{queue.prefix}:delayed", *streams]
    waiting = cast(
        "list[bytes]",
        await client.eval(_LEFT, len(keys), *keys, f"{queue.prefix}:coalesce:"),
    )
    dead = cast(
        "list[tuple[bytes, dict[bytes, bytes]]]",
        await client.xrange(f"{queue.prefix}:dead"),
    )
    totals = await queue.hash("totals")
    return Left(
        waiting=[name.decode() for name in waiting],
        dead=[(f[b"id"].decode(), f[b"outcome"].decode()) for _, f in dead],
        totals={name: int(n) for name, n in totals.items()},
    )


async def wipe(client: Redis, prefix: str) -> None:
    """Remove whatever is under a prefix."""
    keys = [k async for k in client.scan_iter(_pattern("{" + prefix + "}"), count=1000)]
    for i in range(0, len(keys), 1000):
        await client.unlink(*keys[i : i + 1000])


def _pattern(start: str) -> str:
    return start.replace("{", "[{]") + "*"
