"""Processes seen from outside: what a program runs, and what it leaves behind."""

import subprocess

from tests.support import eventually


def processes(*, group: int | None = None, mentions: str = "") -> dict[int, str]:
    """The command line of each live process of a process group, or that mentions a
    text; what has ended and waits for its parent does not count."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,pgid=,stat=,args="],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for line in listed.splitlines():
        pid, pgid, stat, args = line.split(None, 3)
        wanted = int(pgid) == group or (mentions and mentions in args)
        if wanted and not stat.startswith("Z"):
            found[int(pid)] = args
    return found


def children(group: int) -> list[int]:
    """The processes that a relay with `--workers` has started to take events."""
    return [pid for pid, args in processes(group=group).items() if "spawn_main" in args]


async def gone(*, group: int, within: float = 5.0) -> None:
    """Return once a process group has no process left, Python's own helpers too."""

    async def empty() -> bool:
        return not processes(group=group)

    await eventually(empty, within=within)
