"""The README says what the committed result files say, and its code runs."""

import re
from pathlib import Path

import numpy as np
import pytest

import vlcache_jax
from benchmarks.report import DOCUMENTS, PLOTS, fill
from vlcache_jax.cache.methods import make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.models.config import TextConfig
from vlcache_jax.results.report import cache_report

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(document):
    text = document.read_text(encoding="utf-8")
    assert fill(document) == text, "run `python -m benchmarks.report`"


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.path.stem)
def test_plots_are_up_to_date(plot):
    source = plot.source()
    assert plot.path.exists() == (source is not None), "run `python -m benchmarks.report`"
    if source:
        assert source in plot.path.read_text(encoding="utf-8"), "run `python -m benchmarks.report`"


METHODS = ROOT / "docs" / "methods.md"
SESSIONS = ROOT / "docs" / "sessions.md"
SERVING = ROOT / "docs" / "serving.md"


def python_of(document):
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def models(model_dir):
    """Their compiled programs are shared by the tests of this file."""
    return {
        transform: vlcache_jax.load(model_dir, transform=transform) for transform in (False, True)
    }


@pytest.fixture
def tiny_demo(models, monkeypatch):
    """A model smaller than the demo in its place."""

    def load(name, transform=False):
        assert name == "demo-small"
        return models[transform]

    monkeypatch.setattr(vlcache_jax, "load", load)


@pytest.mark.usefixtures("tiny_demo")
def test_the_ten_lines_of_python_run(capsys):
    namespace = {}
    exec(python_of(README)[0], namespace)
    assert capsys.readouterr().out
    assert len(namespace["answers"]) == 2


@pytest.mark.usefixtures("tiny_demo")
def test_the_lines_about_a_safe_budget_run(capsys):
    _, code, _ = python_of(README)
    exec(code, namespace := {})
    assert namespace["found"].requests == 2
    assert "snapkv" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_demo")
def test_the_lines_about_two_bits_run(capsys):
    *_, code = python_of(README)
    exec(code, {})
    alone, both = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (alone[0], both[0]) == ("full+akvq", "vl-cache+akvq")
    for _, kept, full, bits in (alone, both):
        assert int(kept) < int(full)
        assert float(bits) < 32
    assert int(both[1]) < 0.1 * int(both[2])


@pytest.mark.full
@pytest.mark.usefixtures("tiny_demo")
def test_the_code_in_the_guide_to_the_methods_runs(capsys):
    blocks = python_of(METHODS)
    assert len(blocks) == 5
    for code in blocks:
        exec(code, {})
    kept, full = map(int, capsys.readouterr().out.split()[:2])
    assert 0.08 < kept / full < 0.12


@pytest.mark.full
@pytest.mark.usefixtures("tiny_demo")
def test_the_code_in_the_guide_to_sessions_runs(capsys):
    [code] = python_of(SESSIONS)
    exec(code, {})
    assert "questions=2" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.usefixtures("tiny_demo")
def test_the_code_in_the_guide_to_the_engine_runs(capsys):
    [code] = python_of(SERVING)
    exec(code, {})
    *_, ready, first, _, _ = capsys.readouterr().out.rstrip().splitlines()
    assert len(set(ready.split()[0].split("/"))) == 1
    assert float(first.split()[-1]) < 0.15


def test_the_guide_counts_bits_as_the_report_does():
    text = TextConfig(num_layers=2, num_heads=32, num_kv_heads=8, head_dim=128, kind="mistral")
    rows = re.findall(r"^\| `(--.*)` \| (.*) \| (.*) % \|$", METHODS.read_text("utf-8"), re.M)
    assert len(rows) == 9
    for options, bits, share in rows:
        words = options.split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        quantizer = make_quantizer(given.get("--kv-bits"))
        method = make_method(given.get("--method", "vl-cache"), given.get("--kv-budget"), quantizer)
        method = method.for_model(text)
        report = cache_report(
            text,
            method,
            np.dtype("bfloat16"),
            prompt_tokens=4096,
            counts=np.tile(widths_of(method, text), (2, 1)),
            kept_visual=np.zeros(2),
            prompt_rows=4096,
            tail_rows=1,
        )
        assert (bits, share) == (f"{report.effective_bits:.2f}", f"{report.kept_share:.1%}"[:-1])


def widths_of(method, text):
    """Tokens by width that a layer keeps of 4,096 ones, with all pivots among them."""
    kept = 4096 if method.limit.keeps_all else round(0.1 * 4096)
    if method.quantize is None:
        return [kept]
    evicts = not method.limit.keeps_all
    dense = int(method.quantize.recent_rows(np.array(kept), evicts))
    dense += getattr(method.quantize, "pivots", 0)
    return [dense, kept - dense]


def test_links_lead_somewhere():
    for document in (README, *(ROOT / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"([^\"]+)\"", text):
            assert document.parent.joinpath("".join(target).split("#")[0]).exists(), target
        for path in re.findall(r"(?:vlcache_jax|pallas_kernels)/[\w/.]*[\w/]", text):
            assert (ROOT / path).exists(), path
