"""Whole programs compiled for GPUs that are not here: their bytes, and copies inside their loops.

Shapes are real ones: what a 7B model needs is counted, not estimated. Nothing of it is allocated.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import triton as plgpu

from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import GPUS, compile_for, plugin_version
from benchmarks.loops import loop_copies
from benchmarks.models import MODELS, abstract_inputs
from vlcache_jax.cache.methods import VLCache
from vlcache_jax.models.families import abstract_params
from vlcache_jax.results.report import count_parameters
from vlcache_jax.running.generate import Generate

needs_plugin = pytest.mark.skipif(
    plugin_version() is None,
    reason="the CUDA plugin is not installed: pip install 'vlcache-jax[cuda]'",
)

POOL = jax.ShapeDtypeStruct((2, 4, 512, 16), jnp.bfloat16)
ROW = jax.ShapeDtypeStruct((2, 4, 1, 16), jnp.bfloat16)
POOL_BYTES = 2 * math.prod(POOL.shape)
STEPS = 100


def sizes(compiled: jax.stages.Compiled) -> Any:
    """The byte counts of a compiled program."""
    return compiled.memory_analysis()


def _put(pool: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(pool, row, (0, 0, index, 0))


def _scan(step, carry):
    return lax.scan(step, carry, jnp.arange(STEPS))


def only_read(pool, row):
    def step(row, _):
        weights = jnp.einsum("bkth,bkqh->bkqt", pool, row)
        return jnp.einsum("bkqt,bkth->bkqh", weights, pool), None

    return _scan(step, row)[0]


def one_row_written(pool, row):
    return _scan(lambda pool, index: (_put(pool, row, index), None), pool)[0]


def written_after_it_was_read(pool, row):
    def step(pool, index):
        return _put(pool, row, index), jnp.sum(pool.astype(jnp.float32))

    return _scan(step, pool)


def written_in_a_branch(pool, row):
    def step(pool, index):
        return lax.cond(index % 3 == 0, lambda p: p, lambda p: _put(p, row, index), pool), None

    return _scan(step, pool)[0]


def copied_before_the_loop(pool, row):
    return _scan(lambda pool, index: (_put(pool, row, index), None), 2 * pool)[0], pool


def old_one_kept(pool, row):
    def step(carry, index):
        pool, _ = carry
        return (_put(pool, row, index), pool), None

    return _scan(step, (pool, pool))[0]


def two_swapped(pool, row):
    def step(carry, index):
        one, other = carry
        return (_put(other, row, index), one), None

    return _scan(step, (pool, pool + 1))[0]


def selected(pool, row):
    return _scan(lambda pool, index: (jnp.where(index % 3 == 0, pool, 2 * pool), None), pool)[0]


def transposed_in_an_inner_loop(pool, row):
    def turn(_, pool):
        return pool.swapaxes(0, 1).reshape(pool.shape)

    return _scan(lambda pool, index: (lax.fori_loop(0, index, turn, pool), None), pool)[0]


@needs_plugin
class TestSmallPrograms:
    @pytest.mark.parametrize(
        "program",
        [
            only_read,
            one_row_written,
            written_after_it_was_read,
            written_in_a_branch,
            copied_before_the_loop,
        ],
    )
    def test_no_copy_is_found_where_there_is_none(self, program):
        compiled = compile_for("h200", program, POOL, ROW)
        assert loop_copies(compiled.as_text() or "", POOL.shape) == []

    @pytest.mark.parametrize("program", [old_one_kept, two_swapped, transposed_in_an_inner_loop])
    def test_a_copy_is_found_where_there_is_one(self, program):
        compiled = compile_for("h200", program, POOL, ROW)
        found = loop_copies(compiled.as_text() or "", POOL.shape)
        assert any(" copy(" in line for line in found), found

    def test_an_array_that_is_computed_anew_is_found(self):
        compiled = compile_for("h200", selected, POOL, ROW)
        (line,) = loop_copies(compiled.as_text() or "", POOL.shape)
        assert "fusion(" in line
        assert "metadata" not in line

    def test_arrays_of_other_sizes_are_not_reported(self):
        text = compile_for("h200", two_swapped, POOL, ROW).as_text() or ""
        assert loop_copies(text, (2, 4, 511, 16)) == []

    def test_memory_of_a_program_that_writes_in_place(self):
        compiled = compile_for("h200", one_row_written, POOL, ROW, donate_argnums=(0,))
        memory = sizes(compiled)
        assert memory.argument_size_in_bytes == POOL_BYTES + POOL_BYTES // 512
        assert memory.output_size_in_bytes == memory.alias_size_in_bytes == POOL_BYTES
        assert memory.temp_size_in_bytes < 0.1 * POOL_BYTES
        assert memory.peak_memory_in_bytes < 1.1 * POOL_BYTES

    def test_memory_of_a_program_that_does_not(self):
        memory = sizes(compile_for("h200", two_swapped, POOL, ROW))
        assert memory.alias_size_in_bytes == 0
        assert memory.temp_size_in_bytes >= POOL_BYTES
        assert (
            memory.peak_memory_in_bytes >= memory.argument_size_in_bytes + memory.temp_size_in_bytes
        )

    @pytest.mark.parametrize("gpu", GPUS)
    def test_each_gpu_is_known_to_xla_and_to_pallas(self, gpu):
        def double(x_ref, y_ref):
            y_ref[...] = 2 * x_ref[...]

        def program(x):
            return pl.pallas_call(
                double,
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            )(x)

        compiled = compile_for(gpu, program, jax.ShapeDtypeStruct((64, 64), jnp.float32))
        assert "__gpu$xla.gpu.triton" in (compiled.as_text() or "")
        (device,) = compiled.output_shardings.device_set
        assert device.device_kind == GPUS[gpu].name
        assert sizes(compiled).argument_size_in_bytes == 64 * 64 * 4


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match="gpu='b9000' is not known: use one of h200, h100, a100"):
        compile_for("b9000", only_read, POOL, ROW)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(None, r"pip install 'vlcache-jax\[cuda\]'"), ("0.10.2", "0.10.2 .* JAX_PLATFORMS=cpu")],
)
def test_a_missing_plugin_is_named_with_its_remedy(monkeypatch, version, remedy):
    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(ahead_of_time, "plugin_version", lambda: version)
    with pytest.raises(RuntimeError, match=remedy):
        compile_for("h200", only_read, POOL, ROW)


@dataclass(frozen=True)
class Compiled:
    """A model's whole generate, a quarter of its layers, compiled for an H200."""

    generate: Generate
    batch: int
    rows: int
    memory: Any
    text: str

    def shape(self, rows: int) -> tuple[int, ...]:
        """Of an array that holds this many rows of keys of each head."""
        text = self.generate.config.text
        return self.batch, text.num_kv_heads, rows, text.head_dim

    @property
    def full_rows(self) -> int:
        """Rows of the full cache: those of all layers."""
        return self.generate.config.text.num_layers * self.rows

    @property
    def pool_rows(self) -> int:
        """Rows of the compressed cache."""
        return self.generate.cache.limit.capacity(self.generate.config.text.num_layers, self.rows)


@pytest.fixture(scope="module", params=[("llava-1.5-7b", 1), ("llava-v1.6-mistral-7b", 4)], ids=str)
def compiled(request):
    model, batch = request.param
    config, rows = MODELS[model], 3072
    config = replace(config, text=replace(config.text, num_layers=config.text.num_layers // 4))
    generate = Generate(config, cache=VLCache(budget=0.1), max_new_tokens=9)
    inputs = abstract_inputs(config, batch, rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = compile_for("h200", generate, abstract_params(config, jnp.bfloat16), inputs, key)
    return Compiled(generate, batch, rows, sizes(program), program.as_text() or "")


@pytest.mark.full
@needs_plugin
class TestGenerate:
    def test_temporaries_are_the_prefills_keys_and_values_and_little_more(self, compiled):
        full = 2 * 2 * math.prod(compiled.shape(compiled.full_rows))  # K and V, 2 bytes a number
        assert compiled.memory.temp_size_in_bytes <= full + 3e9

    def test_it_fits_with_the_weights(self, compiled):
        memory, config = compiled.memory, compiled.generate.config
        weights = 2 * count_parameters(config)["total"]
        assert (
            0.98 * weights < memory.argument_size_in_bytes < 1.1 * weights
        )  # they really are there
        assert memory.argument_size_in_bytes < memory.peak_memory_in_bytes < GPUS["h200"].memory

    def test_the_pool_is_never_copied_in_a_loop(self, compiled):
        pool = compiled.shape(compiled.pool_rows)
        written = f"bf16[{','.join(str(side) for side in pool)}]"
        loops = [line for line in compiled.text.splitlines() if " while(" in line]
        assert any(written in line for line in loops)  # the decode loop does carry it
        assert loop_copies(compiled.text, pool) == []

    def test_the_prefills_keys_and_values_are_never_copied_in_a_loop(self, compiled):
        assert loop_copies(compiled.text, compiled.shape(compiled.full_rows)) == []

    def test_the_kernels_are_in_it(self, compiled):
        """Of each layer: prefill attention, two of the window, and one of the decode step."""
        text = compiled.generate.config.text
        for kernel in ("prefill_attention", "window_rows", "window_columns", "append_and_attend"):
            calls = re.findall(
                rf"custom_call_target=\"__gpu\$xla.gpu.triton\".*{kernel}", compiled.text
            )
            assert len(calls) >= text.num_layers, kernel
