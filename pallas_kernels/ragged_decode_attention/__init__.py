"""Attention of one new token over a layer-ragged pool and a dense tail."""

import math

import jax

from pallas_kernels import rows
from pallas_kernels.backends import choose
from pallas_kernels.ragged_decode_attention import triton, xla
from pallas_kernels.rows import NewToken, Segment, Tail

BACKENDS = {"triton": triton.append_and_attend, "xla": xla.append_and_attend}
"""In the order of preference."""


def append_and_attend(
    new: NewToken,
    pool: Segment,
    tail: Tail,
    *,
    scale: float | None = None,
    most_rows: int | None = None,
    together: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, Tail]:
    """What a layer does with a new token: RoPE, its row into the tail, attention over all.

    Offsets and lengths are data: one compiled program serves every allocation. Rows outside of
    both segments are never read into a result, whatever they hold. In XLA there are four small
    programs before the attention, in the kernel none: where a step is short, launching them is a
    good part of it.

    Args:
        new: the token's product, qkv [B, K, G + 2, H], and its angles, cos and sin [B, H / 2].
        pool: the layer's rows, k and v [B, K, capacity, H] with offset and length int32 [B].
        tail: the tokens before, k and v [B, K, R, H] with fill int32 [B], below R; donate it to
            have it written in place. A token that finds no room (fill >= R) is not stored, and its
            attention has no meaning.
        scale: factor of the logits; 1 / sqrt(H) by default.
        most_rows: rows that one layer can have at most, by which the work is split; the whole pool
            by default. Any length is served, whatever it is.
        together: all of `fill` are equal, so that XLA can write one row for the whole batch.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Returns:
        The attention [B, K * G, H] in qkv's type, and the tail with the token in row `fill`, its
        fill one more. Softmax and sums are float32.

    Raises:
        ValueError: the shapes do not fit each other.
        NotImplementedError: there is no such backend.
    """
    rows.check(new, pool, tail)
    return choose(
        "append_and_attend",
        backend,
        BACKENDS,
        new,
        pool,
        tail,
        scale=1 / math.sqrt(new.qkv.shape[3]) if scale is None else scale,
        most_rows=pool.k.shape[2] if most_rows is None else most_rows,
        together=together,
    )
