"""Tiny pictures, tokenizers, processors and configurations, made on the spot without a file."""

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from vlcache_jax.models.config import TextConfig
from vlcache_jax.models.llava.config import LlavaConfig, VisionConfig
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.requests.packing import picture_processor

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
IMAGE_TOKEN_ID = SPECIAL_TOKENS.index("<image>")
VIDEO_TOKEN_ID = 261  # of LLaVA-OneVision alone, behind the others
IMAGE_SIZE, PATCH_SIZE = 56, 14

# Content parts in the order given, as the templates of Mistral-like checkpoints could.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# All images first, then all text, as the template of the LLaVA-1.5 checkpoints does.
IMAGES_FIRST_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# Contents as strings, as the templates of text models have it.
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiny_pinpoints(
    image_size: int = IMAGE_SIZE, family: str = "llava_next"
) -> tuple[tuple[int, int], ...]:
    """The usual resolutions of a family with anyres, for tiles of `image_size`."""
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    if family == "llava_onevision":
        grids = tuple((down, across) for down in range(1, 7) for across in range(1, 7))
    return tuple((down * image_size, across * image_size) for down, across in grids)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte after the special ones: 261 ids; `<s>` is put before a text."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def text_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with a chat template of its own, as a decoder alone has it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    return tokenizer


def tiny_processor(
    family: str,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
    pinpoints: tuple[tuple[int, int], ...] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Any:
    """A `transformers` processor of one of the LLaVA families around `tiny_tokenizer`."""
    grids = [list(pair) for pair in pinpoints or tiny_pinpoints(image_size, family)]
    crop_size = {"height": image_size, "width": image_size}
    if family == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size=crop_size, image_grid_pinpoints=grids)
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
        processor = picture_processor("LlavaOnevisionProcessor")(images, tokenizer, chat_template)
        processor.num_image_tokens = (image_size // patch_size) ** 2
        processor.vision_feature_select_strategy = "full"
        return processor
    size = {"shortest_edge": image_size}
    kwargs = {
        "tokenizer": tiny_tokenizer(),
        "patch_size": patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": chat_template,
    }
    if family == "llava":
        image_processor = CLIPImageProcessorPil(size=size, crop_size=crop_size)
        return LlavaProcessor(image_processor=image_processor, **kwargs)
    if family != "llava_next":
        raise ValueError(f"{family=} must be 'llava', 'llava_next' or 'llava_onevision'")
    image_processor = LlavaNextImageProcessorPil(
        size=size, crop_size=crop_size, image_grid_pinpoints=grids
    )
    return LlavaNextProcessor(image_processor=image_processor, **kwargs)


def tiny_config(
    family: str,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
    max_positions: int = 4096,
    pinpoints: tuple[tuple[int, int], ...] | None = None,
    **more: Any,
) -> Any:
    """A model's configuration that `tiny_processor` of the same arguments belongs to."""
    onevision = family == "llava_onevision"
    more = {"video_token_id": VIDEO_TOKEN_ID} | more if onevision else more
    grids = () if family == "llava" else pinpoints or tiny_pinpoints(image_size, family)
    return (OnevisionConfig if onevision else LlavaConfig)(
        family=family,
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            tower="siglip" if onevision else "clip",
        ),
        text=TextConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_positions=max_positions,
        ),
        image_token_id=IMAGE_TOKEN_ID,
        vision_layers=1,
        grid_pinpoints=grids,
        **more,
    )
