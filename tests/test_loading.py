"""`load` and `describe`: stop tokens, the shipped demo, what is checked before weights are read."""

import gc
import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest

import vlcache_jax
from convert.program import convert
from tests.model_files import config_json, random_tensors, write_model
from tests.tiny import tiny_processor
from vlcache_jax.checkpoints import checkpoint
from vlcache_jax.loading import describe
from vlcache_jax.models.fold import fold_transform


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


def stop_ids(path):
    return vlcache_jax.load(path, lazy=True).stop_ids


def set_text_eos(path, value):
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = value
    (path / "config.json").write_text(json.dumps(config))


def test_stop_ids_of_generation_config_come_first(copy):
    set_text_eos(copy, 9)
    for written, expected in ((7, (7,)), ([7, 8], (7, 8)), (None, (9,))):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        assert stop_ids(copy) == expected


def test_then_the_text_configs_then_the_tokenizers(copy):
    assert stop_ids(copy) == (2,)  # the tokenizer's </s>
    set_text_eos(copy, [5, 6])
    assert stop_ids(copy) == (5, 6)


@pytest.mark.parametrize("value", [["a"], 1.5, True, 264, -1, "2", {"a": 2}, 10**30])
def test_ids_of_generation_config_are_of_the_vocabulary(value, copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"^generation_config\.json: eos_token_id=.*vocabulary"):
        stop_ids(copy)
    wrong = {"eos_token_id": 3, "pad_token_id": 10**9, "bos_token_id": "x"}
    (copy / "generation_config.json").write_text(json.dumps(wrong))
    assert stop_ids(copy) == (3,)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [5, "float64", [], True, "x" * 500])
def test_an_unknown_type_of_config_json_is_named(name, value, copy):
    config = json.loads((copy / "config.json").read_text()) | {name: value}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^config\.json: {name}=.* must be \"float32\" or"):
        describe(copy)
    with pytest.raises(ValueError, match=rf"^config\.json: {name}=.* must be \"float32\" or"):
        vlcache_jax.load(copy)
    assert describe(copy, "bfloat16")["dtype"] == "bfloat16"


def test_64_bits_do_not_break_loading(copy):
    plain = vlcache_jax.load(copy)
    with jax.enable_x64(True):
        wide = vlcache_jax.load(copy, transform=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {np.dtype(np.float32)}
    assert jax.tree.structure(wide.params) == jax.tree.structure(plain.params)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_generation_config_is_named(copy, content):
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        stop_ids(copy)


def test_lazy_loading_checks_the_weights_and_does_not_read_them(copy):
    vlm = vlcache_jax.load(copy, lazy=True)
    assert "params" not in vars(vlm)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        vlcache_jax.load(copy, lazy=True)


def test_buckets_can_be_chosen(copy):
    buckets = vlcache_jax.Buckets(prompt=(100, 200), tiles=(0, 7))
    vlm = vlcache_jax.load(copy, buckets=buckets, lazy=True)
    assert vlm.processor(None, "hello").tokens.shape == (1, 100)


def test_progress_reaches_the_end(copy):
    steps = []
    vlcache_jax.load(copy, progress=lambda *step: steps.append(step))
    assert steps[0][0] == "vision"
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1] == steps[-1][2]


def test_describe_takes_what_fits_by_default(model_dir):
    facts = describe(model_dir)
    assert facts["memory"]["context"] == 1024 + 1 - 128
    assert describe("demo-small")["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="float8"):
        describe(model_dir, "float8")


def test_the_backend_is_that_of_the_environment_unless_given(copy, monkeypatch):
    monkeypatch.setenv("VLCACHE_BACKEND", "triton")
    assert vlcache_jax.load(copy, lazy=True).backend == "triton"
    assert vlcache_jax.load(copy, lazy=True, backend="xla").backend == "xla"
    monkeypatch.delenv("VLCACHE_BACKEND")
    assert vlcache_jax.load(copy, lazy=True).backend is None


def test_an_unknown_backend_is_refused_before_anything_is_read(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' is no backend: use one of triton"):
        vlcache_jax.load("nowhere", backend="cuda")
    monkeypatch.setenv("VLCACHE_BACKEND", "magic")
    with pytest.raises(ValueError, match="VLCACHE_BACKEND='magic'"):
        vlcache_jax.load("nowhere")


def test_a_revision_of_the_hub_is_opened(model_dir, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    vlcache_jax.load("owner/name", revision="v1.6", lazy=True)
    facts = describe("owner/name", revision="main")
    # The configuration first, by which what the model cannot take is refused.
    weights = [("owner/name", "v1.6", False), ("owner/name", "v1.6", True)]
    assert asked == [*weights, ("owner/name", "main", False)]
    assert (facts["model"], facts["revision"]) == ("owner/name", "main")
    for model in (model_dir, "demo-small"):
        with pytest.raises(ValueError, match=r"is not on the hub and has no revision='v1\.6'"):
            vlcache_jax.load(model, revision="v1.6", lazy=True)
        with pytest.raises(ValueError, match="has no revision='main'"):
            describe(model, revision="main")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of eight small layers in both formats."""
    folder, config = tmp_path_factory.mktemp("deep"), config_json()
    config["text_config"] |= {"num_hidden_layers": 8, "vocab_size": 264}
    config["vision_config"] |= {"image_size": 56}
    config["image_grid_pinpoints"] = [[56, 112], [112, 56]]
    plain = write_model(folder / "plain", config, random_tensors(config))
    (plain / "tokenizer.model").unlink()
    tiny_processor("llava_next", pinpoints=((56, 112), (112, 56))).save_pretrained(plain)
    return {"plain": plain, "converted": convert(plain, folder / "converted")}


@pytest.mark.parametrize("kind", ["plain", pytest.param("converted", marks=pytest.mark.full)])
def test_each_layer_is_folded_as_it_is_read(deep, kind, monkeypatch):
    expected = fold_transform(vlcache_jax.load(deep[kind]).params)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
    layer = sum(expected["layers"][0][name].nbytes for name in ("qkv", "out"))
    expected = jax.tree.map(np.array, expected)
    live, fold = [], checkpoint.fold_layer

    def bytes_now():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def watched(*arrays):
        folded = jax.block_until_ready(fold(*arrays))
        live.append(bytes_now())  # both forms of this layer, and what was read before it
        return folded

    monkeypatch.setattr(checkpoint, "fold_layer", watched)
    before = bytes_now()
    vlm = vlcache_jax.load(deep[kind], transform=True)
    assert vlm.transformed
    assert len(live) == 8
    assert max(live) - before <= whole + layer
    assert live == sorted(live)
    sizes = np.diff(live)
    assert set(sizes) == {sum(leaf.nbytes for leaf in jax.tree.leaves(vlm.params["layers"][0]))}
    assert bytes_now() - before == whole
    jax.tree.map(np.testing.assert_array_equal, vlm.params, expected)
