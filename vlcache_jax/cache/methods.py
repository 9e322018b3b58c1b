"""Cache methods: what is kept of a prompt's keys and values."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.state import Pool, round_up


@dataclass(frozen=True)
class FullCache:
    """Every prompt token is kept: the pool with length = m in every layer, layer l at row l * T."""

    name: ClassVar[str] = "full"
    budget: ClassVar[float] = 1.0
    scores_window: ClassVar[bool] = False

    def capacity(self, layers: int, prompt_rows: int) -> int:
        """Rows of the pool for L layers and a bucket of T prompt rows."""
        return round_up(layers * prompt_rows)

    def build(
        self, k: jax.Array, v: jax.Array, lengths: jax.Array, layers: int, prompt_rows: int
    ) -> Pool:
        """The prefill's own buffers [B, K, capacity, H] are the pool: nothing is moved."""
        batch = lengths.shape[0]
        offset = jnp.arange(layers, dtype=jnp.int32) * prompt_rows
        return Pool(
            k,
            v,
            offset=jnp.broadcast_to(offset, (batch, layers)),
            length=jnp.broadcast_to(lengths[:, None], (batch, layers)),
        )


METHODS = {FullCache.name: FullCache}
"""The methods by the name that the command line, JSON and files use."""
