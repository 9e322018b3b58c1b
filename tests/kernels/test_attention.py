"""Attention kernels against their dense references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_attention import reference as prefill_reference
from pallas_kernels.ragged_decode_attention import ragged_decode_attention
from pallas_kernels.ragged_decode_attention import reference as decode_reference

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1.5e-2, jnp.float16: 2e-3}
"""Largest error, as a share of the largest reference value."""


def draw(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def check(ours, reference, dtype):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert np.isfinite(ours).all()
    assert np.abs(ours - reference).max() <= TOLERANCE[dtype] * np.abs(reference).max()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "dtype"),
    [
        (1, 4, 4, 32, jnp.float32),
        (17, 8, 2, 64, jnp.bfloat16),
        (255, 7, 1, 96, jnp.float32),
        (257, 14, 2, 80, jnp.float16),
        (1000, 8, 1, 128, jnp.float32),
        (577, 4, 4, 64, jnp.bfloat16),
    ],
)
def test_prefill(length, heads, kv_heads, head_dim, dtype, causal):
    batch = 3
    q, k, v = draw(
        length,
        (batch, length, heads, head_dim),
        *[(batch, length, kv_heads, head_dim)] * 2,
        dtype=dtype,
    )
    lengths = jnp.array([length, max(1, length // 2), max(1, length - 3)])
    padding = jnp.arange(length)[None, :, None, None] >= lengths[:, None, None, None]
    poisoned = [jnp.where(padding, jnp.nan, x) for x in (k, v)]
    ours = jax.jit(lambda *a: prefill_attention(*a, causal=causal))(q, *poisoned, lengths)
    again = jax.jit(lambda *a: prefill_attention(*a, causal=causal))(q, *poisoned, lengths)
    expected = prefill_reference.prefill_attention(
        q, k, v, lengths, causal=causal, scale=head_dim**-0.5
    )
    assert ours.dtype == dtype
    assert (np.asarray(ours) == np.asarray(again)).all()
    check(jnp.where(padding, 0, ours), expected, dtype)


def test_prefill_without_lengths_sees_everything():
    q, k, v = draw(1, *[(2, 33, 4, 16)] * 3)
    lengths = jnp.full((2,), 33)
    expected = prefill_reference.prefill_attention(q, k, v, lengths, causal=False, scale=0.25)
    check(prefill_attention(q, k, v, causal=False), expected, jnp.float32)


def test_prefill_never_makes_a_square_matrix():
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)] * 3
    program = jax.jit(prefill_attention).lower(*shapes).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * length * length * 4 / 4  # [N, T, T] in float32


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "capacity", "rows", "dtype"),
    [
        (4, 4, 32, 128, 5, jnp.float32),
        (8, 2, 64, 640, 1, jnp.bfloat16),
        (7, 1, 96, 1300, 40, jnp.float32),
        (14, 2, 80, 513, 17, jnp.float16),
    ],
)
def test_ragged_decode(heads, kv_heads, head_dim, capacity, rows, dtype):
    batch = 4
    q, pool_k, pool_v, tail_k, tail_v = draw(
        capacity,
        (batch, heads, head_dim),
        *[(batch, kv_heads, capacity, head_dim)] * 2,
        *[(batch, kv_heads, rows, head_dim)] * 2,
        dtype=dtype,
    )
    # One row at the end of the pool, one empty layer, one whole pool, one single token.
    offset = jnp.array([capacity - 37, 5, 0, capacity // 2])
    length = jnp.array([37, 0, capacity, 1])
    fill = jnp.array([rows, 1, 0, rows // 2])
    position = jnp.arange(capacity)
    unused = (position < offset[:, None]) | (position >= (offset + length)[:, None])
    empty = jnp.arange(rows) >= fill[:, None]
    pools = [jnp.where(unused[:, None, :, None], jnp.nan, x) for x in (pool_k, pool_v)]
    tails = [jnp.where(empty[:, None, :, None], jnp.nan, x) for x in (tail_k, tail_v)]
    ours = jax.jit(ragged_decode_attention)(q, *pools, offset, length, *tails, fill)
    expected = decode_reference.ragged_decode_attention(
        q, pool_k, pool_v, offset, length, tail_k, tail_v, fill, scale=head_dim**-0.5
    )
    assert ours.dtype == dtype
    check(ours, expected, dtype)


def test_ragged_decode_of_nothing_is_zero():
    q, pool, tail = draw(3, (1, 2, 16), (1, 2, 128, 16), (1, 2, 4, 16))
    none = jnp.zeros((1,), jnp.int32)
    out = ragged_decode_attention(q, pool, pool, none, none, tail, tail, none)
    assert (np.asarray(out) == 0).all()


def test_one_program_serves_every_allocation():
    traces = []

    @jax.jit
    def run(*args):
        traces.append(1)
        return ragged_decode_attention(*args)

    q, pool, tail = draw(4, (2, 4, 16), (2, 2, 256, 16), (2, 2, 4, 16))
    for offset, length in ([0, 10], [256, 0]), ([100, 3], [0, 200]):
        run(q, pool, pool, jnp.array(offset), jnp.array(length), tail, tail, jnp.array([1, 2]))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 8, 3, 16), "v": (1, 8, 3, 16)}, "multiple of"),
        ({"k": (1, 9, 2, 16)}, "expected"),
        ({"lengths": (2,)}, "lengths"),
    ],
)
def test_prefill_refuses_shapes_that_do_not_fit(change, message):
    shapes = {"q": (1, 8, 4, 16), "k": (1, 8, 2, 16), "v": (1, 8, 2, 16), "lengths": (1,)} | change
    q, k, v, lengths = (jnp.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        prefill_attention(q, k, v, lengths)


def test_unknown_backend_is_named():
    q = jnp.zeros((1, 8, 4, 16))
    with pytest.raises(NotImplementedError, match="'cuda-magic'"):
        prefill_attention(q, q, q, backend="cuda-magic")
