"""Fixtures that every test may use. Real servers only; nothing is mocked."""

import os

import pytest

from tests.listening import of_session
from tests.servers import prefix, redis_url, valkey_url  # noqa: F401  # fixtures

LAST = "test_what_the_suite_made_the_relay_say_holds_no_secret_and_no_other_customer"


def pytest_configure() -> None:
    of_session().listen()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    of_session().report(report)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the test that looks at what all others have made the relay say last."""
    items.sort(key=lambda item: item.name == LAST)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where every program can be had, as in CI, a test skipped for one is a failure."""
    if not os.environ.get("TESTS_MUST_NOT_SKIP"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    # Each such skip names the package to install; others say what a machine lacks.
    reasons = [str(report.longrepr) for report in reporter.stats.get("skipped", ())]
    if any("(Debian: " in reason for reason in reasons):
        reporter.write_line("Tests were skipped for want of a program.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
