"""How near the pixels of frames are to transformers' own: `python -m benchmarks.video_pixels`.

transformers' video processors resize with torchvision, the library with Pillow. Both are given the
same frames: what is compared is which of them are chosen, their size, and every value before it is
normalised, in steps of 8 bits. Needs torch and torchvision, which the library does not.
"""

from typing import Any, NamedTuple

import numpy as np
import PIL
import typer
from PIL import Image

from benchmarks import command
from benchmarks.accuracy.report import RESULTS
from benchmarks.documents import Part, measured, table
from benchmarks.environment import environment
from vlcache_jax.models.qwen3_vl import frames as qwen3_vl
from vlcache_jax.models.qwen_vl import frames as qwen_vl
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import Video, evenly, load_video

SIDE = 384
"""Of LLaVA-OneVision's frames, in pixels."""

QWEN = {"Qwen2.5-VL": (qwen_vl, 28), "Qwen3-VL": (qwen3_vl, 32)}
"""The families of the Qwen-VL line: how they choose and resize frames, the side of a tile."""

SIZES = ((360, 640), (1080, 1920), (97, 61), (720, 405), (16, 900), (384, 384))
"""(height, width) of the frames."""

FRAMES, CHOSEN = 11, 6

SETTINGS: dict[str, dict[str, Any]] = {
    "LLaVA-OneVision": {
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "Qwen2.5-VL": {},
    "Qwen3-VL": dict(qwen3_vl.DEFAULTS),
}
"""Of the families' checkpoints; where there are none, of transformers' classes."""


class Frames(NamedTuple):
    """What becomes of a video: float32 [F, 3, height, width], normalised, and whence it is."""

    pixels: np.ndarray
    chosen: np.ndarray


def frames_of(kind: str, size: tuple[int, int]) -> np.ndarray:
    """A video of so many frames, uint8 [F, height, width, 3]: noise, or shapes that move."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 256, (FRAMES, *size, 3), dtype=np.uint8)
    y, x = np.indices(size)[:, None, ..., None] / np.array(size).min()
    time, colour = np.arange(FRAMES)[:, None, None, None], np.arange(3)
    waves = np.sin(9 * x + time + colour) + np.sign(np.sin(23 * y - 0.5 * time + 2 * colour))
    return (255 * (waves + 2) / 4).astype(np.uint8)


def ours(family: str, video: np.ndarray) -> Frames:
    """What the library makes of it."""
    settings = VideoSettings(SETTINGS[family])
    if family in QWEN:
        own, side = QWEN[family]
        clip = load_video(Video(video), lambda shape: own.choose_frames(shape, CHOSEN, settings))
        size = own.frame_size(clip.shape, len(clip.frames), side, settings)
    else:
        clip = load_video(Video(video), lambda shape: evenly(shape, CHOSEN))
        size = SIDE, SIDE
    return Frames(settings.pixels(clip.frames, size), clip.chosen)


def theirs(family: str, video: np.ndarray) -> Frames:
    """What transformers makes of it.

    Raises:
        ModuleNotFoundError: there is no torchvision.
    """
    asked: dict[str, Any] = {"num_frames": CHOSEN, "fps": None}
    if family == "Qwen2.5-VL":
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **SETTINGS[family])
    elif family == "Qwen3-VL":
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        processor = Qwen3VLVideoProcessor(cap_pixels_per_frame=False)
    else:
        from transformers.models.llava_onevision import video_processing_llava_onevision as module

        processor = module.LlavaOnevisionVideoProcessor(**SETTINGS[family])
    made = processor(
        [video], do_sample_frames=True, return_metadata=True, return_tensors="np", **asked
    )
    pixels, [metadata] = np.asarray(made["pixel_values_videos"]), made["video_metadata"]
    chosen = np.asarray(metadata.frames_indices)
    if family not in QWEN:
        return Frames(pixels[0], chosen)
    [[time, down, across]], patch = made["video_grid_thw"], QWEN[family][1] // 2
    tiles = pixels.reshape(time, down // 2, across // 2, 2, 2, 3, 2, patch, patch)
    whole = tiles.transpose(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return Frames(whole.reshape(2 * time, 3, down * patch, across * patch), chosen)


def compare(family: str, kind: str, size: tuple[int, int]) -> dict[str, Any]:
    """One row of the result."""
    video = frames_of(kind, size)
    own, other = ours(family, video), theirs(family, video)
    row = {
        "family": family,
        "frames": kind,
        "size": list(size),
        "resized": list(own.pixels.shape[2:]),
        "same_frames": own.chosen.tolist() == other.chosen.tolist(),
        "same_size": own.pixels.shape == other.pixels.shape,
    }
    if not row["same_size"]:
        return row
    # Back to steps of 8 bits, which the two were resized to.
    settings = VideoSettings(SETTINGS[family])
    one = settings.pixels([Image.new("RGB", (1, 1), (shade,) * 3) for shade in (0, 255)], (1, 1))
    step = (one[1] - one[0]) / 255
    error = np.abs(own.pixels - other.pixels) / step
    return row | {
        "largest": round(float(error.max()), 4),
        "mean": round(float(error.mean()), 6),
        "differ": round(float((error > 0.5).mean()), 6),
    }


@measured
def part(result: dict[str, Any]) -> str:
    """The table for docs/models.md, and what it is of."""
    rows = [
        [row["family"], row["frames"], *(f"{h} x {w}" for h, w in (row["size"], row["resized"])),
         "yes" if row["same_frames"] and row["same_size"] else "no",
         f"{row['largest']:.2f}", f"{row['differ']:.2%}"]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["family", "frames", "height x width", "resized to", "same frames and size",
            "largest difference", "values that differ"]  # fmt: skip
    found, compared = result["versions"], [row for row in result["rows"] if row["same_size"]]
    largest, most = (max(row[name] for row in compared) for name in ("largest", "differ"))
    return (
        "`python -m benchmarks.video_pixels`, with transformers "
        f"{found['transformers']}, torchvision {found['torchvision']} and Pillow {found['PIL']}: "
        f"{CHOSEN} of {FRAMES} frames. No value is further off than {largest:.0f} steps of 8 bits, "
        f"before it is normalised, and of no video more than {most:.1%} of them are.\n\n"
        f"{table(head, rows)}"
    )


SECTION = Part("video-pixels", part, (RESULTS / "video_pixels.json",))


def main(
    as_json: command.AsJson = False, out: command.Out = None, force: command.Force = False
) -> None:
    """Compare frames that the library resizes with those of transformers' video processors."""
    import torchvision  # pyright: ignore[reportMissingImports]
    import transformers

    command.check_out(out, force=force)
    rows = [
        compare(family, kind, size)
        for family in SETTINGS
        for kind in ("noise", "shapes")
        for size in SIZES
    ]
    found = environment()
    used = {module.__name__: module.__version__ for module in (torchvision, transformers, PIL)}
    result = found | {"versions": found["versions"] | used, "rows": rows}
    command.finish(result, part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
