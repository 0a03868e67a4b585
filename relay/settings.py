"""Every setting of the relay: read once, checked whole, handed on as plain values.

Settings come from the environment (`RELAY_…`), then from a `.env` file, which is
taken literally: no `$` is expanded. A secret may be in a file that `NAME_FILE`
names. Everything wrong is reported together, one line a variable, each with its
cure and none with its value. Only `load_settings` reads anything; a `Settings` is
frozen and shows no secret when it is printed or dumped.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from dotenv.parser import parse_stream
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from relay.addresses import TrustedProxies, is_any, is_loopback, parse_host
from relay.errors import SettingsError
from relay.limits import (
    DEFAULT_LIMITS,
    Limit,
    Window,
    parse_budget,
    parse_duration,
    parse_limits,
)
from relay.origins import AllowedOrigins, parse_upstream_origin

PREFIX = "RELAY_"
ENV_FILE = "RELAY_ENV_FILE"

# Their values may come from the file that NAME_FILE names.
SECRETS = ("client_token", "redis_url", "ops_token")

# Part of the design, but not of this version.
LATER = re.compile(
    r"RELAY_(?:CATALOG|TOKENS|SIGNING_KEYS|ANONYMOUS|UPSTREAM_API|UPSTREAM_RESERVE|AUTH"
    r"|DURABILITY|SERVER_APP_ID|SERVER_APP_TOKEN|OAUTH_[A-Z0-9_]+)(?:_FILE)?"
)

# Voucherify's documentation page "API overview" (endpoints of the shared clusters).
CLUSTERS = ("api", "us1.api", "as1.api")

# The snippet and the SDK route live there.
RESERVED_PATHS = ("/client/v1/events", "/relay.js")

# A socket's path has 108 bytes on Linux and 104 on macOS and BSD, the last one NUL.
MAX_UDS_BYTES = 103

# What a secret or a page of settings can be at most; a device file has no end.
MAX_FILE_BYTES = 256 * 1024

# Timeouts and pool sizes are the relay's own and must not be set behind its back.
REDIS_OPTIONS = frozenset(
    {"db", "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile"}
    | {"ssl_check_hostname", "ssl_keyfile"}
)


class Role(StrEnum):
    """Which part of the relay reads the settings, and so what must be there."""

    SERVE = "serve"  # the edge with its forwarder
    EDGE = "edge"  # the edge alone
    WORKER = "worker"  # the forwarder alone
    READ = "read"  # commands that look into Redis


REQUIRED = {
    Role.SERVE: ("allowed_origins", "client_application_id", "client_token", "origin"),
    # The token keys the digests that limits count by: all relays must share it.
    Role.EDGE: ("allowed_origins", "client_token"),
    Role.WORKER: ("client_application_id", "client_token", "origin"),
    Role.READ: (),
}

# Where to find what is missing. Voucherify's names: its documentation pages
# "Authentication" and "Security".
WHERE = {
    "allowed_origins": "Name every origin whose pages may send, separated by commas",
    "client_application_id": "Voucherify shows it in Project Settings, General, "
    "Client-Side Keys",
    "client_token": "Voucherify shows it in Project Settings, General, "
    "Client-Side Keys",
    "origin": "It must be on the project's list in Voucherify: Project Settings, "
    "Client-side Settings",
}


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,15}", text) and least <= int(text) <= most:
            return int(text)
        msg = f"must be a whole number from {least} to {most}"
        raise ValueError(msg)

    return parse


def _port(text: str) -> int:
    if text.startswith("tcp://"):
        # https://kubernetes.io/docs/concepts/services-networking/service (discovery)
        raise ValueError(
            "was set by Kubernetes for a Service named relay: say enableServiceLinks: "
            "false in the pod, or rename the Service"
        )
    return _whole(0, 65535)(text)


def _seconds(most: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        seconds = parse_duration(text)
        if not 1 <= seconds <= parse_duration(most):
            msg = f"must be from 1s to {most}"
            raise ValueError(msg)
        return seconds

    return parse


def _flag(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError("must be true or false")


def _uds(text: str) -> str | None:
    if len(os.fsencode(text)) > MAX_UDS_BYTES or not text.isprintable():
        msg = f"must be a path of at most {MAX_UDS_BYTES} bytes"
        raise ValueError(msg)
    return text or None


def _path(text: str) -> str:
    # RFC 3986 path characters; braces would be parameters of a route, and browsers
    # resolve dot segments before they send.
    if (
        not re.fullmatch(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]+)+", text)
        or len(text) > 200
        or {".", ".."} & set(text.split("/"))
    ):
        raise ValueError(
            "must start with / and be a plain path: letters, digits and - . _ ~, no "
            "spaces, ?, #, % or //, no slash at the end, at most 200 characters"
        )
    return text


def _track_path(text: str) -> str:
    if _path(text) in RESERVED_PATHS:
        raise ValueError("is the path of another route of the relay: choose another")
    return text


def _path_prefix(text: str) -> str:
    return _path(text) if text else ""


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", text):
        raise ValueError("must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return text


def _header_value(text: str) -> str:
    if not re.fullmatch(r"[!-~]{0,512}", text):
        raise ValueError("must be at most 512 printable ASCII characters, no spaces")
    return text


def _origins(text: str) -> AllowedOrigins:
    return AllowedOrigins(_words(text))


def _proxies(text: str) -> TrustedProxies:
    return TrustedProxies(_words(text))


def _upstream_origin(text: str) -> str:
    return parse_upstream_origin(text) if text else ""


def _cluster_url(text: str) -> str:
    # httpx and its transport take half a second to import, and commands that only
    # read, or an edge alone, can do without them.
    from relay.voucherify import cluster_url

    return cluster_url(text)


def _cluster(text: str) -> str:
    if text not in CLUSTERS:
        _cluster_url(text)
    return text


def _directory(text: str) -> Path:
    path = os.path.expanduser(text)
    if not path or path.startswith("~") or not path.isprintable():
        raise ValueError("must be the path of a directory, from the root or your home")
    return Path(path).absolute()


def _redis_url(text: str) -> SecretStr | None:
    if not text:
        return None
    # redis-py reads the same parts but drops in silence what it cannot use.
    try:
        url = urlsplit(text)
        port_ok = url.port != 0
        options = dict(parse_qsl(url.query, keep_blank_values=True))
    except ValueError:
        port_ok, options = False, {}
    if not port_ok or not re.fullmatch(r"[!-~]+", text) or url.fragment:
        raise ValueError(
            "is not a URL: percent-encode special characters in the password "
            "(# as %23, / as %2F, @ as %40)"
        )
    if url.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must start with redis://, rediss:// or unix://")
    if url.scheme == "unix":
        if url.hostname or not url.path.strip("/"):
            raise ValueError("needs a path after unix://, with three slashes in all")
    elif not url.hostname:
        raise ValueError("needs a host after the //")
    elif not re.fullmatch(r"/?[0-9]{0,5}", url.path):
        raise ValueError("may have only the number of a database after the host")
    if not options.keys() <= REDIS_OPTIONS:
        msg = f"may have only these options: {', '.join(sorted(REDIS_OPTIONS))}"
        raise ValueError(msg)
    if not re.fullmatch(r"[0-9]{1,5}", options.get("db", "0")):
        raise ValueError("needs a number as its db")
    return SecretStr(text)


def _secret(text: str) -> SecretStr:
    return SecretStr(_header_value(text))


def _optional_secret(text: str) -> SecretStr | None:
    return _secret(text) if text else None


def _log_format(text: str) -> str:
    if text not in ("auto", "json", "console"):
        raise ValueError("must be auto, json or console")
    return text


def _dump_all(items: tuple[Limit | Window, ...]) -> list[dict[str, object]]:
    return [asdict(item) for item in items]


# What the fields are made of: the parser takes the text of the variable, and the
# serializer gives what a dump shows.
_AS_TEXT = PlainSerializer(str, return_type=str)
_AS_DICTS = PlainSerializer(_dump_all)
Host = Annotated[str, PlainValidator(parse_host)]
Port = Annotated[int, PlainValidator(_port)]
Socket = Annotated[str | None, PlainValidator(_uds)]
TrackPath = Annotated[str, PlainValidator(_track_path)]
PathPrefix = Annotated[str, PlainValidator(_path_prefix)]
Origins = Annotated[AllowedOrigins, PlainValidator(_origins), _AS_TEXT]
Flag = Annotated[bool, PlainValidator(_flag)]
Proxies = Annotated[TrustedProxies, PlainValidator(_proxies), _AS_TEXT]
Limits = Annotated[tuple[Limit, ...], PlainValidator(parse_limits), _AS_DICTS]
QueueMax = Annotated[int, PlainValidator(_whole(1, 1_000_000_000))]
Concurrency = Annotated[int, PlainValidator(_whole(1, 256))]
UpToDays = Annotated[int, PlainValidator(_seconds("30d"))]
UpToHour = Annotated[int, PlainValidator(_seconds("1h"))]
RedisUrl = Annotated[SecretStr | None, BeforeValidator(_redis_url)]
Name = Annotated[str, PlainValidator(_name)]
Directory = Annotated[Path, PlainValidator(_directory)]
Cluster = Annotated[str, PlainValidator(_cluster)]
HeaderValue = Annotated[str, PlainValidator(_header_value)]
Secret = Annotated[SecretStr, BeforeValidator(_secret)]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_optional_secret)]
UpstreamOrigin = Annotated[str, PlainValidator(_upstream_origin)]
Budget = Annotated[tuple[Window, ...], PlainValidator(parse_budget), _AS_DICTS]
LogFormat = Annotated[Literal["auto", "json", "console"], PlainValidator(_log_format)]


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
    client_application_id: HeaderValue = _setting(
        "",
        "11111111-2222-3333-4444-555555555555",
        "Application ID of the project's client-side keys.",
    )
    client_token: Secret = _setting(
        "",
        "66666666-7777-8888-9999-000000000000",
        "Token of the project's client-side keys.",
    )
    origin: UpstreamOrigin = _setting(
        "",
        "shop.example",
        "Origin shown to Voucherify; it must be on the project's list.",
    )
    upstream_budget: Budget = _setting(
        "4/5s",
        "4/5s, 90/1m, 95000/30d",
        "Calls to Voucherify in each window, all of them kept; `off` for no limit.",
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
        return _cluster_url(self.cluster)

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
    settings = _validated(given, variables, faults)
    for name, problem in _rules(settings, role, variables, faults):
        faults.setdefault(name, problem)
    if faults:
        raise SettingsError(_lines(faults))
    settings._warnings = (*_unknown(variables), *_doubts(settings))
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

    for field in REQUIRED[role]:
        if not is_set(field):
            yield variable(field), f"is missing. {WHERE[field]}"
    if role is Role.READ:
        return
    if not is_loopback(settings.ops_host) and not is_set("ops_token"):
        yield "RELAY_OPS_TOKEN", "is missing, and RELAY_OPS_HOST is not loopback"
    if (
        role is not Role.WORKER
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


def _doubts(settings: Settings) -> Iterator[str]:
    if settings.allowed_origins.any:
        yield "RELAY_ALLOWED_ORIGINS: * lets the pages of any site send events."
    if settings.uds and not settings.trusted_proxies.trusts(None):
        yield (
            "RELAY_TRUSTED_PROXIES: without unix in it, everyone who comes through "
            "RELAY_UDS counts as one address, and shares one limit."
        )


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]
