"""What the commands share: exit codes, settings, the queue, and safe words."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import structlog
import typer

from relay import logs
from relay.embedded import running_url
from relay.errors import QueueUnavailable, RelayError
from relay.settings import Role, Settings, load_settings

if TYPE_CHECKING:  # it takes a while to import
    from relay.queue import Queue

T = TypeVar("T")

FAILED, USAGE, CHECK_FAILED = 1, 2, 3

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def read_settings(role: Role) -> Settings:
    """The settings, with their warnings logged."""
    settings = load_settings(role)
    logs.configure(settings.log_format)
    for warning in settings.warnings:
        structlog.get_logger().warning("settings.doubtful", detail=warning)
    return settings


async def on_queue(settings: Settings, work: Callable[["Queue"], Awaitable[T]]) -> T:
    """Do something with the queue, wherever it is; say where it was looked for."""
    from relay.queue import Queue

    url = (
        settings.redis_url.get_secret_value()
        if settings.redis_url
        else running_url(settings.data_dir)
    )
    queue = Queue(url=url, prefix=settings.redis_prefix)
    try:
        return await work(queue)
    except QueueUnavailable as error:
        where = (
            "at RELAY_REDIS_URL"
            if settings.redis_url
            else f"in {settings.data_dir} (RELAY_DATA_DIR; or set RELAY_REDIS_URL)"
        )
        msg = f"{error.detail} Does the relay run, and keep its events {where}?"
        raise RelayError(msg) from error
    finally:
        await queue.aclose()


def plain(value: object) -> str:
    """Text of browsers for a terminal: nothing in it steers that."""
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
