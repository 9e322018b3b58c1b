"""LLaVA-1.5, NeXT (1.6) and OneVision: vision tower, projector, packed visual tokens, decoder.

The module tree is the parameter tree: `vision`, `projector`, and the decoder's own.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.distributed.collectives import each_row
from vlcache_jax.models.decoder import Decoder
from vlcache_jax.models.layers import DType, Linear, normal
from vlcache_jax.models.llava.clip import Attend, VisionTower
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.inputs import ModelInputs


class Projector(nnx.Module):
    """Two linear layers with exact GELU from the tower's width to the decoder's.

    All but LLaVA-1.5 add `newline` [D], the token that ends each row of an anyres grid.
    """

    def __init__(self, config: LlavaConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, bias = config.text.hidden_size, config.projector_bias
        self.linear_1 = Linear(config.vision.hidden_size, width, bias=bias, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, bias=bias, dtype=dtype, rngs=rngs)
        newline = config.family != "llava"
        self.newline = normal(rngs, (width,), dtype) if newline else None

    def __call__(self, features: jax.Array) -> jax.Array:
        """Features [S, P, D_vision] -> [S, P, D]."""
        return self.linear_2(jax.nn.gelu(self.linear_1(features), approximate=False))

    def table(self, rows: jax.Array) -> jax.Array:
        """[S, P, D] -> the table of visual rows [S * P (+ 1), D]."""
        rows = rows.reshape(-1, rows.shape[-1])
        if self.newline is None:
            return rows
        return jnp.concatenate([rows, self.newline[...][None]])


class Llava(Decoder):
    """A LLaVA-style model; see the module docstring."""

    def __init__(self, config: LlavaConfig, *, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.vision_layers = config.vision_layers
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.projector = Projector(config, dtype=dtype, rngs=rngs)
        super().__init__(config, dtype=dtype, rngs=rngs)

    @jax.named_scope("vision")
    def visual_rows(self, tiles: jax.Array, attend: Attend) -> jax.Array:
        """Pixel tiles [S, 3, size, size] -> the table of visual rows [S * P (+ 1), D]."""

        def rows(tiles: jax.Array) -> jax.Array:
            return self.projector(self.vision(tiles, self.vision_layers, attend=attend))

        return self.projector.table(each_row(rows, tiles))

    def visual_tables(self, inputs: ModelInputs, attend: Attend) -> tuple[jax.Array, ...]:
        """See `Decoder.visual_tables`."""
        if inputs.tiles.shape[0] == 0:
            return ()
        return (self.visual_rows(inputs.tiles, attend),)
