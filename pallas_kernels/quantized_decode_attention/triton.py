"""Flash-decoding over packed rows, in Pallas for the Triton backend.

    dense | |   tail |   words, run 0 | | | |   run 1 | |      blocks; a split has an equal share

It is the kernel of `ragged_decode_attention`, but most of its rows are read from words; how is told
in `packed_tiles`. A program has four query heads of a kv head: where there are more of them,
several programs read the same words.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import hadamard, tiles
from pallas_kernels.packing import per_word
from pallas_kernels.quantized_decode_attention.packed_tiles import (
    COLUMNS,
    HEADS,
    as_columns,
    attend_run,
    merge_sides,
    packed_query,
)
from pallas_kernels.ragged_decode_attention.triton import append, attend, call, rotated
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail
from pallas_kernels.splits import shares, split_count, trips
from pallas_kernels.tuning import PackedConfig, best

LEAST_GROUP = 64
"""Channels with a scale of their own, where a row has several: more scales take more registers than
there are."""


class _Case(NamedTuple):
    """What is known when the kernel is compiled."""

    scale: float
    config: PackedConfig
    transform: bool


def _kernel(
    new: NewToken,
    dense: Segment,
    packed: PackedRows,
    tail: Tail,
    results: tuple[Any, ...],
    grown: tuple[Any, Any],
    *,
    splits: int,
    case: _Case,
) -> None:
    """References of one sequence's kv head, of which the program does four query heads.

    Args:
        new: qkv [G + 2, H], cos, sin [H / 2].
        dense: k, v [capacity, H]; offset, length [B].
        packed: words [W, H], scales and shifts [groups, W * lanes]; first, rows [B, runs].
        tail: k, v [R, H]; fill [B].
        results: of a single split out [G, H]; else maximum, total [S, G] and mixed [S, G, H].
        grown: the same memory as the tail's k, v.
        splits: how many programs share the rows.
        case: the rest.
    """
    split, batch = pl.program_id(0), pl.program_id(2)
    group, groups = new.qkv.shape[0] - 2, packed.affine_k.shape[0]
    head = pl.program_id(1) % trips(group, HEADS) * HEADS  # the first of the program's
    # Eight rows of query heads, every fourth the same; the others are the key.
    each = jnp.arange(tiles.SMALLEST, dtype=jnp.int32)
    heads = jnp.where(each < COLUMNS, head + each % HEADS, group)
    q = rotated(new, heads, (heads < group) | (each >= COLUMNS))
    if case.transform:
        q = hadamard.butterflies(q.astype(jnp.float32), new.qkv.shape[1]).astype(q.dtype)
    k = jnp.where((each == COLUMNS)[:, None], q.astype(jnp.float32), 0.0)
    k = jnp.sum(k, axis=0)[None, :].astype(q.dtype)
    fill, sizes = tail.fill[batch], case.config
    # The last split has the fewest blocks.
    carry = append(new, grown, q, k, fill, split == splits - 1, case.scale)
    offset, length = dense.offset[batch], dense.length[batch]
    wide = (dense, offset, length), (tail, 0, jnp.minimum(fill, tail.k.shape[0]))
    runs = [
        (bits, packed.first[batch, run], packed.rows[batch, run])
        for run, bits in enumerate(packed.bits)
    ]
    words = [trips(rows, per_word(bits)) for bits, _, rows in runs]
    blocks = [trips(rows, sizes.block_keys) for *_, rows in wide]
    blocks += [trips(count, sizes.block_words) for count in words]
    share = shares(blocks, split, splits)
    for (refs, first, rows), bounds in zip(wide, share, strict=False):
        begin, end = (first + jnp.minimum(x * sizes.block_keys, rows) for x in bounds)
        carry = attend(q, refs, begin, end, carry, case.scale, sizes.block_keys)
    columns = as_columns(carry, groups)
    query = packed_query(q, groups, case.scale * tiles.LOG2_E)
    for (bits, first, rows), stop, bounds in zip(runs, words, share[len(wide) :], strict=True):
        begin, end = (jnp.minimum(x * sizes.block_words, stop) for x in bounds)
        columns = attend_run(
            query, packed, first, rows, begin, end, columns,
            bits=bits, lanes=per_word(min(packed.bits)), block_words=sizes.block_words,
        )  # fmt: skip
    maximum, total, mixed = merge_sides(columns)
    heads = head + jnp.arange(HEADS, dtype=jnp.int32)
    if splits == 1:
        _store(results[0], heads, heads < group, [x / total[None, :] for x in mixed])
        return
    maximum_ref, total_ref, mixed_ref = results
    tiles.scatter(maximum_ref, (split, heads), heads < group, maximum)
    seen = (heads < group) & (maximum != -jnp.inf)
    tiles.scatter(total_ref, (split, heads), seen, total)
    _store(mixed_ref, heads, seen, mixed, lead=(split,))


def _store(
    ref: Any,
    heads: jax.Array,
    valid: jax.Array,
    parts: Sequence[jax.Array],
    lead: tiles.Index = (),
) -> None:
    """Write parts of the channels [., HEADS] of valid heads to a reference [*lead, G, H]."""
    for number, part in enumerate(parts):
        columns = number * part.shape[0] + jnp.arange(part.shape[0], dtype=jnp.int32)
        index = (*lead, heads[None, :], columns[:, None])
        tiles.scatter(ref, index, valid[None, :] & (columns < ref.shape[-1])[:, None], part)


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
    together: bool = False,
    config: PackedConfig | None = None,
    splits: int | None = None,
) -> tuple[jax.Array, Tail]:
    """See the package's public function: here it is one kernel, and a merge where rows are split.

    `config` is that of the device by default, and `splits`, the programs that share a kv head's
    rows, what fills it. `together` is not used: a program of its own writes each sequence's row.

    Raises:
        NotImplementedError: keys by channel, groups of few channels, or float32.
    """
    batch, kv_heads, width, head_dim = new.qkv.shape
    if packed.key_group is not None:
        raise NotImplementedError("keys quantized by channel")
    if dense.k.dtype == jnp.float32:  # codes meet numbers of half that width
        raise NotImplementedError("float32")
    keys, values = packed.affine_k.shape[2], packed.affine_v.shape[2]
    fits = head_dim == tiles.padded(head_dim) and head_dim // keys >= LEAST_GROUP
    if keys != values or (keys > 1 and not fits):
        raise NotImplementedError(f"{keys} and {values} groups of {head_dim} channels")
    launch: PackedConfig = config or best("quantized_decode_attention", dense.k.dtype, head_dim)
    group, pairs = width - 2, batch * kv_heads
    sets, lanes = trips(group, HEADS), per_word(min(packed.bits))
    wide, packed_rows = most_rows + tail.k.shape[2], most_words * lanes
    if splits is None:  # eight warps are what the registers of a core hold at once
        blocks = trips(wide, launch.block_keys) + trips(most_words, launch.block_words)
        splits = split_count(pairs * sets, blocks, per_core=8 // launch.num_warps)
    read = pairs * (wide + packed_rows)
    of_words = 4 * (most_words * head_dim + packed_rows)
    return call(
        _kernel,
        "quantized_append_and_attend",
        (new, dense, packed, tail),
        splits=splits,
        sets=sets,
        config=launch,
        cost=pl.CostEstimate(
            flops=4 * read * group * head_dim,
            transcendentals=read * group,
            bytes_accessed=2 * pairs * (of_words + wide * head_dim * dense.k.dtype.itemsize),
        ),
        case=_Case(scale, launch, transform),
    )
