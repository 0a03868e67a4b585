"""What a setting may be: the type of each, with its parser and its complaint.

A parser takes the text of a variable; its `ValueError` says what is wrong and what to
write, never the value. The settings themselves are in `settings.py`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BeforeValidator, PlainSerializer, PlainValidator, SecretStr

from relay.addresses import TrustedProxies, parse_host
from relay.cluster import cluster_url
from relay.limits import Limit, Window, parse_budget, parse_duration, parse_limits
from relay.origins import AllowedOrigins, parse_upstream_origin

# Voucherify's documentation page "API overview" (endpoints of the shared clusters).
CLUSTERS = ("api", "us1.api", "as1.api")

# Where Voucherify's own clients send events.
SDK_PATH = "/client/v1/events"
# And where the snippet will be.
RESERVED_PATHS = (SDK_PATH, "/relay.js")

# A socket's path has 108 bytes on Linux and 104 on macOS and BSD, the last one NUL.
MAX_UDS_BYTES = 103

# Timeouts and pool sizes are the relay's own and must not be set behind its back.
REDIS_OPTIONS = frozenset(
    {"db", "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile"}
    | {"ssl_check_hostname", "ssl_keyfile"}
)

# HMAC-SHA256 is as strong as its key (RFC 2104, 3): what a person makes up is not.
MIN_KEY = 32
MAX_KEYS = 10


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


def _share(value: object) -> float:
    if not re.fullmatch(r"0(\.\d{1,3})?", str(value).strip()):
        raise ValueError("must be a share from 0 to 0.999, for example 0.2")
    return float(str(value))


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


def _app_id(text: str) -> str:
    if ":" in text:  # HTTP Basic has none in the name (RFC 7617, 2)
        raise ValueError("must have no colon")
    return _header_value(text)


def _origins(text: str) -> AllowedOrigins:
    return AllowedOrigins(split_words(text))


def _proxies(text: str) -> TrustedProxies:
    return TrustedProxies(split_words(text))


def _upstream_origin(text: str) -> str:
    return parse_upstream_origin(text) if text else ""


def _cluster(text: str) -> str:
    if text not in CLUSTERS:
        cluster_url(text)
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


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in words:
            return text
        msg = f"must be {', '.join(words[:-1])} or {words[-1]}"
        raise ValueError(msg)

    return parse


def _signing_keys(text: str) -> tuple[SecretStr, ...]:
    keys = split_words(text)
    if len(keys) > MAX_KEYS:
        msg = f"has {len(keys)} keys, {MAX_KEYS} are the most: leave old ones out"
        raise ValueError(msg)
    for position, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY or not re.fullmatch(r"[!-~]{1,512}", key):
            msg = (
                f"key {position}: must be {MIN_KEY} to 512 printable ASCII characters; "
                "`relay keygen` makes one"
            )
            raise ValueError(msg)
        if keys.index(key) != position - 1:
            msg = f"key {position}: is there already: keep one of them"
            raise ValueError(msg)
    return tuple(SecretStr(key) for key in keys)


def _file(text: str) -> Path | None:
    if not text:
        return None
    path = os.path.expanduser(text)
    if path.startswith("~") or not path.isprintable():
        raise ValueError("must be the path of a file")
    return Path(path).absolute()


def _scope(text: str) -> str:
    words = r"[!-~]+(?: [!-~]+)*"
    if text and (not re.fullmatch(words, text) or "," in text or len(text) > 512):
        raise ValueError("must be scopes with one blank between them, without commas")
    return text


def _dump_all(items: tuple[Limit | Window, ...]) -> list[dict[str, object]]:
    return [asdict(item) for item in items]


# What the fields are made of: the parser takes the text of the variable, and the
# serializer gives what a dump shows.
_AS_TEXT = PlainSerializer(str, return_type=str)
_AS_DICTS = PlainSerializer(_dump_all)
_HIDDEN = PlainSerializer(lambda keys: ["**********"] * len(keys))
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
AppId = Annotated[str, PlainValidator(_app_id)]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_optional_secret)]
UpstreamOrigin = Annotated[str, PlainValidator(_upstream_origin)]
Share = Annotated[float, PlainValidator(_share)]
Budget = Annotated[tuple[Window, ...], PlainValidator(parse_budget), _AS_DICTS]
LogFormat = Annotated[
    Literal["auto", "json", "console"],
    PlainValidator(_one_of("auto", "json", "console")),
]
SigningKeys = Annotated[tuple[SecretStr, ...], PlainValidator(_signing_keys), _HIDDEN]
Tokens = Annotated[
    Literal["off", "optional", "required", "dry_run"],
    PlainValidator(_one_of("off", "optional", "required", "dry_run")),
]
Anonymous = Annotated[
    Literal["auto", "trusted", "restricted"],
    PlainValidator(_one_of("auto", "trusted", "restricted")),
]
Gpc = Annotated[
    Literal["ignore", "strip", "drop"],
    PlainValidator(_one_of("ignore", "strip", "drop")),
]
Switch = Annotated[Literal["on", "off"], PlainValidator(_one_of("on", "off"))]
File = Annotated[Path | None, PlainValidator(_file)]
UpstreamApi = Annotated[
    Literal["client", "server"], PlainValidator(_one_of("client", "server"))
]
Auth = Annotated[
    Literal["keys", "oauth1", "oauth2", "keys+oauth1"],
    PlainValidator(_one_of("keys", "oauth1", "oauth2", "keys+oauth1")),
]
Scope = Annotated[str, PlainValidator(_scope)]


def split_words(text: str) -> list[str]:
    """The words of a list that blanks or commas separate."""
    return [word for word in re.split(r"[,\s]+", text) if word]
