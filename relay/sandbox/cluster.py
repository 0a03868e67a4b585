"""Voucherify's decisions on one request: refuse it, or take the event.

A decision list in the order a request meets it, then one call that applies what was
accepted. Nothing here waits, so a decision and its effect are one step.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from relay.sandbox import oauth, schema
from relay.sandbox.activity import Activities, named_in
from relay.sandbox.answers import Answer, error, framework_error, ok, too_many
from relay.sandbox.config import SandboxConfig
from relay.sandbox.customers import Customers
from relay.sandbox.limits import Plan, SlidingWindow, client_limit_headers
from relay.sandbox.request import Request

CLIENT_EVENTS = "/client/v1/events"
SERVER_EVENTS = "/v1/events"
EVENT_PATHS = {CLIENT_EVENTS: "client", SERVER_EVENTS: "server"}

_CLIENT_KEYS = ("x-client-application-id", "x-client-token")
_SERVER_KEYS = ("x-app-id", "x-app-token")

# An origin is a host with an optional scheme and port; both forms are in the
# documentation ("https://…" in the description, a bare host in the curl example).
_ORIGIN = re.compile(
    r"(?:[a-z][a-z0-9+.-]*://)?(?P<host>\[[0-9a-f:.]+\]|[^/?#@:\s\[\]]+)(?P<port>:\d+)?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """An event that nothing speaks against, not yet recorded."""

    event: str
    customer: dict[str, object]
    metadata: dict[str, object]
    headers: tuple[tuple[str, str], ...]  # what the plan says
    skipped: tuple[str, ...] = ()


class Cluster:
    """One project on one cluster."""

    def __init__(
        self,
        config: SandboxConfig,
        *,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.config = config
        self._monotonic = monotonic
        self._wall = wall
        # Ids and latency need to be repeatable, not secret.
        self.rng = random.Random(config.seed)  # noqa: S311
        self.customers = Customers(keep=config.keep_customers, rng=self.rng)
        self.tokens = oauth.Tokens(self.rng)
        self._activities = Activities(keep=config.keep_requests, rng=self.rng)
        self._per_address = SlidingWindow()
        self._plan = Plan(cycle_start=wall())

    def request_id(self) -> str:
        """Return an id as Voucherify's errors carry it."""
        return f"v-{self.rng.getrandbits(72):018x}"

    def judge(self, request: Request) -> Answer | Accepted:
        """Refuse a request to an event route, or accept its event."""
        for check in (_method, self._size, self._client_limit):
            if (refusal := check(request)) is not None:
                return refusal
        api = EVENT_PATHS[request.path]
        refusal = self._keys(request, api, opens=api) or self._origin(request)
        if refusal is not None:
            return refusal
        refusal, headers = self._take_call()
        if refusal is not None:
            return refusal
        verdict = _media_types(request) or self._event(request, headers)
        if isinstance(verdict, Answer):
            return verdict.with_headers(headers)
        return verdict

    def apply(self, accepted: Accepted) -> tuple[Answer, str | None]:
        """Record an accepted event: its answer, and the customer's id."""
        customer: dict[str, object] = {"object": "customer"}
        customer_id = None
        if "customer" not in accepted.skipped:
            stored = self.customers.upsert(accepted.customer)
            stored.events += 1
            customer, customer_id = stored.simple(), stored.id
            self._activities.add(
                stored.id, accepted.event, accepted.metadata, self._wall()
            )
        body: dict[str, object] = {
            "object": "event",
            "type": accepted.event,
            "customer": customer,
            "referral": None,
            "loyalty": None,
        }
        if self.config.response_metadata:
            body["metadata"] = accepted.metadata
        return ok("recorded", body).with_headers(accepted.headers), customer_id

    def activity(self, request: Request) -> Answer:
        """Answer what a customer did."""
        refused = _method(request, "GET") or self._keys(
            request, "server", opens="activity"
        )
        if refused is not None:
            return refused
        refused, headers = self._take_call()
        return refused or self._activity(request).with_headers(headers)

    def _activity(self, request: Request) -> Answer:
        named = named_in(request.path) or ""
        customer = self.customers.find({"id": named}) or self.customers.find(
            {"source_id": named}
        )
        if customer is None:
            return error(
                "not_found",
                404,
                self.request_id(),
                details=f"Cannot find customer with id {named}",
                resource=(named, "customer"),
            )
        return self._activities.page(
            customer.id,
            request.query,
            until=self._wall() - self.config.activity_delay_seconds,
            shape=self.config.activity_shape,
            request_id=self.request_id(),
        )

    def _take_call(self) -> tuple[Answer | None, tuple[tuple[str, str], ...]]:
        """Take one call of the plan: its refusal, and what the plan says."""
        now = self._wall()
        plan = self._plan.take(now, self.config)
        if plan is None:
            return None, ()
        headers = plan.headers(now)
        refused = too_many("rate_limited_plan", headers) if plan.refused else None
        return refused, headers

    def token(self, request: Request) -> Answer:
        """Answer one of the OAuth routes."""
        refusal = _method(request) or self._size(request)
        return refusal or self.tokens.answer(
            request.path,
            request.headers,
            request.body,
            now=self._wall(),
            config=self.config,
            request_id=self.request_id(),
        )

    def _size(self, request: Request) -> Answer | None:
        if not request.too_large:
            return None
        limit = self.config.max_body_bytes
        message = f"Payload content length greater than maximum allowed: {limit}"
        return framework_error("too_large", 413, message)

    def _client_limit(self, request: Request) -> Answer | None:
        calls = self.config.client_limit
        if EVENT_PATHS[request.path] != "client" or calls is None:
            return None
        seconds = self.config.client_limit_seconds
        wait = self._per_address.take(
            request.ip, self._monotonic(), calls=calls, seconds=seconds
        )
        if not wait:
            return None
        shown = self.config.client_limit_headers
        headers = client_limit_headers(calls, wait, self._wall()) if shown else ()
        return too_many("rate_limited_ip", headers)

    def _keys(self, request: Request, api: str, *, opens: str) -> Answer | None:
        config, headers = self.config, request.headers
        names = _CLIENT_KEYS if api == "client" else _SERVER_KEYS
        expected = (
            (config.application_id, config.client_token)
            if api == "client"
            else (config.server_app_id, config.server_app_token)
        )
        has_keys = any(name in headers for name in names)
        value = oauth.bearer(headers)
        if value is not None:
            if has_keys and config.keys_with_bearer == "reject":
                return error("unauthorized", 401, self.request_id())
            token = self.tokens.live(value, self._wall())
            if token is None:
                return error("token", 401, self.request_id())
            if not token.opens(opens):
                return error("scope", config.wrong_scope_status, self.request_id())
            if not has_keys:
                return None
        right = [
            oauth.same(headers.get(name), key)
            for name, key in zip(names, expected, strict=True)
        ]
        return None if all(right) else error("unauthorized", 401, self.request_id())

    def _origin(self, request: Request) -> Answer | None:
        config = self.config
        if EVENT_PATHS[request.path] != "client":
            return None
        if config.origin_with_bearer == "ignore" and oauth.bearer(request.headers):
            return None
        origin = request.headers.get("origin", "")
        if trusted(origin, config.trusted_domains):
            return None
        return error("origin", config.bad_origin_status, self.request_id())

    def _event(
        self, request: Request, headers: tuple[tuple[str, str], ...]
    ) -> Answer | Accepted:
        if request.malformed:
            message = "Invalid request payload JSON format"
            return framework_error("invalid_json", 400, message)
        body = schema.relaxed(request.json, self.config)
        if (details := schema.problem(body, self.config)) is not None:
            return error("invalid_payload", 400, self.request_id(), details=details)
        # The schema has just said so; this says it to the type checker.
        parts = msgspec.convert(body, _Body)
        refusal = self._definition(parts) or self._customer(parts.customer)
        if refusal is not None:
            return refusal
        skipped = self._switched_off(request, parts)
        if skipped and self.config.when_disabled == "refuse":
            details = f"Client-side setting is off for: {', '.join(skipped)}"
            return error("disabled", 403, self.request_id(), details=details)
        return Accepted(
            event=parts.event,
            customer=parts.customer,
            metadata=parts.metadata,
            headers=headers,
            skipped=skipped,
        )

    def _definition(self, parts: "_Body") -> Answer | None:
        definition = self.config.events.get(parts.event)
        if definition is None:
            if self.config.undefined_event == "accept":
                return None
            details = f"Event '{parts.event}' is not defined in the event schema"
            return error("undefined_event", 400, self.request_id(), details=details)
        details_or_none = schema.metadata_problem(parts.metadata, definition)
        if details_or_none is None:
            return None
        return error(
            "metadata_validation_failed",
            400,
            self.request_id(),
            key="metadata_validation_failed",
            message="Metadata validation failed",
            details=details_or_none,
        )

    def _customer(self, customer: dict[str, object]) -> Answer | None:
        named = "id" in customer or bool(customer.get("source_id"))
        if not named and self.config.empty_customer == "reject":
            details = "Property .customer should have required property 'source_id'"
            return error("customer_missing", 400, self.request_id(), details=details)
        if "id" not in customer or self.customers.find(customer) is not None:
            return None
        unknown = str(customer["id"])
        return error(
            "not_found",
            404,
            self.request_id(),
            details=f"Cannot find customer with id {unknown}",
            resource=(unknown, "customer"),
        )

    def _switched_off(self, request: Request, parts: "_Body") -> tuple[str, ...]:
        if EVENT_PATHS[request.path] != "client":
            return ()
        off = []
        if not self.config.client_loyalty_events_enabled:
            off += [name for name in ("referral", "loyalty") if getattr(parts, name)]
        if not self.config.client_create_customer_enabled:
            off += ["customer"] * (self.customers.find(parts.customer) is None)
        return tuple(off)


class _Body(msgspec.Struct):
    event: str
    customer: dict[str, object]
    referral: dict[str, object] = {}
    loyalty: dict[str, object] = {}
    metadata: dict[str, object] = {}


@lru_cache(maxsize=256)
def trusted(origin: str, domains: tuple[str, ...]) -> bool:
    """Tell whether an origin is on the list of trusted domains.

    `.domain` covers its subdomains, `domain` itself alone, `*` everything; a pattern
    with a port wants that port ("Security" in Voucherify's documentation).
    """
    parsed = _ORIGIN.fullmatch(origin)
    if parsed is None:
        return False
    host = parsed["host"].lower()
    for domain in domains:
        pattern = domain.lower()
        if pattern == "*" or pattern in (host, host + (parsed["port"] or "")):
            return True
        if pattern.startswith(".") and host.endswith(pattern):
            return True
    return False


def _method(request: Request, only: str = "POST") -> Answer | None:
    if request.method == only:
        return None
    refusal = framework_error("method", 405)
    return refusal.with_headers((("Allow", only),))


def _media_types(request: Request) -> Answer | None:
    if not _takes_json(request.headers.get("accept", "*/*")):
        return framework_error("accept", 406)
    content_type = request.headers.get("content-type", "").partition(";")[0]
    if content_type.strip().lower() != "application/json":
        return framework_error("content_type", 415)
    return None


@lru_cache(maxsize=256)
def _takes_json(accept: str) -> bool:
    for part in accept.lower().split(","):
        media_range, *parameters = (piece.strip() for piece in part.split(";"))
        refused = any(re.fullmatch(r"q=0(\.0*)?", p) for p in parameters)
        if media_range in ("*/*", "application/*", "application/json") and not refused:
            return True
    return False
