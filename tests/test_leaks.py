"""Nothing that the relay says holds a secret, or what another customer has sent.

At the end of a run conftest.py looks at everything that the tests made it say. These
show that it would find a leak, wherever and however it is written.
"""

import asyncio
import base64
import html
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, cast
from urllib.parse import quote, urlsplit

import aiohttp
import httpx
import pytest
import redis
import structlog
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from uvicorn._types import ASGIApplication

from relay.errors import RelayError
from relay.sandbox.server import serve_sandbox
from tests.leaks import Kind, Recorder
from tests.listening import Listener, all_files, of_session, where
from tests.programs import RELAY
from tests.support import serve

SECRET = "k3y/of+the~shöp&<1>"
EMAIL = "jane.doe+1@example.com"

DISGUISES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "json": lambda text: json.dumps({"said": text}),
    "json-in-json": lambda text: json.dumps({"said": json.dumps({"it": text})}),
    "json-unicode": lambda text: json.dumps({"said": text}, ensure_ascii=False),
    "repr": lambda text: repr([text]),
    "url": lambda text: f"/?q={quote(text, safe='')}",
    "html": html.escape,
    "hex": lambda text: text.encode().hex(),
    "basic": lambda text: base64.b64encode(f"app-2:{text}".encode()).decode(),
    "base64": lambda text: base64.b64encode(f"{text} is it".encode()).decode(),
    "base64url": lambda text: base64.urlsafe_b64encode(f".{text}".encode()).decode(),
}


@pytest.fixture
def scratch() -> Iterator[Recorder]:
    """A recorder of this test's own, which hears what the session's would."""
    listener = of_session()
    sessions, listener.recorder = listener.recorder, Recorder()
    yield listener.recorder
    listener.look()
    listener.recorder = sessions


def names(recorder: Recorder) -> set[tuple[str, Kind]]:
    return {(leak.name, leak.kind) for leak in recorder.leaks()}


# What is found


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_a_secret_is_found_everywhere_in_every_disguise(
    disguise: Callable[[str], str], kind: Kind
) -> None:
    recorder = Recorder()
    recorder.hear(kind, "here", f"before {disguise(SECRET)} after")
    recorder.hear(kind, "here", "nothing of it")
    recorder.secret(SECRET, "the key")  # known late
    assert names(recorder) == {("the key", kind)}
    assert SECRET not in str(recorder.leaks())


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.EVENT])
@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_what_a_customer_has_sent_is_found_where_it_does_not_belong(
    disguise: Callable[[str], str], kind: Kind
) -> None:
    recorder = Recorder()
    recorder.sent("here", json.dumps({"customer": {"email": EMAIL}}).encode())
    recorder.hear(kind, "here", disguise(EMAIL))
    recorder.hear(Kind.EVENT, "here", disguise(EMAIL))
    assert names(recorder) == {("a customer's email", kind)}


def test_what_a_sender_has_said_may_be_said_back_to_it_alone() -> None:
    recorder = Recorder()
    body = {"events": [{"event": "e", "id": "id-12345", "customer": {"email": EMAIL}}]}
    own = recorder.sent("here", json.dumps(body).encode())
    other = recorder.sent("here", b'{"customer":{"source_id":"somebody-2"}}')
    answer = json.dumps({"id": "id-12345", "customer": {"email": EMAIL}})
    recorder.hear(Kind.ANSWER, "here", answer, own)
    assert recorder.leaks() == []
    recorder.hear(Kind.ANSWER, "here", answer, other)
    assert names(recorder) == {("a customer's email", Kind.ANSWER)}


def test_a_value_that_a_table_has_broken_is_found() -> None:
    recorder = Recorder()
    recorder.secret(SECRET, "the key")
    recorder.hear(Kind.OUTPUT, "here", f"detail  {SECRET[:7]}\n        {SECRET[7:]}\n")
    assert names(recorder) == {("the key", Kind.OUTPUT)}


def test_much_is_kept_small_and_all_of_it_is_looked_at() -> None:
    recorder = Recorder()
    for n in range(6000):
        recorder.hear(Kind.LOG, "here", f"{n} " * 300)
    recorder.hear(Kind.LOG, "here", SECRET)
    for _ in range(6000):
        recorder.hear(Kind.LOG, "here", "nothing " * 100)
    recorder.secret(SECRET, "the key")
    assert names(recorder) == {("the key", Kind.LOG)}
    assert recorder.size < 1_000_000


# Where it listens

PRINT = "import os; print(os.environ['RELAY_CLIENT_TOKEN'])"


@pytest.mark.parametrize("to", ["pipe", "file"])
def test_the_output_of_a_program_is_heard(
    to: str, scratch: Recorder, tmp_path: Path
) -> None:
    command, env = [sys.executable, "-c", PRINT], {"RELAY_CLIENT_TOKEN": "t0k3n-t0k3n"}
    if to == "pipe":
        subprocess.run(command, env=env, check=True, capture_output=True)
    else:
        with (tmp_path / "said").open("wb") as said:
            subprocess.run(command, env=env, check=True, stdout=said)
        (tmp_path / "said").unlink()
    of_session().look()
    assert names(scratch) == {("RELAY_CLIENT_TOKEN", Kind.OUTPUT)}


@pytest.mark.anyio
@pytest.mark.parametrize("client", ["httpx", "httpx-sync", "aiohttp"])
async def test_an_answer_is_heard_whoever_asks(client: str, scratch: Recorder) -> None:
    secret = SecretStr("t0k3n-t0k3n")

    async def leak(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse(["jane-0001"], headers={"X-It": secret.get_secret_value()})

    body = {"customer": {"source_id": "jane-0001"}}
    app = Starlette(routes=[Route("/", leak, methods=["POST"])])
    async with serve(cast("ASGIApplication", app)) as url:
        if client == "httpx":
            async with httpx.AsyncClient() as session:
                await session.post(url, json=body)
        elif client == "httpx-sync":
            await asyncio.to_thread(httpx.post, url, json=body)
        else:
            async with (
                aiohttp.ClientSession() as asking,
                asking.post(url, data=json.dumps(body)) as answer,
            ):
                await answer.text()
    # The customer's own name came back to itself.
    assert names(scratch) == {("a SecretStr", Kind.ANSWER)}


@pytest.mark.anyio
async def test_a_sandbox_and_what_the_relay_itself_asks_are_not_heard(
    scratch: Recorder,
) -> None:
    async with serve_sandbox() as running, httpx.AsyncClient() as session:
        await session.get(running.url)
        port = urlsplit(running.url).port
        assert port in of_session().fakes
    assert port not in of_session().fakes  # the next one there may be a relay
    agent = {"user-agent": "voucherify-relay/1"}
    async with (
        serve(cast("ASGIApplication", Starlette())) as url,
        httpx.AsyncClient(headers=agent) as session,
    ):
        await session.get(url)
        assert scratch.kinds() == set()
        await session.get(url, headers={"user-agent": "a browser"})
    assert scratch.kinds() == {Kind.ANSWER}


def test_what_relay_is_asked_to_print_is_not_heard(
    scratch: Recorder, tmp_path: Path
) -> None:
    env = {"HOME": str(tmp_path), "RELAY_SIGNING_KEYS": "s1gning-" * 4}
    for command in (["keygen"], ["token", "u1"]):
        done = subprocess.run(
            [*RELAY, *command], env=env, check=True, capture_output=True
        )
        assert done.stdout
    assert scratch.kinds() <= {Kind.OUTPUT}  # warnings, on the other output
    assert "RELAY_SIGNING_KEYS" in scratch.secrets.values()
    assert names(scratch) == set()


def test_errors_logs_and_prints_within_a_test_are_heard(
    scratch: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = SecretStr("t0k3n-t0k3n").get_secret_value()
    RelayError(f"no {secret} here")
    assert names(scratch) == {("a SecretStr", Kind.ERROR)}
    print(secret)  # noqa: T201  # what a careless relay would do
    capsys.readouterr()
    assert names(scratch) == {("a SecretStr", kind) for kind in (Kind.ERROR, Kind.LOG)}


def test_structured_logs_and_what_pytest_has_captured_are_heard(
    scratch: Recorder,
) -> None:
    secret = SecretStr("t0k3n-t0k3n").get_secret_value()
    with structlog.testing.capture_logs():
        structlog.get_logger().info("it.leaked", detail=secret)
    [first] = scratch.leaks()
    of_session().report(
        a_report("setup", secret), heard=False
    )  # comes with the last one
    assert scratch.leaks() == [first]  # for it comes with the last one as well
    of_session().report(a_report("teardown", secret), heard=False)
    assert len(scratch.leaks()) == 2


def a_report(when: Literal["setup", "teardown"], said: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid="here",
        location=("here", 0, ""),
        keywords={},
        outcome="passed",
        longrepr=None,
        when=when,
        sections=[("Captured stdout call", said)],
    )


def test_redis_is_heard_names_and_values_and_left_empty(
    scratch: Recorder, valkey_url: str
) -> None:
    key = "{leaky}:"
    secret = SecretStr("t0k3n-t0k3n").get_secret_value()
    scratch.person(EMAIL, "a customer's email", where())
    with redis.Redis.from_url(valkey_url) as server:
        server.set(f"{key}replayed:{EMAIL}", "")
        server.hset(f"{key}totals", secret, 1)
        server.zadd(f"{key}names", {EMAIL: 1})
        server.rpush(f"{key}budget:x", secret)
        server.sadd(f"{key}catalog", EMAIL)
        server.set(f"{key}pause:x", secret)
        server.xadd(f"{key}q:high", {"e": EMAIL})  # where it belongs
        server.xadd(f"{key}dead", {"error": secret})
        server.hset(f"{key}oauth:d1gest", "value", secret)  # likewise
        of_session().keys(valkey_url, "{leaky}")
        assert server.keys("{leaky}*") == []
    found = [(leak.name, leak.where.partition("}:")[2]) for leak in scratch.leaks()]
    assert sorted(found) == [
        ("a SecretStr", "budget:x"),
        ("a SecretStr", "dead"),
        ("a SecretStr", "pause:x"),
        ("a SecretStr", "totals"),
        ("a customer's email", "catalog"),
        ("a customer's email", "names"),
        ("a customer's email", f"replayed:{EMAIL}"),
    ]


def test_a_secret_of_one_process_is_found_in_what_another_has_heard(
    tmp_path: Path,
) -> None:
    knows, hears = Listener(Recorder()), Listener(Recorder())
    knows.recorder.secret(SECRET, "a key")
    knows.short.add("tests/test_it.py::test_it: RELAY_OPS_TOKEN")
    hears.recorder.sent("tests/test_it.py::a", b'{"email": "%s"}' % EMAIL.encode())
    hears.recorder.hear(Kind.LOG, "tests/test_it.py::b", f"{SECRET} of {EMAIL}")
    whole = Listener(Recorder())
    for number, one in enumerate((knows, hears)):
        one.hand_over(tmp_path / str(number))
        whole.take_over(tmp_path / str(number))
    short, *leaks = whole.faults()
    assert short == "tests/test_it.py::test_it: RELAY_OPS_TOKEN"
    assert len(leaks) == 2
    assert "a key in the log" in leaks[0]
    assert "a customer's email in the log" in leaks[1]


def test_a_run_of_all_files_that_has_heard_nothing_is_at_fault() -> None:
    listener = Listener(Recorder())
    assert listener.faults() == []
    listener.files |= all_files()
    assert "no answer was heard" in listener.faults()
    listener.files.pop()
    assert listener.faults() == []
