"""Fixtures that every test may use. Real servers only; nothing is mocked."""

import os

import pytest

from tests.servers import prefix, redis_url, valkey_url  # noqa: F401  # fixtures


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where every program is there, as in CI, a skipped test is a failure."""
    if not os.environ.get("TESTS_MUST_NOT_SKIP"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    if reporter.stats.get("skipped"):
        reporter.write_line("Tests were skipped, and here none may be.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
