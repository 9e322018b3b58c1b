"""A tiny Qwen2.5-VL or Qwen3-VL: config.json, tokenizer, processor, made without a file."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import tiny_tokenizer
from vlcache_jax.models.qwen_vl.packing import PAD, PROCESSORS
from vlcache_jax.requests.packing import picture_processor
from vlcache_jax.requests.video_settings import VideoSettings

PATCH, TILE, WINDOW = 4, 8, 32
"""Sides in pixels."""

SPECIAL = ("<|vision_start|>", "<|vision_end|>", PAD, "<|video_pad|>", "<|im_start|>", "<|im_end|>")
IMAGE_ID, VIDEO_ID = 263, 264

# As Qwen2.5-VL's own, without its usual system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


QWEN_TEXT = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_TOWER = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
}


def qwen_json(family: str = "qwen2_5_vl", **text: Any) -> dict[str, Any]:
    """A config.json in transformers 5's spelling, with other fields of the decoder."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1]}
    tower: dict[str, Any] = {"window_size": WINDOW, "fullatt_block_indexes": [1, 3]}
    shape: dict[str, Any] = {}
    if family == "qwen3_vl":
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        tower = {"num_position_embeddings": 50, "deepstack_visual_indexes": [2, 0]}
        shape = {"head_dim": 16}
    return {
        "model_type": family,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "tie_word_embeddings": text.pop("tie_word_embeddings", False),
        "text_config": {
            "model_type": f"{family}_text",
            **QWEN_TEXT,
            **shape,
            "rope_parameters": rope,
            **text,
        },
        "vision_config": {
            "model_type": f"{family}_vision",
            **QWEN_TOWER,
            **tower,
            "out_hidden_size": text.get("hidden_size", 32),
        },
    }


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with the family's tokens: 267 ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_images(**settings: Any) -> Qwen2VLImageProcessorPil:
    """The image processor: pictures of 2 to 120 tiles."""
    size = {"shortest_edge": 2 * TILE * TILE, "longest_edge": 120 * TILE * TILE}
    usual: dict[str, Any] = {"size": size, "patch_size": PATCH, "merge_size": 2}
    return Qwen2VLImageProcessorPil(**usual | settings)


def video_settings(family: str) -> dict[str, Any]:
    """Of the video processor: every frame, of 2 to 12 tiles, Qwen3-VL's of 2 to 48 together."""
    most = 48 if family == "qwen3_vl" else 12
    return {
        "size": {"shortest_edge": 2 * TILE * TILE, "longest_edge": most * TILE * TILE},
        "patch_size": PATCH,
        "do_sample_frames": False,
    }


def qwen_processor(family: str = "qwen2_5_vl", **settings: Any) -> Any:
    """Both together, the image processor with other settings."""
    kind = picture_processor(PROCESSORS[family])
    processor = kind(qwen_images(**settings), qwen_tokenizer())
    processor.video_settings = VideoSettings(video_settings(family))
    return processor


def save_processor(path: Path, family: str) -> None:
    """Write the files of `qwen_processor` into a model directory."""
    qwen_images().save_pretrained(path)
    qwen_tokenizer().save_pretrained(path)
    settings = json.dumps(video_settings(family))
    (path / "video_preprocessor_config.json").write_text(settings)
