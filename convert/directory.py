"""A directory that appears whole or not at all."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlcache_jax.checkpoint import MANIFEST


@contextmanager
def whole_directory(target: Path, force: bool) -> Iterator[Path]:
    """Give a hidden directory beside `target` that takes its name when the block ends well.

    When the block fails the hidden directory is removed and `target` is as it was. What a killed
    run has left is cleared by the next one.

    Args:
        target: the directory to make, absolute and without symbolic links.
        force: replace `target` if it exists; it stays until the new one is complete.

    Raises:
        FileNotFoundError: there is no directory to make it in.
        FileExistsError: `target` exists and is not to be replaced, or is no model directory.
        ValueError: another process is making the same directory.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no directory {target.parent} to write {target.name} in")
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    with _lock(partial):
        try:
            # Killed between the two renames below: the old directory is the only one.
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            _check_free(target, force)
            _clear(partial)
            yield partial
            if target.exists():
                target.rename(old)
            try:
                partial.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            _remove(partial)
            raise


def check_space(needed: int, directory: Path) -> None:
    """Raise OSError unless the disk of a directory has room for so many bytes."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"not enough room in {directory.parent}: {needed / 1e9:.2f} GB needed, "
            f"{free / 1e9:.2f} GB free"
        )


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Make a directory and hold it: the system lets go of it when this process dies."""
    directory.mkdir(exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(handle), directory.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise ValueError(f"another process is writing {directory}: wait until it has ended")
        yield
    finally:
        os.close(handle)


def _check_free(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise FileExistsError(f"{target} exists: give another place, or --force to replace it")
    known = (MANIFEST, "config.json")
    if not target.is_dir() or not any((target / name).is_file() for name in known):
        raise FileExistsError(
            f"{target} is not a model directory (it has no {' or '.join(known)}), so --force does "
            "not replace it: remove it yourself"
        )


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _remove(directory: Path) -> None:
    """Remove a directory, also while the last threads of a failed save still write into it."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.01)
        if not directory.exists():
            return
