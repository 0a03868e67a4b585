"""Logs: one constant dotted name an event, values beside it; no payloads, no people.

One line an event on standard error, JSON or for a terminal, and libraries' own words
the same way. A traceback shows where, never the values there: they hold events and
credentials.
"""

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import Processor


def configure(log_format: str) -> None:
    """Write logs to standard error; `auto` is for people on a terminal, else JSON."""
    terminal = sys.stderr.isatty()
    people = log_format == "console" or (log_format == "auto" and terminal)
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last = _for_people(colors=terminal) if people else _for_programs()
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(
            cast("TextIO", _Patient(sys.stderr))
        ),
        cache_logger_on_first_use=True,
    )
    # Libraries speak up only when something is wrong.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class _Patient:
    """A stream that takes what it can: a full disk or a gone reader stops no event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _for_people(*, colors: bool) -> list[Processor]:
    return [
        structlog.dev.ConsoleRenderer(
            colors=colors,
            # The default one shows the locals of every frame.
            exception_formatter=structlog.dev.plain_traceback,
        )
    ]


def _for_programs() -> list[Processor]:
    return [
        structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        ),
        structlog.processors.JSONRenderer(),
    ]
