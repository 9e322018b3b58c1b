"""The paper's ablation: each part of the quantizer helps where there is what it is for."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import benchmarks
from benchmarks import quantization
from benchmarks.documents import NOT_MEASURED
from benchmarks.quantization import (
    IS_VISUAL,
    OTHERS,
    PARTS,
    SHAPE,
    TSA,
    Planted,
    Structure,
    ablation,
    bits_of,
    plant,
    reference,
    stages,
)

RESULT = Path(benchmarks.__file__).parent / "results" / "accuracy" / "quantization.json"
SEEDS = [0, 1, 2]
ORDER = ["RTN", "+ WHT", "+ TSA", "+ PSA"]


@pytest.fixture(scope="module")
def errors():
    """Of a structure: what each stage's row says, compiled once for all structures."""

    def run(structure):
        return {row["name"]: row for row in ablation(structure, SEEDS, stages())}

    return run


@pytest.fixture(scope="module")
def whole(errors):
    return errors(Structure())


def check_order(rows):
    """Errors fall with every stage and seed, and bits do not rise."""
    found = [next(row for row in rows if row["name"] == name) for name in ORDER]
    for before, after in itertools.pairwise(found):
        assert after["payload_bits"] <= before["payload_bits"]
        assert after["bits"] <= before["bits"]
        assert (np.array(after["by_seed"]) < np.array(before["by_seed"])).all()


def test_the_error_falls_at_every_stage_with_no_more_bits(whole):
    assert list(whole) == ORDER
    assert all(len(row["by_seed"]) == 3 for row in whole.values())
    check_order(whole.values())


def test_without_what_a_stage_is_for_it_gains_nothing(errors, whole):
    gains = {"outliers": ("RTN", "+ WHT"), "text": ("+ WHT", "+ TSA"), "pivots": ("+ TSA", "+ PSA")}
    for part, (before, after) in gains.items():
        rows = errors(replace(Structure(), **{part: 0.0}))
        gain, usual = (of[before]["error"] / of[after]["error"] for of in (rows, whole))
        assert usual > 1.25
        assert gain < 1 + (usual - 1) / 4, part


def test_the_stages_layers_are_the_ones_that_gain(whole):
    by_layer = {name: np.array(row["by_layer"]) for name, row in whole.items()}
    psa = [layer for layer in range(SHAPE.num_layers) if layer not in TSA]
    assert (by_layer["+ TSA"][list(TSA)] < 0.6 * by_layer["+ WHT"][list(TSA)]).all()
    assert (by_layer["+ PSA"][psa] < 0.6 * by_layer["+ TSA"][psa]).all()
    np.testing.assert_allclose(by_layer["+ TSA"][psa], by_layer["+ WHT"][psa], rtol=0.1)


def test_bits_by_hand():
    quantizer = stages()["+ PSA"]
    counts = np.array([[[30, 70, 412], [30, 70, 412], [27, 0, 485], [27, 0, 485]]])
    found = bits_of(quantizer, counts)
    rows = 4 * 512
    assert found["payload_bits"] == (114 * 16 + 140 * 4 + 1794 * 2) / rows
    assert found["bits"] == pytest.approx((114 * 16 + 140 * 4.25 + 1794 * 2.25) / rows)
    assert bits_of(None, np.full((1, 4, 1), 512)) == {"payload_bits": 16, "bits": 16}


def test_without_quantizing_it_is_the_attention_in_float32():
    """Against numpy, row by row, and within bfloat16's rounding."""
    planted = plant(Structure(), 5)
    batched = Planted(*(x[None] for x in planted))
    found = np.asarray(reference(batched))[0]
    token, k, v, _ = (x.astype(np.float64) for x in planted)
    for layer, head in ((0, 0), (3, 1)):
        keys = np.vstack([k[layer, head], token[layer, head, -2]])
        values = np.vstack([v[layer, head], token[layer, head, -1]])
        logits = token[layer, head, 3] @ keys.T / np.sqrt(128)
        weights = np.exp(logits - logits.max())
        expected = weights @ values / weights.sum()
        np.testing.assert_allclose(found[layer, 16 * head + 3], expected, rtol=1e-3, atol=1e-4)
    (row,) = ablation(Structure(), [5], {"bfloat16": None})
    assert row["error"] < 0.01


def test_what_is_planted_is_there():
    structure = Structure()
    token, k, _, salience = plant(structure, 0)
    logits = np.einsum("lkgh,lkth->lkgt", token[:, :, :-2], k) / np.sqrt(SHAPE.head_dim)
    mean = logits.mean(axis=(1, 2))
    mean -= np.median(mean, axis=1, keepdims=True)
    psa = [layer for layer in range(SHAPE.num_layers) if layer not in TSA]
    pivots = salience > 3 * np.median(salience)
    assert pivots.sum(axis=1).tolist() == [0, 0, 4, 4]
    for layer in TSA:
        assert mean[layer, :32].mean() == pytest.approx(structure.text, abs=0.5)
    for layer in psa:
        assert pivots[layer, 0]
        assert mean[layer, pivots[layer]].mean() == pytest.approx(structure.pivots, abs=1.0)
        assert abs(mean[layer, 1:32].mean()) < 0.5
    assert mean[:, -1].mean() > 1.5
    offset = np.abs(k.mean(axis=2))
    assert (offset > structure.outliers / 2).sum(axis=-1).max() <= quantization.OUTLIER_CHANNELS + 1
    assert offset.max() == pytest.approx(structure.outliers, abs=1.5)
    assert not IS_VISUAL[:32].any()
    plain = plant(Structure(0, 0, 0, 0), 0)
    assert np.abs(plain.k).max() < 6


def parts(text):
    """A class and its settings, in whatever order."""
    return sorted(re.findall(r"[a-z_]+=(?:\([^)]*\)|[^,)]*)|^\w+", text))


def test_the_committed_result_is_of_these_settings():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert {"commit", "command", "date", "machine", "versions"} <= result.keys()
    assert result["structure"] == vars(Structure())
    assert len(result["seeds"]) >= 3
    wanted = {**stages(), **OTHERS}
    assert {name: parts(text) for name, text in result["quantizers"].items()} == {
        name: parts(repr(each)) for name, each in wanted.items()
    }
    assert [row["name"] for row in result["rows"]] == list(wanted)
    check_order(result["rows"])


def test_the_document_has_the_numbers():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    text = quantization.part(result)
    for row in result["rows"]:
        cells = f"{row['payload_bits']:.2f} | {row['bits']:.2f} | {row['error']:.1%}"
        assert f"| {row['name']} | {cells} |" in text
    assert quantization.SECTION.make(None) == NOT_MEASURED


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(quantization, "stages", lambda: {"+ PSA": stages()["+ PSA"]})
    monkeypatch.setattr(quantization, "OTHERS", {"bfloat16": None})
    app = typer.Typer()
    app.command()(quantization.main)
    return lambda *arguments: CliRunner().invoke(app, [str(x) for x in arguments])


def test_the_command_prints_json_alone_and_writes_the_same(invoke, tmp_path):
    out = tmp_path / "quantization.json"
    options = ("--seeds", 3, "--seed", 7, "--without", "text")
    found = invoke(*options, "--json", "--out", out)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]] == ["+ PSA", "bfloat16"]
    assert (result["seeds"], result["structure"]["text"]) == ([7, 8, 9], 0)
    assert set(result["structure"]) == set(PARTS)
    shown = invoke(*options)
    assert f"{result['rows'][0]['error']:.1%}" in shown.output
    refused = invoke("--out", out)
    assert refused.exit_code == 2
    assert "--force" in refused.output


@pytest.mark.parametrize(
    ("option", "value", "word"), [("--without", "magic", "outliers"), ("--seeds", "0", "--seeds")]
)
def test_bad_input_is_refused(invoke, option, value, word):
    found = invoke(option, value)
    assert found.exit_code == 2
    assert word in found.output
