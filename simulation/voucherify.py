"""Voucherify in simulated time: the sandbox's own rules, and days that go wrong.

A call meets the sandbox's cluster as it would over the wire: keys, origin, limits,
plan, schema. What a call comes to is handed back with the time it takes, and whether
the event was processed, which only the referee is told.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from relay.sandbox import answers
from relay.sandbox.cluster import CLIENT_EVENTS, SERVER_EVENTS, Accepted, Cluster
from relay.sandbox.config import ORIGIN, SandboxConfig
from relay.sandbox.request import Request
from relay.verdicts import Answer, Verdict, read_answer
from simulation.clock import START_MS, Clock

Api = Literal["client", "server"]
PATHS: dict[Api, str] = {"client": CLIENT_EVENTS, "server": SERVER_EVENTS}

# Voucherify publishes 100 ms at the median and 220 ms for 95 of 100 validations
# (docs, "Performance"); an event does a little more.
MEDIAN_MS, SPREAD = 120, 0.4
TIMEOUT_MS = 10_000  # of the relay, from the call to the last byte

# What a call comes to while Voucherify is down, in parts of a hundred.
OUTAGE: dict[str, int] = {
    "connect_failed": 25,
    "503": 30,
    "502": 10,
    "500": 5,
    "504": 5,
    "silence": 8,
    "silence_processed": 4,
    "reset": 9,
    "reset_processed": 4,
}
# And on any other day: one call in a thousand or so.
USUAL: dict[str, int] = {"500": 4, "silence_processed": 3, "reset_processed": 3}
USUAL_SHARE = 0.001

Spells = Literal["outage", "wrong_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spell:
    """Something that goes wrong for a while, in ms since the scenario's start."""

    kind: Spells
    from_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What came of one call."""

    answer: Answer  # as the relay reads it
    after_ms: int  # from the arrival, or from the attempt where nothing arrived
    arrived: bool = True
    processed: bool = False


class Voucherify:
    """One cluster, and the weather around it."""

    def __init__(
        self,
        config: SandboxConfig,
        *,
        clock: Clock,
        rng: random.Random,
        api: Api,
        spells: Sequence[Spell] = (),
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._api: Api = api
        self._spells = spells
        self._cluster = Cluster(config, monotonic=self._seconds, wall=self._seconds)
        self._keys = _keys(config, api)
        self._checkout_keys = _keys(config, "server")
        self.checkout_calls = self.checkout_refused = 0

    def call(self, body: bytes, egress: str) -> Heard:
        """Let one event arrive now."""
        spell = self._spell()
        weather = self._weather(spell)
        if weather == "connect_failed":
            lost = Answer(verdict=Verdict.RETRY, reason="connect_failed")
            return Heard(answer=lost, after_ms=3, arrived=False)
        processed = weather.endswith("_processed")
        if weather.startswith("silence"):
            return self._lost("read_timeout", TIMEOUT_MS, body, egress, take=processed)
        if weather.startswith("reset"):
            after_ms = self._latency_ms()
            return self._lost("connection_lost", after_ms, body, egress, take=processed)
        if weather:
            answer = answers.usual_error(int(weather), self._cluster.request_id())
            return self._heard(answer, processed=False)
        keys = self._keys
        if spell == "wrong_key":
            keys = dict.fromkeys(keys, "yesterdays-key") | {"origin": ORIGIN}
        return self._ask(body, egress, keys)

    def checkout(self) -> bool:
        """One call of the shop's own checkout, which spends the same plan."""
        said = self._cluster.judge(
            _request(_CHECKOUT, "shop", "server", self._checkout_keys)
        )
        self.checkout_calls += 1
        taken = isinstance(said, Accepted)
        self.checkout_refused += not taken
        return taken

    def _ask(self, body: bytes, egress: str, keys: Mapping[str, str]) -> Heard:
        said = self._cluster.judge(_request(body, egress, self._api, keys))
        if isinstance(said, answers.Answer):
            return self._heard(said, processed=False)
        answer, _ = self._cluster.apply(said)
        return self._heard(answer, processed=True)

    def _lost(
        self, reason: str, after_ms: int, body: bytes, egress: str, *, take: bool
    ) -> Heard:
        """No answer, after the request was written: processed before, or never."""
        processed = take and self._ask(body, egress, self._keys).processed
        answer = Answer(verdict=Verdict.UNKNOWN, reason=reason)
        return Heard(answer=answer, after_ms=after_ms, processed=processed)

    def _heard(self, said: answers.Answer, *, processed: bool) -> Heard:
        headers = {name.lower(): value for name, value in said.headers}
        answer = read_answer(said.status, headers, said.body, now=self._seconds())
        return Heard(answer=answer, after_ms=self._latency_ms(), processed=processed)

    def _spell(self) -> str:
        since_ms = self._clock.now_ms - START_MS
        for spell in self._spells:
            if spell.from_ms <= since_ms < spell.until_ms:
                return spell.kind
        return ""

    def _weather(self, spell: str) -> str:
        """What stands between this call and the cluster; empty: nothing."""
        if spell == "outage":
            kinds = OUTAGE
        elif self._rng.random() < USUAL_SHARE:
            kinds = USUAL
        else:
            return ""
        return self._rng.choices(list(kinds), weights=list(kinds.values()))[0]

    def _latency_ms(self) -> int:
        drawn = self._rng.lognormvariate(math.log(MEDIAN_MS), SPREAD)
        return min(int(drawn), TIMEOUT_MS - 1)

    def _seconds(self) -> float:
        return self._clock.now_ms / 1000


_CHECKOUT = b'{"event":"checkout","customer":{"source_id":"somebody"}}'


def _keys(config: SandboxConfig, api: Api) -> dict[str, str]:
    if api == "server":
        return {
            "x-app-id": config.server_app_id,
            "x-app-token": config.server_app_token,
        }
    return {
        "x-client-application-id": config.application_id,
        "x-client-token": config.client_token,
        "origin": ORIGIN,
    }


def _request(body: bytes, ip: str, api: Api, keys: Mapping[str, str]) -> Request:
    headers = {**keys, "content-type": "application/json"}
    return Request(
        method="POST",
        path=PATHS[api],
        ip=ip,
        header_list=(),
        headers=headers,
        body=body,
        json=msgspec.json.decode(body),
    )
