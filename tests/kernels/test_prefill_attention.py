"""Attention of whole sequences, every backend against the dense version."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill_attention import prefill_attention, reference
from tests.kernels.cases import (
    assert_close,
    both_backends,
    compiled,
    covering,
    draw,
    full_product,
    int32,
    kv_heads,
    poison,
    same_bits,
)

run = compiled(prefill_attention, "causal", "scale", "backend")
expect = compiled(reference.prefill_attention, "causal", "scale")


@functools.lru_cache(maxsize=1)  # both backends run a case one after the other
def make(dtype, head_dim, group, length, causal) -> Any:
    """Inputs of a batch of unequal lengths, one of them 0; which rows are there; what to expect."""
    heads = kv_heads(group)
    q, k, v = draw(
        (3, length, heads * group, head_dim), *[(3, length, heads, head_dim)] * 2, dtype=dtype
    )
    lengths = int32(length, length // 2, 0)
    there = np.arange(length) < lengths[:, None]
    expected = expect(q, k, v, lengths, causal=causal, scale=head_dim**-0.5)
    k, v = (poison(array, there[:, :, None, None]) for array in (k, v))
    return (q, k, v, lengths), there, np.asarray(expected)


def check(case, backend):
    (q, k, v, lengths), there, expected = make(*case)
    attend = functools.partial(run, causal=case[-1], backend=backend)
    out = attend(q, k, v, lengths)
    assert out.dtype == q.dtype
    out = np.asarray(out)
    assert np.isfinite(out.astype(np.float32)).all()
    assert (out[lengths == 0] == 0).all()
    assert_close(out[there], expected[there], case[0])
    # Twice the same bits, though the queries beyond the lengths are others.
    again = attend(poison(q, there[:, :, None, None]), k, v, lengths)
    assert same_bits([np.asarray(again)[there]], [out[there]])


@both_backends
@covering("prefill_attention")
def test_against_the_reference(case, backend):
    check(case, backend)


@pytest.mark.slow
@both_backends
@full_product("prefill_attention")
def test_every_combination(case, backend):
    check(case, backend)


@both_backends
@pytest.mark.parametrize("scale", [None, 0.1])
def test_without_lengths_everything_is_seen(scale, backend):
    q, k, v = draw(*[(2, 33, 4, 16)] * 3)
    lengths = int32(33, 33)
    expected = expect(q, k, v, lengths, causal=False, scale=scale or 16**-0.5)
    ours = run(q, k, v, causal=False, scale=scale, backend=backend)
    assert_close(ours, expected, "float32")


@both_backends
def test_never_a_square_matrix(backend):
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)] * 3
    memory = run.lower(*shapes, backend=backend).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * length * length * 4 / 4  # [N, T, T] in float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 8, 3, 16), "v": (1, 8, 3, 16)}, "multiple of"),
        ({"k": (1, 9, 2, 16)}, "expected"),
        ({"lengths": (2,)}, "lengths"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (1, 8, 4, 16), "k": (1, 8, 2, 16), "v": (1, 8, 2, 16), "lengths": (1,)} | change
    q, k, v, lengths = (jnp.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        prefill_attention(q, k, v, lengths)
