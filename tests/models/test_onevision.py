"""LLaVA-OneVision's own parts: scaled grids, several pictures, and what is refused.

Its features, logits and answers are compared in test_parity, its files in tests/convert.
"""

import math
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vlcache_jax
from pallas_kernels.prefill_attention import prefill_attention
from tests.cli.program import refused
from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax import SnapKV, inspect
from vlcache_jax.checkpoints.weights import parameter_name, split
from vlcache_jax.models.families import read_config
from vlcache_jax.models.llava.anyres import num_tiles
from vlcache_jax.models.llava.clip import VisionTower
from vlcache_jax.models.llava.config import VisionConfig
from vlcache_jax.models.llava.names import LLAVA
from vlcache_jax.models.onevision.anyres import visual_tokens
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.models.onevision.patches import patch_rectangles
from vlcache_jax.requests.buckets import default_buckets
from vlcache_jax.requests.packing import BASE, GRID, NEWLINE, NEWLINE_PART
from vlcache_jax.requests.processing import Processor

FAMILY = "llava_onevision"
REAL = OnevisionConfig.from_hf({"model_type": FAMILY})
PROCESSOR = Processor(tiny_config(FAMILY), tiny_processor(FAMILY))


def interpolation(inputs):
    """Rows and weights of a batch's visual tokens."""
    assert inputs.interpolation is not None
    return inputs.interpolation


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    alone=st.booleans(),
    most=st.sampled_from([1, 4, 9]),
)
@example(size=(1, 1), alone=True, most=9)
@example(size=(1100, 1500), alone=True, most=9)
@example(size=(3000, 2), alone=True, most=9)
@example(size=(1, 151), alone=True, most=1)  # nothing would be left of it
@example(size=(500, 500), alone=False, most=9)
def test_tokens_are_what_hugging_face_packs(size, alone, most):
    torch = pytest.importorskip("torch")
    from transformers.models.llava_onevision import modeling_llava_onevision as hf

    config = tiny_config(FAMILY, 50, anyres_max=most)  # pixels are left over
    pinpoints = [list(pair) for pair in config.grid_pinpoints]
    tiles, width = num_tiles(size, config) if alone else 1, 5
    assert tiles == (hf.image_size_to_num_patches(list(size), pinpoints, 50) if alone else 1)
    generator = torch.manual_seed(0)
    features = torch.randn(tiles, config.vision.num_patches, width, generator=generator)
    newline = torch.randn(width, generator=generator)
    hf_config = SimpleNamespace(vision_config=config.vision, image_grid_pinpoints=pinpoints)
    try:
        [packed], _ = hf.LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=hf_config),  # pyright: ignore[reportArgumentType]
            [features],
            [list(size)],
            image_newline=newline,
            vision_aspect_ratio=f"anyres_max_{most}",
        )
    except RuntimeError:  # of a size of 0
        with pytest.raises(ValueError, match=rf"too thin to be scaled down to anyres_max_{most}:"):
            visual_tokens(size, config, alone=alone)
        return
    rows, weights = visual_tokens(size, config, alone=alone)
    assert (rows.dtype, weights.dtype) == (np.int32, np.float32)
    table = np.concatenate([features.reshape(-1, width).numpy(), newline[None].numpy()])
    ours = table[np.where(rows == NEWLINE, len(table) - 1, rows)] * weights[..., None]
    np.testing.assert_allclose(ours.sum(axis=1), packed.numpy(), atol=1e-5)


def test_a_tower_with_the_published_head_dim_is_hugging_faces():
    """Head dim 72, and pixels left over; norms and biases are random too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = {"hidden_size": 144, "intermediate_size": 64, "image_size": 30, "patch_size": 14}
    config = VisionConfig(
        **shape, num_layers=2, num_heads=2, layer_norm_eps=1e-6, tower="siglip",
        activation="gelu_pytorch_tanh",
    )  # fmt: skip
    graph, state = nnx.split(VisionTower(config, dtype=np.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.2 * rng.standard_normal(leaf.shape, np.float32),
        nnx.to_pure_dict(state),
    )
    tensors = {
        tensor.removeprefix("vision_tower.vision_model."): torch.tensor(array)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for tensor, array in split(LLAVA, f"vision.{parameter_name(path)}", leaf)
    }
    hf_config = transformers.SiglipVisionConfig(
        **shape, num_hidden_layers=2, num_attention_heads=2, vision_use_head=False
    )
    theirs = transformers.SiglipVisionModel(hf_config).eval()
    theirs.load_state_dict(tensors)
    tiles = rng.standard_normal((3, 3, 30, 30), np.float32)
    with torch.no_grad():
        states = theirs(torch.tensor(tiles), output_hidden_states=True).hidden_states
    attend = partial(prefill_attention, causal=False)
    for layers in (1, 2):  # the last is the one in front of the norm behind them
        ours = jax.jit(lambda tiles, n=layers: nnx.merge(graph, params)(tiles, n, attend=attend))
        error = np.abs(np.asarray(ours(tiles)) - states[layers].numpy()).max()
        assert error < 1e-4 * np.abs(states[layers].numpy()).max()


def test_token_counts_of_the_published_shape():
    """By hand: 2 x 2 tiles, of 54 lines 40 show the picture; 4 x 3, 108 x 79 scaled by 1.14."""
    lengths = {
        size: len(visual_tokens(size, REAL, alone=True)[0]) for size in ((480, 640), (1500, 1100))
    }
    assert lengths == {(480, 640): 729 + 40 * 55, (1500, 1100): 729 + 94 * 70}
    assert math.sqrt(108 * 79 / (9 * 729)) == pytest.approx(1.14, abs=0.001)
    assert len(visual_tokens((480, 640), REAL, alone=False)[0]) == 729 + 1


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaOnevisionConfig().to_dict()
    assert OnevisionConfig.from_hf(theirs) == REAL
    assert (REAL.vision_layers, REAL.vision.head_dim, REAL.vision.num_patches) == (26, 72, 729)
    assert REAL.max_tiles == 37
    assert default_buckets(REAL).tiles == (0, 5, 10, 20, 40, 80, 160, 320)
    bare = {
        "vision_config": {"image_size": 384, "model_type": "siglip_vision_model"},
        "text_config": {"vocab_size": 9},
    }
    theirs = transformers.LlavaOnevisionConfig(**bare).to_dict()
    theirs["vision_config"].pop("vision_use_head")  # whose weights would be there
    ours = OnevisionConfig.from_hf({"model_type": FAMILY, **bare})
    assert ours == OnevisionConfig.from_hf(theirs)
    assert ours.text.kind == "qwen2"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision_aspect_ratio", "anyres"),
        ("vision_aspect_ratio", "anyres_max_0"),
        ("vision_aspect_ratio", 9),
        ("vision_feature_select_strategy", "default"),
        ("vision_feature_layer", [-1, -2]),
        ("projector_hidden_act", "relu"),
        ("vision_config.model_type", "clip_vision_model"),
        ("vision_config.vision_use_head", True),
        ("vision_config.num_channels", 1),
        ("vision_config.hidden_act", "relu"),
        ("text_config.use_sliding_window", True),
        ("text_config.model_type", "gemma2"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(name, value):
    section, _, key = name.rpartition(".")
    change = {section: {key: value}} if section else {key: value}
    with pytest.raises(NotImplementedError, match=rf"^config.json: {name}=") as error:
        read_config({"model_type": FAMILY, **change})
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize(("most", "side"), [(9, 28), (4, 42), (6, 336 / 9)])
def test_scaled_tokens_share_the_picture_evenly(most, side):
    config = tiny_config(FAMILY, anyres_max=most)
    found = patch_rectangles((336, 336), config, PROCESSOR.image_processor, alone=True)
    count = round(336 / side)
    assert np.bincount(found.part).tolist() == [16, count * count, count]
    grid = found.rectangles[found.part == GRID].reshape(count, count, 4)
    for i, j in ((0, 0), (1, 3), (count - 1, count - 1)):
        expected = [side * j, side * i, side * (j + 1), side * (i + 1)]
        assert grid[i, j] == pytest.approx(expected, abs=1e-9)
    assert np.isnan(found.rectangles[found.part == NEWLINE_PART]).all()
    assert found.rectangles[0].tolist() == [0, 0, 84, 84]


def test_scaled_tokens_with_padding_and_with_pixels_left_over():
    config = tiny_config(FAMILY)
    found = patch_rectangles((330, 336), config, PROCESSOR.image_processor, alone=True)
    lines = found.rectangles[found.part == GRID].reshape(12, 12, 4)[:, 0]
    assert lines[0].tolist() == [0, 0, 28, 25]  # three pixels of padding above
    assert lines[11].tolist() == [0, 305, 28, 330]
    config = tiny_config(FAMILY, 60)  # four patches of 14, and four pixels
    processor = tiny_processor(FAMILY, 60).image_processor
    found = patch_rectangles((360, 360), config, processor, alone=True)
    line = found.rectangles[found.part == GRID][:4]
    assert line[:, [0, 2]].tolist() == [[0, 28], [28, 56], [60, 88], [88, 116]]


def test_pictures_of_one_prompt_become_one_tile_each():
    inputs = PROCESSOR([picture(90, 40), picture(33, 77)], "a <image> and <image> differ?")
    index = inputs.visual_index[0]
    places = np.flatnonzero(index >= 0)
    newline = 16 * len(inputs.tiles)
    assert index[places].tolist() == [*range(16), newline, *range(16, 32), newline]
    rows, weights = interpolation(inputs)
    assert (rows[0, places] == index[places, None]).all()
    assert weights[0].sum(axis=-1).tolist() == (index >= 0).tolist()
    found = PROCESSOR.patches([(40, 90), (77, 33)])
    assert [set(each.part) for each in found] == [{BASE, NEWLINE_PART}] * 2
    assert found[0].rectangles[4].tolist() == [0, 0, 22.5, 20]  # of 90 x 90, 25 of them above
    assert np.isnan(found[0].rectangles[16]).all()


def test_shapes_depend_on_the_buckets_alone():
    texts = ["<image> small", "<image> large", "no picture"]
    images = [picture(60, 50), picture(330, 336), None]
    small, large, none = (
        PROCESSOR.groups([image, None], [text, "-"], 1)
        for image, text in zip(images, texts, strict=True)
    )
    for inputs in (*small, *large):  # the prompts without a picture too
        assert [part.shape for part in interpolation(inputs)] == [(*inputs.tokens.shape, 4)] * 2
    assert (interpolation(large[0]).weights.max(axis=-1) == 0.25).sum() > 144
    assert none[0].interpolation is None
    assert none[0].tiles.shape[0] == 0


def test_an_inspection_shows_a_scaled_grid(onevision_dir, tmp_path):
    vlm = vlcache_jax.load(onevision_dir)
    image = picture(330, 336)
    found = inspect(vlm, image, "what?", methods=[SnapKV("40tok")], max_new_tokens=2)
    [shown] = found.pictures
    assert shown.positions.tolist() == np.flatnonzero(found.visual).tolist()
    assert len(shown.part) == len(shown.rectangles) == 16 + 12 * 13
    found.save(tmp_path / "page.html")


def test_a_mark_without_a_video_is_refused(onevision_dir):
    words = "1 <video> marks in the text but 0 videos: give one mark for each video"
    with pytest.raises(ValueError, match=f"^{words}"):
        PROCESSOR(None, "what happens in <video>?")
    refused(words, "generate", onevision_dir, "--prompt", "what happens in <video>?")


def test_a_thin_picture_beside_another_is_refused_before_it_is_padded(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match="too thin: resizing it would take 90000 pixels"):
        PROCESSOR([picture(300, 2), picture(9, 9)], "<image><image>")
    assert PROCESSOR([picture(300, 2)], "<image>").tokens.size


def test_processor_files_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="the processor's image_grid_pinpoints"):
        Processor(tiny_config(FAMILY), tiny_processor(FAMILY, pinpoints=((56, 56),)))
