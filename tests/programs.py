"""Programs that tests run: those of the system, and this package's own command.

A test that needs a program of the system carries the mark `system(program)`. Where
it is absent the test is skipped, with a reason that begins with "needs", so that CI
can tell a missing program from any other skip.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

# Debian keeps servers where only root's path looks.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

RELAY = (sys.executable, "-m", "relay")


def find(program: str) -> Path | None:
    """Where a program is, looking where servers are installed too."""
    found = shutil.which(program, path=_PATH)
    return Path(found) if found else None


def needs(program: str, *, package: str) -> list[pytest.MarkDecorator]:
    """The marks of a test that runs `program`, from Debian's `package`."""
    return [
        pytest.mark.system(program),
        pytest.mark.skipif(
            find(program) is None,
            reason=f"needs {program} (Debian: apt install {package})",
        ),
    ]


class Program:
    """A program while it runs, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def said(self) -> str:
        """Both its outputs, from the start."""
        return self._output.read_text("utf-8", errors="replace")

    def wait_for(self, pattern: str, *, within: float = 15.0) -> re.Match[str]:
        """Return the match once it has said `pattern`; fail if it ends before."""
        deadline = time.monotonic() + within
        while (match := re.search(pattern, self.said, re.MULTILINE)) is None:
            ended = self.process.poll() is not None
            assert not ended, f"it ended without saying {pattern!r}:\n{self.said}"
            late = time.monotonic() > deadline
            assert not late, f"it has not said {pattern!r} yet:\n{self.said}"
            time.sleep(0.01)
        return match

    def stop(self, *, within: float = 20.0) -> int:
        """Ask it to end, and return its exit code; kill it if it does not."""
        self.process.terminate()
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def running(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None
) -> Iterator[Program]:
    """Run `command` with `env` beside the path, and nothing else of ours."""
    with tempfile.TemporaryDirectory(prefix="relay-test-") as place:
        output = Path(place) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={"PATH": _PATH, "HOME": place, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        program = Program(process, output)
        try:
            yield program
        finally:
            if process.poll() is None:
                program.stop()
