"""Qwen3-VL's packing: Qwen2.5-VL's, but that the prompt says when each step of a video is shown.

A mark is written out, `...` for more steps:

```
<|vision_start|><|video_pad|><|vision_end|>

<|vision_start|>
    <0.3 seconds><|vision_start|><|video_pad|><|vision_end|>
    <1.3 seconds><|vision_start|><|video_pad|><|vision_end|>
    ...
<|vision_end|>
```

Then a step is a picture, to the decoder too.
"""

from collections.abc import Sequence

import numpy as np

from vlcache_jax.models.qwen3_vl.frames import DEFAULTS, choose_frames, frame_size, step_times
from vlcache_jax.models.qwen_vl.layout import Span
from vlcache_jax.models.qwen_vl.packing import VIDEO_MARK, VIDEO_PAD, QwenVLPacking
from vlcache_jax.requests.packing import Rendered, Segment
from vlcache_jax.requests.videos import Clip, Shape


class Qwen3VLPacking(QwenVLPacking):
    """Makes a `Row` of a prompt with pictures and videos; see `QwenVLPacking`."""

    video_defaults = DEFAULTS

    def choose(self, shape: Shape, frames: int | None) -> np.ndarray:
        """Which frames of a video are taken, int [F]; see `frames.choose_frames`."""
        return choose_frames(shape, frames, self.video_settings)

    def frame_size(self, shape: Shape, count: int) -> tuple[int, int]:
        """(height, width) that so many frames are resized to; see `frames.frame_size`."""
        return frame_size(shape, count, self.config.tile_side, self.video_settings)

    def written(self, prompt: Rendered, clips: Sequence[Clip]) -> Rendered:
        """The prompt with a mark for each step, behind its time; see `QwenVLPacking.written`."""
        steps = [
            "".join(f"<{seconds:.1f} seconds>{VIDEO_MARK}" for seconds in step_times(clip))
            for clip in clips
        ]
        first, *rest = prompt.text.split(VIDEO_PAD)
        text = first + "".join(map("".join, zip(steps, rest, strict=True)))

        def moved(place: int) -> int:
            """Where a character of the prompt stands then."""
            passed = steps[: prompt.text.count(VIDEO_PAD, 0, place)]
            return place + sum(len(written) - len(VIDEO_PAD) for written in passed)

        start, end = prompt.context
        return Rendered(text, (moved(start), moved(end)))

    def film(self, clip: Clip) -> list[tuple[Span, Segment]]:
        """Where the tokens of a video lie, and its steps, each at a mark of its own."""
        grid, steps = self.steps(clip)
        return [(Span(1, grid), self.segment(grid, [step])) for step in steps]
