"""The vision transformer of Qwen3-VL (Bai et al. 2025, section 2).

All pictures of a batch are one sequence of patches, line by line of tiles, and each layer attends
inside pictures. A learned square table of positions is stretched over each picture.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.models.layers import DType, LayerNorm, Linear, normal, weighted_rows
from vlcache_jax.models.qwen3_vl.config import VisionConfig
from vlcache_jax.models.qwen_vl.config import TowerConfig
from vlcache_jax.models.qwen_vl.tower import (
    EPS,
    GROUP,
    Attend,
    PatchTower,
    VisionLayer,
    picture_attention,
)


class PlainLayer(VisionLayer):
    """LayerNorm, and an MLP of two linear layers with the GELU that a tanh approximates."""

    def __init__(self, config: TowerConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, wide = config.hidden_size, config.intermediate_size
        norm = partial(LayerNorm, width, EPS, dtype=dtype)
        super().__init__(config, norm, dtype=dtype, rngs=rngs)
        self.up = Linear(width, wide, dtype=dtype, rngs=rngs)
        self.down = Linear(wide, width, dtype=dtype, rngs=rngs)

    def mlp(self, x: jax.Array) -> jax.Array:
        """[M, D] -> [M, D]."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class VisionTower(PatchTower):
    """The tower in front of the mergers, which are the model's projector."""

    config: VisionConfig

    def __init__(self, config: VisionConfig, *, dtype: DType, rngs: nnx.Rngs):
        super().__init__(config, PlainLayer, dtype=dtype, rngs=rngs)
        width = config.hidden_size
        self.patch_bias = nnx.Param(jnp.zeros((width,), dtype))
        self.position_embedding = normal(rngs, (config.num_positions, width), dtype)

    def __call__(
        self, tiles: jax.Array, layout: jax.Array, *, attend: Attend, group: int = GROUP
    ) -> tuple[jax.Array, list[tuple[int, jax.Array]]]:
        """Patch features [S, merge * merge, D] of the tiles; the same of each of `deep_layers`.

        The latter in the order in which they run, each with its number among `deep_layers`.

        Args:
            tiles: normalised pixels [S, 3, side, side]; rows that are padding are not read.
            layout: int32 [S, 4], see `ModelInputs`.
            attend: full attention.
            group: see `GROUP`.
        """
        shape, own = (len(tiles), self.config.merge_size**2, -1), self.config.deep_layers
        picture, table, deep = self.each_patch(layout[:, 0]), self.rope_table(layout), []
        x = self.patches(tiles, layout) + self.patch_bias[...] + self.positions(layout)
        for index, layer in enumerate(self.layers):
            x = layer(x, table, lambda *heads: picture_attention(heads, picture, attend), group)
            if index in own:
                deep.append((own.index(index), x.reshape(shape)))
        return x.reshape(shape), deep

    def positions(self, layout: jax.Array) -> jax.Array:
        """Learned position of each patch [M, D], bilinear between the four of the table around it.

        The corners of the table lie on those of the picture.

        Args:
            layout: int32 [S, 4], see `ModelInputs`.
        """
        side, picture = self.config.positions_side, jnp.maximum(layout[:, 0], 0)
        sizes = jax.ops.segment_max(layout[:, 2:], picture, len(layout)) + 1  # tiles down, across
        last = jnp.maximum(self.config.merge_size * sizes[picture] - 1, 1)  # [S, 2], of its patches
        at = self.places(layout) * jnp.float32(side - 1) / last[:, None]
        low = jnp.floor(at)
        part = at - low  # [S, merge * merge, 2]
        taps = jnp.stack([low, low + 1]).astype(jnp.int32).clip(0, side - 1)
        weights = jnp.stack([1 - part, part])
        rows = taps[:, None, ..., 0] * side + taps[None, ..., 1]  # [2, 2, S, merge * merge]
        weights = weights[:, None, ..., 0] * weights[None, ..., 1]
        rows, weights = (jnp.moveaxis(x.reshape(4, -1), 0, -1) for x in (rows, weights))
        return weighted_rows(self.position_embedding[...], rows, weights)
