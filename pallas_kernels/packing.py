"""Quantized rows in 32-bit words: the layout that kernels and caches share.

Rows of n bits stand 32 / n to a word: word-row w holds the rows w * P .. w * P + P - 1 of its run
(P = 32 / n), row j in the bits j * n and up of each word, so that a word-row is read like a row of
a cache, channel beside channel. Scale and shift of a group are two bfloat16 in one word.

    words  uint32 [..., W, H]                words[w, h] = sum_j code[w * P + j, h] << (j * n)
    affine uint32 [..., groups, W * lanes]   of row j of word-row w at w * lanes + j
    value  = code * scale + shift            groups of H / groups channels

`lanes` is the largest P in use: a word-row of wider rows leaves the places behind its own P unused.

Keys may be quantized by channel instead (KIVI): `size` rows that follow each other share a scale
per channel, and the affine words are [..., W * P / size, H].
"""

import jax
import jax.numpy as jnp
from jax import lax

WORD = 32
"""Bits of a word."""

BITS = (2, 4, 8)
"""Widths that can be packed."""


def per_word(bits: int) -> int:
    """Rows that share a word, P."""
    return WORD // bits


def pack(codes: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Pack the rows of word-rows.

    Args:
        codes: uint32 [..., W, lanes, H], below 2**bits; those beyond lane 32 / bits are ignored.
        bits: width of each word-row, an integer or an array [..., W].

    Returns:
        uint32 [..., W, H].
    """
    shift = jnp.arange(codes.shape[-2], dtype=jnp.uint32) * jnp.asarray(bits, jnp.uint32)[..., None]
    inside = (shift < WORD)[..., None]
    shifted = codes << jnp.where(shift < WORD, shift, 0)[..., None]
    return jnp.sum(jnp.where(inside, shifted, 0), axis=-2, dtype=jnp.uint32)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The codes of packed rows: uint32 [..., W, H] -> uint32 [..., W, P, H]."""
    shift = jnp.arange(per_word(bits), dtype=jnp.uint32)[:, None] * jnp.uint32(bits)
    return (words[..., None, :] >> shift) & jnp.uint32(2**bits - 1)


def join_affine(scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Scale and shift in one word each: the scale in the low half, the shift in the high one.

    Args:
        scale: float32 [...], rounded to bfloat16 if it is not.
        shift: likewise.

    Returns:
        uint32 [...].
    """
    # Not a conversion to bfloat16 and back, which XLA may leave out.
    low, high = (
        lax.bitcast_convert_type(lax.reduce_precision(x, 8, 7), jnp.uint32) for x in (scale, shift)
    )
    return (low >> 16) | (high & jnp.uint32(0xFFFF0000))


def split_affine(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and shift as float32: the inverse of `join_affine`."""
    scale = lax.bitcast_convert_type(words << 16, jnp.float32)
    shift = lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
    return scale, shift


def dequantize(codes: jax.Array, affine: jax.Array, *, by_channel: bool = False) -> jax.Array:
    """The values of packed rows.

    Args:
        codes: uint32 [..., rows, H].
        affine: uint32 [..., groups, rows] of groups along H; by channel [..., rows / size, H].
        by_channel: `size` rows share a scale per channel.

    Returns:
        float32 [..., rows, H].
    """
    axis, parts = (-2 if by_channel else -1), split_affine(affine)
    size = codes.shape[axis] // affine.shape[-2]
    by_row = (part if by_channel else jnp.swapaxes(part, -1, -2) for part in parts)
    scale, shift = (jnp.repeat(part, size, axis=axis) for part in by_row)
    return codes.astype(jnp.float32) * scale + shift
