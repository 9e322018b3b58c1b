"""Dense version, one sequence at a time, for tests only: every packed row spelled out."""

from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels.ragged_decode_attention.reference import ragged_decode_attention


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
    scale: float,
) -> np.ndarray:
    """Unpack the runs row by row, join them with the other segments, and attend in float64."""
    out = []
    for b in range(q.shape[0]):
        own = slice(int(offset[b]), int(offset[b] + length[b]))
        new = slice(0, int(fill[b]))
        joined = []
        for dense, words, affine, tail, group in (
            (dense_k, words_k, affine_k, tail_k, key_group),
            (dense_v, words_v, affine_v, tail_v, None),
        ):
            parts = [np.asarray(dense[b, :, own]), np.asarray(tail[b, :, new])]
            parts = [part.astype(np.float64) for part in parts]
            for run, width in enumerate(bits):
                begin = int(first[b, run])
                packed = np.asarray(words[b]), np.asarray(affine[b])
                parts += [
                    _row(*packed, begin, row, width, min(bits), group)
                    for row in range(int(rows[b, run]))
                ]
            joined.append(np.concatenate(parts, axis=1)[None])
        k, v = joined
        count = np.array([k.shape[2]])
        nothing = np.zeros((1, k.shape[1], 1, k.shape[3]))
        none = np.zeros(1, np.int64)
        own_q = np.asarray(q[b : b + 1]).astype(np.float64)
        out.append(
            ragged_decode_attention(own_q, k, v, none, count, nothing, nothing, none, scale=scale)
        )
    return np.concatenate(out)


def _row(
    words: np.ndarray,
    affine: np.ndarray,
    first: int,
    row: int,
    bits: int,
    narrowest: int,
    key_group: int | None,
) -> np.ndarray:
    """One row of a run, float64 [K, 1, H]."""
    each, lanes = 32 // bits, 32 // narrowest
    word, lane = first + row // each, row % each
    codes = (words[:, word].astype(np.int64) >> (lane * bits)) % 2**bits  # [K, H]
    if key_group:
        own = affine[:, (word * each + lane) // key_group]  # [K, H]
    else:
        own = affine[:, :, word * lanes + lane]  # [K, groups]
        own = np.repeat(own, codes.shape[1] // own.shape[1], axis=1)
    scale, shift = (np.left_shift(x, 16).astype(np.uint32).view(np.float32) for x in
                    (own & 0xFFFF, own >> 16))  # fmt: skip
    return (codes * scale.astype(np.float64) + shift)[:, None]
