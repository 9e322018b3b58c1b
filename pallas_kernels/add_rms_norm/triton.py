"""One program for each row, which stays in registers between the sum and the norm."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.tuning import RowConfig, best


def _kernel(
    x_ref: Any, delta_ref: Any, scale_ref: Any, sum_ref: Any, out_ref: Any, *, eps: float
) -> None:
    """References of one row, [D] each."""
    width = x_ref.shape[0]
    columns = jnp.arange(tiles.padded(width), dtype=jnp.int32)
    inside = columns < width
    at = (columns,), inside
    total = tiles.gather(x_ref, *at) + tiles.gather(delta_ref, *at)
    tiles.scatter(sum_ref, *at, total)
    y = total.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.sum(y * y, axis=0) / width + eps)
    y = y * tiles.gather(scale_ref, *at).astype(jnp.float32)
    tiles.scatter(out_ref, *at, y)


def add_rms_norm(
    x: jax.Array, delta: jax.Array, scale: jax.Array, *, eps: float, config: RowConfig | None = None
) -> tuple[jax.Array, jax.Array]:
    """See the package's public function; `config` is that of the device by default."""
    width = x.shape[-1]
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
        config=config or best("add_rms_norm", x.dtype, width),
        cost=pl.CostEstimate(
            flops=5 * x.size, transcendentals=rows.shape[0], bytes_accessed=4 * x.nbytes
        ),
        eps=eps,
    )(rows, delta.reshape(rows.shape), scale)
    return total.reshape(x.shape), out.reshape(x.shape)
