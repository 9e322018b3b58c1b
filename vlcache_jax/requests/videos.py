"""Videos: what is taken for one, which of its frames are chosen, and how they are read.

A film is decoded once and only the chosen frames are kept. Behind this a video is pictures of one
size that follow each other.
"""

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlcache_jax.errors import real_number, reason, short
from vlcache_jax.requests.images import FORMATS, ImageLike, load_image


@dataclass(frozen=True, eq=False)
class Video:
    """Frames, and how fast they follow each other.

    Attributes:
        frames: pictures of one size (`images.ImageLike`), or an array `[F, H, W, 3]`.
        fps: frames per second; None where it is not known.
    """

    frames: Sequence[ImageLike] | Any
    fps: float | None = None


class Shape(NamedTuple):
    """A video before its frames are chosen.

    Attributes:
        frames: how many it has.
        height, width: of each of them, in pixels.
        fps: frames per second, None where it is not known.
    """

    frames: int
    height: int
    width: int
    fps: float | None = None


class Clip(NamedTuple):
    """The chosen frames of a video.

    Attributes:
        name: what it is called, None for one without a file.
        frames: its pictures, RGB and of one size.
        chosen: their numbers in the video, int [F].
        shape: the whole video.
    """

    name: str | None
    frames: list[Image.Image]
    chosen: np.ndarray
    shape: Shape

    @property
    def fps(self) -> float:
        """Chosen frames per second, as transformers' `VideoMetadata.sampled_fps` counts them."""
        shape = self.shape
        return len(self.frames) / shape.frames * shape.fps if shape.fps else UNKNOWN_FPS


VideoLike: TypeAlias = Video | Clip | str | Path | bytes | Sequence[ImageLike] | Any
"""A video: a `Video`; the path or the content of a local file, an animation that Pillow reads (GIF,
WebP) or a film that ffmpeg does, for which PyAV is needed; a list of frames, each an
`images.ImageLike`; an array `[F, H, W, 3]`; or a `Clip`, whose frames were chosen already."""

Videos: TypeAlias = VideoLike | Sequence[VideoLike] | None
"""The videos of one prompt. A list of PIL images or arrays `[H, W, 3]` is one video; in any other
list each element is one, so that frames that are files are a list inside the list, or a `Video`."""

UNKNOWN_FPS = 24.0
"""Frames per second that transformers takes a video to have of which that is not known."""

Choose = Callable[[Shape], np.ndarray]
"""Which frames of a video are taken: their numbers, int [F], increasing."""

_KINDS = "give a file, a list of frames or an array (frames, height, width, 3)"


def as_videos(given: Videos) -> list[VideoLike]:
    """The videos of one prompt, one by one."""
    if given is None:
        return []
    if isinstance(given, Clip) or not isinstance(given, list | tuple):
        return [given]
    return [given] if given and all(map(_is_frame, given)) else list(given)


def _is_frame(given: Any) -> bool:
    """Whether this is a picture in memory."""
    return isinstance(given, Image.Image) or len(getattr(given, "shape", ())) in (2, 3)


def evenly(shape: Shape, count: int) -> np.ndarray:
    """So many frames of a video, evenly from its first on, as transformers chooses them.

    Raises:
        ValueError: it has fewer.
    """
    check_count(shape, count)
    return np.arange(count) * shape.frames // count


def check_count(shape: Shape, count: int) -> None:
    """Refuse more frames than a video has."""
    if count > shape.frames:
        raise ValueError(
            f"{count} frames are asked for, but the video has {shape.frames}: ask for fewer, or "
            "leave the number out"
        )


def load_video(source: VideoLike, choose: Choose) -> Clip:
    """Read the chosen frames of a video, each as `images.load_image` reads a picture.

    Args:
        source: see `VideoLike`.
        choose: chooses them, before any is decoded.

    Raises:
        FileNotFoundError: there is no such file, or it is a URL, which is never fetched.
        ValueError: it is no video, is damaged, has no frames or frames of several sizes, or PyAV is
            needed and not installed.
    """
    if isinstance(source, Clip):
        return source
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        name = Path(source).name if isinstance(source, str | Path) else None
        with _opened(source) as (file, called):
            return _animation(file, name, called, choose) or _film(file, name, called, choose)
    video = source if isinstance(source, Video) else Video(source)
    fps = None if video.fps is None else real_number(video.fps, "fps")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"{fps=} must be above 0: frames per second, or None")
    frames = video.frames
    rank = len(getattr(frames, "shape", ()))
    if rank != 4 and not isinstance(frames, list | tuple):
        raise ValueError(f"{_called(frames)} is not a video: {_KINDS}")
    if not len(frames):
        raise ValueError(f"a video needs at least one frame: {_KINDS}")
    first = load_image(frames[0])
    shape = Shape(len(frames), first.height, first.width, fps)
    chosen = choose(shape)
    return _clip(None, (load_image(frames[index]) for index in chosen.tolist()), chosen, shape)


def _clip(
    name: str | None, frames: Iterable[Image.Image], chosen: np.ndarray, shape: Shape
) -> Clip:
    """The chosen frames, once their size was checked."""
    read = list(frames)
    sizes = {(frame.height, frame.width): None for frame in read} | {shape[1:3]: None}
    if len(sizes) > 1:
        (height, width), (other, wide), *_ = sizes
        raise ValueError(
            f"the frames of a video must be of one size, not {width} x {height} and "
            f"{wide} x {other} pixels: scale or crop them"
        )
    return Clip(name, read, chosen, shape)


def _called(source: Any) -> str:
    """How error messages call what is no file."""
    shape = getattr(source, "shape", None)
    return f"the value {short(source)}" if shape is None else f"an array of shape {short(shape)}"


@contextmanager
def _opened(source: Any) -> Iterator[tuple[IO[bytes], str]]:
    """An open file, and how error messages call it."""
    if not isinstance(source, str | Path):
        yield io.BytesIO(source), f"the video of {len(source)} bytes"
        return
    called = f"video file {short(source)}"
    if str(source).startswith(("http://", "https://")):
        raise FileNotFoundError(f"{called}: no video is fetched: download it, give its path")
    if not os.path.isfile(source):
        raise FileNotFoundError(f"no {called}: {_KINDS}")
    with open(source, "rb") as file:
        yield file, called


def _animation(file: IO[bytes], name: str | None, called: str, choose: Choose) -> Clip | None:
    """A picture or an animation that Pillow reads, None for anything else."""
    Image.init()  # all formats, not only the usual ones
    try:
        image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError):
        file.seek(0)
        return None
    try:
        milliseconds, count = 0.0, getattr(image, "n_frames", 1)
        for index in range(count):
            image.seek(index)
            image.load()  # only then is it known how long some formats show it
            milliseconds += float(image.info.get("duration") or 0)
        fps = 1000 * count / milliseconds if milliseconds > 0 else None
        image.seek(0)
        first = load_image(image)
        shape = Shape(count, first.height, first.width, fps)
    except Exception as error:  # decoders raise anything on damaged data
        raise ValueError(f"{called} is damaged or truncated: {reason(error)}") from None

    def frame(index: int) -> Image.Image:
        image.seek(index)
        return load_image(image)

    chosen = choose(shape)
    return _clip(name, map(frame, chosen.tolist()), chosen, shape)


def _film(file: IO[bytes], name: str | None, called: str, choose: Choose) -> Clip:
    """A film that ffmpeg reads."""
    try:
        import av
    except ModuleNotFoundError:
        raise ValueError(
            f"{called} is no animation that Pillow reads, and films need the package av: "
            "pip install 'vlcache-jax[video]'"
        ) from None
    count = None
    while True:
        file.seek(0)
        try:
            # Playlists are videos to ffmpeg too: what they name is not opened.
            container = av.open(file, options={"protocol_whitelist": ""})
        except Exception as error:  # of ffmpeg, of many kinds
            raise ValueError(f"{called} is no video ({reason(error)}): {_KINDS}") from None
        with container:
            found = _decoded(container, count, called, choose)
        if not isinstance(found, int):
            return _clip(name, *found)
        count = found


def _decoded(
    container: Any, count: int | None, called: str, choose: Choose
) -> tuple[list[Image.Image], np.ndarray, Shape] | int:
    """The chosen frames of an open film, or how many it has if that is fewer than it says."""
    if not container.streams.video:
        raise ValueError(f"{called} has no pictures: {_KINDS}")
    stream = container.streams.video[0]
    try:
        if count is None and not (count := stream.frames):
            count = sum(packet.size > 0 for packet in container.demux(stream))
            container.seek(0)
        rate = stream.average_rate
    except Exception as error:
        raise ValueError(f"{called} is damaged or truncated: {reason(error)}") from None
    if not count:
        raise ValueError(f"{called} has no frames that can be read: {_KINDS}")
    shape = Shape(count, stream.height, stream.width, float(rate) if rate else None)
    chosen = choose(shape)
    wanted, frames, read = set(chosen.tolist()), [], 0
    stream.thread_type = "AUTO"
    try:
        for frame in container.decode(stream):
            if read in wanted:
                frames.append(frame.to_image())
            read += 1
            if len(frames) == len(wanted):
                return frames, chosen, shape
    except Exception as error:
        raise ValueError(f"{called} is damaged or truncated: {reason(error)}") from None
    return read
