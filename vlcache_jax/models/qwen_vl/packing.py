"""Qwen-VL's packing: pictures as tiles in the tower's order, positions of three axes.

A picture is resized to whole tiles by the checkpoint's image processor (its PIL and numpy backend:
neither torch nor torchvision is needed). A prompt has one token for each picture until the sizes of
the pictures are known.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlcache_jax.errors import reason, short
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.qwen_vl.config import FRAMES, QwenConfig
from vlcache_jax.models.qwen_vl.layout import Grid, prompt_positions, tile_places, tower_rows
from vlcache_jax.requests.images import ImageLike, load_image, name_of
from vlcache_jax.requests.packing import BASE, Packing, Patches, Rendered, Row, picture_processor

PAD = "<|image_pad|>"
MARK = f"<|vision_start|>{PAD}<|vision_end|>"
"""What the family's chat templates write for a picture."""


PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
"""transformers' processors of the families; what they make of pictures is the same."""


class QwenVLPacking(Packing):
    """Makes a `Row` of a prompt with pictures.

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
        self.encoder = self.tokenizer
        self.mark, self.mark_id = MARK, config.image_token_id
        vision, found = config.vision, self.tokenizer.convert_tokens_to_ids(PAD)
        if found != self.mark_id:
            raise ValueError(
                f"the tokenizer's id of {PAD} is {found}, but the model's image_token_id is "
                f"{self.mark_id}: use the tokenizer files of the same checkpoint"
            )
        wanted = {
            "patch_size": vision.patch_size,
            "merge_size": vision.merge_size,
            "temporal_patch_size": FRAMES,
        }
        for name, size in wanted.items():
            if (given := getattr(self.image_processor, name, None)) != size:
                raise ValueError(
                    f"the image processor's {name} is {short(repr(given))}, but the model's is "
                    f"{size}: use the processor files of the same checkpoint"
                )

    @staticmethod
    def load(path: Path, config: ModelConfig) -> Any:
        """What `transformers` makes of the files in a directory; may raise anything."""
        return picture_processor(PROCESSORS[config.family]).from_pretrained(
            path, backend="pil", local_files_only=True, trust_remote_code=False
        )

    def row(self, images: Sequence[ImageLike], prompt: Rendered) -> Row:
        """The row of a rendered prompt and its images; see `Packing.row`.

        Raises:
            NotImplementedError: the prompt has a mark for a video.
        """
        ids = np.asarray(self.encode(text=prompt.text)["input_ids"][0], np.int32)
        if (ids == self.config.video_token_id).any():
            raise NotImplementedError(
                "the prompt has a <|video_pad|>, but videos are not supported: give single frames "
                "of it as images, with <image> marks"
            )
        if (count := np.count_nonzero(ids == self.mark_id)) != len(images):
            raise ValueError(
                f"{count} {PAD} tokens in the prompt but {len(images)} images: write <image>, or "
                f"{MARK}, for each image"
            )
        pictures = [self._tiles(image) for image in images]
        grids = [grid for grid, _ in pictures]
        times = np.ones(len(ids), np.int64)
        times[ids == self.mark_id] = [down * across for down, across in grids]
        tokens = np.repeat(ids, times)
        is_visual = tokens == self.mark_id
        self.check(tokens, is_visual)
        side = self.config.vision.window_side
        return Row(
            tokens,
            self.context(prompt, tokens, is_visual),
            np.flatnonzero(is_visual),
            [tower_rows(grid, side) for grid in grids],
            [tiles for _, tiles in pictures],
            prompt_positions(is_visual, grids),
            layout=[tile_places(grid, side) for grid in grids],
        )

    def patches(self, sizes: Sequence[tuple[int, int]]) -> list[Patches]:
        """Which pixels the visual tokens of each picture show; see `Packing.patches`."""
        return [self._patches(*size) for size in sizes]

    def _patches(self, height: int, width: int) -> Patches:
        """A picture is resized to its grid whole: its tokens show equal parts of it."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        limits, side = self.image_processor.size, self.config.tile_side
        whole = smart_resize(
            height,
            width,
            factor=side,
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
        )
        down, across = (length // side for length in whole)
        row, column = np.indices((down, across)).reshape(2, -1)
        places = np.stack([column, row, column + 1, row + 1], axis=1)
        step = np.array([width / across, height / down] * 2)
        return Patches(places * step, np.full(len(places), BASE, np.int8))

    def _tiles(self, source: ImageLike) -> tuple[Grid, np.ndarray]:
        """Tiles down and across of an image, and their pixels in the tower's order."""
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
        _, row, column = tile_places(grid, self.config.vision.window_side).T
        return grid, tiles[row * grid[1] + column]
