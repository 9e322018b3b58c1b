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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.hadamard import transform
from pallas_kernels.packing import BITS, dequantize, join_affine, pack, per_word, unpack
from pallas_kernels.quantized_decode_attention import append_and_attend
from pallas_kernels.rows import NewToken, PackedRows, Segment, Tail
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.compact import compact
from vlcache_jax.cache.quantize import CLIP, Capacity, Quantizer, grid, groups, round_to
from vlcache_jax.cache.state import Pool, Tails
from vlcache_jax.distributed.collectives import HEADS, most

PACKED_AT_ONCE = 512
"""Most word-rows that are packed at a time: enough to keep a GPU busy, and few beside a cache."""

Packed = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""The words and the scales of keys and values: words_k, words_v, affine_k, affine_v."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedPool:
    """The kept prompt tokens of all layers, most of them quantized; see `pallas_kernels.packing`.

    Attributes:
        dense: rows of full width; its `visual` counts all kept rows.
        words_k: packed keys, uint32 [B, K, W, H].
        words_v: packed values, uint32 [B, K, W, H].
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
    def packed(self) -> Packed:
        """The packed rows of all layers."""
        return self.words_k, self.words_v, self.affine_k, self.affine_v

    @property
    def length(self) -> jax.Array:
        """Rows of the prompt in each layer, int32 [B, L]."""
        return jnp.sum(self.counts, axis=-1, dtype=jnp.int32)

    @property
    def visual(self) -> jax.Array:
        """Visual tokens among them, the mean over the kv heads, float32 [B, L]."""
        return self.dense.visual

    @property
    def counts(self) -> jax.Array:
        """Rows of the prompt: those of full width, then by `widths`; int32 [B, L, 1 + widths]."""
        packed = self.rows[..., : len(self.quantizer.widths)]
        return jnp.concatenate([self.dense.length[..., None], packed], axis=-1)

    def segments(self) -> tuple[tuple[Segment, PackedRows], ...]:
        """Each layer's rows of full width, and its runs of packed ones."""

        def packed(layer: int) -> PackedRows:
            runs = self.first[:, layer], self.rows[:, layer], self.quantizer.runs(layer)
            return PackedRows(*self.packed, *runs, self.quantizer.key_group)

        return tuple((rows, packed(layer)) for layer, rows in enumerate(self.dense.segments()))

    def only(self, some: jax.Array) -> "PackedPool":
        """The rows of some sequences, bool [B]: the others have none."""
        rows = jnp.where(some[:, None, None], self.rows, 0)
        return replace(self, dense=self.dense.only(some), rows=rows)

    def append_and_attend(
        self,
        new: NewToken,
        segment: tuple[Segment, PackedRows],
        tail: Tail,
        backend: str | None,
        together: bool = True,
    ) -> tuple[jax.Array, Tail]:
        """Attention of a new token to one layer's rows, to its tail and to itself: [B, N, H].

        Args:
            new: the layer's product of the token, qkv [B, K, G + 2, H], and its position's angles.
            segment: the layer's rows, of `segments`.
            tail: the tokens before, k and v [B, K, R, H]; it comes back with the new one.
            backend: of the kernel.
            together: all sequences of the batch have begun to decode at once.
        """
        return append_and_attend(
            new,
            *segment,
            tail,
            transform=self.quantizer.transform,
            most_rows=self.dense.most,
            most_words=self.most_words,
            together=together,
            backend=backend,
        )


def arrange(
    quantizer: Quantizer,
    kept: jax.Array,
    budgets: jax.Array,
    prompt: Prompt,
    salience: jax.Array | None,
    evicts: bool,
) -> tuple[jax.Array, jax.Array]:
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

    Returns:
        Positions, those of full width first, then run by run, each in the order of the prompt,
        int32 [B, L, K or 1, T]; and the rows of full width and of each run, int32 [B, L, 1 + runs].
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
        most(jnp.max(jnp.sum(kept & (kind <= one), axis=-1, dtype=jnp.int32), axis=-1), HEADS)
        for one in range(runs)
    ]
    upto = jnp.stack([*upto, budgets], axis=-1)  # [B, L, 1 + runs]
    counts = jnp.diff(upto, axis=-1, prepend=0)
    # One number to sort by: the kind, then the position. What is not kept comes last.
    key = jnp.where(kept, kind, runs + 1) * prompt.rows + position
    order = lax.sort(key, dimension=-1, is_stable=False) % prompt.rows
    return order, counts


def build_packed(
    quantizer: Quantizer,
    k: jax.Array,
    v: jax.Array,
    order: jax.Array,
    counts: jax.Array,
    visual: jax.Array,
    capacity: Capacity,
) -> PackedPool:
    """Make the pool.

    Args:
        quantizer: the rule.
        k: keys of all layers, [B, K, >= L * T, H], layer l at rows l * T.
        v: values, in the shape of the keys.
        order: positions by their bits, of `arrange`, int32 [B, L, K or 1, T].
        counts: rows of full width and of each run, int32 [B, L, 1 + runs].
        visual: visual tokens among the kept ones, float32 [B, L].
        capacity: its size.
    """
    (batch, kv_heads, _, head_dim), (layers, prompt_rows) = k.shape, order.shape[1::2]
    dense = compact(k, v, order, counts[..., 0], visual, capacity.dense)
    dense = replace(dense, most=capacity.layer_dense)
    if quantizer.transform:
        dense = replace(dense, k=transform(dense.k))
    rows, lanes = counts[..., 1:], quantizer.lanes
    first = first_words(quantizer, rows)
    order = jnp.broadcast_to(order, (batch, layers, kv_heads, prompt_rows))
    order = order.swapaxes(1, 2).reshape(batch, kv_heads, layers * prompt_rows)
    # Some word-rows at a time, never all at once.
    block = min(PACKED_AT_ONCE, capacity.words)

    def pack_block(index: jax.Array, made: Packed) -> Packed:
        # The last ones may be packed twice.
        start = jnp.minimum(index * block, capacity.words - block)
        bits, layer, rank, inside = _slots(
            quantizer, counts, first, start + jnp.arange(block, dtype=jnp.int32)
        )
        rank = jnp.minimum(rank, prompt_rows - 1)
        base = jnp.broadcast_to((layer * prompt_rows)[..., None], rank.shape)
        base, rank = (part.reshape(batch, 1, -1) for part in (base, rank))
        row = base + jnp.take_along_axis(order, base + rank, axis=-1)  # [B, K, block * lanes]

        def read(x: jax.Array) -> jax.Array:
            """The slots' rows, [B, K, block, lanes, H]; zeros where there is none."""
            found = jnp.take_along_axis(x, row[..., None], axis=2)  # [B, K, block * lanes, H]
            found = found.reshape(batch, kv_heads, block, lanes, head_dim)
            return jnp.where(inside[:, None, :, :, None], found, 0)

        keys = transform(read(k)) if quantizer.transform else read(k)
        return _write(quantizer, made, keys, read(v), bits, inside, start)

    words = capacity.words + layers * capacity.reserved
    by_token = groups(head_dim, quantizer.group), words * lanes
    size = quantizer.key_group
    by_key = by_token if size is None else (words * lanes // size, head_dim)
    empty, affine_k, affine_v = (
        jnp.zeros((batch, kv_heads, *shape), jnp.uint32)
        for shape in ((words, head_dim), by_key, by_token)
    )
    made: Packed = empty, empty, affine_k, affine_v
    made = lax.fori_loop(0, -(-capacity.words // block), pack_block, made)
    words_k, words_v, affine_k, affine_v = made
    if quantizer.residual is not None:
        own = capacity.words + jnp.arange(rows.shape[1], dtype=jnp.int32) * capacity.reserved
        own = jnp.broadcast_to(own.astype(jnp.int32)[:, None], (*rows.shape[:2], 1))
        first = jnp.concatenate([first, own], axis=-1)
        rows = jnp.concatenate([rows, jnp.zeros_like(own)], axis=-1)
    packed = words_k, words_v, affine_k, affine_v, first, rows
    return PackedPool(dense, *packed, quantizer, capacity.layer_words)


def first_words(quantizer: Quantizer, rows: jax.Array) -> jax.Array:
    """Word-rows at which runs of so many rows begin, layer after layer, int32 [B, L, runs]."""
    each = jnp.array([per_word(bits) for bits in quantizer.widths], jnp.int32)
    words = -(-rows // (each * quantizer.align)) * quantizer.align
    end = jnp.cumsum(words.reshape(rows.shape[0], -1), axis=-1, dtype=jnp.int32)
    return end.reshape(rows.shape) - words.astype(jnp.int32)


def _slots(
    quantizer: Quantizer, counts: jax.Array, first: jax.Array, words: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the word-rows `words` [slots] hold, from the runs alone.

    Returns:
        Bits uint32 and layer of each, [B, slots]; of their rows, [B, slots, lanes], the rank in the
        layer's order, and which are there.
    """
    batch, _, runs = first.shape
    starts = first.reshape(batch, -1)  # [B, L * runs], ascending
    # Empty runs begin where the next one does: the last run that begins at or before the word.
    run = jnp.sum(words[:, None] >= starts[:, None, :], axis=-1, dtype=jnp.int32) - 1  # [B, slots]
    width = run % runs
    bits = jnp.array(quantizer.widths, jnp.uint32)[width]
    each = jnp.array([per_word(b) for b in quantizer.widths], jnp.int32)[width]
    before = jnp.cumsum(counts, axis=-1, dtype=jnp.int32)[..., :-1]  # rows of a layer before it
    before = before.reshape(batch, -1)
    rows = counts[..., 1:].reshape(batch, -1)
    lane = jnp.arange(quantizer.lanes, dtype=jnp.int32)
    inner = words - jnp.take_along_axis(starts, run, axis=-1)
    row = (inner * each)[..., None] + lane  # [B, slots, lanes]
    inside = (row < jnp.take_along_axis(rows, run, axis=-1)[..., None]) & (lane < each[..., None])
    rank = jnp.take_along_axis(before, run, axis=-1)[..., None] + row
    return bits, run // runs, rank, inside


def _write(
    quantizer: Quantizer,
    whole: Packed,
    k: jax.Array,
    v: jax.Array,
    bits: jax.Array,
    inside: jax.Array,
    word: jax.Array,
) -> Packed:
    """Quantize rows [B, K, block, lanes, H] into word-rows of `whole`, from `word` on.

    `bits` are their widths, uint32 [B, block]; `inside` are the rows that are there, bool
    [B, block, lanes].
    """
    words_k, affine_k = _quantize_block(quantizer, k, bits, inside, quantizer.key_group)
    words_v, affine_v = _quantize_block(quantizer, v, bits, inside, None)
    parts, axes = (words_k, words_v, affine_k, affine_v), (2, 2, 2 if quantizer.key_group else 3, 3)

    def write(one: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        start = word * part.shape[axis] // k.shape[2]
        return lax.dynamic_update_slice_in_dim(one, part, start, axis)

    return jax.tree.map(write, whole, parts, axes)


def _quantize_block(
    quantizer: Quantizer,
    rows: jax.Array,
    bits: jax.Array,
    inside: jax.Array,
    key_group: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Words [B, K, block, H] and scales of rows [B, K, block, lanes, H]."""
    batch, kv_heads, block, lanes, head_dim = rows.shape
    x = rows.astype(jnp.float32)
    tables = np.zeros((3, max(BITS) + 1), np.float32)  # clip, step and levels by width
    for each in BITS:
        share, most = quantizer.clip or CLIP.get(each, 1.0), 2**each - 1
        tables[:, each] = share, share / most, most
    clip, step, levels = (jnp.asarray(table)[bits][:, None, :, None] for table in tables)
    if key_group is not None:
        # One width: these are the same everywhere. Rows that are not there do not count.
        clip, step, levels = (each[:1, :, :1] for each in (clip, step, levels))
        inside = inside.reshape(batch, 1, -1, key_group, 1)
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
    return pack(codes.reshape(rows.shape), bits[:, None]), affine


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
    lanes, packed = quantizer.lanes, pool.packed
    for layer, parts in enumerate(zip(tail.k, tail.v, strict=True)):
        bits = quantizer.new_width(layer)
        each = per_word(bits)
        k, v = (x[:, :, :count].reshape(*x.shape[:2], -1, each, x.shape[3]) for x in parts)
        k, v = (jnp.pad(x, [*[(0, 0)] * 3, (0, lanes - each), (0, 0)]) for x in (k, v))
        shape = k.shape[0], k.shape[2]
        inside = jnp.broadcast_to(jnp.arange(lanes, dtype=jnp.int32) < each, (*shape, lanes))
        # As many for every sequence: the whole batch began to decode at once.
        word = pool.first[0, layer, -1] + pool.rows[0, layer, -1] // each
        widths = jnp.full(shape, bits, jnp.uint32)
        packed = _write(quantizer, packed, k, v, widths, inside, word)
    moved = jnp.where(due, count, 0)
    rows = pool.rows.at[..., -1].add(moved)
    pool = PackedPool(pool.dense, *packed, pool.first, rows, quantizer, pool.most_words)
    k, v = (tuple(jnp.roll(x, -moved, axis=2) for x in part) for part in (tail.k, tail.v))
    return pool, Tails(k, v, tail.fill - moved)


def pack_rows(x: jax.Array, quantizer: Quantizer) -> tuple[jax.Array, jax.Array]:
    """Quantize all rows alike, head by head: for what is kept whole, not in a pool.

    Args:
        x: [B, K, C, H], C a multiple of the quantizer's lanes.
        quantizer: of one width, in groups along H.

    Returns:
        Words uint32 [B, K, W, H] and affine words uint32 [B, K, groups, C].
    """
    [bits], lanes = quantizer.widths, quantizer.lanes

    def head(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, count, head_dim = rows.shape
        shape = batch, 1, count // lanes
        widths, inside = jnp.full(shape[::2], bits, jnp.uint32), jnp.ones((), bool)
        blocks = rows.reshape(*shape, lanes, head_dim)
        words, affine = _quantize_block(quantizer, blocks, widths, inside, None)
        return words[:, 0], affine[:, 0]

    found = lax.map(head, x.swapaxes(0, 1))
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), found)


def unpack_rows(words: jax.Array, affine: jax.Array, bits: int, dtype: jnp.dtype) -> jax.Array:
    """The rows that `pack_rows` packed, [B, K, C, H], in a type."""

    def head(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        codes = unpack(parts[0], bits)
        return dequantize(codes.reshape(len(codes), -1, codes.shape[-1]), parts[1]).astype(dtype)

    return lax.map(head, (words.swapaxes(0, 1), affine.swapaxes(0, 1))).swapaxes(0, 1)
