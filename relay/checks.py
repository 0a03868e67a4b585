"""What would lose events or money, found before it does: `relay check`.

Looks at the settings, the catalogue, Redis, the cluster and the last day's counters.
Sends no event and asks for no access token: the cluster is asked with a preflight, so
credentials are judged by their shape alone. What is away is said once, and the rest is
still checked. No finding holds a secret.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import urlsplit

from relay.addresses import TrustedProxies, is_loopback
from relay.assembly import make_catalog, trusts_strangers
from relay.catalog import Catalog
from relay.errors import SettingsError
from relay.findings import Finding
from relay.grants import EVENT_SCOPES
from relay.limits import most_calls
from relay.probes import look_at_cluster, look_at_redis, on_loopback
from relay.settings import WHERE, Role, Settings, load_settings

# Voucherify's "Limits": 5 client-side calls in 5 s from one address.
CLIENT_CALLS, CLIENT_MS = 5, 5_000
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

# RFC 1918, RFC 4193, and names that mean a host of one's own network: a single word,
# or what RFC 6762, RFC 8375 and ICANN (board resolution of 29 July 2024) keep private.
_OWN_NETWORK = TrustedProxies(["loopback", "private"])
# A star before a single name, or before two of which the first is of a registry's kind.
_WIDE = re.compile(
    r"https?://\*\.(?!localhost\b)(?:[^.:]+|(?:com?|org|net|gov|edu|ac)\.[a-z]{2})(?::\d+)?"
)
_OWN_NAME = re.compile(r"[^.:]+|.+\.(?:internal|local|lan|home\.arpa|localhost)")


async def check(
    environ: Mapping[str, str] | None = None,
    *,
    now: Callable[[], float] = time.time,
) -> list[Finding]:
    """Find what is wrong or doubtful, the worst first."""
    try:
        settings = load_settings(Role.SERVE, environ)
        catalog = make_catalog(settings).catalog
    except SettingsError as error:
        return [*_of_settings(error)]  # nothing else can be judged without them
    found = [
        *_doubts(settings, catalog.warnings),
        *_senders(settings, catalog),
        *_origin(settings),
        *_plain_http(settings),
        *_credentials(settings),
        *_budget(settings),
        *_look_ups(settings, catalog),
    ]
    for more in await asyncio.gather(
        look_at_cluster(settings, now), look_at_redis(settings, now)
    ):
        found += more
    ranks = {"fault": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: ranks[finding.level])


# --- the settings ---------------------------------------------------------------------


def _of_settings(error: SettingsError) -> Iterator[Finding]:
    for fault in error.faults:
        about, _, said = fault.partition(": ")
        detail, _, cure = said.partition(". ")
        yield Finding(
            level="fault",
            code="setting",
            about=about,
            detail=f"{detail.removesuffix('.')}.",
            cure=_with_screen(cure or "Correct it: docs/settings.md.", about),
        )


def _with_screen(cure: str, about: str) -> str:
    """A cure that says where the setting is found in Voucherify, if it is there."""
    field = about.removeprefix("RELAY_").removesuffix("_FILE").lower()
    where = WHERE.get(field, "")
    if "Project Settings" not in where or where in cure:
        return cure
    return f"{cure.removesuffix('.')}. {where}."


def _doubts(settings: Settings, catalog: Iterable[str]) -> Iterator[Finding]:
    for warning in settings.warnings:
        about, _, detail = warning.partition(": ")
        # These two have findings of their own, which say more.
        if about not in ("RELAY_ANONYMOUS", "RELAY_ALLOWED_ORIGINS"):
            yield Finding(
                level="warning",
                code="setting_doubtful",
                about=about,
                detail=detail,
                cure="See docs/settings.md.",
            )
    for warning in catalog:
        yield Finding(
            level="warning",
            code="catalog_doubtful",
            about="RELAY_CATALOG",
            detail=warning,
            cure="See docs/catalog.md.",
        )


def _senders(settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    trusted = trusts_strangers(settings, catalog)
    if trusted:
        first = (
            "Leave RELAY_ANONYMOUS out, or set it to restricted: there are keys for "
            "tokens already."
            if settings.signing_keys
            else "Set RELAY_SIGNING_KEYS (relay keygen) and give pages tokens, or set "
            "RELAY_ANONYMOUS=restricted; or say that it is meant with "
            "RELAY_ANONYMOUS=trusted."
        )
        # Points are money; but who has said `trusted` has decided.
        yield Finding(
            level="warning" if settings.anonymous == "trusted" else "fault",
            code="anonymous_trusted",
            about="RELAY_ANONYMOUS",
            detail="Any visitor can overwrite a customer's profile, send any event "
            "for any customer, and mint points with loyalty and referral.",
            cure=f"{first} In Voucherify: Project Settings, Client-side Settings, "
            "leave the switch for loyalty events off until then.",
        )
    if settings.allowed_origins.any:
        yield Finding(
            level="fault" if trusted else "warning",
            code="any_origin",
            about="RELAY_ALLOWED_ORIGINS",
            detail="* lets the pages of any site send events to this shop.",
            cure="Name the shop's own origins.",
        )
    wide = [p for p in settings.allowed_origins.patterns if _WIDE.fullmatch(p)]
    if wide:
        yield Finding(
            level="fault" if trusted else "warning",
            code="any_origin",
            about="RELAY_ALLOWED_ORIGINS",
            detail=f"{', '.join(wide)} lets the pages of strangers' sites send events.",
            cure="Name the shop's own domain behind the star.",
        )
    if settings.tokens == "dry_run":
        yield Finding(
            level="note",
            code="tokens_dry_run",
            about="RELAY_TOKENS",
            detail="Nothing is refused for want of a token yet.",
            cure="Look at would_refuse:token in relay stats --json, then set required.",
        )
    if settings.signing_keys and settings.ops_token is None:
        yield Finding(
            level="warning",
            code="ops_without_token",
            about="RELAY_OPS_TOKEN",
            detail="Whatever reaches the ops listener under a name of this machine may "
            "have tokens made; behind a proxy that is everybody.",
            cure="Set RELAY_OPS_TOKEN (relay keygen), and let no proxy pass requests "
            "to the ops listener.",
        )
    if settings.signing_keys and settings.tokens != "off" and settings.catalog is None:
        yield Finding(
            level="note",
            code="no_catalog",
            about="RELAY_CATALOG",
            detail="There is no catalogue, so whoever has a token may send any event "
            "for its customer, loyalty and referral included.",
            cure="Say which event may carry what: docs/catalog.md.",
        )


def _origin(settings: Settings) -> Iterator[Finding]:
    """Whether the origin shown to Voucherify is one that pages come from."""
    patterns = settings.allowed_origins.patterns
    if settings.origin.startswith("http://") and any(
        pattern.startswith("https://") for pattern in patterns
    ):
        yield Finding(
            level="warning",
            code="http_origin",
            about="RELAY_ORIGIN",
            detail="It says http, and the shop's pages are https: Voucherify compares "
            "it with the project's list.",
            cure="Write it with https. In Voucherify: Project Settings, Client-side "
            "Settings has the list.",
        )
    if settings.upstream_api != "client" or settings.allowed_origins.any:
        return
    shown = _host(settings.origin)
    pages = [_host(o).removeprefix("*.") for o in settings.allowed_origins.patterns]
    if any(
        f".{a}".endswith(f".{b}") for p in pages for a, b in ((p, shown), (shown, p))
    ):
        return
    yield Finding(
        level="note",
        code="origin_elsewhere",
        about="RELAY_ORIGIN",
        detail=f"{shown} is shown to Voucherify, and no allowed page is of that host. "
        "That works if the project's list has it.",
        cure="Compare with Voucherify: Project Settings, Client-side Settings.",
    )


def _host(origin: str) -> str:
    """The host of an origin, which Voucherify takes without a scheme, too."""
    return urlsplit(f"//{origin.rpartition('//')[2]}").hostname or ""


def _plain_http(settings: Settings) -> Iterator[Finding]:
    for origin in settings.allowed_origins.patterns:
        host = _host(origin)
        # Browsers keep *.localhost on the machine (Secure Contexts, 3.1).
        here = is_loopback(host) or host.endswith(".localhost")
        if origin.startswith("http://") and not here:
            yield Finding(
                level="warning",
                code="http_origin",
                about="RELAY_ALLOWED_ORIGINS",
                detail=f"{origin} is not encrypted: anyone on the way can change what "
                "its pages send.",
                cure="Serve the shop over https, and name that origin.",
            )
    if settings.redis_url is not None:
        url = urlsplit(settings.redis_url.get_secret_value())
        if url.scheme == "redis" and not own_network(url.hostname or ""):
            yield Finding(
                level="warning",
                code="redis_unencrypted",
                about="RELAY_REDIS_URL",
                detail="Events and the password go to Redis unencrypted.",
                cure="Use rediss://, unless the network between is yours alone.",
            )


def own_network(host: str) -> bool:
    """Whether a host is outside the internet, as far as its name or address tells."""
    return bool(_OWN_NAME.fullmatch(host)) or _OWN_NETWORK.trusts(host)


def _credentials(settings: Settings) -> Iterator[Finding]:
    server = settings.server_app_token
    client = settings.client_token
    ids = {
        "RELAY_CLIENT_APPLICATION_ID": settings.client_application_id,
        "RELAY_CLIENT_TOKEN": client.get_secret_value() if client else "",
        "RELAY_SERVER_APP_ID": settings.server_app_id,
        "RELAY_SERVER_APP_TOKEN": server.get_secret_value() if server else "",
    }
    of_client, of_server = [*ids][:2], [*ids][2:]
    pairs = zip(of_client, of_server, strict=True)
    same = [f"{c}, {s}" for c, s in pairs if ids[c] and ids[c] == ids[s]]
    if same:
        yield Finding(
            level="warning",
            code="same_keys",
            about=", ".join(same),
            detail="Client-side and server-side keys are the same text.",
            cure="Copy both anew from Voucherify: Project Settings, General.",
        )
    odd = [name for name, text in ids.items() if text and not _UUID.fullmatch(text)]
    if odd:
        yield Finding(
            level="note",
            code="odd_credentials",
            about=", ".join(odd),
            detail="Voucherify's keys look like 8-4-4-4-12 hexadecimal digits; these "
            "do not. Whether they are right is known only when the first event goes.",
            cure="Compare with Voucherify: Project Settings, General.",
        )


def _budget(settings: Settings) -> Iterator[Finding]:
    if settings.upstream_api != "client" or on_loopback(settings):
        return
    calls = most_calls(settings.upstream_budget, CLIENT_MS)
    if calls is None or calls > CLIENT_CALLS:
        yield Finding(
            level="warning",
            code="budget_above_limit",
            about="RELAY_UPSTREAM_BUDGET",
            detail=f"It lets {'any number of' if calls is None else calls} calls "
            "through in 5 s, and Voucherify takes 5 client-side calls in 5 s from one "
            "address: the rest is answered 429 and waits longer.",
            cure="Begin it with 4/5s, or use RELAY_UPSTREAM_API=server, unless "
            "Voucherify has raised the limit for you. In Voucherify: Project Settings, "
            "General has the keys of the server API.",
        )


def _look_ups(settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    """Whether events whose rule is `verify` can be looked up."""
    if not catalog.verifies:
        return
    if settings.upstream_api != "server":
        yield Finding(
            level="warning",
            code="cannot_verify",
            about="RELAY_UPSTREAM_API",
            detail='delivery = "verify" counts as "at_most_once": only the server API '
            "shows what has arrived.",
            cure="Set RELAY_UPSTREAM_API=server with its keys, or say at_most_once. In "
            "Voucherify: Project Settings, General has the keys of the server API.",
        )
        return
    if "oauth" not in settings.auth:
        return
    scope = settings.oauth_scope or EVENT_SCOPES["server"]
    if "customers" not in scope and "api" not in scope.split():
        yield Finding(
            level="warning",
            code="look_up_scope",
            about="RELAY_OAUTH_SCOPE",
            detail="Tokens of this scope may not read a customer's activity, so an "
            'event with delivery = "verify" cannot be looked up.',
            cure='Add the scope for customers: "events customers" with a server-side '
            "key. In Voucherify: Project Settings, General shows what the key's role "
            "may do.",
        )
