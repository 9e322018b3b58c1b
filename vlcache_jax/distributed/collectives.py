"""What a device asks of the others, inside a program that runs on a mesh.

Outside of one, on a single device, each of these gives its argument back: models and methods are
written once, and their programs for one device know nothing of a mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

DATA = ("data",)
"""Axis of the mesh over which the sequences of a batch are split."""

HEADS = ("heads",)
"""Axis over which kv heads are split."""

GROUP = ("group",)
"""Axis over which the query heads of each kv head are split, whose keys and values all devices of
the axis then hold."""

MODEL = HEADS + GROUP
"""The axes among whose devices each layer is split; MLP width and vocabulary by both at once."""

Axes = tuple[str, ...]


def _split(axes: Axes) -> Axes:
    """Those of the axes that the program being traced is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def shards(axes: Axes = MODEL) -> int:
    """How many parts these axes make."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1
    for axis in _split(axes):
        count *= mesh.shape[axis]
    return count


def own(count: int, axes: Axes = MODEL) -> int:
    """How many of `count` heads, which the axes divide, a device has."""
    return count // shards(axes)


def number(axes: Axes = MODEL) -> jax.Array | int:
    """The number of this device's part, from 0 on."""
    split = _split(axes)
    return lax.axis_index(split) if split else 0


def total(x: jax.Array, axes: Axes = MODEL) -> jax.Array:
    """The sum over the devices: one all-reduce."""
    split = _split(axes)
    return lax.psum(x, split) if split else x


def mean(x: jax.Array, axes: Axes = MODEL) -> jax.Array:
    """The mean over the devices, whose parts are as large."""
    split = _split(axes)
    return lax.pmean(x, split) if split else x


def most(x: jax.Array, axes: Axes = MODEL) -> jax.Array:
    """The maximum over the devices."""
    split = _split(axes)
    return lax.pmax(x, split) if split else x


def gathered(x: jax.Array, axis: int, axes: Axes = MODEL) -> jax.Array:
    """The parts of all devices behind each other along an axis of the array."""
    split = _split(axes)
    return lax.all_gather(x, split, axis=axis, tiled=True) if split else x


def each_row(
    function: Callable[[jax.Array], jax.Array], rows: jax.Array, axes: Axes = DATA + MODEL
) -> jax.Array:
    """A function of rows that do not depend on each other, each device running some of them.

    Args:
        function: [S, ...] -> [S, ...], of any number of rows.
        rows: all of them, which every device has.
        axes: of the devices that share the work.
    """
    devices, count = shards(axes), len(rows)
    if devices == 1:
        return function(rows)
    each = -(-count // devices)
    wide = [(0, devices * each - count)] + [(0, 0)] * (rows.ndim - 1)
    mine = lax.dynamic_slice_in_dim(jnp.pad(rows, wide), number(axes) * each, each)
    return gathered(function(mine), 0, axes)[:count]
