"""The settings of a checkpoint's video processor, and what they make of frames.

transformers' own video processors need torch and torchvision; this is their arithmetic in Pillow
and numpy. A setting is checked when it is first asked for: pictures do not depend on it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import short
from vlcache_jax.fields import (
    COUNT,
    FLAG,
    NUMBER,
    REQUIRED,
    SECTION,
    Kind,
    one_of,
    read_field,
    read_json,
)
from vlcache_jax.requests.videos import Shape

_COLOURS = Kind(
    "a list of three numbers",
    lambda x: isinstance(x, list | tuple) and len(x) == 3 and all(
        type(value) in (int, float) and abs(value) < 1e6 for value in x
    ),
    lambda x: np.array(x, np.float32),
)  # fmt: skip
_ONLY = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False}

# Of CLIP, which transformers' video processors take where a file does not say.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class VideoSettings:
    """What a file says.

    Args:
        data: the settings; none by default.
        file: where they are from, for errors.
    """

    def __init__(self, data: Mapping[str, Any] | None = None, file: str | Path = "the settings"):
        self.data, self.file = data or {}, file

    @classmethod
    def find(cls, path: Path) -> "VideoSettings":
        """Those of a model directory, from the file that transformers takes.

        Raises:
            ValueError: a file is no JSON object.
        """
        file = path / "processor_config.json"
        if file.is_file() and "video_processor" in (data := read_json(file)):
            return cls(read_field(data, "video_processor", SECTION, {}, file=file), file)
        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            if (file := path / name).is_file():
                return cls(read_json(file), file)
        return cls()

    def over(self, defaults: Mapping[str, Any]) -> "VideoSettings":
        """The same, with a family's own where nothing is said of a setting."""
        return VideoSettings({**defaults, **self.data}, self.file)

    def read(self, name: str, kind: Kind, default: Any = REQUIRED) -> Any:
        """A setting, as `fields.read_field` reads it."""
        return read_field(self.data, name, kind, default, file=self.file)

    @property
    def count(self) -> int | None:
        """How many frames are chosen; None where that is not set."""
        return self.read("num_frames", COUNT, None) if self.samples else None

    def rated(self, shape: Shape) -> float | None:
        """How many frames of a video are chosen by their number in a second; None as of `count`.

        Raises:
            ValueError: it is not known how many frames of a second the video has.
        """
        if not self.samples or (fps := self.read("fps", NUMBER, None)) is None:
            return None
        if shape.fps is None:
            raise ValueError(
                f"{short(self.file)} takes {fps:g} frames of each second, and it is not known how "
                "many the video has: give a Video with its fps, or say how many to take (frames=8, "
                "--frames 8)"
            )
        return shape.frames / shape.fps * fps

    @property
    def samples(self) -> bool:
        """Whether frames are chosen at all."""
        return self.read("do_sample_frames", FLAG, False)

    def pixels(self, frames: Sequence[Image.Image], size: tuple[int, int]) -> np.ndarray:
        """Frames resized and normalised, as transformers' `BaseVideoProcessor` does it.

        Args:
            frames: RGB.
            size: (height, width) that they get.

        Returns:
            float32 `[F, 3, height, width]`.

        Raises:
            NotImplementedError: a setting asks for another step, or leaves one of these out.
            ValueError: a setting has an impossible value.
        """
        for name, only in _ONLY.items():
            self.read(name, one_of(only), only)
        filters = one_of(Image.Resampling.BILINEAR.value, Image.Resampling.BICUBIC.value)
        resample = Image.Resampling(self.read("resample", filters, Image.Resampling.BICUBIC))
        scale = 1 / self.read("rescale_factor", NUMBER, 1 / 255)
        mean = self.read("image_mean", _COLOURS, _MEAN) * np.float32(scale)
        std = self.read("image_std", _COLOURS, _STD) * np.float32(scale)
        if not std.all():
            raise ValueError(f"{self.file}: image_std must be three numbers other than 0")
        made = np.empty((len(frames), 3, *size), np.float32)
        for frame, out in zip(frames, made, strict=True):
            # First across, then down, as torchvision does it; Pillow takes what is quicker.
            across = frame.resize((size[1], frame.height), resample)
            resized = across.resize((size[1], size[0]), resample)
            out[:] = ((np.asarray(resized, np.float32) - mean) / std).transpose(2, 0, 1)
        return made
