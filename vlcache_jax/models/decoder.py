"""A decoder as a whole model, and what a family that takes pictures puts in front of it.

The module tree is the parameter tree: `embed`, `layers`, `head`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.layers import DType, weighted_rows
from vlcache_jax.models.llama import DecoderLayer, Embedding, Head, Residual
from vlcache_jax.requests.inputs import ModelInputs


class Embedded(NamedTuple):
    """A prompt in front of the first layer.

    Attributes:
        x: its hidden states, [B, T, D].
        added: a table of visual rows [R, D] for each of the first layers, behind which they are
            added to the visual tokens (DeepStack: Meng et al. 2024); most families have none.
    """

    x: jax.Array
    added: tuple[jax.Array, ...] = ()

    def behind(self, layer: int, stream: Residual, index: jax.Array) -> Residual:
        """The residual stream behind a layer, with what is added there.

        Args:
            layer: its number.
            stream: as the layer leaves it.
            index: `ModelInputs.visual_index` [B, T].
        """
        if layer >= len(self.added):
            return stream
        visual = _rows_of(self.added[layer], index)
        return Residual(stream.total(), jnp.where((index >= 0)[..., None], visual, 0))


class Decoder(nnx.Module):
    """A Llama-like model of text; see the module docstring."""

    def __init__(self, config: ModelConfig, *, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.config, text = config, config.text
        self.embed = Embedding(text, dtype=dtype, rngs=rngs)
        layers = [DecoderLayer(text, dtype=dtype, rngs=rngs) for _ in range(text.num_layers)]
        self.layers = nnx.List(layers)
        self.head = Head(text, dtype=dtype, rngs=rngs)

    def visual_tables(
        self, inputs: ModelInputs, attend: Callable[..., jax.Array]
    ) -> tuple[jax.Array, ...]:
        """The visual rows of all pictures, tables [R, D]: those that stand in the prompt first,
        then `Embedded.added`. None of text.

        Args:
            inputs: the prompts.
            attend: full attention of q, k and v [S, P + 1, N, H] each, for a vision tower; a fourth
                argument, int32 [S], says how many of their rows count.
        """
        return ()

    def embed_prompt(self, inputs: ModelInputs, attend: Callable[..., jax.Array]) -> Embedded:
        """What the layers are given of the prompts; see `visual_tables`."""
        return self.embed_rows(inputs, self.visual_tables(inputs, attend))

    def embed_rows(self, inputs: ModelInputs, tables: tuple[jax.Array, ...]) -> Embedded:
        """What the layers are given of the prompts, or of a part of their rows.

        Args:
            inputs: the prompts; their tiles are not looked at.
            tables: of `visual_tables`.
        """
        x = self.embed(inputs.tokens)
        if not tables:
            return Embedded(x)
        table, *added = tables
        if inputs.interpolation is None:
            visual = _rows_of(table, inputs.visual_index)
        else:
            visual = weighted_rows(table, *inputs.interpolation)
        x = jnp.where((inputs.visual_index >= 0)[..., None], visual, x)
        return Embedded(x, tuple(added))

    def logits(self, x: jax.Array) -> jax.Array:
        """Final hidden states [..., D] -> logits [..., V] in float32."""
        return self.head(x, self.embed)


def _rows_of(table: jax.Array, index: jax.Array) -> jax.Array:
    """The row of each visual token, [B, T, D]; any row for the others."""
    return jnp.take(table, jnp.maximum(index, 0), axis=0)
