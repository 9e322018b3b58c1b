"""LLaVA-1.5 and LLaVA-NeXT (1.6): vision tower, projector, packed visual tokens, decoder.

The module tree is the parameter tree: `vision`, `projector`, `embed`, `layers`, `head`. Outside
of its definition a model is a pure function of a plain dict of arrays: `bind(config)(params)`
gives the module back inside a traced function.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.models.layers import DType, Linear, normal
from vlcache_jax.models.llama import DecoderLayer, Embedding, Head
from vlcache_jax.models.llava.clip import Attend, VisionTower
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.inputs import ModelInputs

Params = dict[str, Any]


class Projector(nnx.Module):
    """Two linear layers with exact GELU from the tower's width to the decoder's.

    LLaVA-NeXT adds `newline` [D], the token that ends each row of an anyres grid.
    """

    def __init__(self, config: LlavaConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, bias = config.text.hidden_size, config.projector_bias
        self.linear_1 = Linear(config.vision.hidden_size, width, bias=bias, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, bias=bias, dtype=dtype, rngs=rngs)
        newline = config.family == "llava_next"
        self.newline = normal(rngs, (width,), dtype) if newline else None

    def __call__(self, features: jax.Array) -> jax.Array:
        """Features [S, P, D_vision] -> the table of visual rows [S * P (+ 1), D]."""
        rows = self.linear_2(jax.nn.gelu(self.linear_1(features), approximate=False))
        rows = rows.reshape(-1, rows.shape[-1])
        if self.newline is None:
            return rows
        return jnp.concatenate([rows, self.newline[...][None]])


class Llava(nnx.Module):
    """A LLaVA-style model; see the module docstring."""

    def __init__(self, config: LlavaConfig, *, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.config, text = config, config.text
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.projector = Projector(config, dtype=dtype, rngs=rngs)
        self.embed = Embedding(text, dtype=dtype, rngs=rngs)
        layers = [DecoderLayer(text, dtype=dtype, rngs=rngs) for _ in range(text.num_layers)]
        self.layers = nnx.List(layers)
        self.head = Head(text, dtype=dtype, rngs=rngs)

    @jax.named_scope("vision")
    def visual_rows(self, tiles: jax.Array, attend: Attend) -> jax.Array:
        """Pixel tiles [S, 3, size, size] -> the table of visual rows [S * P (+ 1), D]."""
        return self.projector(self.vision(tiles, self.config.vision_layers, attend=attend))

    def embed_prompt(self, inputs: ModelInputs, attend: Attend) -> jax.Array:
        """The decoder's input [B, T, D]: token embeddings with the visual rows in their places."""
        text = self.embed(inputs.tokens)
        if inputs.tiles.shape[0] == 0:
            return text
        table = self.visual_rows(inputs.tiles, attend)
        visual = jnp.take(table, jnp.maximum(inputs.visual_index, 0), axis=0)
        return jnp.where((inputs.visual_index >= 0)[..., None], visual, text)

    def logits(self, x: jax.Array) -> jax.Array:
        """Final hidden states [..., D] -> logits [..., V] in float32."""
        return self.head(x, self.embed)


def init_params(config: LlavaConfig, seed: int = 0, dtype: DType = jnp.float32) -> Params:
    """Random parameters, as a plain nested dict of arrays."""

    @jax.jit  # one program instead of a small one for every shape
    def init() -> Params:
        model = Llava(config, dtype=dtype, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model))

    return init()


def abstract_params(config: LlavaConfig, dtype: DType = jnp.float32) -> Params:
    """The tree of `init_params` as shapes and types; nothing is allocated."""
    return nnx.to_pure_dict(_abstract(config, jnp.dtype(dtype))[1])


@lru_cache(maxsize=32)
def _abstract(config: LlavaConfig, dtype: jnp.dtype) -> tuple[Any, Any]:
    model = nnx.eval_shape(lambda: Llava(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(model)


def bind(config: LlavaConfig) -> Callable[[Params], Llava]:
    """The function that turns parameters into a model, to be called inside a traced function.

    Made once and closed over, it costs nothing per call: the merge happens while tracing (an
    `nnx.jit` would split and merge on every call instead).
    """
    graphdef, _ = _abstract(config, jnp.dtype(jnp.float32))
    return lambda params: nnx.merge(graphdef, params)
