"""The recipes of `docs/recipes/snippet`, built as their readers build them.

The snippet's own package is what `npm pack` makes of `snippet/`, unpacked where the
recipes look for it: what is published is what is tested. Everything is made below
`tests/recipes`, whose `node_modules` has React, Vue, Next.js and the compilers.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.npm import ROOT, installed

HOME = ROOT / "tests" / "recipes"
RECIPES = ROOT / "docs" / "recipes" / "snippet"
# Of Node itself; what it runs must not call home.
QUIET = {"NEXT_TELEMETRY_DISABLED": "1", "NO_UPDATE_NOTIFIER": "1"}
BUILT_WITHIN_S = 120.0


@dataclass
class Workshop:
    """A place where recipes are built, each when it is first asked for."""

    place: Path

    @cached_property
    def tarball(self) -> Path:
        """What `npm publish` would send."""
        source = self.place / "snippet"
        # What is installed and built there is not the source; the compilers are
        # found in tests/recipes, in the same versions.
        ignored = shutil.ignore_patterns("node_modules", "dist", "*.tgz")
        shutil.copytree(ROOT / "snippet", source, ignore=ignored)
        # Its .npmrc forbids all scripts, its own one that builds it among them.
        command = ("npm", "pack", "--ignore-scripts=false", "--loglevel=error")
        self.run(source, *command, "--pack-destination", "..")
        [made] = self.place.glob("*.tgz")
        return made

    @cached_property
    def package(self) -> Path:
        """The same, installed for everything that is built here."""
        modules = self.place / "node_modules"
        with tarfile.open(self.tarball) as tar:
            tar.extractall(modules, filter="data")
        return (modules / "package").rename(modules / "voucherify-relay")

    @cached_property
    def react(self) -> Path:
        return self._bundle("react", "main.tsx")

    @cached_property
    def vue(self) -> Path:
        return self._bundle("vue", "main.ts")

    @cached_property
    def nextjs(self) -> Path:
        source = self.copy("nextjs", below="app")
        shutil.copy(RECIPES.parent / "relay_token.mjs", source / "app")
        self.run(source, *NEXT, "build")
        return source

    def copy(self, recipe: str, *, below: str = "") -> Path:
        """A directory with the files of a recipe, and the one that all share."""
        assert self.package.is_dir()
        source = self.place / recipe
        shutil.copytree(RECIPES / recipe, source)
        shutil.copy(RECIPES / "relay.ts", source / below)
        return source

    def run(self, directory: Path, *command: str) -> str:
        """What a program prints that must succeed."""
        done = self.attempt(directory, *command)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def attempt(
        self, directory: Path, *command: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=directory,
            env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **QUIET},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILT_WITHIN_S,
            check=False,
        )

    def _bundle(self, recipe: str, entry: str) -> Path:
        source = self.copy(recipe)
        bundle = str(HOME / "bundle.mjs")
        self.run(source, "node", bundle, entry, "public")
        shutil.copy(source / "index.html", source / "public")
        return source / "public"


NEXT = ("node", str(HOME / "node_modules" / "next" / "dist" / "bin" / "next"))
TSC = ("node", str(HOME / "node_modules" / "typescript" / "bin" / "tsc"))


@contextmanager
def workshop() -> Iterator[Workshop]:
    """A workshop of one's own; without npm's packages the test is skipped."""
    dist = installed(HOME) / "dist"
    dist.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dist) as place:
        (Path(place) / "relay" / "static").mkdir(parents=True)  # beside snippet/
        yield Workshop(Path(place))
