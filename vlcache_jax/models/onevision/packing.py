"""LLaVA-OneVision's packing: one picture by anyres, several with a base tile each.

transformers' processor needs torchvision for videos; what is made here has none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.llava.packing import LlavaPacking, Sizes
from vlcache_jax.models.onevision.anyres import visual_tokens
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.models.onevision.patches import patch_rectangles
from vlcache_jax.requests.images import ImageLike
from vlcache_jax.requests.packing import Patches, Rendered, Row, picture_processor


class OnevisionPacking(LlavaPacking):
    """Makes a `Row` of a prompt with pictures; see `LlavaPacking`."""

    config: OnevisionConfig
    neighbours = 4

    @staticmethod
    def load(path: Path, config: ModelConfig) -> Any:
        """What `transformers` makes of the files in a directory; may raise anything."""
        return picture_processor("LlavaOnevisionProcessor").from_pretrained(
            path, backend="pil", local_files_only=True, trust_remote_code=False
        )

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

    def visual(self, sizes: Sizes) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """`Row.visual` and `Row.weights`."""
        found = [visual_tokens(size, self.config, alone=len(sizes) == 1) for size in sizes]
        return [rows for rows, _ in found], [weights for _, weights in found]

    def patches(self, sizes: Sizes) -> list[Patches]:
        """Which pixels the visual tokens of each picture show; see `Packing.patches`."""
        alone = len(sizes) == 1
        return [
            patch_rectangles(size, self.config, self.image_processor, alone=alone) for size in sizes
        ]

    def enlarged(self, size: tuple[int, int], pictures: int) -> int:
        """Pixels of the largest that the processor makes of one of so many pictures."""
        return 0 if pictures == 1 else max(size) ** 2

    def row(self, images: Sequence[ImageLike], prompt: Rendered) -> Row:
        """The row of a rendered prompt and its images; see `Packing.row`.

        Raises:
            NotImplementedError: the prompt has a mark of a video.
        """
        if (mark := str(self.processor.video_token)) in prompt.text:
            raise NotImplementedError(
                f"the prompt has {mark}, and videos are not supported: give a few of its pictures"
            )
        return super().row(images, prompt)
