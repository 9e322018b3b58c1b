"""The shapes of the published models, without their weights."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.method import AnyPool
from vlcache_jax.models.config import ModelConfig, RopeConfig, TextConfig
from vlcache_jax.models.families import family_of
from vlcache_jax.models.llava.config import LlavaConfig, VisionConfig
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.models.qwen3_vl.config import Qwen3VLConfig, interleaved_axes
from vlcache_jax.models.qwen3_vl.config import VisionConfig as Qwen3VisionConfig
from vlcache_jax.models.qwen_vl.config import QwenConfig, QwenVLConfig
from vlcache_jax.models.qwen_vl.config import VisionConfig as QwenVisionConfig
from vlcache_jax.models.qwen_vl.layout import tile_places
from vlcache_jax.requests.inputs import Interpolation, ModelInputs
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

_SIGLIP = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=26,
    num_heads=16,
    image_size=384,
    patch_size=14,
    layer_norm_eps=1e-6,
    activation="gelu_pytorch_tanh",
    tower="siglip",
)
_SIDES = range(384, 2305, 384)
_QWEN_7B = TextConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    rms_norm_eps=1e-6,
    max_positions=128000,
    rope=RopeConfig(theta=1e6, axes=(0,) * 16 + (1,) * 24 + (2,) * 24),
    kind="qwen2",
)
_QWEN_TOWER = QwenVisionConfig(hidden_size=1280)

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
    "llava-onevision-7b": OnevisionConfig(
        family="llava_onevision",
        vision=_SIGLIP,
        text=replace(_QWEN_7B, vocab_size=152128, max_positions=32768, rope=RopeConfig(theta=1e6)),
        image_token_id=151646,
        vision_layers=26,
        grid_pinpoints=tuple((height, width) for height in _SIDES for width in _SIDES),
    ),
    "qwen2.5-vl-3b": QwenVLConfig(
        family="qwen2_5_vl",
        vision=_QWEN_TOWER,
        text=replace(
            _QWEN_7B,
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_layers=36,
            num_heads=16,
            num_kv_heads=2,
            tie_embeddings=True,
        ),
    ),
    "qwen2.5-vl-7b": QwenVLConfig(family="qwen2_5_vl", vision=_QWEN_TOWER, text=_QWEN_7B),
    "qwen2.5-vl-72b": QwenVLConfig(
        family="qwen2_5_vl",
        vision=replace(_QWEN_TOWER, intermediate_size=3456),
        text=replace(
            _QWEN_7B,
            hidden_size=8192,
            intermediate_size=29568,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
        ),
    ),
    "qwen3-vl-8b": Qwen3VLConfig(
        family="qwen3_vl",
        vision=Qwen3VisionConfig(),
        text=TextConfig(
            vocab_size=151936,
            intermediate_size=12288,
            num_layers=36,
            num_kv_heads=8,
            max_positions=262144,
            rope=RopeConfig(theta=5e6, axes=interleaved_axes((24, 20, 20), 64)),
            kind="qwen3",
        ),
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


def most_tiles(config: ModelConfig, rows: int) -> int:
    """The most tiles that one image becomes, in a prompt of so many rows."""
    return min(config.max_tiles, rows)


def abstract_inputs(
    config: ModelConfig, batch: int, rows: int, tiles: int | None = None
) -> ModelInputs:
    """Prompts of a bucket as shapes.

    Args:
        config: the model.
        batch: prompts, B.
        rows: of the bucket, T.
        tiles: of each prompt; `most_tiles` by default.
    """
    packing, side = family_of(config).packing, config.tile_side
    count = batch * (most_tiles(config, rows) if tiles is None else tiles)

    def whole(*sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, jnp.int32)

    def real(*sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, jnp.float32)

    sums = batch, rows, packing.neighbours
    between = Interpolation(whole(*sums), real(*sums)) if count and packing.neighbours else None
    return ModelInputs(
        tokens=whole(batch, rows),
        length=whole(batch),
        visual_index=whole(batch, rows),
        tiles=real(count, 3, side, side),
        positions=whole(3, batch, rows) if config.text.rope.axes else None,
        interpolation=between,
        layout=whole(count, 4) if count and packing.has_layout else None,
    )


def with_places(config: ModelConfig, inputs: ModelInputs) -> ModelInputs:
    """Prompts of a picture and then text, with what the family is given besides tiles and tokens.

    Args:
        config: the model.
        inputs: numpy arrays, each prompt with as many tiles as the others; its visual tokens come
            first, line by line, and where each is a tile they are the first of its tiles.
    """
    packing, visual = family_of(config).packing, inputs.visual_index >= 0
    rows, count = inputs.tokens.shape[1], len(inputs.tiles)
    if count and packing.neighbours:
        index, weight = (np.where(visual, x, 0) for x in (inputs.visual_index, 1.0))
        found = np.stack([index] * packing.neighbours, axis=-1)
        weights = np.stack([weight / packing.neighbours] * packing.neighbours, axis=-1)
        inputs = replace(inputs, interpolation=Interpolation(found, weights.astype(np.float32)))
    if not config.text.rope.axes:
        return inputs
    at = np.arange(rows, dtype=np.int32)
    positions = np.stack([np.where(at < inputs.length[:, None], at, 0)] * 3)
    if not count or not isinstance(config, QwenConfig):
        return replace(inputs, positions=positions)
    layout, visual_index, first = np.full((count, 4), -1, np.int32), inputs.visual_index.copy(), 0
    for b, (own, length) in enumerate(zip(visual.sum(1), inputs.length, strict=True)):
        # As wide as high; where that leaves tiles over, the last line is not full.
        across = max(1, math.isqrt(own))
        places = tile_places((-(-own // across), across), config.vision.window_side)
        line_by_line = places[:, 1] * across + places[:, 2]
        places, line_by_line = (x[line_by_line < own] for x in (places, line_by_line))
        tiles = layout[first : first + own]
        tiles[:, 0], tiles[:, 1:] = b, places
        tiles[:, 1] += b * rows  # more than there are windows
        visual_index[b, :own] = first + np.argsort(line_by_line)
        positions[0, b, :own], positions[1:, b, :own] = 0, np.divmod(at[:own], across)
        positions[:, b, own:length] += -(-own // across) - own
        first += own
    return replace(inputs, positions=positions, layout=layout, visual_index=visual_index)


def empty_cache(
    generate: Generate, batch: int, rows: int, dtype: jnp.dtype
) -> tuple[AnyPool, DecodeState]:
    """What decoding starts from, behind no prompt; for `jax.eval_shape`, or as zeros.

    `rows` is the bucket of the prompts, T.
    """
    stages, none = generate.stages, jnp.zeros((batch,), jnp.int32)
    state = stages.start(none, none, generate.settings(batch), dtype)
    return stages.empty_pool(batch, rows, dtype), state
