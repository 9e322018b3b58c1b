"""`load` and `describe`: stop tokens, the shipped demo, what is checked before weights are read."""

import json
import shutil

import jax
import numpy as np
import pytest

import vlcache_jax
from convert.program import convert
from vlcache_jax import checkpoint
from vlcache_jax.checkpoint import load_params
from vlcache_jax.loading import describe
from vlcache_jax.models.fold import fold_layer, fold_transform


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
    assert describe("demo")["dtype"] == "bfloat16"
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


@pytest.mark.parametrize("kind", ["hugging face", "converted"])
def test_each_layer_is_folded_as_it_is_read(model_dir, tmp_path, monkeypatch, kind):
    """At no time are there more arrays than the parameters and one layer's kernels."""
    if kind == "converted":
        convert(model_dir, tmp_path / "converted")
        model_dir = tmp_path / "converted"
    expected = fold_transform(load_params(model_dir))
    before, alive = {id(array) for array in jax.live_arrays()}, []

    def fold(qkv, out, fold=fold_layer):
        folded = fold(qkv, out)
        alive.append(sum(id(array) not in before for array in jax.live_arrays()))
        return folded

    monkeypatch.setattr(checkpoint, "fold_layer", fold)
    vlm = vlcache_jax.load(model_dir, transform=True)
    leaves = jax.tree.leaves(vlm.params)
    layer = len(jax.tree.leaves(vlm.params["layers"][0]))
    first, second = alive
    assert second == first + layer  # the second was read when the first had been folded
    assert second <= len(leaves) + 2
    for one, other in zip(leaves, jax.tree.leaves(expected), strict=True):
        assert np.array_equal(one, other)
    assert vlm.transformed
