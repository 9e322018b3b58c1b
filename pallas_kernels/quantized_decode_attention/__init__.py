"""Attention of one new token over a layer whose older rows are quantized."""

import math

import jax

from pallas_kernels import rows
from pallas_kernels.backends import choose
from pallas_kernels.packing import BITS, per_word
from pallas_kernels.quantized_decode_attention import triton, xla
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail

BACKENDS = {"triton": triton.append_and_attend, "xla": xla.append_and_attend}
"""In the order of preference."""


def append_and_attend(
    new: NewToken,
    dense: Segment,
    packed: PackedRows,
    tail: Tail,
    *,
    transform: bool = False,
    scale: float | None = None,
    most_rows: int | None = None,
    most_words: int | None = None,
    together: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, Tail]:
    """What a layer does with a new token: RoPE, the transform, its row into the tail, attention.

    Attention goes over rows of full width, packed runs, and the tail. Offsets and lengths are data:
    one compiled program serves every allocation. Rows outside of the segments are never read into a
    result, whatever they hold. Packed rows are dequantized where they are used: there is never a
    copy of the cache.

    Args:
        new: the token's product, qkv [B, K, G + 2, H], and its angles, cos and sin [B, H / 2].
        dense: the layer's rows of full width, k and v [B, K, capacity, H] with offset and length
            int32 [B]; with `transform`, their keys are transformed.
        packed: its packed rows, words [B, K, W, H], with first and rows int32 [B, runs].
        tail: the tokens before, k and v [B, K, R, H] with fill int32 [B], below R; donate it to
            have it written in place. A token that finds no room (fill >= R) is not stored, and its
            attention has no meaning.
        transform: multiply the query and the key by the Walsh-Hadamard transform after RoPE (AKVQ,
            section 3.2); the value comes as the weights make it.
        scale: factor of the logits; 1 / sqrt(H) by default.
        most_rows: rows of full width that one layer can have at most, by which the work is split;
            all of the pool's by default. Any length is served, whatever it is.
        most_words: the same of its word-rows.
        together: all of `fill` are equal, so that XLA can write one row for the whole batch.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Returns:
        The attention [B, K * G, H] in qkv's type, and the tail with the token in row `fill`, its
        fill one more. Softmax and sums are float32.

    Raises:
        ValueError: the shapes do not fit each other, or a width cannot be packed.
        NotImplementedError: there is no such backend, or it does not support the case.
    """
    rows.check(new, dense, tail)
    _check_packed(dense, packed)
    return choose(
        "quantized_append_and_attend",
        backend,
        BACKENDS,
        new,
        dense,
        packed,
        tail,
        transform=transform,
        scale=1 / math.sqrt(new.qkv.shape[3]) if scale is None else scale,
        most_rows=dense.k.shape[2] if most_rows is None else most_rows,
        most_words=packed.words_k.shape[2] if most_words is None else most_words,
        together=together,
    )


def _check_packed(dense: Segment, packed: PackedRows) -> None:
    batch, kv_heads, _, head_dim = dense.k.shape
    bits, key_group = packed.bits, packed.key_group
    if not bits or set(bits) - set(BITS):
        raise ValueError(f"{bits=} cannot be packed: expected one or more of {BITS}")
    words_k, words_v, *affines = packed.words_k, packed.words_v, packed.affine_k, packed.affine_v
    words = words_k.shape[2]
    if not words_k.shape == words_v.shape == (batch, kv_heads, words, head_dim):
        raise ValueError(f"{words_k.shape=}, {words_v.shape=}: expected [B, K, W, H]")
    dtypes = [x.dtype.name for x in (words_k, words_v, *affines)]
    if set(dtypes) != {"uint32"}:
        raise ValueError(f"words and scales {dtypes} must be uint32")
    runs = [packed.first.shape, packed.rows.shape]
    if any(shape != (batch, len(bits)) for shape in runs):
        raise ValueError(f"first and rows {runs} must be {(batch, len(bits))}")
    lanes = per_word(min(bits))
    for affine in affines[1:] if key_group else affines:
        groups = affine.shape[2]
        if affine.shape != (batch, kv_heads, groups, words * lanes) or head_dim % groups:
            raise ValueError(
                f"{affine.shape=}: expected [B, K, groups, {words * lanes}], groups of {head_dim=}"
            )
    if key_group:
        expected = (batch, kv_heads, words * lanes // key_group, head_dim)
        if len(set(bits)) > 1 or key_group % lanes or affines[0].shape != expected:
            raise ValueError(
                f"{affines[0].shape=} with {key_group=}, {bits=}: expected {expected}, one width, "
                f"and groups of a multiple of {lanes} rows"
            )
