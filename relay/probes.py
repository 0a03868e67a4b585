"""Look at what is around a relay: the cluster, Redis, and what Redis has counted.

Each look has a bound in time and in what it reads, sends no event and asks for no
access token. What is away is one finding, and says nothing about the rest.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx
from redis.exceptions import RedisError, ResponseError

from relay import __version__
from relay.addresses import is_loopback
from relay.assembly import make_queue, shown_upstream
from relay.catalog import span
from relay.counters import stats
from relay.embedded import running_url
from relay.errors import QueueUnavailable
from relay.findings import Code, Finding, Level
from relay.limits import calls_a_day
from relay.outcomes import CURES, Outcome
from relay.queue import Queue, connect
from relay.settings import Settings

TIMEOUT_S = 5.0  # for the cluster, and for Redis
SKEW_S, SKEW_MAX_S = 2.0, 60.0  # the second is what signing.py lets pass
MEMORY_SHARE = 0.8
DAY_S = 86_400
# Outcomes that never reach the queue.
NOT_QUEUED = (
    *(Outcome.INVALID, Outcome.UNAUTHENTICATED, Outcome.FORBIDDEN),
    *(Outcome.RATE_LIMITED, Outcome.DUPLICATE, Outcome.COALESCED),
)
# The statuses of a cluster, or of what stands before it, that is down for a while.
DOWN = (500, 502, 503, 504)


def on_loopback(settings: Settings) -> bool:
    return is_loopback(urlsplit(settings.upstream_url).hostname or "")


# --- the cluster ----------------------------------------------------------------------


async def look_at_cluster(
    settings: Settings, now: Callable[[], float]
) -> list[Finding]:
    """Ask the events path for its CORS rules: a question that makes no event."""
    url, _ = shown_upstream(settings)
    headers = {
        "Origin": f"https://{settings.origin.rpartition('//')[2] or 'relay.invalid'}",
        "Access-Control-Request-Method": "POST",
        "User-Agent": f"voucherify-relay/{__version__}",
    }
    found = []
    if on_loopback(settings):
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
        asked = now()
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client,
            # The body is not read: who knows what answers, and it may have no end.
            client.stream("OPTIONS", url, headers=headers) as answer,
        ):
            found += _judge_answer(answer)
            found += _judge_date(answer, asked, now())
    except (httpx.HTTPError, OSError, TimeoutError) as error:
        found.append(_unreachable(error))
    return found


def _unreachable(error: Exception) -> Finding:
    why = "does not answer"
    code: Code = "cluster_unreachable"
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
    if answer.status_code in DOWN:  # a balancer's page is HTML, whosever it is
        yield Finding(
            level="warning",
            code="cluster_failing",
            about="RELAY_CLUSTER",
            detail=f"The cluster answers {answer.status_code}.",
            cure="See Voucherify's status page; the queue is kept meanwhile. In "
            "Voucherify: Project Settings, General has the API endpoint to compare.",
        )
        return
    kind = answer.headers.get("content-type", "")
    strange = answer.status_code in (404, 501) and "json" not in kind
    if answer.is_redirect or "html" in kind or strange:
        yield Finding(
            level="fault",
            code="not_the_api",
            about="RELAY_CLUSTER",
            detail=f"It answers {answer.status_code}, and not like Voucherify's API.",
            cure="Compare the name with the API endpoint in Voucherify (Project "
            "Settings, General), and see that no proxy of your network answers.",
        )


def _judge_date(
    answer: httpx.Response, asked: float, answered: float
) -> Iterator[Finding]:
    try:
        told = parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except (ValueError, OverflowError):
        return  # no date, or none that a clock could show
    # The header has whole seconds, and the answer took its time.
    yield from _skew(abs(told - asked) - 1 - (answered - asked), "the cluster")


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


async def look_at_redis(settings: Settings, now: Callable[[], float]) -> list[Finding]:
    url = (
        settings.redis_url.get_secret_value()
        if settings.redis_url is not None
        else running_url(settings.data_dir)
    )
    found: list[Finding] = []  # what was found stays when the server then fails
    queue = make_queue(settings, url)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await _ask_redis(settings, queue, url, now, found)
    except (QueueUnavailable, TimeoutError, RedisError, ValueError) as error:
        found.append(_away(settings, error))
    finally:
        await queue.aclose()
    return found


def _away(settings: Settings, error: Exception) -> Finding:
    own = settings.redis_url is None
    reason = error.reason if isinstance(error, QueueUnavailable) else ""
    if own and reason == "redis_unreachable":
        return Finding(
            level="note",
            code="no_relay_yet",
            about="RELAY_DATA_DIR",
            detail="No relay runs on its private server yet, so Redis and the counters "
            "are not checked.",
            cure="Run relay check again while the relay runs.",
        )
    # In the words of the server, or of its client.
    said = " ".join(str(cause) for cause in _causes(error))
    if "DB index" in said or "Invalid Database" in said:
        return Finding(
            level="fault",
            code="redis_unreachable",
            about="RELAY_REDIS_URL",
            detail="Redis has no database of the number that ends the URL.",
            cure="Correct the number: Redis has 0 to 15 unless it is set otherwise.",
        )
    if isinstance(error, (ValueError, ResponseError)):
        return Finding(
            level="fault",
            code="redis_foreign",
            about="RELAY_REDIS_PREFIX",
            detail="The keys under this prefix hold what no relay has written.",
            cure="Take another prefix, or another database, for the relay alone.",
        )
    about = "RELAY_DATA_DIR" if own else "RELAY_REDIS_URL"
    if isinstance(error, QueueUnavailable):
        why = error.detail.removesuffix(": try again soon.")
    elif isinstance(error, TimeoutError):
        why = f"it did not answer everything in {TIMEOUT_S:g} s"
    else:
        why = "it answers what nobody expects"
    return Finding(
        level="fault",
        code="redis_unreachable",
        about=about,
        detail=f"Redis cannot be used: {why}.",
        cure="Stop the relay and start it again."
        if own
        else "Start it, or correct the URL and its password.",
    )


async def _ask_redis(
    settings: Settings,
    queue: Queue,
    url: str,
    now: Callable[[], float],
    found: list[Finding],
) -> None:
    asked = now()
    theirs = (await queue.now()).timestamp()
    found += _skew(abs(theirs - asked) - (now() - asked), "Redis")
    info = await queue.server()
    found += _judge_server(info)
    if info.get("aof_enabled") == "1":
        found += await _fsync(url)
    found += _judge_stats(settings, await stats(queue, minutes=0))
    found += _judge_day(settings, await _day(queue))


async def _fsync(url: str) -> list[Finding]:
    """Whether the append-only file ever reaches the disk; INFO does not say it."""
    client = connect(url, timeout=TIMEOUT_S, connections=1)
    try:
        told = await client.config_get("appendfsync")
    except RedisError:
        return []  # services that manage a Redis keep CONFIG to themselves
    finally:
        await client.aclose()
    if told.get("appendfsync") != "no":
        return []
    return [
        Finding(
            level="fault",
            code="redis_fsync_off",
            about="Redis",
            # Linux usually writes it every 30 s (Redis documentation, "Persistence").
            detail="The system decides when the append-only file reaches the disk "
            "(appendfsync no): a power failure loses what came in the last half "
            "minute or so.",
            cure="Set appendfsync everysec, or always.",
        )
    ]


def _judge_server(info: Mapping[str, str]) -> Iterator[Finding]:
    def redis(level: Level, code: Code, detail: str, cure: str) -> Finding:
        return Finding(level=level, code=code, about="Redis", detail=detail, cure=cure)

    if unfit := info.get("unfit"):
        yield redis("fault", "redis_unfit", unfit, "The relay does not start with it.")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("volatile"):
        yield redis(
            "fault",
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
    states = ("aof_last_write_status", "rdb_last_bgsave_status")
    if failed := [name for name in states if info.get(name, "ok") != "ok"]:
        yield redis(
            "fault",
            "redis_disk",
            f"Redis could not write to its disk ({', '.join(failed)}), and may "
            "refuse events until it can.",
            "Make room on its disk, and see its log.",
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
            detail=f"Delivery is held: {hold['hold']} "
            f"({hold['reason'] or 'no reason'}), since {hold['since']}.",
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
            cure="relay dead-letters list says why, and what to do.",
        )
    rate = gauges["budget_per_s"]
    waiting = (gauges["queued"] or 0) + (gauges["delayed"] or 0)
    # Not eta_s, which ends where what waits has expired.
    if rate and waiting / rate > settings.ttl:
        yield Finding(
            level="fault",
            code="backlog_expires",
            about="queue",
            detail=f"What waits takes {waiting / rate / 3600:.0f} h at the budget, and "
            f"expires after {span(settings.ttl)} (RELAY_TTL).",
            cure="Raise RELAY_UPSTREAM_BUDGET if Voucherify allows it, or send less.",
        )
    forecast = shown["forecast"]
    if isinstance(forecast, dict):
        yield Finding(
            level="fault",
            code="cycle_runs_out",
            about="RELAY_UPSTREAM_BUDGET",
            detail=f"At this rate the calls of {span(forecast['window_s'])} end on "
            f"{forecast['calls_end']}, and come back from "
            f"{forecast['calls_come_back']} on. Low lanes are slowed down first.",
            cure="Let Voucherify raise the plan's calls (Organization Settings, "
            "Subscription), send less (coalesce in the catalogue), or see that what "
            'matters has priority = "high".',
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
    this_hour = await queue.hash(f"hour:{now.astimezone(UTC):%Y%m%d%H}")
    total["untrusted_proxy"] = total.get("untrusted_proxy", 0) + int(
        this_hour.get("untrusted_proxy", 0)
    )
    return total


def _judge_day(settings: Settings, day: Mapping[str, int]) -> Iterator[Finding]:
    if day.get("untrusted_proxy"):
        yield Finding(
            level="fault",  # shoppers beyond one address' limit are refused
            code="untrusted_proxy",
            about="RELAY_TRUSTED_PROXIES",
            detail=f"{day['untrusted_proxy']} requests came with X-Forwarded-For from "
            "a peer that is not trusted: behind a proxy all shoppers count as one "
            "address.",
            cure="Name the proxy, if it is yours: unix, loopback, private or its "
            "network.",
        )
    accepted = day.get("received", 0) - sum(day.get(str(o), 0) for o in NOT_QUEUED)
    accepted -= day.get("reason:gpc", 0)  # dropped before the queue
    calls = calls_a_day(settings.upstream_budget)
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
            "RELAY_UPSTREAM_API=server (its keys in Voucherify: Project Settings, "
            "General), or send less: coalesce in the catalogue.",
        )
