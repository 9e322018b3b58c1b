"""Qwen2.5-VL: vision tower, merger, packed visual tokens, decoder.

The module tree is the parameter tree: `vision`, `projector` (the merger), and the decoder's own.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.models.decoder import Decoder
from vlcache_jax.models.layers import DType, Linear, RMSNorm
from vlcache_jax.models.qwen_vl.config import QwenConfig
from vlcache_jax.models.qwen_vl.tower import EPS, Attend, VisionTower
from vlcache_jax.requests.inputs import ModelInputs


class Merger(nnx.Module):
    """The patches of a tile side by side, and two linear layers with exact GELU.

    Args:
        norm: makes the norm in front, of a width: that of a patch, or of all of them where they are
            `joined` first.
    """

    def __init__(
        self,
        config: QwenConfig,
        norm: Callable[..., Callable[[jax.Array], jax.Array]] = RMSNorm,
        *,
        joined: bool = False,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        width = config.vision.hidden_size
        whole = config.vision.merge_size**2 * width
        self.normed = whole if joined else width
        self.norm = norm(self.normed, EPS, dtype=dtype)
        self.linear_1 = Linear(whole, whole, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(whole, config.text.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Features [S, merge * merge, D_vision] -> the table of visual rows [S, D]."""
        rows = self.norm(features.reshape(len(features), -1, self.normed))
        rows = self.linear_1(rows.reshape(len(features), -1))
        return self.linear_2(jax.nn.gelu(rows, approximate=False))


class QwenVL(Decoder):
    """A Qwen2.5-VL model; see the module docstring.

    Attributes:
        tower: the class of the vision tower.
        merger: that of the projector.
    """

    tower: ClassVar[Callable[..., Any]] = VisionTower
    merger: ClassVar[Callable[..., Any]] = Merger

    def __init__(self, config: QwenConfig, *, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.vision = self.tower(config.vision, dtype=dtype, rngs=rngs)
        self.projector = self.merger(config, dtype=dtype, rngs=rngs)
        super().__init__(config, dtype=dtype, rngs=rngs)

    @jax.named_scope("vision")
    def visual_rows(
        self, tiles: jax.Array, layout: jax.Array, attend: Attend
    ) -> tuple[jax.Array, ...]:
        """Pixel tiles [S, ..., side, side] and their layout [S, 4] -> visual rows [S, D].

        The first holds the rows that stand in the prompt, the others are `Embedded.added`.
        """
        return (self.projector(self.vision(tiles, layout, attend=attend)),)

    def visual_tables(self, inputs: ModelInputs, attend: Attend) -> tuple[jax.Array, ...]:
        """See `Decoder.visual_tables`."""
        if inputs.layout is None:
            return ()
        return self.visual_rows(inputs.tiles, jnp.asarray(inputs.layout), attend)
