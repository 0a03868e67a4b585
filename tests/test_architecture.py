"""Imports point down the ladder that docs/architecture.md draws."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "relay"

# Top to bottom. A module may import only from rows below its own.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"letter_commands"},
    {"console"},
    {"demo"},
    {"demo_shop"},
    {"demo_follower"},
    {"serving"},
    {"app", "worker", "sandbox", "checks", "explain"},
    {"probes"},
    {"assembly"},
    {"settings"},  # above everything it configures: only the roots can read it
    {"values"},
    {"protocol"},
    {"endpoints", "ops", "reload", "erasure", "snippet"},
    {"counters", "letters_api", "metrics"},
    {"replay"},
    {"dead_letters"},
    {"admission", "forwarder"},
    {"judgement"},
    {"queue", "voucherify", "embedded", "edge"},
    {"forecast", "line", "forms"},
    {"oauth", "policy"},
    {"grants", "answers", "typescript"},
    {"activity"},
    {"catalog", "signing", "transport", "verdicts"},
    {"events", "limits", "origins", "retry", "digests", "toml_lines", "browsers"},
    {"addresses", "cluster", "headers", "replies"},
    {"collector", "errors", "outcomes", "logs", "findings", "queueable"},
]
LEVEL = {name: depth for depth, row in enumerate(LAYERS) for name in row}

# Sans-I/O: bytes and values in, values out.
PURE = {
    "activity",
    "addresses",
    "answers",
    "browsers",
    "catalog",
    "cluster",
    "digests",
    "edge",
    "events",
    "findings",
    "forecast",
    "forms",
    "grants",
    "headers",
    "judgement",
    "limits",
    "metrics",
    "origins",
    "policy",
    "queueable",
    "replies",
    "retry",
    "signing",
    "toml_lines",
    "typescript",
    "verdicts",
    "errors",
    "outcomes",
}
IO_LIBRARIES = {
    "aiohttp",
    "anyio",
    "asyncio",
    "httpx",
    "os",
    "redis",
    "socket",
    "starlette",
    "uvicorn",
}

# inet_pton reads a text, and opens nothing.
CONVERTS = {"addresses": {"socket"}}

MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def unit(path: Path) -> str:
    """The flat module, or the subpackage, that `path` belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "relay":
            names.update(f"relay.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def internal(path: Path) -> set[str]:
    used = {n.split(".")[1] for n in imports(path) if n.startswith("relay.")}
    return used - {unit(path), "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    level = LEVEL[unit(path)]  # KeyError: a new module needs a place in LAYERS
    assert {name for name in internal(path) if LEVEL[name] <= level} == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_pure_modules_do_no_io(path: Path) -> None:
    if unit(path) in PURE:
        used = {n.split(".")[0] for n in imports(path)} & IO_LIBRARIES
        assert used == CONVERTS.get(unit(path), set())


def test_the_sandbox_is_a_twin_not_a_copy() -> None:
    """It reads the published schema with its own eyes, not with the relay's."""
    for path in (PACKAGE / "sandbox").glob("*.py"):
        assert internal(path) <= {"errors", "outcomes", "sandbox"}, path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_relay_knows_nothing_of_what_proves_it(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)}
    assert used & {"simulation", "tests", "hypothesis"} == set()
