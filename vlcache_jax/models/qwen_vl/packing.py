"""Qwen-VL's packing: pictures as tiles in the tower's order, positions of three axes.

A picture is resized to whole tiles by the checkpoint's image processor (its PIL and numpy backend:
neither torch nor torchvision is needed), frames of videos by `frames`. A prompt has one token for
each picture and video until their sizes are known.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlcache_jax.errors import reason, short
from vlcache_jax.fields import SIZE
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.qwen_vl.config import FRAMES, QwenConfig
from vlcache_jax.models.qwen_vl.frames import choose_frames, frame_size
from vlcache_jax.models.qwen_vl.layout import (
    Grid,
    Span,
    prompt_positions,
    tile_places,
    tower_rows,
)
from vlcache_jax.requests.images import ImageLike, load_image, name_of
from vlcache_jax.requests.packing import (
    BASE,
    Packing,
    Patches,
    Rendered,
    Row,
    Segment,
    Shown,
    joined,
    picture_processor,
)
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import Clip, Shape, VideoLike, load_video

PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
MARK, VIDEO_MARK = (f"<|vision_start|>{pad}<|vision_end|>" for pad in (PAD, VIDEO_PAD))
"""What the family's chat templates write for a picture and for a video."""


PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
"""transformers' processors of the families; what they make of pictures is the same."""


class QwenVLPacking(Packing):
    """Makes a `Row` of a prompt with pictures and videos.

    Args:
        config: the model.
        processor: the checkpoint's own, one of `PROCESSORS`, with a PIL image processor; one of
            videos it need not have (`picture_processor`). It is not changed.

    Raises:
        ValueError: the processor does not belong to the model.
    """

    config: QwenConfig
    needs = (*Packing.needs, ("preprocessor_config.json", "processor_config.json"))
    has_layout: ClassVar[bool] = True

    def __init__(self, config: QwenConfig, processor: Any):
        super().__init__(config, processor)
        self.mark, self.mark_id = MARK, config.image_token_id
        vision, found = config.vision, self._ids(PAD)
        if found != [self.mark_id]:
            raise ValueError(
                f"the tokenizer's id of {PAD} is {', '.join(map(str, found))}, but the model's "
                f"image_token_id is {self.mark_id}: use the tokenizer files of the same checkpoint"
            )
        if self._ids(VIDEO_PAD) == [config.video_token_id]:
            self.video_mark, self.video_mark_id = VIDEO_MARK, config.video_token_id
        self._sizes = {
            "patch_size": vision.patch_size,
            "merge_size": vision.merge_size,
            "temporal_patch_size": FRAMES,
        }
        for name, size in self._sizes.items():
            if (given := getattr(self.image_processor, name, None)) != size:
                raise ValueError(
                    f"the image processor's {name} is {short(repr(given))}, but the model's is "
                    f"{size}: use the processor files of the same checkpoint"
                )

    @staticmethod
    def load(path: Path, config: ModelConfig) -> Any:
        """What `transformers` makes of the files in a directory; may raise anything."""
        processor = picture_processor(PROCESSORS[config.family]).from_pretrained(
            path, backend="pil", local_files_only=True, trust_remote_code=False
        )
        processor.video_settings = VideoSettings.find(path)
        return processor

    def clip(self, video: VideoLike, frames: int | None) -> Clip:
        """The frames of a video that the model is shown; see `Packing.clip`."""
        if self.video_mark is None:
            return super().clip(video, frames)
        for name, size in self._sizes.items():
            if (given := self.video_settings.read(name, SIZE, size)) != size:
                raise ValueError(
                    f"{self.video_settings.file}: the video processor's {name} is {given}, but the "
                    f"model's is {size}: use the processor files of the same checkpoint"
                )

        def choose(shape: Shape) -> np.ndarray:
            chosen = self.choose(shape, frames)
            down, across = self._grid(self.frame_size(shape, len(chosen)))
            self.check_frames(shape, len(chosen), -(-len(chosen) // FRAMES) * down * across)
            return chosen

        return load_video(video, choose)

    def show(self, images: Sequence[ImageLike], clips: Sequence[Clip] = ()) -> Shown:
        """See `Packing.show`."""
        films = chain.from_iterable(map(self.film, clips))
        return Shown([self._picture(image) for image in images], list(films), clips)

    def row(self, shown: Shown, prompt: Rendered) -> Row:
        """The row of a rendered prompt; see `Packing.row`."""
        pads = {"image": PAD, "video": VIDEO_PAD}
        for kind, given in shown.counts.items():
            if (count := prompt.text.count(pads[kind])) != given:
                raise ValueError(
                    f"{count} <|{kind}_pad|> tokens in the prompt but {given} {kind}s: write "
                    f"<{kind}>, or <|vision_start|><|{kind}_pad|><|vision_end|>, for each {kind}"
                )
        prompt = self.written(prompt, shown.clips)
        ids = np.asarray(self.encode(prompt.text)["input_ids"][0], np.int32)
        pictures, films = iter(shown.pictures), iter(shown.films)
        is_mark = self.is_mark(ids)
        made = [next(films if id == self.video_mark_id else pictures) for id in ids[is_mark]]
        spans, segments = [span for span, _ in made], [segment for _, segment in made]
        times = np.ones(len(ids), np.int64)
        times[is_mark] = [segment.count for segment in segments]
        tokens = np.repeat(ids, times)
        is_visual = self.is_mark(tokens)
        self.check(tokens, is_visual)
        return Row(
            tokens,
            self.context(prompt, is_visual),
            np.flatnonzero(is_visual),
            positions=prompt_positions(is_visual, spans),
            **joined(segments),
        )

    def patches(self, sizes: Sequence[tuple[int, int]]) -> list[Patches]:
        """Which pixels the visual tokens of each picture show; see `Packing.patches`."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        limits, side = self.image_processor.size, self.config.tile_side
        least, most = limits["shortest_edge"], limits["longest_edge"]
        return [
            self._patches(size, smart_resize(*size, side, min_pixels=least, max_pixels=most))
            for size in sizes
        ]

    def frame_patches(self, clip: Clip) -> list[Patches]:
        """Which pixels the visual tokens of each step show; see `Packing.frame_patches`."""
        size = clip.shape.height, clip.shape.width
        steps = -(-len(clip.frames) // FRAMES)
        return [self._patches(size, self.frame_size(clip.shape, len(clip.frames)))] * steps

    def choose(self, shape: Shape, frames: int | None) -> np.ndarray:
        """Which frames of a video are taken, int [F]; see `frames.choose_frames`."""
        return choose_frames(shape, frames, self.video_settings)

    def frame_size(self, shape: Shape, count: int) -> tuple[int, int]:
        """(height, width) that so many frames are resized to; see `frames.frame_size`."""
        return frame_size(shape, count, self.config.tile_side, self.video_settings)

    def written(self, prompt: Rendered, clips: Sequence[Clip]) -> Rendered:
        """The prompt, with a mark for each picture and each of what `film` makes of the clips."""
        return prompt

    def film(self, clip: Clip) -> list[tuple[Span, Segment]]:
        """Where the tokens of a video lie, and its steps: here all of them at one mark."""
        grid, steps = self.steps(clip)
        seconds = np.float32(FRAMES / clip.fps)
        interval = np.float32(self.config.vision.tokens_per_second) * seconds
        return [(Span(len(steps), grid, float(interval)), self.segment(grid, steps))]

    def segment(self, grid: Grid, steps: Sequence[np.ndarray]) -> Segment:
        """A picture, or steps of a video, from their tiles line by line."""
        side = self.config.vision.window_side
        places, rows = tile_places(grid, side), tower_rows(grid, side)
        _, row, column = places.T
        tiles = [step[row * grid[1] + column] for step in steps]
        return Segment([rows] * len(steps), tiles, layout=[places] * len(steps))

    def steps(self, clip: Clip) -> tuple[Grid, list[np.ndarray]]:
        """Tiles down and across of a video's steps, and those of each step line by line."""
        side = self.config.tile_side
        size = self.frame_size(clip.shape, len(clip.frames))
        down, across = grid = self._grid(size)
        frames = [*clip.frames, *clip.frames[-1:] * (-len(clip.frames) % FRAMES)]
        pixels = self.video_settings.pixels(frames, size)
        pixels = pixels.reshape(-1, FRAMES, 3, down, side, across, side)
        steps = pixels.transpose(0, 3, 5, 1, 2, 4, 6)
        return grid, list(steps.reshape(-1, down * across, FRAMES, 3, side, side))

    def _patches(self, size: tuple[int, int], resized: tuple[int, int]) -> Patches:
        """A picture is resized to its grid whole: its tokens show equal parts of it."""
        (height, width), (down, across) = size, self._grid(resized)
        row, column = np.indices((down, across)).reshape(2, -1)
        places = np.stack([column, row, column + 1, row + 1], axis=1)
        step = np.array([width / across, height / down] * 2)
        return Patches(places * step, np.full(len(places), BASE, np.int8))

    def _grid(self, resized: tuple[int, int]) -> Grid:
        """Tiles down and across of so many pixels."""
        height, width = resized
        return height // self.config.tile_side, width // self.config.tile_side

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text: of a mark it is one, wherever it stands."""
        return self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text))

    def _picture(self, source: ImageLike) -> tuple[Span, Segment]:
        """Where an image's tokens lie, and its tiles."""
        picture, merge = load_image(source), self.config.vision.merge_size
        try:
            made = self.image_processor(images=[picture], return_tensors="np")
        except Exception as error:  # settings of any kind may stand in the processor's files
            raise ValueError(
                f"the image processor cannot prepare {name_of(source)} of {picture.width} x "
                f"{picture.height} pixels ({reason(error)}): crop or scale it, or use the "
                "processor files of the checkpoint"
            ) from error
        _, height, width = made["image_grid_thw"][0].tolist()
        grid, side = (height // merge, width // merge), self.config.tile_side
        # Tile by tile, the patches of each row by row, all frames of a patch alike.
        patches = np.asarray(made["pixel_values"], np.float32)
        patches = patches.reshape(-1, merge, merge, 3, FRAMES, *[side // merge] * 2)[:, :, :, :, 0]
        tiles = patches.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, side, side)
        return Span(1, grid), self.segment(grid, [tiles])
