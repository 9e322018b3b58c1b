"""LLaVA-OneVision's packing: one picture by anyres, several with a base tile each, and videos.

A frame of a video is a tile whose grid of patches is scaled to half its sides.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vlcache_jax.fields import SIZE
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.llava.packing import LlavaPacking, Sizes
from vlcache_jax.models.onevision.anyres import frame_tokens, visual_tokens
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.models.onevision.patches import frame_rectangles, patch_rectangles
from vlcache_jax.requests.packing import NEWLINE, Patches, Segment, picture_processor
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import Clip, Shape, VideoLike, evenly, load_video


class OnevisionPacking(LlavaPacking):
    """Makes a `Row` of a prompt with pictures and videos; see `LlavaPacking`."""

    config: OnevisionConfig
    neighbours = 4

    def __init__(self, config: OnevisionConfig, processor: Any):
        super().__init__(config, processor)
        mark = str(processor.video_token)
        if self.tokenizer.convert_tokens_to_ids(mark) == config.video_token_id:
            self.video_mark, self.video_mark_id = mark, config.video_token_id

    @staticmethod
    def load(path: Path, config: ModelConfig) -> Any:
        """What `transformers` makes of the files in a directory; may raise anything."""
        processor = picture_processor("LlavaOnevisionProcessor").from_pretrained(
            path, backend="pil", local_files_only=True, trust_remote_code=False
        )
        processor.video_settings = VideoSettings.find(path)
        return processor

    def settings(self) -> dict[str, Any]:
        """What the processor needs to know of the model."""
        return {
            "num_image_tokens": self.config.vision.num_patches,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": f"anyres_max_{self.config.anyres_max}",
        }

    def tiles(self, sizes: Sizes) -> list[int]:
        """How many tiles each picture becomes."""
        return super().tiles(sizes) if len(sizes) == 1 else [1] * len(sizes)

    def visual(self, sizes: Sizes) -> list[tuple[np.ndarray, ...]]:
        """Of each picture what its visual tokens are: the rows and their weights."""
        return [visual_tokens(size, self.config, alone=len(sizes) == 1) for size in sizes]

    def clip(self, video: VideoLike, frames: int | None) -> Clip:
        """The frames of a video that the model is shown; see `Packing.clip`."""
        if self.video_mark is None:
            return super().clip(video, frames)
        settings, side = self.video_settings, self.config.vision.image_size
        for edge in ("height", "width"):
            if (given := settings.read(f"size.{edge}", SIZE, side)) != side:
                raise ValueError(
                    f"{settings.file}: size.{edge} is {given}, but the model's image_size is "
                    f"{side}: use the processor files of the same checkpoint"
                )

        def choose(shape: Shape) -> np.ndarray:
            count = frames or settings.count
            if not count and (wanted := settings.rated(shape)) is not None:
                count = max(1, int(wanted))
            chosen = evenly(shape, count or shape.frames)
            rows, _ = frame_tokens(self.config)
            self.check_frames(shape, len(chosen), len(chosen) * len(rows) + 1)
            return chosen

        return load_video(video, choose)

    def film(self, clip: Clip) -> Segment:
        """What stands at a video's mark: its frames, each scaled down, and one newline."""
        side = self.config.vision.image_size
        pixels = self.video_settings.pixels(clip.frames, (side, side))
        rows, weights = frame_tokens(self.config)
        ending = np.full((1, rows.shape[1]), NEWLINE, np.int32), np.full_like(weights[:1], 0.25)
        more = [(rows, weights)] * (len(pixels) - 1)
        last = np.concatenate([rows, ending[0]]), np.concatenate([weights, ending[1]])
        visual, shares = zip(*more, last, strict=True)
        return Segment(visual, list(pixels[:, None]), shares)

    def patches(self, sizes: Sizes) -> list[Patches]:
        """Which pixels the visual tokens of each picture show; see `Packing.patches`."""
        alone = len(sizes) == 1
        return [
            patch_rectangles(size, self.config, self.image_processor, alone=alone) for size in sizes
        ]

    def frame_patches(self, clip: Clip) -> list[Patches]:
        """Which pixels the visual tokens of each frame show; see `Packing.frame_patches`."""
        size, count = (clip.shape.height, clip.shape.width), len(clip.frames)
        return [frame_rectangles(size, self.config, last=at == count - 1) for at in range(count)]

    def enlarged(self, size: tuple[int, int], pictures: int) -> int:
        """Pixels of the largest that the processor makes of one of so many pictures."""
        return 0 if pictures == 1 else max(size) ** 2
