"""Qwen3-VL's config.json, the axes of its positions, and its table of learned positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_qwen import qwen_json
from vlcache_jax.models.families import read_config
from vlcache_jax.models.qwen3_vl.config import Qwen3VLConfig, interleaved_axes
from vlcache_jax.models.qwen3_vl.tower import VisionTower

PUBLISHED = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "text_config": {
        "attention_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""As the checkpoint of 4B has it."""


def changed(section, **fields):
    return {**PUBLISHED, section: {**PUBLISHED[section], **fields}}


def text(**fields):
    return changed("text_config", **fields)


def rope(**fields):
    return text(rope_scaling={**PUBLISHED["text_config"]["rope_scaling"], **fields})


def tower(**fields):
    return changed("vision_config", **fields)


def test_the_published_one():
    config = Qwen3VLConfig.from_hf(PUBLISHED)
    decoder, vision = config.text, config.vision
    assert (decoder.kind, decoder.head_dim, decoder.tie_embeddings) == ("qwen3", 128, True)
    assert (decoder.rope.theta, decoder.eos_token_ids) == (5e6, (151645,))
    assert decoder.rope.axes == (0, 1, 2) * 20 + (0,) * 4
    assert (vision.num_layers, vision.head_dim, vision.positions_side) == (24, 64, 48)
    assert (vision.deep_layers, vision.window_side) == ((5, 11, 17), None)
    assert (config.tile_side, config.tile_tokens, config.image_token_id) == (32, 1, 151655)


def test_a_field_that_is_left_out_is_transformers_default():
    theirs = transformers.Qwen3VLConfig().to_dict()
    tower = {"out_hidden_size": theirs["text_config"]["hidden_size"]}
    theirs["vision_config"] |= tower
    assert read_config({"model_type": "qwen3_vl", "vision_config": tower}) == read_config(theirs)
    for section in ("text_config", "vision_config"):
        for name in PUBLISHED[section]:
            if name == "num_key_value_heads":  # null is as many as there are heads
                assert read_config(text(**{name: None})).text.num_kv_heads == 32
            elif name not in ("hidden_size", "out_hidden_size"):
                rest = {key: value for key, value in PUBLISHED[section].items() if key != name}
                left_out = read_config({**PUBLISHED, section: rest})
                assert read_config(changed(section, **{name: None})) == left_out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**PUBLISHED, "model_type": "qwen3_vl_moe"}, "model_type='qwen3_vl_moe'"),
        (text(model_type="qwen3_vl_moe_text"), r"text_config\.model_type='qwen3_vl_moe_text'"),
        (text(attention_bias=True), r"text_config\.attention_bias=True"),
        (rope(rope_type="dynamic"), r"rope_scaling\.rope_type='dynamic'"),
        (rope(mrope_interleaved=False), r"rope_scaling\.mrope_interleaved=False"),
        (tower(model_type="qwen2_5_vl"), r"vision_config\.model_type='qwen2_5_vl'"),
        (tower(hidden_act="silu"), r"vision_config\.hidden_act='silu'"),
        (tower(in_channels=1), r"vision_config\.in_channels=1"),
        (tower(temporal_patch_size=1), r"vision_config\.temporal_patch_size=1"),
        (tower(rope_parameters={"rope_type": "yarn"}), r"rope_parameters\.rope_type='yarn'"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(config, words):
    with pytest.raises(NotImplementedError, match=rf"^config\.json: .*{words}") as error:
        read_config(config)
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (rope(mrope_section=[24, 20]), r"mrope_section=\[24, 20\] must be a list of three"),
        (rope(mrope_section=24), "mrope_section=24 must be"),
        (tower(out_hidden_size=1024), "out_hidden_size=1024 must be .* hidden_size=2560"),
        (tower(num_heads=3), "hidden_size=1024 must be a multiple of 4 times num_heads=3"),
        (tower(deepstack_visual_indexes=5), "deepstack_visual_indexes=5 must be a list"),
        (tower(deepstack_visual_indexes=["a"]), "deepstack_visual_indexes=.* must be a list"),
        (tower(num_position_embeddings=0), "num_position_embeddings=0 must be"),
        (tower(patch_size=[16, 16]), r"patch_size=\[16, 16\] must be"),
        ({**PUBLISHED, "text_config": 5}, "text_config=5 must be an object"),
    ],
)
def test_what_is_impossible_is_named(config, words):
    with pytest.raises(ValueError, match=rf"^config\.json: .*{words}"):
        read_config(config)


@given(sections=st.tuples(*[st.integers(1, 24)] * 3), pairs=st.integers(1, 64))
def test_axes_take_turns(sections, pairs):
    axes = np.zeros(pairs, int)
    for axis in (1, 2):  # as transformers overwrites what turns in time
        axes[axis : 3 * sections[axis] : 3] = axis
    assert interleaved_axes(sections, pairs) == tuple(axes)


@pytest.fixture(scope="module")
def positions():
    """What a tower makes of layouts, and its table."""
    config = Qwen3VLConfig.from_hf(qwen_json("qwen3_vl")).vision
    network = VisionTower(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return jax.jit(network.positions), np.asarray(network.position_embedding[...]), config


ROWS = 48
grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(grids=grids)
def test_learned_positions_are_stretched_over_each_picture(positions, grids):
    places, table, config = positions
    side, merge = config.positions_side, config.merge_size
    assert len(table) > side * side  # of a table that is no square the rest is not read
    square = table[: side * side].reshape(side, side, -1).astype(np.float64)
    layout, expected = [], []
    for picture, grid in enumerate(grids):
        down, across = (np.linspace(0, side - 1, merge * n) for n in grid)
        wide = np.array([[np.interp(across, range(side), line) for line in channel]
                         for channel in np.moveaxis(square, -1, 0)])  # fmt: skip
        whole = np.array([[np.interp(down, range(side), line) for line in channel.T]
                          for channel in wide])  # fmt: skip
        for row, column in np.ndindex(grid):
            layout.append((picture, picture, row, column))
            patches = whole[:, merge * column :][:, :merge, merge * row :][:, :, :merge]
            expected.append(patches.transpose(2, 1, 0).reshape(merge * merge, -1))
    padded = np.full((ROWS, 4), -1, np.int32)
    padded[: len(layout)] = layout
    found = np.asarray(places(padded))
    assert np.isfinite(found).all()
    made = found.reshape(ROWS, merge * merge, -1)[: len(layout)]
    np.testing.assert_allclose(made, expected, atol=1e-6)
