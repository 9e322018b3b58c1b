"""Which frames of a video Qwen3-VL is shown, at which size, and what the prompt says of their time.

Source: transformers' `Qwen3VLVideoProcessor` and `Qwen3VLProcessor`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlcache_jax.fields import COUNT, FLAG
from vlcache_jax.models.qwen_vl.config import FRAMES
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import UNKNOWN_FPS, Clip, Shape, check_count

DEFAULTS: Mapping[str, Any] = {
    "do_sample_frames": True,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 768,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
    "cap_pixels_per_frame": False,
    "max_video_tokens": 768,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
"""What a setting is where the checkpoint does not say; pixels are those of all frames together."""

THINNEST = 200
"""Of the sides of a frame, the longer one by the shorter one."""


def choose_frames(shape: Shape, asked: int | None, settings: VideoSettings) -> np.ndarray:
    """The frames that are taken, evenly from the first to the last, int [F].

    A video of which it is not known how many frames a second it has is taken to have `UNKNOWN_FPS`.

    Args:
        shape: the video.
        asked: how many are asked for; None for what the settings say.
        settings: of the checkpoint, with `DEFAULTS`.

    Raises:
        ValueError: there are fewer.
    """
    total, count = shape.frames, asked or settings.count
    if count:
        check_count(shape, count)
    elif settings.samples:
        wanted = settings.rated(shape._replace(fps=shape.fps or UNKNOWN_FPS))
        least, most = (settings.read(f"{end}_frames", COUNT, total) for end in ("min", "max"))
        count = int(min(max(total if wanted is None else wanted, least), most, total))
    return np.linspace(0, total - 1, count or total).round().astype(int)


def frame_size(shape: Shape, count: int, side: int, settings: VideoSettings) -> tuple[int, int]:
    """(height, width) that so many frames of a video are resized to, in pixels.

    A single frame is two that are alike, which transformers' processor leaves to its caller.

    Args:
        shape: the video.
        count: its chosen frames.
        side: of a tile, which both are multiples of.
        settings: of the checkpoint, with `DEFAULTS`.

    Raises:
        ValueError: the frames are too thin, or the settings are impossible.
    """
    count = max(count, FRAMES)
    least, most = (settings.read(f"size.{end}_edge", COUNT) for end in ("shortest", "longest"))
    if settings.read("cap_pixels_per_frame", FLAG, False):
        own = settings.read("max_video_tokens", COUNT) * side * side
        most = max(min(own, most // count), int(least * 1.05)) * count
    height, width = shape.height, shape.width
    if min(height, width) < side:
        larger = max(side / height, side / width)
        height, width = int(height * larger), int(width * larger)
    if max(height, width) / min(height, width) > THINNEST:
        raise ValueError(
            f"frames of {shape.width} x {shape.height} pixels cannot be resized for the model (one "
            f"side is more than {THINNEST} times the other): crop them"
        )
    down, across = round(height / side), round(width / side)
    pixels = FRAMES * round(count / FRAMES) * down * across * side * side
    if pixels > most:
        scale = math.sqrt(count * height * width / most)
        down, across = (max(1, math.floor(n / scale / side)) for n in (height, width))
    elif pixels < least:
        scale = math.sqrt(least / (count * height * width))
        down, across = (math.ceil(n * scale / side) for n in (height, width))
    return down * side, across * side


def step_times(clip: Clip) -> list[float]:
    """When each step is shown, in seconds: between its first frame and its last one."""
    chosen, fps = clip.chosen.tolist(), clip.shape.fps or UNKNOWN_FPS
    seconds = [index / fps for index in chosen + chosen[-1:] * (-len(chosen) % FRAMES)]
    steps = zip(seconds[::FRAMES], seconds[FRAMES - 1 :: FRAMES], strict=True)
    return [(first + last) / 2 for first, last in steps]
