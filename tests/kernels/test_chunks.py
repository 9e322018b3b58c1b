"""Queries that begin inside of a sequence, over a layer in the buffer of all layers: attention and
window statistics, every backend against the dense version and against the layer alone.
"""

import functools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.ahead_of_time import GPUS, abstract_mesh
from benchmarks.triton_offline import triton_calls
from pallas_kernels.prefill_attention import chunk_attention, prefill_attention, reference
from pallas_kernels.rows import LayerRows
from pallas_kernels.window_scores import window_scores
from tests.kernels.cases import (
    assert_close,
    both_backends,
    compiled,
    covering,
    draw,
    int32,
    kv_heads,
    poison,
    same_bits,
)

LAYERS = 3
CALLS = {"chunk_attention": chunk_attention, "window_scores": window_scores}

run = compiled(chunk_attention, "scale", "backend")
expect = compiled(reference.chunk_attention, "scale")
run_whole = compiled(prefill_attention, "backend")
run_scores = compiled(window_scores, "threshold", "maxima", "scale", "backend")


def buffer(k, v, lengths, layer) -> LayerRows:
    """Keys and values [B, T, K, H] in buffers of all layers, which are NaN beside them."""
    batch, rows, heads, head_dim = k.shape
    first: Any = np.int32(layer * rows)
    there = (np.arange(rows) < lengths[:, None])[:, None, :, None]
    buffers = np.full((2, batch, heads, LAYERS * rows + 5, head_dim), np.nan, k.dtype)
    for whole, part in zip(buffers, (k, v), strict=True):
        whole[:, :, first : first + rows] = poison(part.swapaxes(1, 2), there)
    return LayerRows(*buffers, first=first, rows=rows)


@functools.lru_cache(maxsize=1)  # both backends run a case one after the other
def make(dtype, head_dim, group, rows, length, layer) -> Any:
    """Inputs, which query rows have a meaning, and what to expect.

    Of the chunks one is the first, one ends before its last row, one is the last; of one sequence
    later rows are there already, one is a single token, and one is not there at all.
    """
    heads = kv_heads(group)
    q, k, v = draw(
        (6, rows, heads * group, head_dim), *[(6, length, heads, head_dim)] * 2, dtype=dtype
    )
    start = int32(0, (length - rows) // 2 + 1, length - rows, 3, 0, 0)
    lengths = np.minimum(start + int32(rows, (rows + 1) // 2, rows, rows + 9, 1, 0), length)
    there = start[:, None] + np.arange(rows) < lengths[:, None]
    expected = expect(q, LayerRows.alone(k, v), start, lengths, scale=head_dim**-0.5)
    return (q, buffer(k, v, lengths, layer), start, lengths), there, np.asarray(expected)


@both_backends
@covering("chunk_attention")
def test_against_the_reference(case, backend):
    (q, layer, start, lengths), there, expected = make(*case)
    out = run(q, layer, start, lengths, backend=backend)
    assert out.dtype == q.dtype
    out = np.asarray(out)
    assert np.isfinite(out.astype(np.float32)).all()
    assert_close(out[there], expected[there], case[0])
    again = run(poison(q, there[:, :, None, None]), layer, start, lengths, backend=backend)
    assert same_bits([np.asarray(again)[there]], [out[there]])


@both_backends
@pytest.mark.parametrize("sizes", [(70,), (33, 33, 1, 3)])
def test_chunks_are_the_whole_prompt(backend, sizes):
    q, k, v = draw((2, 70, 4, 16), *[(2, 70, 2, 16)] * 2)
    lengths = int32(70, 40)
    layer, at, parts = buffer(k, v, lengths, 1), 0, []
    for size in sizes:
        start = int32(at, at)
        parts.append(run(q[:, at : at + size], layer, start, lengths, backend=backend))
        at += size
    there = np.arange(70) < lengths[:, None]
    whole = np.asarray(run_whole(q, k, v, lengths, backend=backend))
    assert_close(np.concatenate(parts, axis=1)[there], whole[there], "float32")


@both_backends
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize(("rows", "layer"), [(1, 0), (133, 1), (7, 2)])
def test_scores_are_those_of_the_layer_alone(backend, rows, layer, own_positions):
    q, k = draw((2, rows, 4, 16), (2, 600, 2, 16), dtype="bfloat16")
    start, lengths = int32(0, 600 - rows), int32(rows, 600 - rows // 3)
    if own_positions:
        start = start[:, None] + np.arange(rows, dtype=np.int32)
    weights = np.random.default_rng(rows).random((2, 2, rows)).astype(np.float32)
    settings = {"weights": weights, "threshold": 0.01, "maxima": True, "backend": backend}
    plain = run_scores(q, k, start, lengths, **settings)
    ours = run_scores(q, buffer(k, k, lengths, layer), start, lengths, **settings)
    for found, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@both_backends
@pytest.mark.parametrize("name", CALLS)
def test_one_program_serves_all_layers(backend, name):
    traces = []

    @jax.jit
    def attend(*args):
        traces.append(args)
        return CALLS[name](*args, backend=backend)

    q, k, v = draw((1, 3, 2, 16), *[(1, 20, 2, 16)] * 2)
    found = [attend(q, buffer(k, v, int32(20), i), int32(17), int32(20)) for i in range(LAYERS)]
    assert len(traces) == 1
    for others in found[1:]:
        assert same_bits(jax.tree.leaves(others), jax.tree.leaves(found[0]))


def shaped(dtype, rows, batch=2, kv_heads=2, head_dim=64) -> Any:
    """Arguments of both, as shapes: eight queries over a layer of so many rows."""
    number: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    q = jax.ShapeDtypeStruct((batch, 8, 2 * kv_heads, head_dim), dtype)
    both: Any = jax.ShapeDtypeStruct((batch, kv_heads, LAYERS * rows, head_dim), dtype)
    return q, LayerRows(both, both, number(()), rows), number((batch,)), number((batch,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CALLS)
def test_no_copy_of_the_layer_is_made(dtype, name):
    q, layer, *numbers = shaped(dtype, 16384)
    program = jax.jit(partial(CALLS[name], backend="xla")).lower(q, layer, *numbers).compile()
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes < layer.k.size // LAYERS * layer.k.dtype.itemsize / 2


def test_layers_are_written_and_read_in_one_buffer():
    """As a decoder does: each layer writes rows, then attends; the next one's depend on that."""

    def layers(k, v, q, first, start, lengths):
        new = q[:, :, :2].swapaxes(1, 2)
        for index in range(LAYERS):
            at = 0, 0, index * first + start[0], 0
            k, v = (lax.dynamic_update_slice(x, new, at) for x in (k, v))
            rows = LayerRows(k, v, index * first, k.shape[2] // LAYERS)
            new += chunk_attention(q, rows, start, lengths, backend="xla")[:, :, :2].swapaxes(1, 2)
        return k, v, new

    q, layer, *numbers = shaped("float32", 16384, batch=1)
    program = jax.jit(layers, donate_argnums=(0, 1))
    program = program.lower(layer.k, layer.v, q, layer.first, *numbers).compile()
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes < layer.k.size // LAYERS * layer.k.dtype.itemsize / 2


@pytest.mark.parametrize(("rows", "wide"), [(2**11, False), (2**22, True)])
@pytest.mark.parametrize("name", CALLS)
def test_addresses_have_as_many_bits_as_the_buffer_needs(name, rows, wide):
    function = jax.jit(partial(CALLS[name], backend="triton"))
    with jax.sharding.use_abstract_mesh(abstract_mesh(GPUS["h200"])):
        lowered = function.trace(*shaped("bfloat16", rows, kv_heads=4))
        lowered = lowered.lower(lowering_platforms=("cuda",))
    code = "".join(call.code for call in triton_calls(lowered.compiler_ir("stablehlo")))
    assert bool(re.search(r"tt\.addptr .*xi64>", code)) is wide


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": (1, 2, 25, 16)}, r"expected \[1, K, C, 16\]"),
        ({"k": (2, 2, 24, 16), "v": (2, 2, 24, 16)}, r"expected \[1, K, C, 16\]"),
        ({"k": (2, 24, 16), "v": (2, 24, 16)}, r"expected \[1, K, C, 16\]"),
        ({"k": (1, 3, 24, 16), "v": (1, 3, 24, 16)}, "multiple of"),
        ({"first": (1,)}, r"first.shape=\(1,\) must be \(\)"),
        ({"k": (1, 2, 7, 16), "v": (1, 2, 7, 16)}, "rows=8 from 1 to the buffer's 7"),
        ({"start": (2,)}, "start.shape"),
        ({"lengths": ()}, "lengths.shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, change, message):
    shapes = {"q": (1, 3, 4, 16), "k": (1, 2, 24, 16), "v": (1, 2, 24, 16)}
    shapes |= {"first": (), "start": (1,), "lengths": (1,)} | change
    q, k, v, *numbers = (jnp.zeros(shape) for shape in shapes.values())
    first, start, lengths = (number.astype(jnp.int32) for number in numbers)
    with pytest.raises(ValueError, match=message):
        CALLS[name](q, LayerRows(k, v, first, 8), start, lengths)
