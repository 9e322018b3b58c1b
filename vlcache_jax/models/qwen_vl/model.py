"""Qwen2.5-VL: vision tower, merger, packed visual tokens, decoder.

The module tree is the parameter tree: `vision`, `projector` (the merger), and the decoder's own.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.models.decoder import Decoder, with_visual_rows
from vlcache_jax.models.layers import DType, Linear, RMSNorm
from vlcache_jax.models.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.qwen_vl.tower import EPS, Attend, VisionTower
from vlcache_jax.requests.inputs import ModelInputs


class Merger(nnx.Module):
    """The patches of a tile side by side, and two linear layers with exact GELU."""

    def __init__(self, config: QwenVLConfig, *, dtype: DType, rngs: nnx.Rngs):
        width = config.vision.hidden_size
        whole = config.vision.merge_size**2 * width
        self.norm = RMSNorm(width, EPS, dtype=dtype)
        self.linear_1 = Linear(whole, whole, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(whole, config.text.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Features [S, merge * merge, D_vision] -> the table of visual rows [S, D]."""
        rows = self.norm(features).reshape(len(features), -1)
        return self.linear_2(jax.nn.gelu(self.linear_1(rows), approximate=False))


class QwenVL(Decoder):
    """A Qwen2.5-VL model; see the module docstring."""

    def __init__(self, config: QwenVLConfig, *, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.projector = Merger(config, dtype=dtype, rngs=rngs)
        super().__init__(config, dtype=dtype, rngs=rngs)

    @jax.named_scope("vision")
    def visual_rows(self, tiles: jax.Array, layout: jax.Array, attend: Attend) -> jax.Array:
        """Pixel tiles [S, 3, side, side] and their layout [S, 4] -> visual rows [S, D]."""
        return self.projector(self.vision(tiles, layout, attend=attend))

    def embed_prompt(self, inputs: ModelInputs, attend: Attend) -> jax.Array:
        """The decoder's input [B, T, D]: token embeddings with the visual rows in their places."""
        text = super().embed_prompt(inputs, attend)
        if inputs.layout is None:
            return text
        table = self.visual_rows(inputs.tiles, jnp.asarray(inputs.layout), attend)
        return with_visual_rows(text, table, inputs.visual_index)
