"""The parts of the documents about the shipped model, from files of known content."""

import json

import pytest

from benchmarks import demo_model
from benchmarks.demo_model import (
    accuracy_part,
    log_part,
    model_part,
    pictures_part,
    recipe_part,
)
from benchmarks.documents import NOT_MEASURED
from vlcache_jax import DEFAULT_METHOD, demo


def test_what_is_not_there_is_not_measured():
    assert model_part(None).startswith(NOT_MEASURED)
    assert recipe_part(None) == log_part("", None, None) == accuracy_part(None) == NOT_MEASURED


def test_accuracy_is_that_of_every_budget():
    scores = {
        "full": {"1.0": 0.99},
        "vl-cache": {"0.05": 0.5, "0.1": 0.973, "1.0": 0.99},
        "h2o": {"0.1": 0.4},
        DEFAULT_METHOD: {"0.1": 0.98, "1.0": 0.99},
    }
    methods = {
        name: {budget: {"score": share} for budget, share in of.items()}
        for name, of in scores.items()
    }
    text = accuracy_part({"details": {"document": methods}, "n": 500})
    assert "500 items" in text
    heads = f"| task | score | full cache | {DEFAULT_METHOD}, 10% | vl-cache, 10% | vl-cache, 5% |"
    assert heads in text
    assert "| document | anls | 99.0% | 98.0% | 97.3% | 50.0% |" in text


def test_how_many_pictures_each_method_answers():
    answers = {"full": "A", DEFAULT_METHOD: "A", "vl-cache": "B"}
    row = {
        "name": demo.pictures("demo-small")[0].name,
        "task": "reading",
        "right_answer": "A",
        "answers": answers,
    }
    text = pictures_part({"pictures": [row]})
    assert "Of the 1 pictures in the package 1 are answered right with the full cache." in text
    assert f": 1 by {DEFAULT_METHOD} and 0 by vl-cache." in text
    assert "| reading | `A` | `A` | `A` | `B` |" in text


def test_the_plot_says_what_it_is_made_of(tmp_path):
    pytest.importorskip("matplotlib")
    recipe, log = (tmp_path / file.name for file in demo_model.SMALL_PLOT.files)
    plot = demo_model.SMALL_PLOT._replace(path=tmp_path / "plot.svg", files=(recipe, log))
    plot.write()
    assert not list(tmp_path.iterdir())
    lines = [
        {"step": 10 * i, "time": "2030-01-01T00:00:00Z", "loss": 1 / i, "exact": i / 10,
         "held_out_exact": {"document": i / 10}}
        for i in range(1, 6)
    ]  # fmt: skip
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe.write_text(json.dumps({"stages": [{"steps": 20}, {"steps": 40}]}))
    plot.write()
    first = plot.path.read_text()
    source = plot.source()
    assert source is not None
    assert source in first
    assert "held out exact, document" in first
    plot.write()
    assert plot.path.read_text() == first
    log.write_text(json.dumps(lines[0]) + "\n")
    assert plot.source() != source
    log.unlink()
    plot.write()
    assert not plot.path.exists()
