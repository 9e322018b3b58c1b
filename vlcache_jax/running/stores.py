"""Where the keys and values of a prefix lie between questions.

    device   as they are; a question reads them in place
    host     in the host's memory, brought back for each question
    8, 4     on the device, packed to so many bits a value (RTN), unpacked for each question

While a question runs, all but the first hold a copy of full width on the device, until the pool is
made; then it is freed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cache.packed import pack_rows, unpack_rows
from vlcache_jax.cache.quantizers import RTN
from vlcache_jax.running.state import Buffers

STORES = ("device", "host", "8", "4")
"""The names."""


def check_store(store: Any) -> str:
    """The name of a store.

    Raises:
        ValueError: there is none of that name.
    """
    if (name := str(store)) not in STORES:
        raise ValueError(
            f"there is no store {str(store)[:40]!r}: choose one of {', '.join(STORES)}"
        )
    return name


def tree_bytes(tree: Any) -> int:
    """What arrays take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def put(store: str, buffers: Buffers) -> Any:
    """What is kept of buffers; with "device" themselves."""
    if store == "device":
        return buffers
    if store == "host":
        return jax.device_get(buffers)
    return jax.tree.map(partial(_PACK, quantizer=RTN(bits=int(store))), tuple(buffers))


def get(store: str, kept: Any, dtype: jnp.dtype) -> Buffers:
    """Buffers of full width again."""
    if store == "device":
        return kept
    if store == "host":
        return Buffers(*kept)  # the program that takes them puts each part where it is wanted
    return Buffers(*(_UNPACK(*part, bits=int(store), dtype=dtype) for part in kept))


_PACK = jax.jit(pack_rows, static_argnames="quantizer")
_UNPACK = jax.jit(unpack_rows, static_argnames=("bits", "dtype"))
