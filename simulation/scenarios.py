"""The days that are simulated."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from simulation.shop import Rate
from simulation.voucherify import Api, Spell

# What a scenario may be judged by, beside the promises.
OWN_CHECKS = frozenset({"fair", "eta", "checkout_unharmed", "high_lane", "probes"})
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Relays with the same settings. All fleets share one queue and one address."""

    budget: str  # RELAY_UPSTREAM_BUDGET
    forwarders: int = 2
    concurrency: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One simulated time. Moments are ms since its start."""

    name: str
    title: str  # for people
    api: Api
    fleets: tuple[Fleet, ...]
    rates: tuple[Rate, ...]
    step_ms: int  # arrivals within it come together
    sample_ms: int  # between two points of the picture
    relief_ms: int  # when the trouble is over, and the backlog begins to go
    forecast_ms: int = 0  # when eta_s is put to the test; 0: then
    most_ms: int  # the end, whatever is left
    per_minute: int = 100  # the plan's
    per_cycle: int | None = None
    spells: tuple[Spell, ...] = ()
    checkout_per_s: float = 0.0  # calls of the shop's own checkout
    checkout_ms: int = 0  # for how long
    kills: tuple[int, ...] = ()  # a forwarder dies, another starts 5 s later
    steps: tuple[tuple[int, int], ...] = ()  # Redis' clock steps by so many ms
    flood: int = 0  # events of one wild customer, among the first
    customers: int = 20_000
    lost: float = 0.0005  # share of Redis' answers that never come
    checks: frozenset[str] = field(default_factory=frozenset)  # beside the promises

    @property
    def ends_ms(self) -> int:
        """When the last event has arrived."""
        return max(rate.until_ms for rate in self.rates)


SALE = Scenario(
    name="sale",
    title="A sale: 100,000 events in ten minutes, a plan of 100 calls a minute",
    api="server",
    fleets=(Fleet(budget="90/1m"),),
    rates=(Rate(from_ms=0, until_ms=10 * MINUTE, per_s=100_000 / 600),),
    step_ms=1000,
    sample_ms=10 * MINUTE,
    relief_ms=10 * MINUTE,
    most_ms=40 * HOUR,
    kills=(1 * HOUR, 7 * HOUR + 13_000),
    flood=2_000,
    checks=frozenset({"fair", "eta"}),
)
NIGHT = Scenario(
    name="night",
    title="A night's outage of eight hours, Redis' clock steps back two minutes",
    api="client",
    fleets=(Fleet(budget="4/5s, 90/1m"),),
    rates=(
        Rate(from_ms=0, until_ms=5 * HOUR, per_s=0.5),
        Rate(from_ms=5 * HOUR, until_ms=13 * HOUR, per_s=0.15),
        Rate(from_ms=13 * HOUR, until_ms=19 * HOUR, per_s=0.5),
    ),
    step_ms=10_000,
    sample_ms=10 * MINUTE,
    relief_ms=13 * HOUR,
    most_ms=60 * HOUR,
    spells=(Spell(kind="outage", from_ms=5 * HOUR, until_ms=13 * HOUR),),
    kills=(2 * HOUR + 2_345, 13 * HOUR + 30_000, 16 * HOUR),
    steps=((15 * HOUR, -120_000),),
    forecast_ms=14 * HOUR,  # an hour of the day's traffic has been seen by then
    checks=frozenset({"probes", "eta"}),
)
ROTATION = Scenario(
    name="rotation",
    title="A key is rotated and the relays learn of it two hours later; "
    "two fleets with different budgets",
    api="client",
    fleets=(Fleet(budget="4/5s, 90/1m"), Fleet(budget="3/5s", forwarders=1)),
    rates=(Rate(from_ms=0, until_ms=12 * HOUR, per_s=0.4),),
    step_ms=10_000,
    sample_ms=5 * MINUTE,
    relief_ms=5 * HOUR,
    most_ms=48 * HOUR,
    spells=(Spell(kind="wrong_key", from_ms=3 * HOUR, until_ms=5 * HOUR),),
    kills=(4 * HOUR + 1_000,),
    checks=frozenset({"eta"}),
)
CHECKOUT = Scenario(
    name="checkout",
    title="A checkout that takes half of the plan, and an hour of 150 events a minute",
    api="server",
    fleets=(Fleet(budget="90/1m"),),
    rates=(
        Rate(from_ms=0, until_ms=2 * HOUR, per_s=40 / 60),
        Rate(from_ms=2 * HOUR, until_ms=3 * HOUR, per_s=150 / 60),
        Rate(from_ms=3 * HOUR, until_ms=6 * HOUR, per_s=40 / 60),
    ),
    step_ms=5_000,
    sample_ms=5 * MINUTE,
    relief_ms=3 * HOUR,
    most_ms=30 * HOUR,
    checkout_per_s=50 / 60,
    checkout_ms=10 * HOUR,
    checks=frozenset({"checkout_unharmed"}),
)
MONTH = Scenario(
    name="month",
    title="A month: 12,000 events and 2,000 calls of the checkout, a plan of 10,000",
    api="client",
    fleets=(Fleet(budget="4/5s, 90/1m, 8000/30d"),),
    rates=(Rate(from_ms=0, until_ms=30 * DAY, per_s=12_000 / (30 * 86_400)),),
    step_ms=MINUTE,
    sample_ms=6 * HOUR,
    relief_ms=30 * DAY,
    most_ms=36 * DAY,
    per_cycle=10_000,
    checkout_per_s=2_000 / (30 * 86_400),
    checkout_ms=36 * DAY,
    kills=(3 * DAY, 11 * DAY + 777),
    checks=frozenset({"high_lane"}),
)
SCENARIOS = {s.name: s for s in (SALE, NIGHT, ROTATION, CHECKOUT, MONTH)}


def shorter(scenario: Scenario) -> Scenario:
    """The same trouble in small, for every run of the tests."""
    return _SHORTER[scenario.name](scenario)


def _sale(scenario: Scenario) -> Scenario:
    rate = Rate(from_ms=0, until_ms=MINUTE, per_s=2_000 / 60)
    return replace(
        scenario,
        rates=(rate,),
        relief_ms=MINUTE,
        sample_ms=MINUTE,
        kills=(5 * MINUTE,),
        flood=300,
        lost=0.005,
    )


def _night(scenario: Scenario) -> Scenario:
    return replace(
        scenario,
        rates=(Rate(from_ms=0, until_ms=60 * MINUTE, per_s=0.4),),
        spells=(Spell(kind="outage", from_ms=10 * MINUTE, until_ms=30 * MINUTE),),
        relief_ms=30 * MINUTE,
        forecast_ms=35 * MINUTE,
        sample_ms=MINUTE,
        kills=(5 * MINUTE + 345, 31 * MINUTE),
        steps=((40 * MINUTE, -120_000),),
        lost=0.005,
    )


def _rotation(scenario: Scenario) -> Scenario:
    return replace(
        scenario,
        rates=(Rate(from_ms=0, until_ms=45 * MINUTE, per_s=0.4),),
        spells=(Spell(kind="wrong_key", from_ms=10 * MINUTE, until_ms=20 * MINUTE),),
        relief_ms=20 * MINUTE,
        sample_ms=MINUTE,
        kills=(15 * MINUTE + 100,),
        lost=0.005,
    )


def _checkout(scenario: Scenario) -> Scenario:
    return replace(
        scenario,
        rates=(
            Rate(from_ms=0, until_ms=5 * MINUTE, per_s=40 / 60),
            Rate(from_ms=5 * MINUTE, until_ms=10 * MINUTE, per_s=150 / 60),
        ),
        relief_ms=10 * MINUTE,
        sample_ms=MINUTE,
        checkout_ms=30 * MINUTE,
        lost=0.005,
    )


def _month(scenario: Scenario) -> Scenario:
    return replace(
        scenario,
        rates=(Rate(from_ms=0, until_ms=30 * DAY, per_s=600 / (30 * 86_400)),),
        fleets=(Fleet(budget="4/5s, 90/1m, 400/30d"),),
        per_cycle=500,
        checkout_per_s=100 / (30 * 86_400),
        lost=0.005,
    )


_SHORTER: dict[str, Callable[[Scenario], Scenario]] = {
    "sale": _sale,
    "night": _night,
    "rotation": _rotation,
    "checkout": _checkout,
    "month": _month,
}
