"""The parts of the documents about the shipped model, from files of known content."""

import json

import pytest

from benchmarks import demo_model
from benchmarks.demo_model import accuracy_part, log_part, model_part, recipe_part
from benchmarks.documents import NOT_MEASURED


def test_what_is_not_there_is_not_measured():
    assert model_part(None).startswith(NOT_MEASURED)
    assert recipe_part(None) == log_part(None, None) == accuracy_part(None) == NOT_MEASURED


def test_accuracy_is_that_of_every_budget():
    scores = {"full": {"1.0": 0.99}, "vl-cache": {"0.05": 0.5, "0.1": 0.973, "1.0": 0.99}}
    methods = {
        name: {budget: {"score": share} for budget, share in of.items()}
        for name, of in scores.items()
    }
    text = accuracy_part({"details": {"document": methods}, "n": 500})
    assert "500 items" in text
    assert "| task | score | full cache | VL-Cache, 10% | VL-Cache, 5% |" in text
    assert "| document | anls | 99.0% | 97.3% | 50.0% |" in text


@pytest.fixture
def training(tmp_path, monkeypatch):
    for name in ("RECIPE", "LOG"):
        file = tmp_path / getattr(demo_model, name).name
        monkeypatch.setattr(demo_model, name, file)
    monkeypatch.setattr(demo_model, "PLOT", tmp_path / "plot.svg")
    return tmp_path


def test_the_plot_says_what_it_is_made_of(training):
    pytest.importorskip("matplotlib")
    demo_model.write_plot()
    assert not list(training.iterdir())
    lines = [
        {"step": 10 * i, "time": "2030-01-01T00:00:00Z", "loss": 1 / i, "exact": i / 10,
         "held_out_exact": {"document": i / 10}}
        for i in range(1, 6)
    ]  # fmt: skip
    demo_model.LOG.write_text("".join(json.dumps(line) + "\n" for line in lines))
    demo_model.RECIPE.write_text(json.dumps({"stages": [{"steps": 20}, {"steps": 40}]}))
    demo_model.write_plot()
    first = demo_model.PLOT.read_text()
    source = demo_model.plot_source()
    assert source is not None
    assert source in first
    assert "held out exact, document" in first
    demo_model.write_plot()
    assert demo_model.PLOT.read_text() == first
    demo_model.LOG.write_text(json.dumps(lines[0]) + "\n")
    assert demo_model.plot_source() != source
    demo_model.LOG.unlink()
    demo_model.write_plot()
    assert not demo_model.PLOT.exists()
