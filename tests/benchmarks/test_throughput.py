"""As many sequences as fit are held, and all of them are decoded."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import throughput
from benchmarks.roofline import Device
from benchmarks.speed import cases, limit
from benchmarks.speed.cases import FULL, Case
from benchmarks.throughput import Load, compare, run
from tests.tiny import tiny_config
from vlcache_jax.cache.methods import VLCache
from vlcache_jax.cache.quantizers import AKVQ
from vlcache_jax.models.families import init_params
from vlcache_jax.results.report import pool_bytes
from vlcache_jax.running.driver import Run

TENTH = VLCache(0.1)
PACKED = VLCache(0.1, quantize=AKVQ())
DEVICE = Device("test", 1e9, 1e10, 1e9, "given")
SHAPES = {"tiny": tiny_config("llava")}


@pytest.fixture(scope="module")
def params():
    return init_params(SHAPES["tiny"])


@pytest.fixture
def load(monkeypatch):
    for module in (cases, throughput):
        monkeypatch.setattr(module, "models", lambda: SHAPES)
    return Load(Case("tiny", 96, 2, new_tokens=5, chunk=2), 2**20)


def test_a_tenth_leaves_room_for_more(load):
    full, tenth = (load.first_guess(variant, 0) for variant in (FULL, TENTH))
    text = load.case.config.text
    row = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    room = load.memory * 15 / 16 - 2 * 2 * 96 * row
    assert full % 2 == 0
    assert full == pytest.approx(room / (row * (128 * 2 / 2 + 4)), abs=2.5)  # blocks of 128 rows
    assert tenth > 1.5 * full
    assert Load(load.case, 2**20, 7).first_guess(FULL, 0) == 8
    with pytest.raises(ValueError, match="--group"):
        load.first_guess(FULL, 2**20)


def test_all_sequences_are_decoded_as_if_alone(load, params, monkeypatch):
    runs = []

    class Recorded(Run):
        def __iter__(self):
            runs.append(self)
            for tokens in super().__iter__():
                drawn.append(tokens)
                yield tokens

    drawn: list[np.ndarray] = []
    monkeypatch.setattr(throughput, "Run", Recorded)
    row = run(Load(load.case, 2**20, 4), TENTH, params, DEVICE)
    assert "exception" not in row, row
    assert row["sequences"] == 4
    assert row["prefill_s"] > 0
    assert len(row["step_samples"]) == 2
    generate, pool = load.case.generate(TENTH, load.case.new_tokens), runs[0].pool
    for start in (0, 2):
        inputs, rows = load.case.inputs(start), slice(start, start + 2)
        alone = jax.jit(generate)(params, inputs, jax.random.key(0))
        np.testing.assert_array_equal(np.concatenate(drawn, axis=1)[rows], alone.tokens)
        np.testing.assert_array_equal(pool.counts[rows], alone.counts)
    assert row["share"] == pytest.approx(row["tokens_per_s"] / row["floor_tokens_per_s"])
    assert row["answers_per_s"] > 0
    assert row["cache_bytes"] == pool.k.nbytes + pool.v.nbytes
    assert row["stored_bits"] == 16


def test_a_packed_cache_is_held_by_its_own_bytes(load, params):
    case = dataclasses.replace(load.case, new_tokens=3)
    row = run(Load(case, 2**20, 2), PACKED, params, DEVICE)
    assert "exception" not in row, row
    assert (row["method"], row["kv_bits"], row["sequences"]) == ("vl-cache+akvq", "akvq", 2)
    text, kind = case.config.text, jnp.dtype("float32")
    assert row["cache_bytes"] == pool_bytes(text, PACKED, kind, batch=2, prompt_rows=96)
    assert 1 < row["stored_bits"] < 16
    assert row["kept_bytes_share"] == row["kept_share"] * row["stored_bits"] / 16


def test_fewer_are_tried_where_memory_ends(load, params, monkeypatch):
    def hold(load, variant, params, count):
        if count > 10:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        kept = {"kept_share": 1.0, "stored_bits": 16.0}
        return {**kept, "step_samples": [0.5], "prefill_s": 1.0, "decode_s": 1.0}

    monkeypatch.setattr(throughput, "_hold_and_decode", hold)
    row = run(Load(load.case, 2**20, 16), FULL, params, DEVICE)
    assert row["tried"] == [16, 14, 12, 10]
    assert row["sequences"] == 10
    assert row["tokens_per_s"] == 20
    assert row["answers_per_s"] == 5


@pytest.mark.parametrize("text", ["RESOURCE_EXHAUSTED: even two", "INTERNAL: broken"])
def test_what_does_not_run_says_why(load, params, monkeypatch, text):
    def hold(*_):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(throughput, "_hold_and_decode", hold)
    row = run(Load(load.case, 2**20, 2), FULL, params, DEVICE)
    assert text in row["exception"]
    assert row["tried"] == [2]


def test_rows_stand_beside_the_full_cache():
    names = ("sequences", "tokens_per_s", "floor_tokens_per_s", "answers_per_s")
    full: dict[str, float] = dict.fromkeys(names, 2.0)
    tenth: dict[str, float] = dict.fromkeys(names, 8.0)
    rows = [full, tenth, {"exception": "no"}]
    compare(rows)
    assert tenth["tokens_per_s_over_full"] == 4
    assert "tokens_per_s_over_full" not in full


@pytest.fixture
def invoke(load, monkeypatch):
    monkeypatch.setattr(limit, "measured", lambda *_: (DEVICE, []))
    app = typer.Typer()
    app.command()(throughput.main)
    return lambda *arguments: CliRunner().invoke(app, [str(x) for x in arguments])


def test_the_command_prints_json_alone_and_writes_the_same(invoke, tmp_path):
    out = tmp_path / "throughput.json"
    found = invoke(
        "--model", "tiny", "--context", 96, "--batch", 2, "--group", 2, "--new-tokens", 3,
        "--json", "--out", out,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert [row["method"] for row in result["rows"]] == ["full", "vl-cache"]
    assert all(row["sequences"] == 2 for row in result["rows"])
    assert {"commit", "command", "versions", "date", "device", "XLA_FLAGS", "limit"} <= set(result)
    assert json.loads(out.read_text()) == result


@pytest.mark.parametrize(
    ("option", "value"),
    [("--model", "gpt"), ("--method", "magic"), ("--budget", "-1"), ("--dtype", "int8")],
)
def test_bad_input_is_refused(invoke, option, value):
    found = invoke("--model", "tiny", option, value)
    assert found.exit_code == 2
    assert value.lstrip("-") in found.output
