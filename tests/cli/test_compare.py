"""`vlcache compare`, run in this process."""

import json
import sys

import pytest

from tests.cli.program import refused, run
from vlcache_jax import DEFAULT_METHOD, VLM, demo


def test_a_comparison_is_with_the_full_cache(model_dir, image):
    ask = (model_dir, "--image", image, "--prompt", "what?", "--max-new-tokens", 6)
    options = ("--method", "vl-cache", "--method", "h2o", "--method", "full")
    result = run("compare", *ask, *options, "--json")
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout)
    assert set(compared) == {"prompt", "right_answer", "answers", "model", "versions"}
    assert (compared["prompt"], compared["right_answer"]) == ("what?", None)
    answers = compared["answers"]
    assert [answer["kv"]["method"] for answer in answers] == ["full", "vl-cache", "h2o"]
    full, *kept = answers
    assert full["agrees"]
    for answer in kept:
        same = answer["same_tokens"]
        assert answer["tokens"][:same] == full["tokens"][:same]
        assert answer["agrees"] == (answer["tokens"] == full["tokens"])
        assert answer["agrees"] or answer["tokens"][same] != full["tokens"][same]
        assert answer["kv"]["kept_bytes"] < 0.12 * answer["kv"]["full_bytes"]
        assert answer["right"] is None
    for answer, method in zip(answers, ("full", "vl-cache", "h2o"), strict=True):
        alone = json.loads(run("generate", *ask, "--method", method, "--json").stdout)
        assert (alone["tokens"], alone["kv"]) == (answer["tokens"], answer["kv"])


def test_a_comparison_is_of_every_method_budget_and_bits(model_dir, image, monkeypatch):
    asked, transformed = [], []

    def stream(vlm, *args, cache, **rest):
        asked.append(cache)
        transformed.append(vlm.transformed)

    monkeypatch.setattr(VLM, "stream", stream)
    monkeypatch.setattr("vlcache_jax.cli.read_params", lambda *args: sys.exit(0))
    options = ("--method", "h2o", "--method", "vl-cache", "--kv-budget", "0.1", "--kv-budget",
               "0.2", "--kv-bits", "akvq", "--kv-bits", "16")  # fmt: skip
    ask = (model_dir, "--image", image, "--prompt", "x")
    result = run("compare", *ask, *options)
    assert result.exit_code == 0, result.output
    assert not any(transformed)  # the full cache's answer is that of the weights as they are
    assert [(cache.label, cache.budget) for cache in asked] == [
        ("full", 1.0),
        ("h2o+akvq", "0.1"),
        ("h2o", "0.1"),
        ("h2o+akvq", "0.2"),
        ("h2o", "0.2"),
        ("vl-cache+akvq", "0.1"),
        ("vl-cache", "0.1"),
        ("vl-cache+akvq", "0.2"),
        ("vl-cache", "0.2"),
    ]
    for bits, folded in (("akvq", True), ("kivi", False), ("16", False)):
        assert run("generate", *ask, "--kv-bits", bits).exit_code == 0
        assert transformed[-1] == folded


def test_a_comparison_is_shown_side_by_side(model_dir):
    args = ("compare", model_dir, "--image", "demo-small:2", "--max-new-tokens", 3)
    result = run(*args, "--method", "h2o", "--kv-budget", "0.9", "--kv-budget", "40tok")
    assert result.exit_code == 0, result.output
    for word in ("1.0", "0.9", "40tok", "as the full cache", "cache", "kept per layer", "decode",
                 "right answer", demo.pictures("demo-small")[1].answer):  # fmt: skip
        assert word in result.stdout


def test_the_default_stands_beside_the_method_of_the_paper(model_dir):
    ask = ("compare", model_dir, "--image", "demo-small:2", "--max-new-tokens", 2, "--json")
    answers = json.loads(run(*ask).stdout)["answers"]
    named = [(answer["kv"]["method"], answer["kv"]["budget_requested"]) for answer in answers]
    assert named == [("full", "1.0"), (DEFAULT_METHOD, "0.1"), ("vl-cache", "0.1")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give a --prompt"),
        (("--image", "demo-small", "--image", "demo-small:2"), "give a --prompt"),
        (
            ("--image", "demo-small:0"),
            "there is no picture demo-small:0: choose one of demo-small:1",
        ),
        (("--image", "demo-small", "--method", "fastv"), "fastv"),
        (("--image", "demo-small", "--kv-budget", "0.1", "--kv-budget", "x"), "'x'"),
        (("--image", "demo-small", "--method", "full", "--kv-budget", "0.1"), "keeps everything"),
    ],
)
def test_comparisons_that_cannot_be_made(model_dir, options, message):
    refused(message, "compare", model_dir, *options)
