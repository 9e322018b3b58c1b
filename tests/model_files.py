"""Tiny checkpoints on disk: random tensors in any spelling, in one file or in several."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vlcache_jax.checkpoints.weights import parameter_shapes, tensors_of
from vlcache_jax.models.families import family_of, read_config

SPELLINGS = ("hub", "model.", "transformers 5", "transformers 5 on disk")


def config_json(
    family: str = "llava_next", *, heads: int = 4, kv_heads: int = 2, tied: bool = False
) -> dict[str, Any]:
    """A config.json of two vision layers and two decoder layers."""
    return {
        "model_type": family,
        "image_token_index": 4,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "text_config": {
            "model_type": "llama",
            "torch_dtype": "float32",
            "vocab_size": 64,
            "hidden_size": 8 * heads,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        },
    } | ({"image_grid_pinpoints": [[28, 56], [56, 28]]} if family == "llava_next" else {})


def decoder_json(kind: str = "llama", *, tied: bool = False) -> dict[str, Any]:
    """The config.json of a decoder alone, of two layers."""
    text = config_json(tied=tied)["text_config"]
    return {**text, "model_type": kind, "tie_word_embeddings": tied, "sliding_window": None}


def random_tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """All tensors of a model under their hub names."""
    rng = np.random.default_rng(7)
    model = read_config(config)
    return {
        tensor: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, whole in parameter_shapes(model).items()
        for tensor, shape in tensors_of(family_of(model).names, name, whole).items()
    }


def respell(name: str, spelling: str) -> str:
    """A hub name in another of the `SPELLINGS`."""
    if spelling == "model.":
        return f"model.{name}"
    if spelling.startswith("transformers 5"):
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
    if spelling == "transformers 5":
        name = name.replace("language_model.model.", "language_model.")
        name = f"model.{name}".replace("model.language_model.lm_head.", "lm_head.")
    return name


def write_model(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """Write a Hugging Face model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "tokenizer.model").write_bytes(b"not read here")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        where |= dict.fromkeys(names[i::shards], file)
        save_file({name: tensors[name] for name in names[i::shards]}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_tiny(directory: Path, config: dict[str, Any], processor: Any, scale: float = 0.4) -> Path:
    """Write a model that gives varied answers, with the files of its processor or tokenizer."""
    tensors = {
        name: 1 + 0.3 * array if "norm" in name else scale * array
        for name, array in random_tensors(config).items()
    }
    path = write_model(directory, config, tensors)
    (path / "tokenizer.model").unlink()
    (path / "generation_config.json").unlink()
    processor.save_pretrained(path)
    return path


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face model directory, by the safetensors library itself."""
    from safetensors.numpy import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of tensors have the same names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )
