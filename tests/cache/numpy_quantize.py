"""AKVQ-VL's quantizer and layout in plain numpy, row by row: what the library is compared with."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

F = np.float32

CLIP = {2: 0.8, 4: 1.0, 8: 1.0}
"""Share of a group's range that is represented (AKVQ-VL, section 4)."""


class Quantized(NamedTuple):
    """Codes of rows [..., H]; scale and shift of their groups, float32 [..., groups]."""

    codes: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, to nearest even; float32."""
    return np.asarray(x, F).astype(ml_dtypes.bfloat16).astype(F)


def bf16_up(x: np.ndarray) -> np.ndarray:
    """Rounded to the least bfloat16 that is no less; float32."""
    near = x.astype(ml_dtypes.bfloat16)
    return (np.nextafter(near, ml_dtypes.bfloat16(np.inf)) if near < x else near).astype(F)


def one_group(x: np.ndarray, bits: int, clip: float) -> Quantized:
    """Codes clip(round((x - a) / s), 0, 2**bits - 1), s = (c - a) / (2**bits - 1), and a.

    a = clip * min, c = clip * max; a and s are stored in bfloat16, s rounded up. A division is a
    product with the float32 reciprocal.
    """
    low, high = x.min(), x.max()
    scale = bf16_up((high - low) * F(clip / (2**bits - 1)))
    shift = bf16(F(clip) * low)
    if scale == 0:
        scale, shift = np.ones((), F), bf16(low)
    codes = np.clip(np.rint((x - shift) * (1 / scale)), 0, 2**bits - 1)
    return Quantized(codes.astype(int), scale, shift)


def numpy_quantize(x: np.ndarray, bits: int, *, group: int, clip: float | None = None) -> Quantized:
    """Groups of `group` values along the last axis, one after the other."""
    clip = CLIP[bits] if clip is None else clip
    rows = x.astype(F).reshape(-1, x.shape[-1])
    codes = np.zeros(rows.shape, int)
    scale = np.zeros((len(rows), rows.shape[1] // group), F)
    shift = np.zeros_like(scale)
    for i, row in enumerate(rows):
        for j in range(scale.shape[1]):
            own = slice(j * group, (j + 1) * group)
            codes[i, own], scale[i, j], shift[i, j] = one_group(row[own], bits, clip)
    shape = (*x.shape[:-1], scale.shape[1])
    return Quantized(codes.reshape(x.shape), scale.reshape(shape), shift.reshape(shape))


def by_channel(x: np.ndarray, bits: int, *, group: int, clip: float) -> Quantized:
    """Keys of KIVI: every channel of `group` rows that follow each other; scales for each row."""
    assert len(x) % group == 0
    codes, scale, shift = np.zeros(x.shape, int), np.zeros(x.shape, F), np.zeros(x.shape, F)
    for start in range(0, len(x), group):
        for channel in range(x.shape[1]):
            own = slice(start, start + group), channel
            codes[own], scale[own], shift[own] = one_group(x[own].astype(F), bits, clip)
    return Quantized(codes, scale, shift)


def hadamard(size: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix; block-diagonal where H is no power of two."""
    block = size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return np.kron(np.eye(size // block), matrix) / np.sqrt(block)


def transformed(x: np.ndarray) -> np.ndarray:
    """Rows times `hadamard`, rounded to their type; exact where the sums of entries are."""
    size = x.shape[-1]
    signs = np.rint(hadamard(size) * np.sqrt(size & -size)).astype(F)
    return ((x.astype(F) @ signs) * F(1 / np.sqrt(size & -size))).astype(x.dtype)


class Rows(NamedTuple):
    """The rows of one sequence, layer and kv head, found in a packed pool.

    Attributes:
        dense_k: rows of full width, [n, H].
        dense_v: likewise.
        packed: of each run: its bits, keys and values; see `Quantized`.
    """

    dense_k: np.ndarray
    dense_v: np.ndarray
    packed: list[tuple[int, Quantized, Quantized]]


def bfloat16_of(word: np.ndarray) -> np.ndarray:
    """The value of a bfloat16's bits."""
    return (word.astype(np.uint32) << np.uint32(16)).view(F)


def read_row(
    words: np.ndarray,
    affine: np.ndarray,
    word: int,
    lane: int,
    bits: int,
    lanes: int,
    by: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One packed row: words [W, H], affine [groups, W * lanes] or by channel [.., H]."""
    codes = (words[word] >> np.uint32(lane * bits)) & np.uint32(2**bits - 1)
    own = affine[:, word * lanes + lane] if by is None else affine[(word * lanes + lane) // by]
    return codes, bfloat16_of(own & np.uint32(0xFFFF)), bfloat16_of(own >> np.uint32(16))


def find_rows(pool, batch: int, layer: int, head: int) -> Rows:
    """Unpack the rows of one sequence, layer and head of a `PackedPool`, by hand."""
    quantizer, dense = pool.quantizer, pool.dense
    begin = int(dense.offset[batch, layer])
    own = slice(begin, begin + int(dense.length[batch, layer]))
    lanes = 32 // min(quantizer.widths)
    packed = []
    for run, bits in enumerate(quantizer.runs(layer)):
        first, count = int(pool.first[batch, layer, run]), int(pool.rows[batch, layer, run])
        places = [(first + row * bits // 32, row % (32 // bits)) for row in range(count)]
        found = []
        for words, affine, by in (
            (pool.words_k, pool.affine_k, quantizer.key_group),
            (pool.words_v, pool.affine_v, None),
        ):
            words, affine = np.asarray(words)[batch, head], np.asarray(affine)[batch, head]
            rows = [read_row(words, affine, *place, bits, lanes, by) for place in places]
            found.append(Quantized(*(np.array(part) for part in zip(*rows, strict=True))) if rows
                         else Quantized(*(np.zeros((0, words.shape[1])),) * 3))  # fmt: skip
        packed.append((bits, *found))
    k, v = (np.asarray(x)[batch, head, own] for x in (dense.k, dense.v))
    return Rows(k, v, packed)


def values_of(found: Quantized) -> np.ndarray:
    """What is read back, float32 [n, H]."""
    size = found.codes.shape[-1] // found.scale.shape[-1]
    scale, shift = (np.repeat(part, size, axis=-1) for part in found[1:])
    return found.codes.astype(F) * scale + shift
