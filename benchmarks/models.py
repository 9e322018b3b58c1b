"""The shapes of the published models, without their weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.method import AnyPool
from vlcache_jax.models.config import ModelConfig, RopeConfig, TextConfig
from vlcache_jax.models.llava.config import LlavaConfig, VisionConfig
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.stages import DecodeState

Model = TypeVar("Model", bound=ModelConfig)

_TOWER = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=24,
    num_heads=16,
    image_size=336,
    patch_size=14,
)
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_VICUNA_7B = TextConfig(vocab_size=32064, rms_norm_eps=1e-5, max_positions=4096)

WINDOW = 50
"""Text tokens behind the picture of a prompt, as in VL-Cache's table of speeds."""

SMALL_TOWER = VisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    image_size=112,
    patch_size=14,
)
"""A vision tower that a CPU can run; all layers but the last are used."""

MODELS: Mapping[str, ModelConfig] = {
    "llava-1.5-7b": LlavaConfig(family="llava", vision=_TOWER, text=_VICUNA_7B),
    "llava-v1.6-vicuna-7b": LlavaConfig(
        family="llava_next", vision=_TOWER, text=_VICUNA_7B, grid_pinpoints=_PINPOINTS
    ),
    "llava-v1.6-mistral-7b": LlavaConfig(
        family="llava_next",
        vision=_TOWER,
        text=TextConfig(
            vocab_size=32064,
            intermediate_size=14336,
            num_kv_heads=8,
            rms_norm_eps=1e-5,
            max_positions=32768,
            rope=RopeConfig(theta=1e6),
            kind="mistral",
        ),
        grid_pinpoints=_PINPOINTS,
    ),
    "llava-v1.6-34b": LlavaConfig(
        family="llava_next",
        vision=_TOWER,
        text=TextConfig(
            vocab_size=64064,
            hidden_size=7168,
            intermediate_size=20480,
            num_layers=60,
            num_heads=56,
            num_kv_heads=8,
            head_dim=128,
            rms_norm_eps=1e-5,
            max_positions=4096,
            rope=RopeConfig(theta=5e6),
        ),
        grid_pinpoints=_PINPOINTS,
    ),
    "llama-3.1-8b": ModelConfig(
        family="llama",
        text=TextConfig(
            vocab_size=128256,
            intermediate_size=14336,
            num_kv_heads=8,
            rms_norm_eps=1e-5,
            max_positions=131072,
            rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0),
        ),
    ),
}
"""By the names that the commands take."""


def with_positions(config: Model, tokens: int) -> Model:
    """The model, with positions for so many tokens, though it may not have been made for them."""
    text = config.text
    text = replace(text, max_positions=max(tokens, text.max_positions))
    return replace(config, text=text)


def abstract_inputs(config: ModelConfig, batch: int, rows: int) -> ModelInputs:
    """Prompts of a bucket as shapes, each with the most tiles that one image becomes."""
    ids = jax.ShapeDtypeStruct((batch, rows), jnp.int32)
    tiles = (batch * config.max_tiles, 3, config.tile_side, config.tile_side)
    return ModelInputs(
        tokens=ids,
        length=jax.ShapeDtypeStruct((batch,), jnp.int32),
        visual_index=ids,
        tiles=jax.ShapeDtypeStruct(tiles, jnp.float32),
    )


def empty_cache(
    generate: Generate, batch: int, rows: int, dtype: jnp.dtype
) -> tuple[AnyPool, DecodeState]:
    """What decoding starts from, behind no prompt; for `jax.eval_shape`, or as zeros.

    `rows` is the bucket of the prompts, T.
    """
    stages, none = generate.stages, jnp.zeros((batch,), jnp.int32)
    state = stages.start(none, none, generate.settings(batch), dtype)
    return stages.empty_pool(batch, rows, dtype), state
