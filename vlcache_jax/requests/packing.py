"""Packing: one prompt as token ids, and where its pictures' tokens stand among them.

`Packing` is that of a decoder alone, which takes text; a family that takes pictures has its own.
Both ask a Hugging Face tokenizer or processor, and check what it gives. numpy only.

A mark of a prompt stands for a `Segment`: a picture, or a video, whose frames are pictures that
follow each other. Behind the packing there are only pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from vlcache_jax.errors import reason, short
from vlcache_jax.fields import REMOTE_CODE
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.requests.images import ImageLike
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import Clip, Shape, VideoLike

NEWLINE = -2
"""Among a picture's rows of the visual table: the row behind those of all tiles."""

NO_VIDEOS = (
    "the model takes no videos: give frames of them as images, or take a LLaVA-OneVision, a "
    "Qwen2.5-VL or a Qwen3-VL"
)
"""What is said where a video is given to a family without them."""

BASE, GRID, NEWLINE_PART = 0, 1, 2
"""Parts of a picture's visual tokens: its base tile, the tiles of its grid, ends of lines."""


class Patches(NamedTuple):
    """Where the n visual tokens of one picture lie, in the decoder's order.

    Attributes:
        rectangles: (left, top, right, bottom) in pixels of the picture, clipped to it, float64
            [n, 4]. NaN for a newline; of no area where a patch shows padding alone.
        part: `BASE`, `GRID` or `NEWLINE_PART`, int8 [n].
    """

    rectangles: np.ndarray
    part: np.ndarray


class Rendered(NamedTuple):
    """A whole prompt.

    Attributes:
        text: as the tokenizer gets it, with a mark for each picture and video.
        context: the first character of the context in it, and the one behind its last.
    """

    text: str
    context: tuple[int, int] = (0, 0)


class Segment(NamedTuple):
    """What stands at one mark of a prompt: a picture, or those that a video becomes.

    Attributes:
        visual: for each picture, the rows of the visual table that its tokens are, int `[n]`,
            counted from its first tile's; `NEWLINE` for the row behind all tiles. `[n, C]` where a
            token is a weighted sum of C rows.
        tiles: for each picture its tiles, float32 `[tiles, 3, side, side]`, or
            `[tiles, frames, 3, side, side]` where a tile spans frames.
        weights: for each picture those of its rows, float32 `[n, C]`; none where a token is one
            row.
        layout: for each picture the window, row and column of each of its tiles, int32
            `[tiles, 3]`, windows counted from 0; of families that have a layout.
    """

    visual: Sequence[np.ndarray] = ()
    tiles: Sequence[np.ndarray] = ()
    weights: Sequence[np.ndarray] = ()
    layout: Sequence[np.ndarray] = ()

    @property
    def count(self) -> int:
        """Its visual tokens."""
        return sum(map(len, self.visual))


@dataclass(frozen=True)
class Shown:
    """The pictures and videos of a prompt, made ready for any prompt with as many marks.

    Attributes:
        pictures: what stands at the mark of each picture, by the family's packing.
        films: the same of what each video becomes.
        clips: the frames of each video.
    """

    pictures: Sequence[Any] = ()
    films: Sequence[Any] = ()
    clips: Sequence[Clip] = ()

    @property
    def without_pixels(self) -> "Shown":
        """The same, of no more bytes than their shapes: where they were looked at before."""

        def blank(part: Any) -> Any:
            if isinstance(part, Segment):
                tiles = [np.broadcast_to(np.float32(0), tile.shape) for tile in part.tiles]
                return part._replace(tiles=tiles)
            return tuple(map(blank, part)) if type(part) is tuple else part

        return Shown(list(map(blank, self.pictures)), list(map(blank, self.films)), self.clips)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind of `messages.MARKS`."""
        return {"image": len(self.pictures), "video": len(self.clips)}


class Row(NamedTuple):
    """One prompt before padding.

    Attributes:
        tokens: its ids, int32 `[m]`.
        context: the tokens of the context among them, int `[c]`.
        places: the visual tokens among them, int `[n]`.
        visual, tiles, weights, layout: see `Segment`, of all pictures in their order.
        positions: see `ModelInputs`, int32 `[3, m]`.
    """

    tokens: np.ndarray
    context: np.ndarray
    places: np.ndarray
    visual: Sequence[np.ndarray] = ()
    tiles: Sequence[np.ndarray] = ()
    positions: np.ndarray | None = None
    weights: Sequence[np.ndarray] = ()
    layout: Sequence[np.ndarray] = ()


def joined(segments: Sequence[Segment]) -> dict[str, Any]:
    """The pictures of all segments, as a `Row` has them."""
    return {
        name: [array for segment in segments for array in getattr(segment, name)]
        for name in Segment._fields
    }


@lru_cache
def picture_processor(name: str) -> Any:
    """A class of transformers' processors without their half for videos, which needs torchvision.

    Its `video_settings` are `VideoSettings` in its place.

    Args:
        name: of the class.
    """
    import transformers  # slow to import, see `Packing.load`

    kind = getattr(transformers, name)

    class PictureProcessor(kind):
        video_settings = VideoSettings()

        # Its parameters say which files are read.
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    return PictureProcessor


class Packing:
    """Makes a `Row` of a prompt, of text alone.

    Args:
        config: the model.
        processor: the checkpoint's `transformers` tokenizer or processor. It is not changed.

    Attributes:
        processor: the same, made ready.
        tokenizer: its tokenizer.
        image_processor: its image processor, None where it has none.
        mark: what stands for a picture in a text; None where the model takes no pictures.
        mark_id: the token of a picture in it, -1 where there is none.
        video_mark, video_mark_id: the same of videos.

    Raises:
        ValueError: the processor does not belong to the model.
    """

    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("tokenizer.json", "tokenizer.model"),)
    """Files of a checkpoint, of each group one at least."""

    neighbours: ClassVar[int] = 0
    """C: the rows of which a visual token is a weighted sum; 0 where it is one row."""
    has_layout: ClassVar[bool] = False
    """Whether tiles stand in a `ModelInputs.layout`."""
    video_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of the family's video processor where they are not those of most."""

    def __init__(self, config: ModelConfig, processor: Any):
        self.config, self.processor = config, processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.image_processor: Any = getattr(processor, "image_processor", None)
        self.mark: str | None = None
        self.video_mark: str | None = None
        self.mark_id = self.video_mark_id = -1

    @staticmethod
    def load(path: Path, config: ModelConfig) -> Any:
        """What `transformers` makes of the files in a directory; may raise anything."""
        from transformers import AutoTokenizer  # a second or more, which --help need not wait for

        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)

    @classmethod
    def read(cls, path: Path, config: ModelConfig) -> Any:
        """The tokenizer or processor of a local model directory.

        Raises:
            FileNotFoundError: there is no such directory, or the files are not in it.
            ValueError: the files cannot be read, or ask for remote code.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"no model directory at {path}: download the checkpoint first")
        for names in cls.needs:
            if not any((path / name).is_file() for name in names):
                raise FileNotFoundError(
                    f"no {' or '.join(names)} in {path}: copy the processor files of the "
                    "checkpoint there"
                )
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            file = path / name
            if file.is_file() and b'"auto_map"' in file.read_bytes():
                raise ValueError(f"{file} {REMOTE_CODE}")
        try:
            processor = cls.load(path, config)
            getattr(processor, "tokenizer", processor).tokenize("a")  # some settings fail only now
            return processor
        except Exception as error:  # the readers below raise anything, even plain Exception
            if not (path / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
                raise ValueError(
                    f"{path} has its tokenizer as tokenizer.model alone, which needs the package "
                    "sentencepiece: pip install 'vlcache-jax[sentencepiece]'"
                ) from None
            raise ValueError(
                f"the processor files in {short(path, 150)} cannot be read: {reason(error)}"
            ) from error

    @property
    def marks(self) -> dict[str, str]:
        """What stands for each kind of `messages.MARKS` that the model takes."""
        marks = {"image": self.mark, "video": self.video_mark}
        return {kind: mark for kind, mark in marks.items() if mark}

    def is_mark(self, tokens: np.ndarray) -> np.ndarray:
        """Which of these ids are a mark's, or a visual token's, bool [m]."""
        return (tokens == self.mark_id) | (tokens == self.video_mark_id)

    @property
    def video_settings(self) -> VideoSettings:
        """Those of the checkpoint, and the family's where it does not say."""
        own = getattr(self.processor, "video_settings", VideoSettings())
        return own.over(self.video_defaults)

    def clip(self, video: VideoLike, frames: int | None) -> Clip:
        """The frames of a video that the model is shown.

        Args:
            video: the video.
            frames: how many; None for what the checkpoint's processor says.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the model takes no videos, or the video cannot be read, or is too long.
        """
        raise ValueError(NO_VIDEOS)

    def show(self, images: Sequence[ImageLike], clips: Sequence[Clip] = ()) -> Shown:
        """A prompt's images and clips, made ready.

        Raises:
            FileNotFoundError: an image file does not exist.
            ValueError: an image cannot be read.
        """
        return Shown()

    def row(self, shown: Shown, prompt: Rendered) -> Row:
        """The row of a rendered prompt, with a mark for each image and clip that is shown.

        Raises:
            ValueError: the model cannot take what comes of the prompt.
        """
        tokens = np.asarray(self.encode(prompt.text)["input_ids"][0], np.int32)
        self.check(tokens, is_visual := np.zeros(tokens.shape, bool))
        return Row(tokens, self.context(prompt, is_visual), np.zeros(0, np.int64))

    def patches(self, sizes: Sequence[tuple[int, int]]) -> list[Patches]:
        """Which pixels the visual tokens of each of a prompt's pictures show.

        Args:
            sizes: (height, width) of the pictures, in pixels.

        Raises:
            ValueError: the model takes no pictures.
            NotImplementedError: the processor resizes them in a way that is not followed.
        """
        if sizes:
            raise ValueError(f"a {self.config.family} decoder has no visual tokens: give no sizes")
        return []

    def frame_patches(self, clip: Clip) -> list[Patches]:
        """Which pixels the visual tokens of a video show, of each of its pictures.

        Where a picture spans frames, its tokens show the same part of each of them.

        Raises:
            ValueError: the model takes no videos.
        """
        raise ValueError(NO_VIDEOS)

    def context(self, prompt: Rendered, is_visual: np.ndarray) -> np.ndarray:
        """Where the context's tokens are, int [c]: those that hold a character of it.

        Args:
            prompt: the prompt.
            is_visual: which of them are a visual token's, bool [m].

        Raises:
            NotImplementedError: the tokenizer does not tell which characters a token is.
        """
        first, end = prompt.context
        if first == end:
            return np.zeros(0, np.int64)
        if not self.tokenizer.is_fast:
            raise NotImplementedError(
                "a context needs a tokenizer.json, which tells where its tokens are: put the text "
                "into the question instead"
            )
        found = self.tokenizer(
            prompt.text,
            add_special_tokens=self._adds_special(prompt.text),
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_tensors="np",
        )
        ids, spans = found["input_ids"][0], found["offset_mapping"][0]
        text = ~self.is_mark(ids)  # here a picture is its mark alone
        inside = (spans[:, 0] < end) & (spans[:, 1] > first) & (spans[:, 0] < spans[:, 1])
        return np.flatnonzero(~is_visual)[inside[text]]

    def _adds_special(self, text: str) -> bool:
        """Whether the tokenizer's own first token has to be put in front of a rendered prompt."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def encode(self, text: str, processor: Any = None, **pictures: Any) -> Any:
        """What the tokenizer makes of a prompt, or a processor of its marks and pictures."""
        try:
            return (processor or self.tokenizer)(
                text=text,
                add_special_tokens=self._adds_special(text),
                padding=False,  # a tokenizer may have been saved with either
                truncation=False,
                return_tensors="np",
                **pictures,
            )
        except Exception as error:  # settings of any kind may stand in the processor's files
            raise ValueError(
                f"the checkpoint's processor cannot prepare the prompt ({reason(error)}): use the "
                "processor files of the checkpoint that transformers loads"
            ) from error

    def check_frames(self, shape: Shape, frames: int, count: int) -> None:
        """Refuse so many frames of a video, which become so many tokens, before they are read."""
        if count > (most := self.config.text.max_positions):
            raise ValueError(
                f"{frames} of the video's {shape.frames} frames of {shape.width} x {shape.height} "
                f"pixels are {count} tokens, more than the model's {most} positions: choose fewer "
                "(frames=8, --frames 8) or smaller ones"
            )

    def check(self, tokens: np.ndarray, is_visual: np.ndarray) -> None:
        """Refuse ids [m] that the model cannot take, of which some are a visual token's."""
        text = self.config.text
        if not tokens.size:
            raise ValueError("the prompt has no tokens: give a longer text")
        if tokens.size > text.max_positions:
            visual = np.count_nonzero(is_visual)
            fewer = " or give fewer images" if self.mark else ""
            fewer = " or give fewer images or frames" if self.video_mark else fewer
            raise ValueError(
                f"the prompt has {tokens.size} tokens ({visual} of them visual), more than the "
                f"model's {text.max_positions} positions: shorten the text or its context{fewer}"
            )
        highest = int(tokens[~is_visual].max(initial=0))
        if highest >= text.vocab_size:
            raise ValueError(
                f"the tokenizer gave id {highest}, but the model's vocabulary has "
                f"{text.vocab_size} entries: use the tokenizer files of the same checkpoint"
            )
