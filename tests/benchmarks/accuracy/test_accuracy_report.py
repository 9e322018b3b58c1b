"""The command, its result file, and the document that is made of it."""

import json
import math

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import vlcache_jax
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import report, tasks
from benchmarks.accuracy.budgets import AT_ONCE, EXTRA, Plan
from benchmarks.accuracy.evaluate import WHOLE, Evaluation, Outcome
from benchmarks.accuracy.network import config_json, export, make_files
from benchmarks.accuracy.report import FULL
from benchmarks.accuracy.scoring import agreement, summarise, variant_of
from benchmarks.documents import NOT_MEASURED, ROOT
from benchmarks.report import DOCUMENTS
from vlcache_jax.cache.methods import METHODS
from vlcache_jax.models.families import init_params
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.running import programs
from vlcache_jax.running.programs import keep_programs

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "model"
    files = make_files((*tasks.VOCABULARY_WORDS, "INST"))
    shape = config_json(VISION, TEXT, len(files.tokenizer))
    export(path, shape, files, init_params(LlavaConfig.from_hf(shape), 0), "float32")
    return path


@pytest.fixture(autouse=True)
def no_cache_folder(monkeypatch):
    """The tests leave the user's cache folder, and JAX's settings, alone."""
    monkeypatch.setattr(programs, "keep_programs", lambda: None)


def run(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def outcome(answers, tokens, layers=2, share=1.0):
    arrays = [np.full((len(answers), layers), share, np.float32) for _ in range(6)]
    return Outcome(answers, tokens, *arrays)


@pytest.fixture
def pretended(monkeypatch):
    """Methods answer as right as their budget, the full cache always: no model is run."""
    calls = []

    def run(self, items, methods, *, max_new_tokens=None, advance=None):
        calls.append((items, methods))
        right = [item.answer for item in items]
        ids = [[3, 4, 5]] * len(items)
        found = {WHOLE: outcome(right, ids)}
        for label, method in methods.items():
            share = method.limit.share
            some = [answer if i % 20 < 20 * share else "" for i, answer in enumerate(right)]
            found[label] = outcome(some, [[3, 4, 6]] * len(items), share=share)
        if advance:
            advance(len(items))
        return found

    monkeypatch.setattr(Evaluation, "run", run)
    return calls


def test_a_run_from_the_command_to_the_file(model, tmp_path):
    out = tmp_path / "deep" / "result.json"
    arguments = (
        "--model", model, "--tasks", "document", "--methods", "vl-cache", "--budgets", "0.1,1",
        "--extra", "oracle", "--n", 3, "--batch", 2, "--out", out,
    )  # fmt: skip
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())
    details = result["details"]["document"]
    assert {name: list(of) for name, of in details.items()} == {
        "full": ["1.0"], "vl-cache": ["0.1", "1.0"], "oracle": ["0.1"]
    }  # fmt: skip
    assert details["vl-cache"]["1.0"] == details["full"]["1.0"]
    assert result["n"] == 3
    assert result["model"] == str(model)
    assert result["versions"]["jax"] == jax.__version__
    facts, oracle = (details[name]["0.1"] for name in ("vl-cache", "oracle"))
    low, high = facts["interval"]
    assert low <= facts["score"] <= high
    assert facts["kept"] == pytest.approx(0.1, abs=0.01)
    assert sum(each["n"] for each in facts["variants"].values()) == 3
    assert len(facts["by_layer"]["kept"]) == 2
    assert facts["answer_recall"] <= oracle["answer_recall"] < 1
    assert result["seconds"]["total"] > 0
    # And it is not written over.
    done = run(*arguments)
    assert done.exit_code == 2
    assert "--force" in done.output


def everything(model, out, *more):
    done = run("--model", model, "--n", 40, "--out", out, "--force", *more)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.output


def test_every_method_at_every_budget(model, pretended, tmp_path):
    result, output = everything(model, tmp_path / "all.json")
    budgets = ["0.01", "0.05", "0.1", "0.2", "0.4", "1.0"]
    assert result["details"].keys() == tasks.TASKS.keys()
    for task, details in result["details"].items():
        assert details.keys() == {*METHODS, *EXTRA}
        for name, by_budget in details.items():
            run = budgets[:-1] if name in EXTRA else budgets
            assert list(by_budget) == (["1.0"] if name == "full" else run)
        assert all(details[name]["1.0"]["score"] == 1 for name in METHODS)
        assert details["h2o"]["0.4"]["score"] == pytest.approx(0.4, abs=0.01)
        assert task in output
    cells = (len(METHODS) - 1) * 6 + len(EXTRA) * 5
    assert sum(len(methods) for _, methods in pretended) == cells
    assert len(pretended) == math.ceil(cells / AT_ONCE)  # of as few prefills of each item
    assert all(len(items) == 40 * len(tasks.TASKS) for items, _ in pretended)
    facts = result["details"]["reading"]["snapkv"]["0.4"]
    assert facts["agreement"] == {"answers": 0, "tokens": pytest.approx(2 / 3, abs=1e-4)}
    assert facts["difference"]["mean"] == pytest.approx(-0.6, abs=0.01)
    assert sum(each["n"] for each in facts["variants"].values()) == 40


def test_a_quick_run_is_a_small_one(model, pretended):
    done = run("--model", model, "--quick", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["n"] == 64
    assert list(result["details"]["reading"]["random"]) == ["0.1", "1.0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "document,poems"), "'poems'"),
        (("--methods", "fastv"), "'fastv'"),
        (("--extra", "magic"), "'magic'"),
        (("--budgets", "0.1,lots"), "'lots'"),
        (("--budgets", "0"), "above 0"),
        (("--budgets", "1.5"), "above 1"),
        (("--budgets", ""), "a budget"),
        (("--n", 0), "n=0"),
        (("--seed", -1), "seed"),
        (("--split", "holdout"), "'holdout'"),
        (("--batch", 0), "batch"),
        (("--model", "no/such/folder"), "no/such/folder"),
        (("--dtype", "int4"), "int4"),
        (("--out", "result.txt"), "json"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(model, pretended, arguments, said):
    done = run("--model", model, *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output
    assert not pretended


def test_help_is_quick_and_shows_how():
    done = run("--help")
    assert done.exit_code == 0
    assert "python -m benchmarks.accuracy --quick" in done.output


def test_the_kind_of_a_prompt_is_seen():
    for variant in tasks.VARIANTS:
        for seed in range(3):
            assert variant_of(tasks.make_item("reading", seed, variant=variant)) == variant


@pytest.mark.parametrize(
    ("tokens", "others", "expected"),
    [([1, 2, 3], [1, 2, 3], 1), ([1, 2], [1, 2, 3, 4], 0.5), ([], [], 1), ([5, 2], [1, 2], 0.5)],
)
def test_agreement_of_tokens(tokens, others, expected):
    assert agreement(tokens, others) == expected


def test_facts_of_four_answers():
    items = [tasks.make_item("reading", seed, variant="plain") for seed in range(4)]
    right = [item.answer for item in items]
    full = outcome([*right[:3], ""], [[1], [2], [3], [4]])
    half = outcome([*right[:2], "", ""], [[1], [2], [9], [4]], share=0.5)
    found = summarise(items, {WHOLE: full, ("half", "0.5"): half})["reading"]
    assert found[FULL]["1.0"]["score"] == 0.75
    facts = found["half"]["0.5"]
    assert facts["score"] == 0.5
    assert facts["difference"]["mean"] == -0.25
    assert facts["agreement"] == {"answers": 0.75, "tokens": 0.75}
    assert facts["kept_visual"] == 0.5
    assert facts["by_layer"]["hit_rate"] == [0.5, 0.5]
    assert facts["new_tokens"] == 1
    assert facts["variants"]["plain"]["n"] == 4


def test_every_part_says_what_the_file_says(model, pretended, tmp_path):
    result, _ = everything(model, tmp_path / "all.json")
    parts = {section.name: section.make(result) for section in report.SECTIONS}
    facts = result["details"]["document"]["h2o"]["0.1"]
    score, low, high = (100 * share for share in (facts["score"], *facts["interval"]))
    assert f"{score:.1f} ({low:.1f} to {high:.1f})" in parts["scores"]
    change = 100 * result["details"]["reading"]["random"]["0.1"]["difference"]["mean"]
    assert f"{change:+.1f} (" in parts["differences"]
    assert "| `oracle` | 100% | 100% |" in parts["differences"]  # near the full cache nowhere else
    assert "66.7" in parts["attention"]  # two of three tokens agree
    assert "| 10.0 | 10.0 |" in parts["layers"]
    assert "multi-turn (" in parts["variants"]
    assert result["command"] in parts["run"]
    for text in parts.values():
        assert NOT_MEASURED not in text


def plot_of(file, plot):
    return report.PLOT._replace(path=plot, files=(file,))


def test_parts_of_a_run_of_little(model, pretended, tmp_path):
    out, little = tmp_path / "little.json", ("--budgets", "0.2", "--methods", "full")
    result, _ = everything(model, out, "--tasks", "reading", "--extra", "none", *little)
    for section in report.SECTIONS:
        assert section.make(result)
    plot_of(out, tmp_path / "plot.svg").write()


def test_what_was_not_measured_says_so(tmp_path):
    for section in report.SECTIONS:
        assert section.make(None) == NOT_MEASURED
    plot = tmp_path / "plot.svg"
    plot.write_text("of a result that is gone")
    plot_of(tmp_path / "none.json", plot).write()
    assert not plot.exists()


def test_the_plot_is_of_its_file(model, pretended, tmp_path):
    out, plot = tmp_path / "all.json", tmp_path / "plot.svg"
    everything(model, out)
    plot_of(out, plot).write()
    text = plot.read_text()
    source = plot_of(out, plot).source()
    assert source is not None
    assert source in text
    assert "vl-cache" in text
    plot_of(out, plot).write()
    assert plot.read_text() == text


def test_the_document_has_every_part():
    names = {part.name for part in DOCUMENTS[ROOT / "docs" / "accuracy.md"]}
    assert names >= {section.name for section in report.SECTIONS}


def test_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    name = "jax_compilation_cache_dir"
    before = (
        jax.config.values[name],
        jax.config.values["jax_persistent_cache_min_compile_time_secs"],
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update(name, None)
        keep_programs()
        assert jax.config.values[name] == str(tmp_path / "vlcache-jax" / "programs")
        jax.config.update(name, "elsewhere")
        keep_programs()
        assert jax.config.values[name] == "elsewhere"
    finally:
        jax.config.update(name, before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_a_plan_without_a_name_runs_everything():
    cells = Plan().cells()
    assert {name for name, _ in cells} == {*METHODS, *EXTRA} - {"full"}
    assert vlcache_jax.VLCache(0.1) in cells.values()


def test_a_plan_may_ask_about_pages():
    plan = Plan(("copy", "document"), n=2, split="test")
    items = plan.items(112)
    assert [item.task for item in items] == ["copy", "copy", "document", "document"]
    assert items[0].images[0].shape[0] % 336 == 0  # the decoder reads letters of 14 pixels
