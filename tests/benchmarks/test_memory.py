"""Programs compiled for a GPU that is not here: launches, command buffers, bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import benchmarks
from benchmarks import memory
from benchmarks.ahead_of_time import GPUS, plugin_version
from benchmarks.device import NoGpu
from benchmarks.memory import (
    ALL,
    Program,
    cache_parts,
    dequantized,
    known,
    largest_batch,
    run,
)
from benchmarks.models import MODELS
from benchmarks.programs import PARTS
from tests.tiny import tiny_config
from vlcache_jax.cache.packed import PackedPool
from vlcache_jax.cache.quantizers import RTN
from vlcache_jax.cache.state import Pool

RESULT = Path(benchmarks.__file__).parent / "results" / "offline" / "programs-h200.json"
MOST_LAUNCHES = 12
MOST_TEMPORARIES = 256 * 2**20
MOST_PATCH = 28 * 1024
"""Temporaries of a tower, for each patch of a picture."""
MOST_BESIDE = 1.5e9
"""Of a prompt in chunks, beside all weights and its keys and values."""
MOST_OPERATIONS = 1.3
"""Of a question in the smallest bucket, over what its rows need at least."""
MOST_SHARE = 0.03
"""Of the full cache, that a tenth of it in two bits is allocated."""

needs_plugin = pytest.mark.skipif(
    plugin_version() is None,
    reason="the CUDA plugin is not installed: pip install 'vlcache-jax[cuda]'",
)


@pytest.mark.full
@needs_plugin
@pytest.mark.parametrize("batch", [1, 64])
def test_a_decode_step_is_one_small_command_buffer(batch):
    found = run(Program(batch=batch))
    check(found)
    layers = 32
    assert found["kernels_per_step"]["append_and_attend"] == layers
    assert found["cache_bytes"] <= 0.115 * found["full_cache_bytes"]


@pytest.mark.full
@needs_plugin
def test_a_step_from_a_quantized_cache_makes_none_of_it_wide():
    found = run(Program(context=4096, kv_bits="akvq"))
    check(found)
    assert found["dequantized_in_loop"] == 0
    assert found["kernels_per_step"]["quantized_append_and_attend"] == 32
    assert found["cache_bytes"] <= MOST_SHARE * found["full_cache_bytes"]


@pytest.mark.full
@needs_plugin
@pytest.mark.parametrize(("stage", "rows"), [("extend", 2048), ("finish", 32)])
def test_a_long_prompt_in_chunks_needs_little_beside_its_cache(stage, rows):
    found = run(Program(context=32768, stage=stage, rows=rows))
    check(found)


def check(row):
    assert row["fits"]
    if row["stage"] in PARTS:
        check_part(row)
        return
    if row["stage"] == "vision":
        config: Any = MODELS[row["model"]]
        patches = row["tiles"] * (config.tile_side // config.vision.patch_size) ** 2
        assert row["temp_bytes"] <= MOST_PATCH * patches
        return
    assert row["cache_copies_in_loop"] == 0
    assert row["launches_per_layer"] <= MOST_LAUNCHES
    assert row["one_command_buffer"] is True
    if row["stage"] == "decode":
        assert row["temp_bytes"] <= MOST_TEMPORARIES


def check_part(row):
    assert row["buffer_copies"] == 0
    if row["stage"] != "build_cache":  # which makes the pool, a tenth of the cache
        room = row["full_cache_bytes"] if row["stage"] == "see" else 0  # there is no cache yet
        assert row["beside_bytes"] <= MOST_BESIDE + room
    if row["stage"] == "finish" and row["context"] <= 4096:
        assert row["operations"] <= MOST_OPERATIONS * row["least_operations"]


def test_the_committed_table_holds_every_program():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert {"commit", "command", "date", "machine", "versions"} <= result.keys()
    rows = {known(row): row for row in result["rows"]}
    assert rows.keys() == set(ALL)
    for row in rows.values():
        check(row)
    packed = [row for program, row in rows.items() if program.kv_bits == "akvq"]
    assert all(row["dequantized_in_loop"] == 0 for row in packed)
    assert {row["cache_bytes"] / row["full_cache_bytes"] <= MOST_SHARE for row in packed
            if row["budget"] == 0.1} == {True}  # fmt: skip


@pytest.mark.parametrize("context", [4096, 8192, 32768])
def test_a_tenth_in_two_bits_is_allocated_in_three_per_cent(context):
    """The parts of a pool as numbers: dense rows, words of 16 rows, and two bfloat16 a row."""
    program = Program(context=context, kv_bits="akvq")
    text = MODELS[program.model].text
    kinds = jnp.dtype(jnp.bfloat16)
    pool = program.generate().cache.pool_shapes(text, 1, context, kinds)
    assert isinstance(pool, PackedPool)
    found = cache_parts(pool)
    rows, words = pool.dense.k.shape[2], pool.words_k.shape[2]
    assert found["dense_bytes"] == 2 * 8 * rows * 128 * 2
    assert found["word_bytes"] == 2 * 8 * words * 128 * 4
    assert found["scale_bytes"] == 2 * 8 * words * 16 * 4
    assert found["cache_bytes"] == sum(found[part] for part in found if part != "cache_bytes")
    assert found["cache_bytes"] <= MOST_SHARE * 128 * 1024 * context
    full = replace(program, budget=1.0, kv_bits="16").generate().cache
    whole = cache_parts(full.pool_shapes(text, 1, context, kinds))
    assert whole["cache_bytes"] == whole["dense_bytes"] == 128 * 1024 * context


LOOP = """HloModule example, is_scheduled=true

%body (arg: (s32[], u32[1,2,8,16])) -> (s32[], u32[1,2,8,16]) {{
  %arg = (s32[], u32[1,2,8,16]{{3,2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %words = u32[1,2,8,16]{{3,2,1,0}} get-tuple-element(%arg), index=1
  %rows = {kind}[1,2,{rows},16]{{3,2,1,0}} custom-call(%words), custom_call_target="unpack"
  ROOT %out = (s32[], u32[1,2,8,16]{{3,2,1,0}}) tuple(%i, %words)
}}

%condition (arg.1: (s32[], u32[1,2,8,16])) -> pred[] {{
  %arg.1 = (s32[], u32[1,2,8,16]{{3,2,1,0}}) parameter(0)
  ROOT %go = pred[] constant(true)
}}

ENTRY %main (x: (s32[], u32[1,2,8,16])) -> (s32[], u32[1,2,8,16]) {{
  %x = (s32[], u32[1,2,8,16]{{3,2,1,0}}) parameter(0)
  ROOT %loop = (s32[], u32[1,2,8,16]{{3,2,1,0}}) while(%x), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(
    ("kind", "rows", "found"), [("bf16", 32, 1), ("f32", 128, 1), ("bf16", 31, 0), ("u32", 128, 0)]
)
def test_a_layer_that_is_made_wide_is_seen(kind, rows, found):
    """8 word-rows of 16 rows each, in 4 layers: 32 rows of a layer."""
    words, affine = jnp.zeros((1, 2, 8, 16), jnp.uint32), jnp.zeros((1, 2, 1, 128), jnp.uint32)
    numbers, dense = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 2, 8, 16))
    pool = PackedPool(
        Pool(dense, dense, numbers, numbers, numbers, 2), words, words, affine, affine,
        numbers[..., None], numbers[..., None], RTN(), 2,
    )  # fmt: skip
    text = LOOP.format(kind=kind, rows=rows)
    assert dequantized(text, pool) == found
    assert dequantized(text, pool.dense) == 0


def test_rows_are_added_to_those_of_a_file(tmp_path, monkeypatch):
    file = tmp_path / "programs.json"
    old = {"context": 2048, "batch": 1, "budget": 0.1, "model": "llava-1.5-7b"}  # without kv_bits
    file.write_text(json.dumps({"commit": "old", "rows": [old]}))
    asked = []

    def compiled(program):
        asked.append(program)
        sizes = dict.fromkeys(
            ("cache_bytes", "full_cache_bytes", "temp_bytes", "peak_bytes", "cache_copies_in_loop",
             "dequantized_in_loop", "launches_per_layer", "one_command_buffer", "compile_s"), 1,
        )  # fmt: skip
        return {**vars(program), **sizes}

    monkeypatch.setattr(memory, "run", compiled)
    arguments = ["--model", "llava-1.5-7b", "--kv-bits", "16", "--kv-bits", "akvq"]
    done = CliRunner().invoke(app(), [*arguments, "--add", "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert [program.kv_bits for program in asked] == ["akvq"]  # the other one is there
    result = json.loads(file.read_text())
    assert result["commit"] == "old"
    assert result["rows"][0] == old
    assert result["rows"][1]["kv_bits"] == "akvq"
    (made,) = result["added"]
    assert made["rows"] == 1
    assert made["versions"]
    refused = CliRunner().invoke(app(), ["--add"])
    assert refused.exit_code == 2
    assert "--out" in refused.output


@pytest.mark.parametrize(
    ("option", "value"),
    [("--device", "b9000"), ("--model", "gpt"), ("--stage", "sleep"), ("--kv-bits", "3")],
)
def test_unknown_names_are_refused_with_those_that_are_known(option, value):
    result = CliRunner().invoke(app(), [option, value])
    assert result.exit_code == 2
    assert value in result.output


def test_an_existing_file_is_not_overwritten(tmp_path):
    file = tmp_path / "programs.json"
    file.write_text("mine")
    result = CliRunner().invoke(app(), ["--out", str(file)])
    assert result.exit_code == 2
    assert "--force" in result.output
    assert file.read_text() == "mine"


def app():
    import typer

    app = typer.Typer()
    app.command()(memory.main)
    return app


@pytest.mark.parametrize("start", [1, 3, 700])
@pytest.mark.parametrize(
    ("fixed", "each", "bend"), [(15e9, 1e9, 0), (15e9, 3e8, 2e4), (15e9, 80e9, 0)]
)
def test_the_largest_batch_is_found_in_a_few_compilations(start, fixed, each, bend):
    def compiled(program):
        peak = int(fixed + program.batch * each + program.batch**2 * bend)
        return {"peak_bytes": peak, "fits": peak <= GPUS["h200"].memory}

    found, rows = largest_batch(Program(batch=start), compiled)
    peaks = [fixed + batch * each + batch**2 * bend for batch in (found, found + found // 100 + 1)]
    assert peaks[0] <= GPUS["h200"].memory < peaks[1]
    assert len(rows) <= 12


def test_where_not_even_one_sequence_fits():
    found, rows = largest_batch(Program(), lambda program: {"peak_bytes": 10**12, "fits": False})
    assert found == 0
    assert len(rows) == 1


def test_the_measured_peak_is_that_of_the_allocator(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny_config("llava_next"))
    asked = []

    def statistics():
        asked.append(len(jax.live_arrays()))
        return {"peak_bytes_in_use": 1000 + len(asked)}

    before = len(jax.live_arrays())
    tried = ["decode", "generate", "vision", "finish"]
    for stage in tried:
        program = memory.Program(model="tiny", context=64, new_tokens=3, stage=stage)
        assert memory.peak(program, statistics) == 1000 + len(asked)
    assert len(asked) == 2 * len(tried)
    assert asked[1] > before  # the second time with weights and cache in memory


def test_without_a_gpu_nothing_is_run_on_one():
    with pytest.raises(NoGpu, match="no GPU here"):
        memory.peak(memory.Program())
