"""The snippet as npm has it: what is in the package, and what TypeScript says of it."""

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator

import pytest

from relay import __version__
from tests.npm import NEEDS, ROOT
from tests.programs import RELAY
from tests.snippet_recipes import HOME, RECIPES, TSC, Workshop, workshop

pytestmark = [*NEEDS, pytest.mark.timeout(180)]  # npm may have to install

OPTIONS = {
    "noEmit": True,
    "strict": True,
    "target": "es2022",
    "jsx": "react-jsx",
    "types": [],  # nothing but what is imported
}
# As bundlers find a package, and as Node does.
RESOLUTIONS = {
    "bundler": {"module": "esnext", "moduleResolution": "bundler"},
    "node": {"module": "nodenext", "moduleResolution": "nodenext"},
}
# Each line of the second half is one that the compiler must refuse.
CONSUMER = """
relay("track", "cart_abandoned");
relay("track", "cart_abandoned", { value: 49.9 }, { customer: { source_id: "u1" } });
relay("track", "page.viewed", { variant: [1] });
relay("identify", "u1");
relay("consent", true);
relay("onerror", ({ event, reason }) => console.warn(event?.event, reason));
relay("flush");
// @ts-expect-error  not a number
relay("track", "cart_abandoned", { value: "49.9" });
// @ts-expect-error  not a name of the catalogue's
relay("track", "cart_abandoned", { price: 49.9 });
// @ts-expect-error  this event has no loyalty
relay("track", "referral_signup", {}, { loyalty: { code: "CARD-1" } });
// @ts-expect-error  this customer has no phone
relay("track", "cart_abandoned", {}, { customer: { phone: "1" } });
// @ts-expect-error  not an event
relay("track", "cart_abandonned");
// @ts-expect-error  not a call
relay("page");
"""
BARE = """
import { createRelay, type Options, type Trouble } from "voucherify-relay";
const onerror = (trouble: Trouble) => console.warn(trouble.reason, trouble.detail);
const options: Options = { url: "/e", consent: "required", gpc: "ignore", onerror };
createRelay(options)("track", "any_name", { any: 1 }, { customer: { phone: "1" } });
// @ts-expect-error  not an option
createRelay({ path: "/e" });
"""


@pytest.fixture(scope="module")
def made() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture(scope="module", params=RESOLUTIONS)
def faults(made: Workshop, request: pytest.FixtureRequest) -> dict[str, str]:
    """What the compiler finds in each file of a project that has the package."""
    resolution = str(request.param)
    place = made.place / f"typed-{resolution}"
    shutil.copytree(RECIPES / "react", place)
    catalog = str(ROOT / "deploy" / "catalog.toml")
    command = [*RELAY, "catalog", "types", catalog]
    types = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    readme = (made.package / "README.md").read_text("utf-8")
    [example] = re.findall(r"^```js\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    modules = {
        "relay-events.ts": types,
        "relay.ts": (RECIPES / "relay.ts").read_text("utf-8"),
        "typed.ts": (RECIPES / "typed.ts").read_text("utf-8") + CONSUMER,
        "tag.ts": (RECIPES / "globals.d.ts").read_text("utf-8") + CONSUMER,
        "bare.ts": BARE,
        "readme.ts": "declare const token: string;\n" + example,
    }
    for name, text in modules.items():
        # Node wants the whole name of a file, and a bundler takes it.
        (place / name).write_text(re.sub(r'"(\./[\w-]+)"', r'"\1.js"', text), "utf-8")
    config = {
        "compilerOptions": OPTIONS | RESOLUTIONS[resolution],
        # The components are for bundlers.
        "include": ["*.ts", "*.tsx"] if resolution == "bundler" else ["*.ts"],
    }
    (place / "tsconfig.json").write_text(json.dumps(config), "utf-8")
    (place / "package.json").write_text('{ "type": "module" }', "utf-8")
    done = made.attempt(place, *TSC)
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name = line.partition("(")[0]
        found[name] = found.get(name, "") + line + "\n"
    assert found or done.returncode == 0, done.stderr
    return found


def test_the_package_has_what_it_exports_and_nothing_else(made: Workshop) -> None:
    with tarfile.open(made.tarball) as tar:
        packed = {member.name: member for member in tar.getmembers()}
    assert set(packed) == {
        *("package/package.json", "package/README.md", "package/LICENSE"),
        *("package/dist/relay.mjs", "package/dist/relay.d.ts"),
        "package/dist/types.d.ts",
    }
    manifest = json.loads((made.package / "package.json").read_text("utf-8"))
    [exported] = manifest["exports"].values()
    for file in (manifest["main"], manifest["types"], *exported.values()):
        assert (made.package / file).is_file()
    assert "dependencies" not in manifest
    assert manifest["version"] == __version__


def test_on_a_server_it_can_be_imported(made: Workshop) -> None:
    made.package  # noqa: B018  # is unpacked
    script = 'import("voucherify-relay").then((module) => console.log(module))'
    assert "createRelay: [Function" in made.run(made.place, "node", "-e", script)


def test_the_types_of_a_catalogue_are_those_of_the_snippet(
    faults: dict[str, str],
) -> None:
    assert faults.get("typed.ts") is None


def test_the_tag_has_the_types_of_a_catalogue(faults: dict[str, str]) -> None:
    assert faults.get("tag.ts") is None


def test_without_a_catalogue_any_event_has_its_type(faults: dict[str, str]) -> None:
    assert faults.get("bare.ts") is None


def test_the_example_of_its_readme_compiles(faults: dict[str, str]) -> None:
    assert faults.get("readme.ts") is None


def test_recipes_and_declarations_are_strictly_typed(faults: dict[str, str]) -> None:
    tested = {"typed.ts", "tag.ts", "bare.ts", "readme.ts"}
    assert {name: text for name, text in faults.items() if name not in tested} == {}


def test_it_is_built_here_as_it_is_built_there(made: Workshop) -> None:
    del made
    here, there = (
        json.loads((place / "package.json").read_text("utf-8"))
        for place in (HOME, ROOT / "snippet")
    )
    for name, version in there["devDependencies"].items():
        assert here["dependencies"][name] == version
