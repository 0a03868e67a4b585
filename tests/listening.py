"""Where the suite listens, so that no test has to remember to.

Each place is a method through which everything of one kind passes. It goes on doing
what it did; the recorder is told what went in and what came out. Not heard are the
answers that a browser, Node or nginx got, except as far as they showed in turn.
"""

import os
import pickle
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from inspect import iscoroutinefunction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

import aiohttp
import httpx
import pytest
import redis
import structlog
from pydantic import SecretStr
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.testing import LogCapture

from relay.errors import RelayError
from relay.events import Refused
from relay.sandbox.oauth import Token
from relay.sandbox.server import SandboxServer
from relay.settings import SECRETS, Settings, variable
from relay.signing import InvalidClaim, Signer, TokenRefused
from relay.verdicts import MIN_SECRET
from tests.leaks import Kind, Recorder

# What is looked for at the end of a run, in its report.
LOOK_BACK = (
    "tests/test_leaks.py::"
    "test_what_the_suite_made_the_relay_say_holds_no_secret_and_no_other_customer"
)
TESTS = Path(__file__).parent
OVERLAP = 4096  # of an output that is read again, so that no look cuts a value in two
# Tests whose secrets are faulty, and so short, and looked for by the test itself; and
# one with the secret that its digests were once made of.
DELIBERATE = (
    "test_digests_are_made_of_the_secret_alone_and_never_change",
    "test_every_wrong_setting_is_told_on_a_line_of_its_own_without_its_value",
    "test_a_token_that_is_no_header_is_refused_unseen",
)
SIGNED = 20  # tokens that the tests of one file have signed
EVENTS = 200  # of each stream; one piece of code makes them all

# These print what they are asked to make, or keys that open nothing but a sandbox.
PRINTS_SECRETS = frozenset({"keygen", "token", "sandbox"})
# And this shows an operator all that a customer has sent.
SHOWS_CUSTOMERS = ("dead-letters", "show")

# The documents show these, and so do errors: whoever sets one has set no secret.
EXAMPLES = frozenset(
    str(example)
    for setting in Settings.model_fields.values()
    for example in setting.examples or ()
)

# What passed: the object, the arguments after it, the named ones, and the result.
Told = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


def where() -> str:
    """The test that runs now."""
    return os.environ.get("PYTEST_CURRENT_TEST", "no test").rpartition(" (")[0]


def listening(owner: type, name: str, told: Told, *, before: bool = False) -> None:
    """Tell of every call of a method, after it unless it never returns."""
    method = getattr(owner, name)
    if iscoroutinefunction(method):

        @wraps(method)
        async def heard(it: object, *args: object, **named: object) -> object:
            if before:
                told(it, args, named, None)
            result = await method(it, *args, **named)
            if not before:
                told(it, args, named, result)
            return result

    else:

        @wraps(method)
        def heard(it: object, *args: object, **named: object) -> object:
            if before:
                told(it, args, named, None)
            result = method(it, *args, **named)
            if not before:
                told(it, args, named, result)
            return result

    setattr(owner, name, heard)


@dataclass(slots=True)
class Output:
    """A file that a program writes to, kept open should the test delete it."""

    process: "subprocess.Popen[Any]"
    where: str
    file: BinaryIO
    tail: bytes = b""


@dataclass(slots=True)
class Listener:
    """Knows where to listen, and tells the recorder."""

    recorder: Recorder
    fakes: set[int] = field(default_factory=set)  # ports of sandboxes
    short: set[str] = field(default_factory=set)  # secrets that nobody can look for
    files: set[str] = field(default_factory=set)  # that had a test in this run
    _outputs: list[Output] = field(default_factory=list)
    _signers: Counter[str] = field(default_factory=Counter)
    _sent: WeakKeyDictionary[object, bytes] = field(default_factory=WeakKeyDictionary)

    def listen(self) -> None:
        """Begin; once in a session."""
        _log_as_relay_does()
        listening(SecretStr, "__init__", self._configured)
        listening(Token, "__init__", self._minted)
        listening(Signer, "sign", self._signed)
        listening(SandboxServer, "startup", self._fake)
        listening(SandboxServer, "shutdown", self._no_fake, before=True)
        listening(subprocess.Popen, "__init__", self._started)
        listening(subprocess.Popen, "communicate", self._communicated)
        listening(pytest.CaptureFixture, "readouterr", self._captured)
        listening(LogCapture, "__call__", self._structured, before=True)
        for error in (RelayError, TokenRefused, Refused, InvalidClaim):
            listening(error, "__init__", self._raised)
        listening(httpx.Client, "send", self._httpx)
        listening(httpx.AsyncClient, "send", self._httpx)
        listening(aiohttp.ClientSession, "_request", self._asked)
        listening(aiohttp.ClientResponse, "read", self._read)

    # Secrets

    def _configured(self, secret: SecretStr, *_: object) -> None:
        value = secret.get_secret_value()
        if isinstance(value, str):
            self._setting("a SecretStr", value)

    def _setting(self, name: str, value: str) -> None:
        if "://" in value:  # of an address, its password is the secret
            with suppress(ValueError):
                password = urlsplit(value).password or ""
                self.recorder.secret(password, name)
                self.recorder.secret(unquote(password), name)
            return
        for one in value.replace(",", " ").split():  # signing keys are a list
            if one not in EXAMPLES:
                self.recorder.secret(one, name)
            # At its import a module only makes the values of its tests.
            deliberate = not where() or any(test in where() for test in DELIBERATE)
            if len(one) < MIN_SECRET and not deliberate:
                self.short.add(f"{where()}: {name}")

    def _minted(self, token: Token, *_: object) -> None:
        self.recorder.secret(token.value, "an access token")

    def _signed(
        self, _signer: object, _args: object, _named: object, made: tuple[str, int]
    ) -> None:
        # Some of each file: whoever makes thousands makes them all in one way.
        file = where().partition("::")[0]
        self._signers[file] += 1
        if self._signers[file] <= SIGNED:
            self.recorder.secret(made[0], "a token")

    # Programs

    def _started(
        self,
        process: "subprocess.Popen[Any]",
        _args: object,
        named: dict[str, Any],
        _result: object,
    ) -> None:
        self._environment(named.get("env") or {})
        if _prints_secrets(process.args):
            return
        for target in (named.get("stdout"), named.get("stderr")):
            path = getattr(target, "name", None)
            if isinstance(path, str) and Path(path).is_file():
                file = Path(path).open("rb")  # noqa: SIM115  # until it has ended
                self._outputs.append(Output(process, where(), file))

    def _environment(self, environ: Mapping[str, str]) -> None:
        for setting in SECRETS:
            name = variable(setting)
            self._setting(name, environ.get(name, ""))
            path = Path(environ.get(f"{name}_FILE") or "/nonexistent")
            with suppress(OSError, UnicodeDecodeError):
                if path.is_file():  # and no pipe or device, which a look would use up
                    self._setting(name, path.read_text())

    def _communicated(
        self,
        process: "subprocess.Popen[Any]",
        _args: object,
        _named: object,
        result: tuple[str | bytes | None, str | bytes | None],
    ) -> None:
        out, err = result
        if not _prints_secrets(process.args):
            self.recorder.hear(Kind.OUTPUT, where(), out or "")
        self.recorder.hear(Kind.OUTPUT, where(), err or "")

    def look(self) -> None:
        """Read on what programs have written meanwhile."""
        for output in self._outputs:
            fresh = output.file.read()
            if fresh:
                said = output.tail + fresh
                self.recorder.hear(Kind.OUTPUT, output.where, said)
                output.tail = said[-OVERLAP:]
            if output.process.returncode is not None:
                output.file.close()
        self._outputs = [o for o in self._outputs if not o.file.closed]

    # Answers

    def _fake(self, server: SandboxServer, *_: object) -> None:
        self.fakes |= _ports(server)

    def _no_fake(self, server: SandboxServer, *_: object) -> None:
        self.fakes -= _ports(server)  # the next there may be a relay

    def _httpx(
        self, _: object, _args: object, _named: object, got: httpx.Response
    ) -> None:
        request = got.request
        if not got.is_closed or not self._is_ours(request.url.port, request.headers):
            return
        with suppress(httpx.RequestNotRead):
            own = self._request(str(request.url), request.headers, request.content)
            head = b"\n".join(b"%b: %b" % pair for pair in got.headers.raw)
            self._answer(got.status_code, request.url.path, head, got.content, own)

    def _asked(
        self,
        _: object,
        _args: object,
        named: dict[str, Any],
        got: aiohttp.ClientResponse,
    ) -> None:
        data = named.get("data")
        raw = data.encode() if isinstance(data, str) else data
        body = raw if isinstance(raw, bytes) else b""
        info = got.request_info
        if self._is_ours(info.url.port, info.headers):
            self._sent[got] = self._request(str(info.url), info.headers, body)

    def _read(
        self, got: aiohttp.ClientResponse, _args: object, _named: object, body: bytes
    ) -> None:
        own = self._sent.pop(got, None)
        if own is not None:
            head = b"\n".join(b"%b: %b" % pair for pair in got.raw_headers)
            self._answer(got.status, got.url.path, head, body, own)

    def _is_ours(self, port: int | None, headers: Mapping[str, str]) -> bool:
        """Whether the relay is asked, and is not the one who asks."""
        by_relay = headers.get("user-agent", "").startswith("voucherify-relay/")
        return port not in self.fakes and not by_relay

    def _request(self, url: str, headers: Mapping[str, str], body: bytes) -> bytes:
        self.recorder.secret(headers.get("relay-token", ""), "a token")
        lines = "\n".join(f"{name}: {value}" for name, value in headers.items())
        return self.recorder.sent(where(), body, f"{url}\n{lines}")

    def _answer(
        self, status: int, path: str, head: bytes, body: bytes, own: bytes
    ) -> None:
        if path == "/tokens" and status == 200:
            body = b""  # the one answer that is a secret, for who asked for it
        if re.fullmatch(r"/dead-letters/\d+-\d+", path) and status == 200:
            body = b""  # and the one that is all about a customer
        at = f"{where()}: {status} from {path}"
        self.recorder.hear(Kind.ANSWER, at, head + b"\n\n" + body, own)

    def raw(self, said: bytes) -> None:
        """Hear an answer that a test has read from its socket by itself."""
        self.recorder.hear(Kind.ANSWER, where(), said)

    # Within the tests

    def _captured(
        self, _: object, _args: object, _named: object, got: tuple[str | bytes, ...]
    ) -> None:
        for said in got:
            self.recorder.hear(Kind.LOG, where(), said)

    def _structured(
        self, _: object, args: tuple[Any, ...], _named: object, _result: object
    ) -> None:
        self.recorder.hear(Kind.LOG, where(), repr(args[1:]))

    def _raised(self, error: Exception, *_: object) -> None:
        self.recorder.hear(Kind.ERROR, f"{where()}: {type(error)}", str(error))

    # Redis

    def keys(self, url: str, prefix: str) -> None:
        """Hear what a test has left in Redis under its prefix, and remove it."""
        with (
            suppress(redis.RedisError),  # a test may have stopped or broken it
            redis.Redis.from_url(url, socket_timeout=2) as server,
        ):
            for key in list(server.scan_iter(match=f"{prefix}*", count=1000)):
                self._key(server, key)
                server.unlink(key)

    def _key(self, server: "redis.Redis", key: bytes) -> None:
        at = f"{where()}: {key.decode()}"
        self.recorder.hear(Kind.METRIC, at, key)
        name = key.rpartition(b"}:")[2].decode()
        if re.fullmatch(r"oauth:\w+", name):  # where all relays find the access token
            return
        holds_events = re.fullmatch(r"(q:\w+|delayed|dead|wait:.*:outcome)", name)
        kind = Kind.EVENT if holds_events else Kind.METRIC
        self.recorder.hear(kind, at, repr(_content(server, key)))

    def report(self, report: pytest.TestReport, *, heard: bool) -> None:
        """Hear what a test that has ended left in pytest's own capture."""
        self.files.add(report.nodeid.partition("::")[0])
        if heard:
            return
        if report.when == "teardown":  # has the sections of setup and call, too
            for _, said in report.sections:
                self.recorder.hear(Kind.LOG, report.nodeid, said)
            self.look()

    # At the end

    def hand_over(self, file: Path) -> None:
        """Leave all that was heard in this process to another."""
        self.look()
        half = file.with_name(f".{file.name}")  # a process may be killed meanwhile
        half.write_bytes(pickle.dumps((self.recorder.packed(), self.short)))
        half.rename(file)

    def take_over(self, file: Path) -> None:
        """Take what another process has handed over."""
        packed, short = pickle.loads(file.read_bytes())  # noqa: S301  # our own
        self.recorder.add(packed)
        self.short |= short

    def faults(self) -> list[str]:
        """What was said and must not be, and whether something was not heard."""
        self.look()
        faults = [*sorted(self.short), *map(str, self.recorder.leaks())]
        if self.files >= all_files():
            faults += self._deaf()
        return faults

    def _deaf(self) -> Iterator[str]:
        """Where a run of the whole suite must hear something, and this has not."""
        recorder = self.recorder
        for kind in set(Kind) - set(recorder.heard):
            yield f"no {kind} was heard"
        known = {variable(name) for name in SECRETS} | {"an access token", "a token"}
        for name in known - set(recorder.secrets.values()):
            yield f"no secret was known as {name}"
        if len(recorder.people) <= 5:
            yield "the customers of most tests are not known"


def all_files() -> set[str]:
    """The files of the suite, as pytest names them."""
    found = set()
    for place, directories, names in os.walk(TESTS):
        directories[:] = set(directories) - {"node_modules", "dist"}
        files = (Path(place, name) for name in names if name.endswith(".py"))
        found |= {f for f in files if f.name.startswith("test_")}
    return {str(file.relative_to(TESTS.parent)) for file in found}


def _ports(server: SandboxServer) -> set[int]:
    sockets = [sock for each in server.servers for sock in each.sockets]
    return {sock.getsockname()[1] for sock in sockets}


def _log_as_relay_does() -> None:
    """Leave out the locals of a traceback, which structlog by itself would show."""
    *processors, _ = structlog.get_config()["processors"]
    last = ConsoleRenderer(colors=False, exception_formatter=plain_traceback)
    structlog.configure(processors=[*processors, last])


def _content(server: "redis.Redis", key: bytes) -> object:
    match server.type(key):
        case b"hash":
            return server.hgetall(key)
        case b"zset":
            return server.zrange(key, 0, EVENTS, withscores=True)
        case b"list":
            return server.lrange(key, 0, -1)
        case b"set":
            return server.smembers(key)
        case b"stream":
            return server.xrange(key, count=EVENTS)
        case _:
            return server.get(key)


def _prints_secrets(command: object) -> bool:
    """Whether this is a command of the relay that prints what it is asked to make."""
    words = [str(w) for w in command] if isinstance(command, list | tuple) else []
    return any(
        (Path(program).name == "relay" and made in PRINTS_SECRETS)
        or (program, made) == SHOWS_CUSTOMERS
        for program, made in pairwise(words)
    )


def of_session() -> Listener:
    """The one that listens to this run of the suite."""
    return _SESSION


_SESSION = Listener(Recorder())
