"""Second questions are timed beside new prefills, and their operations counted."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import programs, sessions
from benchmarks.counted import operations
from benchmarks.documents import RESULTS
from benchmarks.loops import copies
from benchmarks.programs import BFLOAT16, Program
from benchmarks.roofline import prefill
from benchmarks.sessions import Subject
from benchmarks.speed import cases
from benchmarks.speed_sections import sessions_part
from tests.tiny import tiny_config
from vlcache_jax.cache.methods import VLCache
from vlcache_jax.models.families import abstract_params, init_params

TINY = tiny_config("llava_next")
SMALLEST = 32
"""Rows of the smallest bucket of questions."""
MOST_OPERATIONS = 1.3
"""Of a question over what its bucket's rows need at least."""
SPEEDUP = 8
"""Of a second question of 30 tokens behind 2,900 visual ones, on a CPU."""


@pytest.fixture
def shapes(monkeypatch):
    for module in (cases, sessions):
        monkeypatch.setattr(module, "models", lambda: {"tiny": TINY})


def test_the_command_times_every_way(shapes, tmp_path):
    app, out = typer.Typer(), tmp_path / "sessions.json"
    app.command()(sessions.main)
    arguments = ["--model", "tiny", "--visual", "20", "--question", "4", "--dtype", "float32"]
    arguments += ["--store", "device", "--store", "8", "--chunk", "16", "--repeats", "2"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    ways = [(row["way"], row.get("store"), row.get("chunk")) for row in result["rows"]]
    assert ways == [
        ("new prefill", None, None),
        ("new prefill, 16 rows at a time", None, 16),
        ("second question, device", "device", None),
        ("second question, 8", "8", None),
    ]
    assert all(len(row["samples"]) == 2 and row["bucket"] == 192 for row in result["rows"])
    assert ["speedup" in row for row in result["rows"]] == [False, True, True, True]
    assert {"commit", "device", "machine"} <= result.keys()
    text = sessions_part(result)
    assert "Model tiny, float32, consensus 0.1, 4 tokens of question" in text
    assert "| 20 | 192 | second question, device |" in text


@pytest.mark.parametrize(
    "arguments", [["--model", "x"], ["--store", "2"], ["--method", "x"], ["--dtype", "int8"]]
)
def test_unknown_names_are_refused(arguments):
    app = typer.Typer()
    app.command()(sessions.main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert repr(arguments[1]) in done.output


def test_what_is_timed_is_the_same_question(shapes):
    """All ways begin with one token and make one pool; another question has another."""
    subject = Subject("tiny", 20, 4, VLCache(0.5), "float32")
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init_params(TINY))
    prefix = subject.prefix(params, "device")
    pools = []
    for seed in (1, 2):
        inputs = subject.inputs(seed)
        np.testing.assert_array_equal(inputs.tokens[:, :20], subject.inputs(0).tokens[:, :20])
        whole = subject.ask(params, inputs)
        others = [
            subject.ask(params, inputs, chunk=16),
            subject.ask(params, inputs.without_tiles, prefix=prefix),
        ]
        for token, pool in others:
            np.testing.assert_array_equal(token, whole[0])
            for own, other in zip(kept(pool), kept(whole[1]), strict=True):
                np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5)
        pools.append(np.concatenate(kept(whole[1])))
    assert not np.array_equal(*pools)


def kept(pool):
    """The keys of each layer in the pool of one sequence, [rows, K, H]."""
    found = []
    for segment in pool.segments():
        first = int(segment.offset[0])
        rows = segment.k[0, :, first : first + int(segment.length[0])]
        found.append(np.asarray(rows.swapaxes(0, 1)))
    return found


def test_operations_of_a_program_are_counted():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 7), (7, 11)))
    assert operations(jnp.dot, a, b) == 2 * 5 * 7 * 11


@pytest.mark.parametrize("context", [192, 768])
def test_a_question_runs_its_own_rows_alone(monkeypatch, context):
    """Behind a prefix, beside what the rows of its bucket need; a new prefill runs all of them."""
    # Heads as wide as a published model's: masks and softmax are a small part of the attention.
    text = replace(TINY.text, head_dim=64)
    monkeypatch.setattr(programs, "MODELS", {"tiny": replace(TINY, text=text)})
    program = Program(model="tiny", context=context, stage="finish", rows=SMALLEST, budget=1.0)
    config = programs.MODELS["tiny"]
    params = abstract_params(config, BFLOAT16)
    function, args, _ = program.part(params)
    found = operations(function, *args)
    least = prefill(config, context, rows=SMALLEST).operations
    assert least < found <= MOST_OPERATIONS * least
    anew, args, _ = replace(program, rows=context).part(params)
    assert operations(anew, *args) > 0.8 * context / SMALLEST * found


def test_a_cpu_changes_the_buffers_over_once(monkeypatch):
    """In bfloat16 K and V are made bits and numbers again, not at each of the layers."""
    text = replace(TINY.text, num_layers=4)
    monkeypatch.setattr(programs, "MODELS", {"tiny": replace(TINY, text=text)})
    program = Program(model="tiny", context=96, stage="finish", rows=SMALLEST, budget=1.0)
    function, args, donated = program.part(abstract_params(programs.MODELS["tiny"], BFLOAT16))
    compiled = jax.jit(function, donate_argnums=donated).lower(*args).compile()
    assert len(copies(compiled.as_text() or "", args[3].k.shape)) <= 4


def test_the_committed_result_reaches_its_bar():
    result = json.loads((RESULTS / "cpu" / "sessions.json").read_text(encoding="utf-8"))
    rows = {(row["visual_tokens"], row.get("store")): row for row in result["rows"]}
    assert rows.keys() == {
        (visual, store) for visual in sessions.VISUAL for store in (None, *sessions.STORES)
    }
    assert rows[2900, "device"]["speedup"] >= SPEEDUP
