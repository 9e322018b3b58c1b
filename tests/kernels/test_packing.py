"""Words of packed rows and the Walsh-Hadamard transform, which kernels and caches share."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pallas_kernels import hadamard, packing
from pallas_kernels.tiles import padded
from tests.cache.numpy_quantize import hadamard as matrix_of

WORDS = arrays(np.uint32, (2, 3, 4), elements=st.integers(0, 2**32 - 1))
"""Of one shape, so that each function is compiled once."""
FLOATS = arrays(
    np.float32, (2, 12), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
)


def codes_of(words, bits):
    """Row j of a word is what stands in its bits j * n and up: [..., W, H] -> [..., W, P, H]."""
    rows = [(words.astype(np.int64) // 2 ** (bits * j)) % 2**bits for j in range(32 // bits)]
    return np.stack(rows, axis=-2)


@pytest.mark.parametrize("bits", packing.BITS)
@settings(max_examples=25, deadline=None)
@given(words=WORDS)
def test_unpacking_finds_every_code_and_packing_gives_the_words_back(words, bits):
    codes = packing.unpack(jnp.asarray(words), bits)
    assert np.array_equal(codes, codes_of(words, bits))
    assert np.array_equal(packing.pack(codes, bits), words)


@settings(max_examples=25, deadline=None)
@given(words=WORDS, rest=st.integers(0, 255))
def test_every_word_row_has_a_width_of_its_own(words, rest):
    """Places behind a wide row's own P may hold anything."""
    widths = np.array([2, 8, 4], np.uint32)
    codes = np.full((2, 3, 16, 4), rest, np.uint32)
    for w, bits in enumerate(widths):
        codes[:, w, : 32 // bits] = codes_of(words[:, w], int(bits))
    assert np.array_equal(packing.pack(jnp.asarray(codes), jnp.asarray(widths)), words)


@settings(max_examples=25, deadline=None)
@given(parts=FLOATS)
def test_scale_and_shift_come_back_as_bfloat16(parts):
    words = packing.join_affine(*map(jnp.asarray, parts))
    for found, part in zip(packing.split_affine(words), parts, strict=True):
        rounded = part.astype(jnp.bfloat16).astype(np.float32)
        assert np.asarray(found).tobytes() == rounded.tobytes()
    again = packing.join_affine(*packing.split_affine(words))
    assert np.array_equal(again, words)


@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 112, 128])
def test_sums_and_differences_are_the_orthonormal_matrix(head_dim):
    matrix = hadamard.signs(head_dim) * hadamard.factor(head_dim)
    assert np.allclose(matrix, matrix_of(head_dim), atol=1e-15)
    assert np.allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-15)
    rows = np.zeros((16, padded(head_dim)), np.float32)  # a kernel's tile
    rows[:, :head_dim] = np.random.default_rng(head_dim).standard_normal((16, head_dim))
    found = hadamard.butterflies(jnp.asarray(rows), head_dim)
    np.testing.assert_allclose(found[:, :head_dim], rows[:, :head_dim] @ matrix, atol=2e-6)
    assert not np.asarray(found[:, head_dim:]).any()
