"""Which version of the catalogue's file is in force, whatever becomes of the file."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
from structlog.typing import EventDict

from relay.catalog import EMPTY, CatalogError
from relay.reload import CANNOT_VERIFY, SETTLED_S, CatalogFile

GOOD = "[events.a]\n"
NEWER = "[events.a]\n[events.b]\n"
FAULTY = '[events.a]\npriority = "top"\n'
FAULTY_TOO = '[events.a]\npriority = "up"\n'
NEEDS_KEYS = '[events.a]\ntoken = "required"\n'
# Allowed, but any visitor can mint points with it.
DOUBTFUL = "[events.a]\nloyalty = true\n"
NOBODY = 65534


def later() -> float:
    """The time by which whatever was written just now has settled."""
    return time.time() + 2 * SETTLED_S


def changed(path: Path) -> float:
    """When the file changed, as exactly as the code has it: `st_ctime` is rounded."""
    return path.stat().st_ctime_ns / 1e9


def opened(
    path: Path | None,
    *,
    signing: bool = True,
    text: str | None = None,
    clock: Callable[[], float] = later,
) -> CatalogFile:
    return CatalogFile(path, max_ttl_s=3600, signing=signing, text=text, clock=clock)


@pytest.mark.parametrize("server_api", [True, False])
def test_a_start_says_where_nothing_can_be_looked_up(
    tmp_path: Path, server_api: bool
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text('[events.a]\ndelivery = "verify"\nevent_id = "n"\n')
    with logged() as lines:
        CatalogFile(path, max_ttl_s=3600, signing=False, server_api=server_api)
    told = [line["detail"] for line in lines if line["event"] == "catalog.doubtful"]
    assert told == ([] if server_api else [CANNOT_VERIFY])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "catalog.toml"
    made.write_text(GOOD)
    return made


@contextmanager
def logged() -> Iterator[list[EventDict]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


def events(lines: list[EventDict]) -> list[str]:
    return [str(line["event"]) for line in lines]


# In force


def test_no_file_is_no_rule() -> None:
    file = opened(None)
    assert file.catalog is EMPTY
    assert not file.poll()
    assert not file.poll(at_once=True)
    assert file.refused == ""


def test_a_change_takes_effect_at_the_next_look(path: Path) -> None:
    file = opened(path)
    with logged() as lines:
        assert not file.poll()
        path.write_text(NEWER)
        assert file.poll()
        assert file.catalog.names == ("a", "b")
        assert not file.poll()
    assert lines == [{"event": "catalog.loaded", "events": 2, "log_level": "info"}]


def test_a_file_that_is_renamed_into_place_takes_effect(path: Path) -> None:
    file = opened(path)
    new = path.with_suffix(".new")
    new.write_text("[events.x]\n")  # as long as the old one, and as old
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.rename(path)
    assert file.poll()
    assert file.catalog.names == ("x",)


def test_a_link_that_is_turned_takes_effect(tmp_path: Path) -> None:
    """Kubernetes changes a mounted ConfigMap so: the link, not the file."""
    for version, text in (("1", GOOD), ("2", NEWER)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "catalog.toml").write_text(text)
    link = tmp_path / "data"
    link.symlink_to("1")
    file = opened(link / "catalog.toml")
    turned = tmp_path / "turned"
    turned.symlink_to("2")
    turned.rename(link)
    assert file.poll()
    assert file.catalog.names == ("a", "b")


def test_the_same_content_touched_is_no_change(path: Path) -> None:
    file = opened(path)
    before = file.catalog
    for touched in (1, 2):
        os.utime(path, ns=(touched, touched))
        with logged() as lines:
            assert not file.poll()
        assert lines == []
    path.unlink()
    path.write_text(GOOD)
    assert not file.poll()
    assert file.catalog.names == before.names


def test_what_is_allowed_but_doubtful_is_in_force_and_said(path: Path) -> None:
    file = opened(path)
    path.write_text(DOUBTFUL)
    with logged() as lines:
        assert file.poll()
        assert not file.poll()
    assert events(lines) == ["catalog.doubtful", "catalog.loaded"]
    assert file.refused == ""
    with logged() as lines:
        opened(path)
    assert events(lines) == ["catalog.doubtful"]


def test_a_byte_order_mark_of_an_editor_is_no_fault(path: Path) -> None:
    file = opened(path)
    path.write_text(NEWER, encoding="utf-8-sig")
    assert file.poll()
    assert file.catalog.names == ("a", "b")


def test_at_once_looks_behind_the_time_stamp(path: Path) -> None:
    file = opened(path)
    overwrite_unseen(path, "[events.x]\n")
    assert file.poll(at_once=True)
    assert file.catalog.names == ("x",)
    assert not file.poll(at_once=True)  # read again, and the same


def overwrite_unseen(path: Path, text: str) -> None:
    """Change a file without a trace in its inode, size and time of change."""
    before = path.stat()
    assert before.st_size == len(text)
    with path.open("r+") as same:
        same.write(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Faults


def faulty(path: Path) -> None:
    path.write_text(FAULTY)


def no_toml(path: Path) -> None:
    path.write_text("[events.a")


def gone(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xff")


def emptied(path: Path) -> None:
    path.write_text("\n")


def cut_off(path: Path) -> None:
    path.write_text("# The rules of the shop.\n")


def without_keys(path: Path) -> None:
    path.write_text(NEEDS_KEYS)


def too_long(path: Path) -> None:
    path.write_text('[events.a]\nttl = "2h"\n')


FAULTS: dict[Callable[[Path], None], str] = {
    faulty: "line 2: events.a.priority",
    no_toml: "not TOML",
    gone: "cannot be read (No such file or directory): correct the path",
    directory: "cannot be read (Is a directory): correct the path",
    dangling: "cannot be read (No such file or directory): correct the path",
    no_text: "cannot be read (not UTF-8): correct the path",
    emptied: "line 1: the file is empty: for no rules write [defaults]",
    cut_off: "line 1: the file is empty: for no rules write [defaults]",
    without_keys: "RELAY_SIGNING_KEYS is missing",
    too_long: "must be from 1s to 1h",
}
ANY_FAULT = pytest.mark.parametrize("breaks", FAULTS, ids=lambda fault: fault.__name__)


@ANY_FAULT
def test_what_is_not_right_changes_nothing_and_is_told_once(
    path: Path, breaks: Callable[[Path], None]
) -> None:
    file = opened(path, signing=False)
    before = file.catalog
    breaks(path)
    with logged() as lines:
        assert not file.poll()
        assert not file.poll()
    assert events(lines) == ["catalog.refused"]
    assert lines[0]["log_level"] == "error"
    assert lines[0]["file"] == str(path)
    assert FAULTS[breaks] in file.refused
    assert file.refused == lines[0]["faults"][0]
    assert file.catalog is before
    assert file.text == GOOD


@ANY_FAULT
def test_what_is_repaired_is_in_force(
    path: Path, breaks: Callable[[Path], None]
) -> None:
    file = opened(path, signing=False)
    breaks(path)
    file.poll()
    repair(path, NEWER)
    assert file.poll()
    assert file.catalog.names == ("a", "b")
    assert file.refused == ""


@ANY_FAULT
def test_the_good_version_put_back_ends_the_fault_and_is_no_change(
    path: Path, breaks: Callable[[Path], None]
) -> None:
    file = opened(path, signing=False)
    breaks(path)
    file.poll()
    repair(path, GOOD)
    assert not file.poll()  # it was in force all the time
    assert file.refused == ""


@ANY_FAULT
def test_a_start_with_it_is_refused(path: Path, breaks: Callable[[Path], None]) -> None:
    breaks(path)
    with pytest.raises(CatalogError) as caught:
        opened(path, signing=False)
    assert FAULTS[breaks] in caught.value.faults[0]


def repair(path: Path, text: str) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_text(text)


def test_one_fault_after_the_other_is_told_each_time(path: Path) -> None:
    file = opened(path)
    with logged() as lines:
        for text in (FAULTY, FAULTY_TOO, FAULTY):
            path.write_text(text)
            file.poll()
            file.poll()
            assert ('"top"' in file.refused) is (text == FAULTY)
        path.unlink()
        file.poll()
        assert "No such file" in file.refused
    assert events(lines) == ["catalog.refused"] * 4


def test_every_fault_of_a_version_is_told(path: Path) -> None:
    file = opened(path)
    path.write_text('[events.a]\npriority = "top"\ntoken = 1\n')
    with logged() as lines:
        file.poll()
    assert [said[:6] for said in lines[0]["faults"]] == ["line 2", "line 3"]


def test_a_fault_asked_for_at_once_is_told_again(path: Path) -> None:
    """Who sends SIGHUP wants to know what became of it."""
    file = opened(path)
    path.write_text(FAULTY)
    with logged() as lines:
        file.poll()
        file.poll(at_once=True)
    assert events(lines) == ["catalog.refused"] * 2
    assert file.catalog.names == ("a",)


def test_rules_for_tokens_are_in_force_where_there_are_keys(path: Path) -> None:
    path.write_text(NEEDS_KEYS)
    assert opened(path).catalog.needs_keys
    with pytest.raises(CatalogError, match="RELAY_SIGNING_KEYS is missing: set it"):
        opened(path, signing=False)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, and so meets no file that it may not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user may look into, unlike pytest's own."""
    place = Path(tempfile.mkdtemp(prefix="relay-test-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def test_a_file_that_may_not_be_read_changes_nothing_until_it_may(
    open_place: Path,
) -> None:
    path = open_place / "catalog.toml"
    path.write_text(GOOD)
    file = opened(path)
    new = path.with_suffix(".new")
    new.write_text(NEWER)
    new.chmod(0)
    new.rename(path)
    with unprivileged(), logged() as lines:
        assert not file.poll()
        assert not file.poll()
    assert events(lines) == ["catalog.refused"]
    assert "Permission denied" in file.refused
    assert file.catalog.names == ("a",)
    path.chmod(0o644)  # "correct the path or the file"
    with unprivileged():
        assert file.poll()
    assert (len(file.catalog.names), file.refused) == (2, "")


def test_a_file_that_is_being_written_is_left_alone_until_it_is_settled(
    path: Path,
) -> None:
    """`generate > catalog.toml`: the first tables of a file are a catalogue, too."""
    now = changed(path) + 1
    file = opened(path, clock=lambda: now)
    path.write_text(NEWER)
    written = changed(path)
    with logged() as lines:
        for now in (written, written + SETTLED_S / 2):  # noqa: B007 - the clock's
            assert not file.poll()
    assert (file.catalog.names, file.refused, lines) == (("a",), "", [])
    now = written + 1.01 * SETTLED_S
    assert file.poll()
    assert file.catalog.names == ("a", "b")


def test_who_asks_at_once_does_not_wait_until_it_is_settled(path: Path) -> None:
    file = opened(path, clock=lambda: changed(path))
    path.write_text(NEWER)
    assert not file.poll()
    assert file.poll(at_once=True)


def test_a_time_to_come_holds_nothing_up(path: Path) -> None:
    """The file server's clock is ahead, or ours was set back."""
    file = opened(path, clock=lambda: changed(path) - 3600)
    path.write_text(NEWER)
    assert file.poll()


# A process that starts late


@ANY_FAULT
def test_a_process_that_starts_late_begins_with_the_last_good_one_and_says_so(
    path: Path, breaks: Callable[[Path], None]
) -> None:
    breaks(path)
    late = opened(path, signing=False, text=NEWER)
    assert late.catalog.names == ("a", "b")
    with logged() as lines:
        assert not late.poll()
        assert not late.poll()
    assert late.catalog.names == ("a", "b")
    assert FAULTS[breaks] in late.refused
    assert events(lines) == ["catalog.refused"]


def test_a_process_that_starts_late_takes_a_newer_one_at_its_first_look(
    path: Path,
) -> None:
    path.write_text(NEWER)
    late = opened(path, text=GOOD)
    assert late.poll()
    assert late.catalog.names == ("a", "b")
    assert not opened(path, text=NEWER).poll()


def test_a_version_that_never_was_good_is_refused_to_a_late_process_too(
    path: Path,
) -> None:
    with pytest.raises(CatalogError, match="line 2"):
        opened(path, text=FAULTY)


def test_a_text_for_no_file_is_no_rule() -> None:
    assert opened(None, text=GOOD).catalog is EMPTY


def test_a_file_that_was_cut_off_is_refused_until_somebody_asks(path: Path) -> None:
    whole = '[events.a]\ntoken = "required"\n[events.b]\ntoken = "required"\n'
    path.write_text(whole)
    file = opened(path)
    # At the end of a line, where what is left is a catalogue and lifts a rule.
    for cut in (whole[:-20], whole.partition("[events.b]")[0]):
        path.write_text(cut)
        assert file.poll() is False
        assert "SIGHUP" in file.refused or "not TOML" in file.refused
        assert file.text == whole
    path.write_text(whole)
    file.poll()
    assert file.refused == ""
    path.write_text(whole.partition("[events.b]")[0])
    assert file.poll(at_once=True) is True
    assert file.catalog.names == ("a",)
