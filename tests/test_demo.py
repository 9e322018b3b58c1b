"""The shipped demo: its pictures are the tasks', its files fit and belong together."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlcache_jax
from benchmarks.accuracy.packing import render
from benchmarks.demo_model import MODEL
from benchmarks.documents import RESULTS
from benchmarks.make_demo import COUNT, MOST_BYTES, draw, fingerprint
from vlcache_jax import demo

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def drawn():
    """The pictures as they are drawn for the tasks that the demo shows."""
    return draw(list(dict.fromkeys(picture.task for picture in demo.pictures())))


def test_pictures_questions_and_answers_are_the_tasks(drawn):
    index = json.loads(demo.INDEX.read_text(encoding="utf-8"))
    assert index == [entry for entry, _ in drawn]
    assert len(index) == COUNT
    for picture, (_, item) in zip(demo.pictures(), drawn, strict=True):
        assert (picture.task, picture.answer) == (item.task, item.answer)
        with Image.open(picture.file) as image:
            assert np.array_equal(np.asarray(image), item.images[0])


def test_questions_reach_the_model_as_in_training(drawn):
    processor = vlcache_jax.load("demo", lazy=True).processor
    for picture, (_, item) in zip(demo.pictures(), drawn, strict=True):
        asked = processor(picture.file, picture.prompt)
        trained = processor(list(item.images), render(item), raw_prompt=True)
        assert np.array_equal(asked.tokens, trained.tokens)
        assert np.array_equal(asked.tiles, trained.tiles)


def test_the_checkpoint_can_be_carried():
    weights = list(demo.CHECKPOINT.glob("*.safetensors"))
    assert weights
    assert sum(file.stat().st_size for file in weights) <= MOST_BYTES
    assert not [*demo.CHECKPOINT.rglob("*.bin"), *demo.CHECKPOINT.rglob("*.pt")]


def test_nothing_of_it_is_ignored():
    """A wheel has what is in a package's folder and is not ignored by git."""
    folders = (demo.CHECKPOINT, demo.INDEX.parent)
    files = [str(file) for folder in folders for file in folder.iterdir()]
    assert len(files) > COUNT
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout == ""
    assert {file.name for file in demo.INDEX.parent.iterdir()} == {
        demo.INDEX.name,
        *(picture.file.name for picture in demo.pictures()),
    }


def test_the_results_are_of_this_checkpoint():
    measured = json.loads((RESULTS / "cpu" / "demo.json").read_text(encoding="utf-8"))
    assert measured["sha256"] == fingerprint(demo.CHECKPOINT), "run benchmarks.report --demo"
    for row, picture in zip(measured["pictures"], demo.pictures(), strict=True):
        assert (row["name"], row["right_answer"]) == (picture.name, picture.answer)
    if MODEL.exists():
        assert json.loads(MODEL.read_text(encoding="utf-8"))["sha256"] == measured["sha256"]


def test_names_of_pictures(tmp_path, monkeypatch):
    first, second = demo.pictures()[:2]
    assert demo.find("demo") == demo.find("demo:1") == first
    assert demo.find("demo:2") == second
    assert demo.find("demo.png") is None
    for name in ("demo:0", "demo:13", "demo:", "demo:x", "demo:-1", "demo:01"):
        with pytest.raises(ValueError, match=f"no picture {name}: choose one of demo:1 to demo:12"):
            demo.find(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").touch()
    assert demo.find("demo") is None
