"""Online softmax over blocks of packed rows, then the dense segment and the tail.

A block of word-rows is unpacked and dequantised where it is used, so that never more than a block
of any cache stands in memory at full width.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import online_softmax
from pallas_kernels.hadamard import transform as hadamard
from pallas_kernels.packing import dequantise, dequantise_channels, per_word, unpack
from pallas_kernels.ragged_decode_attention.xla import (
    append,
    attend_segments,
    by_sequence,
    read_rows,
)
from pallas_kernels.rope import rotate

ROW_BLOCK = 256
"""Rows of one sequence that are unpacked at a time, and stay in a CPU's cache until they are used."""


def quantized_decode_attention(
    q: jax.Array,
    dense_k: jax.Array,
    dense_v: jax.Array,
    offset: jax.Array,
    length: jax.Array,
    words_k: jax.Array,
    words_v: jax.Array,
    affine_k: jax.Array,
    affine_v: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    fill: jax.Array,
    *,
    bits: tuple[int, ...],
    key_group: int | None,
    scale: float,
    mean_words: int,
) -> jax.Array:
    """See the package's public function; [B, N, H] -> [B, N, H]."""
    del mean_words  # the blocks are those of the longest run
    batch, heads, head_dim = q.shape
    kv_heads = dense_k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    arrays = dense_k, dense_v, offset, length, tail_k, tail_v, fill
    partial = attend_segments(grouped, *arrays, scale=scale)
    lanes = per_word(min(bits))
    for run, width in enumerate(bits):
        partial = online_softmax.merge(
            partial,
            _attend_run(
                grouped,
                (words_k, affine_k),
                (words_v, affine_v),
                first[:, run],
                rows[:, run],
                bits=width,
                lanes=lanes,
                key_group=key_group,
                scale=scale,
            ),
        )
    return online_softmax.finish(partial).astype(q.dtype).reshape(batch, heads, head_dim)


def _attend_run(
    grouped: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    first: jax.Array,
    rows: jax.Array,
    *,
    bits: int,
    lanes: int,
    key_group: int | None,
    scale: float,
) -> online_softmax.Partial:
    """Attention of the queries [B, K, G, H] over one packed run; keys and values with scales."""
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
            mixed = jnp.einsum(
                "bkgs,bksh->bkgh",
                weights,
                jnp.where(readable[:, None], v, 0),
                precision=lax.Precision.HIGHEST,
            )
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
        return dequantise_channels(codes, own)
    own = read_rows(affine, number, start * lanes, count * lanes, axis=3)
    own = own.reshape(*own.shape[:-1], count, lanes)[..., :each]
    return dequantise(codes, own.reshape(*own.shape[:-2], count * each))


def append_and_attend(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    dense_k: jax.Array,
    dense_v: jax.Array,
    offset: jax.Array,
    length: jax.Array,
    words_k: jax.Array,
    words_v: jax.Array,
    affine_k: jax.Array,
    affine_v: jax.Array,
    first: jax.Array,
    rows: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    fill: jax.Array,
    *,
    bits: tuple[int, ...],
    key_group: int | None,
    transform: bool,
    scale: float,
    mean_words: int,
    together: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See the package's public function."""
    batch, _, width, head_dim = qkv.shape
    turned = rotate(qkv[:, :, : width - 1], cos[:, None, None], sin[:, None, None])
    if transform:
        turned = hadamard(turned)
    q = turned[:, :, : width - 2].reshape(batch, -1, head_dim)
    at = fill[0] if together else fill
    tail_k = append(tail_k, turned[:, :, width - 2 :], at)
    tail_v = append(tail_v, qkv[:, :, width - 1 :], at)
    out = quantized_decode_attention(
        q,
        *(dense_k, dense_v, offset, length),
        *(words_k, words_v, affine_k, affine_v, first, rows),
        *(tail_k, tail_v, fill + 1),
        bits=bits,
        key_group=key_group,
        scale=scale,
        mean_words=mean_words,
    )
    return out, tail_k, tail_v
