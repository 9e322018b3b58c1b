"""Files that are written for the user: each is there whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and rename it, so that it is there whole or not at all.

    Args:
        target: its place; what is there is replaced.
        write: called with the open file, to write all of it.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
