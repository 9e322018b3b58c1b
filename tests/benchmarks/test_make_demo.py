"""A run of the trainer becomes the demo whole or not at all."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from benchmarks import make_demo
from benchmarks.accuracy.pages.learner import PageLearner
from benchmarks.demo_model import log_part, model_part, recipe_part
from vlcache_jax.checkpoints.checkpoint import open_checkpoint

RECIPE = {
    "seed": 0,
    "vision": {"hidden_size": 32},
    "text": {"hidden_size": 32},
    "stages": [
        {"steps": 100, "tasks": {"document": 1}, "lr": 2e-3, "guide_weight": 0.25},
        {"steps": 200, "tasks": {"document": 1, "reading": 0.5}, "lr": 1e-3, "guide_weight": 0.0},
    ],
}
LOG = [
    {"step": 50, "time": "2030-01-01T00:00:00Z", "loss": 4.0, "held_out_exact": {"document": 0.0}},
    {"step": 100, "time": "2030-01-01T00:00:50Z", "loss": 2.0, "held_out_exact": {"document": 0.5}},
    {"step": 150, "time": "2030-01-01T00:01:40Z", "loss": 1.0, "held_out_exact": {"document": 0.8}},
    {"step": 150, "time": "2030-01-02T00:00:00Z", "loss": 0.9, "held_out_exact": {"document": 0.9}},
    {"step": 200, "time": "2030-01-02T00:00:50Z", "loss": 0.5, "held_out_exact": {"document": 1.0}},
]


@pytest.fixture
def run(model_dir, tmp_path):
    """A run's folder with a tiny model in bfloat16."""
    folder = tmp_path / "run"
    shutil.copytree(model_dir, folder / "model")
    tensors = load_file(folder / "model" / "model.safetensors")
    small = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    save_file(small, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "model" / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    return folder


def ship(run, names=("document", "reading"), force=False):
    out = {"package": run.parent / "demo", "results": run.parent / "results"}
    make_demo.make_demo(run, list(names), force=force, **out)
    return out.values()


def test_everything_of_a_run_is_shipped(run):
    package, results = ship(run)
    for file in (run / "model").iterdir():
        assert (package / "checkpoint" / file.name).read_bytes() == file.read_bytes()
    for name in ("recipe.json", "log.jsonl"):
        assert (results / name).read_bytes() == (run / name).read_bytes()
    facts = json.loads((results / "model.json").read_text())
    assert facts["step"] == 200
    assert facts["tasks"] == ["document", "reading"]
    assert facts["sha256"] == make_demo.fingerprint(run / "model")
    assert str(run) not in (results / "model.json").read_text()
    index = json.loads((package / "pictures" / "index.json").read_text())
    assert [entry["task"] for entry in index] == 6 * ["document"] + 6 * ["reading"]
    assert [entry["drawn"]["seed"] for entry in index] == 2 * list(range(6))
    names = {entry["file"] for entry in index}
    assert {path.name for path in (package / "pictures").iterdir()} == {"index.json", *names}
    assert not list(package.rglob(".*"))
    # What the documents say of it.
    assert "shipped for the tasks document and reading" in model_part(facts)
    text = log_part("x.svg", RECIPE, make_demo.read_log((results / "log.jsonl").read_text()))
    assert "200 of the recipe's 300 steps" in text
    assert "step, 1.00 s" in text
    assert "held out exact, document 1" in text


def test_a_demo_is_replaced_only_where_that_is_asked_for(run):
    ship(run)
    with pytest.raises(FileExistsError, match="--force"):
        ship(run)
    ship(run, ["reading"], force=True)
    index = json.loads((run.parent / "demo" / "pictures" / "index.json").read_text())
    assert [entry["task"] for entry in index] == 12 * ["reading"]


def too_large(run, monkeypatch):
    small = replace(make_demo.KINDS_OF["demo-small"], most_bytes=1000)
    monkeypatch.setitem(make_demo.KINDS_OF, "demo-small", small)


def in_float32(run, monkeypatch):
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def half_written(run, monkeypatch):
    file = run / "log.jsonl"
    file.write_text(file.read_text()[:-20])


def another_shape(run, monkeypatch):
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = np.concatenate([tensors[name]] * 2)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (too_large, "are the most to ship"),
        (in_float32, "export it in bfloat16"),
        (half_written, "wait until the training"),
        (another_shape, "embed_tokens"),
        (lambda run, _: (run / "recipe.json").unlink(), "recipe.json"),
        (lambda run, _: shutil.rmtree(run / "model"), "model"),
        (lambda run, _: (run / "model" / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["large", "float32", "log", "shape", "recipe", "model", "tokenizer"],
)
def test_a_run_that_does_not_fit_changes_nothing(run, monkeypatch, damage, message):
    package, results = ship(run)
    before = {path: path.read_bytes() for path in package.parent.rglob("*") if path.is_file()}
    damage(run, monkeypatch)
    with pytest.raises((ValueError, OSError), match=message):
        ship(run, ["reading"], force=True)
    for folder in (package, results):
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert after == {path: before[path] for path in after}
        assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("names", [["poetry"], [""], ["document", "document"]])
def test_tasks_that_there_are(run, names):
    with pytest.raises(ValueError, match="1 or 2 different ones of document, reading"):
        ship(run, names)
    assert not (run.parent / "demo").exists()


@pytest.mark.parametrize("name", make_demo.KINDS_OF)
def test_every_choice_of_tasks_gives_twelve_pictures(name):
    kind = make_demo.KINDS_OF[name]
    for count in (1, 2):
        names = list(kind.tasks)[:count]
        recipes = make_demo.recipes(kind, names)
        assert len(recipes) == make_demo.COUNT
        assert [recipe["task"] for recipe in recipes[:: 12 // count]] == names


def test_what_a_decoder_was_taught_is_shipped_with_its_pages(published, tmp_path):
    run, before = tmp_path / "together", tmp_path / "tower"
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    learner = PageLearner(vision, 4, jnp.dtype("float32"), published)
    for folder in (run, before):
        folder.mkdir()
        (folder / "recipe.json").write_text(json.dumps(RECIPE))
        (folder / "log.jsonl").write_text(json.dumps(LOG[-1]) + "\n")
    learner.export(run / "model", learner.initial(0))
    package, results = tmp_path / "package", tmp_path / "results"
    make_demo.make_demo(
        run, ["look up", "read"], package=package, results=results, force=False, before=[before]
    )
    assert open_checkpoint(package / "checkpoint").dtype == ml_dtypes.bfloat16
    index = json.loads((package / "pictures" / "index.json").read_text())
    assert [entry["task"] for entry in index] == 6 * ["look up"] + 6 * ["read"]
    with Image.open(package / "pictures" / index[0]["file"]) as page:
        assert page.format == "JPEG"
        assert {side % 336 for side in page.size} == {0}
    assert json.loads((results / "tower" / "log.jsonl").read_text()) == LOG[-1]
    facts = json.loads((results / "model.json").read_text())
    assert facts["weights_bytes"] < 10**6
    assert facts["sha256"] == make_demo.fingerprint(run / "model")


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(make_demo.main)
    result = CliRunner().invoke(app, ["nowhere"])
    assert result.exit_code == 2
    assert "nowhere/recipe.json" in result.output


def test_a_recipe_is_told_stage_by_stage():
    text = recipe_part(RECIPE)
    assert "| tasks | document 1 | document 1, reading 0.5 |" in text
    assert "| lr | 0.002 | 0.001 |" in text
    assert "in stage 1, for 100 steps. 200 steps without it follow" in text
    unguided = {**RECIPE, "stages": RECIPE["stages"][1:]}
    assert "No loss led the attention" in recipe_part(unguided)
