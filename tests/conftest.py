"""Fixtures that every test may use, and what is done once for a whole run.

Real servers only; nothing is mocked. Tests may run in several processes, which
pytest-xdist calls workers: each listens to its own tests, and the process that called
them looks at what all of them have heard when they have ended.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.listening import LOOK_BACK, of_session
from tests.servers import prefix, redis_url, valkey_url  # noqa: F401  # fixtures

# No test is timed: a shared machine stands still for a second now and then.
settings.register_profile(
    "relay", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("relay")

_HEARD = tempfile.TemporaryDirectory(prefix="heard-")


def pytest_configure() -> None:
    of_session().listen()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["heard"] = _HEARD.name


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A report from a worker, which has a `node`, has been heard there.
    of_session().report(report, heard=hasattr(report, "node"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if (given := getattr(session.config, "workerinput", None)) is not None:
        of_session().hand_over(Path(given["heard"]) / given["workerid"])
        return
    _look_back(session)
    _forbid_skips(session)


def _look_back(session: pytest.Session) -> None:
    """Look at all that the tests have made the relay say, as one test more."""
    listener = of_session()
    for file in sorted(Path(_HEARD.name).glob("gw*")):
        listener.take_over(file)
    _HEARD.cleanup()
    if not listener.files:
        return
    faults = listener.faults()
    report = pytest.TestReport(
        nodeid=LOOK_BACK,
        location=(LOOK_BACK.partition("::")[0], None, LOOK_BACK.rpartition("::")[2]),
        keywords={},
        outcome="failed" if faults else "passed",
        longrepr="\n".join(faults) or None,
        when="call",
    )
    session.config.hook.pytest_runtest_logreport(report=report)
    if faults:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _forbid_skips(session: pytest.Session) -> None:
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
