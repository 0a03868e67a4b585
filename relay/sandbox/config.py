"""What the sandbox is told: credentials, limits, and a switch for every unknown.

Voucherify's documentation leaves some answers open. Each of them is a switch here
with a default and a comment; a client is ready for production when it copes with
both positions. Field names are wire format: the control route changes them by name.
"""

from typing import Literal

import msgspec

# Development credentials: they open nothing but a sandbox.
APPLICATION_ID = "sandbox-application"
CLIENT_TOKEN = "sandbox-token"  # noqa: S105  # opens nothing
SERVER_APP_ID = "sandbox-server-application"
SERVER_APP_TOKEN = "sandbox-server-token"  # noqa: S105  # opens nothing
OAUTH_APP_ID = "sandbox-oauth-application"
OAUTH_APP_SECRET = "sandbox-oauth-secret"  # noqa: S105  # opens nothing
PROJECT_ID = "proj_sandbox"
ORIGIN = "https://shop.example"

SECRETS = ("client_token", "server_app_token", "oauth_app_secret")

_KEEP = ("keep_requests", "keep_bytes", "keep_customers")

PropertyType = Literal["string", "number", "date", "datetime", "boolean"]
Policy = Literal["accept", "reject"]


class Property(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One metadata property of an event: Project Settings > Event Schema."""

    type: PropertyType
    optional: bool = False


class SandboxConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Everything a sandbox can be set to; an existing object is a valid one."""

    # Credentials
    application_id: str = APPLICATION_ID
    client_token: str = CLIENT_TOKEN
    server_app_id: str = SERVER_APP_ID
    server_app_token: str = SERVER_APP_TOKEN
    oauth_app_id: str = OAUTH_APP_ID
    oauth_app_secret: str = OAUTH_APP_SECRET
    project_id: str = PROJECT_ID
    # `.domain`: its subdomains; `domain`: itself alone; `*`: any.
    # Voucherify documentation, "Security".
    trusted_domains: tuple[str, ...] = ("shop.example", ".shop.example", "localhost")

    # Limits. None turns one off. "5 per 5 seconds" from one IP is what every version
    # of the "Limits" guide says of client-side calls; plan limits depend on the plan.
    client_limit: int | None = 5
    client_limit_seconds: float = 5.0
    per_minute: int | None = None
    per_hour: int | None = None
    per_cycle: int | None = None
    cycle_seconds: float = 30 * 86400.0
    client_limit_headers: bool = True  # Unknown: Retry-After on the per-IP 429?
    max_body_bytes: int = 10_485_760  # "Limits": the only size that is published.

    # OAuth ("Authentication" guide): tokens live 900 s, 1,000 of them at once.
    oauth_token_seconds: float = 900.0
    oauth_max_tokens: int = 1000

    # Event definitions by name, each with its metadata properties.
    events: dict[str, dict[str, Property]] = msgspec.field(default_factory=dict)

    # Project settings that gate client-side calls.
    client_loyalty_events_enabled: bool = True
    client_create_customer_enabled: bool = True

    # Switches: what the documentation does not say.
    when_disabled: Literal["refuse", "skip"] = "refuse"  # 403, or without the effect
    bad_origin_status: Literal[401, 403] = 401  # origin wrong or missing
    wrong_scope_status: Literal[401, 403] = 403  # a token that is not for events
    undefined_event: Policy = "accept"  # a name that is not in `events`
    empty_customer: Policy = "accept"  # neither id nor source_id
    unknown_fields: Literal["ignore", "reject"] = "ignore"
    null_fields: Policy = "reject"  # null where the schema has no null
    source_id_number: Literal["reject", "coerce"] = "reject"
    birthdate_format: Policy = "reject"  # a birthdate that is no YYYY-MM-DD
    keys_with_bearer: Policy = "accept"  # client keys and a token in one request
    origin_with_bearer: Literal["check", "ignore"] = "check"
    response_metadata: bool = True  # listed as required, absent from the example
    activity_delay_seconds: float = 0.0  # from an event until its activity is shown
    activity_shape: Literal["nested", "flat"] = "nested"  # of the event in it

    # Behaviour of this machine rather than of Voucherify.
    latency: float | tuple[float, float] = 0.0  # seconds, or a range of them
    seed: int | None = None  # for latency and ids; None: different each time
    keep_requests: int = 10_000
    keep_bytes: int = 64 * 1024 * 1024
    keep_customers: int = 100_000

    def __post_init__(self) -> None:
        faults = [*_low_numbers(self), *_bad_latency(self.latency)]
        if faults:
            raise ValueError("; ".join(faults))

    def __repr__(self) -> str:
        return f"SandboxConfig({self.shown()})"

    def shown(self) -> dict[str, object]:
        """Return every setting, with the secret ones masked."""
        named = {name: getattr(self, name) for name in self.__struct_fields__}
        return named | dict.fromkeys(SECRETS, "***")


def changed(config: SandboxConfig, changes: dict[str, object]) -> SandboxConfig:
    """Return `config` with `changes`; ValueError names the field and its cure."""
    known = SandboxConfig.__struct_fields__
    for name in changes:
        if name not in known:
            msg = f"{name}: no such setting; known are {', '.join(known)}"
            raise ValueError(msg)
    merged = {name: getattr(config, name) for name in known} | changes
    return msgspec.convert(msgspec.to_builtins(merged), SandboxConfig)


def _low_numbers(config: SandboxConfig) -> list[str]:
    limits = ("client_limit", "per_minute", "per_hour", "per_cycle")
    sizes = ("max_body_bytes", "oauth_max_tokens", *_KEEP)
    spans = ("client_limit_seconds", "cycle_seconds", "oauth_token_seconds")
    faults = [
        f"{name}: use 1 or more, or null for no limit"
        for name in limits
        if getattr(config, name) is not None and getattr(config, name) < 1
    ]
    faults += [f"{name}: use 1 or more" for name in sizes if getattr(config, name) < 1]
    if not config.activity_delay_seconds >= 0:
        faults.append("activity_delay_seconds: use 0 or more seconds")
    return faults + [
        f"{name}: use more than 0 seconds"
        for name in spans
        if not getattr(config, name) > 0
    ]


def _bad_latency(latency: float | tuple[float, float]) -> list[str]:
    low, high = latency_range(latency)
    if 0 <= low <= high:
        return []
    return ["latency: use seconds, or [least, most] with 0 <= least <= most"]


def latency_range(latency: float | tuple[float, float]) -> tuple[float, float]:
    """Return the bounds of a latency setting."""
    return latency if isinstance(latency, tuple) else (latency, latency)
