"""The README says what the committed result files say, and its code runs."""

import re
from pathlib import Path

import pytest

import vlcache_jax
from benchmarks import demo_model
from benchmarks.report import DOCUMENTS, fill

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(document):
    text = document.read_text(encoding="utf-8")
    assert fill(document) == text, "run `python -m benchmarks.report`"


def test_the_plot_of_the_training_is_up_to_date():
    source = demo_model.plot_source()
    assert demo_model.PLOT.exists() == (source is not None), "run `python -m benchmarks.report`"
    if source:
        assert source in demo_model.PLOT.read_text(encoding="utf-8")


def test_the_ten_lines_of_python_run(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    namespace = {}
    exec(code[1], namespace)
    assert capsys.readouterr().out
    assert len(namespace["answers"]) == 2


def test_the_code_in_the_guide_to_the_methods_runs(capsys, model_dir, monkeypatch):
    vlm = vlcache_jax.load(model_dir)  # smaller than the demo, which the README's lines run on
    monkeypatch.setattr(vlcache_jax, "load", lambda name: vlm if name == "demo" else None)
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for code in blocks:
        exec(code, {})
    kept, full = map(int, capsys.readouterr().out.split()[:2])
    assert 0.08 < kept / full < 0.12


def test_links_lead_somewhere():
    for document in (README, *(ROOT / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"([^\"]+)\"", text):
            assert document.parent.joinpath("".join(target).split("#")[0]).exists(), target
        for path in re.findall(r"(?:vlcache_jax|pallas_kernels)/[\w/.]*[\w/]", text):
            assert (ROOT / path).exists(), path
