"""Peers: agreement, turns and failures with sides made up here; then the real processes."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.models import WINDOW
from benchmarks.peers import __main__ as command
from benchmarks.peers.compare import (
    BOUNDS,
    STAGES,
    STATIC,
    WARM_UPS,
    Differs,
    Plan,
    agree,
    compare,
)
from benchmarks.peers.model import (
    MODELS,
    SMALL,
    config_json,
    make_files,
    make_prompt,
    random_params,
)
from benchmarks.peers.process import PeerError, Process
from vlcache_jax import Buckets, LlavaConfig, Processor

TINY = replace(
    MODELS["small"],
    vision=replace(SMALL.vision, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
    text=replace(
        SMALL.text,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_kv_heads=2,
        head_dim=16,
    ),
    vision_layers=1,
)


def logits_of(tokens, vocabulary=8):
    """[B, n, V]: 1 for the token, less for the others."""
    logits = 0.5 * np.random.default_rng(0).random((*np.shape(tokens), vocabulary))
    np.put_along_axis(logits, np.asarray(tokens)[..., None], 1.0, axis=-1)
    return logits


def test_equal_answers_agree():
    tokens = np.array([[3, 1, 4, 1], [5, 2, 6, 5]])
    logits = logits_of(tokens)
    found = agree(tokens, logits[:, 0] + 1e-5, tokens, logits, "float32")
    assert found.logits_error == pytest.approx(1e-5)
    assert (found.equal_tokens, found.tokens, found.distinct_tokens) == (4, 4, 3)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("error", [2.0, np.nan])
def test_other_logits_do_not_agree(dtype, error):
    tokens = np.array([[3, 1]])
    logits = logits_of(tokens)
    first = logits[:, 0].copy()
    first[0, 7] += error * BOUNDS[dtype]
    with pytest.raises(Differs, match="logits"):
        agree(tokens, first, tokens, logits, dtype)


def test_other_tokens_agree_in_bfloat16_at_a_tie_alone():
    expected = np.array([[3, 1, 4], [3, 1, 4]])
    tokens = np.array([[3, 1, 4], [3, 6, 0]])
    logits = logits_of(expected)
    first = logits[:, 0] + 1e-3
    with pytest.raises(Differs, match="token 1 of answer 1 is 6 instead of 1"):
        agree(tokens, first, expected, logits, "bfloat16")
    logits[1, 1, 6] = 1 - 3e-3
    assert agree(tokens, first, expected, logits, "bfloat16").equal_tokens == 1
    with pytest.raises(Differs, match="token 1"):
        agree(tokens, logits[:, 0], expected, logits, "float32")


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_read_the_same_configuration(name):
    assert LlavaConfig.from_hf(config_json(MODELS[name])) == MODELS[name]


@pytest.mark.parametrize("context", [512, 1024, 1500])
def test_a_prompt_has_exactly_the_tokens_asked_for(context):
    config = MODELS["small"]
    pictures, text = make_prompt(config, context)
    processor = Processor(config, make_files(config), Buckets(prompt=(context,), tiles=(1,)))
    inputs = processor(pictures, text, raw_prompt=True)
    assert inputs.length.tolist() == [context]
    visual = inputs.visual_index[0] >= 0
    assert visual.sum() > context / 2
    assert not visual[-WINDOW:].any()
    assert visual[-WINDOW - 1]
    with pytest.raises(ValueError, match="too short for a picture"):
        make_prompt(config, 100)


def test_weights_are_random_and_norms_are_not():
    params = random_params(TINY, "float32")
    assert (params["head"]["norm"]["scale"] == 1).all()
    first, second = (np.asarray(params["layers"][i]["qkv"]) for i in (0, 1))
    assert first.std() == pytest.approx(1.2 / 32**0.5, rel=0.05)
    assert not np.array_equal(first, second)


PACE = {"default": 0.02, "static": 0.01, "full": 0.004, "0.1": 0.002}
TOKENS = np.arange(5, 9)[None]


class Fake:
    """A process that answers at once: a second, and `PACE` for each token."""

    def __init__(self, log, module, settings):
        self.log, self.module = log, module
        assert settings["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append("closed")

    def ask(self, name, limit_s, **request):
        if name == "start":
            ours = self.module == "benchmarks.peers.ours"
            assert ("gpu" in request) != ours  # the others do as ours found it
            return {"gpu": False} if ours else {}
        if name == "programs":
            return 3
        cache, tokens = request["cache"], request.get("tokens", 0)
        self.log.append((name, cache, tokens))
        if name == "seconds":
            return 1.0 + PACE[cache] * tokens
        np.save(request["logits"], logits_of(TOKENS, 16))
        return {"tokens": TOKENS.tolist()}


def run(broken=(), **changes):
    log = []

    class Peer(Fake):
        def ask(self, name, limit_s, **request):
            if (name, request.get("cache")) in broken:
                raise PeerError("MemoryError: too large")
            found = super().ask(name, limit_s, **request)
            return changes.get(request["cache"], found) if name == "answer" else found

    plan = Plan(context=512, new_tokens=4, repeats=3)
    steps = []
    result = compare(plan, start=lambda *args: Peer(log, *args), step=lambda: steps.append(1))
    assert len(steps) == plan.steps
    return result, log


def test_sides_take_turns_and_a_step_is_the_difference_of_two_answers():
    result, log = run()
    assert log[-3:] == ["closed"] * 3
    turn = [("seconds", cache, n) for cache in ("default", "static", "full", "0.1") for n in (1, 4)]
    assert log[-3 - 8 * 5 : -3] == turn * 5  # two more warm-ups, three samples
    rows = {(row["side"], row["stage"]): row for row in result["rows"]}
    assert len(rows) == 4 * len(STAGES)
    assert all(len(row["samples"]) == 3 for row in rows.values())
    assert rows["full", "decode"]["seconds"] == pytest.approx(0.004)
    assert rows["full", "first token"]["seconds"] == pytest.approx(1.004)
    assert rows["10%", "end to end"]["seconds"] == pytest.approx(1.008)
    ratios = {(row["ratio"], row["stage"]): row["speedup"] for row in result["ratios"]}
    assert ratios["full over Hugging Face", "decode"] == pytest.approx(5)
    assert ratios["10% over full", "decode"] == pytest.approx(2)
    assert [check["side"] for check in result["checks"]] == [STATIC.name, "full"]


def test_a_side_that_fails_has_the_reason_in_its_rows():
    for broken in (("seconds", "static"), ("answer", "static")):
        result, log = run(broken=[broken])
        rows = [row for row in result["rows"] if row["side"] == STATIC.name]
        assert [row["exception"] for row in rows] == ["MemoryError: too large"] * len(STAGES)
        assert {row["speedup"] for row in result["ratios"] if STATIC.name in row["ratio"]} == {None}
        assert [check["side"] for check in result["checks"]] == ["full"]
        assert log.count(("seconds", "full", 1)) == WARM_UPS + 3


def test_a_static_cache_with_other_tokens_is_not_timed():
    result, log = run(static={"tokens": [[5, 6, 7, 9]]})
    rows = [row for row in result["rows"] if row["side"] == STATIC.name]
    assert all(row["exception"].startswith("Differs: token 3") for row in rows)
    assert log.count(("seconds", "static", 1)) == 1


def test_the_run_fails_where_our_tokens_differ():
    with pytest.raises(Differs, match="full: token 3 of answer 0 is 9 instead of 8"):
        run(full={"tokens": [[5, 6, 7, 9]]})
    with pytest.raises(Differs, match="does not begin as the full cache does"):
        run(**{"0.1": {"tokens": [[6, 6, 7, 8]]}})
    with pytest.raises(PeerError, match="full: MemoryError"):
        run(broken=[("seconds", "full")])


def test_a_process_says_why_it_does_not_answer():
    with Process("benchmarks.no_such_module", {}) as process:
        with pytest.raises(PeerError, match=r"ended with code 1: .*no_such_module"):
            process.ask("start", 60)
        with pytest.raises(PeerError, match="ended with code 1"):
            process.ask("start", 60)
    with (
        Process("benchmarks.peers.ours", {}) as process,  # which takes longer to be imported
        pytest.raises(PeerError, match=r"TimeoutError: killed, since start took more than 0.1 s"),
    ):
        process.ask("start", 0.1)


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llava-1.5-7b"], "llava-1.5-7b"),
        (["--dtype", "float16"], "float16"),
        (["--context", "100"], "too short"),
        (["--budget", "-1"], "budget"),
    ],
)
def test_input_is_checked_before_the_work(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_the_command_writes_its_result_or_fails(monkeypatch, tmp_path):
    result, _ = run()
    result["about"]["ours"] = {"device": {"device": "cpu"}, "prompt_tokens": 9, "visual_tokens": 8}
    monkeypatch.setattr(command, "compare", lambda plan, step: copy.deepcopy(result))
    out = tmp_path / "peers.json"
    printed = invoke("--json", "--out", str(out))
    assert printed.exit_code == 0
    written = json.loads(printed.stdout)
    assert written == json.loads(out.read_text(encoding="utf-8"))
    fields = {"commit", "command", "versions", "device", "load_average_before"}
    assert fields | {"checks", "rows", "ratios"} <= set(written)
    assert "2.00 times as fast" in invoke().output
    assert invoke("--out", str(out)).exit_code == 2

    def differs(plan, step):
        raise Differs("full: token 3")

    monkeypatch.setattr(command, "compare", differs)
    failed = invoke("--json", "--out", str(out), "--force")
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert json.loads(out.read_text(encoding="utf-8")) == written


def compare_really(monkeypatch, **changes):
    pytest.importorskip("torch")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the process that is started
    plan = Plan("tiny", 256, batch=2, new_tokens=9, repeats=2, shape=TINY)
    return compare(replace(plan, **changes))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_hugging_face_and_ours_in_processes_of_their_own(monkeypatch, dtype):
    result = compare_really(monkeypatch, static=False, dtype=dtype)
    (check,) = result["checks"]
    assert check["side"] == "full"
    assert check["tokens"] == 9
    assert check["distinct_tokens"] > 3
    assert check["equal_tokens"] == 9 or dtype == "bfloat16"
    ours, theirs = result["about"]["ours"], result["about"]["default"]
    assert ours["prompt_tokens"] == theirs["prompt_tokens"] == 256
    assert all(len(row["samples"]) == 2 for row in result["rows"])
    kept = {row["side"]: row.get("kept_share") for row in result["rows"]}
    assert kept["full"] == 1
    assert kept["10%"] == pytest.approx(0.1, abs=0.02)
    for row in result["rows"]:
        assert row["programs"] == row["programs_in_the_end"]


@pytest.mark.slow
def test_a_static_cache_and_torch_compile(monkeypatch):
    result = compare_really(monkeypatch)
    rows = [row for row in result["rows"] if row["side"] == STATIC.name]
    assert all(row["programs"] == row["programs_in_the_end"] >= 1 for row in rows)
    assert {check["side"] for check in result["checks"]} == {"full", STATIC.name}
