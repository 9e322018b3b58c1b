"""The transform of the values, folded into the weights (AKVQ-VL, section 3.2).

A layer mixes values linearly, so that the Walsh-Hadamard transform can be made part of the weights
that make them, and its inverse of those that take what was mixed: the values of the cache come out
transformed, and nothing else changes. Queries and keys cannot have it so: RoPE stands in between.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hadamard import factor, signs
from vlcache_jax.distributed.mesh import DeviceMesh
from vlcache_jax.models.families import Params

FOLDED = ("qkv", "qkv_bias", "out")
"""The parameters of a layer that change."""


def fold_transform(params: Params, mesh: DeviceMesh | None = None) -> Params:
    """The same model with transformed values in its cache; all else are the arrays given.

    Args:
        params: the parameters, as `vlcache_jax.models.families.init_params` makes them.
        mesh: the devices that hold them; None for one.
    """
    layers = {}
    for index, layer in params["layers"].items():
        own = {name: layer[name] for name in FOLDED if name in layer}
        layers[index] = {**layer, **fold_layer(own, mesh)}
    return {**params, "layers": layers}


def fold_layer(
    weights: dict[str, jax.Array], mesh: DeviceMesh | None = None
) -> dict[str, jax.Array]:
    """One layer's projections with the transform folded in.

    Each kv head's columns of the value weights are multiplied by the transform, and the rows of the
    output weights of the G query heads that read it by the transposed one: in float32, then rounded
    to the type of the weights.

    Args:
        weights: those of `FOLDED` that the layer has: the kernel and bias of queries, keys and
            values, [D, K, G + 2, H] and [K, G + 2, H], and that of the attention's output,
            [K, G, H, D].
        mesh: the devices that hold them; None for one.
    """
    if mesh is None:
        return _folded(weights)
    return mesh.run(fold_layers, {"layers": {0: weights}})["layers"][0]


def fold_layers(params: Params) -> Params:
    """`fold_layer` of a tree of parameters that has nothing else."""
    return {"layers": {index: _folded(own) for index, own in params["layers"].items()}}


@jax.jit
def _folded(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    size = weights["qkv"].shape[-1]
    turn = signs(size).astype(np.float32) * np.float32(factor(size))

    def turned(equation: str, x: jax.Array) -> jax.Array:
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum(equation, x.astype(jnp.float32), turn, precision=exact).astype(x.dtype)

    made = {"out": turned("kghd,hj->kgjd", weights["out"])}
    for name in ("qkv", "qkv_bias"):
        if name in weights:
            values = turned("...h,hj->...j", weights[name][..., -1, :])
            made[name] = weights[name].at[..., -1, :].set(values)
    return made
