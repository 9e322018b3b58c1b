"""The small LLaVA that the project trains: its shape, tokenizer, processor, and its files.

It is LLaVA-NeXT in every respect but size: a CLIP-like tower, a projector, a Llama-like decoder
with grouped heads, in Hugging Face's format, loaded by the same code as the published models.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.processor import IMAGE_TOKEN_ID, TILE, make_processor, make_tokenizer
from convert.safetensors_writer import write_tensors
from vlcache_jax.checkpoints.weights import parameter_name, parse_dtype, split, tensors_of
from vlcache_jax.files import whole_directory
from vlcache_jax.models.families import Params
from vlcache_jax.models.llava.names import LLAVA

PATCH = 14
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def config_json(vision: dict[str, int], text: dict[str, int], vocabulary: int) -> dict[str, Any]:
    """The model's `config.json`.

    Args:
        vision: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads. One layer
            more is in the file than runs: the features are those of the last but one.
        text: the same, with num_key_value_heads and head_dim.
        vocabulary: tokens of the tokenizer.
    """
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_token_index": IMAGE_TOKEN_ID,
        "image_grid_pinpoints": PINPOINTS,
        "image_seq_length": (TILE // PATCH) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "dtype": "float32",
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": TILE,
            "patch_size": PATCH,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            **vision,
        },
        "text_config": {
            "model_type": "mistral",
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_window": None,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
            "tie_word_embeddings": True,
            **text,
        },
    }


def make_files(words: Iterable[str]) -> Any:
    """The processor, whose tokenizer has one token for each of the words, behind a space too.

    Names and values in the pictures are spelt: digits and capital letters are never parts of longer
    tokens, unless a word of the questions begins with one, so that reading goes patch by patch.
    """
    # Each merge is learned that occurs twice: so every word becomes one token.
    corpus = [text for word in words for text in (word, f" {word}") for _ in range(2)]
    return make_processor(make_tokenizer(corpus, size=8192), PINPOINTS)


def export(path: Path, config: dict[str, Any], files: Any, params: Params, dtype: str) -> None:
    """Write a Hugging Face checkpoint, which appears whole or not at all; replaces an old one.

    Args:
        path: the directory.
        config: of `config_json`.
        files: the processor.
        params: the parameters.
        dtype: type to store them in.
    """
    kind = parse_dtype(dtype)
    arrays = {
        parameter_name(key): np.asarray(leaf).astype(kind)
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    shapes = {
        tensor: shape
        for name, array in arrays.items()
        for tensor, shape in tensors_of(LLAVA, name, array.shape).items()
    }
    tensors = (tensor for name, array in arrays.items() for tensor in split(LLAVA, name, array))
    with whole_directory(path.resolve(), force=True) as directory:
        write_tensors(directory, shapes, kind, tensors)
        text = json.dumps({**config, "dtype": kind.name}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        files.save_pretrained(directory)
