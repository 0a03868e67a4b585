"""Random histories of the queue: whatever happens, in any order, its promises hold.

A state machine of hypothesis takes the place of edge, forwarders and Voucherify. It
enqueues, claims, marks, sends, hears every kind of answer, settles, loses Redis'
answers, kills forwarders or lets them fall asleep, loses a consumer group, restarts
everything, holds by hand, and moves Redis' clock. After each step the referee and
Redis are asked; at the end everything must find its way out of the queue.

A clock that jumps forward makes Redis believe that windows are over, and there is no
other clock: so the windows are judged by themselves on each side of such a jump.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar, cast

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from relay.activity import SKEW_MS
from relay.forwarder import MARK_GOOD_S
from relay.judgement import given_back, interrupted, judged, not_processed
from relay.limits import parse_budget
from relay.queue import COALESCED, DUPLICATE, QUEUED, Claimed, Queue, Result
from relay.queueable import Queueable, Waiting
from relay.verdicts import Answer, Verdict, read_answer
from simulation.clock import Clock, SimulatedScripts
from simulation.play import leave, wipe
from simulation.referee import Left, Referee, most_within
from simulation.voucherify import Heard

T = TypeVar("T")

PREFIX = "simulation-histories"
EGRESS = "all"
# Two fleets of one address; of each length the wider window is what counts.
BUDGETS = {"a": "4/5s, 20/1m", "b": "3/5s, 20/1m"}
WINDOWS = {5_000: 4, 60_000: 20}
CUSTOMERS = ("ann", "bob", "cem", "dee", "eli", "fay")
TTL_MS = (2_000, 72 * 3_600_000, 72 * 3_600_000)
WAITS_MS = (1, 1_000, 2_500, 4_999, 5_100, 5_100, 12_000, 59_999, 3_700_000)
WINDOW_MS = 20_000  # to coalesce in
RULES = ("at_least_once", "at_most_once", "verify:n")
LOOK_UP_MS = 30_000  # instead of two minutes: histories are short
SHOWN_AFTER_MS = LOOK_UP_MS  # what Voucherify takes its time for, at the most
RARELY = st.sampled_from((False, False, False, True))
STEPS_MS = (-3_600_000, -60_000, -1_500, -400, 400, 60_000)

# Every kind of answer: what Voucherify says, and whether it has taken the event.
ANSWERS: dict[str, tuple[Answer, bool]] = {
    **{
        f"{status}{'-cycle' if headers else ''}": (
            read_answer(status, headers, b"{}", now=0),
            status == 200,
        )
        for status, headers in [
            *((s, {}) for s in (200, 400, 404, 401, 402, 405, 429, 502, 503)),
            (429, {"x-rate-limit-type": "api_calls_cycle", "retry-after": "90000"}),
        ]
    },
    **{
        f"{status}{'-taken' if taken else ''}": (
            read_answer(status, {}, b"", now=0),
            taken,
        )
        for status in (500, 504)
        for taken in (False, True)
    },
    **{
        f"silence{'-taken' if taken else ''}": (
            Answer(verdict=Verdict.UNKNOWN, reason="read_timeout"),
            taken,
        )
        for taken in (False, True)
    },
    "unconnected": (Answer(verdict=Verdict.RETRY, reason="connect_failed"), False),
}
USUAL = (*("200",) * 12, *ANSWERS)

_PENDING = """
local ids = {}
for _, key in ipairs(KEYS) do
  local pending = redis.pcall('XPENDING', key, 'relay', '-', '+', 1000)
  for _, p in ipairs(pending.err and {} or pending) do
    for _, item in ipairs(redis.call('XRANGE', key, p[1], p[1])) do
      for f = 1, #item[2], 2 do
        if item[2][f] == 'e' then ids[#ids + 1] = cmsgpack.unpack(item[2][f + 1])[1] end
      end
    end
  end
end
return ids
"""


@dataclass
class Held:
    """An event in a forwarder's hands."""

    claimed: Claimed
    probe: bool
    marked_ms: int | None = None  # by the forwarder's own clock
    result: Result | None = None  # to be settled


@dataclass
class Hands:
    """What one forwarder knows; all of it is gone when it is killed."""

    name: str
    queue: str  # its fleet
    held: dict[str, Held] = field(default_factory=dict)
    sent: dict[tuple[str, int], int] = field(default_factory=dict)


class Histories(RuleBasedStateMachine):
    """One history, from an empty queue to an empty queue."""

    url = ""  # of the server: set by `check`

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._client = Redis.from_url(self.url)
        self._clock = Clock()
        self._stepped_ms = -1  # the last time that Redis' clock was moved
        self._scripts = SimulatedScripts(self._clock)
        self._do(wipe(self._client, PREFIX))
        self._queues = self._open()
        self._referee = Referee()
        self._seq = self._made = self._named = 0
        self._last: dict[str, str] = {}  # coalesced events by customer
        self._hands = {n: self._hire(n) for n in ("a", "b")}
        self._eras: list[list[int]] = [[]]  # calls, anew with each jump forward

    def teardown(self) -> None:
        try:
            self._drain()
            left = self._left()
            assert not left.waiting, f"never come out: {left.waiting}"
            self._judge(left)
        finally:
            self._close()
            self._do(wipe(self._client, PREFIX))
            self._do(self._client.aclose())
            self._runner.close()

    # --- the way in -----------------------------------------------------------------

    @rule(
        customers=st.lists(st.sampled_from(CUSTOMERS), min_size=1, max_size=6),
        lane=st.sampled_from(("high", "normal", "low")),
        delivery=st.sampled_from(RULES),
        ttl_ms=st.sampled_from(TTL_MS),
        lost=RARELY,
        again=RARELY,
    )
    def enqueue(
        self,
        customers: list[str],
        lane: str,
        delivery: str,
        ttl_ms: int,
        lost: bool,  # drawn by hypothesis
        again: bool,
    ) -> None:
        events: list[Queueable] = []
        for customer in customers:
            self._made += 1
            name, rules = f"e{self._made}", (delivery, ttl_ms, lane)
            event = Waiting(name, "e", customer, *rules, "{}")
            events.append((True, None, event))
        if again:
            events.append(events[0])
        self._seq += 1
        for _ in range(1 + lost):  # an answer that is lost is asked for again
            [reply] = self._do(
                self._queues["a"].commit("w:0", self._seq, [("ip", events)], [])
            )
        assert reply.codes[::2] == [QUEUED] * len(customers) + [DUPLICATE] * again
        for _, _, event in events[: len(customers)]:
            self._referee.accepted(
                event.id,
                at_ms=self._clock.now_ms,
                customer=event.customer,
                lane=lane,
                delivery=delivery,
                ttl_ms=ttl_ms,
                value=1,
            )
        if again:
            self._referee.refused["duplicate"] += 1

    @rule(
        customers=st.lists(st.sampled_from(CUSTOMERS), min_size=1, max_size=4),
        delivery=st.sampled_from(RULES),
        ttl_ms=st.sampled_from(TTL_MS),
        lost=RARELY,
    )
    def coalesce(
        self, customers: list[str], delivery: str, ttl_ms: int, lost: bool
    ) -> None:
        """Events of which only the last one counts, each of a customer of its own kind:
        one that waits for its window is overtaken by others on purpose."""
        special = ("digest", WINDOW_MS, 0, 0, False, "", 0, 0, False)
        events: list[Queueable] = []
        for customer in customers:
            self._made += 1
            name, whose = f"e{self._made}", f"{customer}-coalesced"
            event = Waiting(name, "c", whose, delivery, ttl_ms, "normal", "{}")
            events.append((True, special, event))
        self._seq += 1
        for _ in range(1 + lost):
            [reply] = self._do(
                self._queues["a"].commit("w:0", self._seq, [("ip", events)], [])
            )
        for (_, _, event), code in zip(events, reply.codes[::2], strict=True):
            assert code in (QUEUED, COALESCED)
            self._referee.accepted(
                event.id,
                at_ms=self._clock.now_ms,
                customer=event.customer,
                lane="normal",
                delivery=delivery,
                ttl_ms=ttl_ms,
                value=1,
                replaces=self._last[event.customer] if code == COALESCED else None,
            )
            self._last[event.customer] = event.id

    # --- the way out ----------------------------------------------------------------

    @rule(
        who=st.sampled_from("ab"),
        what=st.sampled_from(("claim", "claim", "mark", "send", "settle")),
        wanted=st.integers(0, 6),
        kind=st.sampled_from(USUAL),
        lost=RARELY,
    )
    def part_of_a_turn(
        self,
        who: str,
        what: str,
        wanted: int,
        kind: str,
        lost: bool,
    ) -> None:
        if what == "claim":
            self.claim(who, wanted, look_out=lost, lost=lost)
        elif what == "mark":
            self.mark(who, lost=lost)
        elif what == "send":
            self.send(who, kind, wanted)
        else:
            self.settle(who, lost=lost)

    def claim(self, who: str, wanted: int, look_out: bool, lost: bool) -> None:
        hands = self._hands[who]
        tick = self._do(
            self._queues[hands.queue].tick(
                hands.name, wanted, look_out=look_out, held=list(hands.held)
            )
        )
        assert len(tick.claimed) <= (min(wanted, 1) if tick.probe else wanted)
        for claimed in tick.claimed:
            # Charged to the budget when it is given out, whether it is sent or not.
            self._eras[-1].append(self._clock.now_ms)
            self._referee.claimed(claimed, probe=tick.probe)
            if not lost:
                hands.held[claimed.place] = Held(claimed, tick.probe)

    def mark(self, who: str, lost: bool) -> None:
        hands = self._hands[who]
        paying = [
            held
            for held in hands.held.values()
            if held.claimed.once
            and not held.claimed.doubted_ms
            and held.marked_ms is None
            and held.result is None
        ]
        if not paying:
            return
        said = self._do(
            self._queues[hands.queue].mark(hands.name, [h.claimed for h in paying])
        )
        for held, ours in zip(paying, said, strict=True):
            if ours:
                self._referee.marked(held.claimed)
            if lost:
                held.result = given_back(held.claimed, "lost", probe=held.probe)
            elif ours:
                held.marked_ms = self._clock.now_ms
            else:
                del hands.held[held.claimed.place]

    def send(self, who: str, kind: str, pick: int) -> None:
        hands = self._hands[who]
        ready = [
            held
            for held in hands.held.values()
            if held.result is None and self._may_leave(held)
        ]
        if ready:
            self._send(hands, ready[pick % len(ready)], kind, 4_000)

    def settle(self, who: str, lost: bool) -> None:
        hands = self._hands[who]
        for held in [h for h in hands.held.values() if h.result is not None]:
            self._settle(hands, held, lost=lost)

    # Most of what a forwarder does is whole turns; the parts above take them to pieces.

    @rule(
        who=st.sampled_from("ab"),
        kind=st.sampled_from(USUAL),
        ends=st.sampled_from(("settled", "settled", "sent", "marked", "claimed")),
        dies=st.booleans(),
    )
    def turn(self, who: str, kind: str, ends: str, dies: bool) -> None:
        """Do all that can be done at once, or die at some point of it."""
        hands = self._hands[who]
        self.claim(who, 6, look_out=False, lost=False)
        if ends != "claimed":
            self.mark(who, lost=False)
        if ends in ("sent", "settled"):
            for held in list(hands.held.values()):
                if held.result is None and self._may_leave(held):
                    self._send(hands, held, kind, 1_000)
        if ends == "settled":
            self.settle(who, lost=False)
        elif dies:
            self.kill(who)

    @rule(
        who=st.sampled_from("ab"),
        kind=st.sampled_from(USUAL),
        n=st.integers(1, 3),
        ms=st.sampled_from((4_999, 5_100)),
    )
    def turns(self, who: str, kind: str, n: int, ms: int) -> None:
        """Some turns in a row, as fast as the windows let them."""
        for _ in range(n):
            self.turn(who, kind, "settled", dies=False)
            self._clock.now_ms += ms

    @rule(who=st.sampled_from("ab"), looks=st.integers(1, 10))
    def live_on(self, who: str, looks: int) -> None:
        """One gives heartbeats and looks out, and finds the other one dead."""
        for _ in range(looks):
            self._clock.now_ms += 6_000
            self.claim(who, 0, look_out=True, lost=False)

    @rule(who=st.sampled_from("ab"), marks=st.booleans(), kind=st.sampled_from(USUAL))
    def sleeper(self, who: str, marks: bool, kind: str) -> None:
        """One falls asleep in the middle of a turn, the other one goes on for it."""
        self.claim(who, 6, look_out=False, lost=False)
        if marks:
            self.mark(who, lost=False)
        other = "b" if who == "a" else "a"
        self.live_on(other, 5)
        self.turn(other, "200", "settled", dies=False)
        self.turn(who, kind, "settled", dies=False)

    # --- what goes wrong ------------------------------------------------------------

    @rule(ms=st.sampled_from(WAITS_MS))
    def time_passes(self, ms: int) -> None:
        """Whoever has something in hand meanwhile sleeps, as a stalled process does."""
        self._clock.now_ms += ms

    @rule(
        what=st.sampled_from(
            ("kill", "kill", "restart", "group", "group", "clock", "clock")
        ),
        who=st.sampled_from("ab"),
        lane=st.sampled_from(("high", "normal", "low", "retry")),
        ms=st.sampled_from(STEPS_MS),
    )
    def mishap(self, what: str, who: str, lane: str, ms: int) -> None:
        if what == "kill":
            self.kill(who)
        elif what == "restart":
            self._restart()
        elif what == "group":
            self._lose_a_group(lane)
        else:
            self._clock.off_ms += ms
            self._stepped_ms = self._clock.now_ms
            if ms > 0:
                self._eras.append([])

    def kill(self, who: str) -> None:
        self._hands[who] = self._hire(who)

    def _restart(self) -> None:
        for who in "ab":
            self.kill(who)
        self._close()
        self._do(self._client.script_flush())
        self._queues = self._open()

    def _lose_a_group(self, lane: str) -> None:
        """As a failover does, that had the stream and not yet its group."""
        key = f"{self._queues['a'].prefix}:q:{lane}"
        if self._do(self._client.exists(key)):
            self._do(self._client.xgroup_destroy(key, "relay"))

    @rule(who=st.sampled_from("ab"))
    def hold_by_hand(self, who: str) -> None:
        queue = self._queues["a"]
        self._do(queue.hold("a test"))
        self._clock.now_ms += 5_100
        hands = self._hands[who]
        held = list(hands.held)
        tick = self._do(queue.tick(hands.name, 6, look_out=True, held=held))
        assert tick.claimed == [], "given out under a hold by hand"
        self._do(queue.resume())

    # --- what must hold -------------------------------------------------------------

    @invariant()
    def promises_hold(self) -> None:
        self._judge(self._left())

    @invariant()
    def no_window_is_passed(self) -> None:
        for calls in self._eras:
            for window_ms, most in WINDOWS.items():
                assert most_within(calls, window_ms) <= most, (window_ms, calls)

    @invariant()
    def a_customer_has_one_in_flight(self) -> None:
        whose = [self._referee.events[name].customer for name in self._in_flight()]
        assert len(whose) == len(set(whose)), whose

    def _judge(self, left: Left) -> None:
        for finding in self._referee.promises(left):
            # Beside each other and out of order is what a stalled or a lost forwarder's
            # events may be; who is in flight, Redis itself is asked above.
            if finding.check not in ("one_at_a_time", "in_order"):
                assert finding.kept, finding

    # --- parts ----------------------------------------------------------------------

    def _do(self, asked: Awaitable[T]) -> T:
        async def do() -> T:
            return await asked

        return self._runner.run(do())

    def _open(self) -> dict[str, Queue]:
        return {
            name: Queue(
                url=self.url,
                prefix=PREFIX,
                budget=parse_budget(budget),
                egress=EGRESS,
                timeout=10.0,
                look_up_ms=LOOK_UP_MS,
                scripts=self._scripts,
            )
            for name, budget in BUDGETS.items()
        }

    def _close(self) -> None:
        for queue in self._queues.values():
            self._do(queue.aclose())

    def _hire(self, who: str) -> Hands:
        self._named += 1
        return Hands(f"{who}{self._named}", who)

    def _may_leave(self, held: Held) -> bool:
        """Marked, or nothing to mark."""
        claimed = held.claimed
        return (
            not claimed.once or bool(claimed.doubted_ms) or held.marked_ms is not None
        )

    def _send(self, hands: Hands, held: Held, kind: str, delay_ms: int) -> None:
        claimed = held.claimed
        key = (claimed.id, claimed.received_ms)
        if claimed.doubted_ms:
            return self._look_up(hands, held, kind, delay_ms)
        if claimed.attempts <= hands.sent.get(key, -1):
            held.result = interrupted(claimed, "claimed_again")
            return None
        if held.marked_ms is not None:
            if self._clock.now_ms - held.marked_ms > MARK_GOOD_S * 1000:
                held.result = given_back(claimed, "stalled", probe=held.probe)
                return None
            hands.sent[key] = claimed.attempts
        answer, taken = ANSWERS[kind]
        now = self._clock.now_ms
        self._referee.departed(claimed, now)
        heard = Heard(answer=answer, after_ms=0, processed=taken)
        self._referee.arrived(claimed, heard, EGRESS, now)
        self._referee.ended(claimed)
        held.result = judged(
            claimed, answer, probe=held.probe, backoff=lambda _, told: told or delay_ms
        )
        self._referee.judged(claimed, held.result)
        if not_processed(held.result):
            hands.sent.pop(key, None)
        return None

    def _look_up(self, hands: Hands, held: Held, kind: str, delay_ms: int) -> None:
        """Ask Voucherify, which shows after a while what it has taken."""
        claimed = held.claimed
        answer, _ = ANSWERS[kind]
        if answer.verdict is Verdict.DELIVERED:
            since = claimed.doubted_ms - SKEW_MS
            shown = range(since, self._clock.now_ms - SHOWN_AFTER_MS + 1)
            # After a step of Redis' clock nobody knows how long it has waited.
            there = any(
                at in shown or at <= self._stepped_ms
                for at in self._referee.events[claimed.id].processed
            )
            found = Verdict.DELIVERED if there else Verdict.ABSENT
            answer = Answer(verdict=found, reason="asked", status=200)
        held.result = judged(
            claimed, answer, probe=held.probe, backoff=lambda _, told: told or delay_ms
        )
        if not_processed(held.result):
            hands.sent.pop((claimed.id, claimed.received_ms), None)

    def _settle(self, hands: Hands, held: Held, *, lost: bool) -> None:
        result, name = held.result, held.claimed.id
        assert result is not None
        before = self._left()
        n = self._do(self._queues[hands.queue].settle(hands.name, [result]))
        after = self._left()
        if n == 0:  # taken over meanwhile, or settled before its answer was lost
            assert sorted(after.waiting) == sorted(before.waiting)
            assert after.dead == before.dead
        else:
            ends = [end for id_, end in after.dead if id_ == name]
            fits = self._fits(held.claimed, result, ends, waits=name in after.waiting)
            assert fits, (held.claimed, result, ends)
        if not lost:
            del hands.held[held.claimed.place]

    def _fits(
        self, claimed: Claimed, result: Result, ends: list[str], *, waits: bool
    ) -> bool:
        """The delivery table: where an event is after its result was settled."""
        if result.verdict == "ambiguous" and claimed.proof:  # to be looked up
            return waits if not ends else ends == ["ambiguous"]
        too_old = "ambiguous" if claimed.doubted_ms else "expired"
        if result.verdict == "resend":
            too_old = "expired"
        match result.verdict:
            case "delivered":
                return not ends and not waits
            case "rejected" | "ambiguous":
                return ends == [result.verdict] and not waits
            case _:  # to be tried again; or too old, or a hold is its own doing
                if result.signal in ("auth_hold", "config_hold") and ends == [
                    "rejected"
                ]:
                    return not waits
                return ends == [too_old] if ends else waits

    def _left(self) -> Left:
        return self._do(leave(self._client, self._queues["a"]))

    def _in_flight(self) -> list[str]:
        """Ids of what is pending, as Redis' streams have it."""
        prefix = self._queues["a"].prefix
        keys = [f"{prefix}:q:{lane}" for lane in ("high", "normal", "low", "retry")]
        names = self._do(self._client.eval(_PENDING, len(keys), *keys))
        return [name.decode() for name in cast("list[bytes]", names)]

    def _drain(self) -> None:
        """Let all be well again, and time go on."""
        for who in "ab":
            self.kill(who)
        hands = self._hands["a"]
        for _ in range(400):
            self._clock.now_ms += 6_000
            self.claim("a", 6, look_out=True, lost=False)
            self.mark("a", lost=False)
            for held in list(hands.held.values()):
                if held.result is None:
                    self._send(hands, held, "200", 1_000)
            self.settle("a", lost=False)
            if not self._left().waiting:
                return
            if not self._in_flight():  # a hold, or a retry that is due much later
                self._clock.now_ms += 60_000


def check(url: str, *, examples: int, steps: int, repeatable: bool) -> None:
    """Try that many histories. Raises with one that breaks a promise.

    Repeatable ones are for tests, which have no minutes to look for the shortest one.
    """
    made = type("Histories", (Histories,), {"url": url})
    quick = [Phase.explicit, Phase.generate]
    run_state_machine_as_test(
        made,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=repeatable,
            phases=quick if repeatable else [*quick, Phase.shrink],
        ),
    )
