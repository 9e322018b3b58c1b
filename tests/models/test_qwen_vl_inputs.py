"""What Qwen-VL models are given: pixels, marks, buckets; Qwen2.5-VL's config.json, attentions."""

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pallas_kernels.prefill_attention import prefill_attention
from tests.tiny import picture
from tests.tiny_qwen import (
    IMAGE_ID,
    TILE,
    qwen_images,
    qwen_json,
    qwen_processor,
    qwen_tokenizer,
)
from vlcache_jax.models.families import read_config
from vlcache_jax.models.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.qwen_vl.layout import Span, prompt_positions
from vlcache_jax.models.qwen_vl.packing import MARK, PAD
from vlcache_jax.models.qwen_vl.tower import picture_attention, window_attention
from vlcache_jax.requests.buckets import default_buckets
from vlcache_jax.requests.inputs import CONTEXT
from vlcache_jax.requests.processing import Processor

PUBLISHED = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vocab_size": 151936,
}
"""As the checkpoint of 3B has it."""


def tower(**fields):
    return {**PUBLISHED, "vision_config": {**PUBLISHED["vision_config"], **fields}}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def processor(request):
    return Processor(read_config(qwen_json(request.param)), qwen_processor(request.param))


class TestConfig:
    def test_the_published_one(self):
        config = QwenVLConfig.from_hf(PUBLISHED)
        text, vision = config.text, config.vision
        assert (text.kind, text.head_dim, text.tie_embeddings) == ("qwen2", 128, True)
        assert text.rope.theta == 1e6
        assert text.rope.axes == (0,) * 16 + (1,) * 24 + (2,) * 24
        assert (vision.num_layers, vision.head_dim, vision.window_side) == (32, 80, 4)
        assert vision.full_layers == (7, 15, 23, 31)
        assert (config.tile_side, config.tile_tokens, config.image_token_id) == (28, 1, 151655)

    def test_a_field_that_is_null_or_left_out_is_the_default_of_the_class(self):
        for name in {*PUBLISHED} - {"model_type", "vision_config", "hidden_size"}:
            rest = {key: value for key, value in PUBLISHED.items() if key != name}
            if name == "num_key_value_heads":  # null is as many as there are heads
                assert read_config({**rest, name: None}).text.num_kv_heads == 16
            elif name != "num_attention_heads":  # 64 heads are of 32 channels
                assert read_config({**rest, name: None}) == read_config(rest)
        with pytest.raises(ValueError, match="mrope_section has 64 frequencies, but a head of 32"):
            read_config({**PUBLISHED, "num_attention_heads": None})
        bare = read_config({"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}})
        assert (bare.text.num_layers, bare.text.rms_norm_eps, bare.text.rope.theta) == (
            80,
            1e-5,
            1e6,
        )

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (tower(hidden_act="gelu"), r"vision_config\.hidden_act='gelu'"),
            (tower(in_chans=1), r"vision_config\.in_chans=1"),
            (tower(temporal_patch_size=1), r"vision_config\.temporal_patch_size=1"),
            (tower(model_type="clip"), r"vision_config\.model_type='clip'"),
            (tower(rope_parameters={"rope_type": "yarn"}), r"rope_parameters\.rope_type='yarn'"),
            ({**PUBLISHED, "use_sliding_window": True}, "use_sliding_window=True"),
            ({**PUBLISHED, "hidden_act": "gelu"}, "hidden_act='gelu'"),
            ({**PUBLISHED, "rope_scaling": {"type": "yarn"}}, r"rope_scaling\.type='yarn'"),
            ({**PUBLISHED, "text_config": {"model_type": "llama"}}, r"text_config\.model_type"),
        ],
    )
    def test_what_changes_the_mathematics_is_refused_by_name(self, config, words):
        with pytest.raises(NotImplementedError, match=rf"^config\.json: .*{words}") as error:
            read_config(config)
        assert len(str(error.value)) <= 400

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (tower(out_hidden_size=1024), "out_hidden_size=1024 must be .* hidden_size=2048"),
            (tower(num_heads=3), "hidden_size=1280 must be a multiple of 4 times num_heads=3"),
            (tower(window_size=20), "window_size=20 must be at least 28"),
            (tower(fullatt_block_indexes=7), "fullatt_block_indexes=7 must be a list"),
            (tower(depth="x"), "depth='x' must be"),
            ({**PUBLISHED, "rope_scaling": {"mrope_section": [16]}}, "16 frequencies, but a head"),
            ({**PUBLISHED, "rope_scaling": {"mrope_section": 16}}, "mrope_section=16 must be"),
            ({**PUBLISHED, "text_config": 5}, "text_config=5 must be an object"),
        ],
    )
    def test_what_is_impossible_is_named(self, config, words):
        with pytest.raises(ValueError, match=rf"^config\.json: .*{words}"):
            read_config(config)


class TestPrompts:
    def test_pixels_are_those_of_the_resized_picture(self, processor):
        image = picture(75, 50)
        inputs = processor(image, "<image>", raw_prompt=True)
        rows = inputs.visual_index[inputs.visual_index >= 0]
        down, across = inputs.layout[: len(rows), 2:].max(axis=0) + 1
        tiles = inputs.tiles[rows].reshape(down, across, 3, TILE, TILE)
        whole = tiles.transpose(2, 0, 3, 1, 4).reshape(3, down * TILE, across * TILE)
        resized = image.resize((across * TILE, down * TILE), Image.Resampling.BICUBIC)
        given, settings = np.asarray(resized, np.float32).transpose(2, 0, 1) / 255, qwen_images()
        mean, std = (np.array(x)[:, None, None] for x in (settings.image_mean, settings.image_std))
        np.testing.assert_allclose(whole, (given - mean) / std, atol=1e-5)
        # Line by line in the prompt, whatever the tower's order.
        assert inputs.layout[rows, 2:].tolist() == list(map(list, np.ndindex(down, across)))

    def test_a_token_shows_the_pixels_of_its_rectangle(self, processor):
        image = picture(8 * TILE, 5 * TILE)  # stays as it is
        inputs = processor(image, "<image>", raw_prompt=True)
        (found,) = processor.patches([(image.height, image.width)])
        rows = inputs.visual_index[inputs.visual_index >= 0]
        assert len(rows) == len(found.rectangles) == 40
        settings = qwen_images()
        for row, rectangle in zip(rows, found.rectangles, strict=True):
            left, top, right, bottom = map(int, rectangle)
            pixels = np.asarray(image.crop((left, top, right, bottom)), np.float32) / 255
            pixels = (pixels - settings.image_mean) / settings.image_std
            np.testing.assert_allclose(inputs.tiles[row], pixels.transpose(2, 0, 1), atol=1e-5)

    def test_both_marks_stand_for_a_picture(self, processor):
        images = [picture(20, 30), picture(60, 20)]
        for raw in (True, False):
            one = processor(images, "a <image> b <image>?", raw_prompt=raw)
            for other in (f"a {MARK} b <image>?", f"a {MARK} b {MARK}?"):
                same = processor(images, other, raw_prompt=raw)
                np.testing.assert_array_equal(one.tokens, same.tokens)
                np.testing.assert_array_equal(one.tiles, same.tiles)
        text = processor.render("what?", 1)
        assert text == f"<|im_start|>user\n{MARK}what?<|im_end|>\n<|im_start|>assistant\n"

    def test_windows_and_pictures_are_counted_through_the_batch(self, processor):
        wide, small = picture(120, 20), picture(20, 20)
        texts = ["<image>", "no", "<image> <image>"]
        batch = processor([wide, None, [small, wide]], texts, raw_prompt=True)
        count = int((batch.layout[:, 0] >= 0).sum())
        number, window = batch.layout[:count, :2].T
        assert np.unique(number).tolist() == [0, 1, 2]
        assert (np.diff(window) >= 0).all()
        assert np.unique(window).tolist() == list(range(window.max() + 1))
        assert len(np.unique(batch.layout[:count, :2], axis=0)) == window.max() + 1
        index = batch.visual_index[batch.visual_index >= 0]
        assert sorted(index) == list(range(count))
        alone = processor(wide, "<image>", raw_prompt=True)
        own, ours = (index[0][index[0] >= 0] for index in (alone.visual_index, batch.visual_index))
        np.testing.assert_array_equal(batch.tiles[ours], alone.tiles[own])

    def test_text_alone_has_no_tiles(self, processor):
        inputs = processor(None, "only words")
        assert inputs.tiles.shape == (0, 3, TILE, TILE)
        assert inputs.layout is None
        length = int(inputs.length[0])
        assert (inputs.positions[:, 0, :length] == np.arange(length)).all()

    def test_a_context_is_found_behind_a_picture(self, processor):
        inputs = processor(picture(40, 40), "what?", context="A lamp.")
        own = inputs.tokens[inputs.visual_index == CONTEXT]
        assert processor.tokenizer.decode(own) == "A lamp."

    @pytest.mark.parametrize("raw", [True, False])
    def test_a_mark_without_a_video_is_refused(self, raw, processor):
        words = r"1 <\|video_pad\|> tokens in the prompt but 0 videos: write <video>, or <\|vision"
        with pytest.raises(ValueError, match=words):
            processor(None, "what <|video_pad|> is it?", raw_prompt=raw)

    def test_a_token_without_its_picture_is_refused(self, processor):
        with pytest.raises(ValueError, match=r"1 <\|image_pad\|> tokens .* but 0 images"):
            processor(None, f"what {PAD}?", raw_prompt=True)
        with pytest.raises(ValueError, match=r"1 .* marks in the text but 2 images"):
            processor([picture(9, 9)] * 2, "<image>", raw_prompt=True)

    def test_a_picture_that_is_too_thin_is_refused(self, processor):
        with pytest.raises(ValueError, match=r"1 x 300 pixels .*aspect ratio.*crop or scale it"):
            processor(picture(1, 300), "<image>", raw_prompt=True)

    def test_a_processor_of_another_model_is_refused(self):
        config = read_config(qwen_json())
        with pytest.raises(ValueError, match="patch_size is 14, but the model's is 4"):
            Processor(config, qwen_processor(patch_size=14))
        other = read_config(qwen_json() | {"image_token_id": 5})
        with pytest.raises(ValueError, match=f"{IMAGE_ID}, but the model's image_token_id is 5"):
            Processor(other, qwen_processor())

    def test_files_as_old_checkpoints_have_them(self, tmp_path, processor):
        """A template in a file of its own, a resolution as `min_pixels` and `max_pixels`."""
        qwen_tokenizer().save_pretrained(tmp_path)
        template = tmp_path / "chat_template.jinja"
        old = json.dumps({"chat_template": template.read_text()})
        template.unlink()
        (tmp_path / "chat_template.json").write_text(old)
        config = processor.config
        with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json or"):
            Processor.from_pretrained(tmp_path, config)
        qwen_images().save_pretrained(tmp_path)
        file = tmp_path / "preprocessor_config.json"
        data = json.loads(file.read_text())
        size = data.pop("size")
        data |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        file.write_text(json.dumps(data))
        read = Processor.from_pretrained(tmp_path, config)
        for size in ((400, 300), (3, 5)):
            ours, theirs = (each(picture(*size), "what?") for each in (read, processor))
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.tiles, theirs.tiles)


class TestBuckets:
    CONFIG = read_config(PUBLISHED)

    def test_sizes(self):
        buckets = default_buckets(self.CONFIG)
        assert buckets.prompt[:8] == (128, 224, 384, 640, 1056, 1824, 3104, 5248)
        assert buckets.prompt[-1] == 128000
        tiles = [buckets.tiles_for(n, 1824) for n in (0, 1, 432, 433, 1728, 1729)]
        assert tiles == [0, 432, 432, 1728, 1728, 1824]
        assert buckets.tiles_for(3, 384) == 288
        assert buckets.tiles_for(3, 128) == 32
        assert buckets.tiles_for(33, 128) == 128
        assert buckets.tiles_for(500, 384, 4) == 4 * 288

    @pytest.mark.parametrize(
        ("tokens", "tiles", "rows"),
        [(128, 0, 128), (128, 1, 128), (100, 33, 224), (384, 288, 384), (384, 289, 640),
         (127999, 127990, 128000)],
    )  # fmt: skip
    def test_a_prompt_has_room_for_its_tiles(self, tokens, tiles, rows):
        buckets = default_buckets(self.CONFIG)
        assert buckets.rows_for(tokens, tiles) == rows
        assert tiles <= buckets.tiles_for(tiles, rows) <= rows

    @pytest.mark.parametrize(
        "side", [lambda q: 32 + q * 1968, lambda q: 32 * 62.5**q], ids=["uniform", "log-uniform"]
    )
    def test_pictures_of_all_sizes_touch_few_programs(self, side):
        """Of a hundred at most 8; on average at most 30 % of prompts and of tiles is padding."""
        buckets = default_buckets(self.CONFIG)
        published = {"shortest_edge": 56 * 56, "longest_edge": 12845056}
        images = qwen_images(size=published, patch_size=14)

        def sizes(quantiles, words):
            """Tokens and tiles of pictures, and their T and S, int [n, 4]."""
            for (height, width), extra in zip(side(quantiles).astype(int), words, strict=True):
                count = images.get_number_of_image_patches(height, width) // 4
                prompt = buckets.rows_for(count + extra, count)
                yield count + extra, count, prompt, buckets.tiles_for(count, prompt)

        for seed in range(5):
            rng = np.random.default_rng(seed)
            drawn = sizes(rng.uniform(size=(100, 2)), rng.integers(30, 110, 100).tolist())
            assert len({found[2:] for found in drawn}) <= 8
        grid = (np.indices((60, 60)).reshape(2, -1).T + 0.5) / 60
        words = 30 + np.arange(len(grid)) % 80  # of the question and the template
        total = np.sum(list(sizes(grid, words.tolist())), axis=0)
        assert (1 - total[:2] / total[2:] <= 0.3).all()


spans = st.builds(
    Span, st.integers(1, 5), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.floats(0, 9)
)


@given(parts=st.lists(st.one_of(st.integers(1, 9), spans), max_size=6))
def test_positions_are_those_of_a_walk(parts):
    expected, visual, at = [], [], 0
    for part in parts:
        if isinstance(part, int):
            expected += [(at + i,) * 3 for i in range(part)]
            visual += [False] * part
            at += part
        else:
            for step in range(part.steps):
                time = at + int(np.float32(step) * np.float32(part.interval))
                expected += [(time, at + i, at + j) for i, j in np.ndindex(part.grid)]
                visual += [True] * (part.grid[0] * part.grid[1])
            at += max(part.grid)
    found = [part for part in parts if not isinstance(part, int)]
    made = prompt_positions(np.array(visual, bool), found)
    assert made.T.tolist() == list(map(list, expected))


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_windows_and_pictures_attend_to_themselves_alone(sizes, seed):
    parts = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    rows = 135  # one shape, or each example compiles programs of its own
    segment = np.pad(parts, (0, rows - len(parts)), constant_values=-1)
    rng = np.random.default_rng(seed)
    heads = rng.standard_normal((3, rows, 2, 4)).astype(np.float32)
    inside = segment >= 0
    q, k, v = (x[inside].astype(np.float64) for x in heads)
    logits = np.einsum("qnh,knh->nqk", q, k) / 2
    same = segment[inside][:, None] == segment[inside]
    weights = np.where(same, np.exp(logits), 0)
    expected = np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)
    arrays = jnp.asarray(heads[0]), jnp.asarray(heads[1]), jnp.asarray(heads[2])
    windows = np.asarray(window_attention(arrays, jnp.asarray(segment), 16))
    np.testing.assert_allclose(windows[inside], expected, atol=1e-5)
    assert np.isfinite(windows).all()
    attend = partial(prefill_attention, causal=False)
    pictures = np.asarray(picture_attention(arrays, jnp.asarray(segment), attend))
    np.testing.assert_allclose(pictures[inside], expected, atol=1e-5)
    assert not pictures[~inside].any()
