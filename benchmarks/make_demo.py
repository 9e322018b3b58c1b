"""Make the checkpoint and the picture that the package ships: `python -m benchmarks.make_demo`.

LLaVA-NeXT in shape, tiny in size, with random weights of a fixed seed, written by transformers'
own classes. Running it again gives the same files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw

from vlcache_jax import demo

IMAGE_TOKEN_ID = 4
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
TILE = 112
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE],
             [TILE, 3 * TILE]]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
)
CORPUS = [
    "What is in the picture? Where is the red circle? The red circle is left of the blue square.",
    "How many green triangles are there? There are three yellow stars above the white line.",
    "What is the largest number in the table? Which word stands in the second row?",
    "[INST] Describe the picture. [/INST] A small house with a tree, the sun and a grey cloud.",
]


def make_picture() -> Image.Image:
    """A house, a tree and the sun, 320 x 240 pixels."""
    picture = Image.new("RGB", (320, 240), "#bfe3ff")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 170, 320, 240), fill="#7cb85c")
    draw.ellipse((240, 20, 295, 75), fill="#ffd23f")
    draw.rectangle((60, 110, 160, 190), fill="#e8d3b0", outline="#5b4636", width=3)
    draw.polygon(((50, 110), (110, 60), (170, 110)), fill="#c0392b")
    draw.rectangle((98, 145, 122, 190), fill="#5b4636")
    draw.rectangle((222, 130, 236, 195), fill="#6b4a2b")
    draw.ellipse((195, 80, 263, 145), fill="#2e7d32")
    return picture


def make_tokenizer(corpus: Sequence[str] = CORPUS, size: int = 512) -> Any:
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


def make_processor(tokenizer: Any, pinpoints: list[list[int]]) -> Any:
    """The processor of a model with tiles of `TILE` pixels."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=pinpoints,
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(seed: int) -> Any:
    """The demo model in bfloat16, with weights large enough for answers to depend on the input."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        MistralConfig,
    )

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=TILE,
        patch_size=14,
        initializer_range=0.3,
    )
    text = MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=0.3,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(TILE // 14) ** 2,
    )
    torch.manual_seed(seed)
    model: Any = LlavaNextForConditionalGeneration(config)
    return model.to(torch.bfloat16).eval()


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = demo.CHECKPOINT.parent,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 3,
) -> None:
    """Write the demo checkpoint and its picture, replacing those that are there."""
    checkpoint = out / demo.CHECKPOINT.name
    make_model(seed).save_pretrained(checkpoint)
    make_processor(make_tokenizer(), PINPOINTS).save_pretrained(checkpoint)
    make_picture().save(out / demo.IMAGE.name, optimize=True)


if __name__ == "__main__":
    typer.run(main)
