"""Qwen3-VL: vision tower, mergers, packed visual tokens, decoder with DeepStack.

The module tree is the parameter tree: `vision`, `projector` (the mergers), and the decoder's own.
"""

import jax
from flax import nnx

from vlcache_jax.models.layers import DType, LayerNorm
from vlcache_jax.models.qwen3_vl.config import Qwen3VLConfig
from vlcache_jax.models.qwen3_vl.tower import VisionTower
from vlcache_jax.models.qwen_vl.model import Merger, QwenVL
from vlcache_jax.models.qwen_vl.tower import Attend


class Mergers(Merger):
    """The merger of the tower's features, and one for those of each of its `deep_layers`."""

    def __init__(self, config: Qwen3VLConfig, *, dtype: DType, rngs: nnx.Rngs):
        super().__init__(config, LayerNorm, dtype=dtype, rngs=rngs)
        self.deep_layers = nnx.List(
            Merger(config, LayerNorm, joined=True, dtype=dtype, rngs=rngs)
            for _ in config.vision.deep_layers
        )


class Qwen3VL(QwenVL):
    """A Qwen3-VL model; see the module docstring."""

    tower, merger = VisionTower, Mergers

    @jax.named_scope("vision")
    def visual_rows(
        self, tiles: jax.Array, layout: jax.Array, attend: Attend
    ) -> tuple[jax.Array, ...]:
        """See `QwenVL.visual_rows`."""
        features, deep = self.vision(tiles, layout, attend=attend)
        added = [self.projector.deep_layers[number](part) for number, part in deep]
        return self.projector(features), *added
