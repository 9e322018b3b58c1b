"""LLaVA's packing: pictures as tiles, and visual tokens where their marks stand in a prompt.

The Hugging Face processor of the checkpoint does the tokenising and the resizing (its PIL and numpy
backend: neither torch nor torchvision is needed); this module checks its result and adds the index
table of the visual tokens (`anyres`).
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import short
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.llava.anyres import num_tiles, visual_rows
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.models.llava.patches import patch_rectangles
from vlcache_jax.requests.images import ImageLike, load_image, name_of
from vlcache_jax.requests.packing import (
    NO_VIDEOS,
    Packing,
    Patches,
    Rendered,
    Row,
    Segment,
    Shown,
    joined,
)
from vlcache_jax.requests.videos import Clip

Sizes = Sequence[tuple[int, int]]
"""(height, width) of each picture of a prompt, in pixels."""


class LlavaPacking(Packing):
    """Makes a `Row` of a prompt with pictures.

    Args:
        config: the model.
        processor: the checkpoint's `transformers` processor (`LlavaProcessor` or
            `LlavaNextProcessor`) with a PIL image processor. It is not changed.

    Raises:
        ValueError: the processor does not belong to the model.
    """

    config: LlavaConfig
    needs = (*Packing.needs, ("processor_config.json", "preprocessor_config.json"))

    def __init__(self, config: LlavaConfig, processor: Any):
        super().__init__(config, copy.copy(processor))
        # Processors saved by old versions of transformers lack these; the model knows them.
        for name, value in self.settings().items():
            setattr(self.processor, name, value)
        self.mark = str(processor.image_token)
        self.mark_id = self.tokenizer.convert_tokens_to_ids(self.mark)
        if self.mark_id != config.image_token_id:
            raise ValueError(
                f"the tokenizer's id of {self.mark} is {self.mark_id}, but the model's "
                f"image_token_id is {config.image_token_id}: correct image_token_index in "
                "config.json or use the tokenizer files of the same checkpoint"
            )
        if config.grid_pinpoints:
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

    @staticmethod
    def load(path: Path, config: ModelConfig) -> Any:
        """What `transformers` makes of the files in a directory; may raise anything."""
        # Imported here: it takes a second or more, which `vlcache --help` need not wait for.
        from transformers import LlavaNextProcessor, LlavaProcessor

        kind = LlavaNextProcessor if config.family == "llava_next" else LlavaProcessor
        return kind.from_pretrained(
            path, backend="pil", local_files_only=True, trust_remote_code=False
        )

    def settings(self) -> dict[str, Any]:
        """What the processor needs to know of the model."""
        return {
            "patch_size": self.config.vision.patch_size,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }

    def tiles(self, sizes: Sizes) -> list[int]:
        """How many tiles each picture becomes."""
        return [num_tiles(size, self.config) for size in sizes]

    def visual(self, sizes: Sizes) -> list[tuple[np.ndarray, ...]]:
        """Of each picture what its visual tokens are: the rows, and their weights if they have."""
        return [(visual_rows(size, self.config),) for size in sizes]

    def film(self, clip: Clip) -> Segment:
        """What stands at a video's mark."""
        raise ValueError(NO_VIDEOS)

    def patches(self, sizes: Sizes) -> list[Patches]:
        """Which pixels the visual tokens of each picture show; see `Packing.patches`."""
        return [patch_rectangles(size, self.config, self.image_processor) for size in sizes]

    def enlarged(self, size: tuple[int, int], pictures: int) -> int:
        """Pixels of the largest that the processor makes of one of so many pictures."""
        narrow, long = sorted(size)
        if self.config.family != "llava":
            return 0
        pixels = long * long if self.image_processor.do_pad else 0
        return max(pixels, self.config.vision.image_size**2 * long // narrow)

    def show(self, images: Sequence[ImageLike], clips: Sequence[Clip] = ()) -> Shown:
        """See `Packing.show`."""
        pictures = [self._load(image, len(images)) for image in images]
        sizes = [(picture.height, picture.width) for picture in pictures]
        shown = []
        if pictures:
            # In a list of prompts, or OneVision's processor takes them for prompts of their own.
            marks = self.mark * len(pictures) if self.mark else ""
            encoded = self.encode(marks, self.processor, images=[pictures])
            pixels = encoded["pixel_values"]  # of each image [3, H, W], or anyres' [tiles, ...]
            shown = [
                Segment([rows], [image.reshape(-1, *image.shape[-3:])[:count]], weights)
                for image, count, (rows, *weights) in zip(
                    pixels, self.tiles(sizes), self.visual(sizes), strict=True
                )
            ]
            made = np.count_nonzero(np.asarray(encoded["input_ids"][0]) == self.mark_id)
            count = sum(each.count for each in shown)
            if made != count:
                raise ValueError(
                    f"the processor made {made} image tokens of images of (height, width) {sizes}, "
                    f"but the model has {count}: use the processor files of the same checkpoint"
                )
            shape, side = shown[0].tiles[0].shape[1:], self.config.vision.image_size
            if shape != (3, side, side):
                raise ValueError(
                    f"the processor made tiles of shape {shape}, but the model's image_size is "
                    f"{side}: use the processor files of the same checkpoint"
                )
        return Shown(shown, [self.film(clip) for clip in clips], clips)

    def row(self, shown: Shown, prompt: Rendered) -> Row:
        """The row of a rendered prompt; see `Packing.row`."""
        ids = np.asarray(self.encode(prompt.text)["input_ids"][0], np.int32)
        times = np.ones(len(ids), np.int64)
        for mark, segments in ((self.mark_id, shown.pictures), (self.video_mark_id, shown.films)):
            if segments:
                times[ids == mark] = [segment.count for segment in segments]
        tokens = np.repeat(ids, times)
        is_visual = self.is_mark(tokens)
        self.check(tokens, is_visual)
        context = self.context(prompt, is_visual)
        segments = self._in_order(prompt.text, [*shown.pictures], [*shown.films])
        return Row(tokens, context, np.flatnonzero(is_visual), **joined(segments))

    def _in_order(self, text: str, pictures: list[Segment], films: list[Segment]) -> list[Segment]:
        """All of them, as their marks follow each other in a prompt."""
        if not films:
            return pictures
        given = {"image": iter(pictures), "video": iter(films)}
        kinds = {mark: given[kind] for kind, mark in self.marks.items()}
        return [next(kinds[mark]) for mark in re.findall("|".join(map(re.escape, kinds)), text)]

    def _load(self, source: ImageLike, pictures: int) -> Image.Image:
        """One of a prompt's images, within Pillow's limit even when the processor enlarges it."""
        picture, limit = load_image(source), Image.MAX_IMAGE_PIXELS
        pixels = self.enlarged((picture.height, picture.width), pictures)
        if limit is not None and pixels > limit:
            raise ValueError(
                f"{name_of(source)} of {picture.width} x {picture.height} pixels is too thin: "
                f"resizing it would take {pixels} pixels, more than Pillow's limit of {limit}; "
                "crop it"
            )
        return picture
