"""What would lose events or money, found before it does: `relay check`.

Looks at the settings, the catalogue, Redis, the cluster and the last day's counters.
Sends no event: the cluster is asked with a preflight, so credentials are judged by
their shape alone. What is away is said once, and the rest is still checked.
"""

import asyncio
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import urlsplit

import httpx

from relay import __version__
from relay.addresses import is_loopback
from relay.assembly import make_catalog, make_queue, shown_upstream
from relay.catalog import span
from relay.counters import stats
from relay.embedded import running_url
from relay.errors import QueueUnavailable, SettingsError
from relay.limits import Window
from relay.outcomes import CURES, Outcome
from relay.queue import Queue
from relay.settings import Role, Settings, load_settings

TIMEOUT_S = 5.0  # for the cluster, and for Redis
SKEW_S, SKEW_MAX_S = 2.0, 60.0  # the second is what signing.py lets pass
MEMORY_SHARE = 0.8
# Voucherify's "Limits": 5 client-side calls in 5 s from one address.
CLIENT_CALLS, CLIENT_MS = 5, 5_000
DAY_S = 86_400
# Outcomes that never reach the queue.
NOT_QUEUED = (
    *(Outcome.INVALID, Outcome.UNAUTHENTICATED, Outcome.FORBIDDEN),
    *(Outcome.RATE_LIMITED, Outcome.DUPLICATE, Outcome.COALESCED),
)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

Level = Literal["fault", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found. A fault would lose events or money."""

    level: Level
    code: str
    about: str  # a setting, or a part of the relay
    detail: str
    cure: str


async def check(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Find what is wrong or doubtful, the worst first."""
    try:
        settings = load_settings(Role.SERVE, environ)
        catalog = make_catalog(settings).catalog
    except SettingsError as error:
        return [*_of_settings(error)]  # nothing else can be judged without them
    found = [
        *_doubts(settings, catalog.warnings),
        *_senders(settings),
        *_plain_http(settings),
        *_credentials(settings),
        *_budget(settings),
    ]
    for more in await asyncio.gather(_cluster(settings), _redis(settings)):
        found += more
    ranks = {"fault": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: ranks[finding.level])


def lines(findings: Sequence[Finding]) -> list[str]:
    """The same for people."""
    told = [
        line
        for f in findings
        for line in (
            f"{f.level:<8} {f.code}  ({f.about})",
            f"         {f.detail}",
            f"         {f.cure}",
        )
    ]
    faults = sum(f.level == "fault" for f in findings)
    return [*told, "", f"{faults} faults, {len(findings) - faults} other findings."]


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
            cure=cure or "Correct it: docs/settings.md.",
        )


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


def _senders(settings: Settings) -> Iterator[Finding]:
    trusted = not settings.restricted and settings.tokens != "required"
    if trusted:
        # No fault, or every relay would fail its check until its shop has tokens.
        yield Finding(
            level="warning",
            code="anonymous_trusted",
            about="RELAY_ANONYMOUS",
            detail="Any visitor can overwrite a customer's profile, send any event "
            "for any customer, and mint points with loyalty and referral.",
            cure="Set RELAY_SIGNING_KEYS (relay keygen) and give pages tokens, or set "
            "RELAY_ANONYMOUS=restricted. In Voucherify: Project Settings, Client-side "
            "Settings, leave the switch for loyalty events off until then.",
        )
    if settings.allowed_origins.any:
        yield Finding(
            level="fault" if trusted else "warning",
            code="any_origin",
            about="RELAY_ALLOWED_ORIGINS",
            detail="* lets the pages of any site send events to this shop.",
            cure="Name the shop's own origins.",
        )
    if settings.tokens == "dry_run":
        yield Finding(
            level="note",
            code="tokens_dry_run",
            about="RELAY_TOKENS",
            detail="Nothing is refused for want of a token yet.",
            cure="Look at would_refuse:token in relay stats --json, then set required.",
        )


def _plain_http(settings: Settings) -> Iterator[Finding]:
    for origin in settings.allowed_origins.patterns:
        host = urlsplit(origin).hostname or ""
        if origin.startswith("http://") and not is_loopback(host):
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
        if url.scheme == "redis" and not is_loopback(url.hostname or ""):
            yield Finding(
                level="warning",
                code="redis_unencrypted",
                about="RELAY_REDIS_URL",
                detail="Events and the password go to Redis unencrypted.",
                cure="Use rediss://, unless the network between is yours alone.",
            )


def _credentials(settings: Settings) -> Iterator[Finding]:
    server = settings.server_app_token
    client = settings.client_token
    if client and server and client.get_secret_value() == server.get_secret_value():
        yield Finding(
            level="warning",
            code="same_keys",
            about="RELAY_SERVER_APP_TOKEN",
            detail="The client-side and the server-side token are the same text.",
            cure="Copy both anew from Voucherify: Project Settings, General.",
        )
    ids = {
        "RELAY_CLIENT_APPLICATION_ID": settings.client_application_id,
        "RELAY_CLIENT_TOKEN": client.get_secret_value() if client else "",
        "RELAY_SERVER_APP_ID": settings.server_app_id,
        "RELAY_SERVER_APP_TOKEN": server.get_secret_value() if server else "",
    }
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
    if settings.upstream_api != "client" or _on_loopback(settings):
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
            "Voucherify has raised the limit for you.",
        )


def most_calls(budget: Sequence[Window], period_ms: int) -> int | None:
    """How many calls all windows together let through in any `period_ms`."""
    if not budget:
        return None
    return min(w.quota * max(1, -(-period_ms // w.period_ms)) for w in budget)


def _on_loopback(settings: Settings) -> bool:
    return is_loopback(urlsplit(settings.upstream_url).hostname or "")


# --- the cluster ----------------------------------------------------------------------


async def _cluster(settings: Settings) -> list[Finding]:
    """Ask the events path for its CORS rules: a question that makes no event."""
    url, _ = shown_upstream(settings)
    headers = {
        "Origin": f"https://{settings.origin.rpartition('//')[2] or 'relay.invalid'}",
        "Access-Control-Request-Method": "POST",
        "User-Agent": f"voucherify-relay/{__version__}",
    }
    found = []
    if _on_loopback(settings):
        found.append(
            Finding(
                level="note",
                code="sandbox_cluster",
                about="RELAY_CLUSTER",
                detail="The cluster is on this machine: this is not Voucherify.",
                cure="For production name Voucherify's cluster: api, us1.api, as1.api.",
            )
        )
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client,
        ):
            answer = await client.options(url, headers=headers)
    except (httpx.HTTPError, OSError, TimeoutError) as error:
        return [*found, _unreachable(error)]
    return [*found, *_judge_answer(answer)]


def _unreachable(error: Exception) -> Finding:
    why, code = "does not answer", "cluster_unreachable"
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError):
            why, code = "shows no certificate that can be trusted", "cluster_tls"
        elif isinstance(cause, socket.gaierror):
            why = "has no address (DNS)"
        elif isinstance(cause, ConnectionRefusedError):
            why = "refuses the connection"
        elif isinstance(cause, (httpx.TimeoutException, TimeoutError)):
            why = f"did not answer in {TIMEOUT_S:g} s"
        elif isinstance(cause, httpx.RemoteProtocolError):
            why = "does not speak HTTP"
    return Finding(
        level="fault",
        code=code,
        about="RELAY_CLUSTER",
        detail=f"The cluster {why}, so nothing can be delivered.",
        cure="Compare the name with the API endpoint in Voucherify (Project Settings, "
        "General), and see that this machine may reach it on port 443.",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 20:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _judge_answer(answer: httpx.Response) -> Iterator[Finding]:
    if answer.status_code >= 500:
        yield Finding(
            level="warning",
            code="cluster_failing",
            about="RELAY_CLUSTER",
            detail=f"The cluster answers {answer.status_code}.",
            cure="See Voucherify's status page; the queue is kept meanwhile.",
        )
    kind = answer.headers.get("content-type", "")
    strange = answer.status_code == 404 and "json" not in kind
    if answer.is_redirect or "html" in kind or strange:
        yield Finding(
            level="fault",
            code="not_the_api",
            about="RELAY_CLUSTER",
            detail=f"It answers {answer.status_code}, and not like Voucherify's API.",
            cure="Compare the name with the API endpoint in Voucherify (Project "
            "Settings, General).",
        )
    try:
        told = parsedate_to_datetime(answer.headers.get("date", ""))
    except ValueError:
        return
    # The header has whole seconds, and the answer took its time.
    skew_s = abs(told.timestamp() - time.time()) - 1 - answer.elapsed.total_seconds()
    yield from _skew(skew_s, "the cluster")


def _skew(skew_s: float, whose: str) -> Iterator[Finding]:
    if skew_s > SKEW_S:
        yield Finding(
            level="fault" if skew_s > SKEW_MAX_S else "warning",
            code="clock_skew",
            about="clock",
            detail=f"This machine's clock and that of {whose} differ by "
            f"{skew_s:.0f} s: tokens are taken too long or not at all.",
            cure="Set the clocks by NTP.",
        )


# --- Redis, and what it has counted ---------------------------------------------------


async def _redis(settings: Settings) -> list[Finding]:
    url = (
        settings.redis_url.get_secret_value()
        if settings.redis_url is not None
        else running_url(settings.data_dir)
    )
    queue = make_queue(settings, url)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return [finding async for finding in _ask_redis(settings, queue)]
    except (QueueUnavailable, TimeoutError) as error:
        detail = error.detail if isinstance(error, QueueUnavailable) else "It hangs."
        return [_away(settings, detail)]
    finally:
        await queue.aclose()


def _away(settings: Settings, detail: str) -> Finding:
    if settings.redis_url is None:
        return Finding(
            level="note",
            code="no_relay_yet",
            about="RELAY_DATA_DIR",
            detail="No relay runs on its private server yet, so Redis and the counters "
            "are not checked.",
            cure="Run relay check again while the relay runs.",
        )
    return Finding(
        level="fault",
        code="redis_unreachable",
        about="RELAY_REDIS_URL",
        detail=f"Redis cannot be used: {detail}",
        cure="Start it, or correct the URL and its password.",
    )


async def _ask_redis(settings: Settings, queue: Queue) -> AsyncIterator[Finding]:
    asked = time.time()
    now = (await queue.now()).timestamp()
    took = time.time() - asked
    for finding in _skew(abs(now - asked) - took, "Redis"):
        yield finding
    for finding in _judge_server(await queue.server()):
        yield finding
    shown = await stats(queue, minutes=0)
    for finding in _judge_stats(settings, shown):
        yield finding
    for finding in _judge_day(settings, await _day(queue)):
        yield finding


def _judge_server(info: Mapping[str, str]) -> Iterator[Finding]:
    def redis(level: Level, code: str, detail: str, cure: str) -> Finding:
        return Finding(level=level, code=code, about="Redis", detail=detail, cure=cure)

    if unfit := info.get("unfit"):
        yield redis("fault", "redis_unfit", unfit, "The relay does not start with it.")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("volatile"):
        yield redis(
            "warning",
            "redis_evicts_marks",
            f"When its memory is full, Redis evicts limits and ids ({policy}): an "
            "event that is sent again could count twice.",
            "Set maxmemory-policy noeviction.",
        )
    if info.get("aof_enabled") == "0":
        yield redis(
            "fault",
            "redis_not_persistent",
            "Redis keeps no append-only file: a restart loses accepted events.",
            "Set appendonly yes.",
        )
    elif info.get("aof_last_write_status", "ok") != "ok":
        yield redis(
            "fault",
            "redis_disk",
            "Redis could not write its append-only file.",
            "Make room on its disk.",
        )
    most, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    if most and used > MEMORY_SHARE * most:
        yield redis(
            "warning",
            "redis_nearly_full",
            f"{used / most:.0%} of Redis' memory is used; when it is full, new events "
            "are refused.",
            "Raise maxmemory, or find out why the queue grows.",
        )


def _judge_stats(settings: Settings, shown: Mapping[str, object]) -> Iterator[Finding]:
    gauges, hold = shown["gauges"], shown["hold"]
    assert isinstance(gauges, dict)  # noqa: S101  # as counters.stats makes it
    if isinstance(hold, dict):
        yield Finding(
            level="fault",
            code="delivery_held",
            about="delivery",
            detail=f"Delivery is held: {hold['hold']} ({hold['reason']}), since "
            f"{hold['since']}.",
            cure=CURES.get(str(hold["hold"]), "See docs/operations.md."),
        )
    if gauges["unaccounted"]:
        yield Finding(
            level="fault",
            code="unaccounted",
            about="counters",
            detail=f"{gauges['unaccounted']} events have no outcome and wait nowhere.",
            cure="This is a fault of the relay: keep its log and report it.",
        )
    if gauges["dead"]:
        yield Finding(
            level="warning",
            code="dead_letters",
            about="dead letters",
            detail=f"{gauges['dead']} events were refused, expired or may have "
            "arrived; nobody sends them again.",
            cure="See docs/operations.md, Dead letters.",
        )
    eta_s = gauges["eta_s"]
    if isinstance(eta_s, int | float) and eta_s > settings.ttl:
        yield Finding(
            level="fault",
            code="backlog_expires",
            about="queue",
            detail=f"What waits takes {eta_s / 3600:.0f} h at the budget, and expires "
            f"after {span(settings.ttl)} (RELAY_TTL).",
            cure="Raise RELAY_UPSTREAM_BUDGET if Voucherify allows it, or send less.",
        )


async def _day(queue: Queue) -> dict[str, int]:
    """The counters of the last 24 full hours, added up."""
    now = await queue.now()
    total: dict[str, int] = {}
    for hours in range(1, 25):
        stamp = f"{now.astimezone(UTC) - timedelta(hours=hours):%Y%m%d%H}"
        for name, value in (await queue.hash(f"hour:{stamp}")).items():
            total[name] = total.get(name, 0) + int(value)
    # What this hour has seen counts for warnings, not for the sum of whole days.
    this_hour = await queue.hash(f"hour:{datetime.now(UTC):%Y%m%d%H}")
    total["untrusted_proxy"] = total.get("untrusted_proxy", 0) + int(
        this_hour.get("untrusted_proxy", 0)
    )
    return total


def _judge_day(settings: Settings, day: Mapping[str, int]) -> Iterator[Finding]:
    if day.get("untrusted_proxy"):
        yield Finding(
            level="warning",
            code="untrusted_proxy",
            about="RELAY_TRUSTED_PROXIES",
            detail=f"{day['untrusted_proxy']} requests came with X-Forwarded-For from "
            "a peer that is not trusted: behind a proxy all shoppers count as one "
            "address.",
            cure="Name the proxy, if it is yours: unix, loopback, private or its "
            "network.",
        )
    accepted = day.get("received", 0) - sum(day.get(str(o), 0) for o in NOT_QUEUED)
    calls = most_calls(settings.upstream_budget, DAY_S * 1000)
    if calls is not None and accepted > calls:
        # What is too much each day waits ever longer, and in the end expires.
        lasts_s = settings.ttl * calls / (accepted - calls)
        yield Finding(
            level="fault" if lasts_s < 30 * DAY_S else "warning",
            code="budget_below_traffic",
            about="RELAY_UPSTREAM_BUDGET",
            detail=f"It delivers {calls} events a day, and the last day had "
            f"{accepted}: at this rate events begin to expire after "
            f"{lasts_s / DAY_S:.1f} days.",
            cure="Raise it if Voucherify allows more calls, use "
            "RELAY_UPSTREAM_API=server, or send less: coalesce in the catalogue.",
        )
