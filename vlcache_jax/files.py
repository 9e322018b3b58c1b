"""Files and directories that appear whole or not at all.

Each is written under a fresh hidden name beside its place, brought to the disk and renamed: whoever
looks, also after a crash, finds what was there before or what is new. What stands in its place is
overwritten if `force` says so, and never through a symbolic link.
"""

import ctypes
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux' renameat2
_HERE = -100  # AT_FDCWD: paths are relative to the working directory

KINDS = {
    "trace file": {".npz": ""},
    "calibration file": {".json": ""},
    "report": {".html": " (the page)", ".json": " (the numbers)"},
    "figure": {".png": ""},
    "result file": {".json": ""},
    "session": {".safetensors": ""},
    "plot": {".svg": ""},
}
"""Endings of the names of what is written for the user, and what each means."""


def cache_folder() -> Path:
    """What this library keeps for the user from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlcache-jax"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: str | Path, what: str, *, force: bool, folders: bool = False) -> Path:
    """The file that something may be written to; to be asked before any work is done.

    Args:
        path: the file.
        what: what is to be written, one of `KINDS`.
        force: whether a file that is there may be overwritten.
        folders: whether folders that are missing will be made.

    Raises:
        FileExistsError: the file exists and `force` is not set, or it is a symbolic link.
        FileNotFoundError: its directory does not exist.
        PermissionError: nothing may be written there.
        ValueError: its name does not end so, or it is no file.
    """
    target, endings = Path(path), KINDS[what]
    if target.suffix not in endings:
        known = " or ".join(f"{ending}{meaning}" for ending, meaning in endings.items())
        raise ValueError(f"{what} {target} must end in {known}")
    _check_place(target, what, force, folders)
    if os.path.lexists(target) and not target.is_file():
        kind = "a directory" if target.is_dir() else "no file"
        raise ValueError(f"{what} {target} is {kind}: choose another name")
    return target


@contextmanager
def whole_file(target: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file to write, which takes its place when the block ends well; else nothing has changed.

    Args:
        target: its place, as `check_file` has found it good.
        force: whether a file that is there is overwritten.

    Raises:
        OSError: it cannot be written, or what `check_file` asks for does not hold any longer.
    """
    partial = _beside(target)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_place(target, "file", force)  # it may have come meanwhile
        partial.replace(target)
    except OSError as error:  # of a full disk: without a name
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        partial.unlink(missing_ok=True)
    _sync(target.parent)


MARKS = ("MANIFEST.json", "config.json")
"""Files of which a model directory has one: no other directory is ever replaced."""


def check_directory(target: Path, *, force: bool) -> None:
    """Raise unless a model directory may be made or replaced; to be asked before any work is done.

    Args:
        target: the directory.
        force: whether it may be replaced.

    Raises:
        FileExistsError: it exists and `force` is not set, or it is no such directory, or a link.
        FileNotFoundError: there is no directory to make it in.
        PermissionError: nothing may be written there.
    """
    _check_place(target, "model directory", force)
    if os.path.lexists(target) and not any((target / mark).is_file() for mark in MARKS):
        raise FileExistsError(
            f"{target} is not a model directory (it has no {' or '.join(MARKS)}), so --force does "
            "not replace it: remove it yourself"
        )


@contextmanager
def whole_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """A model directory to fill: it takes its place when the block ends well, else all stays.

    What killed runs have left of the same directory is removed.

    Args:
        target: its place, absolute.
        force: whether a directory that is there is replaced; it stays until the new one is whole.

    Raises:
        OSError: as `check_directory`, or it cannot be written.
        ValueError: another process is writing the same directory.
    """
    check_directory(target, force=force)
    partial = _beside(target)
    partial.mkdir()
    try:
        with _held(partial):
            for left in _partials(target):
                if left != partial:
                    with _held(left):
                        shutil.rmtree(left)
            yield partial
            for folder, _, names in os.walk(partial, topdown=False):
                for path in (*(Path(folder, name) for name in names), Path(folder)):
                    _sync(path)
            check_directory(target, force=force)  # it may have come meanwhile
            _move(partial, target)
            _sync(target.parent)
    finally:
        _remove(partial)  # what was in the place before, or what was not finished


def _check_place(target: Path, what: str, force: bool, folders: bool = False) -> None:
    folder = target.absolute().parent
    while folders and not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no directory {target.parent} for the {what}: make it first")
    if target.is_symlink():
        raise FileExistsError(f"{target} is a symbolic link: name the {what} itself")
    if os.path.lexists(target) and not force:
        raise FileExistsError(f"{target} exists: choose another name, or --force to replace it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {folder}: choose another place")


def _beside(target: Path) -> Path:
    """A fresh name."""
    return target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.partial")


def _partials(target: Path) -> list[Path]:
    """Directories that runs have begun to fill for a target."""
    name = re.compile(rf"\.{re.escape(target.name[:50])}\.[0-9a-f]{{8}}\.partial")
    found = (path for path in target.parent.iterdir() if name.fullmatch(path.name))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a directory: the system lets go of it when this process dies."""
    import fcntl  # here: not every system has it, and only conversion needs it

    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing {directory}: wait until it has ended"
            ) from None
        yield
    finally:
        os.close(handle)


def _move(partial: Path, target: Path) -> None:
    """Give a directory its place; under its own name stands then what was in the place before."""
    if not os.path.lexists(target):
        partial.rename(target)
        return
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (_HERE, os.fsencode(partial), _HERE, os.fsencode(target))
    if rename is not None and rename(*paths, _EXCHANGE) == 0:
        return
    # The system or the file system cannot exchange them at once.
    old = _beside(target)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    old.rename(partial)


def _sync(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # which not every system can
            raise
    finally:
        os.close(handle)


def _remove(directory: Path) -> None:
    """Remove a directory, also while the last threads of a failed save still write into it."""
    until = time.monotonic() + 5
    while directory.exists() and time.monotonic() < until:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.01)
