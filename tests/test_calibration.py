"""Layer kinds of a checkpoint: the measure against numpy, the file, and who reads it."""

import json
import os
import shutil
from dataclasses import dataclass

import jax
import numpy as np
import pytest

import vlcache_jax
from tests.cli.program import run
from tests.tiny import picture
from vlcache_jax import AKVQ, Calibration, FullCache, Generate, VLCache, calibrate, demo
from vlcache_jax.cache.method import CacheMethod, Observation
from vlcache_jax.calibration import KV_LAYERS, file_beside
from vlcache_jax.loading import describe

IMAGES = [picture(70, 40), picture(40, 90, seed=1)]
TEXTS = ["what is here?", "and what is there, below?"]
PIVOTS = 60  # so many that some are text: with random weights visual tokens stand out


@pytest.fixture(scope="module")
def vlm(model_dir):
    return vlcache_jax.load(model_dir)


@pytest.fixture(scope="module")
def found(vlm):
    return calibrate(vlm, IMAGES, TEXTS, pivots=PIVOTS)


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


@dataclass(frozen=True)
class Spy(CacheMethod):
    """Shows queries, keys and the entering stream of every layer in the place of a score."""

    def rules(self):
        return None, None  # pyright: ignore[reportReturnType]

    def observe(self, layer):
        return Observation(layer.q, layer.k, layer.entering)


def numpy_shares(q, k, entering, visual):
    """One layer and prompt: q [m, N, H], k [m, K, H], stream [m, D], which are visual [m]."""
    m, heads, size = q.shape
    k = np.repeat(k, heads // k.shape[1], axis=1)
    window = np.arange(np.flatnonzero(visual)[-1] + 1, m)
    logits = np.einsum("inh,jnh->nij", q[window], k) / np.sqrt(size)
    logits = np.where(np.arange(m) <= window[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    attention = (weights / weights.sum(-1, keepdims=True)).mean((0, 1))  # [m], sums to 1
    pivots = np.argsort(-np.abs(entering).max(-1), kind="stable")[:PIVOTS]
    text = np.setdiff1d(np.flatnonzero(~visual), pivots)
    assert 0 < len(text) < np.sum(~visual)
    return attention[text].sum()


def test_the_share_is_that_of_numpy(vlm, found):
    generate = Generate(vlm.config, Spy(0.5))
    settings = generate.settings(1)
    prefill = generate.stages.prefill
    run = jax.jit(lambda params, inputs: prefill(params, inputs, settings)[0].seen)
    expected = []
    for inputs in vlm.processor.groups(IMAGES, TEXTS, 1):
        seen, m = run(vlm.params, inputs), int(inputs.length[0])
        arrays = seen.scores, seen.measured, seen.salience
        layers = zip(*(np.asarray(x[0, :, :m], np.float64) for x in arrays), strict=True)
        visual = inputs.visual_index[0, :m] >= 0
        expected.append([numpy_shares(q, k, x, visual) for q, k, x in layers])
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found.text_shares, np.mean(expected, axis=0), rtol=1e-4)
    assert (found.prompts, found.pivots, found.threshold) == (2, PIVOTS, 0.5)
    assert found.versions["jax"] == jax.__version__


def test_the_threshold_makes_the_kinds():
    found = Calibration((0.2, 0.5, 0.51, 0.9))
    assert found.tsa_layers == (2, 3)
    assert Calibration(found.text_shares, threshold=0.6).tsa_layers == (3,)


@pytest.mark.parametrize(
    ("images", "text", "options", "message"),
    [
        ([None, IMAGES[0]], TEXTS, {}, "prompt 1 has no picture"),
        (None, "words", {}, "prompt 1 has no picture"),
        (IMAGES, TEXTS[:1], {}, "1 texts but 2 entries"),
        (IMAGES, TEXTS, {"threshold": 1.5}, "threshold=1.5"),
        (IMAGES, TEXTS, {"pivots": -1}, "pivots=-1"),
        (IMAGES, ["x" * 2000, ""], {}, "positions"),
    ],
)
def test_bad_input_is_refused_before_the_parameters_are_read(
    model_dir, images, text, options, message
):
    lazy = vlcache_jax.load(model_dir, lazy=True)
    lazy._read_params = lambda: pytest.fail("the parameters were read")
    with pytest.raises(ValueError, match=message):
        calibrate(lazy, images, text, **options)


def test_a_picture_and_a_video(onevision_dir, tmp_path):
    """As the command pairs them with the questions: each is a prompt of its own."""
    film, shot, out = tmp_path / "a.gif", tmp_path / "a.png", tmp_path / "found.json"
    IMAGES[0].save(film, save_all=True, append_images=[picture(70, 40, seed) for seed in (2, 3)])
    IMAGES[1].save(shot)
    asked = ("--prompt", TEXTS[0], "--prompt", TEXTS[1], "--out", out)
    both = ("--video", film, "--image", shot, "--frames", 2)
    result = run("calibrate", onevision_dir, *both, *asked)
    assert result.exit_code == 0, result.output
    vlm = vlcache_jax.load(onevision_dir)
    alone = calibrate(vlm, shot, TEXTS[0]), calibrate(vlm, None, TEXTS[1], videos=film, frames=2)
    expected = np.mean([each.text_shares for each in alone], axis=0)
    found = Calibration.read(out)
    assert found.prompts == 2
    np.testing.assert_allclose(found.text_shares, expected, rtol=1e-5)
    assert abs(alone[0].text_shares[0] - alone[1].text_shares[0]) > 1e-3


def test_a_file_is_read_as_it_was_written(found, tmp_path):
    file = tmp_path / "found.json"
    found.save(file)
    assert Calibration.read(file) == Calibration.read(file, layers=2) == found
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    other = Calibration((0.1,))
    with pytest.raises(FileExistsError, match="--force"):
        other.save(file)
    assert Calibration.read(file) == found
    other.save(file, force=True)
    assert Calibration.read(file) == other
    with pytest.raises(ValueError, match=r"end in \.json"):
        other.save(tmp_path / "found.txt")


def tsa_layers(vlm, cache):
    return vlm.request(None, "x", cache=cache).generate.cache.quantize.tsa_layers


def test_a_file_beside_the_weights_is_used(copy):
    assert tsa_layers(vlcache_jax.load(copy, lazy=True), AKVQ()) == (0, 1)  # a Llama, uncalibrated
    plain = describe(copy, cache=FullCache(quantize=AKVQ()))["memory"]["pool"]
    Calibration((0.2, 0.7)).save(copy / KV_LAYERS)
    vlm = vlcache_jax.load(copy, lazy=True)
    assert vlm.tsa_layers == tsa_layers(vlm, AKVQ()) == (1,)
    assert tsa_layers(vlm, VLCache(quantize=AKVQ())) == (1,)
    assert tsa_layers(vlm, AKVQ(tsa_layers=(0,))) == (0,)
    assert vlm.request(None, "x", cache=VLCache()).generate.cache == VLCache()
    assert describe(copy, cache=FullCache(quantize=AKVQ()))["memory"]["pool"] < plain


GOOD = {"format": 1, "text_shares": [0.1, 0.9], "threshold": 0.5, "pivots": 15, "prompts": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no calibration file"),
        (json.dumps(GOOD)[:-5], "no calibration file"),
        ("[]", "no calibration file"),
        (json.dumps(GOOD | {"format": 2}), "format is not 1"),
        (json.dumps(GOOD | {"text_shares": [0.1, 1.5]}), "text_shares"),
        (json.dumps(GOOD | {"text_shares": [0.1, "x"]}), "no calibration file"),
        (json.dumps(GOOD | {"text_shares": 0.5}), "no calibration file"),
        (json.dumps(GOOD | {"threshold": None}), "no calibration file"),
        (json.dumps(GOOD | {"more": 1}), "more"),
        (json.dumps({"format": 1}), "text_shares"),
        (json.dumps(GOOD | {"text_shares": [0.1] * 3}), "of 3 layers, this one has 2"),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy(copy, content, message):
    (copy / KV_LAYERS).write_text(content)
    with pytest.raises(ValueError, match=rf"kv_layers\.json is .*{message}.*vlcache calibrate"):
        vlcache_jax.load(copy, lazy=True)


def test_where_a_file_goes(copy, monkeypatch):
    assert file_beside(copy) == copy / KV_LAYERS
    for model in ("demo-small", demo.MODELS["demo-small"], "owner/name"):
        with pytest.raises(ValueError, match="--out"):
            file_beside(model)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="--out"):
        file_beside(copy)
