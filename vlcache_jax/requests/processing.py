"""Prompts and images to `ModelInputs`: everything that happens on the host before the model runs.

The Hugging Face processor of the checkpoint does the tokenising and the resizing (its PIL and numpy
backend: neither torch nor torchvision is needed), one prompt at a time; this module checks its
result, adds the index table of the visual tokens, and pads to the buckets. numpy only: no array is
put on a device here.
"""

import copy
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlcache_jax.errors import reason, short
from vlcache_jax.fields import REMOTE_CODE
from vlcache_jax.models.llava.anyres import NEWLINE, num_tiles, visual_rows
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.buckets import Buckets, bucket_for, default_buckets
from vlcache_jax.requests.detokenize import Detokenizer
from vlcache_jax.requests.images import ImageLike, Images, load_image, name_of
from vlcache_jax.requests.inputs import Array, ModelInputs
from vlcache_jax.requests.messages import ChatTemplate, Text, conversation, is_one, readable

CLEANED = 5
"""Last characters of a text that transformers' clean-up may still change: of " n ' t"."""


class _Row(NamedTuple):
    """One prompt before padding: its ids `[m]`, and of each image `visual_rows` and the tiles."""

    tokens: np.ndarray
    visual: list[np.ndarray]
    tiles: list[np.ndarray]


class Processor:
    """Makes `ModelInputs` of texts and images, and text of answers. Holds no state.

    Args:
        config: the model.
        processor: the checkpoint's `transformers` processor (`LlavaProcessor` or
            `LlavaNextProcessor`) with a PIL image processor. It is not changed.
        buckets: the sizes to pad to; None for `default_buckets(config)`.

    Attributes:
        tokenizer: the checkpoint's `transformers` tokenizer.
        image_processor: the checkpoint's `transformers` image processor.
        eos_token_id: the tokenizer's end-of-sequence id, if it has one.

    Raises:
        ValueError: the processor does not belong to the model.
    """

    def __init__(self, config: LlavaConfig, processor: Any, buckets: Buckets | None = None):
        self.config = config
        self.buckets = buckets or default_buckets(config)
        self._processor = copy.copy(processor)
        # Processors saved by old versions of transformers lack these three; the model knows them.
        self._processor.patch_size = config.vision.patch_size
        self._processor.vision_feature_select_strategy = "default"
        self._processor.num_additional_image_tokens = 1
        self.tokenizer: Any = self._processor.tokenizer
        self.image_processor: Any = self._processor.image_processor
        self.eos_token_id: int | None = self.tokenizer.eos_token_id
        self._mark = str(processor.image_token)
        self._template = ChatTemplate(self._processor, self._mark)
        token_id = self.tokenizer.convert_tokens_to_ids(self._mark)
        if token_id != config.image_token_id:
            raise ValueError(
                f"the tokenizer's id of {self._mark} is {token_id}, but the model's image_token_id "
                f"is {config.image_token_id}: correct image_token_index in config.json or use the "
                "tokenizer files of the same checkpoint"
            )
        if config.family == "llava_next":
            given = self.image_processor.image_grid_pinpoints
            pairs = given if isinstance(given, list | tuple) else ()
            if [tuple(p) if isinstance(p, list | tuple) else p for p in pairs] != [
                *config.grid_pinpoints
            ]:
                raise ValueError(
                    f"the processor's image_grid_pinpoints {short(repr(given))} differ from the "
                    f"model's {short(repr(config.grid_pinpoints))}: use the processor files of the "
                    "same checkpoint"
                )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, config: LlavaConfig, buckets: Buckets | None = None
    ) -> "Processor":
        """Read the processor and tokenizer files of a local model directory.

        Args:
            path: the directory.
            config: the model.
            buckets: the sizes to pad to; None for `default_buckets(config)`.

        Raises:
            FileNotFoundError: there is no such directory, or the files are not in it.
            ValueError: the files cannot be read, ask for remote code, or belong to another model.
        """
        # Imported here: it takes a second or more, which `vlcache --help` need not wait for.
        from transformers import LlavaNextProcessor, LlavaProcessor

        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no model directory at {path}: download the checkpoint first")
        for names in (
            ("tokenizer.json", "tokenizer.model"),
            ("processor_config.json", "preprocessor_config.json"),
        ):
            if not any((path / name).is_file() for name in names):
                raise FileNotFoundError(
                    f"no {' or '.join(names)} in {path}: copy the processor files of the "
                    "checkpoint there"
                )
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            file = path / name
            if file.is_file() and b'"auto_map"' in file.read_bytes():
                raise ValueError(f"{file} {REMOTE_CODE}")
        kind = LlavaNextProcessor if config.family == "llava_next" else LlavaProcessor
        try:
            processor = kind.from_pretrained(
                path, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the readers below raise anything, even plain Exception
            if not (path / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
                raise ValueError(
                    f"{path} has its tokenizer as tokenizer.model alone, which needs the package "
                    "sentencepiece: pip install 'vlcache-jax[sentencepiece]'"
                ) from None
            raise ValueError(
                f"the processor files in {short(path, 150)} cannot be read: {reason(error)}"
            ) from error
        return cls(config, processor, buckets)

    def decode(self, token_ids: Sequence[int] | Array) -> str:
        """Text of token ids `[n]`, special tokens left out: what a `detokenizer` makes of them."""
        return "".join(self.detokenizer().split(np.asarray(token_ids).ravel()))

    def detokenizer(
        self, stop: str | Sequence[str] = (), *, special_tokens: bool = False
    ) -> Detokenizer:
        """What makes the tokens of one answer text while they are drawn.

        Args:
            stop: a string that ends the text in front of it, or several.
            special_tokens: whether special tokens are written; left out by default.

        Raises:
            ValueError: a stop string is empty, or is no string.
        """
        tokenizer = self.tokenizer
        # transformers cleans up what some tokenizers decode, though not that of byte-pair ones.
        pairs = tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
        cleans = tokenizer.clean_up_tokenization_spaces and not pairs
        decode = partial(tokenizer.decode, skip_special_tokens=not special_tokens)
        return Detokenizer(decode, stop, lookahead=CLEANED if cleans else 0)

    def __call__(
        self,
        images: Images | Sequence[Images],
        text: Text | Sequence[Text],
        *,
        raw_prompt: bool = False,
    ) -> ModelInputs:
        """Make the inputs of a batch of prompts, padded to `buckets`; one alone is a batch of one.

        Args:
            images: for one prompt: None, an image or a list of images; for a list of prompts:
                None, or a list that holds one of these for each prompt (see `images.ImageLike`).
            text: one prompt or a list of them. A prompt is a string, what the user says, or a
                conversation: a list of `{"role": ..., "content": ...}` (see `messages.Messages`).
                `<image>` marks or `{"type": "image"}` parts say where the images go; without
                either they come first in the first user message. The checkpoint's chat template
                makes one text of it and may move the images (LLaVA-1.5's puts them first).
            raw_prompt: take a string as it is, with a mark for each image and no chat template.

        Raises:
            FileNotFoundError: an image file does not exist.
            ValueError: an image cannot be read, marks and images differ in number, a prompt is
                empty or longer than the model's positions, a message is malformed, or there is no
                chat template, or one that refuses the messages.
        """
        return self.groups(images, text, raw_prompt=raw_prompt)[0]

    def groups(
        self,
        images: Images | Sequence[Images],
        text: Text | Sequence[Text],
        size: int | None = None,
        *,
        raw_prompt: bool = False,
    ) -> list[ModelInputs]:
        """A batch of prompts as groups of equal shapes, so that one program serves them all.

        Args:
            images: for one prompt: None, an image or a list of images; for a list of prompts:
                None, or a list that holds one of these for each prompt.
            text: one prompt, a string or a list of messages, or a list of prompts.
            size: prompts of a group, all of them by default. The last group is filled up by
                repeating the last prompt.
            raw_prompt: take a string as it is, with a mark for each image and no chat template.

        Raises:
            FileNotFoundError: an image file does not exist.
            ValueError: `size` is below 1, an image cannot be read, or a prompt is refused.
        """
        if size is not None and size < 1:
            raise ValueError(f"groups of {size} prompts: at least 1")
        rows = [self._row(*row, raw_prompt=raw_prompt) for row in _pair(images, text)]
        size = min(size or len(rows), len(rows))
        groups = [rows[at : at + size] for at in range(0, len(rows), size)]
        groups[-1] += [rows[-1]] * (size - len(groups[-1]))
        counts = [sum(len(tiles) for row in group for tiles in row.tiles) for group in groups]
        t = bucket_for(max(row.tokens.size for row in rows), self.buckets.prompt)
        s = bucket_for(max(counts), self.buckets.tiles)
        return [self._pad(group, t, s) for group in groups]

    def _row(self, images: list[ImageLike], text: Text, *, raw_prompt: bool) -> _Row:
        prompt = self._render(text, len(images), raw_prompt)  # cheap errors before slow images
        pictures = [self._load(image) for image in images]
        bos = self.tokenizer.bos_token
        try:
            encoded = self._processor(
                images=pictures or None,
                text=prompt,
                add_special_tokens=not (bos and prompt.startswith(bos)),
                padding=False,  # a tokenizer may have been saved with either
                truncation=False,
                return_tensors="np",
            )
        except Exception as error:  # settings of any kind may stand in the processor's files
            raise ValueError(
                f"the checkpoint's processor cannot prepare the prompt ({reason(error)}): use the "
                "processor files of the checkpoint that transformers loads"
            ) from error
        sizes = [(picture.height, picture.width) for picture in pictures]
        pixels = encoded.get("pixel_values", ())  # of each image [3, H, W], or NeXT's [tiles, ...]
        row = _Row(
            np.asarray(encoded["input_ids"][0], np.int32),
            [visual_rows(size, self.config) for size in sizes],
            [
                image.reshape(-1, *image.shape[-3:])[: num_tiles(size, self.config)]
                for image, size in zip(pixels, sizes, strict=True)
            ],
        )
        self._check(row, sizes)
        return row

    def _render(self, text: Text, num_images: int, raw_prompt: bool) -> str:
        """The prompt with one mark per image, chat template applied."""
        if not raw_prompt:
            return self._template.render(text, num_images)
        if not isinstance(text, str):
            raise ValueError("raw_prompt takes a string, not messages: leave one of them out")
        conversation(text, num_images, self._mark, True)
        return readable(text)

    def _load(self, source: ImageLike) -> Image.Image:
        """An image, within Pillow's limit even when LLaVA-1.5's processor has enlarged it."""
        picture, limit = load_image(source), Image.MAX_IMAGE_PIXELS
        if self.config.family == "llava" and limit is not None:
            narrow, long = sorted(picture.size)
            pixels = long * long if self.image_processor.do_pad else 0
            pixels = max(pixels, self.config.vision.image_size**2 * long // narrow)
            if pixels > limit:
                raise ValueError(
                    f"{name_of(source)} of {picture.width} x {picture.height} pixels is too thin: "
                    f"resizing it would take {pixels} pixels, more than Pillow's limit of {limit}; "
                    "crop it"
                )
        return picture

    def _check(self, row: _Row, sizes: list[tuple[int, int]]) -> None:
        """Refuse what was made of images of these (height, width) if the model cannot take it."""
        config, tokens, limit = self.config, row.tokens, self.config.text.max_positions
        is_image, visual = tokens == config.image_token_id, sum(map(len, row.visual))
        if (made := np.count_nonzero(is_image)) != visual:
            raise ValueError(
                f"the processor made {made} image tokens of images of (height, width) {sizes}, but "
                f"the model has {visual}: use the processor files of the same checkpoint"
            )
        if not tokens.size:
            raise ValueError("the prompt has no tokens: give a longer text")
        if tokens.size > limit:
            raise ValueError(
                f"the prompt has {tokens.size} tokens ({visual} of them visual), more than the "
                f"model's {limit} positions: shorten the text or give fewer images"
            )
        highest = int(tokens[~is_image].max(initial=0))
        if highest >= config.text.vocab_size:
            raise ValueError(
                f"the tokenizer gave id {highest}, but the model's vocabulary has "
                f"{config.text.vocab_size} entries: use the tokenizer files of the same checkpoint"
            )
        side = config.vision.image_size
        if row.tiles and row.tiles[0].shape[1:] != (3, side, side):
            raise ValueError(
                f"the processor made tiles of shape {row.tiles[0].shape[1:]}, but the model's "
                f"image_size is {side}: use the processor files of the same checkpoint"
            )

    def _pad(self, rows: list[_Row], t: int, s: int) -> ModelInputs:
        """The rows as arrays of T prompt rows and S tiles."""
        side, patches = self.config.vision.image_size, self.config.vision.num_patches
        tokens = np.zeros((len(rows), t), np.int32)
        visual_index = np.full((len(rows), t), -1, np.int32)
        tiles = np.zeros((s, 3, side, side), np.float32)
        first = 0
        for b, row in enumerate(rows):
            tokens[b, : row.tokens.size] = row.tokens
            order = []
            for visual, pixels in zip(row.visual, row.tiles, strict=True):
                order.append(np.where(visual == NEWLINE, s * patches, visual + first * patches))
                tiles[first : first + len(pixels)] = pixels
                first += len(pixels)
            if order:
                is_image = np.flatnonzero(row.tokens == self.config.image_token_id)
                visual_index[b, is_image] = np.concatenate(order)
        length = np.array([row.tokens.size for row in rows], np.int32)
        return ModelInputs(tokens=tokens, length=length, visual_index=visual_index, tiles=tiles)


def _pair(images: Images | Sequence[Images], text: Any) -> list[tuple[list[ImageLike], Text]]:
    """One (images, text) per prompt of the batch."""
    if is_one(text):
        return [(_as_list(images), text)]
    if not isinstance(text, list | tuple) or not text or not all(map(is_one, text)):
        raise ValueError(
            "text must be a string, a list of messages (mappings), or a non-empty list of these, "
            f"not {short(text)}"
        )
    per_row = [None] * len(text) if images is None else _as_list(images)
    if len(per_row) != len(text):
        raise ValueError(
            f"{len(text)} texts but {len(per_row)} entries in images: give a list with one entry "
            "for each text (None, an image or a list of images)"
        )
    return [(_as_list(entry), prompt) for entry, prompt in zip(per_row, text, strict=True)]


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
