"""The small LLaVA that the project trains: its shape, tokenizer, processor, and its files.

It is LLaVA-NeXT in every respect but size: a CLIP-like tower, a projector, a Llama-like decoder
with grouped heads, in Hugging Face's format, loaded by the same code as the published models.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vlcache_jax.checkpoints.safetensors_writer import write_tensors
from vlcache_jax.checkpoints.weights import parameter_name, parse_dtype, split, tensors_of
from vlcache_jax.files import whole_directory
from vlcache_jax.models.families import Params
from vlcache_jax.models.llava.names import LLAVA

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
IMAGE_TOKEN_ID = SPECIAL_TOKENS.index("<image>")
TILE = 112
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
)
PATCH = 14


class Dialogue(NamedTuple):
    """How a chat is written, as `CHAT_TEMPLATE` does it.

    Attributes:
        user: in front of what the user says.
        assistant: behind it, in front of the answer.
        end: the token that ends an answer.
        between: behind that, in front of the next turn.
    """

    user: str
    assistant: str
    end: str
    between: str


DIALOGUE = Dialogue("[INST] ", " [/INST]", "</s>", "")
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def make_tokenizer(corpus: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer learned from a corpus: any text can be written with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    unk, bos, eos, pad, image = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, SPECIAL_TOKENS.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[image],
    )


def make_processor(
    tokenizer: Any,
    pinpoints: list[list[int]],
    *,
    tile: int = TILE,
    template: str = CHAT_TEMPLATE,
    **options: Any,
) -> Any:
    """The processor of a LLaVA-NeXT with tiles of so many pixels and a chat template."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        **options,
    )


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
    """Write a Hugging Face checkpoint in a type, whole or not at all; replaces an old one.

    `config` is of `config_json`, and `files` is the processor.
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
