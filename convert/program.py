"""The conversion itself: where a model is, and what it becomes."""

from pathlib import Path

from vlcache_jax.checkpoints.checkpoint import Progress, open_checkpoint
from vlcache_jax.checkpoints.find import resolve
from vlcache_jax.checkpoints.writing import write_checkpoint


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    to_hf: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a model directory of either kind, or a GGUF file.

    The target appears when it is complete. Weights keep their bits unless `dtype` changes them.

    Args:
        source: a model directory of either kind, a GGUF file, or a hub id.
        target: the directory to make.
        dtype: float32, bfloat16 or float16; as stored by default.
        force: replace `target` if it exists; it stays until the new one is complete.
        to_hf: write safetensors that transformers loads, instead of Orbax.
        progress: called after each parameter with its piece, the bytes done and the bytes in all.

    Returns:
        The target's absolute path.

    Raises:
        FileNotFoundError: the source, its weights or the place of the target are not there.
        FileExistsError: the target exists and is not to be replaced.
        ConnectionError: the hub cannot be reached.
        ValueError: the source is damaged or does not fit its configuration, or an argument is bad.
        NotImplementedError: the source is another kind of model.
        OSError: the disk is full.
    """
    path = resolve(source).resolve()
    target = Path(target).expanduser()
    if not target.is_symlink():  # which is refused below
        target = target.resolve()
    if path.is_relative_to(target) or target.is_relative_to(path):
        raise ValueError(f"{path} and {target} must not contain each other: give another place")
    checkpoint = open_checkpoint(path)
    write_checkpoint(
        checkpoint, target, dtype, to_hf=to_hf, force=force, source=str(source), progress=progress
    )
    return target
