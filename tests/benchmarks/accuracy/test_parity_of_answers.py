"""The full cache against transformers, on the shipped model."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.accuracy import parity
from benchmarks.accuracy.parity import HUGGING_FACE, OURS, SHIPPED
from benchmarks.accuracy.tasks import make_item
from benchmarks.documents import NOT_MEASURED


def run(*arguments):
    app = typer.Typer()
    app.command()(parity.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_difference_counts_and_costs_the_exit_code(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    right = {"tokens": [5, 6], "text": "A1"}

    def theirs(path, items, prompts, stop_ids, most, advance):
        return [(right["tokens"], item.answer) for item in items]

    monkeypatch.setattr(parity, "hugging_face_answers", theirs)
    monkeypatch.setattr(
        parity,
        "our_answers",
        lambda vlm, items, prompts, most, advance: [([5, 6], items[0].answer), ([5, 7], "wrong")],
    )
    file = tmp_path / "parity.json"
    result = run("--n", 1, "--out", file, "--json")
    assert result.exit_code == 1
    found = json.loads(file.read_text())
    assert json.loads(result.stdout) == found
    assert found["same_tokens"] == {HUGGING_FACE: 2, OURS: 1, SHIPPED: 1}
    assert found["scores"]["document"][OURS]["mean"] == 1
    assert found["scores"]["reading"][OURS]["mean"] == 0
    assert "| vlcache-jax, float32 | 1 of 2 | 100.0 | 0.0 |" in parity.parity_part(found)


@pytest.mark.full
def test_the_same_answers_as_transformers():
    pytest.importorskip("torch")
    result = run("--n", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["same_tokens"][OURS] == 2
    for row in found["rows"]:
        assert row["right"] == make_item(row["task"], 0, split="report").answer
        assert row["answers"][HUGGING_FACE] == row["answers"][OURS] != ""


def test_bad_input_is_refused_before_work_starts(tmp_path):
    file = tmp_path / "there.json"
    file.touch()
    for arguments, said in (
        (("--out", file), "exists"),
        (("--tasks", "poetry"), "task 'poetry'"),
        (("--model", tmp_path / "none"), "directory"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert said in result.output


def test_without_a_result_nothing_is_said():
    assert parity.SECTION.make(None) == NOT_MEASURED
