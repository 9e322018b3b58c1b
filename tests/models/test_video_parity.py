"""Videos are Hugging Face's: tokens, positions, features, logits and greedy answers.

transformers' video processors need torchvision: both models are given the pixels that are made
here, and benchmarks/video_pixels compares these with torchvision's.
"""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers.video_utils import VideoMetadata

import vlcache_jax
from pallas_kernels.prefill_attention import prefill_attention
from tests import hf
from tests.tiny import picture
from tests.tiny_qwen import IMAGE_ID, PATCH, qwen_processor
from vlcache_jax import Buckets, SnapKV, Video
from vlcache_jax.models.families import bind
from vlcache_jax.models.qwen_vl.packing import MARK, PAD, VIDEO_MARK
from vlcache_jax.running.stages import Stages

BOUND = 1e-4
FAMILIES = {
    "llava_onevision": Buckets(prompt=(256,), tiles=(0, 37)),
    "qwen2_5_vl": Buckets(prompt=(256,), tiles=(0, 256)),
    "qwen3_vl": Buckets(prompt=(320,), tiles=(0, 128)),
}


def video(frames, width, height, fps=None):
    return Video([picture(width, height, seed) for seed in range(frames)], fps)


PROMPTS = {
    "one frame": ([], [video(1, 60, 40)], "<video>\nwhat is this?"),
    "two frames": ([], [video(2, 33, 77, fps=0.3)], "look: <video> what?"),
    "seven": ([], [video(7, 90, 20, fps=1)], "<video>"),
    "32": ([], [video(32, 50, 50, fps=24)], "<video> name the colours"),
    "two videos": ([], [video(3, 40, 40, 2), video(3, 30, 50, 7)], "<video><video> differ?"),
    "a picture first": ([(50, 30)], [video(4, 40, 64, 1)], "a <image> and <video>?"),
    "a video first": ([(50, 30), (9, 20)], [video(4, 40, 64, 1)], "a <video> or <image><image>?"),
}


class Pair:
    """The same model twice: Hugging Face's and ours, loaded from its files; compiled once."""

    def __init__(self, family, folder):
        self.family = family
        if family in hf.QWEN:
            self.theirs = hf.qwen_model(family)
        else:
            self.theirs = hf.hf_model(family, "qwen2", {"num_key_value_heads": 2})
        self.path = hf.save(self.theirs, folder / "model", family)
        self.ours = vlcache_jax.load(self.path, buckets=FAMILIES[family])
        self.ours.stop_ids = ()  # as Hugging Face's model: the tokenizer's own would be taken
        self.logits = jax.jit(Stages(self.ours.config).prompt_logits)
        attend = partial(prefill_attention, causal=False)
        self.embed = jax.jit(
            lambda params, inputs: bind(self.ours.config)(params).embed_prompt(inputs, attend).x
        )

    def prompt(self, name):
        """The images, videos and words of a prompt, and what transformers makes of them."""
        sizes, videos, words = PROMPTS[name]
        images = [picture(*size) for size in sizes]
        clips = self.ours.processor.clips(videos)
        make = onevision_inputs
        if self.family in hf.QWEN:
            make = partial(qwen_inputs, self.family)
        return images, videos, words, make(self.ours.processor, images, clips, words)

    def inputs(self, name):
        images, videos, words, theirs = self.prompt(name)
        return self.ours.processor(images, words, videos=videos, raw_prompt=True), theirs


def with_ids(tokenizer, text, data):
    ids = torch.tensor(tokenizer(text)["input_ids"])[None]
    data |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return data


def onevision_inputs(processor, images, clips, words):
    data = {}
    if images:
        data = dict(hf.hf_inputs("llava_onevision", images, "<image>" * len(images)))
        counts = [(data["input_ids"] == processor._packing.mark_id).sum().item()]
        counts = counts if len(images) == 1 else [counts[0] // len(images)] * len(images)
        for count in counts:
            words = words.replace("<image>", "<pad>" * count, 1)
        words = words.replace("<pad>", "<image>")
    frames = [processor._packing.video_settings.pixels(clip.frames, (56, 56)) for clip in clips]
    data["pixel_values_videos"] = torch.tensor(np.stack(frames))
    words = words.replace("<video>", "<video>" * (4 * len(frames[0]) + 1))
    return with_ids(processor.tokenizer, words, data)


def qwen_inputs(family, processor, images, clips, words):
    """Text of transformers' processor, which is given the sizes of its torchvision half alone."""
    theirs = qwen_processor(family)
    theirs.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    theirs.image_token, theirs.image_token_id = PAD, IMAGE_ID  # the tokenizer has LLaVA's, too
    data, pictures = {}, []
    if images:
        data = dict(processor.image_processor(images=images, return_tensors="pt"))
        pictures = [theirs.replace_image_token(data, place) for place in range(len(images))]
    grids, patches = [], []
    for clip in clips:
        size = processor._packing.frame_size(clip.shape, len(clip.frames))
        frames = torch.tensor(processor._packing.video_settings.pixels(clip.frames, size))
        if len(frames) % 2:
            frames = torch.cat([frames, frames[-1:]])
        steps, down, across = len(frames) // 2, *(length // (2 * PATCH) for length in size)
        cut = frames.view(steps, 2, 3, down, 2, PATCH, across, 2, PATCH)
        patches.append(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 6 * PATCH * PATCH))
        grids.append([steps, 2 * down, 2 * across])
    data["pixel_values_videos"] = torch.cat(patches)
    data["video_grid_thw"] = torch.tensor(grids)
    if family == "qwen2_5_vl":
        data["second_per_grid_ts"] = torch.tensor([2 / clip.fps for clip in clips])
    times = [VideoMetadata(*clip.shape[::3], frames_indices=clip.chosen) for clip in clips]
    made = data | {"video_metadata": times}
    films = [theirs.replace_video_token(made, place) for place in range(len(clips))]
    words = words.replace("<image>", MARK).replace("<video>", VIDEO_MARK)
    [words], _ = theirs.get_text_with_replacements([words], pictures, films)
    with_ids(processor.tokenizer, words, data)
    kinds = theirs.create_mm_token_type_ids(data["input_ids"].tolist())
    return data | {"mm_token_type_ids": torch.tensor(kinds)}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_and_positions(pair, name):
    inputs, theirs = pair.inputs(name)
    length = int(inputs.length[0])
    assert inputs.tokens[0, :length].tolist() == theirs["input_ids"][0].tolist()
    if pair.family in hf.QWEN:
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        positions, _ = pair.theirs.model.get_rope_index(
            theirs["input_ids"],
            theirs["mm_token_type_ids"],
            **{name: theirs.get(name) for name in names},
        )
        assert np.array_equal(inputs.positions[:, 0, :length], positions[:, 0])
        assert inputs.next_position().tolist() == [int(positions[0, 0, -1]) + 1]


@pytest.mark.parametrize("name", PROMPTS)
def test_visual_tokens(pair, name):
    inputs, theirs = pair.inputs(name)
    given = {key: theirs[key] for key in ("pixel_values_videos", "video_grid_thw") if key in theirs}
    with torch.no_grad():
        out = pair.theirs.model.get_video_features(**given).pooler_output
    expected = np.concatenate([np.asarray(x) for x in out])
    own = inputs.tokens == pair.ours.processor._packing.video_mark_id
    rows = np.asarray(pair.embed(pair.ours.params, inputs))[own]
    assert rows.shape == expected.shape
    assert hf.relative_error(rows, expected) < BOUND


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_of_every_position(pair, name):
    inputs, theirs = pair.inputs(name)
    hf.check_logits(pair, inputs, theirs, BOUND)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_greedy_tokens(pair, name):
    images, videos, words, theirs = pair.prompt(name)
    hf.check_greedy(pair, theirs, images, words, videos=videos)


@pytest.mark.parametrize("group", [pytest.param(None, marks=pytest.mark.full), 1])
def test_a_batch_of_unequal_prompts_equals_batch_one(group, pair):
    names = ("seven", "a video first", "two frames")
    images = [[picture(*size) for size in PROMPTS[name][0]] for name in names]
    videos, texts = ([PROMPTS[name][place] for name in names] for place in (1, 2))
    images, videos = [*images, [picture(30, 30)], None], [*videos, None, None]
    texts = [*texts, "<image> only", "no picture at all"]
    asked = {"max_new_tokens": 32, "raw_prompt": True, "cache": "vl-cache"}
    batch = pair.ours.generate(images, texts, videos=videos, **asked, prefill_batch=group)
    for answer, pictures, films, text in zip(batch, images, videos, texts, strict=True):
        alone = pair.ours.generate(pictures, text, videos=films, **asked)
        assert (answer.tokens, answer.cache.kept_bytes) == (alone.tokens, alone.cache.kept_bytes)


@pytest.mark.full
def test_an_inspection_shows_each_frame(pair, tmp_path):
    found = vlcache_jax.inspect(
        pair.ours,
        picture(30, 20),
        "a <video> or <image>?",
        videos=Video([picture(40, 24, seed) for seed in range(8)], fps=2),
        frames=4,
        methods=[SnapKV("9tok")],
        max_new_tokens=2,
    )
    names = ["frame 0, 0.00 s", "frame 2, 1.00 s", "frame 4, 2.00 s", "frame 6, 3.00 s"]
    if pair.family == "qwen2_5_vl":
        names = ["frame 0 and 2, 0.00 s", "frame 4 and 6, 2.00 s"]
    if pair.family == "qwen3_vl":
        names = ["frame 0 and 2, 0.00 s", "frame 5 and 7, 2.50 s"]
    expected = [*(f"video 1, {name}" for name in names), "picture 1"]
    assert [each.name for each in found.pictures] == expected
    places = np.concatenate([each.positions for each in found.pictures])
    assert places.tolist() == np.flatnonzero(found.visual).tolist()
    assert all(len(each.positions) == len(each.part) for each in found.pictures)
    assert [each.video for each in found.pictures] == [1] * len(names) + [None]
    found.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f'data-frames="1" min="0" max="{len(names) - 1}"' in page
    assert page.count('data-video="1"') == len(names)
