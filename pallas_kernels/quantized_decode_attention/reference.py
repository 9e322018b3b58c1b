"""Dense version, one sequence at a time, for tests only: every packed row spelled out."""

from typing import Any

import numpy as np

from pallas_kernels.ragged_decode_attention.reference import attend, segments
from pallas_kernels.rows import PackedRows, Segment, Tail


def quantized_decode_attention(
    q: Any, dense: Segment, packed: PackedRows, tail: Tail, *, scale: float
) -> np.ndarray:
    """Unpack the runs row by row, join them with the other segments, and attend in float64."""
    out = []
    for b in range(len(q)):
        k, v = segments(dense, tail, b)
        sides: Any = (
            [np.asarray(x[b]) for x in side]
            for side in ((packed.words_k, packed.affine_k), (packed.words_v, packed.affine_v))
        )
        keys, values = sides
        for run, bits in enumerate(packed.bits):
            for row in range(int(packed.rows[b, run])):
                place: Any = int(packed.first[b, run]), row, bits, min(packed.bits)
                k.append(_row(*keys, *place, key_group=packed.key_group))
                v.append(_row(*values, *place, key_group=None))
        out.append(attend(q[b], k, v, scale))
    return np.stack(out)


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
