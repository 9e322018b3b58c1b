"""Tiny random models of transformers' own classes, with float32 weights (needs torch)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from PIL import Image

import vlcache_jax
from convert.program import convert
from tests.model_files import read_tensors, same_bits
from tests.tiny import (
    IMAGE_SIZE,
    IMAGE_TOKEN_ID,
    PATCH_SIZE,
    VIDEO_TOKEN_ID,
    text_tokenizer,
    tiny_pinpoints,
    tiny_processor,
)
from tests.tiny_qwen import qwen_json, save_processor
from vlcache_jax.models.fold import fold_transform

# Threads of torch wait by turning in circles, and XLA's own need the cores: many times slower.
torch.set_num_threads(1)

KINDS = {
    "llava-1.5 Llama MHA": ("llava", "llama", {"num_key_value_heads": 4}),
    "NeXT Mistral GQA": ("llava_next", "mistral", {"num_key_value_heads": 2}),
    "NeXT Yi, G = 7": (
        "llava_next",
        "llama",
        {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112},
    ),
    "NeXT Vicuna MHA": ("llava_next", "llama", {"num_key_value_heads": 4}),
    "OneVision Qwen2 GQA": ("llava_onevision", "qwen2", {"num_key_value_heads": 2}),
}
"""Family, decoder and its shape of the models that parity is shown for."""


CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
"""Configurations of decoders by their kind."""


def hf_model(family: str, decoder: str, shape: dict[str, Any], *, seed: int = 0) -> Any:
    """A random model in evaluation mode; norms and biases are random too.

    The family "text" is the decoder alone.
    """
    text_class = CONFIGS[decoder]
    text: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "initializer_range": 0.4,
        **({"sliding_window": None} if decoder == "mistral" else {}),
        **shape,
    }
    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    if family == "llava_onevision":
        vision = transformers.SiglipVisionConfig(**tower, vision_use_head=False)
    else:
        vision = transformers.CLIPVisionConfig(**tower, initializer_range=0.2)
    common = {
        "vision_config": vision,
        "text_config": text_class(**text),
        "image_token_index": IMAGE_TOKEN_ID,
        "tie_word_embeddings": shape.get("tie_word_embeddings", False),
    }
    torch.manual_seed(seed)
    model: Any
    if family == "text":
        model = transformers.AutoModelForCausalLM.from_config(text_class(**text))
    elif family == "llava":
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**common))
    elif family == "llava_onevision":
        pinpoints = [list(pair) for pair in tiny_pinpoints(IMAGE_SIZE, family)]
        common["video_token_index"] = VIDEO_TOKEN_ID
        config = transformers.LlavaOnevisionConfig(image_grid_pinpoints=pinpoints, **common)
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    else:
        pinpoints = [list(pair) for pair in tiny_pinpoints()]
        config = transformers.LlavaNextConfig(image_grid_pinpoints=pinpoints, **common)
        model = transformers.LlavaNextForConditionalGeneration(config)
    return ready(model)


QWEN = {
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
}
"""Configuration and model of the families of the Qwen-VL line."""


def qwen_model(family: str, **text: Any) -> Any:
    """A random model of the Qwen-VL line in evaluation mode, with other fields of the decoder."""
    data = qwen_json(family, initializer_range=0.4, **text)
    data["vision_config"]["initializer_range"] = 0.2
    config, model = QWEN[family]
    torch.manual_seed(0)
    ids = {"vision_start_token_id": 261, "vision_end_token_id": 262}
    return ready(model(config(**data, **ids)))


def ready(model: Any) -> Any:
    """A random model in evaluation mode, its norms and biases random too, without a stop token."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    # Answers run to their full length.
    for holder in (model.generation_config, model.config.get_text_config()):
        holder.eos_token_id = None
    return model.eval()


def save(model: Any, path: Path, family: str, **kwargs: Any) -> Path:
    """Write the model and its processor as a Hugging Face directory."""
    model.save_pretrained(path, **kwargs)
    if family in QWEN:
        save_processor(path, family)
        return path
    (text_tokenizer() if family == "text" else tiny_processor(family)).save_pretrained(path)
    return path


def hf_inputs(family: str, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
    """What Hugging Face's own processor makes of a raw prompt."""
    pictures = [list(images)] if images else None  # those of one prompt
    return tiny_processor(family)(images=pictures, text=prompt, return_tensors="pt")


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest max|a - b| / max|b| of any position; the last axis is compared as a whole."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float((np.abs(a - b).max(-1) / np.abs(b).max(-1)).max())


def check_logits(pair: Any, inputs: Any, theirs: dict[str, Any], bound: float) -> None:
    """Those of every position of a prompt, of a pair of models, are the same."""
    with torch.no_grad():
        expected = pair.theirs(**theirs).logits[0].numpy()
    logits = np.asarray(pair.logits(pair.ours.params, inputs))[0, : int(inputs.length[0])]
    assert logits.shape == expected.shape
    assert relative_error(logits, expected) < bound


def check_greedy(pair: Any, theirs: dict[str, Any], images: Any, prompt: str, **asked: Any) -> None:
    """32 greedy tokens of a raw prompt, of a pair of models, are the same."""
    with torch.no_grad():
        out = pair.theirs.generate(**theirs, max_new_tokens=32, do_sample=False, pad_token_id=3)
    expected = out[0, theirs["input_ids"].shape[1] :].tolist()
    answer = pair.ours.generate(images, prompt, max_new_tokens=32, raw_prompt=True, **asked)
    assert answer.tokens == expected
    assert len(set(expected)) > 3, "the model says one thing only: the test would prove little"


def check_transform(pair: Any, inputs: Any, bound: float) -> None:
    """Values that are transformed change no logits of a pair's model."""
    plain = np.asarray(pair.logits(pair.ours.params, inputs))
    folded = np.asarray(pair.logits(fold_transform(pair.ours.params), inputs))
    assert relative_error(folded, plain) < bound
    # The same where they are folded as they are read.
    params = vlcache_jax.load(pair.path, transform=True).params
    assert np.array_equal(np.asarray(pair.logits(params, inputs)), folded)


def check_conversion(pair: Any, folder: Path) -> Any:
    """A pair's model, converted and back, has its bits; gives it as transformers reads it."""
    there = convert(pair.path, folder / "orbax")
    back = convert(there, folder / "back", to_hf=True)
    assert same_bits(read_tensors(back), read_tensors(pair.path))
    loaded, info = type(pair.theirs).from_pretrained(back, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    params = vlcache_jax.load(there).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, pair.ours.params))
    return loaded
