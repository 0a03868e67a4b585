"""The control routes under `/_sandbox`, in JSON, and the page for people at `/`.

They are for the sandbox's owner: nothing here is part of Voucherify, and nothing
here counts as traffic. A POST needs `Content-Type: application/json`; browsers ask
first before they send that, or DELETE and PATCH, to another site, and are refused.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.sandbox.faults import Fault

if TYPE_CHECKING:  # the sandbox is built on top of this module
    from relay.sandbox.app import Sandbox
    from relay.sandbox.record import Record

DEFAULT_LIMIT = 1000

Given = TypeVar("Given")


class NewCustomer(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """A customer to be stored as if the shop had created it before."""

    id: str | None = None
    source_id: str | None = None


class ControlError(Exception):
    """A control request that cannot be done; the message says what to do."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def control_app(sandbox: Sandbox) -> Starlette:
    """Return the application that serves `sandbox` to its owner."""
    control = _Control(sandbox)
    routes = [
        Route(path, handler, methods=[verb]) for verb, path, handler in control.routes
    ]
    return Starlette(routes=routes, exception_handlers={ControlError: _refusal})


def routes_of(sandbox: Sandbox) -> list[tuple[str, str]]:
    """Return the method and the path of every control route."""
    return [(verb, path) for verb, path, _ in _Control(sandbox).routes]


class _Control:
    """One handler for each route."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.routes = [
            ("GET", "/", self.page),
            ("GET", "/favicon.ico", self.icon),
            ("GET", "/_sandbox", self.index),
            ("DELETE", "/_sandbox", self.reset),
            ("GET", "/_sandbox/counts", self.counts),
            ("GET", "/_sandbox/events", self.events),
            ("DELETE", "/_sandbox/events", self.forget),
            ("GET", "/_sandbox/requests", self.requests),
            ("GET", "/_sandbox/unexpected", self.unexpected),
            ("GET", "/_sandbox/customers", self.customers),
            ("POST", "/_sandbox/customers", self.add_customer),
            ("GET", "/_sandbox/faults", self.faults),
            ("POST", "/_sandbox/faults", self.inject),
            ("DELETE", "/_sandbox/faults", self.clear_faults),
            ("GET", "/_sandbox/config", self.config),
            ("PATCH", "/_sandbox/config", self.configure),
            ("DELETE", "/_sandbox/tokens", self.expire_tokens),
        ]

    async def page(self, _: Request) -> Response:
        html, policy = _page()
        headers = {
            "content-security-policy": policy,
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return Response(html, media_type="text/html", headers=headers)

    async def icon(self, _: Request) -> Response:
        return Response(status_code=204)

    async def index(self, _: Request) -> Response:
        return _json({"routes": [f"{verb} {path}" for verb, path, _ in self.routes]})

    async def reset(self, _: Request) -> Response:
        self._sandbox.reset()
        return Response(status_code=204)

    async def counts(self, _: Request) -> Response:
        return _json(self._sandbox.counts())

    async def events(self, request: Request) -> Response:
        return _json({"events": _selected(self._sandbox.events, request)})

    async def forget(self, _: Request) -> Response:
        self._sandbox.forget()
        return Response(status_code=204)

    async def requests(self, request: Request) -> Response:
        return _json({"requests": _selected(self._sandbox.requests, request)})

    async def unexpected(self, _: Request) -> Response:
        return _json({"unexpected": self._sandbox.unexpected()})

    async def customers(self, request: Request) -> Response:
        limit = _number(request, "limit", DEFAULT_LIMIT)
        return _json({"customers": self._sandbox.customers[-limit:]})

    async def add_customer(self, request: Request) -> Response:
        given = await _read(request, NewCustomer)
        made = self._sandbox.add_customer(id=given.id, source_id=given.source_id)
        return _json(made, status=201)

    async def faults(self, _: Request) -> Response:
        return _json({"faults": self._sandbox.faults()})

    async def inject(self, request: Request) -> Response:
        self._sandbox.inject(await _read(request, Fault))
        return _json({"faults": self._sandbox.faults()}, status=201)

    async def clear_faults(self, _: Request) -> Response:
        self._sandbox.clear_faults()
        return Response(status_code=204)

    async def config(self, _: Request) -> Response:
        return _json(self._sandbox.config.shown())

    async def configure(self, request: Request) -> Response:
        changes = await _read(request, dict[str, object])
        try:
            self._sandbox.configure(**changes)
        except ValueError as fault:
            raise ControlError(400, str(fault)) from fault
        return _json(self._sandbox.config.shown())

    async def expire_tokens(self, _: Request) -> Response:
        self._sandbox.expire_tokens()
        return Response(status_code=204)


async def _read(request: Request, kind: type[Given]) -> Given:
    content_type = request.headers.get("content-type", "").partition(";")[0]
    if content_type.strip().lower() != "application/json":
        raise ControlError(415, "send JSON with Content-Type: application/json")
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.ValidationError as fault:
        raise ControlError(400, str(fault)) from fault
    except (ValueError, RecursionError) as fault:
        raise ControlError(400, "the body is not JSON") from fault


def _selected(records: list[Record], request: Request) -> list[Record]:
    after = _number(request, "after", 0)
    limit = _number(request, "limit", DEFAULT_LIMIT)
    wanted = {
        name: request.query_params[name]
        for name in ("event", "source_id", "verdict")
        if name in request.query_params
    }
    found = [
        record
        for record in records
        if record.seq > after
        and all(getattr(record, name) == value for name, value in wanted.items())
    ]
    return found[-limit:]


def _number(request: Request, name: str, default: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not given.isdecimal() or len(given) > 12 or (name == "limit" and given == "0"):
        raise ControlError(400, f"{name}: use a whole number above 0")
    return int(given)


def _json(body: object, *, status: int = 200) -> Response:
    return Response(
        msgspec.json.encode(body),
        status_code=status,
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


async def _refusal(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, ControlError) else 500
    return _json({"error": str(error)}, status=status)


@cache
def _page() -> tuple[str, str]:
    """Return the page and a policy that allows its own script and style alone."""
    html = files("relay.sandbox").joinpath("page.html").read_text("utf-8")
    sources = {
        kind: " ".join(
            f"'sha256-{_digest(text)}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {sources['script']};"
        f" style-src {sources['style']}; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
