"""`vlcache inspect`, run in this process."""

import json
import sys

import pytest

from tests.cli import program
from tests.inspections import made_up_inspection
from vlcache_jax import DEFAULT_METHOD, H2O, VLM, SnapKV, VLCache, cli, demo
from vlcache_jax.cache.methods import make_method
from vlcache_jax.cache.quantizers import make_quantizer


def run(*args):
    return program.run("inspect", *args)


def refused(message, *args):
    program.refused(message, "inspect", *args)


@pytest.fixture
def asked(monkeypatch):
    """In place of a run: what it is asked for, and an inspection of made-up numbers."""
    calls = []

    def record(vlm, images, text, **options):
        calls.append({"images": images, "text": text, **options})
        return made_up_inspection(
            ("vl-cache 0.1", "h2o 0.1"),
            answers=[("A", " shelf"), ("A",)],
            right_answer=options["right_answer"],
        )

    monkeypatch.setattr("vlcache_jax.results.inspection.inspect", record)
    return calls


def test_a_run_writes_the_numbers_and_prints_them(model_dir, image, tmp_path):
    file = tmp_path / "numbers.json"
    result = run(model_dir, "--image", image, "--prompt", "what?", "--max-new-tokens", 1,
                 "--kv-budget", "30tok", "--out", file, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values == json.loads(file.read_text(encoding="utf-8"))
    (outcome,) = values["outcomes"]
    assert (values["full"]["label"], outcome["label"]) == ("full", f"{DEFAULT_METHOD} 30tok")
    assert sum(layer["budget"] for layer in outcome["layers"]) <= 2 * 31
    assert values["pictures"][0]["name"] == "image.png"
    assert (values["model"], values["prompt"]) == (str(model_dir), "what?")


def test_a_page_and_figures_of_several_methods(model_dir, image, tmp_path, asked, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("vlcache_jax.results.inspection.figures.DPI", 40)
    page, folder = tmp_path / "report.html", tmp_path / "figures"
    result = run(model_dir, "--image", image, "--prompt", "what?", "--max-new-tokens", 9,
                 "--compare", "vl-cache, h2o,snapkv,h2o", "--kv-budget", "0.2",
                 "--kv-bits", "16", "--kv-bits", "4", "--raw-prompt",
                 "--out", page, "--png", folder)  # fmt: skip
    assert result.exit_code == 0, result.output
    (call,) = asked
    assert (call["images"], call["text"]) == ([image], "what?")
    assert (call["max_new_tokens"], call["raw_prompt"]) == (9, True)
    assert call["methods"] == [
        kind("0.2", quantize=quantizer)
        for kind in (VLCache, H2O, SnapKV)
        for quantizer in (None, make_quantizer("4"))
    ]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(file.name for file in folder.iterdir()) == [
        "heat.png", "hit-rate.png", "layers.png"
    ]  # fmt: skip
    shown = " ".join(result.stdout.split())
    assert call["right_answer"] is None
    assert "right" not in shown
    for words in ("A shelf", "no, from token 2 on", f"written to {page}", f"{folder}/heat.png"):
        assert words in shown


def test_the_method_is_the_default_and_the_demo_has_its_question(model_dir, asked, tmp_path):
    for options in ((), ("--method", "h2o", "--kv-budget", "64tok")):
        result = run(model_dir, "--image", "demo-small:2", "--out", tmp_path / "a.json", "--force",
                     *options)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "right" in result.stdout
    assert [call["methods"] for call in asked] == [
        [make_method(DEFAULT_METHOD)],
        [H2O("64tok")],
    ]
    picture = demo.pictures("demo-small")[1]
    assert (asked[0]["text"], asked[0]["right_answer"]) == (picture.prompt, picture.answer)
    assert asked[0]["max_new_tokens"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name what to make: --out report.html, --png DIR or --json"),
        (("--out", "report.txt"), "must end in .html (the page) or .json (the numbers)"),
        (("--out", "nowhere/report.html"), "no directory nowhere for the report"),
        (("--png", "nowhere/figures"), "no directory nowhere"),
        (("--json", "--method", "h2o", "--compare", "snapkv"), "not both"),
        (("--json", "--compare", ", "), "--compare names no method"),
        (("--json", "--compare", "vl-cache,typo"), "'typo' is not implemented"),
        (("--json", "--compare", "vl-cache,full", "--kv-budget", "0.1"), "keeps everything"),
        (("--json", "--kv-bits", "3"), "choose one of 2, 4, 8"),
        (("--json", "--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--json", "--prompt", "<image> <image>"), "2 <image> marks"),
        (("--json", "--prompt", "x" * 3000), "positions"),
        (("--json", "--image", "none.png"), "no image file at none.png"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    model_dir, image, options, message, monkeypatch
):
    monkeypatch.setattr(VLM, "params", property(lambda _: pytest.fail("parameters were read")))
    refused(message, model_dir, "--image", image, "--prompt", "what?", *options)


def test_files_are_not_overwritten_unasked(model_dir, image, tmp_path):
    ask = (model_dir, "--image", image, "--prompt", "what?")
    page = tmp_path / "report.html"
    page.write_text("mine")
    refused("--force", *ask, "--out", page)
    assert page.read_text() == "mine"
    pytest.importorskip("matplotlib")
    (tmp_path / "layers.png").write_text("mine")
    refused("layers.png exists", *ask, "--png", tmp_path)
    refused("is a file", *ask, "--png", page)


def test_the_extra_is_named_where_there_is_no_matplotlib(model_dir, image, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("vlcache-jax[bench]", model_dir, "--image", image, "--prompt", "x", "--png", tmp_path)


def test_the_program_has_the_command_and_its_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vlcache", "--no-compilation-cache", "inspect", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Example: vlcache inspect demo --image demo --out report.html", "--compare",
                  "--kv-budget", "figures as PNG", "[default: 64]"):  # fmt: skip
        assert words in text
