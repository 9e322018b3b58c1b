"""Which axis of which array is split over which axes of a mesh: the one table.

Arrays are known by the names that they have in the trees of arguments and results: `k`, `scores`,
`tokens`. What no row names has its sequences first, [B, ...].
"""

from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec

from vlcache_jax.distributed.collectives import DATA, GROUP, HEADS, MODEL, Axes

RULES: dict[str | None, Axes] = {
    "batch": DATA,
    "kv_heads": HEADS,
    "group": GROUP,
    "heads": MODEL,
    "mlp": MODEL,
    "vocabulary": MODEL,
    None: (),
}
"""Axes of arrays, and the axes of the mesh that split each."""

PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed.embedding": ("vocabulary", None),
    "head.kernel": (None, "vocabulary"),
    "layers.{}.qkv": (None, "kv_heads", "group", None),
    "layers.{}.qkv_bias": ("kv_heads", "group", None),
    "layers.{}.out": ("kv_heads", "group", None, None),
    "layers.{}.gate_up": (None, None, "mlp"),
    "layers.{}.down": ("mlp", None),
}
"""Parameters that are split; every device has all others: norms, tower and projector."""

_CACHE = ("batch", "kv_heads", None, None)
_BY_HEAD = ("batch", None, "kv_heads", None)

ARRAYS: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("k", "v", "words_k", "words_v", "affine_k", "affine_v"), _CACHE),
    **dict.fromkeys(("scores", "maxima", "attention", "kept"), _BY_HEAD),
    **dict.fromkeys(("hit_rate", "mass_recall"), _BY_HEAD[:3]),
    **dict.fromkeys(("zeroed", "visible"), ("batch", None, "heads")),
    "positions": (None, "batch", None),
    **dict.fromkeys(("tiles", "layout", "tables"), ()),
}
"""Arrays of requests, caches and what is remembered of prompts."""


def axes_of(path: Sequence[Any], ndim: int) -> tuple[str | None, ...]:
    """The names of an array's axes.

    Args:
        path: to it, keys of a tree of arguments by their names.
        ndim: how many axes it has.
    """
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    if names[0] == "params":
        found = PARAMETERS.get(parameter_row(".".join(names[1:])), ())
    else:
        known = (ARRAYS[name] for name in reversed(names) if name in ARRAYS)
        found = next(known, ("batch",) if ndim else ())
    return (*found, *[None] * (ndim - len(found)))


def parameter_row(name: str) -> str:
    """A parameter's row of `PARAMETERS`, by its dotted name: `layers.3.qkv` → `layers.{}.qkv`."""
    first, *rest = name.split(".")
    return ".".join((first, "{}", *rest[1:])) if first == "layers" else name


def partition(axes: Sequence[str | None], *, split_batch: bool = True) -> PartitionSpec:
    """How an array with these axes is split.

    Args:
        axes: their names.
        split_batch: whether the sequences are; else all devices run all of them.
    """
    names = [axis if split_batch or axis != "batch" else None for axis in axes]
    return PartitionSpec(*(RULES[name] or None for name in names))
