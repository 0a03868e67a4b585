"""The script as browsers get it, and the tag that names it."""

import gzip
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256, sha384
from html.parser import HTMLParser
from pathlib import Path

import pytest

from relay import snippet
from relay.snippet import NAME, STUB, Script, pinned, present, tag
from tests.programs import needs

SOURCE = Path(__file__).parents[1] / "snippet"
MAX_GZIPPED = 2048


def fields(script: Script, accept: bytes = b"", etag: bytes = b"") -> dict[str, str]:
    _, headers, _ = script.answer(accept, etag, pinned=False)
    assert len({name for name, _ in headers}) == len(headers)
    return {name.decode(): value.decode() for name, value in headers}


def test_it_is_as_small_as_promised_and_whole() -> None:
    plain = present().encodings["identity"]
    assert len(gzip.compress(plain, 9)) <= MAX_GZIPPED
    assert gzip.decompress(present().encodings["gzip"]) == plain
    assert b"sourceMappingURL" not in plain


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (b"gzip, deflate, br, zstd", "br"),
        (b"br;q=0.5, gzip", "br"),
        (b"gzip", "gzip"),
        (b"GZIP ; q=0.8", "gzip"),
        (b"br;q=0, gzip", "gzip"),
        (b"gzip;q=0.000, br; q=0", "identity"),
        (b"", "identity"),
        (b"deflate", "identity"),
        (b"\xff;;=,q", "identity"),
    ],
)
def test_a_browser_gets_the_best_encoding_that_it_takes(
    accept: bytes, coding: str
) -> None:
    status, headers, body = present().answer(accept, b"", pinned=False)
    told = dict(headers)
    assert (status, body) == (200, present().encodings[coding])
    assert told.get(b"content-encoding", b"identity").decode() == coding
    assert told[b"vary"] == b"Accept-Encoding"


def test_every_page_may_load_it_and_check_it() -> None:
    told = fields(present())
    assert told["content-type"] == "text/javascript; charset=utf-8"
    assert told["access-control-allow-origin"] == "*"
    assert told["cross-origin-resource-policy"] == "cross-origin"
    assert told["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_it_is_not_sent_it_again() -> None:
    etag = fields(present(), b"br")["etag"].encode()
    for sent in (etag, b"W/" + etag, b'"other", ' + etag, b"*"):
        status, headers, body = present().answer(b"br", sent, pinned=False)
        assert (status, body) == (304, b"")
        assert dict(headers)[b"etag"] == etag
    # Of another encoding it is another representation (RFC 9110, 8.8.3).
    assert present().answer(b"gzip", etag, pinned=False)[0] == 200


def test_a_pinned_version_is_kept_for_ever_and_the_present_one_for_an_hour() -> None:
    for is_pinned, age in ((True, "31536000, immutable"), (False, "3600")):
        _, headers, _ = present().answer(b"", b"", pinned=is_pinned)
        assert dict(headers)[b"cache-control"].decode() == f"public, max-age={age}"


def test_a_name_and_a_hash_are_of_the_very_bytes() -> None:
    plain = present().encodings["identity"]
    assert present().name == f"relay.{sha256(plain).hexdigest()[:16]}.js"
    digest = b64encode(sha384(plain).digest()).decode()
    assert present().integrity == f"sha384-{digest}"
    assert next(iter(pinned())) == present().name


def test_former_versions_are_served_as_long_as_their_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = tmp_path / "static"
    shutil.copytree(Path(snippet.__file__).parent / "static", static)
    (static / "former").mkdir()
    (static / "former" / "0.1.0.js").write_bytes(b"// a former one")
    monkeypatch.setattr(snippet, "files", lambda _: tmp_path)
    for cached in (present, pinned):
        cached.cache_clear()
    try:
        former = [script for script in pinned().values() if script != present()]
        assert [script.encodings["identity"] for script in former] == [
            b"// a former one"
        ]
        assert set(former[0].encodings) == {"gzip", "identity"}
    finally:
        monkeypatch.undo()
        for cached in (present, pinned):
            cached.cache_clear()


class Tags(HTMLParser):
    """The attributes of each script in a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, _: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append(dict(attributes))


def test_the_tag_is_two_lines_that_load_and_check_one_version() -> None:
    made = tag(base="", track="track", pin=True, options={})
    assert len(made.splitlines()) == 2
    stub, loader = Tags(made).found
    assert stub == {}
    assert loader == {
        "async": None,
        "src": f"/{present().name}",
        "integrity": present().integrity,
        "crossorigin": "anonymous",
    }
    assert f"<script>{STUB}</script>" in made


def test_what_is_in_a_tag_cannot_leave_its_attribute() -> None:
    hostile = '"><script>alert(1)</script>'
    made = tag(base="https://x.example", track="t", pin=False, options={"gpc": hostile})
    _, loader = Tags(made).found
    assert loader["data-gpc"] == hostile
    assert loader["src"] == f"https://x.example/{NAME}"
    assert loader["data-url"] == "https://x.example/t"


def test_the_stub_only_keeps_calls() -> None:
    assert re.fullmatch(r"[\w.=|(){}\[\]; ]+", STUB)  # nothing to escape in a page
    assert "http" not in STUB


@pytest.mark.parametrize("name", ["relay.ts", "tag.ts"])
def test_the_source_sets_no_cookie_and_asks_nobody_else(name: str) -> None:
    text = (SOURCE / "src" / name).read_text("utf-8")
    code = re.sub(r"//.*|/\*.*?\*/", "", text, flags=re.S)
    assert "cookie" not in code
    assert "http" not in code.lower().replace("xmlhttprequest", "")


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "_", [pytest.param("", marks=needs("npm", package="npm"), id="npm")]
)
def test_the_built_file_is_what_the_source_builds_and_its_own_tests_pass(
    _: str, tmp_path: Path
) -> None:
    place = tmp_path / "snippet"
    shutil.copytree(
        SOURCE, place, ignore=shutil.ignore_patterns("node_modules", "dist")
    )
    shutil.copytree(
        Path(snippet.__file__).parent / "static", tmp_path / "relay" / "static"
    )
    for command in (["ci", "--silent"], ["run", "check"], ["test"]):
        done = subprocess.run(
            ["npm", *command],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    # A byte more, and the check says so.
    script = tmp_path / "relay" / "static" / NAME
    script.write_bytes(script.read_bytes() + b"\n")
    done = subprocess.run(
        ["node", "build.mjs", "--check"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "make snippet" in done.stderr) == (1, True)
