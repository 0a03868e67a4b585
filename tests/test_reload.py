"""Which version of the catalogue's file is in force, whatever becomes of the file."""

import os
from pathlib import Path

import pytest
import structlog

from relay.catalog import EMPTY, CatalogError
from relay.reload import CatalogFile

GOOD = "[events.a]\n"
NEWER = "[events.a]\n[events.b]\n"
FAULTY = '[events.a]\npriority = "top"\n'


def opened(
    path: Path | None, *, signing: bool = True, text: str | None = None
) -> CatalogFile:
    return CatalogFile(path, max_ttl_s=3600, signing=signing, text=text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "catalog.toml"
    made.write_text(GOOD)
    return made


def test_no_file_is_no_rule() -> None:
    file = opened(None)
    assert file.catalog is EMPTY
    assert not file.poll(at_once=True)


def test_a_change_takes_effect_at_the_next_look(path: Path) -> None:
    file = opened(path)
    assert not file.poll()
    path.write_text(NEWER)
    assert file.poll()
    assert file.catalog.names == ("a", "b")
    assert not file.poll()


@pytest.mark.parametrize(
    "how", ["faulty", "gone", "a directory", "not text", "no keys"]
)
def test_what_is_not_right_changes_nothing_and_is_told_once(
    path: Path, how: str
) -> None:
    file = opened(path, signing=False)
    match how:
        case "faulty":
            path.write_text(FAULTY)
        case "gone":
            path.unlink()
        case "a directory":
            path.unlink()
            path.mkdir()
        case "not text":
            path.write_bytes(b"\xff\xff")
        case "no keys":
            path.write_text('[events.a]\ntoken = "required"\n')
    with structlog.testing.capture_logs() as logs:
        assert not file.poll()
        assert not file.poll()
    assert [line["event"] for line in logs] == ["catalog.refused"]
    assert file.catalog.names == ("a",)
    assert file.refused == logs[0]["faults"][0]
    if path.is_dir():
        path.rmdir()
    path.write_text(NEWER)
    assert file.poll()
    assert list(file.catalog.names) == ["a", "b"]
    assert file.refused == ""


def test_the_good_version_put_back_ends_the_fault(path: Path) -> None:
    file = opened(path)
    path.write_text(FAULTY)
    file.poll()
    assert file.refused
    path.write_text(GOOD)
    assert not file.poll()  # it was in force all the time
    assert file.refused == ""


def test_at_once_looks_behind_the_time_stamp(path: Path) -> None:
    file = opened(path)
    before = path.stat()
    with path.open("r+") as same:  # same inode, size and time
        same.write("[events.x]\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not file.poll()
    assert file.poll(at_once=True)
    assert file.catalog.names == ("x",)


def test_a_process_that_starts_late_begins_with_the_last_good_one(path: Path) -> None:
    path.write_text(FAULTY)
    with pytest.raises(CatalogError, match="line 2"):
        opened(path)
    late = opened(path, text=GOOD)
    assert late.catalog.names == ("a",)
    late.poll()
    assert (late.catalog.names, bool(late.refused)) == (("a",), True)
