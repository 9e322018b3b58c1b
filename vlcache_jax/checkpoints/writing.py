"""Writing a checkpoint, read piece by piece, as a directory of either kind."""

import gc
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from vlcache_jax.checkpoints.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    Pieces,
    Progress,
    config_files,
    piece_directory,
    quiet_orbax,
)
from vlcache_jax.checkpoints.safetensors_writer import write_tensors
from vlcache_jax.checkpoints.weights import piece_of, split, tensors_of
from vlcache_jax.errors import reason
from vlcache_jax.files import whole_directory


def write_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    dtype: str | None = None,
    *,
    to_hf: bool = False,
    force: bool = False,
    source: str = "",
    progress: Progress | None = None,
) -> None:
    """Write a directory, which appears when it is complete; see `program.convert`.

    Args:
        checkpoint: what is written.
        target: the directory to make.
        dtype: float32, bfloat16 or float16; as stored by default.
        to_hf: write safetensors that transformers loads, instead of Orbax.
        force: replace `target` if it exists.
        source: what the user called the checkpoint; for the record.
        progress: called after each parameter with its piece, the bytes done and the bytes in all.

    Raises:
        FileExistsError: the target exists and is not to be replaced.
        ValueError: a file is damaged, or a value does not fit the number type.
        OSError: the disk is full.
    """
    kind = checkpoint.target_dtype(dtype)
    with _quiet_threads(), whole_directory(target, force=force) as directory:
        check_space(checkpoint.num_bytes(kind), directory)
        pieces = checkpoint.read_all(kind, progress)
        if to_hf:
            _write_hf(pieces, checkpoint, kind, directory)
        else:
            _write_orbax(pieces, directory)
        checkpoint.write_files(directory, kind)
        if not to_hf:
            _write_manifest(checkpoint, kind, source, directory / MANIFEST)


def _write_orbax(pieces: Pieces, directory: Path) -> None:
    """One Orbax checkpoint per piece: saving a tree holds it in memory twice."""
    for piece, parameters in pieces:
        arrays = {piece_of(name)[1]: array for name, array in parameters}
        check_space(sum(array.nbytes for array in arrays.values()), directory)
        try:
            with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(piece_directory(directory, piece), arrays)
                checkpointer.wait_until_finished()
        except (ValueError, OSError) as error:
            why = reason(error)
            if "No space left" in why:
                why = "no space left on the disk"
            raise OSError(f"could not write {piece} to {directory.parent}: {why}") from None


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep quiet about the other arrays of a save after one of them has failed.

    Their writes end later, and each says that nobody is left to hear of it.
    """
    before = sys.unraisablehook

    def hook(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            before(event)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        gc.collect()  # what they hold
        sys.unraisablehook = before


def check_space(needed: int, directory: Path) -> None:
    """Raise OSError unless the disk of a directory has room for so many bytes."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"not enough room in {directory.parent}: {needed / 1e9:.2f} GB needed, "
            f"{free / 1e9:.2f} GB free"
        )


def _write_hf(pieces: Pieces, checkpoint: Checkpoint, dtype: np.dtype, directory: Path) -> None:
    shapes = {
        tensor: shape
        for name, whole in checkpoint.shapes.items()
        for tensor, shape in tensors_of(checkpoint.names, name, whole).items()
    }
    tensors = (
        tensor
        for _, parameters in pieces
        for name, array in parameters
        for tensor in split(checkpoint.names, name, array)
    )
    write_tensors(directory, shapes, dtype, tensors)


def _write_manifest(checkpoint: Checkpoint, dtype: np.dtype, source: str, target: Path) -> None:
    weights = checkpoint.path.glob("*.safetensors*")  # with their index
    beside = sorted([*weights, *config_files(checkpoint.path)])
    files = [checkpoint.path] if checkpoint.path.is_file() else beside
    manifest = {
        "format": FORMAT,
        "dtype": dtype.name,
        "parameters": {
            name: {"shape": list(shape), "dtype": dtype.name}
            for name, shape in checkpoint.shapes.items()
        },
        "source": {
            "name": source,
            "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
        },
        "versions": _versions(),
    }
    target.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, Any]:
    names = {"vlcache-jax", "jax", "orbax-checkpoint", "safetensors", "numpy"}
    found = {item.name: item.version for item in metadata.distributions() if item.name in names}
    return {"python": platform.python_version(), **found}
