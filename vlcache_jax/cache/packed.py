"""A pool whose older rows are packed: which row goes where, and the packing itself.

    kept rows of a layer, by position     r r v v v v v t t | t t t t
                                          └ pivots and recent rows ┴┴► dense rows, of full width
                                            everything else ─────────► runs of 4 and of 2 bits

Each layer's rows of full width lie in a ragged pool of their own, and its packed rows in one array
of words for all layers, a run for each width: first word-row and rows of each run are data. The kv
heads of a layer may keep different tokens; each gives every row at least the bits that it should
have, and the runs of a layer are as long for all of its heads.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hadamard import transform
from pallas_kernels.packing import BITS, join_affine, pack, per_word
from pallas_kernels.quantized_decode_attention import append_and_attend
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.compact import compact
from vlcache_jax.cache.quantize import Capacity, Quantizer, grid, groups, round_to
from vlcache_jax.cache.state import Pool, Tails

PACKED_AT_ONCE = 512
"""Most word-rows that are packed at a time: enough to keep a GPU busy, and few beside a cache."""


class PackedSegment(NamedTuple):
    """One layer's part of a packed pool.

    Attributes:
        dense: its rows of full width.
        packed: its runs of packed rows.
    """

    dense: Segment
    packed: PackedRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedPool:
    """The kept prompt tokens of all layers, most of them quantized; see `pallas_kernels.packing`.

    Attributes:
        dense: rows of full width; its `visual` counts all kept rows.
        words_k: packed keys, uint32 [B, K, W, H].
        words_v: packed values, likewise.
        affine_k: scales and shifts of the keys, uint32 [B, K, groups, W * lanes], or by channel
            [B, K, W * lanes / key_group, H].
        affine_v: of the values, uint32 [B, K, groups, W * lanes].
        first: first word-row of each layer's runs, int32 [B, L, runs].
        rows: rows of each run, int32 [B, L, runs].
        quantizer: static: how they were quantized.
        most_words: static: word-rows that one layer can have at most.
    """

    dense: Pool
    words_k: jax.Array
    words_v: jax.Array
    affine_k: jax.Array
    affine_v: jax.Array
    first: jax.Array
    rows: jax.Array
    quantizer: Quantizer = field(metadata={"static": True})
    most_words: int = field(metadata={"static": True})

    @property
    def length(self) -> jax.Array:
        """Rows of the prompt in each layer, int32 [B, L]."""
        return jnp.sum(self.counts, axis=-1)

    @property
    def visual(self) -> jax.Array:
        """Visual tokens among them, the mean over the kv heads, float32 [B, L]."""
        return self.dense.visual

    @property
    def counts(self) -> jax.Array:
        """Rows of the prompt: those of full width, then by `widths`; int32 [B, L, 1 + widths]."""
        packed = self.rows[..., : len(self.quantizer.widths)]
        return jnp.concatenate([self.dense.length[..., None], packed], axis=-1)

    def segments(self) -> tuple[PackedSegment, ...]:
        """Each layer's rows."""

        def packed(layer: int) -> PackedRows:
            words = self.words_k, self.words_v, self.affine_k, self.affine_v
            runs = self.first[:, layer], self.rows[:, layer]
            return PackedRows(*words, *runs, self.quantizer.runs(layer), self.quantizer.key_group)

        dense = self.dense.segments()
        return tuple(PackedSegment(rows, packed(layer)) for layer, rows in enumerate(dense))

    def append_and_attend(
        self, new: NewToken, segment: PackedSegment, tail: Tail, backend: str | None
    ) -> tuple[jax.Array, Tail]:
        """Attention of a new token to one layer's rows, to its tail and to itself.

        Args:
            new: the layer's product of the token, qkv [B, K, G + 2, H], and its position's angles.
            segment: the layer's rows, of `segments`.
            tail: the tokens before, k and v [B, K, R, H].
            backend: of the kernel.

        Returns:
            [B, N, H], and the tail with the token.
        """
        return append_and_attend(
            new,
            *segment,
            tail,
            transform=self.quantizer.transform,
            most_rows=self.dense.most,
            most_words=self.most_words,
            together=True,  # all sequences of a batch begin to decode at once
            backend=backend,
        )


class Arrangement(NamedTuple):
    """Which rows are given which bits.

    Attributes:
        order: positions, those of full width first, then run by run, each in the order of the
            prompt; int32 [B, L, K or 1, T].
        counts: rows of full width and of each run, int32 [B, L, 1 + runs].
    """

    order: jax.Array
    counts: jax.Array


def arrange(
    quantizer: Quantizer,
    kept: jax.Array,
    budgets: jax.Array,
    prompt: Prompt,
    salience: jax.Array | None,
    evicts: bool,
) -> Arrangement:
    """Give every kept row its bits.

    A layer's runs are as long as the head that needs most of a width needs it: with the other heads
    some rows have more bits than they should have, none has fewer.

    Args:
        quantizer: the rule.
        kept: which tokens are kept, bool [B, L, K or 1, T].
        budgets: how many of each layer, int32 [B, L].
        prompt: the prompts.
        salience: largest activation of each token in front of each layer, float32 [B, L, T].
        evicts: whether the kept tokens are what an eviction method chose.
    """
    runs, position = len(quantizer.widths), jnp.arange(prompt.rows, dtype=jnp.int32)
    rank = jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1
    recent = quantizer.recent_rows(budgets, evicts)
    dense = rank >= (budgets - recent)[:, :, None, None]
    others = quantizer.dense(prompt, salience)
    if others is not None:
        dense = dense | others[:, :, None]
    kind = jnp.where(dense, 0, 1 + quantizer.columns(prompt)[:, :, None])  # [B, L, K, T]
    # Rows that should have at least as many bits as each kind, of the head that has most of them.
    upto = [
        jnp.max(jnp.sum(kept & (kind <= one), axis=-1, dtype=jnp.int32), axis=-1)
        for one in range(runs)
    ]
    upto = jnp.stack([*upto, budgets], axis=-1)  # [B, L, 1 + runs]
    counts = jnp.diff(upto, axis=-1, prepend=0)
    # One number to sort by: the kind, then the position. What is not kept comes last.
    key = jnp.where(kept, kind, runs + 1) * prompt.rows + position
    order = lax.sort(key, dimension=-1, is_stable=False) % prompt.rows
    return Arrangement(order, counts)


def build_packed(
    quantizer: Quantizer,
    k: jax.Array,
    v: jax.Array,
    arrangement: Arrangement,
    visual: jax.Array,
    capacity: Capacity,
) -> PackedPool:
    """Make the pool.

    Args:
        quantizer: the rule.
        k: keys of all layers, [B, K, >= L * T, H], layer l at rows l * T.
        v: values, likewise.
        arrangement: which rows are given which bits.
        visual: visual tokens among the kept ones, float32 [B, L].
        capacity: its size.
    """
    order, counts = arrangement
    order = jnp.broadcast_to(order, (*order.shape[:2], k.shape[1], order.shape[3]))
    dense = compact(k, v, order, counts[..., 0], visual, capacity.dense)
    dense = replace(dense, most=capacity.layer_dense)
    if quantizer.transform:
        dense = replace(dense, k=transform(dense.k))
    first, rows = runs_of(quantizer, counts[..., 1:])
    packed = _pack(quantizer, k, v, order, counts, first, capacity)
    if quantizer.residual is not None:
        own = capacity.words + jnp.arange(rows.shape[1]) * capacity.reserved
        own = jnp.broadcast_to(own.astype(jnp.int32)[:, None], (*rows.shape[:2], 1))
        first = jnp.concatenate([first, own], axis=-1)
        rows = jnp.concatenate([rows, jnp.zeros_like(own)], axis=-1)
    return PackedPool(dense, *packed, first, rows, quantizer, capacity.layer_words)


def runs_of(quantizer: Quantizer, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where runs of that many rows [B, L, runs] begin, layer after layer, in word-rows."""
    each = jnp.array([per_word(bits) for bits in quantizer.widths])
    words = -(-rows // (each * quantizer.align)) * quantizer.align
    end = jnp.cumsum(words.reshape(rows.shape[0], -1), axis=-1, dtype=jnp.int32)
    return end.reshape(rows.shape) - words.astype(jnp.int32), rows


class _Slots(NamedTuple):
    """What some word-rows of the pool hold: arrays [B, slots], and [B, slots, lanes]."""

    bits: jax.Array  # their width, uint32
    rank: jax.Array  # of each row in its layer's order
    layer: jax.Array
    inside: jax.Array  # which rows are there


def _slots(quantizer: Quantizer, counts: jax.Array, first: jax.Array, words: jax.Array) -> _Slots:
    """What the word-rows `words` [slots] hold, from the runs alone."""
    batch, _, runs = first.shape
    starts = first.reshape(batch, -1)  # [B, L * runs], ascending
    # Empty runs begin where the next one does: the last run that begins at or before the word.
    run = jnp.sum(words[:, None] >= starts[:, None, :], axis=-1) - 1  # [B, slots]
    width = run % runs
    bits = jnp.array(quantizer.widths, jnp.uint32)[width]
    each = jnp.array([per_word(b) for b in quantizer.widths])[width]
    before = jnp.cumsum(counts, axis=-1)[..., :-1].reshape(batch, -1)  # rows of a layer before it
    rows = counts[..., 1:].reshape(batch, -1)
    lane = jnp.arange(quantizer.lanes)
    inner = words - jnp.take_along_axis(starts, run, axis=-1)
    row = (inner * each)[..., None] + lane  # [B, slots, lanes]
    inside = (row < jnp.take_along_axis(rows, run, axis=-1)[..., None]) & (lane < each[..., None])
    rank = jnp.take_along_axis(before, run, axis=-1)[..., None] + row
    return _Slots(bits, rank, run // runs, inside)


def _pack(
    quantizer: Quantizer,
    k: jax.Array,
    v: jax.Array,
    order: jax.Array,
    counts: jax.Array,
    first: jax.Array,
    capacity: Capacity,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Words and scales of keys and values: some word-rows at a time, never all at once."""
    batch, kv_heads, _, head_dim = k.shape
    layers, prompt_rows = order.shape[1], order.shape[3]
    words, whole = capacity.words, capacity.words + layers * capacity.reserved
    lanes, block = quantizer.lanes, min(PACKED_AT_ONCE, words)
    flat = order.swapaxes(1, 2).reshape(batch, kv_heads, layers * prompt_rows)

    def read(x: jax.Array, slots: _Slots) -> jax.Array:
        """The slots' rows, float32 [B, K, block, lanes, H]; zeros where there is none."""
        rank = jnp.minimum(slots.rank, prompt_rows - 1)
        base = jnp.broadcast_to((slots.layer * prompt_rows)[..., None], rank.shape)
        base, rank = (part.reshape(batch, 1, -1) for part in (base, rank))
        row = base + jnp.take_along_axis(flat, base + rank, axis=-1)  # [B, K, block * lanes]
        rows = jnp.take_along_axis(x, row[..., None], axis=2)  # [B, K, block * lanes, H]
        rows = rows.reshape(batch, kv_heads, block, lanes, head_dim)
        return jnp.where(slots.inside[:, None, :, :, None], rows, 0)

    def one(index: jax.Array, made: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = jnp.minimum(index * block, words - block)  # the last ones may be packed twice
        slots = _slots(quantizer, counts, first, start + jnp.arange(block))
        keys = read(k, slots)
        if quantizer.transform:
            keys = transform(keys)
        words_k, affine_k = _quantize_block(quantizer, keys, slots, quantizer.key_group)
        words_v, affine_v = _quantize_block(quantizer, read(v, slots), slots, None)
        return _write(quantizer, made, (words_k, words_v, affine_k, affine_v), start)

    count = groups(head_dim, quantizer.group)
    shape, affine = (batch, kv_heads, whole, head_dim), (batch, kv_heads, count, whole * lanes)
    size = quantizer.key_group
    by_key = affine if size is None else (batch, kv_heads, whole * lanes // size, head_dim)
    empty = tuple(jnp.zeros(each, jnp.uint32) for each in (shape, shape, by_key, affine))
    return lax.fori_loop(0, -(-words // block), one, empty)


def _write(
    quantizer: Quantizer,
    whole: tuple[jax.Array, ...],
    parts: tuple[jax.Array, ...],
    word: jax.Array,
) -> tuple[jax.Array, ...]:
    """Words and scales of some word-rows, written into the pool's from word-row `word` on."""
    axes, block = (2, 2, 2 if quantizer.key_group else 3, 3), parts[0].shape[2]
    return tuple(
        lax.dynamic_update_slice_in_dim(one, part, word * part.shape[axis] // block, axis)
        for one, part, axis in zip(whole, parts, axes, strict=True)
    )


def _quantize_block(
    quantizer: Quantizer, rows: jax.Array, slots: _Slots, key_group: int | None
) -> tuple[jax.Array, jax.Array]:
    """Words [B, K, block, H] and scales of rows [B, K, block, lanes, H]."""
    batch, kv_heads, block, lanes, head_dim = rows.shape
    x = rows.astype(jnp.float32)
    of_bits = [(quantizer.clip_of(bits), max(2**bits - 1, 1)) for bits in range(max(BITS) + 1)]
    tables = zip(*((clip, clip / levels, levels) for clip, levels in of_bits), strict=True)
    clip, step, levels = (  # [B, 1, block, 1]
        jnp.array(table, jnp.float32)[slots.bits][:, None, :, None] for table in tables
    )
    if key_group is not None:
        # One width: these are the same everywhere. Rows that are not there do not count.
        clip, step, levels = (each[:1, :, :1] for each in (clip, step, levels))
        inside = slots.inside.reshape(batch, 1, -1, key_group, 1)
        grouped = x.reshape(batch, kv_heads, -1, key_group, head_dim)
        low = jnp.min(jnp.where(inside, grouped, jnp.inf), axis=3)
        high = jnp.max(jnp.where(inside, grouped, -jnp.inf), axis=3)
        there = jnp.any(inside, axis=3)
        low, high = jnp.where(there, low, 0), jnp.where(there, high, 0)
        scale, shift = grid(low, high, clip, step)  # [B, K, groups, H]
        codes = round_to(grouped, scale[:, :, :, None], shift[:, :, :, None], levels[..., None])
        affine = join_affine(scale, shift)
    else:
        parts = x.reshape(*x.shape[:-1], groups(head_dim, quantizer.group), -1)
        scale, shift = grid(parts.min(-1), parts.max(-1), clip[..., None], step[..., None])
        codes = round_to(parts, scale[..., None], shift[..., None], levels[..., None, None])
        affine = join_affine(scale, shift)  # [B, K, block, lanes, groups]
        affine = affine.reshape(batch, kv_heads, block * lanes, -1).swapaxes(2, 3)
    return pack(codes.reshape(rows.shape), slots.bits[:, None]), affine


def spill(pool: PackedPool, tail: Tails) -> tuple[PackedPool, Tails]:
    """Pack the oldest new tokens of the tail, if a unit of them is due (`Quantizer.unit`).

    Called between two chunks of decode steps, of which a whole number makes a unit. It always does
    the same work, so that it needs no branch: where nothing is due, what it writes is not counted
    as rows.

    Args:
        pool: with room for the new tokens; donate it.
        tail: as full for all sequences of the batch; donate it.
    """
    quantizer = pool.quantizer
    count = quantizer.unit
    assert quantizer.residual is not None
    steps = pool.rows[0, 0, -1] + tail.fill[0]
    due = (steps % count == 0) & (tail.fill[0] >= quantizer.residual + count)
    packed = pool.words_k, pool.words_v, pool.affine_k, pool.affine_v
    for layer, (k, v) in enumerate(zip(tail.k, tail.v, strict=True)):
        bits = quantizer.new_width(layer)
        blocks = []
        for x, key_group in ((k, quantizer.key_group), (v, None)):
            rows = x[:, :, :count].reshape(*x.shape[:2], -1, per_word(bits), x.shape[3])
            room = quantizer.lanes - per_word(bits)
            rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))
            shape = (rows.shape[0], *rows.shape[2:4])
            slots = _Slots(
                bits=jnp.full(shape[:2], bits, jnp.uint32),
                rank=jnp.zeros(shape, jnp.int32),
                layer=jnp.full(shape[:2], layer),
                inside=jnp.broadcast_to(jnp.arange(quantizer.lanes) < per_word(bits), shape),
            )
            blocks.append(_quantize_block(quantizer, rows, slots, key_group))
        (words_k, affine_k), (words_v, affine_v) = blocks
        # As many for every sequence: the whole batch began to decode at once.
        word = pool.first[0, layer, -1] + pool.rows[0, layer, -1] // per_word(bits)
        packed = _write(quantizer, packed, (words_k, words_v, affine_k, affine_v), word)
    moved = jnp.where(due, count, 0)
    rows = pool.rows.at[..., -1].add(moved)
    names = "words_k", "words_v", "affine_k", "affine_v"
    pool = replace(pool, rows=rows, **dict(zip(names, packed, strict=True)))
    k, v = (tuple(jnp.roll(x, -moved, axis=2) for x in part) for part in (tail.k, tail.v))
    return pool, Tails(k, v, tail.fill - moved)
