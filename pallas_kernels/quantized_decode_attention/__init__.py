"""Attention of one new token over a layer whose older rows are quantised."""

import math
from collections.abc import Sequence

import jax

from pallas_kernels.backends import choose
from pallas_kernels.packing import BITS, per_word
from pallas_kernels.quantized_decode_attention import triton, xla
from pallas_kernels.ragged_decode_attention import check_segments

BACKENDS = {"triton": triton.quantized_decode_attention, "xla": xla.quantized_decode_attention}
APPEND_BACKENDS = {"triton": triton.append_and_attend, "xla": xla.append_and_attend}
"""In the order of preference."""


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
    bits: Sequence[int],
    key_group: int | None = None,
    scale: float | None = None,
    mean_words: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of one token over one layer: rows of full width, packed runs, then the tail.

        dense  [B, K, capacity, H]   . . |<- length[b] ->| . . .        rows of full width
                                       offset[b]
        words  [B, K, W, H]          . . |<- run 0 ->|<- run 1 ->| . .  packed rows, see `packing`
                                       first[b, 0]   first[b, 1]
        tail   [B, K, R, H]          |<- fill[b] ->| . . .              new tokens, of full width

    Run i has rows of `bits[i]` bits, `rows[b, i]` of them. Offsets and lengths are data: one
    compiled program serves every allocation. Rows outside of the segments are never read into a
    result, whatever they hold. Packed rows are dequantised where they are used: there is never a
    copy of the cache.

    Args:
        q: queries of one step [B, N, H].
        dense_k: keys of full width of all layers [B, K, capacity, H]; N a multiple of K.
        dense_v: values, likewise.
        offset: first dense row of this layer, int32 [B].
        length: dense rows of this layer, int32 [B]; may be 0.
        words_k: packed keys of all layers, uint32 [B, K, W, H].
        words_v: packed values, likewise.
        affine_k: scales and shifts of the keys, uint32 [B, K, groups, W * lanes]; with `key_group`
            [B, K, W * lanes / key_group, H].
        affine_v: of the values, uint32 [B, K, groups, W * lanes].
        first: first word-row of each run, int32 [B, runs].
        rows: rows of each run, int32 [B, runs]; may be 0.
        tail_k: keys of new tokens [B, K, R, H].
        tail_v: values, likewise.
        fill: rows of the tail in use, int32 [B]; may be 0.
        bits: width of each run's rows: 2, 4 or 8.
        key_group: rows that share a scale per channel, of keys quantised by channel (KIVI); None
            for keys quantised in groups along H. All runs then have one width, and begin at a
            multiple of `key_group` rows.
        scale: factor of the logits; 1 / sqrt(H) by default.
        mean_words: word-rows that a layer has on average, by which the work is split; all of them
            by default. Any length is served, whatever it is.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Returns:
        [B, N, H] in q's type; softmax and sums are float32. Zero where there is no key at all.

    Raises:
        ValueError: the shapes do not fit each other, or a width cannot be packed.
        NotImplementedError: there is no such backend, or it does not support the case.
    """
    batch, heads, head_dim = q.shape
    packed = words_k, words_v, affine_k, affine_v
    segments = (dense_k, dense_v), (tail_k, tail_v), offset, length, fill
    check_segments(batch, heads, head_dim, *segments)
    _check_packed(dense_k, packed, (first, rows), tuple(bits), key_group)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    arrays = (q, dense_k, dense_v, offset, length, *packed, first, rows, tail_k, tail_v, fill)
    return choose(
        "quantized_decode_attention",
        backend,
        BACKENDS,
        *arrays,
        bits=tuple(bits),
        key_group=key_group,
        scale=scale,
        mean_words=words_k.shape[2] if mean_words is None else mean_words,
    )


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
    bits: Sequence[int],
    key_group: int | None = None,
    transform: bool = False,
    scale: float | None = None,
    mean_words: int | None = None,
    together: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a layer does with a new token: RoPE, the transform, its row into the tail, attention.

    Args:
        qkv: of one step, before RoPE: for each kv head its G query heads, its key and its value,
            [B, K, G + 2, H].
        cos: cosine of RoPE's angles at the token's position, float32 [B, H / 2].
        sin: sine, likewise.
        dense_k: as in `quantized_decode_attention`; with `transform`, transformed keys.
        dense_v: likewise, as they are.
        offset: likewise.
        length: likewise.
        words_k: likewise.
        words_v: likewise.
        affine_k: likewise.
        affine_v: likewise.
        first: likewise.
        rows: likewise.
        tail_k: likewise; donate it to have it written in place.
        tail_v: likewise.
        fill: rows of the tail in use before the token, below R, int32 [B].
        bits: likewise.
        key_group: likewise.
        transform: multiply the query and the key by the Walsh-Hadamard transform after RoPE (AKVQ,
            section 3.2); the value comes as the weights make it.
        scale: likewise.
        mean_words: likewise.
        together: all of `fill` are equal, so that XLA can write one row for the whole batch.
        backend: likewise.

    Returns:
        The attention [B, N, H] in qkv's type, and the tails with the token in row `fill`.

    Raises:
        ValueError: as above.
        NotImplementedError: as above.
    """
    batch, kv_heads, width, head_dim = qkv.shape
    packed = words_k, words_v, affine_k, affine_v
    heads = kv_heads * (width - 2)
    segments = (dense_k, dense_v), (tail_k, tail_v), offset, length, fill
    check_segments(batch, heads, head_dim, *segments)
    _check_packed(dense_k, packed, (first, rows), tuple(bits), key_group)
    if kv_heads != dense_k.shape[1] or width < 3 or head_dim % 2:
        raise ValueError(f"{qkv.shape=}, {dense_k.shape=}: expected [B, K, G + 2, H], H even")
    if not cos.shape == sin.shape == (batch, head_dim // 2):
        raise ValueError(f"{cos.shape=}, {sin.shape=} must be {(batch, head_dim // 2)}")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    arrays = (qkv, cos, sin, dense_k, dense_v, offset, length, *packed)
    return choose(
        "quantized_append_and_attend",
        backend,
        APPEND_BACKENDS,
        *(*arrays, first, rows, tail_k, tail_v, fill),
        bits=tuple(bits),
        key_group=key_group,
        transform=transform,
        scale=scale,
        mean_words=words_k.shape[2] if mean_words is None else mean_words,
        together=together,
    )


def _check_packed(
    dense_k: jax.Array,
    packed: tuple[jax.Array, ...],
    runs: tuple[jax.Array, jax.Array],
    bits: tuple[int, ...],
    key_group: int | None,
) -> None:
    words_k, words_v, affine_k, affine_v = packed
    batch, kv_heads, _, head_dim = dense_k.shape
    if not bits or set(bits) - set(BITS):
        raise ValueError(f"{bits=} cannot be packed: expected one or more of {BITS}")
    words = words_k.shape[2]
    if not words_k.shape == words_v.shape == (batch, kv_heads, words, head_dim):
        raise ValueError(f"{words_k.shape=}, {words_v.shape=}: expected [B, K, W, H]")
    if any(array.dtype.name != "uint32" for array in packed):
        raise ValueError(f"words and scales {[x.dtype.name for x in packed]} must be uint32")
    if any(array.shape != (batch, len(bits)) for array in runs):
        raise ValueError(f"first and rows {[x.shape for x in runs]} must be {(batch, len(bits))}")
    lanes = per_word(min(bits))
    for affine in (affine_v,) if key_group else (affine_k, affine_v):
        groups = affine.shape[2]
        if affine.shape != (batch, kv_heads, groups, words * lanes) or head_dim % groups:
            raise ValueError(
                f"{affine.shape=}: expected [B, K, groups, {words * lanes}], groups of {head_dim=}"
            )
    if key_group:
        expected = (batch, kv_heads, words * lanes // key_group, head_dim)
        if len(set(bits)) > 1 or key_group % lanes or affine_k.shape != expected:
            raise ValueError(
                f"{affine_k.shape=} with {key_group=}, {bits=}: expected {expected}, one width, "
                f"and groups of a multiple of {lanes} rows"
            )
