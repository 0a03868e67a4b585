"""The ops listener: is it alive, can it take events, figures, tokens, dead letters.

Never on the public port. `/healthz` and `/readyz` are open, since probes carry no
secrets and get none. Everything else asks for `RELAY_OPS_TOKEN` where it is set;
where it is not, it takes only what comes from this machine and from no web page.
"""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import msgspec
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay import __version__
from relay.addresses import is_loopback
from relay.answers import problem_body
from relay.dead_letters import WrongField
from relay.errors import QueueUnavailable
from relay.letters_api import LettersApi, Refused
from relay.limits import parse_duration
from relay.metrics import exposition
from relay.replay import NothingToResume, ReplayBusy
from relay.signing import InvalidClaim, Signer

MAX_BODY_BYTES = 64 * 1024
MAX_SAID = 160  # characters of a parser's complaint

# What proxies add to a request that they pass on.
PROXIED = (
    *("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"),
    "x-real-ip",
)

Check = Callable[[], Awaitable[str]]
Stats = Callable[[], Awaitable[dict[str, object]]]  # as counters.stats gives them


class TokenRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What a backend asks for; docs/tokens.md tells each part."""

    source_id: str
    events: list[str] | None = None
    origin: str | None = None
    ttl: int | str | None = None  # seconds, or a duration like "1h"
    uses: int | None = None


def ops_app(
    checks: dict[str, Check],
    *,
    signer: Signer | None = None,
    token: SecretStr | None = None,
    letters: LettersApi | None = None,
    stats: Stats | None = None,
    clock: Callable[[], float] = time.time,
) -> Starlette:
    """The application; each check returns "ok…" or says what is wrong."""
    # One look at a time: the queue's connections to Redis are few, and a crowd of
    # probes that took them all would refuse beacons and report a Redis that is away.
    looking = asyncio.Lock()

    async def healthz(_: Request) -> JSONResponse:
        return JSONResponse({"status": "alive", "version": __version__})

    async def readyz(_: Request) -> JSONResponse:
        async with looking:
            said = {name: await _said(check) for name, check in checks.items()}
        ready = all(word.startswith("ok") for word in said.values())
        return JSONResponse(
            {"status": "ready" if ready else "unready", "checks": said},
            200 if ready else 503,
        )

    async def metrics(request: Request) -> Response:
        refused = _refusal(request, token)
        if refused is not None:
            return refused
        if stats is None:
            return _problem(404, "path", "There are no metrics here.")
        try:
            async with looking:
                shown = await stats()
        except QueueUnavailable as error:
            return _problem(503, error.reason, error.detail)
        text, media_type = exposition(shown, request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": media_type})

    async def tokens(request: Request) -> JSONResponse:
        refused = _refusal(request, token)
        if refused is not None:
            return refused
        if signer is None:
            return _problem(
                409, "no_signing_key", "There is no key: set RELAY_SIGNING_KEYS."
            )
        try:
            wanted = _decode(await _body(request))
            made, expires_at = signer.sign(
                source_id=wanted.source_id,
                events=wanted.events,
                origin=wanted.origin,
                ttl_s=_seconds(wanted.ttl),
                uses=wanted.uses,
                now=clock(),
            )
        except ClientDisconnect:  # nobody hears this
            return _problem(400, "invalid", "The body was cut off: send it again.")
        except ValueError as error:  # InvalidClaim is one
            return _problem(400, "invalid", f"{error}.")
        return JSONResponse(
            {"token": made, "expires_at": expires_at},
            headers={"Cache-Control": "no-store"},
        )

    app = Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/tokens", tokens, methods=["POST"]),
            *_letter_routes(letters, token),
        ],
        exception_handlers={HTTPException: _elsewhere},
    )
    app.router.redirect_slashes = False  # a client may not repeat a POST elsewhere
    return app


def _letter_routes(letters: LettersApi | None, token: SecretStr | None) -> list[Route]:
    """The routes of dead letters, for whoever may ask for tokens, too."""

    def guarded(
        handle: Callable[[LettersApi, Request], Awaitable[JSONResponse]],
    ) -> Callable[[Request], Awaitable[JSONResponse]]:
        async def answer(request: Request) -> JSONResponse:
            refused = _refusal(request, token)
            if refused is not None:
                return refused
            if letters is None:
                return _problem(404, "path", "There are no dead letters here.")
            return await _heard(handle(letters, request))

        return answer

    async def listed(letters: LettersApi, request: Request) -> JSONResponse:
        return _fresh(await letters.list(request.query_params.multi_items()))

    async def shown(letters: LettersApi, request: Request) -> JSONResponse:
        entry = request.path_params["entry"]
        told = await letters.show(entry)
        if told is None:
            return _problem(
                404, "no_letter", "There is no such dead letter (any more)."
            )
        return _fresh(told)

    async def progress(letters: LettersApi, _: Request) -> JSONResponse:
        return _fresh(await letters.progress())

    async def replayed(letters: LettersApi, request: Request) -> JSONResponse:
        status, told = await letters.replay(await _body(request))
        return _fresh(told, status)

    async def dropped(letters: LettersApi, request: Request) -> JSONResponse:
        return _fresh(await letters.drop(await _body(request)))

    return [
        Route("/dead-letters", guarded(listed)),
        Route("/dead-letters/replay", guarded(progress)),
        Route("/dead-letters/replay", guarded(replayed), methods=["POST"]),
        Route("/dead-letters/drop", guarded(dropped), methods=["POST"]),
        Route("/dead-letters/{entry}", guarded(shown)),
    ]


async def _heard(answer: Awaitable[JSONResponse]) -> JSONResponse:
    """The answer, or why there is none."""
    try:
        return await answer
    except ClientDisconnect:  # nobody hears this
        return _problem(400, "invalid", "The body was cut off: send it again.")
    except WrongField as error:
        return _problem(400, "invalid", f"{error}.", field=error.field)
    except ValueError as error:
        return _problem(400, "invalid", f"{error}.")
    except Refused as error:
        return _problem(409, error.reason, error.detail)
    except (ReplayBusy, NothingToResume) as error:
        busy = isinstance(error, ReplayBusy)
        return _problem(409, "replay_busy" if busy else "no_replay", str(error))
    except QueueUnavailable as error:
        headers = {"Retry-After": str(error.retry_after)}
        return _problem(503, error.reason, error.detail, headers)


def _fresh(told: dict[str, object], status: int = 200) -> JSONResponse:
    return JSONResponse(told, status, headers={"Cache-Control": "no-store"})


async def _elsewhere(_: Request, error: Exception) -> JSONResponse:
    """Answer for a path or a method that there is not."""
    assert isinstance(error, HTTPException)  # noqa: S101  # as registered above
    status, headers = error.status_code, dict(error.headers or {})
    if status == 405:
        return _problem(405, "method", f"Use {headers.get('Allow')} here.", headers)
    said = "There are /healthz, /readyz, /metrics, POST /tokens and /dead-letters here."
    return _problem(status, "path", said, headers)


def _refusal(request: Request, token: SecretStr | None) -> JSONResponse | None:
    """Why this caller may not go on, if it may not."""
    if token is not None:
        # The scheme's name is in any case, blanks after it (RFC 9110, 11.1 and 11.4).
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        asked = token.get_secret_value().encode()
        same = hmac.compare_digest(given.strip().encode(), asked)
        if same and scheme.lower() == "bearer":
            return None
        return _problem(
            401,
            "ops_token",
            "Send Authorization: Bearer and the RELAY_OPS_TOKEN.",
            {"WWW-Authenticate": "Bearer"},
        )
    # A proxy on this machine passes strangers on under a name of this machine's own.
    if any(name in request.headers for name in PROXIED):
        return _problem(
            403,
            "ops_host",
            "Without RELAY_OPS_TOKEN this takes nothing that came through a proxy: set "
            "it, and keep the ops listener away from public names.",
        )
    # A web page can reach loopback, by its own requests and by a name of its own that
    # points there (DNS rebinding); neither can leave these headers as they should be.
    if "origin" in request.headers or not _is_local(request.headers.get("host", "")):
        return _problem(
            403,
            "ops_host",
            "Without RELAY_OPS_TOKEN this is for programs on the relay's own machine, "
            "under the name localhost or 127.0.0.1.",
        )
    return None


def _is_local(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:  # brackets that hold no address
        return False


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"the body has over {MAX_BODY_BYTES} bytes: send less")
    return bytes(body)


def _decode(body: bytes) -> TokenRequest:
    try:
        return msgspec.json.decode(body, type=TokenRequest)
    except msgspec.ValidationError as error:
        # Cut: it quotes names that it does not know.
        raise InvalidClaim("", f"{error}"[:MAX_SAID]) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidClaim("", "the body must be a JSON object") from None


def _seconds(ttl: int | str | None) -> int | None:
    if not isinstance(ttl, str):
        return ttl
    try:
        return parse_duration(ttl)
    except ValueError as error:
        raise InvalidClaim("ttl", f"ttl: {error}") from None


def _problem(
    status: int,
    reason: str,
    detail: str,
    headers: dict[str, str] | None = None,
    **more: str,
) -> JSONResponse:
    return JSONResponse(
        problem_body(status, reason, detail) | more,
        status,
        headers,
        media_type="application/problem+json",
    )


async def _said(check: Check) -> str:
    try:
        return await check()
    except QueueUnavailable as error:
        return f"{error.reason}: {error.detail}"
