"""The machine a run took place on, and which core does what."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".cache" / "bench"  # ignored by git; on the disk of the repository

CORES = sorted(os.sched_getaffinity(0))
# The server under test has a core of its own; load, Redis and upstream share another.
SERVER_CORE = CORES[0]
OTHER_CORE = CORES[1] if len(CORES) > 1 else CORES[0]

# Debian keeps servers where only root's path looks.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

PYTHON_PACKAGES = ("uvicorn", "uvloop", "httptools", "starlette", "redis", "hiredis")
PROGRAMS = {
    "wrk": (["wrk", "--version"], r"wrk \S*?([\d.]+)"),
    "redis-server": (["redis-server", "--version"], r"v=([\d.]+)"),
    "nginx": (["nginx", "-v"], r"nginx/([\d.]+)"),
    "caddy": (["caddy", "version"], r"v?([\d.]+)"),
    "node": (["node", "--version"], r"v([\d.]+)"),
}


def find(program: str) -> str | None:
    """Where a program is, looking where servers are installed too."""
    return shutil.which(program, path=PATH)


def pin_to(core: int) -> Callable[[], None]:
    """For a child before it becomes its program; its own children inherit it."""

    def pin() -> None:
        os.sched_setaffinity(0, {core})

    return pin


def describe() -> dict[str, str]:
    """What a reader needs to weigh the figures; no name of the machine, no path."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.+)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    told = {
        "processor": model[1] if model else platform.processor(),
        "cores": str(len(CORES)),
        "memory": f"{int(memory[1]) / 1024 / 1024:.0f} GiB" if memory else "?",
        "kernel": platform.release().partition("-")[0],
        "virtual": "yes" if "hypervisor" in cpuinfo else "no",
        "Python": platform.python_version(),
    }
    told |= {package: version(package) for package in PYTHON_PACKAGES}
    told |= {program: program_version(program) for program in PROGRAMS}
    return told


def program_version(program: str) -> str:
    command, pattern = PROGRAMS[program]
    if find(command[0]) is None:
        return "absent"
    said = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": PATH},
    )
    match = re.search(pattern, said.stdout + said.stderr)
    return match[1] if match else "?"


def busy_s() -> float:
    """Processor time of all cores that was not idle, since the machine started."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *spent = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in CORES:
            # user nice system idle iowait irq softirq steal: proc(5)
            total += sum(map(int, spent[:3])) + sum(map(int, spent[5:8]))
    return total / os.sysconf("SC_CLK_TCK")


def load_average() -> float:
    """Of the last minute: what else the machine was busy with before a run."""
    return os.getloadavg()[0]
