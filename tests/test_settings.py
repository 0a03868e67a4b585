"""Settings: every fault at once, never a value, and documents that keep up."""

import os
import pickle
import re
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from relay.errors import SettingsError
from relay.limits import DEFAULT_LIMITS, Window, parse_limits
from relay.settings import (
    CREDENTIALS,
    ENV_FILE,
    KNOWN,
    SECRETS,
    Role,
    Settings,
    load_settings,
    required,
    variable,
)

ROOT = Path(__file__).parents[1]
FIELDS = Settings.model_fields

COMPLETE = {
    "RELAY_ALLOWED_ORIGINS": "https://shop.example https://*.shop.example",
    "RELAY_CLIENT_APPLICATION_ID": "app-1",
    "RELAY_CLIENT_TOKEN": "tok-secret-1",
    "RELAY_ORIGIN": "shop.example",
}

# Every credential there is, so that any scheme can be chosen.
KEYS = {
    variable(field): example
    for field, example in (
        ("server_app_id", "server-1"),
        ("server_app_token", "tok-secret-5"),
        ("oauth_app_id", "service-1"),
        ("oauth_app_secret", "tok-secret-6"),
        ("oauth_project_id", "proj_1"),
        ("oauth_scope", "events.create"),
        ("signing_keys", "k" * 32),
    )
}

# Not printable, not ASCII, nobody's grammar; and told apart in any message.
GARBAGE = "\x07Zqx {gärbage\\"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of ours is read, and none of a developer's


def faults(
    role: Role, environ: dict[str, str] | None = None, **overrides: object
) -> dict[str, str]:
    """Load what must fail, and give the fault of each variable."""
    with pytest.raises(SettingsError) as caught:
        load_settings(role, environ or {}, **overrides)
    # Nothing that is chained to the error may show a value either.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    pairs = [line.split(": ", 1) for line in caught.value.faults]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


TRUSTED = (
    "RELAY_ANONYMOUS: senders without a token are trusted, so any visitor can "
    "overwrite a customer's profile and mint points. Set RELAY_SIGNING_KEYS and give "
    "pages tokens, or set RELAY_ANONYMOUS=restricted."
)


def shown(secret: SecretStr | None) -> str:
    assert secret is not None
    return secret.get_secret_value()


def example(field: str) -> str:
    return str((FIELDS[field].examples or [""])[0])


def test_the_defaults_are_the_documented_ones() -> None:
    settings = load_settings(Role.READ, {"HOME": "/home/someone"})
    assert (settings.host, settings.port, settings.uds) == ("127.0.0.1", 8000, None)
    assert (settings.track_path, settings.path_prefix) == ("/track", "")
    assert (bool(settings.allowed_origins), settings.allow_no_origin) == (False, False)
    assert bool(settings.trusted_proxies) is False
    assert settings.limits == parse_limits(DEFAULT_LIMITS)
    assert (settings.queue_max, settings.dedupe_window) == (1_000_000, 259_200)
    assert (settings.redis_url, settings.redis_prefix) == (None, "relay")
    assert settings.data_dir == Path("/home/someone/.local/state/relay")
    assert settings.cluster == "api"
    assert settings.upstream_url == "https://api.voucherify.io"
    assert settings.upstream_budget == (Window(quota=4, period_ms=5_000),)
    assert (settings.egress, settings.concurrency) == ("all", 32)
    assert (settings.ttl, settings.drain_timeout) == (259_200, 10)
    assert (settings.ops_host, settings.ops_port) == ("127.0.0.1", 9000)
    assert (settings.ops_token, settings.log_format) == (None, "auto")
    assert settings.warnings == ()


def test_values_are_ready_to_use() -> None:
    settings = load_settings(
        Role.SERVE,
        {
            **COMPLETE,
            "RELAY_TRUSTED_PROXIES": "unix, 10.0.0.0/8",
            "RELAY_LIMITS": "off",
            "RELAY_UPSTREAM_BUDGET": "4/5s, 90/1m",
            "RELAY_TTL": "2d",
            "RELAY_REDIS_URL": "rediss://:pa%23ss@redis.internal:6380/1",
            "RELAY_CLUSTER": "http://127.0.0.1:9999",
            "RELAY_ALLOW_NO_ORIGIN": "Yes",
            "RELAY_OPS_HOST": "::1",
        },
    )
    assert settings.allowed_origins.allows("https://www.shop.example")
    assert settings.trusted_proxies.trusts("10.1.2.3")
    assert settings.limits == ()
    assert len(settings.upstream_budget) == 2
    assert settings.ttl == 172_800
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value().endswith("/1")
    assert shown(settings.client_token) == "tok-secret-1"
    assert settings.upstream_url == "http://127.0.0.1:9999"
    assert settings.allow_no_origin is True


@pytest.mark.parametrize("role", list(Role))
def test_a_role_needs_what_it_uses_and_nothing_else(role: Role) -> None:
    needed = {variable(field) for field in required(role)}
    load_settings(role, {name: COMPLETE[name] for name in needed})
    if needed:
        missing = faults(role)
        assert missing.keys() == needed
        assert all(fault.startswith("is missing. ") for fault in missing.values())


@pytest.mark.parametrize("field", FIELDS)
def test_garbage_is_named_and_cured_and_never_shown(field: str) -> None:
    found = faults(Role.SERVE, {**COMPLETE, variable(field): GARBAGE})
    assert found.keys() == {variable(field)}
    fault = found[variable(field)]
    assert re.search(r"Example: RELAY_[A-Z_]+=\S", fault)
    for part in ("Zqx", "gärbage", "\x07", ascii(GARBAGE)[1:-1]):
        assert part not in fault


@pytest.mark.parametrize("field", SECRETS)
def test_garbage_in_a_file_names_the_file_variable(field: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(GARBAGE)
    name = variable(field) + "_FILE"
    found = faults(Role.READ, {name: str(tmp_path / "secret")})
    assert found.keys() == {name}
    assert "Zqx" not in found[name]
    assert f"Example: {name}=/run/secrets/" in found[name]


def test_every_fault_is_reported_at_once_in_the_order_of_the_documents() -> None:
    found = faults(Role.SERVE, {variable(field): GARBAGE for field in FIELDS})
    assert list(found) == [variable(field) for field in FIELDS]


@pytest.mark.parametrize("field", FIELDS)
def test_the_example_of_a_setting_is_valid(field: str) -> None:
    given = {"RELAY_OPS_TOKEN": "ops-token-1", variable(field): example(field)}
    environ = {**COMPLETE, **KEYS, **given}
    assert load_settings(Role.SERVE, environ) is not None


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("RELAY_PORT", "65536"),
        ("RELAY_PORT", "-1"),
        ("RELAY_PORT", "8_000"),
        ("RELAY_PORT", "\u0668"),
        ("RELAY_PORT", "9" * 5_000),
        ("RELAY_QUEUE_MAX", "0"),
        ("RELAY_CONCURRENCY", "257"),
        ("RELAY_TRACK_PATH", "track"),
        ("RELAY_TRACK_PATH", "/"),
        ("RELAY_TRACK_PATH", "/track/"),
        ("RELAY_TRACK_PATH", "//track"),
        ("RELAY_TRACK_PATH", "/a/../b"),
        ("RELAY_TRACK_PATH", "/a/{b}"),
        ("RELAY_TRACK_PATH", "/a?b"),
        ("RELAY_TRACK_PATH", "/a%20b"),
        ("RELAY_TRACK_PATH", "/client/v1/events"),
        ("RELAY_PATH_PREFIX", "/"),
        ("RELAY_PATH_PREFIX", "relay"),
        ("RELAY_UDS", "/" + "x" * 103),
        ("RELAY_TTL", "0s"),
        ("RELAY_TTL", "31d"),
        ("RELAY_DRAIN_TIMEOUT", "2h"),
        ("RELAY_REDIS_PREFIX", "{relay}"),
        ("RELAY_REDIS_PREFIX", "x" * 65),
        ("RELAY_CLIENT_TOKEN", "two words"),
        ("RELAY_CLIENT_TOKEN", "line\r\nbreak"),
        ("RELAY_LOG_FORMAT", "JSON"),
        ("RELAY_REDIS_URL", "http://redis:6379"),
        ("RELAY_REDIS_URL", "redis://"),
        ("RELAY_REDIS_URL", "redis://redis:99999"),
        ("RELAY_REDIS_URL", "redis://redis/zero"),
        ("RELAY_REDIS_URL", "redis://:pa#ss@redis"),
        ("RELAY_REDIS_URL", "redis://:pa/ss@redis"),
        ("RELAY_REDIS_URL", "redis://redis?socket_timeout=60"),
        ("RELAY_REDIS_URL", "redis://redis?db=x"),
        ("RELAY_REDIS_URL", "redis+sentinel://redis"),
        ("RELAY_REDIS_URL", "unix://redis.sock"),
        ("RELAY_CLUSTER", "http://voucherify.example"),
        ("RELAY_CLUSTER", "https://api.voucherify.io/v1"),
    ],
)
def test_values_beyond_the_bounds_are_refused(name: str, bad: str) -> None:
    found = faults(Role.SERVE, {**COMPLETE, name: bad})
    assert found.keys() == {name}


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://u:p@10.0.0.1:6380/15",
        "redis://[::1]:6379",
        "rediss://redis.internal:6379?ssl_ca_certs=/etc/ca.pem&ssl_cert_reqs=required",
        "unix:///run/redis.sock?db=2",
        "unix://:secret@/run/redis.sock",
    ],
)
def test_redis_urls_of_every_kind(url: str) -> None:
    settings = load_settings(Role.READ, {"RELAY_REDIS_URL": url})
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == url


def test_quotes_that_a_tool_kept_are_the_fault_that_is_named() -> None:
    found = faults(Role.READ, {"RELAY_PORT": '"8000"', "RELAY_ORIGIN": "'a.example'"})
    assert all(fault.startswith("leave out the quotes") for fault in found.values())


def test_a_kubernetes_service_link_is_recognised() -> None:
    found = faults(Role.READ, {"RELAY_PORT": "tcp://10.96.0.17:8000"})
    assert "enableServiceLinks" in found["RELAY_PORT"]


def test_off_loopback_the_ops_listener_needs_a_token() -> None:
    environ = {**COMPLETE, "RELAY_OPS_HOST": "0.0.0.0"}
    assert faults(Role.SERVE, environ).keys() == {"RELAY_OPS_TOKEN"}
    assert faults(Role.WORKER, environ).keys() == {"RELAY_OPS_TOKEN"}
    load_settings(Role.READ, environ)
    load_settings(Role.SERVE, {**environ, "RELAY_OPS_TOKEN": "ops-token-1"})


def test_two_listeners_cannot_have_one_port() -> None:
    same = {**COMPLETE, "RELAY_OPS_PORT": "8000"}
    assert faults(Role.SERVE, same).keys() == {"RELAY_OPS_PORT"}
    wildcard = {**same, "RELAY_HOST": "0.0.0.0"}
    assert faults(Role.SERVE, wildcard).keys() == {"RELAY_OPS_PORT"}
    assert faults(Role.SERVE, {**same, "RELAY_PORT": "x"}).keys() == {"RELAY_PORT"}
    load_settings(Role.SERVE, {**same, "RELAY_HOST": "127.0.0.2"})
    load_settings(Role.SERVE, {**same, "RELAY_UDS": "/run/relay.sock"})
    load_settings(Role.WORKER, same)
    load_settings(Role.SERVE, {**COMPLETE, "RELAY_PORT": "0", "RELAY_OPS_PORT": "0"})


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbf  tok-secret-2\r\n")
    environ = {**COMPLETE, "RELAY_CLIENT_TOKEN_FILE": str(tmp_path / "token")}
    del environ["RELAY_CLIENT_TOKEN"]
    settings = load_settings(Role.SERVE, environ)
    assert shown(settings.client_token) == "tok-secret-2"
    assert settings.warnings == (TRUSTED,)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe", b"x" * 300_000])
def test_a_file_that_gives_no_secret_is_named_with_its_path(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    found = faults(Role.WORKER, {"RELAY_CLIENT_TOKEN_FILE": str(path)})
    assert str(path) in found["RELAY_CLIENT_TOKEN_FILE"]
    assert "RELAY_CLIENT_TOKEN" not in found  # it is not missing as well


def test_a_secret_put_where_a_path_belongs_is_not_shown() -> None:
    found = faults(Role.READ, {"RELAY_OPS_TOKEN_FILE": "hunter2"})
    assert "hunter2" not in found["RELAY_OPS_TOKEN_FILE"]


@pytest.mark.parametrize("field", SECRETS)
def test_a_secret_and_its_file_together_are_a_fault(field: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("redis://other")
    name = variable(field)
    environ = {name: "redis://one", f"{name}_FILE": str(tmp_path / "secret")}
    assert "keep one of them" in faults(Role.READ, environ)[name]


def test_the_env_file_is_below_the_environment_and_overrides_are_above(
    tmp_path: Path,
) -> None:
    (tmp_path / ".env").write_text(
        "# a comment\nexport RELAY_PORT=1\nRELAY_OPS_PORT='2' # two\n"
        "RELAY_ORIGIN=three.example\nRELAY_EGRESS=four\nOTHER=x\n"
    )
    environ = {"RELAY_OPS_PORT": "3", "RELAY_EGRESS": "", "RELAY_TTL": "1h"}
    settings = load_settings(Role.READ, environ, ttl="2h", port=None)
    assert (settings.port, settings.ops_port, settings.ttl) == (1, 3, 7_200)
    assert settings.origin == "three.example"
    assert settings.egress == "all"  # set to nothing: the default again
    assert settings.warnings == ()


def test_the_env_file_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RELAY_OPS_TOKEN=a$HOME${RELAY_PORT}\n")
    settings = load_settings(Role.READ, {})
    assert settings.ops_token is not None
    assert settings.ops_token.get_secret_value() == "a$HOME${RELAY_PORT}"


def test_another_env_file_can_be_named_and_must_then_be_there(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RELAY_PORT=1\n")
    (tmp_path / "other.env").write_text("RELAY_PORT=2\n")
    there, away = str(tmp_path / "other.env"), str(tmp_path / "away.env")
    assert load_settings(Role.READ, {ENV_FILE: there}).port == 2
    assert load_settings(Role.READ, {ENV_FILE: os.devnull}).port == 8000
    assert away in faults(Role.READ, {ENV_FILE: away})[ENV_FILE]


@pytest.mark.parametrize(
    "line", ["RELAY_PORT 8000", "RELAY_PORT", "RELAY_OPS_TOKEN='Zqx", "RELAY_A B=1"]
)
def test_a_line_that_is_no_setting_is_a_fault(line: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"OTHER=1\n{line}\n")
    found = faults(Role.READ, {})
    assert found[ENV_FILE].startswith("line 2 of the file")
    assert "Zqx" not in found[ENV_FILE]


def test_lines_of_others_in_the_env_file_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("nonsense here\nDATABASE\nRELAY_PORT=1\n")
    assert load_settings(Role.READ, {}).port == 1


def test_a_directory_called_env_is_somebodys_virtual_environment(
    tmp_path: Path,
) -> None:
    (tmp_path / ".env").mkdir()
    assert load_settings(Role.READ, {}).port == 8000


def test_overrides_take_plain_values(tmp_path: Path) -> None:
    settings = load_settings(
        Role.SERVE,
        {"RELAY_CLIENT_TOKEN_FILE": "/nowhere", "RELAY_PORT": GARBAGE},
        port=0,
        allow_no_origin=True,
        data_dir=tmp_path,
        allowed_origins=["https://a.example", "https://b.example"],
        client_token=SecretStr("tok-secret-3"),
        client_application_id="app",
        origin="a.example",
    )
    assert (settings.port, settings.allow_no_origin) == (0, True)
    assert settings.data_dir == tmp_path
    assert len(settings.allowed_origins.patterns) == 2
    assert shown(settings.client_token) == "tok-secret-3"
    assert faults(Role.READ, {}, port=70_000).keys() == {"RELAY_PORT"}
    with pytest.raises(TypeError, match="has no setting 'prot'"):
        load_settings(Role.READ, {}, prot=1)


def test_an_unknown_variable_is_a_warning_that_names_the_nearest() -> None:
    settings = load_settings(
        Role.READ, {"RELAY_TRACKPATH": "Zqx", "RELAY_CLIENT_TOKEN_FIEL": "Zqx"}
    )
    first, second = settings.warnings
    assert first.startswith("RELAY_TRACKPATH: ")
    assert first.endswith(" RELAY_TRACK_PATH.")
    assert second.endswith(" RELAY_CLIENT_TOKEN_FILE.")
    assert "Zqx" not in first + second


def test_an_unknown_variable_in_the_env_file_is_a_warning_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RELAY_PROT=1\n")
    (warning,) = load_settings(Role.READ, {}).warnings
    assert warning.endswith(" RELAY_PORT.")


@pytest.mark.parametrize(
    "name",
    ["RELAY_DURABILITY"],
)
def test_a_setting_of_a_later_version_says_so(name: str) -> None:
    (warning,) = load_settings(Role.READ, {name: "Zqx"}).warnings
    assert warning.startswith(f"{name}: this version does not use it yet")
    assert "Zqx" not in warning


def test_what_is_allowed_but_doubtful_is_a_warning() -> None:
    doubtful = {
        "RELAY_ALLOWED_ORIGINS": "*",
        "RELAY_CLIENT_TOKEN": "client-token-1",
        "RELAY_UDS": "/run/relay.sock",
    }
    trusted, anyone, socket = load_settings(Role.EDGE, doubtful).warnings
    assert trusted.startswith("RELAY_ANONYMOUS: ")
    assert anyone.startswith("RELAY_ALLOWED_ORIGINS: ")
    assert socket.startswith("RELAY_TRUSTED_PROXIES: ")
    cured = {**doubtful, "RELAY_TRUSTED_PROXIES": "unix"}
    assert load_settings(Role.EDGE, cured).warnings == (trusted, anyone)
    cured |= {"RELAY_ANONYMOUS": "restricted"}
    assert load_settings(Role.EDGE, cured).warnings == (anyone,)
    assert load_settings(Role.READ, doubtful).warnings == (anyone, socket)


@pytest.mark.parametrize(
    ("environ", "about"),
    [
        ({}, "RELAY_ANONYMOUS"),  # auto, and no key: trusted
        ({"RELAY_SIGNING_KEYS": "k" * 32}, None),  # auto, and a key: restricted
        (
            {"RELAY_SIGNING_KEYS": "k" * 32, "RELAY_ANONYMOUS": "trusted"},
            "RELAY_ANONYMOUS",
        ),
        (
            {
                "RELAY_SIGNING_KEYS": "k" * 32,
                "RELAY_ANONYMOUS": "trusted",
                "RELAY_TOKENS": "required",
            },
            None,
        ),
        ({"RELAY_SIGNING_KEYS": "k" * 32, "RELAY_TOKENS": "dry_run"}, "RELAY_TOKENS"),
        ({"RELAY_SIGNING_KEYS": "k" * 32, "RELAY_TOKENS": "off"}, "RELAY_TOKENS"),
    ],
)
def test_what_visitors_may_do_is_said_at_the_start(
    environ: dict[str, str], about: str | None
) -> None:
    warnings = load_settings(Role.SERVE, {**COMPLETE, **environ}).warnings
    assert [warning.split(":")[0] for warning in warnings] == ([about] if about else [])


@pytest.mark.parametrize(("api", "auth"), list(CREDENTIALS))
def test_a_credential_scheme_needs_what_it_uses_and_nothing_else(
    api: str, auth: str
) -> None:
    scheme = {"RELAY_UPSTREAM_API": api, "RELAY_AUTH": auth}
    for role in (Role.SERVE, Role.EDGE, Role.WORKER):
        needed = {variable(field) for field in required(role, api, auth)}
        given = {n: v for n, v in (COMPLETE | KEYS).items() if n in needed}
        settings = load_settings(role, {**given, **scheme})
        assert settings.digest_secret
        assert faults(role, scheme).keys() == needed
    # All relays of a shop count under the same digests, whatever their role.
    edge, worker = required(Role.EDGE, api, auth), required(Role.WORKER, api, auth)
    assert set(edge) & set(worker) & set(SECRETS)


@pytest.mark.parametrize(
    ("environ", "calls"),
    [
        ({}, (4, 5_000)),
        ({"RELAY_UPSTREAM_API": "server"}, (90, 60_000)),
        ({"RELAY_UPSTREAM_API": "server", "RELAY_UPSTREAM_BUDGET": "1/1s"}, (1, 1_000)),
    ],
)
def test_the_default_budget_is_that_of_the_api(
    environ: dict[str, str], calls: tuple[int, int]
) -> None:
    [window] = load_settings(
        Role.SERVE, {**COMPLETE, **KEYS, **environ}
    ).upstream_budget
    assert (window.quota, window.period_ms) == calls


def test_tokens_cannot_be_required_without_a_key() -> None:
    for rule in ("required", "dry_run"):
        found = faults(Role.SERVE, {**COMPLETE, "RELAY_TOKENS": rule})
        assert found.keys() == {"RELAY_SIGNING_KEYS"}
        assert "relay keygen" in found["RELAY_SIGNING_KEYS"]


@pytest.mark.parametrize(
    "keys", ["short", f"{'a' * 32},{'a' * 32}", "x" * 513, " ".join("abcdefghijk")]
)
def test_weak_double_and_too_many_keys_are_refused(keys: str) -> None:
    found = faults(Role.SERVE, {**COMPLETE, "RELAY_SIGNING_KEYS": keys})
    assert found.keys() == {"RELAY_SIGNING_KEYS"}
    assert keys[:32] not in found["RELAY_SIGNING_KEYS"]


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"XDG_STATE_HOME": "/state", "HOME": "/h"}, "/state/relay"),
        ({"XDG_STATE_HOME": "state", "HOME": "/h"}, "/h/.local/state/relay"),
        ({"RELAY_DATA_DIR": "/data", "XDG_STATE_HOME": "/state"}, "/data"),
    ],
)
def test_the_data_directory_follows_the_xdg_rules(
    environ: dict[str, str], directory: str
) -> None:
    assert load_settings(Role.READ, environ).data_dir == Path(directory)


def test_a_faulty_data_directory_of_the_system_is_a_fault_as_well() -> None:
    found = faults(Role.READ, {"XDG_STATE_HOME": "/\x07"})
    assert found.keys() == {"RELAY_DATA_DIR"}


def test_nothing_that_is_printed_or_dumped_shows_a_secret() -> None:
    settings = load_settings(
        Role.SERVE,
        {
            **COMPLETE,
            "RELAY_REDIS_URL": "redis://:tok-secret-4@redis",
            "RELAY_OPS_TOKEN": "tok-secret-5",
        },
    )
    printed = f"{settings!r} {settings} {settings.model_dump()}"
    assert "tok-secret" not in printed + settings.model_dump_json()
    assert "https://*.shop.example" in settings.model_dump_json()
    with pytest.raises(ValidationError) as caught:
        Settings(client_token="tok secret", port="tok secret")  # type: ignore[arg-type]  # read as text
    assert "tok secret" not in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    settings = load_settings(Role.READ, {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


def test_only_load_settings_reads_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PORT", "port", "RELAY_PORT"):
        monkeypatch.setenv(name, "1")
    assert Settings().port == 8000
    assert load_settings(Role.READ).port == 1


def test_settings_can_go_to_a_worker_process() -> None:
    settings = load_settings(Role.SERVE, {**COMPLETE, "RELAY_FOO": "1"})
    copy = pickle.loads(pickle.dumps(settings))  # noqa: S301  # our own bytes
    assert copy.allowed_origins.allows("https://www.shop.example")
    assert copy.warnings == settings.warnings


# ---- The documents: docs/settings.md and .env.example, in both directions ----


def documented() -> str:
    return (ROOT / "docs" / "settings.md").read_text()


@pytest.mark.parametrize("field", FIELDS)
def test_the_table_shows_a_setting_as_it_is(field: str) -> None:
    default = f"`{FIELDS[field].default}`" if FIELDS[field].default else "none"
    row = (
        f"| `{variable(field)}` | {default} | {FIELDS[field].description} "
        f"| `{example(field)}` |"
    )
    assert row in documented().splitlines()


def test_the_document_names_no_setting_that_is_not_there() -> None:
    assert set(re.findall(r"RELAY_[A-Z_]+[A-Z]", documented())) <= KNOWN
    rows = re.findall(r"^\| `(RELAY_\w+)` \|", documented(), re.MULTILINE)
    assert rows == [variable(field) for field in FIELDS]


def test_the_document_names_the_files_of_all_secrets() -> None:
    for field in SECRETS:
        assert f"`{variable(field)}_FILE" in documented()


@pytest.mark.parametrize(
    ("role", "command"),
    [
        (Role.SERVE, "`relay serve`"),
        (Role.EDGE, "`relay serve --no-forwarder`"),
        (Role.WORKER, "`relay worker`"),
        (Role.READ, "commands that only read"),
    ],
)
def test_the_document_says_what_a_command_needs(role: Role, command: str) -> None:
    needs = ", ".join(f"`{variable(field)}`" for field in required(role)) or "nothing"
    assert f"| {command} | {needs} |" in documented().splitlines()


def test_the_faults_in_the_document_are_real_ones() -> None:
    block = documented().split("```")[1].strip().splitlines()
    environ = {**COMPLETE, "RELAY_PORT": GARBAGE, "RELAY_CLIENT_TOKEN": ""}
    with pytest.raises(SettingsError) as caught:
        load_settings(Role.SERVE, environ)
    assert block == caught.value.faults


def test_the_example_file_has_every_setting_with_one_line_about_it() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    seen = []
    for comment, line in pairwise(lines):
        if match := re.fullmatch(r"# (RELAY_\w+)=(.*)", line):
            name, value = match.groups()
            field = name.removeprefix("RELAY_").lower()
            seen.append(field)
            about = str(FIELDS[field].description).replace("`", "")
            if field in SECRETS:
                about += f" Or its file: {name}_FILE."
            needed = field in required(Role.SERVE)
            assert comment == f"# {about}"
            assert value == (example(field) if needed else FIELDS[field].default)
    assert sorted(seen) == sorted(FIELDS)
    assert all(line == "" or line.startswith("# ") for line in lines)


def test_the_example_file_starts_a_relay_once_it_is_uncommented(
    tmp_path: Path,
) -> None:
    text = (ROOT / ".env.example").read_text()
    (tmp_path / ".env").write_text(re.sub(r"^# (RELAY_)", r"\1", text, flags=re.M))
    settings = load_settings(Role.SERVE, {"HOME": "/home/someone"})
    assert [w.split(":")[0] for w in settings.warnings] == ["RELAY_ANONYMOUS"]
    assert settings.limits == parse_limits(DEFAULT_LIMITS)
    assert settings.allowed_origins.allows("https://www.shop.example")
