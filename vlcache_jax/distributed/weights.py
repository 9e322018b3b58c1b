"""Parameters as the devices of a mesh hold them: each its own part, made on the host one by one.

    qkv [D, K, G + 2, H], group=2     device   0                    1
                                      holds    q0 .. , k, v of      .. q3, k, v of the same kv head
    gate_up [D, 2, F], vocabulary     a width that does not divide ends in zeros

As the device sees it, a part is a layer of its own with fewer heads and a narrower MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vlcache_jax.distributed.mesh import DeviceMesh
from vlcache_jax.distributed.rules import PARAMETERS, RULES, parameter_row

QKV = ("layers.{}.qkv", "layers.{}.qkv_bias")
"""Parameters of which every part of a group has keys and values."""

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
"""Gives a part of a parameter, as it is in the checkpoint."""


def place(mesh: DeviceMesh, name: str, shape: tuple[int, ...], read: Read) -> jax.Array:
    """A parameter on the devices.

    Args:
        mesh: the devices.
        name: its dotted name.
        shape: as it is in the checkpoint.
        read: called for each part that devices of this process hold, once.
    """
    row = parameter_row(name)
    axes = PARAMETERS.get(row, ())
    axes = (*axes, *[None] * (len(shape) - len(axes)))
    parts = tuple(mesh.size(RULES[axis]) for axis in axes)
    whole = list(shape)
    for at, (axis, count) in enumerate(zip(axes, parts, strict=True)):
        if axis == "group" and row in QKV:
            whole[at] = count * ((shape[at] - 2) // count + 2)
        else:
            whole[at] = -(-shape[at] // count) * count
    keys = tuple(map(jax.tree_util.DictKey, ("params", *name.split("."))))
    sharding = mesh.sharding(keys, len(shape))
    holders: dict[tuple[int, ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(whole)).items():
        start = tuple(part.indices(size)[0] for part, size in zip(index or (), whole, strict=True))
        holders.setdefault(start, []).append(device)
    shards = []
    for start, devices in holders.items():
        number = [at * n // size for at, n, size in zip(start, parts, whole, strict=True)]
        part = part_of(name, shape, number, parts, read)
        # Waiting keeps the host from holding every part whose transfer is under way.
        shards += [jax.device_put(part, device).block_until_ready() for device in devices]
    return jax.make_array_from_single_device_arrays(tuple(whole), sharding, shards)


def part_of(
    name: str,
    shape: tuple[int, ...],
    number: Sequence[int],
    counts: Sequence[int],
    read: Read,
) -> np.ndarray:
    """What one device holds of a parameter.

    Args:
        name: its dotted name.
        shape: as it is in the checkpoint.
        number: which part it is along each axis.
        counts: how many parts each axis has.
        read: gives what the checkpoint has there.
    """
    row, index, missing, shared = parameter_row(name), [], [], None
    for at, (size, mine, count) in enumerate(zip(shape, number, counts, strict=True)):
        if row in QKV and PARAMETERS[row][at] == "group":
            each, shared = (size - 2) // count, at
        else:
            each = -(-size // count)
        first, last = (min(edge, size) for edge in (mine * each, (mine + 1) * each))
        index.append(slice(first, last))
        missing.append(each - (last - first))
    part = read(tuple(index))
    if shared is not None:
        index[shared] = slice(shape[shared] - 2, shape[shared])
        part = np.concatenate([part, read(tuple(index))], axis=shared)
    return np.pad(part, [(0, count) for count in missing]) if any(missing) else part
