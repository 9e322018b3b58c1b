"""Online softmax over blocks of packed rows, then the dense segment and the tail.

A block of word-rows is unpacked and dequantized where it is used, so that never more than a block
of any cache stands in memory at full width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.hadamard import transform as hadamard
from pallas_kernels.packing import dequantize, per_word, unpack
from pallas_kernels.ragged_decode_attention.xla import (
    append,
    attend_segments,
    by_sequence,
    finish,
)
from pallas_kernels.rope import rotate
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail, read_rows
from pallas_kernels.splits import trips

ROW_BLOCK = 256
"""Rows of one sequence that are unpacked at a time: they stay in a CPU's cache till used."""


def append_and_attend(
    new: NewToken,
    dense: Segment,
    packed: PackedRows,
    tail: Tail,
    *,
    transform: bool,
    scale: float,
    most_rows: int,
    most_words: int,
    together: bool,
) -> tuple[jax.Array, Tail]:
    """See the package's public function; `most_rows` and `most_words` are not used."""
    turned = rotate(new.qkv[:, :, :-1], new.cos[:, None, None], new.sin[:, None, None])
    if transform:
        turned = hadamard(turned)
    tail = append(tail, turned[:, :, -1:], new.qkv[:, :, -1:], together)
    segments = dense.k, dense.v, dense.offset, dense.length, tail.k, tail.v, tail.fill
    q = turned[:, :, :-1]
    partial = attend_segments(q, *segments, scale=scale)
    for run in range(len(packed.bits)):
        partial = online_softmax.merge(partial, _attend_run(q, packed, run, scale))
    return finish(partial, new), tail


def _attend_run(
    grouped: jax.Array, packed: PackedRows, run: int, scale: float
) -> online_softmax.Partial:
    """Attention of the queries [B, K, G, H] over one packed run."""
    bits, key_group = packed.bits[run], packed.key_group
    first, rows = packed.first[:, run], packed.rows[:, run]
    each, lanes, total = per_word(bits), per_word(min(packed.bits)), packed.words_k.shape[2]
    whole = key_group // each if key_group else 1  # word-rows of a group of keys
    count = min(max(ROW_BLOCK // each, whole), total) // whole * whole
    query = (grouped.astype(jnp.float32) * scale).swapaxes(2, 3)  # [B, K, H, G]

    def attend(number: jax.Array) -> online_softmax.Partial:
        own = lax.dynamic_index_in_dim(query, number)
        own_rows = functools.partial(read_rows, number=number)

        def read(
            words: jax.Array, affine: jax.Array, start: jax.Array, key_group: int | None
        ) -> jax.Array:
            """The rows of `count` word-rows: float32 [1, K, count * P, H]."""
            codes = unpack(own_rows(words, start, count), bits)  # [1, K, count, P, H]
            codes = codes.reshape(*codes.shape[:2], count * each, codes.shape[-1])
            if key_group:
                groups = count * each // key_group
                scales = own_rows(affine, start * each // key_group, groups)
                return dequantize(codes, scales, by_channel=True)
            scales = own_rows(affine, start * lanes, count * lanes, axis=3)
            scales = scales.reshape(*scales.shape[:-1], count, lanes)[..., :each]
            return dequantize(codes, scales.reshape(*scales.shape[:-2], count * each))

        def block(index: jax.Array, seen: online_softmax.Partial) -> online_softmax.Partial:
            begin = first[number] + index * count
            # A slice past the end would be moved back in silence: move it here, and mask.
            start = jnp.minimum(begin, total - count)
            word = start + jnp.arange(count, dtype=jnp.int32)
            row = (word - first[number])[:, None] * each + jnp.arange(each, dtype=jnp.int32)
            readable = ((word >= begin)[:, None] & (row < rows[number])).reshape(-1)
            k = read(packed.words_k, packed.affine_k, start, key_group)
            v = read(packed.words_v, packed.affine_v, start, None)
            return online_softmax.add(own, k, v, readable, seen)

        blocks = trips(rows[number], count * each)
        return lax.fori_loop(0, blocks, block, online_softmax.empty(grouped[:1]))

    return by_sequence(attend, grouped.shape[0])
