"""Writing safetensors files tensor by tensor, so that a shard is never held in memory.

The format (https://github.com/huggingface/safetensors): the length of the header, 8 bytes, little
endian; the header, a JSON object of names to types, shapes and byte ranges; the values.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from vlcache_jax.checkpoints.checkpoint import INDEX, WEIGHTS
from vlcache_jax.checkpoints.weights import FLOAT_KINDS, Shape

SHARD_BYTES = 5_000_000_000
"""Largest file, unless one tensor alone is larger; the hub's own files are cut so."""


def write_tensors(
    directory: Path,
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write one safetensors file, or several with their index.

    Args:
        directory: where to.
        shapes: names and shapes of all tensors, in the order in which they come.
        dtype: their number type.
        tensors: names and contiguous values.
        shard_bytes: largest file.

    Raises:
        ValueError: the tensors that come are not those announced.
        OSError: the disk is full.
    """
    shards = _plan(shapes, dtype, shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    stream = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            file.write(_header(shard, dtype))
            for key, shape in shard.items():
                given, array = next(stream, ("nothing", np.empty(0)))
                if (given, array.shape, array.dtype) != (key, shape, dtype):
                    raise ValueError(f"expected {key} {shape} {dtype}, got {given} {array.shape}")
                file.write(array.reshape(-1).view(np.uint8).data)
    if (rest := next(stream, None)) is not None:  # asked for, so that the last one's end is told
        raise ValueError(f"expected no more, got {rest[0]}")
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(_size(shape, dtype) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan(shapes: Mapping[str, Shape], dtype: np.dtype, limit: int) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for key, shape in shapes.items():
        size = _size(shape, dtype)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][key] = shape
        filled += size
    return shards


def _header(shard: Mapping[str, Shape], dtype: np.dtype) -> bytes:
    kind = next(kind for kind, known in FLOAT_KINDS.items() if known == dtype)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    start = 0
    for key, shape in shard.items():
        end = start + _size(shape, dtype)
        entries[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin aligned
    return len(text).to_bytes(8, "little") + text


def _size(shape: Shape, dtype: np.dtype) -> int:
    return dtype.itemsize * int(np.prod(shape))
