"""Reading Hugging Face configurations: spellings, defaults, and what is refused."""

import json

import pytest

from vlcache_jax.config import LlavaConfig, RopeConfig

MISTRAL = {
    "model_type": "llava_next",
    "image_token_index": 32000,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "use_image_newline_parameter": True,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
VICUNA = {
    "model_type": "llava",
    "image_token_index": 32000,
    "text_config": {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": MISTRAL["vision_config"],
}
YI = {
    **MISTRAL,
    "image_token_index": 64000,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "max_position_embeddings": 4096,
        "num_attention_heads": 56,
        "num_hidden_layers": 60,
        "num_key_value_heads": 8,
        "rope_theta": 5000000.0,
        "vocab_size": 64064,
        "eos_token_id": 7,
    },
}


def with_text(**fields):
    return {**MISTRAL, "text_config": {**MISTRAL["text_config"], **fields}}


def test_llava_next_mistral():
    config = LlavaConfig.from_hf(MISTRAL)
    assert config.family == "llava_next"
    assert (config.vision.grid, config.vision.num_patches, config.vision_layers) == (24, 576, 23)
    text = config.text
    assert (text.num_heads, text.num_kv_heads, text.group_size, text.head_dim) == (32, 8, 4, 128)
    assert text.rope == RopeConfig(theta=1e6)
    assert (text.max_positions, text.intermediate_size, text.rms_norm_eps) == (32768, 14336, 1e-5)
    assert config.grid_pinpoints[-1] == (336, 1008)
    assert text.eos_token_ids == ()


def test_llava_vicuna_is_mha_by_default():
    config = LlavaConfig.from_hf(VICUNA)
    assert (config.text.num_heads, config.text.num_kv_heads, config.text.num_layers) == (32, 32, 32)
    assert config.text.intermediate_size == 11008
    assert config.grid_pinpoints == ()


def test_yi_has_groups_of_seven():
    text = LlavaConfig.from_hf(YI).text
    assert (text.num_heads, text.num_kv_heads, text.group_size, text.head_dim) == (56, 8, 7, 128)
    assert text.eos_token_ids == (7,)


def test_new_and_old_spellings_agree():
    new = with_text(rope_theta=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    new["image_token_id"] = new.pop("image_token_index")
    assert LlavaConfig.from_hf(new) == LlavaConfig.from_hf(MISTRAL)
    old = with_text(rope_scaling={"type": "linear", "factor": 2.0})
    new = with_text(
        rope_theta=None,
        rope_parameters={"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0},
    )
    assert LlavaConfig.from_hf(old) == LlavaConfig.from_hf(new)
    assert LlavaConfig.from_hf(old).text.rope == RopeConfig(1e6, "linear", 2.0)


def test_llama3_rope():
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlavaConfig.from_hf(with_text(rope_scaling=rope))
    assert config.text.rope == RopeConfig(1e6, "llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({**MISTRAL, "model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"architectures": ["GPT2LMHeadModel"]}, "model_type"),
        (with_text(model_type="qwen2"), "qwen2"),
        (with_text(hidden_act="gelu"), "hidden_act"),
        (with_text(attention_bias=True), "attention_bias"),
        (with_text(mlp_bias=True), "mlp_bias"),
        (with_text(sliding_window=4096), "sliding_window"),
        (with_text(rope_scaling={"type": "yarn", "factor": 4.0}), "yarn"),
        (with_text(rope_scaling={"type": "dynamic", "factor": 4.0}), "dynamic"),
        (with_text(rope_parameters={"rope_type": "longrope"}), "longrope"),
        (with_text(final_logit_softcapping=30.0), "final_logit_softcapping"),
        (with_text(quantization_config={"bits": 4}), "quantization_config"),
        ({**MISTRAL, "vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
        ({**MISTRAL, "vision_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({**MISTRAL, "vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({**MISTRAL, "vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({**MISTRAL, "projector_hidden_act": "relu"}, "projector_hidden_act"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(config, name):
    with pytest.raises(NotImplementedError, match=name):
        LlavaConfig.from_hf(config)


def test_a_sliding_window_that_does_not_bind_is_accepted():
    config = LlavaConfig.from_hf(with_text(sliding_window=32768))
    assert config == LlavaConfig.from_hf(MISTRAL)
    absent = {k: v for k, v in MISTRAL["text_config"].items() if k != "sliding_window"}
    with pytest.raises(NotImplementedError, match="sliding_window=4096"):
        LlavaConfig.from_hf({**MISTRAL, "text_config": absent})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**MISTRAL, "auto_map": {"AutoModel": "x.y"}}, "remote code"),
        (with_text(num_attention_heads=0), "num_attention_heads=0"),
        (with_text(num_key_value_heads=5), "multiple"),
        (with_text(hidden_size="big"), "hidden_size='big'"),
        (with_text(head_dim=33), "even"),
        (with_text(rope_scaling={"type": "linear"}), "factor"),
        ({**MISTRAL, "image_grid_pinpoints": [[100, 336]]}, "multiples"),
        ({**MISTRAL, "vision_feature_layer": -40}, "vision_feature_layer"),
    ],
)
def test_impossible_values_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LlavaConfig.from_hf(config)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        LlavaConfig.from_file(tmp_path)


def test_files_and_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="model directory"):
        LlavaConfig.from_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    assert LlavaConfig.from_file(tmp_path) == LlavaConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_defaults_are_those_of_transformers(family):
    """A config.json with almost nothing in it means to us what it means to transformers."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlavaConfig if family == "llava" else transformers.LlavaNextConfig
    theirs = kind()
    bare = {"model_type": family}
    config = LlavaConfig.from_hf(bare)
    assert config == LlavaConfig.from_hf({**theirs.to_dict(), "text_config": {
        k: v for k, v in theirs.text_config.to_dict().items() if k != "eos_token_id"
    }})  # fmt: skip
    assert config.text.intermediate_size == theirs.text_config.intermediate_size
    assert config.vision.image_size == theirs.vision_config.image_size
