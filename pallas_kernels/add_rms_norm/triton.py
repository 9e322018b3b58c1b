"""One program for each row, which stays in registers between the sum and the norm."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.add_rms_norm.config import Config, candidates
from pallas_kernels.tuning import best


def _kernel(
    x_ref: Any, delta_ref: Any, scale_ref: Any, sum_ref: Any, out_ref: Any, *, eps: float
) -> None:
    """References of one row, [D] each."""
    width = x_ref.shape[0]
    columns = jnp.arange(tiles.padded(width))
    inside = columns < width
    total = tiles.load_vector(x_ref, columns, inside) + tiles.load_vector(
        delta_ref, columns, inside
    )
    tiles.store_vector(sum_ref, columns, inside, total)
    y = total.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.sum(y * y, axis=0) / width + eps)
    y = y * tiles.load_vector(scale_ref, columns, inside).astype(jnp.float32)
    tiles.store_vector(out_ref, columns, inside, y)


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See the package's public function; `config` is that of the device by default."""
    width = x.shape[-1]
    if config is None:
        config = best("add_rms_norm", candidates, x.dtype, tiles.padded(width))
    rows = x.reshape(-1, width)
    row = pl.BlockSpec((None, width), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    total, out = tiles.call(
        _kernel,
        "add_rms_norm",
        grid=(rows.shape[0],),
        in_specs=[row, row, pl.BlockSpec((width,), lambda i: (0,))],
        out_specs=[row, row],
        out_shape=[shape, shape],
        num_warps=config.num_warps,
        num_stages=1,
        cost=pl.CostEstimate(
            flops=5 * x.size, transcendentals=rows.shape[0], bytes_accessed=4 * x.nbytes
        ),
        eps=eps,
    )(rows, delta.reshape(rows.shape), scale)
    return total.reshape(x.shape), out.reshape(x.shape)
