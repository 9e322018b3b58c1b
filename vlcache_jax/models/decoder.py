"""A decoder as a whole model, and what a family that takes pictures puts in front of it.

The module tree is the parameter tree: `embed`, `layers`, `head`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.layers import DType
from vlcache_jax.models.llama import DecoderLayer, Embedding, Head
from vlcache_jax.requests.inputs import ModelInputs


class Decoder(nnx.Module):
    """A Llama-like model of text; see the module docstring."""

    def __init__(self, config: ModelConfig, *, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.config, text = config, config.text
        self.embed = Embedding(text, dtype=dtype, rngs=rngs)
        layers = [DecoderLayer(text, dtype=dtype, rngs=rngs) for _ in range(text.num_layers)]
        self.layers = nnx.List(layers)
        self.head = Head(text, dtype=dtype, rngs=rngs)

    def embed_prompt(self, inputs: ModelInputs, attend: Callable[..., jax.Array]) -> jax.Array:
        """The first layer's input [B, T, D].

        Args:
            inputs: the prompts.
            attend: full attention of q, k and v [S, P + 1, N, H] each, for a vision tower; a fourth
                argument, int32 [S], says how many of their rows count.
        """
        return self.embed(inputs.tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """Final hidden states [..., D] -> logits [..., V] in float32."""
        return self.head(x, self.embed)


def with_visual_rows(text: jax.Array, table: jax.Array, index: jax.Array) -> jax.Array:
    """Embeddings with the rows of visual tokens in their places.

    Args:
        text: embeddings of the tokens, [B, T, D].
        table: the rows, [R, D].
        index: `ModelInputs.visual_index` [B, T].
    """
    visual = jnp.take(table, jnp.maximum(index, 0), axis=0)
    return jnp.where((index >= 0)[..., None], visual, text)
