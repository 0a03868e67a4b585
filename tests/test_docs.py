"""The documents say what the code does: names, numbers, links and promises are held.

`docs/settings.md`, `docs/sandbox.md` and `deploy/` have tests of their own.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import cast

import msgspec
import pytest
import redis.asyncio
import typer.main

from relay import (
    admission,
    assembly,
    counters,
    edge,
    endpoints,
    events,
    forwarder,
    letters_api,
    queue,
    replay,
    retry,
    transport,
    verdicts,
)
from relay.catalog import LOOK_UP_S
from relay.cli import app
from relay.dead_letters import MAX_PAGE
from relay.forecast import LANES
from relay.limits import DEFAULT_LIMITS, DIMENSIONS, parse_budget, parse_limits
from relay.ops import ops_app
from relay.outcomes import CURES, LETTER_CURES, Hold, Outcome, letter_cure
from relay.queue import LOOK_UP_MS, Queue, Scripts
from relay.settings import CREDENTIALS, KNOWN, Role, Settings, required, variable
from relay.verdicts import Verdict, read_answer
from simulation.__main__ import HISTORIES, STEPS
from simulation.forwarders import MAX_DEPARTURE_MS
from simulation.report import COLUMNS
from simulation.scenarios import OWN_CHECKS, SCENARIOS
from tests.queues import event, result
from tests.test_architecture import LAYERS
from tests.test_queue_histories import EXAMPLES
from tests.test_queue_histories import STEPS as TEST_STEPS

ROOT = Path(__file__).parents[1]
PRUNED = {
    *(".git", ".venv", ".cache", "dist", "__pycache__", "node_modules"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"),
}


def files() -> Iterator[Path]:
    """Every file of the repository, or what will be one."""
    for place, directories, names in os.walk(ROOT):
        directories[:] = sorted(set(directories) - PRUNED)
        yield from (Path(place, name) for name in sorted(names) if name != ".env")


def shown(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


DOCUMENTS = [path for path in files() if path.suffix == ".md"]
LUA = {path.stem: path.read_text() for path in (ROOT / "relay" / "lua").glob("*.lua")}


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def section(name: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its rank."""
    parts = re.split(r"^## (.+)\n", read(name), flags=re.MULTILINE)
    return parts[parts.index(heading) + 1]


def tables(text: str) -> list[list[str]]:
    """The rows of all tables in `text`, without their heads."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\|[-|]+\|", line):
            rows.pop()  # the head
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line[1:-1].split("|")])
    return rows


def coded(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_column(text: str) -> list[str]:
    return [name for row in tables(text) for name in coded(row[0])]


def default(field: str) -> str:
    """A default as a document writes it: `72h` is 72 h."""
    text = str(Settings.model_fields[field].default)
    return re.sub(r"(?<=\d)(?=[a-z])", " ", text)


def trees(*modules: str) -> Iterator[ast.Module]:
    for module in modules or [shown(p)[6:-3] for p in files() if _is_code(p)]:
        yield ast.parse(read(f"relay/{module}.py"))


def _is_code(path: Path) -> bool:
    return shown(path).startswith("relay/") and path.suffix == ".py"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call with the last part of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute):
                yield called.attr, node
            elif isinstance(called, ast.Name):
                yield called.id, node


def texts(node: ast.AST) -> list[str]:
    """The string constants in an expression; `*` where an f-string has a hole."""
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "*" for p in node.values]
        return ["".join(map(str, parts))]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [text for child in ast.iter_child_nodes(node) for text in texts(child)]


# --- links, names of settings, machines -----------------------------------------------


def slugs(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not anchor or anchor in slugs(there), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_a_document_names_no_setting_that_is_not_there(path: Path) -> None:
    named = set(re.findall(r"RELAY_[A-Z_]*[A-Z]", path.read_text("utf-8")))
    assert named - KNOWN == set()


def test_no_file_names_a_machine_or_a_package_host() -> None:
    # In two parts each, so that this file is not a find.
    banned = [
        re.escape(start + rest)
        for start, rest in (
            ("/wo", "rk/"),
            ("pypi.org", "/simple"),
            ("files.python", "hosted.org"),
            ("registry.np", "mjs.org"),
            ("deb.deb", "ian.org"),
        )
    ]
    pattern = re.compile("|".join(banned).encode())
    found = {shown(p): m[0] for p in files() if (m := pattern.search(p.read_bytes()))}
    assert found == {}


@pytest.mark.parametrize(
    "name",
    [
        "requirements/run.txt",
        "requirements/dev.txt",
        "bench/peers/starlette/requirements.txt",
    ],
)
def test_every_locked_requirement_has_a_hash(name: str) -> None:
    joined = read(name).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if not re.match(r"\s*(#|$)", line)]
    for line in lines:
        assert re.match(
            r"[\w.-]+(\[[\w,-]+\])?==\S+.* --hash=sha256:[0-9a-f]{64}", line
        )
    assert len(lines) > 20


@pytest.mark.parametrize(
    "place",
    [
        *("snippet", "tests/recipes", "tests/sdk"),
        *("bench/peers/express", "bench/peers/fastify"),
    ],
)
def test_every_locked_npm_package_has_a_hash_and_no_address(place: str) -> None:
    packages = json.loads(read(f"{place}/package-lock.json"))["packages"]
    locked = [package for name, package in packages.items() if name]
    assert locked
    assert all("integrity" in p and "resolved" not in p for p in locked)


# --- README and changelog -------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) < 150


def test_every_promise_has_its_test() -> None:
    rows = tables(section("README.md", "Promises"))
    assert len(rows) >= 10
    for promise, held_by in rows:
        match = re.fullmatch(r"\[(test_\w+)\]\((tests/[\w/]+\.py)\)", held_by)
        assert match, promise
        assert re.search(rf"def {match[1]}\(", read(match[2])), match[1]


def test_the_readme_names_the_settings_that_are_needed() -> None:
    block = re.findall(
        r"^    (RELAY_\w+)=", section("README.md", "Go to production"), re.MULTILINE
    )
    needed = [variable(field) for field in required(Role.SERVE)]
    assert [name.removesuffix("_FILE") for name in block] == needed


def test_the_readme_says_what_the_default_budget_means() -> None:
    [window] = parse_budget(str(Settings.model_fields["upstream_budget"].default))
    rate = window.quota * 1000 / window.period_ms
    said = section("README.md", "Go to production")
    assert f"{rate:g} events a second, {rate * 3600:,.0f} an hour" in said
    assert f"{rate * 86400:,.0f} a day" in said


def test_the_example_of_the_readme_is_an_event() -> None:
    [written] = re.findall(r"JSON\.stringify\((.+)\);", read("README.md"))
    quoted = re.sub(r"(\w+):", r'"\1":', written.replace("crypto.randomUUID()", '"x"'))
    events.read_event(quoted.encode())


def test_the_version_is_in_readme_and_changelog() -> None:
    version = import_module("relay").__version__
    assert f"**Status:** {version}" in read("README.md")
    assert f"## [{version}]" in read("CHANGELOG.md")


def test_every_make_target_that_a_document_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for path in DOCUMENTS:
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", path.read_text(), re.MULTILINE)
        assert set(named) <= targets, path


# --- docs/architecture.md -------------------------------------------------------------


def test_the_code_map_is_the_ladder() -> None:
    rows = tables(section("docs/architecture.md", "The code map"))
    assert [set(coded(row[0])) for row in rows] == LAYERS


def test_every_script_is_told() -> None:
    names = first_column(section("docs/architecture.md", "The scripts"))
    assert names == list(vars(Scripts()))
    assert set(names) | {"lib", "flight", "letters", "budget"} == set(LUA)


# A key is the prefix and what is put behind it: 'literals', and holes that are names,
# elements or calls.
_PART = r"\s*\.\.\s*(?:'[^']*'|\w[\w.\[\]]*(?:\((?:[^()]|\([^()]*\))*\))?)"


def template(expression: str) -> str:
    parts = re.findall(
        r"'([^']*)'|(\w[\w.\[\]]*(?:\((?:[^()]|\([^()]*\))*\))?)", expression
    )
    return "".join("<>" if hole else literal for literal, hole in parts)


def keys_in_scripts() -> set[str]:
    found: set[str] = set()
    for source in LUA.values():
        found |= {template(m[1]) for m in re.finditer(rf"\bP((?:{_PART})+)", source)}
        for local in re.finditer(rf"local (\w+) = P((?:{_PART})+)", source):
            rest = re.split(r"^local function|^end", source[local.end() :], flags=re.M)
            for more in re.finditer(rf"\b{local[1]}((?:{_PART})+)", rest[0]):
                found.add(template(local[2]) + template(more[1]))
    return found


def keys_in_document() -> dict[str, str]:
    """The template of each key that is documented, and its type."""
    rows = tables(section("docs/architecture.md", "The keys in Redis"))
    return {
        re.sub(r"<\w+>", "<>", coded(row[0])[0].removeprefix("{relay}")): row[1]
        for row in rows
    }


def test_every_key_of_the_scripts_is_told() -> None:
    assert set(keys_in_document()) == keys_in_scripts()
    assert len(keys_in_scripts()) > 15


def test_every_key_of_the_queue_is_told() -> None:
    own = {
        re.sub(r"\{[\w\[\]]+\}", "<>", text)
        for text in re.findall(r"self\.prefix\}(:[^\"]+)\"", read("relay/queue.py"))
    }
    assert own - {":<>"} <= set(keys_in_document())  # any: the reader of hashes


@pytest.mark.anyio
async def test_keys_are_of_the_type_that_is_told(valkey_url: str, prefix: str) -> None:
    """An event of every fate, and then a look at all keys there are."""
    held = Queue(
        url=valkey_url,
        prefix=prefix,
        # So slow that nothing is over before it has been looked at.
        limits=parse_limits("ip=9/1h, customer=9/1h, site=9/1h"),
        budget=parse_budget("9/1h"),
    )
    client = redis.asyncio.Redis.from_url(valkey_url)
    try:
        kinds = ["told", "again", "paid", "kept"]
        special = ("n" * 18, 60_000, 9, 60_000, False, "t" * 24, 9, 60_000, False)
        made = [
            event(
                kind,
                delivery="at_most_once",
                special=special if kind == "kept" else None,
            )
            for kind in kinds
        ]
        made += [event("next", customer=made[0][2].customer), event()]
        await held.keep_names(["listed"])
        await held.token("named", who="me", lock_ms=60_000)
        await held.keep_token("named", {}, who="me", replaces=0, life_ms=60_000)
        await held.expect(made[0][2], 1)
        await held.expect(event("asked")[2], 1)
        reported = [("browser", "chrome:called", "", 1)]
        await held.commit("w:0", 1, [("ip", made)], reported)
        claimed = (await held.tick("a", 9, look_out=True)).claimed
        told, again, paid, *_ = claimed
        await held.mark("a", [paid])
        results = [
            result(told, "rejected", limit=9, remaining=8),
            result(again, "retry", delay_ms=60_000, signal="failed", pause_ms=60_000),
        ]
        await held.settle("a", results)
        running = replay.Replay(held, ttl_ms=60_000, queue_max=9)
        await running.begin(replay.Plan(), 1)
        async for _ in running.run():
            if running.progress.sent:
                break
        await held.reap()
        documented = keys_in_document()
        seen = set()
        for key in cast("list[bytes]", await client.keys(f"{held.prefix}:*")):
            name = key.decode().removeprefix(held.prefix)
            # The most particular one: `rl:ip:…` before `rl:…`.
            fits = max((k for k in documented if _fits(k, name)), key=len)
            seen.add(fits)
            assert cast("bytes", await client.type(key)).decode() == documented[fits]
        # They take an outage, and an hour.
        rare = {":amnesty", ":limit:<>:before", ":seen:before", ":seen:oldest"}
        rare |= {":made:before"}
        assert set(documented) - seen == rare
    finally:
        await held.aclose()
        await client.aclose()


def _fits(key: str, name: str) -> bool:
    return re.fullmatch(re.escape(key).replace("<>", r"[^:]+"), name) is not None or (
        key == ":commit:<>" and name.startswith(":commit:")
    )


# --- docs/protocol.md -----------------------------------------------------------------

# Where a reason stands among the arguments, and the status that goes with it; for
# `_problem` the status is the third argument.
_REASON_AT = {
    "Invalid": (0, "400"),
    "_named": (1, "400"),
    "_problem": (4, ""),
    "Fault": (2, ""),
    "_document": (3, "*"),
    "unavailable": (1, "503"),
    "QueueUnavailable": (0, "503"),
    "_forbidden": (0, "403"),
    "_unauthenticated": (0, "401"),
    "TokenRefused": (0, "401"),
}


_METADATA_REASONS = ("metadata_field", "metadata_type")  # catalog.metadata_fault


def reasons_in_sources() -> dict[str, str]:
    """Each reason of an answer, and its status; `*` where a variable decides."""
    found: dict[str, str] = dict.fromkeys(queue._SAYS, "503")
    for part in ("loyalty", "referral"):  # a loop of policy.py over both
        found[part] = "403"
    found |= dict.fromkeys(_METADATA_REASONS, "403")
    deciding = ("edge", "forms", "events", "policy", "signing")
    for tree in trees(*deciding, "endpoints", "queue", "admission"):
        for name, call in calls(tree):
            if name in _REASON_AT and len(call.args) > _REASON_AT[name][0]:
                place, status = _REASON_AT[name]
                told = call.args[{"_problem": 2, "Fault": 0}.get(name, 0)]
                code = status or str(cast("ast.Constant", told).value)
                found |= dict.fromkeys(texts(call.args[place]), code)
            if name == "Refused" and len(call.args) > 1:
                found |= dict.fromkeys(texts(call.args[1]), "202")  # dropped
            if name == "Fate":
                given = {key.arg: texts(key.value) for key in call.keywords}
                fate = (given.get("status") or [""])[0]
                known = {"unavailable": "503", "token_used_up": "401"}
                for reason in given.get("reason", []):
                    found[reason] = known.get(fate) or known.get(reason) or "429"
    found |= {reason: "400" for _, reason, _ in events._RULES}
    return found


def expanded(reasons: dict[str, str]) -> dict[str, str]:
    """The same with every hole filled in."""
    parts = (events.Event, events.Customer, events.Referral, events.Loyalty)
    required = {
        field.name
        for part in parts
        for field in msgspec.structs.fields(part)
        if field.required
    }
    holes = {"{key}_missing": required, "rate_limited_*": (*DIMENSIONS, "event")}
    return {
        re.sub(r"\{key\}|\*", filling, reason): status
        for reason, status in reasons.items()
        for filling in holes.get(reason, [""])
    }


def test_every_reason_is_told_with_its_status() -> None:
    rows = tables(section("docs/protocol.md", "Reasons"))
    documented = {coded(row[0])[0]: row[1] for row in rows}
    real = expanded(reasons_in_sources())
    assert set(documented) == set(real)
    for reason, status in real.items():
        assert status in ("*", documented[reason]), reason


@pytest.mark.parametrize("at", range(3))
def test_the_bodies_of_the_document_are_sound(at: int) -> None:
    blocks = re.findall(r"^```json\n(.*?)^```", read("docs/protocol.md"), re.M | re.S)
    assert len(blocks) == 3
    for raw in events.read_body(blocks[at].encode()).events:
        events.read_event(raw)


def test_the_keys_of_an_event_are_told() -> None:
    said = section("docs/protocol.md", "Bodies")
    top = [row for row in tables(said) if coded(row[0])]
    assert {coded(row[0])[0] for row in top} == set(events.Event.__struct_fields__)
    assert {f"`{name}`" in said for name in events.Customer.__struct_fields__} == {True}


def test_the_delivery_table_is_that_of_the_code() -> None:
    rows = tables(section("docs/protocol.md", "Delivery"))
    told: set[int] = set()
    for says, at_least, at_most in rows:
        classes = [int(c) * 100 + 99 for c in re.findall(r"\b(\d)xx\b", says)]
        for status in [*map(int, re.findall(r"\b\d{3}\b", says)), *classes]:
            cycle = "api_calls_cycle" in says and status == 429
            limit = {"x-rate-limit-type": "api_calls_cycle"} if cycle else {}
            answer = read_answer(status, limit, b"", now=0)
            told.add(status)
            match answer.verdict:
                case Verdict.DELIVERED:
                    assert (at_least, at_most) == ("`delivered`", "`delivered`")
                case Verdict.RETRY:
                    assert (at_least, at_most) == ("retry", "retry")
                case Verdict.WAIT:
                    assert at_least == "wait as told, retry, spend no attempt"
                case Verdict.UNKNOWN:
                    assert (at_least, "`ambiguous`" in at_most) == ("retry", True)
                case Verdict.REJECTED:
                    assert "`rejected`" in at_least
                case Verdict.HOLD:
                    assert f"hold (`{answer.hold}`)" in at_least, status
    assert told >= set(verdicts._BY_STATUS) | {299, 399, 499, 599}


def test_the_headers_for_voucherify_are_told() -> None:
    [block] = re.findall(r"headers = \{(.*?)\}\n", read("relay/cluster.py"), re.S)
    sent = re.findall(r'^\s+"([\w-]+)":', block, re.MULTILINE)
    said = section("docs/protocol.md", "What Voucherify gets")
    told = first_column(said.partition("### Credentials")[0])
    assert sorted(told) == sorted([*sent, "origin"])


def test_the_credential_schemes_are_those_of_the_settings() -> None:
    said = section("docs/protocol.md", "What Voucherify gets")
    rows = tables(said.partition("### Credentials")[2])
    told = {(*coded(row[0]), *coded(row[1])): coded(row[2]) for row in rows}
    real = {
        scheme: [variable(field) for field in fields]
        for scheme, fields in CREDENTIALS.items()
    }
    assert told == real


# --- docs/operations.md ---------------------------------------------------------------


def operations(heading: str) -> list[str]:
    return first_column(section("docs/operations.md", heading))


def test_every_gauge_is_told() -> None:
    assert operations("Gauges") == list(counters.GAUGES)
    written = re.findall(r"'(\w+)'", LUA["reap"].partition("call('HSET', gauges,")[2])
    written += ["eta_s", *(f"eta_s_{lane}" for lane in LANES)]  # forecast.lua
    assert set(counters.GAUGES) <= set(written)


def test_every_outcome_is_told() -> None:
    assert operations("Totals") == [str(outcome) for outcome in Outcome]


def test_every_hold_is_told_with_its_cure() -> None:
    rows = tables(section("docs/operations.md", "Holds"))
    assert {coded(row[0])[0]: row[-1] for row in rows} == CURES
    assert set(CURES) == {str(hold) for hold in Hold}


def test_every_counter_is_told() -> None:
    documented = {
        re.sub(r"<\w+>", "<>", field) for field in operations("Minutes and hours")
    }
    noted: set[str] = set()
    for source in LUA.values():
        found = re.findall(rf"\bnote\(('[^']*'(?:{_PART})*),", source)
        found += re.findall(rf"\bfield = ('[^']*'(?:{_PART})*)", source)
        noted |= {template(expression) for expression in found}
    assert {"no_room", "event:<>:<>", "reason:<>"} <= noted
    for tree in trees("policy", "edge"):
        for name, call in calls(tree):
            if name == "append" and "notes" in ast.unparse(call.func):
                noted |= set(texts(call.args[0]))
    assert {"gpc_stripped", "untrusted_proxy"} <= noted
    for field in noted:
        kind = re.sub(r"^(reason|would_refuse):.+", r"\1:<>", field)
        assert kind in documented, field


def reasons_of_dead_letters() -> set[str]:
    """Why an event may be buried, as far as the relay itself gives the reason."""
    found = {reason for pair in transport.FAILURES.values() for reason in pair}
    found |= {verdicts._REASONS[Verdict.WAIT]}
    for source in LUA.values():
        found |= set(re.findall(r"bury\(\w+, \w+, '\w+', '(\w+)'", source))
        found |= set(re.findall(r"expire\(\w+, \w+, '(\w+)'", source))
        found |= set(re.findall(r"doubt\(\w+, \w+, \w+, \w+, '(\w+)'", source))
    for tree in trees("forwarder"):
        for name, call in calls(tree):
            if name in ("interrupted", "given_back"):
                found |= set(texts(call.args[1]))
    for tree in trees("activity", "voucherify"):
        for _, call in calls(tree):
            given = {word.arg: word.value for word in call.keywords}
            # What was found, or was not, is no reason to be buried.
            if reason := given.get("reason"):
                found |= set(texts(reason)) - {"found", "not_found"}
    for tree in trees("verdicts"):
        found |= {
            text.replace("*", "<status>")
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for text in texts(node)
            if text.startswith("upstream_")
        }
    return found


def test_every_reason_of_a_dead_letter_is_told() -> None:
    found = reasons_of_dead_letters()
    assert {"ttl", "worker_died", "internal", "upstream_<status>"} <= found
    assert found <= set(operations("Minutes and hours"))


def test_the_catalogue_knows_when_an_event_is_looked_up() -> None:
    assert LOOK_UP_S * 1000 == LOOK_UP_MS


def test_every_cure_of_a_dead_letter_is_told() -> None:
    said = section("docs/operations.md", "Minutes and hours")
    for outcome in ("ambiguous", "rejected"):
        assert letter_cure(outcome, "") in said
    rows = [row for row in tables(said) if len(row) == 4]
    assert len(rows) > 8
    told: set[str] = set()
    for row in rows:
        outcomes = coded(row[1]) or ["expired"]
        outcome = "expired" if "expired" in outcomes else outcomes[0]
        for name in coded(row[0]):
            reason = name.replace("<status>", "503")
            assert letter_cure(outcome, reason) == row[3], name
            told.add(name)
    assert set(LETTER_CURES) <= told


def test_every_stop_of_a_replay_is_told_with_its_cure() -> None:
    rows = tables(section("docs/operations.md", "Dead letters"))
    told = {coded(row[0])[0]: row[1] for row in rows}
    assert told.items() >= replay.REPLAY_CURES.items()


def test_the_fields_of_a_dead_letter_are_told() -> None:
    [words] = re.findall(r"add\(P .. ':dead',(.*?)\)\n", LUA["flight"], re.S)
    fields = re.findall(r"'(\w+)',", words)
    told = operations("Dead letters")
    assert sorted(told) == sorted([*fields, *replay.REPLAY_CURES])


def log_events() -> dict[str, str]:
    """The name of each line that the sources log, and its level."""
    found: dict[str, str] = {}
    levels = {"exception": "error"} | {n: n for n in ("info", "warning", "error")}
    for tree in trees():
        assigned = {
            target.id: texts(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for name, call in calls(tree):
            if name in levels and call.args:
                said = call.args[0]
                variable = said.id if isinstance(said, ast.Name) else ""
                for text in assigned.get(variable, texts(said)):
                    if re.fullmatch(r"[a-z]+\.[a-z_]+", text):
                        found[text] = levels[name]
    return found


def test_every_log_line_is_told_with_its_level() -> None:
    rows = tables(section("docs/operations.md", "Log"))
    assert {coded(row[0])[0]: row[1] for row in rows} == log_events()
    assert len(rows) > 15


def commands(group: object, name: str = "") -> dict[str, set[str]]:
    """Each command with its options; those of a group under both names."""
    found: dict[str, set[str]] = {}
    for word, command in vars(group)["commands"].items():
        if "commands" in vars(command):
            found |= commands(command, f"{word} ")
        else:
            options = {o for parameter in command.params for o in parameter.opts}
            found[name + word] = {o for o in options if o.startswith("--")}
    return found


def test_every_command_is_told_with_its_options() -> None:
    documented: dict[str, set[str]] = {}
    for command, option, _ in tables(section("docs/operations.md", "Commands")):
        if command:
            name = coded(command)[0].removeprefix("relay ")
            documented[name] = set()
        documented[name].update(coded(option))
    assert documented == commands(typer.main.get_command(app))


def test_every_exit_code_is_told() -> None:
    [codes] = re.findall(r"^Exit codes: (.+)$", read("docs/operations.md"), re.M)
    header = ast.get_docstring(next(trees("cli"))) or ""
    [real] = re.findall(r"Exit codes: (.+)$", header, re.MULTILINE)
    pairs = re.findall(r"(\d) ([\w ]+)", real)
    assert len(pairs) == 4
    for code, meaning in pairs:
        assert f"{code} {meaning}" in codes


def test_every_metric_is_told() -> None:
    source = read("relay/metrics.py")
    made = set(re.findall(r'"(relay_\w+)"', source))
    made |= {f"relay_plan_{field}_calls" for field in ("limit", "others")}
    told = re.findall(r"`(relay_\w+)`", section("docs/operations.md", "Metrics"))
    assert {name.removesuffix("_total") for name in told} == made


def test_every_route_of_the_ops_listener_is_told() -> None:
    for route in ops_app({}).routes:
        method = "POST" if "POST" in vars(route)["methods"] else "GET"
        told = section("docs/operations.md", "Readiness")
        assert f"`{method} {vars(route)['path']}`" in told
    station = next(trees("assembly"))
    checks = [n for n in ast.walk(station) if isinstance(n, ast.FunctionDef)]
    [made] = [node for node in checks if node.name == "checks"]
    example = json.loads(
        re.findall(r"`(\{\"status.*?\})`", read("docs/operations.md"))[0]
    )
    assert set(example["checks"]) == {*texts(made.body[-1]), "catalog"}


# --- docs/delivery.md -----------------------------------------------------------------


def simulated() -> list[list[str]]:
    """The rows of the table that `make simulate` has written."""
    found = section(DELIVERY, "What it found")
    return [row for row in tables(found) if len(row) == len(COLUMNS)]


def test_every_scenario_is_told_and_was_played() -> None:
    told = tables(section(DELIVERY, "The scenarios"))
    assert [coded(row[0])[0] for row in told] == list(SCENARIOS)
    assert [coded(row[0])[0] for row in simulated()] == list(SCENARIOS)
    for (_, says), scenario in zip(told, SCENARIOS.values(), strict=True):
        assert set(coded(says)) == {fleet.budget for fleet in scenario.fleets}


def test_what_was_simulated_keeps_what_is_promised() -> None:
    for row in simulated():
        cell = dict(zip(COLUMNS, row, strict=True))
        for window in cell["most calls in any window"].split("; "):
            found, most = map(_number, window.partition(" in ")[0].split(" of "))
            assert found <= most
        assert cell["sent twice: at least once, at most once"].endswith(", 0")
        assert cell["unaccounted"] == "0"


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def test_what_single_scenarios_are_judged_by_is_told_and_kept() -> None:
    found = section(DELIVERY, "What it found")
    told = re.findall(r"^\* `(\w+)`: .+, at most [\d.]+\.$", found, re.MULTILINE)
    asked = [name for name, s in SCENARIOS.items() for _ in s.checks]
    assert told == asked
    assert frozenset().union(*(s.checks for s in SCENARIOS.values())) == OWN_CHECKS
    assert "**a fault**" not in found


# --- numbers --------------------------------------------------------------------------


def constants(script: str) -> dict[str, int]:
    """The numbers that a script names in capitals."""
    found: dict[str, int] = {}
    for names, values in re.findall(
        r"^local ([A-Z_, ]+) = ([\d*, ]+)", LUA[script], re.M
    ):
        for name, value in zip(names.split(", "), values.split(", "), strict=True):
            first, _, second = value.partition(" * ")
            found[name] = int(first) * int(second or 1)
    return found


PROTOCOL, ARCHITECTURE = "docs/protocol.md", "docs/architecture.md"
OPERATIONS, DELIVERY = "docs/operations.md", "docs/delivery.md"
SETTLE, LIB, BUDGET = constants("settle"), constants("lib"), constants("budget")
REPLAY = constants("replay")
HOLD = f"{SETTLE['HOLD_FIRST_MS'] // 1000} s", SETTLE["HOLD_MAX_MS"] // 1000
BREAKER = f"{SETTLE['BREAKER_FIRST_MS'] // 1000} s", SETTLE["BREAKER_MAX_MS"] // 1000
WORDS = {3: "three", 5: "Five"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (PROTOCOL, f"at most {edge.MAX_BODY_BYTES:,} bytes, after inflating"),
        (PROTOCOL, f"Several, at most {events.MAX_EVENTS},"),
        (PROTOCOL, f"an object of at most {events.MAX_METADATA_KEYS} keys"),
        (PROTOCOL, f"at most {events.MAX_DEPTH} levels"),
        (PROTOCOL, f"at most N seconds, {edge.MAX_WAIT_S} at most"),
        (PROTOCOL, f"more than {endpoints.MAX_WAITED_EVENTS} events does not wait"),
        (PROTOCOL, f"beyond {endpoints.MAX_WAITERS} waiting ones"),
        (PROTOCOL, f"the body took over {endpoints.BODY_TIMEOUT_S:g} s"),
        (PROTOCOL, f"{admission.MAX_WAITING_EVENTS:,} events wait in this process"),
        (PROTOCOL, f"wait `Retry-After` ({endpoints._NO_ROOM.retry_after} s)"),
        (PROTOCOL, f"`{DEFAULT_LIMITS}`"),
        (PROTOCOL, f"for {int(edge._PREFLIGHT_S):,} s at most"),
        (PROTOCOL, f"`RELAY_DEDUPE_WINDOW` ({default('dedupe_window')})"),
        (PROTOCOL, f"`RELAY_TTL` ({default('ttl')})"),
        (PROTOCOL, f"{retry.BASE_MS // 1000} s to {retry.CAP_MS // 60_000} min"),
        (PROTOCOL, f"(`{Settings.model_fields['track_path'].default}`)"),
        (
            ARCHITECTURE,
            f"up to {admission.MAX_BATCH_REQUESTS} requests "
            f"or {admission.MAX_BATCH_EVENTS} events",
        ),
        (ARCHITECTURE, f"{endpoints.BODY_TIMEOUT_S:g} s and {edge.MAX_BODY_BYTES:,}"),
        (ARCHITECTURE, f"not been heard of for {queue.STALE_MS // 1000} s is dead"),
        (ARCHITECTURE, f"look every {forwarder.LOOK_OUT_S:g} s"),
        (ARCHITECTURE, f"took {queue.DEATHS_MAX} forwarders"),
        (ARCHITECTURE, f"every {assembly.REAP_EVERY_S:g} s in each process"),
        (ARCHITECTURE, f"kept {BUDGET['SLACK_MS']} ms longer"),
        (ARCHITECTURE, f"the window and {BUDGET['SLACK_MS']} ms"),
        (ARCHITECTURE, f"after {HOLD[0]} and ever later up to {HOLD[1]} s"),
        (ARCHITECTURE, f"after {BREAKER[0]} and up to {BREAKER[1]} s"),
        (ARCHITECTURE, f"meets a hold again {WORDS[SETTLE['STRIKES']]} times"),
        (ARCHITECTURE, f"{WORDS[SETTLE['FAILURES_TO_OPEN']]} failures in a row"),
        (ARCHITECTURE, f"by frequency, at most {LIB['NAMES_KEPT']:,}"),
        (OPERATIONS, f"a **canary** of {replay.CANARY}, and waits"),
        (OPERATIONS, f"in parts of {replay.CHUNK}, the next"),
        (OPERATIONS, f"lease must run out: {REPLAY['LEASE_MS'] // 1000} s"),
        (OPERATIONS, f"{default('upstream_reserve')}: of 100 calls a minute"),
        (OPERATIONS, f"by half in {WORDS[BUDGET['HALVES_AFTER']].lower()} windows"),
        (OPERATIONS, f"`limit` ({letters_api.PAGE}, at most {MAX_PAGE:,})"),
        (ARCHITECTURE, f"was replayed | {REPLAY['MARK_MS'] // 86_400_000} days |"),
        (OPERATIONS, f"| {HOLD[0]}, doubling to {HOLD[1]} s |"),
        (OPERATIONS, f"| {BREAKER[0]}, doubling to {BREAKER[1]} s |"),
        (OPERATIONS, f"The {LIB['NAMES_SHOWN']} most frequent names"),
        (OPERATIONS, f"`RELAY_TTL` ({default('ttl')})"),
        (OPERATIONS, f"(`RELAY_DRAIN_TIMEOUT`, {default('drain_timeout')})"),
        (OPERATIONS, f"`Retry-After: {endpoints._NO_ROOM.retry_after}`"),
        (OPERATIONS, f"by itself, within {admission.BREAKER_MAX_S:g} s"),
        (OPERATIONS, f"keeps minutes for {LIB['MINUTES_KEPT_MS'] // 3_600_000} h"),
        (OPERATIONS, f"hours for {LIB['HOURS_KEPT_MS'] // 86_400_000} days"),
        (OPERATIONS, f"Written every {assembly.REAP_EVERY_S:g} s"),
        (DELIVERY, f"more than {BUDGET['SLACK_MS']} ms longer to leave"),
        (DELIVERY, f"none takes more than {MAX_DEPARTURE_MS} ms"),
        (DELIVERY, f"try {EXAMPLES} histories of {TEST_STEPS} steps"),
        (DELIVERY, f"tries {HISTORIES} new ones of {STEPS} steps"),
    ],
)
def test_a_number_is_that_of_the_code(name: str, said: str) -> None:
    assert said in read(name)
