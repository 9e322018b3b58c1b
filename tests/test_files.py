"""What is written is there whole or not at all, and nothing else is touched."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlcache_jax import files
from vlcache_jax.files import check_directory, check_file, whole_directory, whole_file

ROOT = Path(__file__).parent.parent


def entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


def write_file(target, content="new", *, force=False):
    with whole_file(target, force=force) as file:
        file.write(content.encode())


def write_directory(target, content="new", *, force=False):
    with whole_directory(target, force=force) as directory:
        (directory / "part").mkdir()
        (directory / "part" / "values").write_text(content)
        (directory / "config.json").touch()


def content_of(target):
    return target.read_bytes() if target.is_file() else (target / "part/values").read_bytes()


writers = pytest.mark.parametrize("write", [write_file, write_directory])


@writers
def test_it_appears_when_it_is_complete_with_the_usual_permissions(write, tmp_path):
    target, plain = tmp_path / "out", tmp_path / "plain"
    write(target)
    assert content_of(target) == b"new"
    plain.touch() if target.is_file() else plain.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert entries(tmp_path) == ["out", "plain"]


@writers
def test_what_is_there_is_replaced_only_with_force(write, tmp_path):
    target = tmp_path / "out"
    write(target)
    with pytest.raises(FileExistsError, match="--force"):
        write(target, "newer")
    assert content_of(target) == b"new"
    write(target, "newer", force=True)
    assert content_of(target) == b"newer"
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("points_to", ["file", "directory", "nothing"])
@writers
def test_nothing_is_written_through_a_symbolic_link(write, points_to, force, tmp_path):
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "out"
    if points_to == "file":
        elsewhere.write_text("precious")
    elif points_to == "directory":
        elsewhere.mkdir()
        (elsewhere / "config.json").write_text("precious")
    target.symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match="symbolic link"):
        write(target, force=force)
    assert target.is_symlink()
    assert entries(tmp_path) == (["out"] if points_to == "nothing" else ["elsewhere", "out"])
    if points_to == "file":
        assert elsewhere.read_text() == "precious"
    elif points_to == "directory":
        assert (elsewhere / "config.json").read_text() == "precious"


@pytest.mark.parametrize("name", [".out.partial", ".out.old", ".out.0123abcd.partial"])
@writers
def test_links_and_directories_beside_it_that_look_like_leftovers_stay(write, name, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    (tmp_path / name).symlink_to(elsewhere)
    write(tmp_path / "out")
    assert entries(tmp_path) == sorted([name, "elsewhere", "out"])
    assert entries(elsewhere) == ["file"]


def test_a_refused_run_removes_nothing(tmp_path):
    target = tmp_path / "out"
    write_directory(target)
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.0123abcd.partial").mkdir()
    before = entries(tmp_path)
    with pytest.raises(FileExistsError):
        write_directory(target)
    assert entries(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("broken"), RuntimeError("bug")])
@pytest.mark.parametrize("there", [False, True])
@writers
def test_a_failure_leaves_what_was_there(write, there, error, tmp_path, monkeypatch):
    target = tmp_path / "out"
    if there:
        write(target)

    def fail(*args):
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(type(error)):
        write(target, "newer", force=True)
    assert entries(tmp_path) == (["out"] if there else [])
    assert not there or content_of(target) == b"new"


@writers
def test_what_comes_meanwhile_is_not_overwritten(write, tmp_path, monkeypatch):
    target, sync = tmp_path / "out", os.fsync

    def meanwhile(handle):
        if not target.exists():
            target.mkdir() if write is write_directory else target.write_text("theirs")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", meanwhile)
    with pytest.raises(FileExistsError):
        write(target)
    assert entries(tmp_path) == ["out"]
    assert target.is_dir() or target.read_text() == "theirs"


@writers
def test_it_is_on_the_disk_before_it_is_renamed(write, tmp_path, monkeypatch):
    seen, sync = [], os.fsync

    def note(handle):
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), target.exists()))
        sync(handle)

    target = tmp_path / "out"
    monkeypatch.setattr(files.os, "fsync", note)
    write(target)
    *before, last = seen
    assert last == (tmp_path.name, True)
    assert not any(exists for _, exists in before)
    if write is write_directory:
        assert {"values", "part", "config.json"} < {name for name, _ in before}
    else:
        assert len(before) == 1


def test_where_nothing_can_be_exchanged_two_renames_do(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write_directory(target)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: None)
    write_directory(target, "newer", force=True)
    assert content_of(target) == b"newer"
    assert entries(tmp_path) == ["out"]
    rename = Path.rename

    def fail(self, to):
        if self.name.endswith(".partial") and to == target and not target.exists():
            monkeypatch.setattr(Path, "rename", rename)
            raise OSError("broken")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        write_directory(target, "newest", force=True)
    assert content_of(target) == b"newer"
    assert entries(tmp_path) == ["out"]


def test_two_runs_do_not_fill_one_directory(tmp_path):
    with whole_directory(tmp_path / "out", force=False) as directory:
        (directory / "config.json").touch()
        with pytest.raises(ValueError, match="another process is writing"):
            write_directory(tmp_path / "out")
    assert entries(tmp_path) == ["out"]
    assert entries(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_run_leaves_what_was_there_and_the_next_succeeds(kind, tmp_path):
    target = tmp_path / "out"
    write = write_file if kind == "file" else write_directory
    write(target)
    code = f"""
        import os, signal
        from pathlib import Path
        from vlcache_jax.files import whole_directory, whole_file
        target = Path({str(target)!r})
        if {kind!r} == "file":
            with whole_file(target, force=True) as file:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        with whole_directory(target, force=True) as directory:
            (directory / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    child = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(child, cwd=ROOT).returncode == -signal.SIGKILL
    assert content_of(target) == b"new"
    write(target, "newer", force=True)
    assert content_of(target) == b"newer"
    assert kind == "file" or entries(tmp_path) == ["out"]


def test_only_a_directory_of_the_same_kind_is_replaced(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_bytes(b"cat")
    (tmp_path / "note").write_text("note")
    for target in (photos, tmp_path / "note"):
        with pytest.raises(FileExistsError, match="is not a model directory"):
            write_directory(target, force=True)
        with pytest.raises(FileExistsError, match="is not a model directory"):
            check_directory(target, force=True)
    assert entries(tmp_path) == ["note", "photos"]
    assert entries(photos) == ["cat.png"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("x.txt", ValueError, r"calibration file .*x\.txt must end in \.json"),
        ("none/x.json", FileNotFoundError, "no directory .*none for the calibration file"),
        ("folder.json", ValueError, "is a directory"),
        ("pipe.json", ValueError, "is no file"),
        ("there.json", None, ""),
        ("new.json", None, ""),
    ],
)
def test_a_file_is_checked_before_any_work(name, error, message, tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "there.json").touch()
    os.mkfifo(tmp_path / "pipe.json")
    if error is None:
        assert check_file(tmp_path / name, "calibration file", force=True) == tmp_path / name
        return
    with pytest.raises(error, match=message):
        check_file(tmp_path / name, "calibration file", force=True)


def test_a_directory_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match="no permission to write in"):
        check_file(tmp_path / "x.json", "calibration file", force=False)
    with pytest.raises(PermissionError, match="no permission to write in"):
        write_directory(tmp_path / "out")


@writers
def test_names_may_be_as_long_as_the_system_allows_and_of_any_script(write, tmp_path):
    for name in ("n" * 255, "ü" * 127, "[a]*?"):
        write(tmp_path / name)
        write(tmp_path / name, force=True)
        assert content_of(tmp_path / name) == b"new"
    assert len(entries(tmp_path)) == 3
