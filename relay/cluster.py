"""What a call to Voucherify looks like: the cluster's address, its paths and headers.

Pure, and apart from who makes the calls (voucherify.py): a process that only takes
beacons needs this to check its settings, and no HTTP client.
"""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import SecretStr

from relay import __version__

Api = Literal["client", "server"]

EVENT_PATHS: dict[Api, str] = {"client": "/client/v1/events", "server": "/v1/events"}
# Voucherify's "Authentication" guide: publishable keys for the one, secret ones for
# the other.
KEY_HEADERS: dict[Api, tuple[str, str]] = {
    "client": ("X-Client-Application-Id", "X-Client-Token"),
    "server": ("X-App-Id", "X-App-Token"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A pair of keys: client-side ones for `client`, server-side ones for `server`."""

    app_id: str
    token: SecretStr


def event_headers(api: Api, origin: str | None, keys: Keys | None) -> dict[str, str]:
    """What every event is sent with, but for the bearer token."""
    headers = {
        # Voucherify's audit log shows and filters it as the channel.
        "X-Voucherify-Channel": f"relay:{__version__}",
        "User-Agent": f"voucherify-relay/{__version__}",
        "Content-Type": "application/json",
        "Accept": "application/json",
    }
    if api == "client":
        headers["origin"] = _header("origin", origin or "")
    if keys is not None:
        app_id, token = KEY_HEADERS[api]
        headers[app_id] = _header("application id", keys.app_id)
        headers[token] = _header(f"{api} token", keys.token.get_secret_value())
    return headers


def shown_request(
    *,
    base_url: str,
    api: Api,
    origin: str | None,
    keys: Keys | None,
    bearer: bool,
) -> tuple[str, dict[str, str]]:
    """The URL and the headers that an event is sent with, secrets masked."""
    headers = event_headers(api, origin, keys)
    if keys is not None:
        headers[KEY_HEADERS[api][1]] = "***"
    if bearer:
        headers["Authorization"] = "Bearer ***"
    return cluster_url(base_url) + EVENT_PATHS[api], headers


def _header(name: str, value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError(f"the {name} must be visible ASCII characters: copy it anew")
    return value


_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_URL = re.compile(rf"(https?)://({_LABEL}(?:\.{_LABEL})*|\[::1\])(:[1-9]\d{{0,4}})?/?")
_NO_NAME = re.compile(r".*voucherify\.io|localhost|(?:\d+\.){3}\d+")
_LOOPBACK = re.compile(r"localhost|\[::1\]|127(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}")


def cluster_url(cluster: str) -> str:
    """Give the base URL of a cluster, named in short or in full, or ValueError."""
    # The messages never show the value: it may hold a password by mistake.
    cure = (
        "write the cluster's name (api, us1.api, as1.api) or its address (https://host "
        "or https://host:port, no path; http:// only to 127.0.0.1, [::1] or localhost)"
    )
    url = cluster.lower() if cluster.isascii() else ""
    if "://" not in url and not _NO_NAME.fullmatch(url):
        url = f"https://{url}.voucherify.io"
    match = _URL.fullmatch(url)
    if match is None or int((match[3] or ":1")[1:]) > 65_535:
        raise ValueError(f"this is not a cluster: {cure}")
    scheme, host, port = match.groups()
    if scheme == "http" and not _LOOPBACK.fullmatch(host):
        raise ValueError(f"http:// would show the client token to others: {cure}")
    if f".{host}".endswith(".download.voucherify.io"):
        raise ValueError(f"a download host never takes events: {cure}")
    return f"{scheme}://{host}{port or ''}"
