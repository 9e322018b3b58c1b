"""Which frames of a video Qwen2.5-VL is shown, and at which size.

Source: transformers' `Qwen2VLVideoProcessor`.
"""

import numpy as np

from vlcache_jax.errors import reason
from vlcache_jax.fields import COUNT, FLAG, REQUIRED
from vlcache_jax.models.qwen_vl.config import FRAMES
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import Shape, evenly

_EDGES = {"min": ("shortest_edge", 128 * 28 * 28), "max": ("longest_edge", 768 * 28 * 28)}
"""Of the pixels of a frame: the limit in `size`, and what it is where there is no `size`."""

_FRAMES = {"min": 4, "max": 768}


def choose_frames(shape: Shape, asked: int | None, settings: VideoSettings) -> np.ndarray:
    """The frames that are taken, an even number of them where there is a choice, int [F].

    Args:
        shape: the video.
        asked: how many are asked for; None for what the settings say.
        settings: of the checkpoint.

    Raises:
        ValueError: there are fewer, or the settings take so many of a second, of which it is not
            known how many the video has.
    """
    total, asked = shape.frames, asked or settings.count
    if asked:
        even = max(FRAMES, round(asked / FRAMES) * FRAMES)
        return evenly(shape, min(even, total) if asked <= total else asked)
    if (wanted := settings.rated(shape)) is None:
        return np.arange(total)
    least, most = (settings.read(f"{end}_frames", COUNT, at) for end, at in _FRAMES.items())
    most = min(most, total) // FRAMES * FRAMES
    count = int(min(max(wanted, least), most, total)) // FRAMES * FRAMES
    return evenly(shape, count or total)


def frame_size(shape: Shape, count: int, side: int, settings: VideoSettings) -> tuple[int, int]:
    """(height, width) that so many frames of a video are resized to, in pixels.

    Args:
        shape: the video.
        count: its chosen frames.
        side: of a tile, which both are multiples of.
        settings: of the checkpoint.

    Raises:
        ValueError: the frames are too thin, or the settings are impossible.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    least, most = (_limit(name, settings) for name in _EDGES)
    if settings.read("cap_pixels_per_frame", FLAG, False):
        pixels = int(settings.read("max_video_tokens", COUNT, 128000) * side * side * 0.9)
        most = max(min(most, pixels * FRAMES // count), int(least * 1.05))
    try:
        return smart_resize(shape.height, shape.width, side, min_pixels=least, max_pixels=most)
    except ValueError as error:
        raise ValueError(
            f"frames of {shape.width} x {shape.height} pixels cannot be resized for the model "
            f"({reason(error)}): crop them"
        ) from None


def _limit(name: str, settings: VideoSettings) -> int:
    """The "min" or "max" of a frame's pixels."""
    edge, usual = _EDGES[name]
    if (own := settings.read(f"{name}_pixels", COUNT, None)) is not None:
        return own
    default = usual if settings.data.get("size") is None else REQUIRED
    return settings.read(f"size.{edge}", COUNT, default)
