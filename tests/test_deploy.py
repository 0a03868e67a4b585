"""The image, compose and nginx files agree with the relay and with each other.

No container is run here. What can run without one does: Valkey with the options of
compose, and the settings with its environment.
"""

import json
import re
import secrets
import subprocess
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own
from packaging.requirements import Requirement

from relay.edge import MAX_BODY_BYTES, MAX_WAIT_S
from relay.embedded import find_binary
from relay.limits import parse_duration
from relay.ops import ops_app
from relay.queue import Queue
from relay.serving import GRACE_S, server_config
from relay.settings import KNOWN, Role, Settings, load_settings
from relay.snippet import NAME, present
from relay.values import SDK_PATH
from tests.support import eventually

ROOT = Path(__file__).parents[1]
NGINX = ROOT / "deploy" / "nginx"
DEFAULTS = {name: str(field.default) for name, field in Settings.model_fields.items()}

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """The Dockerfile, comments gone and continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text).splitlines()
    pairs = [line.split(maxsplit=1) for line in joined if line.strip()]
    return [(word, rest) for word, rest in pairs]


def stages() -> list[list[Instruction]]:
    made: list[list[Instruction]] = []
    for word, rest in instructions():
        if word == "FROM":
            made.append([])
        if made:
            made[-1].append((word, rest))
    return made


def last(word: str) -> str:
    """What the stage that runs says of `word`, the last one counting."""
    return [rest for found, rest in stages()[-1] if found == word][-1]


def image_environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", last("ENV")))


def compose() -> dict[str, dict[str, dict[str, object]]]:
    found = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert isinstance(found, dict)
    return found


def service(name: str) -> dict[str, object]:
    return compose()["services"][name]


def words(value: object) -> list[str]:
    assert isinstance(value, list)
    return [str(word) for word in value]


def table(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value


def directive(file: str, name: str) -> str:
    """The value of a directive that a file of nginx has once."""
    text = re.sub(r"#.*", "", (NGINX / file).read_text())
    values = re.findall(rf"^\s*{re.escape(name)}\s+([^;]+);", text, re.MULTILINE)
    assert len(values) == 1, f"{name} is there {len(values)} times"
    return str(values[0])


SERVICES = sorted(compose()["services"])


class TestImage:
    def test_what_runs_has_no_root_and_no_tools(self) -> None:
        assert len(stages()) == 2
        user, _, group = last("USER").partition(":")
        assert user.isdigit()
        assert group.isdigit()
        assert "0" not in (user, group)
        commands = [rest for word, rest in stages()[-1] if word == "RUN"]
        assert not any("install -r" in c or "apt-get" in c for c in commands)
        assert "pip uninstall" in commands[0]
        assert f"--uid {user} " in commands[0]
        assert f"--gid {group} " in commands[0]

    def test_the_base_is_one_and_has_a_version(self) -> None:
        assert ("ARG", "BASE=python:3.12-slim") in instructions()
        froms = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
        assert froms == ["${BASE}"] * 2

    def test_everything_installed_is_locked(self) -> None:
        text = " ".join(rest for word, rest in instructions() if word == "RUN")
        installs = re.findall(r"pip(?: --python \S+)? install ([^&]+)", text)
        assert len(installs) == 3
        for options in installs:
            locked = "--require-hashes" in options and "--only-binary :all:" in options
            assert locked or {"--no-deps", "--no-index"} <= set(options.split())
        assert not re.search(r"index-url|trusted-host|https?:", text)

    def test_the_build_backend_is_taken_from_the_lock_whole(self) -> None:
        text = (ROOT / "Dockerfile").read_text()
        wanted = re.search(r"wanted = /\^\(([a-z|-]+)\)==/", text)
        assert wanted is not None
        assert set(wanted[1].split("|")) == needed_by("hatchling")

    def test_only_what_is_copied_reaches_the_builder(self) -> None:
        ignored = (ROOT / ".dockerignore").read_text().split("\n")
        rules = [line for line in ignored if line and not line.startswith("#")]
        assert rules[0] == "*", "everything is left out, unless it is named"
        for word, rest in instructions():
            if word == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert reaches(source, rules), source
        for secret in (".env", "relay/.env", "deploy/.env", ".git", "tests", ".venv"):
            assert not reaches(secret, rules), secret

    def test_its_environment_is_made_of_settings(self) -> None:
        relay = {n for n in image_environment() if n.startswith("RELAY_")}
        assert relay == {"RELAY_HOST", "RELAY_DATA_DIR"}
        assert relay <= KNOWN
        assert last("VOLUME") == image_environment()["RELAY_DATA_DIR"]
        assert last("EXPOSE") == DEFAULTS["port"]
        assert last("STOPSIGNAL") == "SIGTERM"

    def test_it_runs_serve_without_a_shell(self) -> None:
        assert json.loads(last("ENTRYPOINT")) == ["relay"]
        assert json.loads(last("CMD")) == ["serve"]

    def test_its_health_is_asked_where_the_ops_listener_is(self) -> None:
        command = last("HEALTHCHECK").partition("CMD ")[2]
        program, option, code = json.loads(command)
        assert (program, option) == ("python", "-c")
        compile(code, "HEALTHCHECK", "exec")
        where = f"'{DEFAULTS['ops_host']}', {DEFAULTS['ops_port']}"
        assert where in code
        paths = {getattr(route, "path", "") for route in ops_app({}).routes}
        assert {path for path in paths if f"'{path}'" in code} == {"/healthz"}


class TestCompose:
    @pytest.mark.parametrize("name", SERVICES)
    def test_each_container_is_confined(self, name: str) -> None:
        found = service(name)
        assert found["read_only"] is True
        assert found["cap_drop"] == ["ALL"]
        assert found["security_opt"] == ["no-new-privileges:true"]
        assert found["tmpfs"] == ["/tmp"]  # noqa: S108  # the container's own
        assert not {"privileged", "cap_add", "network_mode", "pid"} & found.keys()
        assert "healthcheck" in found or name == "relay", "the image has relay's"

    @pytest.mark.parametrize("name", [s for s in SERVICES if s != "relay"])
    def test_each_image_has_a_version(self, name: str) -> None:
        assert re.fullmatch(r"\S+:\d+\.\d+(-\w+)?", str(service(name)["image"]))

    def test_only_nginx_can_be_reached_and_only_from_this_machine(self) -> None:
        assert [name for name in SERVICES if "ports" in service(name)] == ["nginx"]
        (port,) = words(service("nginx")["ports"])
        host, _, inside = port.rpartition(":")
        assert host.startswith("127.0.0.1:")
        assert inside == directive("compose.conf", "listen")
        assert compose()["networks"]["queue"] == {"internal": True}
        assert service("valkey")["networks"] == ["queue"]
        assert "queue" not in words(service("nginx")["networks"])

    def test_nothing_starts_before_what_it_needs(self) -> None:
        for name, needed in {"relay": "valkey", "nginx": "relay"}.items():
            expected = {needed: {"condition": "service_healthy"}}
            assert service(name)["depends_on"] == expected

    def test_every_volume_and_file_is_there(self) -> None:
        for name in SERVICES:
            for mount in words(service(name)["volumes"]):
                source, target = mount.split(":")[:2]
                assert target.startswith("/")
                if source.startswith("."):
                    assert (ROOT / "deploy" / source).is_file(), source
                else:
                    assert source in compose()["volumes"], source

    def test_the_settings_are_right_without_a_doubt(self, tmp_path: Path) -> None:
        token = tmp_path / "token"
        token.write_text("of-the-merchant\n")
        mine = table(service("relay")["environment"])
        assert mine.keys() <= KNOWN
        environ = example() | image_environment()
        environ |= {name: str(value) for name, value in mine.items()}
        assert environ["RELAY_CLIENT_TOKEN_FILE"] == "/run/secrets/relay_client_token"
        environ["RELAY_CLIENT_TOKEN_FILE"] = str(token)
        environ["RELAY_ENV_FILE"] = "/dev/null"
        settings = load_settings(Role.SERVE, environ)
        # Whom to trust is the merchant's to decide, and is said until it is.
        assert [w.split(":")[0] for w in settings.warnings] == ["RELAY_ANONYMOUS"]
        assert settings.trusted_proxies.trusts(None)

    def test_the_token_comes_as_a_file_that_the_operator_names(self) -> None:
        (secret,) = words(service("relay")["secrets"])
        source = str(compose()["secrets"][secret]["file"])
        assert source == "${RELAY_CLIENT_TOKEN_FILE:-/etc/relay/client_token}"

    def test_the_relay_may_drain_before_it_is_killed(self) -> None:
        allowed = parse_duration(str(service("relay")["stop_grace_period"]))
        assert allowed > GRACE_S + parse_duration(DEFAULTS["drain_timeout"])

    @pytest.mark.anyio
    async def test_its_valkey_is_one_that_loses_nothing(self, tmp_path: Path) -> None:
        program, *options = words(service("valkey")["command"])
        assert program == "valkey-server"
        assert "queue:/data" in words(service("valkey")["volumes"])
        path = Path("/tmp") / f"relay-test-{secrets.token_hex(6)}"  # noqa: S108  # short
        here = ["--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path)]
        process = subprocess.Popen(  # noqa: ASYNC220  # it only starts
            [find_binary(), *options, *here], stdout=subprocess.DEVNULL
        )
        queue = Queue(
            url=f"unix://{path}",
            prefix="relay",
            limits=(),
            budget=(),
            egress="all",
            queue_max=1,
            dedupe_ms=1,
        )
        try:

            async def there() -> bool:
                return path.exists()

            await eventually(there)
            assert list(await queue.probe()) == []
        finally:
            await queue.aclose()
            process.terminate()
            process.wait()


class TestNginx:
    def test_all_name_the_same_socket(self) -> None:
        path = table(service("relay")["environment"])["RELAY_UDS"]
        assert directive("relay-upstream.conf", "server") == f"unix:{path}"
        mounts = {name: words(service(name)["volumes"]) for name in SERVICES}
        assert "socket:/run/relay" in mounts["relay"]
        assert "socket:/run/relay:ro" in mounts["nginx"]
        install = next(rest for word, rest in stages()[-1] if word == "RUN")
        assert "--mode 0755 /run/relay" in install, "nginx's user can enter it"

    def test_it_takes_a_little_more_than_the_relay(self) -> None:
        limit = int(directive("relay.conf", "client_max_body_size").removesuffix("k"))
        assert MAX_BODY_BYTES < limit * 1024 <= 2 * MAX_BODY_BYTES
        assert directive("relay.conf", "client_body_buffer_size") == f"{limit}k"

    def test_it_waits_longer_than_the_relay_may_be_asked_to(self) -> None:
        timeout = parse_duration(directive("relay.conf", "proxy_read_timeout"))
        assert timeout > MAX_WAIT_S

    def test_it_drops_idle_connections_before_the_relay_does(self) -> None:
        kept = parse_duration(directive("relay-upstream.conf", "keepalive_timeout"))
        assert kept < server_config("a:b").timeout_keep_alive

    def test_it_has_the_paths_of_the_relay(self) -> None:
        text = (NGINX / "relay.conf").read_text()
        events, script = re.findall(r'^location ~ "?(\S+?)"? \{', text, re.MULTILINE)
        paths = dict.fromkeys((DEFAULTS["track_path"], SDK_PATH), events)
        paths |= {f"/{name}": script for name in (NAME, present().name)}
        for path, pattern in paths.items():
            assert re.search(pattern, path)
            assert not re.search(pattern, f"{path}/more")
            assert not re.search(pattern, f"/more{path}")

    def test_it_passes_what_the_relay_reads(self) -> None:
        """Each header that the edge looks at; nginx passes no other."""
        edge = (ROOT / "relay" / "edge.py").read_text()
        read = set(re.findall(r'\b(?:get\(|fields\[)b"([a-z-]+)"', edge))
        read -= {"content-length"}
        text = (NGINX / "relay.conf").read_text()
        passed = re.findall(r"^    proxy_set_header ([\w-]+)", text, re.MULTILINE)
        assert len(read) >= 8
        assert read <= {name.lower() for name in passed}
        kept = {"accept-encoding", "if-none-match"}  # of a script, which caches keep
        assert kept <= {name.lower() for name in passed}

    def test_its_own_answers_are_problem_documents(self) -> None:
        text = (NGINX / "relay.conf").read_text()
        answers = re.findall(r"return (\d+) '([^']+)';", text)
        assert {status for status, _ in answers} == {"503", "413"}
        for status, body in answers:
            problem = json.loads(body)
            assert problem["status"] == int(status)
            assert problem["type"].endswith(f":problem:{problem['reason']}")
            size = re.search(r"at most (\d+) bytes", problem["detail"])
            assert size is None or int(size[1]) == MAX_BODY_BYTES


class TestDocument:
    text = (ROOT / "docs" / "deployment.md").read_text()

    def test_it_names_every_file(self) -> None:
        shipped = [ROOT / "deploy" / "compose.yaml", *NGINX.iterdir()]
        for path in shipped:
            assert f"[`{path.name}`](../{path.relative_to(ROOT)})" in self.text

    def test_it_names_no_setting_that_is_not_one(self) -> None:
        assert set(re.findall(r"RELAY_[A-Z_]+", self.text)) <= KNOWN

    def test_its_unit_waits_for_the_drain_and_names_the_socket(self) -> None:
        unit = re.search(r"```ini\n(.*?)```", self.text, re.DOTALL)
        assert unit is not None
        assert directive("relay-upstream.conf", "server") == (
            "unix:" + re.findall(r"RELAY_UDS=(\S+)", unit[1])[0]
        )
        (stop,) = re.findall(r"TimeoutStopSec=(\d+)", unit[1])
        assert int(stop) > GRACE_S + parse_duration(DEFAULTS["drain_timeout"])
        assert "KillMode=mixed" in unit[1]


def needed_by(package: str) -> set[str]:
    """A package and all that it needs here, by name."""
    found, todo = set[str](), [package]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            parsed = [Requirement(line) for line in requires(name) or []]
            todo += [r.name for r in parsed if not r.marker or r.marker.evaluate()]
    return found


def reaches(path: str, rules: list[str]) -> bool:
    """Whether Docker sends `path` to the builder; the last rule that fits decides."""
    sent = True
    parts = Path(path).parts
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        deep = "**/" in rule
        if any(fnmatch(Path(p).name if deep else p, pattern) for p in above):
            sent = rule.startswith("!")
    return sent


def example() -> dict[str, str]:
    """What the merchant must set, as .env.example shows it, but for the token."""
    text = (ROOT / ".env.example").read_text()
    needed = text.split("# ----")[1]
    found = dict(re.findall(r"^# (RELAY_\w+)=(.+)$", needed, re.MULTILINE))
    assert found.pop("RELAY_CLIENT_TOKEN")
    return found
