"""Each experiment runs end to end; scores, layers and conversations are what plain numpy says."""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import vlcache_jax
from benchmarks.accuracy import budgets, evaluate, tasks
from benchmarks.accuracy.budgets import Bench, Plan, Refused
from benchmarks.accuracy.evaluate import WHOLE, Evaluation, Outcome
from benchmarks.accuracy.experiments import (
    __main__,
    common,
    compared,
    conversation,
    long,
    questions,
    rare,
    scores,
    sections,
)
from benchmarks.accuracy.oracle import attention_of_answer
from benchmarks.accuracy.packing import render
from benchmarks.accuracy.report import FULL, per_cent, points, scored
from benchmarks.documents import NOT_MEASURED
from tests.benchmarks.accuracy.test_evaluate import make_vlm
from vlcache_jax import SnapKV, VLCache
from vlcache_jax.cache.methods import H2O, METHODS
from vlcache_jax.models.families import bind
from vlcache_jax.running import programs
from vlcache_jax.running.stages import Stages

N = 4


@pytest.fixture(scope="module")
def evaluation():
    return Evaluation(make_vlm(), batch=N)


# Settings.


def test_defaults_are_among_the_settings():
    for setting, values in compared.SETTINGS.items():
        assert sum(compared.label_of(setting, value) == compared.DEFAULT for value in values) == 1
        for value in values:
            VLCache(0.1, **{setting: value})


# Rare glyphs.


def outcome(answers):
    return Outcome(answers, [[] for _ in answers], *[np.ones((len(answers), 1), np.float32)] * 6)


def test_values_and_characters_are_told_apart():
    item = tasks.make_item("document", 0, split="test", variant="plain")
    right = ["1234", "A1B2", "99", "7QQ"]
    items = [dataclasses.replace(item, answer=answer) for answer in right]
    found = rare.split_by_class(
        items, {WHOLE: outcome(right), ("some", "0.1"): outcome(["1234", "X1B", "9", ""])}
    )
    full, some = (
        {name: of[label][budget] for name, of in found["values"].items()}
        for label, budget in (WHOLE, ("some", "0.1"))
    )
    assert [facts["score"] for facts in full.values()] == [1, 1]
    assert some["digits alone"]["score"] == 0.75  # 1 and 1/2, the least that counts
    assert some["with letters"]["score"] == 0.25
    assert some["with letters"]["difference"]["mean"] == -0.75
    characters = {name: of["some"]["0.1"] for name, of in found["characters"].items()}
    assert characters["digit"]["n"] == 3  # behind the first character
    assert characters["digit"]["score"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert characters["letter"]["score"] == pytest.approx((1 + 0) / 2)
    assert found["glyphs"] == {
        "digit": {"glyphs": 10, "characters": 9}, "letter": {"glyphs": 24, "characters": 4}
    }  # fmt: skip


# Conversations.

TURNS = 3


@pytest.fixture(scope="module")
def talked(evaluation):
    """Dialogues, and what was said behind the full cache, all of it kept, and a tenth."""
    plan = Plan(("reading",), methods=(), budgets=(0.1,), extra=(), n=2, split="test")
    pictures, _ = long.dialogues(Bench(evaluation, plan, TURNS), "reading")
    cells = {("all", "1.0"): VLCache(1.0), ("vl-cache", "0.1"): VLCache(0.1)}
    return pictures, *long.converse(evaluation, pictures, cells)


@pytest.mark.full
def test_a_dialogue_asks_nothing_twice_but_the_first(talked):
    for items in talked[0]:
        subjects = [(item.answer, item.evidence) for item in items]
        assert len(items) == TURNS + 1
        assert len(set(subjects)) == TURNS
        assert subjects[0] == subjects[-1]
        assert all(item.images[0] is items[0].images[0] for item in items)


@pytest.mark.full
def test_everything_kept_says_what_the_full_cache_says(talked):
    _, spoken, before = talked
    full, everything, some = (spoken[cell] for cell in (WHOLE, ("all", "1.0"), ("vl-cache", "0.1")))
    assert everything.answers == full.answers
    words = ~np.isnan(full.recall)
    np.testing.assert_allclose(everything.recall[words], 1, atol=1e-5)
    assert (some.recall[words] < 0.9).all()
    assert (np.diff(before) > 0).all()
    assert before[0] < 1


@pytest.mark.full
def test_each_token_of_a_conversation_is_forced_or_the_likeliest(talked, evaluation):
    pictures, spoken, _ = talked
    vlm = evaluation.vlm
    way, script = long._plan(vlm, pictures)
    inputs = vlm.processor(
        [list(items[0].images) for items in pictures],
        [render(items[0]) for items in pictures],
        raw_prompt=True,
    )
    full, token, _ = jax.jit(partial(way.prefill, methods=()))(vlm.params, inputs)
    talk = conversation.talk(
        evaluation, way, vlm.params, full, np.asarray(token), inputs.length, script
    )
    turns = TURNS + 1
    answers = [talk.answers(lane) for lane in range(2)]
    for lane in range(2):
        texts = [vlm.processor.decode(ids) for ids in answers[lane]]
        assert texts == spoken[WHOLE].answers[lane]
        fed = talk.tokens[lane, : talk.end[lane, -1]]
        forced, at = [], 0
        for turn, ids in enumerate(answers[lane]):  # each question, the answer, the end
            asked = script.tokens[lane][at : script.ends[lane][turn]]
            at = script.ends[lane][turn]
            forced += [*asked, *ids, way.end]
        assert fed.tolist() == forced[:-1]  # the last end is not fed
    # In one piece: the prompt and all that was fed behind it.
    m, rows = inputs.length, 1024
    tokens = np.zeros((2, rows), np.int32)
    visual = np.full_like(tokens, -1)
    for lane in range(2):
        own = talk.tokens[lane]
        tokens[lane, : m[lane] + own.size] = [*inputs.tokens[lane, : m[lane]], *own]
        visual[lane, : m[lane]] = inputs.visual_index[lane, : m[lane]]
    longer = dataclasses.replace(inputs, tokens=tokens, visual_index=visual, length=m + way.rows)
    logits = jax.jit(Stages(vlm.config).prompt_logits)(vlm.params, longer)
    likeliest = np.asarray(jnp.argmax(logits, axis=-1))
    for lane, turn in np.ndindex(2, turns):
        ids = answers[lane][turn]
        if ids:
            first = m[lane] + talk.begin[lane, turn] - 1
            expected = likeliest[lane, first : first + len(ids) + 1]
            assert ids == expected[:-1].tolist()
            assert expected[-1] in vlm.stop_ids or len(ids) == way.limit

    @jax.jit
    def attended(lengths):
        model = bind(vlm.config)(vlm.params)
        text = vlm.config.text
        return attention_of_answer(model, text, full, inputs, talk.tokens, lengths).mass

    mass = jax.jit(way.attend)(vlm.params, full, inputs, talk).mass
    begin, end = talk.begin, talk.end
    first = attended(end[:, 0])
    last = attended(end[:, -1]) - attended(np.maximum(begin[:, -1] - 1, 1))
    for lane in range(2):
        for turn, expected in ((0, first), (-1, last)):
            if end[lane, turn] > begin[lane, turn]:
                np.testing.assert_allclose(mass[turn, lane], expected[lane], atol=1e-4)


def test_too_many_questions_are_refused(evaluation, monkeypatch):
    monkeypatch.setattr(long, "LOOKED_AT", 1)
    plan = Plan(("reading",), methods=(), budgets=(0.1,), extra=(), n=2, split="test")
    with pytest.raises(Refused, match="--turns"):
        long.dialogues(Bench(evaluation, plan, 30), "reading")


# The commands.


@pytest.fixture
def small(evaluation, monkeypatch, tmp_path):
    """The tiny model behind the command, and experiments with less in them."""
    monkeypatch.setattr(vlcache_jax, "load", lambda model, dtype: evaluation.vlm)
    monkeypatch.setattr(evaluate, "Evaluation", lambda vlm, batch: evaluation)
    monkeypatch.setattr(programs, "keep_programs", lambda: None)
    monkeypatch.setattr(compared, "SETTINGS", {"threshold": (0.01, 0.1, 0.2)})
    monkeypatch.setattr(compared, "VARIANTS", {"plain": 1, "multi-turn": 1})
    two = {name: METHODS[name] for name in (FULL, "snapkv")}
    monkeypatch.setattr(common, "METHODS", two)
    monkeypatch.setattr(scores, "candidates", lambda budget: {"h2o": H2O(budget)})
    monkeypatch.setattr(compared, "WHOLE_BITS", ("akvq",))
    monkeypatch.setattr(compared, "EVICTING", ("snapkv",))
    monkeypatch.setattr(questions, "SHOWN", ("snapkv",))
    monkeypatch.setattr(scores, "MANNERS", ("brief",))
    monkeypatch.setattr(scores, "BEST", 1)
    monkeypatch.setattr(sections, "RESULTS", tmp_path)
    return tmp_path


LABELS = {
    "ablation": ["post-vision, sparsity", "full prompt, uniform", "allocation, under post-vision"],
    "layers": ["layer 0", "layer 2", *compared.ALL],
    "settings": ["0.01 (default)", "0.2"],
    "variants": ["snapkv"],
    "long": ["snapkv", *long.ORACLES],
    "questions": ["full", "snapkv"],
    "rare": ["snapkv"],
    "quantized": ["full + akvq", "snapkv", "snapkv + akvq"],
    "scores": ["vl-cache", "oracle", "oracle-layers"],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "layers" else pytest.mark.full)
        for name in __main__.EXPERIMENTS
    ],
)
def test_a_command_runs_and_its_section_tells_its_numbers(name, small):
    task = {"rare": "document"}.get(name, "reading")
    split = "test" if name != "scores" else "report"
    arguments = [name, "--n", N, "--tasks", task, "--budgets", "0.1", "--split", split]
    arguments += ["--batch", N, "--turns", TURNS, "--json", "--out", sections.result_file(name)]
    done = CliRunner().invoke(__main__.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads(sections.result_file(name).read_text())
    assert {"versions", "commit", "model", "architecture", "seconds"} <= set(result)
    assert (result["n"], result["split"], result["budgets"]) == (N, split, ["0.1"])

    text = sections.part(name, result)
    for label in LABELS[name]:
        assert f"| {label} |" in text
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line[:1] == "|"]
    assert min(widths) > 2
    if name == "ablation":
        assert scored(result["details"][task][FULL]["1.0"]) in text
    if name == "quantized":
        plain, packed = (result["details"][task][label]["0.1"] for label in LABELS[name][1:])
        assert packed["kept"] == plain["kept"]
        assert 0 < packed["kept_bytes"] < plain["kept_bytes"] == pytest.approx(plain["kept"])
        assert points(packed["to_method"]) in text
        assert f"| {packed['kept_bytes']:.1%} | " in text
    if name == "scores":
        (best,) = result["choice"]["chosen"]
        facts = result["details"][task][best]["0.1"]
        assert f"| {best} | {per_cent(facts['score'])}; " in text
    plots = {plot.path: plot for plot in sections.plots(small)}
    path = sections.plot_file(name, small)
    assert (path in plots) == (sections.EXPERIMENTS[name].draw is not None)
    if plot := plots.get(path):
        plot.write()
        source = plot.source()
        assert source is not None
        assert source in path.read_text()
        sections.result_file(name).unlink()
        plot.write()
        assert not path.exists()


def test_what_was_not_measured_says_so():
    for section in sections.SECTIONS:
        assert section.make(None) == NOT_MEASURED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablation", "--budgets", "1.0"], "below 1"),
        (["ablation", "--tasks", "nothing"], "nothing"),
        (["layers", "--n", "0"], "at least 1"),
        (["rare", "--tasks", "reading"], "letters"),
        (["scores", "--split", "tune"], "tune"),
        (["long", "--out", "here.txt"], "json"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(arguments, message, small, monkeypatch):
    monkeypatch.setattr(Evaluation, "run", None)
    out = ["--out", str(small / "result.json")] if "--out" not in arguments else []
    done = CliRunner().invoke(__main__.app, [*arguments, *out], env={"COLUMNS": "400"})
    assert done.exit_code == 2
    assert message in done.output
    assert not list(small.iterdir())


def test_a_file_is_kept_unless_forced(small):
    file = small / "result.json"
    file.write_text("{}")
    done = CliRunner().invoke(__main__.app, ["ablation", "--out", str(file)])
    assert done.exit_code == 2
    assert file.read_text() == "{}"


def test_scores_are_chosen_on_other_seeds_than_they_are_reported_on(evaluation, monkeypatch):
    split_of, runs = {}, {}

    def make_item(task, seed, *, split, **options):
        item = tasks.make_item(task, seed, split=split, **options)
        split_of[id(item)] = split, item  # held, so that no other item gets its id
        return item

    def run(self, items, cells, what, **options):
        runs[what] = {split_of[id(item)][0] for item in items}, {label for label, _ in cells}
        right = outcome([item.answer for item in items])
        wrong = outcome(["" for _ in items])
        good = "maximum + sum" if what == "choosing" else "vl-cache"
        return {WHOLE: right} | {cell: right if cell[0] == good else wrong for cell in cells}

    monkeypatch.setattr(budgets, "make_item", make_item)
    monkeypatch.setattr(Bench, "run", run)
    plan = Plan(("reading", "document"), methods=(), budgets=(0.05, 0.1), extra=(), n=3)
    result = scores.run(Bench(evaluation, plan))
    assert runs["choosing"][0] == {"tune"}
    assert [splits for what, (splits, _) in runs.items() if what != "choosing"] == [{"report"}] * 4
    assert result["choice"]["chosen"][0] == "maximum + sum"
    assert len(result["choice"]["chosen"]) == scores.BEST
    assert runs["choosing"][1] == set(scores.candidates(0.1))
    for what in ("reporting", "full questions"):
        assert runs[what][1] == {*scores.ceilings(0.1), *result["choice"]["chosen"]}
    lengths = [of["rows"]["document"] for of in result["manners"].values()]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_many_methods_are_run_in_groups(evaluation, monkeypatch):
    calls = []

    def run(self, items, methods, *, advance):
        calls.append(list(methods))
        advance(len(items))
        return {cell: outcome([cell[0]] * len(items)) for cell in (WHOLE, *methods)}

    monkeypatch.setattr(Evaluation, "run", run)
    plan = Plan(("reading",), methods=(), budgets=(0.1,), extra=(), n=2, split="test")
    done = []
    bench = Bench(evaluation, plan, begin=lambda what, total: done.append(total) or done.append)
    items = bench.items()
    found = bench.run(items, {(f"m{i}", "0.1"): SnapKV(0.1) for i in range(5)}, "some", at_once=2)
    assert list(map(len, calls)) == [2, 2, 1]
    assert done == [6, 2, 2, 2]
    assert found["m3", "0.1"].answers == ["m3"] * 2
    assert found[WHOLE].answers == [FULL] * 2
