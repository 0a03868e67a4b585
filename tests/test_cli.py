"""What an operator types, reads and scripts: words, exit codes, and no secret."""

import json
import os
import re
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis

from relay import __version__
from relay.assembly import listen
from relay.browsers import KINDS
from relay.catalog import parse_catalog
from relay.counters import GAUGES
from relay.embedded import EmbeddedServer, running_url
from relay.outcomes import Outcome
from relay.settings import SECRETS, Settings, variable
from relay.signing import Signer
from relay.snippet import STUB, present
from relay.typescript import declarations
from tests.integration.stack import Sender, stack
from tests.programs import RELAY
from tests.support import eventually

FIELDS = list(Settings.model_fields)
COMPLETE = {
    "allowed_origins": "https://shop.example",
    "client_application_id": "application-1",
    "client_token": "S3CRET-token",
    "origin": "https://shop.example",
    "anonymous": "restricted",  # else the start says what visitors may do
    "cluster": "http://127.0.0.1:9",
    "port": "0",
    "ops_port": "0",
}


def relay(
    place: Path, *command: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run `relay <command>` in `place`; `settings` are variables without prefix."""
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HOME": str(place),
        **{variable(name): value for name, value in settings.items()},
    }
    return subprocess.run(
        [*RELAY, *command],
        env=env,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


# Words


def test_version_is_the_packages_own(tmp_path: Path) -> None:
    done = relay(tmp_path, "version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def test_a_new_key_each_time(tmp_path: Path) -> None:
    first, second = (relay(tmp_path, "keygen").stdout for _ in range(2))
    assert first != second
    for key in (first, second):
        assert re.fullmatch(r"[A-Za-z0-9_-]{43,}\n", key)


@pytest.mark.parametrize(
    "command",
    [
        ("nonsense",),
        ("serve", "--workers", "0"),
        ("sandbox", "--port", "65536"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = relay(tmp_path, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: " in done.stderr


# Tokens and the catalogue

KEYS = "S3CRET-older-key-of-32-characters, S3CRET-newer-key-of-32-characters"


def test_a_token_is_made_with_the_newest_key(tmp_path: Path) -> None:
    events = ("--event", "signed_up", "--event", "paid")
    rest = ("--origin", "https://shop.example", "--ttl", "2h", "--uses", "3", "--json")
    done = relay(tmp_path, "token", "zoë-1", *events, *rest, signing_keys=KEYS)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    said = Signer(KEYS.split(", ")[1:]).read(told["token"], now=time.time())
    assert said.source_id == "zoë-1"
    assert said.events == frozenset({"signed_up", "paid"})
    assert (said.origin, said.uses) == ("https://shop.example", 3)
    assert told["expires_at"] == said.expires_at == said.issued_at + 7200


def test_a_token_alone_is_what_a_script_wants(tmp_path: Path) -> None:
    done = relay(tmp_path, "token", "u1", signing_keys=KEYS, token_ttl="1h")
    said = Signer(KEYS.split(", ")).read(done.stdout.rstrip("\n"), now=time.time())
    assert (said.source_id, said.events, said.uses) == ("u1", None, None)
    assert said.expires_at == said.issued_at + 3600


def test_a_token_needs_a_key(tmp_path: Path) -> None:
    done = relay(tmp_path, "token", "u1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "There is no key to sign with: set RELAY_SIGNING_KEYS.\n"


@pytest.mark.parametrize(
    "wrong",
    [
        ("",),
        ("u1", "--ttl", "soon"),
        ("u1", "--ttl", "0s"),
        ("u1", "--origin", "shop.example/path"),
        ("u1", "--event", ""),
        ("u1", "--uses", "0"),
    ],
    ids=" ".join,
)
def test_a_token_that_cannot_be_signed_is_wrong_usage(
    tmp_path: Path, wrong: tuple[str, ...]
) -> None:
    done = relay(tmp_path, "token", *wrong, signing_keys=KEYS)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: " in done.stderr
    assert "S3CRET" not in done.stderr


def test_a_sound_catalogue_passes_and_becomes_types(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "deploy" / "catalog.toml"
    done = relay(tmp_path, "catalog", "check", str(example))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing is wrong." in done.stdout
    # The same by its setting; the output goes into a file of the shop's sources.
    done = relay(tmp_path, "catalog", "types", catalog=str(example))
    catalog = parse_catalog(example.read_text(), max_ttl_s=259_200)
    assert (done.returncode, done.stdout) == (0, declarations(catalog))


def test_a_faulty_catalogue_is_told_with_lines_and_starts_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "faulty.toml").write_text('[events.a]\npriority = "top"\nttl = 3\n')
    done = relay(tmp_path, "catalog", "check", "faulty.toml")
    assert (done.returncode, done.stdout) == (1, "")
    title, *faults = done.stderr.splitlines()
    assert title.endswith("faulty.toml is not right:")
    assert [fault.split(":")[0] for fault in faults] == ["  line 2", "  line 3"]
    done = relay(tmp_path, "serve", **COMPLETE, catalog="faulty.toml")
    assert (done.returncode, done.stdout) == (2, "")
    title, *faults = done.stderr.splitlines()
    assert title == "The settings are not right:"
    starts = ["  RELAY_CATALOG: line 2", "  RELAY_CATALOG: line 3"]
    assert [fault[: len(starts[0])] for fault in faults] == starts
    done = relay(tmp_path, "catalog", "check", "absent.toml")
    assert "absent.toml cannot be read (No such file" in done.stderr


def test_a_catalogue_that_asks_for_tokens_needs_keys(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[events.a]\ntoken = "required"\n')
    done = relay(tmp_path, "serve", **COMPLETE, catalog="c.toml")
    assert done.returncode == 2
    assert "RELAY_SIGNING_KEYS is missing" in done.stderr


# Settings


@pytest.mark.parametrize("source", ["environment", "env file", "secret files"])
def test_every_wrong_setting_is_told_on_a_line_of_its_own_without_its_value(
    tmp_path: Path, source: str
) -> None:
    # Nobody's grammar, as in test_settings.py; recognisable in any output.
    wrong = {name: f"S3CRET\x07-{name} {{g" for name in FIELDS}
    named = [variable(name) for name in FIELDS]
    if source == "environment":
        done = relay(tmp_path, "serve", **wrong)
    elif source == "env file":
        lines = (f"{variable(name)}={value}\n" for name, value in wrong.items())
        (tmp_path / ".env").write_text("".join(lines))
        done = relay(tmp_path, "serve")
    else:
        named = [variable(name) + "_FILE" for name in SECRETS]
        for name in SECRETS:
            (tmp_path / name).write_text(wrong[name])
        files = {f"{name}_file": str(tmp_path / name) for name in SECRETS}
        done = relay(tmp_path, "serve", **(COMPLETE | {"client_token": ""} | files))
    assert done.returncode == 2
    title, *faults = done.stderr.splitlines()
    assert (done.stdout, title) == ("", "The settings are not right:")
    assert all(
        re.match(r"  RELAY_[A-Z_]+: .+ Example: RELAY_", line) for line in faults
    )
    assert sorted(re.findall(r"^  (\w+): ", done.stderr, re.MULTILINE)) == sorted(named)
    assert "S3CRET" not in done.stderr


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_missing_settings_are_named_with_where_to_find_them(
    tmp_path: Path, command: str
) -> None:
    done = relay(tmp_path, command)
    assert done.returncode == 2
    assert "  RELAY_CLIENT_TOKEN: is missing. Voucherify shows it in " in done.stderr
    assert ("RELAY_ALLOWED_ORIGINS" in done.stderr) == (command == "serve")


def test_off_loopback_the_ops_listener_needs_a_token(tmp_path: Path) -> None:
    done = relay(tmp_path, "serve", **COMPLETE, ops_host="0.0.0.0")
    assert done.returncode == 2
    assert "  RELAY_OPS_TOKEN: is missing, and RELAY_OPS_HOST is not " in done.stderr


def test_an_unknown_setting_is_a_warning_without_its_value(tmp_path: Path) -> None:
    done = relay(tmp_path, "stats", clutser="S3CRET")
    warning = json.loads(done.stderr.splitlines()[0])
    assert (warning["event"], warning["level"]) == ("settings.doubtful", "warning")
    assert "RELAY_CLUTSER" in warning["detail"]
    assert "RELAY_CLUSTER" in warning["detail"]
    assert "S3CRET" not in done.stderr


# Figures


def test_stats_in_json_is_what_counters_gives(valkey_url: str, tmp_path: Path) -> None:
    with EmbeddedServer(data_dir=tmp_path / "data") as server:
        with Redis.from_url(server.url) as ask:
            ask.hset("{relay}:totals", mapping={"received": 7, "delivered": 3})
            ask.hset("{relay}:gauges", mapping={"queued": 4, "budget_per_s": "0.8"})
        by_directory = relay(
            tmp_path, "stats", "--json", data_dir=str(tmp_path / "data")
        )
        by_url = relay(tmp_path, "stats", "--json", redis_url=server.url)
    assert (by_directory.returncode, by_directory.stderr) == (0, "")
    shown = json.loads(by_directory.stdout)
    assert list(shown) == [
        *("totals", "gauges", "hold", "plan", "forecast", "replay", "minutes"),
        "browser",
    ]
    assert list(shown["totals"]) == ["received", *(str(o) for o in Outcome)]
    assert (shown["totals"]["received"], shown["totals"]["delivered"]) == (7, 3)
    assert list(shown["gauges"]) == list(GAUGES)
    assert (shown["gauges"]["queued"], shown["gauges"]["budget_per_s"]) == (4, 0.8)
    assert shown["hold"] is None
    del shown["minutes"]  # may have moved on
    assert shown.items() <= json.loads(by_url.stdout).items()
    # The same prefix elsewhere is another relay.
    elsewhere = relay(tmp_path, "stats", "--json", redis_url=valkey_url)
    assert json.loads(elsewhere.stdout)["totals"]["received"] == 0


def test_stats_for_people_begins_with_what_holds_delivery_and_its_cure(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    with Redis.from_url(valkey_url) as ask:
        mapping = {"hold": "auth_hold", "hold_reason": "http_401", "since_ms": 1}
        ask.hset(f"{{{prefix}}}:flow", mapping=mapping)
        ask.hset(f"{{{prefix}}}:totals", mapping={"received": 12345})
    done = relay(tmp_path, "stats", redis_url=valkey_url, redis_prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert said.startswith(
        "Delivery is held: auth_hold (http_401) since 1970-01-01T00:00:00+00:00;"
    )
    assert "compare RELAY_ORIGIN, and RELAY_CLIENT_TOKEN," in said
    assert "12345" in said


def test_a_hold_by_hand_is_set_shown_and_lifted(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    where = {"redis_url": valkey_url, "redis_prefix": prefix}
    reason = "[red]Ana[/], until noon"
    done = relay(tmp_path, "hold", "--reason", reason, **where)
    assert (done.returncode, done.stdout[:24]) == (0, "Delivery is held since 2")
    logged = json.loads(done.stderr)
    assert (logged["event"], logged["reason"]) == ("delivery.held", reason)
    with Redis.from_url(valkey_url) as ask:
        held = {"hold": "auth_hold", "hold_reason": "http_401", "since_ms": 1}
        ask.hset(f"{{{prefix}}}:flow", mapping=held | {"probe_at_ms": 9 * 10**12})
        said = " ".join(relay(tmp_path, "stats", **where).stdout.split())
        assert said.startswith(f"Delivery is held: by_hand ({reason}) since 2")
        assert "`relay resume` lets it go on. Delivery is held: auth_hold" in said
        told = json.loads(relay(tmp_path, "stats", "--json", **where).stdout)
        assert told["hold"]["reason"] == reason
        done = relay(tmp_path, "resume", **where)
        first, second = done.stdout.splitlines()
        assert (done.returncode, first[:24]) == (0, "The hold by hand since 2")
        assert second.startswith("Delivery is still held: auth_hold. One event is ")
        assert set(held) == {n.decode() for n in ask.hkeys(f"{{{prefix}}}:flow")}
        ask.delete(f"{{{prefix}}}:flow")
    done = relay(tmp_path, "resume", **where)
    assert (done.stdout, done.stderr) == ("Nobody held delivery by hand.\n", "")


@pytest.mark.parametrize("reason", ["x" * 201, "two\nlines", "\x1b[2J"], ids=repr)
def test_the_reason_of_a_hold_is_one_short_line(reason: str, tmp_path: Path) -> None:
    done = relay(tmp_path, "hold", "--reason", reason)
    assert (done.returncode, done.stdout) == (2, "")
    assert "one line of at most 200 characters" in " ".join(done.stderr.split())


def test_stats_for_people_shows_what_never_left_the_browser(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    with Redis.from_url(valkey_url) as ask:
        seconds, _ = ask.time()
        day = f"{datetime.fromtimestamp(seconds, UTC):%Y%m%d}"
        counted = {"chrome:called": 7301, "chrome:arrived": 7299, "chrome:full": 2}
        ask.hset(f"{{{prefix}}}:browser:{day}", mapping=counted)
    done = relay(tmp_path, "stats", redis_url=valkey_url, redis_prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    head, row = (
        re.findall(rf"^.*\b{name}\b.*$", done.stdout, re.M)[0]
        for name in ("family", "chrome")
    )
    cells = [re.findall(r"\w+", line) for line in (head, row)]
    assert cells[0] == ["family", "called", "arrived", *KINDS[1:]]
    assert cells[1] == ["chrome", "7301", "7299", "2", "0", "0", "0"]


# The snippet


def test_the_tag_is_for_the_pages_own_host_unless_another_is_named(
    tmp_path: Path,
) -> None:
    script = present()
    own = relay(tmp_path, "snippet")
    assert (own.returncode, own.stderr) == (0, "")
    stub, loader = own.stdout.splitlines()
    assert stub == f"<script>{STUB}</script>"
    assert loader == (
        f'<script async src="/{script.name}" integrity="{script.integrity}" '
        'crossorigin="anonymous"></script>'
    )
    other = relay(
        tmp_path,
        *(
            "snippet",
            "https://Events.Shop.example/",
            "--no-pin",
            "--consent",
            "--debug",
        ),
        path_prefix="/e",
        track_path="/cart",
    )
    assert other.stdout.splitlines()[1] == (
        '<script async src="https://events.shop.example/e/relay.js" '
        'data-url="https://events.shop.example/e/cart" data-consent="required" '
        "data-debug></script>"
    )


@pytest.mark.parametrize("url", ["shop.example", "https://*.shop.example", "/x"])
def test_a_tag_is_made_for_one_host_alone(url: str, tmp_path: Path) -> None:
    done = relay(tmp_path, "snippet", url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "https://" in done.stderr


def test_stats_without_a_running_relay_says_where_it_looked(tmp_path: Path) -> None:
    done = relay(tmp_path, "stats", data_dir=str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"in {tmp_path}/data (RELAY_DATA_DIR; " in done.stderr
    assert not (tmp_path / "data").exists()


def test_stats_of_a_redis_that_is_away_names_the_setting_and_no_password(
    tmp_path: Path,
) -> None:
    done = relay(tmp_path, "stats", redis_url="redis://me:S3CRET@127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert "at RELAY_REDIS_URL?" in done.stderr
    assert "S3CRET" not in done.stderr


# Refusals at the start


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        (("serve",), "port"),
        (("serve", "--workers", "2"), "ops_port"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_taken_port_ends_the_start_with_what_to_do(
    valkey_url: str, tmp_path: Path, command: tuple[str, ...], setting: str
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        given = COMPLETE | {"redis_url": valkey_url, setting: port}
        done = relay(tmp_path, *command, **given)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Cannot listen on 127.0.0.1 port {port} (Address already in use): stop what "
        f"uses it, or choose another port with {variable(setting)}.\n"
    )


def test_the_sandbox_names_its_own_option_when_its_port_is_taken(
    tmp_path: Path,
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        done = relay(tmp_path, "sandbox", "--port", port)
    assert done.returncode == 1
    assert done.stderr.endswith("choose another port with --port.\n")


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_redis_that_evicts_is_refused(tmp_path: Path, command: str) -> None:
    with EmbeddedServer(data_dir=tmp_path / "data") as server:
        with Redis.from_url(server.url) as ask:
            ask.config_set("maxmemory-policy", "allkeys-lru")
        done = relay(tmp_path, command, **COMPLETE, redis_url=server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "(allkeys-lru)" in done.stderr
    assert done.stderr.endswith("set `maxmemory-policy noeviction`.\n")


@pytest.mark.anyio
async def test_serve_starts_without_redis_and_takes_events_once_it_is_there(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    url = running_url(tmp_path / "data")
    async with (
        stack(valkey_url, prefix, tmp_path) as it,
        Sender() as sender,
    ):
        process = it.start("serve", redis_url=url)
        track, ready = await process.track_url(), await process.ready_url()

        async def status() -> int:
            async with sender._session.get(ready) as answer:
                return answer.status

        assert await status() == 503
        assert await sender.send(track, 1) == 503
        with EmbeddedServer(data_dir=tmp_path / "data"):

            async def is_ready() -> bool:
                return await status() == 200

            await eventually(is_ready)

            async def taken() -> bool:
                return await sender.send(track, 2) == 202

            await eventually(taken)

            async def delivered() -> bool:
                return it.delivered_ids() == ["2"]

            await eventually(delivered)
            assert await process.stop() == 0


def test_a_check_does_not_wait_for_a_silent_name_server(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, time\n"
        "real = socket.getaddrinfo\n"
        "def slow(host, *rest, **more):\n"
        "    if '.hang' in str(host):\n"
        "        time.sleep(25)\n"
        "    return real(host, *rest, **more)\n"
        "socket.getaddrinfo = slow\n"
    )
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}",
        "HOME": str(tmp_path),
        **{variable(name): value for name, value in COMPLETE.items()},
        "RELAY_CLUSTER": "https://cluster.hang",
        "RELAY_REDIS_URL": "redis://127.0.0.1:9",
    }
    began = time.monotonic()
    done = subprocess.run(
        [*RELAY, "check", "--json"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    codes = {finding["code"] for finding in json.loads(done.stdout)["findings"]}
    assert "cluster_unreachable" in codes
    assert done.returncode == 3
    assert time.monotonic() - began < 22
