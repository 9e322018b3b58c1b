"""The transform of the values, folded into the weights (AKVQ-VL, section 3.2).

A layer mixes values linearly, so that the Walsh-Hadamard transform can be made part of the weights
that make them, and its inverse of those that take what was mixed: the values of the cache come out
transformed, and nothing else changes. Queries and keys cannot have it so: RoPE stands in between.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hadamard import factor, signs
from vlcache_jax.models.families import Params


def fold_transform(params: Params) -> Params:
    """The same model with transformed values in its cache; all else are the arrays given.

    Args:
        params: the parameters, as `vlcache_jax.models.families.init_params` makes them.
    """
    layers = {}
    for index, layer in params["layers"].items():
        qkv, out = fold_layer(layer["qkv"], layer["out"])
        layers[index] = {**layer, "qkv": qkv, "out": out}
    return {**params, "layers": layers}


@jax.jit
def fold_layer(qkv: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's projections with the transform folded in.

    Each kv head's columns of the value weights are multiplied by the transform, and the rows of the
    output weights of the G query heads that read it by the transposed one: in float32, then rounded
    to the type of the weights.

    Args:
        qkv: the kernel of queries, keys and values, [D, K, G + 2, H].
        out: the kernel of the attention's output, [K, G, H, D].
    """
    size = qkv.shape[-1]
    turn = signs(size).astype(np.float32) * np.float32(factor(size))
    exact = jax.lax.Precision.HIGHEST
    v = jnp.einsum("dkh,hj->dkj", qkv[:, :, -1].astype(jnp.float32), turn, precision=exact)
    back = jnp.einsum("kghd,hj->kgjd", out.astype(jnp.float32), turn, precision=exact)
    return qkv.at[:, :, -1].set(v.astype(qkv.dtype)), back.astype(out.dtype)
