"""Which frames of a video Qwen3-VL is shown, their size and their times: transformers' own."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    Qwen3VLVideoProcessor,
    smart_resize,
)
from transformers.video_utils import VideoMetadata

from tests.tiny import picture
from tests.tiny_qwen import qwen_json, qwen_processor
from vlcache_jax import Video
from vlcache_jax.models.families import read_config
from vlcache_jax.models.qwen3_vl.frames import DEFAULTS, choose_frames, frame_size
from vlcache_jax.requests.inputs import CONTEXT
from vlcache_jax.requests.processing import Processor
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import Shape


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"min_frames": 7, "max_frames": 9, "fps": 0.7},
        {"min_frames": 1, "max_frames": 30, "fps": None},
        {"num_frames": 5, "fps": None},
    ],
)
def test_frames(data):
    theirs, own = Qwen3VLVideoProcessor(**data), VideoSettings(data).over(DEFAULTS)
    for total, fps in product((5, 6, 31, 100, 4001), (None, 24, 0.3, 29.97)):
        for asked in (None, 1, 4):
            count = asked or theirs.num_frames
            expected = theirs.sample_frames(VideoMetadata(total, fps), count)
            chosen = choose_frames(Shape(total, 9, 9, fps), asked, own)
            assert chosen.tolist() == expected.tolist()


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(2, 900),
    height=st.integers(1, 2500),
    width=st.integers(1, 2500),
    caps=st.booleans(),
    least=st.sampled_from([1, 4096, 131072]),
    most=st.sampled_from([1, 786432, 25165824]),
)
def test_sizes(count, height, width, caps, least, most):
    size = {"shortest_edge": least, "longest_edge": most}
    data = {"size": size, "cap_pixels_per_frame": caps}
    shape, own = Shape(count, height, width), VideoSettings(data).over(DEFAULTS)
    try:
        patches = Qwen3VLVideoProcessor(**data).get_num_of_video_patches(count, height, width)
    except ValueError:
        with pytest.raises(ValueError, match=r"cannot be resized .* more than 200 times"):
            frame_size(shape, count, 32, own)
        return
    found = frame_size(shape, count, 32, own)
    assert -(-count // 2) * (found[0] // 16) * (found[1] // 16) == patches
    if not caps:
        assert found == smart_resize(count, height, width, 2, 32, least, most)


def test_a_single_frame_is_two_that_are_alike():
    own = VideoSettings(DEFAULTS)
    assert choose_frames(Shape(1, 99, 200), None, own).tolist() == [0]
    edges = DEFAULTS["size"].values()
    assert frame_size(Shape(1, 99, 200), 1, 32, own) == smart_resize(2, 99, 200, 2, 32, *edges)


@pytest.mark.parametrize(
    ("fps", "times"), [(4, "0.1 0.5"), (None, "0.0 0.1"), (1e-3, "500.0 2000.0")]
)
def test_a_video_in_a_prompt(fps, times):
    """Its steps in the place of its mark, each behind its time; a context is found all the same."""
    processor = Processor(read_config(qwen_json("qwen3_vl")), qwen_processor("qwen3_vl"))
    film = Video([picture(20, 20)] * 3, fps)
    steps = [f"<{time} seconds><|vision_start|><|vision_end|>" for time in times.split()]
    mark, about = f"<|vision_start|>{''.join(steps)}<|vision_end|>", "A lamp."
    for text, written in (
        ("<video>why?", f"user\n{about}\n\n{mark}why?<|im_end|>"),
        ("why?", f"user\n{mark}{about}\n\nwhy?<|im_end|>"),
    ):
        inputs = processor(None, text, videos=film, context=about)
        words = processor.tokenizer.decode(inputs.tokens[0, : int(inputs.length[0])])
        assert written in words.replace("<|video_pad|>", "")
        assert np.count_nonzero(inputs.visual_index >= 0) == words.count("<|video_pad|>")
        own = inputs.tokens[inputs.visual_index == CONTEXT]
        assert processor.tokenizer.decode(own) == about
