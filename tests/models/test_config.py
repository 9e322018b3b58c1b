"""Reading Hugging Face configurations: spellings, defaults, and what is refused."""

import json

import pytest

from vlcache_jax.models.config import DECODERS, ModelConfig, RopeConfig
from vlcache_jax.models.llava.config import LlavaConfig

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
        (with_text(model_type="gemma2"), "gemma2"),
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


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"null", b"\xef\xbb\xbf{}", b"\x00\xff\xfe", b"[" * 100_000, b"{}x"],
    ids=["empty", "open", "list", "null", "BOM", "binary", "deep", "more"],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json (is not valid|must hold)") as error:
        LlavaConfig.from_file(tmp_path)
    assert len(str(error.value)) <= 400
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("kind", DECODERS)
def test_defaults_of_decoders_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    bare = ModelConfig.from_hf({"model_type": kind} | (
        {"sliding_window": None} if kind == "mistral" else {}
    ))  # fmt: skip
    told = {key: value for key, value in theirs.items() if key != "eos_token_id"}
    assert bare == ModelConfig.from_hf(told | {"sliding_window": None})
    assert bare.text.head_dim == theirs.get("head_dim", 128)
    assert bare.text.vocab_size == theirs["vocab_size"]


def test_what_of_qwen_changes_the_mathematics_is_refused_by_name():
    for kind in ("qwen2", "qwen3"):
        ModelConfig.from_hf({"model_type": kind, "sliding_window": 128})  # means nothing alone
        with pytest.raises(NotImplementedError, match="use_sliding_window"):
            ModelConfig.from_hf({"model_type": kind, "use_sliding_window": True})
    with pytest.raises(NotImplementedError, match="attention_bias"):
        ModelConfig.from_hf({"model_type": "qwen3", "attention_bias": True})


def test_null_is_the_default():
    """Every field that is null means what it means where it is left out, but for two."""
    text = MISTRAL["text_config"]
    names = (
        *("vocab_size", "hidden_size", "rms_norm_eps", "rope_theta", "hidden_act"),
        *("intermediate_size", "num_hidden_layers", "head_dim", "rope_scaling"),
        *("rope_parameters", "tie_word_embeddings", "eos_token_id", "attention_bias"),
    )
    for name in names:
        left_out = {key: value for key, value in text.items() if key != name}
        assert LlavaConfig.from_hf(with_text(**{name: None})) == LlavaConfig.from_hf(
            {**MISTRAL, "text_config": left_out}
        )
    for name in MISTRAL["vision_config"]:
        tower = {key: value for key, value in MISTRAL["vision_config"].items() if key != name}
        if name not in ("num_attention_heads", "image_size"):  # 12 and 224 do not divide
            assert LlavaConfig.from_hf(
                {**MISTRAL, "vision_config": {**tower, name: None}}
            ) == LlavaConfig.from_hf({**MISTRAL, "vision_config": tower})
    for name in {*MISTRAL} - {"model_type", "text_config"}:
        left_out = {key: value for key, value in MISTRAL.items() if key != name}
        assert LlavaConfig.from_hf({**left_out, name: None}) == LlavaConfig.from_hf(left_out)
    assert LlavaConfig.from_hf(with_text(num_key_value_heads=None)).text.num_kv_heads == 32


WRONG = ("x", [], [1], {}, {"a": 1}, True, -1, 0, 1.5, 10**400, float("nan"), float("-inf"), "")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS = {
    **{f"text_config.{name}": () for name in (*SIZES, "vocab_size", "num_key_value_heads")},
    **{f"text_config.{name}": () for name in ("max_position_embeddings", "head_dim")},
    **{f"vision_config.{name}": () for name in (*SIZES, "image_size", "patch_size")},
    "text_config.sliding_window": (),
    "text_config.rms_norm_eps": (1.5,),
    "text_config.rope_theta": (1.5,),
    "text_config.hidden_act": (),
    "text_config.model_type": (),
    "text_config.attention_bias": (),
    "text_config.tie_word_embeddings": (True,),
    "text_config.rope_scaling": ({}, {"a": 1}),
    "text_config.rope_parameters": ({}, {"a": 1}),
    "text_config.eos_token_id": ([], [1], 0),
    "vision_config.layer_norm_eps": (1.5,),
    "vision_config.hidden_act": (),
    "text_config": ({}, {"a": 1}),
    "vision_config": ({}, {"a": 1}),
    "model_type": (),
    "image_token_index": (0,),
    "image_token_id": (0,),
    "image_grid_pinpoints": (),
    "vision_feature_layer": ([1], -1, 0),
    "vision_feature_select_strategy": (),
    "projector_hidden_act": (),
    "multimodal_projector_bias": (True,),
    "tie_word_embeddings": (True,),
    "quantization_config": (),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_another_type_is_named(name, tmp_path):
    section, _, key = name.rpartition(".")
    for value in WRONG:
        if any(value == right and type(value) is type(right) for right in FIELDS[name]):
            continue
        config = {k: v for k, v in MISTRAL.items() if k != "image_token_index"}
        config |= {section: {**config[section], key: value}} if section else {key: value}
        with pytest.raises((ValueError, NotImplementedError)) as error:
            LlavaConfig.from_hf(config)
        text = str(error.value)
        assert text.startswith(f"config.json: {name}"), text
        assert len(text) <= 400
        assert "\n" not in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_type", 5),
        ("type", ["linear"]),
        ("factor", None),
        ("factor", "x"),
        ("factor", 0),
        ("rope_theta", "x"),
        ("low_freq_factor", [1]),
        ("high_freq_factor", True),
        ("low_freq_factor", 4),
        ("original_max_position_embeddings", 1.5),
        ("partial_rotary_factor", 0.5),
    ],
)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_fields_of_rope_are_named(section, field, value):
    rope = {"rope_type": "llama3", "factor": 8.0, field: value}
    if field == "type":
        del rope["rope_type"]
    with pytest.raises(
        (ValueError, NotImplementedError), match=rf"json: text_config\.{section}\.{field}"
    ):
        LlavaConfig.from_hf(with_text(**{section: rope}))


@pytest.mark.parametrize("value", [["a"], 1.5, True, -1, 32064, [2, 32064], "2", {"a": 1}])
def test_ids_beyond_the_vocabulary_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"text_config\.eos_token_id=.* vocabulary, .* to 32063"):
        LlavaConfig.from_hf(with_text(eos_token_id=value))
    assert LlavaConfig.from_hf(with_text(pad_token_id=10**9, bos_token_id="x", unknown=[{}]))


@pytest.mark.parametrize("config", [None, 5, "x", [], [("model_type", "llava")]])
def test_a_config_that_is_no_object_is_refused(config):
    with pytest.raises(ValueError, match=r"config\.json must hold an object"):
        LlavaConfig.from_hf(config)
