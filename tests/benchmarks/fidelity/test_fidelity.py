"""The fidelity benchmark: its settings, its log, its command, and what the document says of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import vlcache_jax
from benchmarks.fidelity import __main__ as command
from benchmarks.fidelity import prose, report, run, settings
from benchmarks.fidelity.prose import Passage
from benchmarks.fidelity.settings import PARTS, SCORES, ablation, alone, methods
from vlcache_jax.cache.allocate import allocate
from vlcache_jax.cache.methods import DEFAULT_METHOD, H2O, METHODS
from vlcache_jax.evaluation import Replayed, Replays
from vlcache_jax.running import programs

N, TOKENS, NEW = 2, 200, 6


@pytest.fixture(scope="module")
def results(text_dir, tmp_path_factory):
    """What the command wrote of each part, and its logs."""
    folder = tmp_path_factory.mktemp("fidelity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "keep_programs", lambda: None)
        patch.setattr(settings, "candidates", lambda budget: {"all": H2O(budget)})
        for part in PARTS:
            outcome = invoke(text_dir, folder, part)
            assert outcome.exit_code == 0, outcome.output
    return folder


def invoke(model, folder, part, *more):
    options = ("--part", part, "--model", model, "--tokens", TOKENS, "--n", N, "--max-new-tokens",
               NEW, "--budgets", "0.1,0.4", "--log", folder / f"{part}.jsonl")  # fmt: skip
    out = () if more else ("--out", folder / f"{part}.json")
    return CliRunner().invoke(command.app, [str(each) for each in (*options, *out, *more)])


def result_of(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.mark.full
def test_the_figures_are_those_of_the_librarys_replay(results, text_dir):
    vlm = vlcache_jax.load(text_dir)
    found = result_of(results, "methods")
    identity = json.loads((results / "methods.jsonl").read_text().splitlines()[0])
    log, own = run.Log(results / "methods.jsonl", identity), found["details"]["h2o"]["0.4"]
    replays = Replays(vlm, {"h2o": methods((0.4,), 2)["h2o", "0.4"]}, NEW)
    texts = prose.passages(vlm.processor.tokenizer, TOKENS, N)
    kl = []
    for passage in texts:
        _, again = replays.run(vlm.processor(None, passage.question, context=passage.context))
        kl += again["h2o"][0].kl.tolist()
        kept = log.of(run.key_of(passage))["h2o 0.4"]
        np.testing.assert_allclose(kept.kl, again["h2o"][0].kl, rtol=1e-2, atol=1e-5)
        np.testing.assert_array_equal(kept.same, again["h2o"][0].same)
    assert own["kl"] == pytest.approx(np.mean(kl), rel=1e-2, abs=1e-5)
    assert found["prompts"] == prose.facts(texts)


@pytest.mark.full
def test_oracles_are_nearest_and_more_is_nearer(results):
    details = result_of(results, "methods")["details"]
    assert {*METHODS} - {"full"} < set(details)
    kl = {label: of["0.4"]["kl"] for label, of in details.items()}
    assert kl["oracle"] < min(kl["random"], kl["streaming-llm"], kl["vl-cache"])
    for of in details.values():
        assert of["0.1"]["kept_share"] < of["0.4"]["kept_share"]


@pytest.mark.full
def test_every_score_meets_every_division(results):
    names = {f"{score}, {rule}" for score in SCORES for rule in ("uniform", "sparsity", "pyramid")}
    assert set(result_of(results, "ablation")["details"]) == names
    cells = ablation((0.1,), 2)
    assert len(cells) == len(names)
    same = {"post-vision, sparsity": "vl-cache", "last 32 rows, pooled, uniform": "snapkv",
            "all rows, half recent, uniform": "h2o"}  # fmt: skip
    by_method = result_of(results, "methods")["details"]
    for pair, method in same.items():
        own = result_of(results, "ablation")["details"][pair]["0.4"]
        theirs = by_method[method]["0.4"]
        behind = theirs.pop("behind")
        assert own == theirs, pair
        assert behind["kl"] == pytest.approx(
            own["kl"] - by_method[DEFAULT_METHOD]["0.4"]["kl"], abs=2e-5
        )
        assert behind["interval"][0] <= behind["kl"] <= behind["interval"][1]


@pytest.mark.parametrize("layers", [2, 5])
def test_a_layer_alone_keeps_its_share_and_the_others_all(layers):
    m = 50
    length, visual = jnp.array([m]), jnp.ones((1, m), bool)
    for layer, method in enumerate(alone((0.1,), layers).values()):
        prompt = vlcache_jax.Prompt(length, visual, layers, method.limit.data)
        _, allocation = method.rules()
        budgets = np.asarray(allocate(allocation.sizes(prompt, None), prompt.budget, prompt.length))
        expected = np.full(layers, m)
        expected[layer] = 5
        np.testing.assert_array_equal(budgets[0], expected)


@pytest.mark.full
def test_a_run_goes_on_where_it_was_cut_off(results, text_dir, monkeypatch):
    """What is in the log is not run again; a line that was cut off is."""
    monkeypatch.setattr(programs, "keep_programs", lambda: None)
    log = results / "layers.jsonl"
    before, lines = result_of(results, "layers"), log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    ran = []
    replay = Replays.run

    def counted(self, inputs, names):
        ran.append(list(names))
        return replay(self, inputs, names)

    monkeypatch.setattr(Replays, "run", counted)
    again = invoke(text_dir, results, "layers", "--json")
    assert again.exit_code == 0, again.output
    assert ran == [["layer 1 0.4"]]
    assert json.loads(again.stdout)["details"] == before["details"]
    log.write_text("\n".join(lines) + "\n")
    late = invoke(text_dir, results, "layers", "--json", "--minutes", 0)
    assert late.exit_code == 0, "all is there already"
    (results / "new.jsonl").unlink(missing_ok=True)
    late = invoke(text_dir, results, "layers", "--json", "--minutes", 0, "--log",
                  results / "new.jsonl")  # fmt: skip
    assert late.exit_code == 1
    assert "1 of 2 prompts so far" in late.output


def test_a_part_runs(text_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "keep_programs", lambda: None)
    outcome = invoke(text_dir, tmp_path, "layers", "--n", 1, "--budgets", "0.1", "--json")
    assert outcome.exit_code == 0, outcome.output
    details = json.loads(outcome.stdout)["details"]
    assert list(details) == ["layer 0", "layer 1"]
    assert all(of["0.1"]["kl"] > 0 for of in details.values())


def test_a_log_of_something_else_is_refused(tmp_path):
    log = run.Log(tmp_path / "log.jsonl", {"model": "a"})
    log.add("prompt", {"x": Replayed(np.array([0.25], np.float32), np.array([True]), 0.5)})
    again = run.Log(tmp_path / "log.jsonl", {"model": "a"}).of("prompt")["x"]
    assert (again.kl.tolist(), again.same.tolist(), again.kept_share) == ([0.25], [True], 0.5)
    with pytest.raises(ValueError, match="name another file"):
        run.Log(tmp_path / "log.jsonl", {"model": "b"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part", "none"), "part 'none' is not one of methods, ablation, layers"),
        (("--budgets", "x"), "a budget must be a share"),
        (("--split", "none"), "split"),
        (("--tokens", 10**6), "tokens"),
        (("--model", "no-such-directory"), "no-such-directory"),
    ],
)
def test_what_cannot_be_run_is_refused(text_dir, options, message):
    given = ["--model", str(text_dir), *map(str, options)]
    outcome = CliRunner().invoke(command.app, given)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.replace("│", " ").split())


@pytest.mark.full
def test_the_document_tells_the_numbers(results):
    found = {part: result_of(results, part) for part in PARTS}
    for result in found.values():
        for of in result["details"].values():
            of["0.1"]["intervals"] = {"kl": [0.0, 1.0], "top1": [0.0, 1.0]}
    text = report.methods_part(found["methods"])
    assert f"{found['methods']['details']['h2o']['0.1']['kl']:.3f}" in text
    layers = found["methods"]["architecture"]["layers"]
    assert f"{layers} layers" in report.run_part(found["methods"])
    ablated = report.ablation_part(found["ablation"])
    for facts in found["ablation"]["details"].values():
        assert report.cell(facts["0.1"]) in ablated
    ours, paper = (
        found["methods"]["details"][name]["0.1"] for name in (DEFAULT_METHOD, "vl-cache")
    )
    default = report.default_part(found["methods"])
    assert f"| `vl-cache` | {report.behind(paper)} |" in default
    assert f"its KL is {ours['kl'] / paper['kl']:.2f} of VL-Cache's" in default
    assert report.behind(ours) == "-"
    tried = report.candidates_part(found["candidates"])
    assert f"| all | {report.cell(found['candidates']['details']['all']['0.1'])} |" in tried
    layers = report.layers_part(found["layers"])
    total = sum(of["0.1"]["kl"] for of in found["layers"]["details"].values())
    assert f"{total:.3f}" in layers
    assert "not measured yet" in report.lengths_part(found["methods"], None, None)
    assert "2,000" not in report.lengths_part(found["methods"], None, None)
    for plot, part in zip(report.PLOTS, ("methods", "layers"), strict=True):
        assert plot.draw(found[part]).axes


def test_a_passage_is_known_by_its_text_and_its_question():
    one = Passage("d", "1", "h", 0, 3, "about", "What?", "Text.")
    keys = {
        run.key_of(passage)
        for passage in (
            one,
            Passage("d", "1", "h", 0, 3, "about", "Why?", "Text."),
            Passage("d", "1", "h", 0, 3, "about", "What?", "Text"),
        )
    }
    assert len(keys) == 3
    assert run.key_of(one) in keys


def test_the_committed_result_orders_the_methods():
    """What a first trial showed: layer budgets cost VL-Cache more than its score does."""
    result = json.loads(report.METHODS.read_text(encoding="utf-8"))
    assert result["n"] >= 96
    assert result["split"] == "report"
    kl = {label: of["0.1"]["kl"] for label, of in result["details"].items()}
    assert min(kl, key=kl.__getitem__).startswith("oracle")
    assert max(kl, key=kl.__getitem__) == "random"
    assert kl["vl-cache"] >= 1.4 * kl["post-vision-uniform"]


def test_the_default_is_as_good_as_every_published_method():
    """Paired by document, none is surely better at a budget that decides."""
    details = json.loads(report.METHODS.read_text(encoding="utf-8"))["details"]
    published = METHODS.keys() - {"full", DEFAULT_METHOD}
    assert published < details.keys()
    for name in published:
        for budget in report.DECIDING:
            assert details[name][budget]["behind"]["interval"][1] > 0, (name, budget)
    at = {name: of["0.1"]["kl"] for name, of in details.items()}
    assert at[DEFAULT_METHOD] <= 0.5 * at["vl-cache"]
    assert at[DEFAULT_METHOD] <= min(at[name] for name in published)
