"""Prompts and images to `ModelInputs`: everything that happens on the host before the model runs.

One prompt at a time becomes a row, by the family's packing; rows are padded to the buckets here.
numpy only: no array is put on a device.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vlcache_jax.errors import short, whole_number
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
    refuse_others,
)
from vlcache_jax.requests.packing import NEWLINE, Patches, Rendered, Row, Shown
from vlcache_jax.requests.videos import Clip, VideoLike, Videos, as_videos

Contexts: TypeAlias = str | Sequence[str | None] | None
"""What one prompt is about, or each of a list of them."""

CLEANED = 5
"""Last characters of a text that transformers' clean-up may still change: of " n ' t"."""

DECODED = 2**14
"""Tokens, by themselves or with the one in front, whose text is remembered: a decoder takes tens of
microseconds for each, which the slots of a batch would wait for."""


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
        # A detokenizer decodes one or two tokens at a time: most answers have the same ones.
        self._decode = lru_cache(DECODED)(self._decoded)

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
        self, stop: str | Sequence[str] = (), *, least: int = 0, special_tokens: bool = False
    ) -> Detokenizer:
        """What makes the tokens of one answer text while they are drawn.

        Args:
            stop: a string that ends the text in front of it, or several.
            least: tokens before which no such string is looked for.
            special_tokens: whether special tokens are written; left out by default.

        Raises:
            ValueError: a stop string is empty, or is no string.
        """
        tokenizer = self.tokenizer
        # transformers cleans up what some tokenizers decode, though not that of byte-pair ones.
        pairs = tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
        cleans = tokenizer.clean_up_tokenization_spaces and not pairs
        lookahead = CLEANED if cleans else 0
        return Detokenizer(
            lambda tokens: self._decode(tuple(tokens), special_tokens),
            stop,
            least=least,
            lookahead=lookahead,
        )

    def _decoded(self, tokens: tuple[int, ...], special_tokens: bool) -> str:
        """What the tokenizer makes of tokens by themselves."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=not special_tokens)

    def __call__(
        self,
        images: Images | Sequence[Images],
        text: Text | Sequence[Text],
        *,
        videos: Videos | Sequence[Videos] = None,
        frames: int | None = None,
        context: Contexts = None,
        raw_prompt: bool = False,
    ) -> ModelInputs:
        """Make the inputs of a batch of prompts, padded to `buckets`; one alone is a batch of one.

        Args:
            images: for one prompt: None, an image or a list of images; for a list of prompts:
                None, or a list that holds one of these for each prompt (see `images.ImageLike`).
            text: one prompt or a list of them. A prompt is a string, what the user says, or a
                conversation: a list of `{"role": ..., "content": ...}` (see `messages.Messages`).
                `<image>` and `<video>` marks, or `{"type": "image"}` and `{"type": "video"}` parts,
                say where images and videos go; without either they come first in the first user
                message, images in front. The checkpoint's chat template makes one text of it and
                may move them (LLaVA-1.5's puts images first).
            videos: as `images` (see `videos.Videos`).
            frames: how many frames of each video the model is shown; None for what the
                checkpoint's processor says.
            context: what a prompt is about where that is a text, put in front of the question with
                a blank line between; for a list of prompts a list with one entry for each.
            raw_prompt: take a string as it is, with a mark for each image and no chat template; a
                context comes directly in front of it.

        Raises:
            FileNotFoundError: a file of an image or a video does not exist.
            ValueError: an image or a video cannot be read, marks and images differ in number, a
                prompt is empty or longer than the model's positions, a message is malformed, or
                there is no chat template, or one that refuses the messages.
        """
        return self.groups(
            images, text, videos=videos, frames=frames, context=context, raw_prompt=raw_prompt
        )[0]

    def groups(
        self,
        images: Images | Sequence[Images],
        text: Text | Sequence[Text],
        size: int | None = None,
        *,
        videos: Videos | Sequence[Videos] = None,
        frames: int | None = None,
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
            videos: as `images`.
            frames: how many frames of each video the model is shown.
            context: what each prompt is about, where that is a text.
            raw_prompt: take a string as it is, with a mark for each image and no chat template.

        Raises:
            FileNotFoundError: a file of an image or a video does not exist.
            ValueError: `size` is below 1, an image or a video cannot be read, or a prompt is
                refused.
        """
        if size is not None and size < 1:
            raise ValueError(f"groups of {size} prompts: at least 1")
        asked = _pair(images, text, videos, context)
        if frames is not None and not any(row.videos for row in asked):
            raise ValueError(f"{frames=} but no videos: give videos, or leave frames out")
        rows = [self._row(row, frames, raw_prompt) for row in asked]
        size = min(size or len(rows), len(rows))
        groups = [rows[at : at + size] for at in range(0, len(rows), size)]
        groups[-1] += [rows[-1]] * (size - len(groups[-1]))
        counts = [sum(map(_tiles, group)) for group in groups]
        t = max(self.buckets.rows_for(row.tokens.size, _tiles(row)) for row in rows)
        s = self.buckets.tiles_for(max(counts), t, size)
        side = self.config.tile_side
        made = (tiles.shape[1:] for row in rows for tiles in row.tiles)
        # Where a tile of one spans frames, those of all do.
        tile = max(made, key=len, default=(3, side, side))
        return [self._pad(group, t, (s, *tile)) for group in groups]

    def show(self, images: Images, videos: Videos = None, frames: int | None = None) -> Shown:
        """The pictures and videos of one prompt, made ready: to be given as `images`, many times.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: an image or a video cannot be read, or the model takes none.
        """
        pictures = _as_list(images)
        refuse_others({"image": len(pictures)}, self._packing.marks)
        return self._packing.show(pictures, self.clips(videos, frames))

    def clips(self, videos: Videos, frames: int | None = None) -> list[Clip]:
        """The frames of one prompt's videos that the model is shown; a `Clip` is a video, too.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: the model takes no videos, one cannot be read, is too long, or has fewer
                frames.
        """
        count = None if frames is None else whole_number(frames, "frames", 1)
        return [self._packing.clip(video, count) for video in as_videos(videos)]

    def patches(self, sizes: Sequence[tuple[int, int]]) -> list[Patches]:
        """Which pixels the visual tokens of each of a prompt's pictures show: `Packing.patches`."""
        return self._packing.patches(sizes)

    def frame_patches(self, clip: Clip) -> list[Patches]:
        """Which pixels the visual tokens of a video show: `Packing.frame_patches`."""
        return self._packing.frame_patches(clip)

    def is_video(self, tokens: Array) -> Array:
        """Which of a prompt's ids [m] are a video's, bool [m]."""
        return tokens == self._packing.video_mark_id

    def render(self, text: Text, num_images: int = 0, num_videos: int = 0) -> str:
        """A prompt as the checkpoint's chat template writes it, with a mark for each image.

        Raises:
            ValueError: as of `groups`.
        """
        return self._render(text, {"image": num_images, "video": num_videos}, None, False).text

    def _row(self, asked: "Asked", frames: int | None, raw_prompt: bool) -> Row:
        # Cheap errors of the text before slow images.
        given = [each for each in asked.images if isinstance(each, Shown)]
        if given and len(asked.images) + len(asked.videos) > 1:
            raise ValueError("pictures that were made ready are all that a prompt has")
        counts = {"image": len(asked.images), "video": len(asked.videos)}
        if given:
            counts = given[0].counts
        prompt = self._render(asked.text, counts, asked.context, raw_prompt)
        shown = given[0] if given else self.show(asked.images, asked.videos, frames)
        return self._packing.row(shown, prompt)

    def _render(
        self, text: Text, counts: dict[str, int], context: str | None, raw_prompt: bool
    ) -> Rendered:
        """The prompt with one mark per image and video, chat template applied."""
        if not raw_prompt:
            return self._template.render(text, counts, context)
        if not isinstance(text, str):
            raise ValueError("raw_prompt takes a string, not messages: leave one of them out")
        marks = self._packing.marks
        conversation(text, counts, marks, True, context=context)
        before = readable(context or "")
        return Rendered(before + marked(readable(text), marks), (0, len(before)))

    def _pad(self, rows: list[Row], t: int, shape: tuple[int, ...]) -> ModelInputs:
        """The rows as arrays of T prompt rows and tiles of a shape [S, ...]."""
        s, patches = shape[0], self.config.tile_tokens
        tokens = np.zeros((len(rows), t), np.int32)
        visual_index = np.full((len(rows), t), -1, np.int32)
        tiles = np.zeros(shape, np.float32)
        positions = None if rows[0].positions is None else np.zeros((3, *tokens.shape), np.int32)
        interpolation = None
        if s and (neighbours := self._packing.neighbours):
            sums = (*tokens.shape, neighbours)
            interpolation = Interpolation(np.zeros(sums, np.int32), np.zeros(sums, np.float32))
        first = 0
        for b, row in enumerate(rows):
            tokens[b, : row.tokens.size] = row.tokens
            visual_index[b, row.context] = CONTEXT
            if positions is not None and row.positions is not None:
                positions[:, b, : row.tokens.size] = row.positions
            order = []
            for visual, pixels in zip(row.visual, row.tiles, strict=True):
                order.append(np.where(visual == NEWLINE, s * patches, visual + first * patches))
                # All frames of a picture are alike.
                own = pixels[:, None] if pixels.ndim < tiles.ndim else pixels
                tiles[first : first + len(pixels)] = own
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


class Asked(NamedTuple):
    """One prompt of a batch."""

    images: list[ImageLike]
    text: Text
    videos: list[VideoLike]
    context: str | None


def _pair(
    images: Images | Sequence[Images],
    text: Any,
    videos: Videos | Sequence[Videos],
    context: Contexts,
) -> list[Asked]:
    """What belongs to each prompt of the batch."""
    if is_one(text):
        return [Asked(_as_list(images), text, as_videos(videos), _context(context))]
    if not isinstance(text, list | tuple) or not text or not all(map(is_one, text)):
        raise ValueError(
            "text must be a string, a list of messages (mappings), or a non-empty list of these, "
            f"not {short(text)}"
        )
    given = {"images": images, "videos": videos, "context": context}
    kinds = {
        "images": "None, an image or a list of images",
        "videos": "None, a video or a list of videos",
        "context": "None or a text",
    }
    own = {}
    for name, entries in given.items():
        own[name] = [None] * len(text) if entries is None else _as_list(entries)
        if (count := len(own[name])) != len(text):
            raise ValueError(
                f"{len(text)} texts but {count} entries in {name}: give a list with one entry "
                f"for each text ({kinds[name]})"
            )
    rows = zip(own["images"], text, own["videos"], own["context"], strict=True)
    return [
        Asked(_as_list(pictures), words, as_videos(films), _context(about))
        for pictures, words, films, about in rows
    ]


def _context(given: Any) -> str | None:
    """The context of one prompt."""
    if given is None or isinstance(given, str):
        return given
    raise ValueError(f"a context must be a string, not {short(given)}: read a file before")


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
