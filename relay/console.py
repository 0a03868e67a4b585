"""What the commands share: exit codes, settings, the queue, and safe words."""

import asyncio
import queue as queues
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
HANGS_S = 0.5  # what takes longer to end after its result is not waited for

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


def in_time(work: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, bool]:
    """The result of `work`, and whether something of it still hangs in a thread.

    A name server that stays silent holds a thread for as long as the system waits for
    it, and Python would wait for that thread before it ends.
    """
    told: queues.SimpleQueue[T | BaseException] = queues.SimpleQueue()

    async def tell() -> None:
        told.put(await work())

    def run() -> None:
        try:
            asyncio.run(tell())
        except BaseException as error:  # for the one who waits
            told.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    result = told.get()
    thread.join(HANGS_S)
    if isinstance(result, BaseException):
        raise result
    return result, thread.is_alive()
