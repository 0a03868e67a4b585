"""Every setting of the relay: read once, checked whole, handed on as plain values.

Settings come from the environment (`RELAY_…`), then from a `.env` file, which is
taken literally: no `$` is expanded. A secret may be in a file that `NAME_FILE`
names. Everything wrong is reported together, one line a variable, each with its
cure and none with its value. Only `load_settings` reads anything; a `Settings` is
frozen and shows no secret when it is printed or dumped.
"""

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from io import StringIO
from typing import Any

from dotenv.parser import parse_stream
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from relay.addresses import is_any, is_loopback
from relay.cluster import cluster_url
from relay.errors import SettingsError
from relay.limits import DEFAULT_LIMITS
from relay.values import (
    Anonymous,
    AppId,
    Auth,
    Budget,
    Cluster,
    Concurrency,
    Directory,
    File,
    Flag,
    Gpc,
    HeaderValue,
    Host,
    Limits,
    LogFormat,
    Name,
    OptionalSecret,
    Origins,
    PathPrefix,
    Port,
    Proxies,
    QueueMax,
    RedisUrl,
    Scope,
    Share,
    SigningKeys,
    Socket,
    Switch,
    Tokens,
    TrackPath,
    UpstreamApi,
    UpstreamOrigin,
    UpToDays,
    UpToHour,
)

PREFIX = "RELAY_"
ENV_FILE = "RELAY_ENV_FILE"

# Their values may come from the file that NAME_FILE names.
SECRETS = (
    "signing_keys",
    "client_token",
    "server_app_token",
    "oauth_app_secret",
    "redis_url",
    "ops_token",
)

# Part of the design, but not of this version.
LATER = re.compile(r"RELAY_DURABILITY")

# What a secret or a page of settings can be at most; a device file has no end.
MAX_FILE_BYTES = 256 * 1024

# By API. Client: 5 calls in 5 s from one address; server: the smallest plan has 100
# calls a minute (Voucherify's documentation page "Limits"). Both stay below.
DEFAULT_BUDGETS = {"client": "4/5s", "server": "90/1m"}


class Role(StrEnum):
    """Which part of the relay reads the settings, and so what must be there."""

    SERVE = "serve"  # the edge with its forwarder
    EDGE = "edge"  # the edge alone
    WORKER = "worker"  # the forwarder alone
    READ = "read"  # commands that look into Redis


_CLIENT_KEYS = ("client_application_id", "client_token")
_SERVER_KEYS = ("server_app_id", "server_app_token")
_SERVICE_KEY = ("oauth_app_id", "oauth_app_secret", "oauth_project_id", "oauth_scope")

# What each credential scheme needs, by RELAY_UPSTREAM_API and RELAY_AUTH. Tokens of
# the first kind of OAuth are made with the server's key, for either API.
CREDENTIALS: dict[tuple[str, str], tuple[str, ...]] = {
    ("client", "keys"): (*_CLIENT_KEYS, "origin"),
    ("client", "oauth1"): (*_SERVER_KEYS, "origin"),
    ("client", "oauth2"): (*_SERVICE_KEY, "origin"),
    ("client", "keys+oauth1"): (*_CLIENT_KEYS, *_SERVER_KEYS, "origin"),
    ("server", "keys"): _SERVER_KEYS,
    ("server", "oauth1"): _SERVER_KEYS,
    ("server", "oauth2"): _SERVICE_KEY,
    ("server", "keys+oauth1"): _SERVER_KEYS,
}


def required(role: Role, api: str = "client", auth: str = "keys") -> tuple[str, ...]:
    """The settings that must be there for a role and a credential scheme."""
    credentials = CREDENTIALS[api, auth]
    # It keys the digests that limits count by: all relays of a shop must share it.
    digests = digest_secret(api, auth)
    return {
        Role.SERVE: ("allowed_origins", *credentials),
        Role.EDGE: ("allowed_origins", digests),
        Role.WORKER: credentials,
        Role.READ: (),
    }[role]


def digest_secret(api: str, auth: str) -> str:
    """The secret that every relay of a shop has: the first one of its scheme."""
    return next(name for name in CREDENTIALS[api, auth] if name in SECRETS)


# Where to find what is missing. Voucherify's names: its documentation pages
# "Authentication" and "Security".
_CLIENT_SIDE = "Voucherify shows it in Project Settings, General, Client-Side Keys"
_APPLICATION = "Voucherify shows it in Project Settings, General, Application Keys"
_SERVICE = "Voucherify shows it with the OAuth Service key in Project Settings"
WHERE = {
    "allowed_origins": "Name every origin whose pages may send, separated by commas",
    "signing_keys": "Tokens are checked with it; `relay keygen` makes one",
    "client_application_id": _CLIENT_SIDE,
    "client_token": _CLIENT_SIDE,
    "server_app_id": _APPLICATION,
    "server_app_token": _APPLICATION,
    "oauth_app_id": _SERVICE,
    "oauth_app_secret": _SERVICE,
    "oauth_project_id": _SERVICE,
    "oauth_scope": "Name the permission for custom events that the key's role has",
    "origin": "It must be on the project's list in Voucherify: Project Settings, "
    "Client-side Settings",
    "cluster": "Voucherify shows the API endpoint in Project Settings, General",
}


def _setting(default: str, example: str, meaning: str) -> Any:
    """Declare a setting; its default is text and goes through its parser."""
    return Field(default, examples=[example], description=meaning)


class Settings(BaseSettings):
    """All settings, parsed. Durations are in seconds."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True
    )

    # The public listener.
    host: Host = _setting("127.0.0.1", "10.0.0.5", "Address of the public listener.")
    port: Port = _setting(
        "8000", "8080", "Port of the public listener; 0 takes a free one."
    )
    uds: Socket = _setting(
        "", "/run/relay/http.sock", "Unix socket to listen on instead."
    )
    track_path: TrackPath = _setting(
        "/track", "/shop-events", "Path of the beacons; ad blockers know usual ones."
    )
    path_prefix: PathPrefix = _setting("", "/relay", "Put before every public path.")
    allowed_origins: Origins = _setting(
        "",
        "https://shop.example, https://*.shop.example",
        "Origins whose pages may send: exact, or with `*.` for all subdomains.",
    )
    allow_no_origin: Flag = _setting(
        "false", "true", "Whether to take requests that carry no `Origin`."
    )
    trusted_proxies: Proxies = _setting(
        "",
        "loopback, 10.0.0.0/8",
        "Proxies whose `X-Forwarded-For` counts: networks, `unix`, `loopback`, "
        "`private`.",
    )

    # Admission.
    limits: Limits = _setting(
        DEFAULT_LIMITS,
        "ip=120/1m burst 60, site=20000/1m burst 5000 dry_run",
        "Rate limits by `ip`, `customer`, `site`; `dry_run` only counts; `off`: none.",
    )
    queue_max: QueueMax = _setting(
        "1000000", "200000", "Events that may wait before new ones are refused."
    )
    dedupe_window: UpToDays = _setting(
        "72h",
        "96h",
        "How long an id that a sender gave is remembered; never less than `RELAY_TTL`.",
    )

    # Who may say what.
    tokens: Tokens = _setting(
        "optional",
        "required",
        "Whether an event needs a signed token: `off`, `optional`, `required`, "
        "`dry_run`.",
    )
    signing_keys: SigningKeys = _setting(
        "",
        "last-year-a-key-of-32-characters, this-year-a-key-of-32-characters",
        "Keys of the tokens, oldest to newest: the last signs, all of them count.",
    )
    token_ttl: UpToDays = _setting(
        "24h", "1h", "How long a token counts that does not say so itself."
    )
    anonymous: Anonymous = _setting(
        "auto",
        "restricted",
        "What a sender without a token may set: `trusted` all, `restricted` only who "
        "it is, `auto`.",
    )
    catalog: File = _setting(
        "", "/etc/relay/catalog.toml", "File that says which event may carry what."
    )
    gpc: Gpc = _setting(
        "ignore",
        "strip",
        "What `Sec-GPC: 1` does: `ignore`, `strip` metadata and profile, `drop`.",
    )

    snippet: Switch = _setting(
        "on",
        "off",
        "`off` stops the snippet in every page at its next answer.",
    )

    # Storage.
    redis_url: RedisUrl = _setting(
        "",
        "redis://:password@redis.internal:6379/0",
        "Redis or Valkey to use; without it the relay runs a private one.",
    )
    redis_prefix: Name = _setting(
        "relay", "relay-staging", "First part of every key in Redis."
    )
    data_dir: Directory = _setting(
        "~/.local/state/relay",
        "/var/lib/relay",
        "Where the private server keeps its data; in `$XDG_STATE_HOME` if that is set.",
    )

    # Voucherify.
    cluster: Cluster = _setting(
        "api",
        "us1.api",
        "Cluster: `api`, `us1.api`, `as1.api`, another name or a full https URL.",
    )
    upstream_api: UpstreamApi = _setting(
        "client",
        "server",
        "Voucherify's API to use: `client` counts calls by address, `server` does not.",
    )
    auth: Auth = _setting(
        "keys",
        "oauth1",
        "Credentials to use there: `keys`, `oauth1`, `oauth2` or `keys+oauth1`.",
    )
    client_application_id: HeaderValue = _setting(
        "",
        "11111111-2222-3333-4444-555555555555",
        "Application ID of the project's client-side keys.",
    )
    client_token: OptionalSecret = _setting(
        "",
        "66666666-7777-8888-9999-000000000000",
        "Token of the project's client-side keys.",
    )
    server_app_id: HeaderValue = _setting(
        "",
        "11111111-2222-3333-4444-666666666666",
        "Application ID of the project's server-side keys, for `server` or `oauth1`.",
    )
    server_app_token: OptionalSecret = _setting(
        "",
        "66666666-7777-8888-9999-111111111111",
        "Secret of the project's server-side keys.",
    )
    oauth_app_id: AppId = _setting(
        "",
        "11111111-2222-3333-4444-777777777777",
        "Application ID of an OAuth Service key, for `oauth2`.",
    )
    oauth_app_secret: OptionalSecret = _setting(
        "", "66666666-7777-8888-9999-222222222222", "Secret of the OAuth Service key."
    )
    oauth_project_id: HeaderValue = _setting(
        "", "proj_Zs1XC0v9eS", "Project that tokens of the OAuth Service key are for."
    )
    oauth_scope: Scope = _setting(
        "",
        "client_events",
        "Scope of the tokens; `oauth1` has a default of its own for each API.",
    )
    origin: UpstreamOrigin = _setting(
        "",
        "shop.example",
        "Origin shown to Voucherify; it must be on the project's list.",
    )
    upstream_budget: Budget = _setting(
        DEFAULT_BUDGETS["client"],
        "4/5s, 90/1m, 95000/30d",
        "Calls to Voucherify in each window, all of them kept; `off` for no limit.",
    )
    upstream_reserve: Share = _setting(
        "0.2",
        "0.4",
        "Share of the plan's calls that is left to others, as the shop's checkout.",
    )
    egress: Name = _setting(
        "all", "nat-1", "Name of the outgoing address; who shares it shares the budget."
    )
    concurrency: Concurrency = _setting(
        "32", "64", "Calls to Voucherify at once, for each forwarder."
    )
    ttl: UpToDays = _setting(
        "72h", "24h", "How long an event is tried before it counts as expired."
    )
    drain_timeout: UpToHour = _setting(
        "10s", "25s", "Time to finish what is under way when the relay is stopped."
    )

    # Operation.
    ops_host: Host = _setting("127.0.0.1", "10.0.0.5", "Address of the ops listener.")
    ops_port: Port = _setting(
        "9000", "9100", "Port of the ops listener; 0 takes a free one."
    )
    ops_token: OptionalSecret = _setting(
        "", "a-long-random-text", "Bearer token of the ops listener, if off loopback."
    )
    log_format: LogFormat = _setting(
        "auto", "json", "`json`, `console`, or `auto`: console on a terminal."
    )

    _warnings: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each setting that stops nothing but should be looked at."""
        return self._warnings

    @property
    def upstream_url(self) -> str:
        """The base URL of the Voucherify cluster."""
        return cluster_url(self.cluster)

    @property
    def digest_secret(self) -> str:
        """The secret that all relays of a shop share."""
        secret: SecretStr | None = getattr(
            self, digest_secret(self.upstream_api, self.auth)
        )
        return secret.get_secret_value() if secret is not None else ""

    @property
    def restricted(self) -> bool:
        """Whether a sender without a token may say only who the customer is."""
        if self.anonymous == "auto":
            return bool(self.signing_keys)
        return self.anonymous == "restricted"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only what `load_settings` has read: it can name where a fault is."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def variable(field: str) -> str:
    """Give the name of the environment variable of a setting."""
    return PREFIX + field.upper()


KNOWN = frozenset(
    {ENV_FILE}
    | {variable(field) for field in Settings.model_fields}
    | {variable(field) + "_FILE" for field in SECRETS}
)


def load_settings(
    role: Role, environ: Mapping[str, str] | None = None, **overrides: object
) -> Settings:
    """Read the settings for `role`, or raise SettingsError with every fault.

    `overrides` are settings by field name, as a command line gives them: they win,
    and `None` is not given. `environ` stands in for the process's environment.
    """
    environ = os.environ if environ is None else environ
    faults: dict[str, str] = {}
    variables = _read_variables(environ, faults)
    for field, value in overrides.items():
        if field not in Settings.model_fields:
            msg = f"load_settings() has no setting {field!r}"
            raise TypeError(msg)
        if value is not None:
            variables[variable(field)] = _as_text(value)
            variables.pop(variable(field) + "_FILE", None)
    given = _read_values(variables, faults)
    given.setdefault("data_dir", _state_directory(environ))
    if given.get("upstream_api") == "server":
        given.setdefault("upstream_budget", DEFAULT_BUDGETS["server"])
    settings = _validated(given, variables, faults)
    for name, problem in _rules(settings, role, variables, faults):
        faults.setdefault(name, problem)
    if faults:
        raise SettingsError(_lines(faults))
    settings._warnings = (*_unknown(variables), *_doubts(settings, role))
    return settings


def _read_variables(
    environ: Mapping[str, str], faults: dict[str, str]
) -> dict[str, str]:
    """Merge environment and `.env`; what is set to nothing is there, and empty."""
    variables = _read_env_file(environ.get(ENV_FILE, "").strip(), faults)
    variables |= {n: text for n, text in environ.items() if n.startswith(PREFIX)}
    return {name: text.strip() for name, text in variables.items()}


def _read_env_file(path: str, faults: dict[str, str]) -> dict[str, str]:
    try:
        content = _read_text(path or ".env")
    except (FileNotFoundError, IsADirectoryError) as error:
        if path:  # Nobody asked for the default one.
            faults[ENV_FILE] = _unreadable(path, error)
        return {}
    except (OSError, ValueError) as error:
        faults[ENV_FILE] = _unreadable(path or "./.env", error)
        return {}
    variables: dict[str, str] = {}
    for line in parse_stream(StringIO(content)):
        if line.key and line.value is not None:
            if line.key.startswith(PREFIX):
                variables[line.key] = line.value
        elif (line.error or line.key) and PREFIX in line.original.string:
            msg = f"line {line.original.line} of the file is not NAME=value"
            faults.setdefault(ENV_FILE, msg)
    return variables


def _read_values(
    variables: Mapping[str, str], faults: dict[str, str]
) -> dict[str, str]:
    """Give the text of each setting that is set, from its variable or its file."""
    given: dict[str, str] = {}
    for field in Settings.model_fields:
        name = variable(field)
        text = variables.get(name, "")
        path = variables.get(name + "_FILE", "") if field in SECRETS else ""
        if text and path:
            faults[name] = f"is set, and {name}_FILE too: keep one of them"
        elif path:
            try:
                given[field] = _read_text(path).strip()
            except (OSError, ValueError) as error:
                faults[name + "_FILE"] = _unreadable(path, error)
            else:
                if not given[field]:
                    faults[name + "_FILE"] = f"{_shown(path)} is empty"
        elif text:
            given[field] = text
    return given


def _read_text(path: str) -> str:
    with open(os.path.expanduser(path), "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError("too large")
    return content.decode("utf-8-sig")


def _unreadable(path: str, error: OSError | ValueError) -> str:
    why = error.strerror if isinstance(error, OSError) else "not a small UTF-8 text"
    return f"{_shown(path)} cannot be read ({why}): correct the path or the file"


def _shown(path: str) -> str:
    # What does not look like a path may be the secret itself, in the wrong variable.
    return path if path.startswith(("/", "./", "../", "~/")) else "the file it names"


def _as_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value).strip()


def _state_directory(environ: Mapping[str, str]) -> str:
    # XDG base directories: a relative one is to be ignored.
    state = environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):
        return f"{state}/relay"
    home = environ.get("HOME") or os.path.expanduser("~")
    # A user without a home has none in containers; /var/lib is the system's (FHS).
    return f"{home}/.local/state/relay" if home.startswith("/") else "/var/lib/relay"


def _validated(
    given: dict[str, str], variables: Mapping[str, str], faults: dict[str, str]
) -> Settings:
    """Parse; note what is faulty and take the default in its place."""
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    for detail in details:
        field = str(detail["loc"][0])
        name = variable(field)
        if field in SECRETS and not variables.get(name):
            name += "_FILE"
        text = given.pop(field)
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
        problem = "leave out the quotes around it" if quoted else detail["ctx"]["error"]
        faults[name] = str(problem)
    given.setdefault("data_dir", os.sep)  # its default may be what is faulty
    return Settings.model_validate(given)


def _rules(
    settings: Settings,
    role: Role,
    variables: Mapping[str, str],
    faults: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """Say what is missing for this role, and what does not go together."""

    def is_set(field: str) -> bool:
        name = variable(field)
        return any(
            variables.get(source, "").strip(", \t\r\n")
            for source in (name, name + "_FILE")
        )

    for field in required(role, settings.upstream_api, settings.auth):
        if not is_set(field):
            yield variable(field), f"is missing. {WHERE[field]}"
    if role is Role.READ:
        return
    edge = role is not Role.WORKER
    if (
        edge
        and settings.tokens in ("required", "dry_run")
        and not is_set("signing_keys")
    ):
        yield (
            "RELAY_SIGNING_KEYS",
            f"is missing, and RELAY_TOKENS is {settings.tokens}. "
            f"{WHERE['signing_keys']}",
        )
    if not is_loopback(settings.ops_host) and not is_set("ops_token"):
        yield "RELAY_OPS_TOKEN", "is missing, and RELAY_OPS_HOST is not loopback"
    if (
        edge
        and settings.uds is None
        and settings.port == settings.ops_port != 0
        and (
            settings.host == settings.ops_host
            or is_any(settings.host)
            or is_any(settings.ops_host)
        )
        and "RELAY_PORT" not in faults
    ):
        yield "RELAY_OPS_PORT", "is the port of the public listener: take another"


def _lines(faults: Mapping[str, str]) -> list[str]:
    examples = {ENV_FILE: f"{ENV_FILE}=/etc/relay/relay.env"}
    for field, info in Settings.model_fields.items():
        name = variable(field)
        example = f"{name}={(info.examples or [''])[0]}"
        if field in SECRETS:
            examples[name + "_FILE"] = f"{name}_FILE=/run/secrets/{name.lower()}"
            example = examples[name + "_FILE"]
        examples[name] = example
    return [
        f"{name}: {faults[name]}. Example: {example}"
        for name, example in examples.items()
        if name in faults
    ]


def _unknown(variables: Mapping[str, str]) -> Iterator[str]:
    for name in variables:
        if name in KNOWN:
            continue
        shown = ascii(name)[1:-1][:80]
        if LATER.fullmatch(name):
            yield f"{shown}: this version does not use it yet, so it has no effect."
            continue
        # Without the prefix, which would make all names alike.
        rests = {known.removeprefix(PREFIX): known for known in sorted(KNOWN)}
        nearest = get_close_matches(name.removeprefix(PREFIX), rests, n=1, cutoff=0)
        yield (
            f"{shown}: not a setting of the relay, so it has no effect. "
            f"The nearest one is {rests[nearest[0]]}."
        )


def _doubts(settings: Settings, role: Role) -> Iterator[str]:
    if role in (Role.SERVE, Role.EDGE):
        yield from _doubts_about_senders(settings)
    if settings.allowed_origins.any:
        yield "RELAY_ALLOWED_ORIGINS: * lets the pages of any site send events."
    if settings.uds and not settings.trusted_proxies.trusts(None):
        yield (
            "RELAY_TRUSTED_PROXIES: without unix in it, everyone who comes through "
            "RELAY_UDS counts as one address, and shares one limit."
        )


# Said at the start, and when a catalogue makes it so.
STRANGERS = (
    "RELAY_ANONYMOUS: senders without a token are trusted, so any visitor can "
    "overwrite a customer's profile and mint points. Set RELAY_SIGNING_KEYS "
    "and give pages tokens, or set RELAY_ANONYMOUS=restricted."
)


def _doubts_about_senders(settings: Settings) -> Iterator[str]:
    # With a catalogue that is for whoever has read it.
    open_to_all = not settings.restricted and settings.tokens != "required"
    if open_to_all and settings.catalog is None:
        yield STRANGERS
    if settings.tokens == "dry_run" and settings.restricted:
        yield (
            "RELAY_TOKENS: dry_run refuses nothing by itself, but what comes without "
            "a token is restricted. For a trial set RELAY_ANONYMOUS=trusted as well."
        )
    if settings.tokens == "off" and settings.signing_keys:
        yield "RELAY_TOKENS: off, so RELAY_SIGNING_KEYS has no effect on events."
