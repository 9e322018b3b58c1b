"""Prompts and images to `ModelInputs`: everything that happens on the host before the model runs.

One prompt at a time becomes a row, by the family's packing; rows are padded to the buckets here.
numpy only: no array is put on a device.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from vlcache_jax.errors import short
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.families import family_of
from vlcache_jax.requests.buckets import Buckets, default_buckets
from vlcache_jax.requests.detokenize import Detokenizer
from vlcache_jax.requests.images import ImageLike, Images
from vlcache_jax.requests.inputs import CONTEXT, Array, Interpolation, ModelInputs
from vlcache_jax.requests.messages import (
    ChatTemplate,
    Text,
    conversation,
    is_one,
    marked,
    readable,
)
from vlcache_jax.requests.packing import NEWLINE, Patches, Rendered, Row

Contexts: TypeAlias = str | Sequence[str | None] | None
"""What one prompt is about, or each of a list of them."""

CLEANED = 5
"""Last characters of a text that transformers' clean-up may still change: of " n ' t"."""


class Processor:
    """Makes `ModelInputs` of texts and images, and text of answers. Holds no state.

    Args:
        config: the model.
        processor: the checkpoint's `transformers` processor (`LlavaProcessor` or
            another of `models.families`) with a PIL image processor; of a decoder alone its
            tokenizer. It is not changed.
        buckets: the sizes to pad to; None for `default_buckets(config)`.

    Attributes:
        tokenizer: the checkpoint's `transformers` tokenizer.
        image_processor: the checkpoint's `transformers` image processor, None without pictures.
        eos_token_id: the tokenizer's end-of-sequence id, if it has one.

    Raises:
        ValueError: the processor does not belong to the model.
    """

    def __init__(self, config: ModelConfig, processor: Any, buckets: Buckets | None = None):
        self.config = config
        self.buckets = buckets or default_buckets(config)
        self._packing = family_of(config).packing(config, processor)
        self.tokenizer = self._packing.tokenizer
        self.image_processor = self._packing.image_processor
        self.eos_token_id: int | None = self.tokenizer.eos_token_id
        self._template = ChatTemplate(self._packing)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, config: ModelConfig, buckets: Buckets | None = None
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
        return cls(config, family_of(config).packing.read(Path(path), config), buckets)

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
        context: Contexts = None,
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
            context: what a prompt is about where that is a text, put in front of the question with
                a blank line between; for a list of prompts a list with one entry for each.
            raw_prompt: take a string as it is, with a mark for each image and no chat template; a
                context comes directly in front of it.

        Raises:
            FileNotFoundError: an image file does not exist.
            ValueError: an image cannot be read, marks and images differ in number, a prompt is
                empty or longer than the model's positions, a message is malformed, or there is no
                chat template, or one that refuses the messages.
        """
        return self.groups(images, text, context=context, raw_prompt=raw_prompt)[0]

    def groups(
        self,
        images: Images | Sequence[Images],
        text: Text | Sequence[Text],
        size: int | None = None,
        *,
        context: Contexts = None,
        raw_prompt: bool = False,
    ) -> list[ModelInputs]:
        """A batch of prompts as groups of equal shapes, so that one program serves them all.

        Args:
            images: for one prompt: None, an image or a list of images; for a list of prompts:
                None, or a list that holds one of these for each prompt.
            text: one prompt, a string or a list of messages, or a list of prompts.
            size: prompts of a group, all of them by default. The last group is filled up by
                repeating the last prompt.
            context: what each prompt is about, where that is a text.
            raw_prompt: take a string as it is, with a mark for each image and no chat template.

        Raises:
            FileNotFoundError: an image file does not exist.
            ValueError: `size` is below 1, an image cannot be read, or a prompt is refused.
        """
        if size is not None and size < 1:
            raise ValueError(f"groups of {size} prompts: at least 1")
        asked = _pair(images, text, context)
        rows = [self._row(*row, raw_prompt=raw_prompt) for row in asked]
        size = min(size or len(rows), len(rows))
        groups = [rows[at : at + size] for at in range(0, len(rows), size)]
        groups[-1] += [rows[-1]] * (size - len(groups[-1]))
        counts = [sum(map(_tiles, group)) for group in groups]
        t = max(self.buckets.rows_for(row.tokens.size, _tiles(row)) for row in rows)
        s = self.buckets.tiles_for(max(counts), t, size)
        return [self._pad(group, t, s) for group in groups]

    def patches(self, sizes: Sequence[tuple[int, int]]) -> list[Patches]:
        """Which pixels the visual tokens of each of a prompt's pictures show: `Packing.patches`."""
        return self._packing.patches(sizes)

    def render(self, text: Text, num_images: int = 0) -> str:
        """A prompt as the checkpoint's chat template writes it, with a mark for each image.

        Raises:
            ValueError: as of `groups`.
        """
        return self._render(text, num_images, None, False).text

    def _row(
        self, images: list[ImageLike], text: Text, context: str | None, *, raw_prompt: bool
    ) -> Row:
        # Cheap errors of the text before slow images.
        return self._packing.row(images, self._render(text, len(images), context, raw_prompt))

    def _render(
        self, text: Text, num_images: int, context: str | None, raw_prompt: bool
    ) -> Rendered:
        """The prompt with one mark per image, chat template applied."""
        if not raw_prompt:
            return self._template.render(text, num_images, context)
        if not isinstance(text, str):
            raise ValueError("raw_prompt takes a string, not messages: leave one of them out")
        conversation(text, num_images, self._packing.mark, True, context=context)
        before = readable(context or "")
        return Rendered(before + marked(readable(text), self._packing.mark), (0, len(before)))

    def _pad(self, rows: list[Row], t: int, s: int) -> ModelInputs:
        """The rows as arrays of T prompt rows and S tiles."""
        side, patches = self.config.tile_side, self.config.tile_tokens
        tokens = np.zeros((len(rows), t), np.int32)
        visual_index = np.full((len(rows), t), -1, np.int32)
        tiles = np.zeros((s, 3, side, side), np.float32)
        positions = None if rows[0].positions is None else np.zeros((3, *tokens.shape), np.int32)
        interpolation, shape = None, (len(rows), t, self._packing.neighbours)
        if s and self._packing.neighbours:
            interpolation = Interpolation(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        first = 0
        for b, row in enumerate(rows):
            tokens[b, : row.tokens.size] = row.tokens
            visual_index[b, row.context] = CONTEXT
            if positions is not None and row.positions is not None:
                positions[:, b, : row.tokens.size] = row.positions
            order = []
            for visual, pixels in zip(row.visual, row.tiles, strict=True):
                order.append(np.where(visual == NEWLINE, s * patches, visual + first * patches))
                tiles[first : first + len(pixels)] = pixels
                first += len(pixels)
            if order:
                found = np.concatenate(order).reshape(row.places.size, -1)
                visual_index[b, row.places] = found[:, 0]
                if interpolation is not None:
                    interpolation.rows[b, row.places] = found
                    interpolation.weights[b, row.places] = np.concatenate(row.weights)
        length = np.array([row.tokens.size for row in rows], np.int32)
        layout = _layout(rows, s) if s and self._packing.has_layout else None
        return ModelInputs(tokens, length, visual_index, tiles, positions, interpolation, layout)


def _tiles(row: Row) -> int:
    """How many tiles a row has."""
    return sum(map(len, row.tiles))


def _layout(rows: list[Row], s: int) -> np.ndarray:
    """`ModelInputs.layout` of the rows, for S tiles."""
    layout, windows, first = np.full((s, 4), -1, np.int32), 0, 0
    for picture, places in enumerate(places for row in rows for places in row.layout):
        own = layout[first : first + len(places)]
        own[:, 0], own[:, 1:] = picture, places
        own[:, 1] += windows
        first, windows = first + len(places), windows + places[-1, 0] + 1
    return layout


def _pair(
    images: Images | Sequence[Images], text: Any, context: Contexts
) -> list[tuple[list[ImageLike], Text, str | None]]:
    """One (images, text, context) per prompt of the batch."""
    if is_one(text):
        return [(_as_list(images), text, _context(context))]
    if not isinstance(text, list | tuple) or not text or not all(map(is_one, text)):
        raise ValueError(
            "text must be a string, a list of messages (mappings), or a non-empty list of these, "
            f"not {short(text)}"
        )
    entries = {"images": images, "context": context}
    for name, given in entries.items():
        entries[name] = [None] * len(text) if given is None else _as_list(given)
        if (count := len(entries[name])) != len(text):
            kinds = "None, an image or a list of images" if name == "images" else "None or a text"
            raise ValueError(
                f"{len(text)} texts but {count} entries in {name}: give a list with one entry "
                f"for each text ({kinds})"
            )
    own = zip(
        map(_as_list, entries["images"]), text, map(_context, entries["context"]), strict=True
    )
    return list(own)


def _context(given: Any) -> str | None:
    """The context of one prompt."""
    if given is None or isinstance(given, str):
        return given
    raise ValueError(f"a context must be a string, not {short(given)}: read a file before")


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
