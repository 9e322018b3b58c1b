"""Online softmax over blocks of packed rows, then the dense segment and the tail.

A block of word-rows is unpacked and dequantized where it is used, so that never more than a block
of any cache stands in memory at full width.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.hadamard import transform as hadamard
from pallas_kernels.packing import dequantize, dequantize_channels, per_word, unpack
from pallas_kernels.ragged_decode_attention.xla import (
    append,
    attend_segments,
    by_sequence,
    finish,
    read_rows,
)
from pallas_kernels.rope import rotate
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail

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
    """RoPE of a new token, the transform, its row into the tail, and its attention.

    Args:
        new: the token's product, qkv [B, K, G + 2, H], and its angles, cos and sin [B, H / 2].
        dense: the layer's rows of full width, k and v [B, K, capacity, H].
        packed: its packed rows, words [B, K, W, H].
        tail: the tokens before, k and v [B, K, R, H] with fill int32 [B].
        transform: multiply query and key by the Walsh-Hadamard transform after RoPE.
        scale: factor of the logits.
        most_rows: not used: the blocks are those of the longest segment.
        most_words: not used, for the same reason.
        together: all of `fill` are equal.

    Returns:
        The attention [B, K * G, H] in qkv's type, and the tail with the token.
    """
    del most_rows, most_words
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
    keys, values = (packed.words_k, packed.affine_k), (packed.words_v, packed.affine_v)
    lanes = per_word(min(packed.bits))
    total = keys[0].shape[2]
    each = per_word(bits)
    whole = key_group // each if key_group else 1  # word-rows of a group of keys
    count = min(max(ROW_BLOCK // each, whole), total) // whole * whole
    query = (grouped.astype(jnp.float32) * scale).swapaxes(2, 3)  # [B, K, H, G]

    def attend(number: jax.Array) -> online_softmax.Partial:
        own = lax.dynamic_index_in_dim(query, number)

        def block(index: jax.Array, seen: online_softmax.Partial) -> online_softmax.Partial:
            begin = first[number] + index * count
            # A slice past the end would be moved back in silence: move it here, and mask.
            start = jnp.minimum(begin, total - count)
            word = start + jnp.arange(count)
            row = (word - first[number])[:, None] * each + jnp.arange(each)
            readable = ((word >= begin)[:, None] & (row < rows[number])).reshape(-1)
            k = _read(*keys, number, start, count, bits, lanes, key_group)
            v = _read(*values, number, start, count, bits, lanes, None)
            weights, kept, seen = online_softmax.weigh(own, k, readable, seen)
            mixed = online_softmax.mix(weights, v, readable)
            return seen._replace(mixed=seen.mixed * kept[..., None] + mixed)

        trips = (rows[number] + count * each - 1) // (count * each)
        return lax.fori_loop(0, trips, block, online_softmax.empty(grouped[:1]))

    return by_sequence(attend, grouped.shape[0])


def _read(
    words: jax.Array,
    affine: jax.Array,
    number: jax.Array,
    start: jax.Array,
    count: int,
    bits: int,
    lanes: int,
    key_group: int | None,
) -> jax.Array:
    """The rows of `count` word-rows of a sequence: float32 [1, K, count * P, H]."""
    each = per_word(bits)
    codes = unpack(read_rows(words, number, start, count), bits)  # [1, K, count, P, H]
    codes = codes.reshape(*codes.shape[:2], count * each, codes.shape[-1])
    if key_group:
        groups = count * each // key_group
        own = read_rows(affine, number, start * each // key_group, groups)
        return dequantize_channels(codes, own)
    own = read_rows(affine, number, start * lanes, count * lanes, axis=3)
    own = own.reshape(*own.shape[:-1], count, lanes)[..., :each]
    return dequantize(codes, own.reshape(*own.shape[:-2], count * each))
