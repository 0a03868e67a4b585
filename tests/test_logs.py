"""What is logged can be read by programs, and shows no secret and no event."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from relay.embedded import EmbeddedServer
from relay.sandbox.config import CLIENT_TOKEN
from tests.integration.stack import Process, Sender, Stack, stack
from tests.programs import RELAY
from tests.support import eventually

# Ours and a library's, plain and with a traceback whose frames hold what nobody may
# see.
SCRIPT = """
import logging, sys
import structlog
from relay import logs

logs.configure(sys.argv[1])
log = structlog.get_logger()

def deliver(body, token):
    headers = {"X-Client-Token": token}
    try:
        raise ValueError("no answer")
    except ValueError as error:
        raise RuntimeError("no route") from error

def fail(report):
    token, body = "S3" + "CRET", {"customer": "Jane" + "Doe"}
    try:
        deliver(body, token)
    except RuntimeError:
        report()

log.info("one.event", reason="why", count=2)
log.debug("not.shown")
fail(lambda: log.exception("two.failed"))
logging.getLogger("uvicorn.error").info("not shown")
logging.getLogger("uvicorn.error").warning("a %s of a library", "warning")
fail(lambda: logging.getLogger("uvicorn.error").error("Exception", exc_info=True))
"""


def logged(log_format: str) -> str:
    command = [sys.executable, "-c", SCRIPT, log_format]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def on_a_terminal(log_format: str) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SCRIPT, log_format]
    with subprocess.Popen(command, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        try:
            while chunk := os.read(ours, 65536):
                said += chunk
        except OSError:  # EIO: how Linux says that the other side is closed
            pass
        assert process.wait() == 0
    os.close(ours)
    return said.decode()


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_each_line_is_json_whoever_wrote_it(log_format: str) -> None:
    lines = [json.loads(line) for line in logged(log_format).splitlines()]
    assert [line["event"] for line in lines] == [
        "one.event",
        "two.failed",
        "a warning of a library",
        "Exception",
    ]
    assert [line["level"] for line in lines] == ["info", "error", "warning", "error"]
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert (lines[0]["reason"], lines[0]["count"]) == ("why", 2)
    assert lines[2]["logger"] == "uvicorn.error"
    for line in (lines[1], lines[3]):
        raised = [(e["exc_type"], e["exc_value"]) for e in line["exception"]]
        assert raised == [("RuntimeError", "no route"), ("ValueError", "no answer")]
        assert [frame["name"] for frame in line["exception"][0]["frames"]] == [
            "fail",
            "deliver",
        ]


def test_a_terminal_gets_lines_for_people() -> None:
    said = on_a_terminal("auto")
    assert "\x1b[" in said
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert re.search(r"\[info +\] one\.event +count=2 reason=why", plain)
    assert "a warning of a library" in plain
    assert plain.count("RuntimeError: no route") == 2


def test_console_lines_in_a_file_have_no_colours() -> None:
    said = logged("console")
    assert "\x1b" not in said
    assert re.search(r"\[info +\] one\.event +count=2 reason=why", said)


def test_json_can_be_had_on_a_terminal() -> None:
    assert all(json.loads(line) for line in on_a_terminal("json").splitlines())


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_values(log_format: str) -> None:
    for said in (logged(log_format), on_a_terminal(log_format)):
        assert "deliver" in said
        assert "S3CRET" not in said
        assert "JaneDoe" not in said


@pytest.mark.anyio
async def test_a_relay_in_trouble_logs_json_and_neither_secrets_nor_events(
    prefix: str, tmp_path: Path
) -> None:
    with EmbeddedServer(data_dir=tmp_path / "data") as server:
        async with stack(server.url, prefix, tmp_path) as relay:
            process = start(relay, tmp_path / "logged")
            await trouble(await process.track_url(), server, relay)
            await relay.drained()
            assert await process.stop() == 0
    # What is said to the person who started it is not in the way.
    assert process.text.startswith("Taking events on http://")
    logged = (tmp_path / "logged").read_text()
    events = [json.loads(line)["event"] for line in logged.splitlines()]
    assert {
        "settings.doubtful",
        "Invalid HTTP request received.",
        "forwarder.not_delivered",
        "forwarder.queue_unavailable",
    } <= set(events)
    for secret in (CLIENT_TOKEN, "S3CRET", "Jane", "/track", "HTTP/1.1"):
        assert secret not in logged + process.text.partition("/track")[2]


def start(relay: Stack, logged: Path) -> Process:
    """`relay serve` with its two outputs apart."""
    said = relay.directory / "said"
    with said.open("wb") as output, logged.open("wb") as errors:
        popen = subprocess.Popen(
            [*RELAY, "serve"],
            env=relay.environ | {"RELAY_TYPO": "S3CRET"},
            stdout=output,
            stderr=errors,
            cwd=relay.directory,
        )
    relay.processes.append(Process(popen, said))
    return relay.processes[-1]


async def trouble(url: str, server: EmbeddedServer, relay: Stack) -> None:
    """An answer of 500, a request that is none, and a Redis that dies."""
    relay.sandbox.fail_next(1, status=500)
    host, port = url.split("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"S3CRET not HTTP\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()
    await writer.wait_closed()
    async with Sender() as sender:
        assert await sender.send(url, 1, customer="Jane") == 202

        async def refused() -> bool:
            return len(relay.sandbox.requests) == 1

        await eventually(refused)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)

        async def taken() -> bool:
            return await sender.send(url, 2, customer="Jane") == 202

        await eventually(taken)
