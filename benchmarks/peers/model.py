"""The model and the prompt that all sides are given."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import measure, models
from benchmarks.accuracy import network
from benchmarks.accuracy.network import IMAGE_TOKEN_ID
from benchmarks.models import WINDOW
from vlcache_jax.models.config import TextConfig
from vlcache_jax.models.families import Params, abstract_params
from vlcache_jax.models.llava.anyres import visual_rows
from vlcache_jax.models.llava.config import LlavaConfig, with_vision

WORDS = ("amber", "bridge", "cloud", "door", "engine", "forest", "garden", "harbour")
"""Words of the texts, each of them one token."""

SMALL = LlavaConfig(
    family="llava_next",
    vision=models.SMALL_TOWER,
    text=TextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        max_positions=8192,
    ),
    vision_layers=2,
    grid_pinpoints=((112, 224), (224, 112), (224, 224)),
)
"""For a CPU: the cache of 1k tokens is two thirds of the weights."""

MODELS = {
    name: replace(with_vision(config), image_token_id=IMAGE_TOKEN_ID)
    for name, config in {"small": SMALL, **models.MODELS}.items()
    if config.family == "llava_next"
}
"""By the names that the command takes; the tokenizer is ours."""


def config_json(config: LlavaConfig) -> dict[str, Any]:
    """The `config.json` of a LLaVA-NeXT that all sides read."""
    vision, text = config.vision, config.text
    data = network.config_json(
        {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        {
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "max_position_embeddings": text.max_positions,
        },
        text.vocab_size,
    )
    data["text_config"] |= {
        "model_type": text.kind,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope.theta},
        "tie_word_embeddings": False,
        "eos_token_id": None,  # answers run to their full length
    }
    return data | {
        "image_grid_pinpoints": [list(pair) for pair in config.grid_pinpoints],
        "image_seq_length": vision.num_patches,
        "tie_word_embeddings": False,
    }


def make_files(config: LlavaConfig) -> Any:
    """The model's `transformers` processor, in which each of the `WORDS` is one token."""
    files, side = network.make_files(WORDS), config.vision.image_size
    images = files.image_processor
    images.size = {"shortest_edge": side}
    images.crop_size = {"height": side, "width": side}
    images.image_grid_pinpoints = [list(pair) for pair in config.grid_pinpoints]
    files.patch_size = config.vision.patch_size
    return files


def random_params(config: LlavaConfig, dtype: str) -> Params:
    """Random weights so large that products keep their size, and answers depend on the prompt."""
    std, count = 1.2 / config.text.hidden_size**0.5, itertools.count()

    def draw(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, dtype)
        drawn = measure.normal(jax.random.key(next(count)), leaf.shape, dtype)
        return (std if leaf.ndim > 1 else 0.02) * drawn

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, jnp.dtype(dtype)))


def make_prompt(config: LlavaConfig, context: int) -> tuple[list[Image.Image], str]:
    """Pictures of random pixels, and a raw prompt that is exactly `context` tokens with them.

    As many visual tokens as fit: [words to fill up, pictures, `WINDOW` words].

    Raises:
        ValueError: not even one picture fits.
    """
    side = config.vision.image_size
    sizes = {(side, side), *config.grid_pinpoints}
    tokens = {size: len(visual_rows(size, config)) for size in sorted(sizes)}
    room, chosen = context - WINDOW - 1, []  # the tokenizer puts one token before a text
    for size, count in sorted(tokens.items(), key=lambda item: -item[1]):
        while count <= room:
            chosen.append(size)
            room -= count
    if not chosen:
        least = min(tokens.values()) + WINDOW + 1
        raise ValueError(f"{context=} is too short for a picture: at least {least}")
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in chosen
    ]
    words = [f" {word}" for word in rng.choice(WORDS, room + WINDOW)]
    text = "".join([*words[:room], "<image>" * len(chosen), *words[room:]])
    return pictures, text
