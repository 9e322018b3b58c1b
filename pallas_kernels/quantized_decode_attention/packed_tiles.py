"""Attention over packed rows in a Triton kernel: how codes meet the tensor cores.

    word of 2 bits     row 15 ... row 9 row 8 | row 7 ... row 1 row 0
    & 0x00030003              0 ... 0   row 8 | 0 ... 0         row 0

- One instruction leaves two codes: the bits of a small integer are, as a float16, the integer times
  2^-24 (a subnormal number, which tensor cores keep), so nothing is converted. Further codes are
  picked without a shift while they lie in a float16's ten low bits: times a power of two.
- The two rows of a pair lie side by side, where a product wants two channels of a row. So the
  product runs over channels and sides of the words together, and the query has zeros for the other
  side: four query heads with the left side and the same four with the right one are the eight
  columns of a product, each with a softmax of its own. At the end both sides are merged.
- Scales and shifts come after the product: logits = scale * (q . codes) + shift * sum(q). Those of
  the values go into the weights: their codes are multiplied by weights times scale, and the sum of
  weights times shift is added to every channel.

Queries and weights are float16 times a power of two, so that no size of theirs leaves its range.

A block that would end beyond the array is moved back, and the rows that it should not see are left
out: their scales, which may be NaN, are zero before anything is multiplied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles
from pallas_kernels.packing import per_word, split_affine
from pallas_kernels.ragged_decode_attention.triton import Carry
from pallas_kernels.splits import trips

HEADS = 4
"""Query heads of a program; a kv head with more of them is read by several programs at a time."""

COLUMNS = 2 * HEADS
"""Of the products: the heads with the left side of the words, and again with the right one."""

KEY_CHANNELS, VALUE_CHANNELS = 32, 128
"""Most channels of a tile of keys and of one of values. Few take few registers; but of values all
pairs of rows go into one sum for 16 channels, and of few channels each product waits for another.
"""

MANTISSA = 10
"""Low bits of a float16."""

Columns = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]
"""A softmax on its way, as columns: maximum, total [C]; mixed, parts of the channels [., C]."""


class Query(NamedTuple):
    """The query heads of a program as they meet packed keys.

    Attributes:
        parts: for each group of channels, tiles [C, 2 * channels] with zeros for the other side.
        sums: for each group, the sum of its channels in the tiles, float32 [C].
        unit: what a column's products are multiplied by to be logits, float32 [C].
    """

    parts: tuple[tuple[jax.Array, ...], ...]
    sums: tuple[jax.Array, ...]
    unit: jax.Array


class _Block(NamedTuple):
    """Some word-rows of a run.

    Attributes:
        words: their numbers in the pool, int32 [words].
        there: rows of each that are there: the first ones, int32 [words].
        bits: width of the rows.
        lanes: scales of a word-row.
    """

    words: jax.Array
    there: jax.Array
    bits: int
    lanes: int

    @property
    def rows(self) -> int:
        """Rows of a word."""
        return per_word(self.bits)

    @property
    def _each(self) -> int:
        """Pairs that are picked from a word without a shift."""
        return MANTISSA // self.bits

    @property
    def units(self) -> list[float]:
        """Of each pair of rows, the number that stands for the code 1."""
        pairs = range(self.rows // 2)
        return [2.0 ** (pair % self._each * self.bits - 24) for pair in pairs]

    def codes(self, ref: Any, columns: jax.Array) -> list[jax.Array]:
        """Of each pair, the codes of some channels: [words, columns, 2], left and right.

        Args:
            ref: the words [W, H].
            columns: which channels; there may be fewer of them.
        """
        valid = None
        if ref.shape[0] < self.words.size:
            valid = (self.words < ref.shape[0])[:, None]
        if ref.shape[1] % columns.size:
            inside = (columns < ref.shape[1])[None, :]
            valid = inside if valid is None else valid & inside
        words = tiles.gather(ref, (self.words[:, None], columns[None, :]), valid)
        found = []
        for pair in range(self.rows // 2):
            shift, place = pair // self._each * self._each, pair % self._each
            mask = ((1 << self.bits) - 1) << (place * self.bits)
            picked = (words >> jnp.uint32(shift * self.bits)) & jnp.uint32(mask << 16 | mask)
            sides = [x.astype(jnp.uint16) for x in (picked, picked >> jnp.uint32(16))]
            numbers = [lax.bitcast_convert_type(side, jnp.float16) for side in sides]
            found.append(jnp.stack(numbers, axis=-1))
        return found

    def affine(self, ref: Any, group: int) -> list[tuple[jax.Array, jax.Array]]:
        """Of each pair, scale and shift [words, 2], left and right; 0 where there is no row.

        Args:
            ref: scales and shifts [groups, W * lanes].
            group: which group of channels.
        """
        rows = jnp.arange(self.rows, dtype=jnp.int32)[None, :]
        index = self.words[:, None] * self.lanes + rows
        valid = index < ref.shape[1] if ref.shape[1] < self.words.size * self.lanes else None
        tile = tiles.gather(ref, (group, index), valid)
        tile = jnp.where(rows < self.there[:, None], tile, jnp.uint32(0))
        pairs = _parts(tile.reshape(-1, 2, self.rows // 2), 1, axis=2)
        return [split_affine(pair.reshape(-1, 2)) for pair in pairs]

    def visible(self, pair: int) -> jax.Array:
        """Whether the left and the right row of a pair are there, bool [words, 2]."""
        row = pair + jnp.arange(2, dtype=jnp.int32) * (self.rows // 2)
        return row[None, :] < self.there[:, None]


def _parts(x: jax.Array, size: int, axis: int) -> tuple[jax.Array, ...]:
    """An array in equal parts along an axis."""
    return tuple(lax.split(x, [size] * (x.shape[axis] // size), axis=axis))


def _right() -> jax.Array:
    """Which columns are of the right side, bool [C]."""
    return jnp.arange(COLUMNS, dtype=jnp.int32) >= HEADS


def _columns(x: jax.Array) -> jax.Array:
    """What the sides have [words, 2], for each column [words, C]."""
    return jnp.broadcast_to(x[:, :, None], (*x.shape, HEADS)).reshape(-1, COLUMNS)


def _by_side(x: jax.Array, axis: int) -> jax.Array:
    """[..., 2]: a column's numbers on its own side and zeros on the other; columns along `axis`."""
    right, zero = jnp.expand_dims(_right(), 1 - axis), jnp.zeros_like(x)
    return jnp.stack([jnp.where(right, zero, x), jnp.where(right, x, zero)], axis=-1)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest one that is not above x >= 0; 1 for 0."""
    exponent = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    return jnp.where(power == 0.0, 1.0, power)


def packed_query(q: jax.Array, groups: int, factor: float) -> Query:
    """The query heads of a program, made ready.

    Args:
        q: [16, padded(H)]: the heads, and again, and eight rows that do not count.
        groups: of channels that have a scale of their own.
        factor: of the logits.
    """
    wide = _parts(q, COLUMNS, axis=0)[0].astype(jnp.float32)
    unit = _power_of_two(jnp.max(jnp.abs(wide), axis=1))
    wide = wide / unit[:, None]
    width = q.shape[1] // groups
    size = min(KEY_CHANNELS, width)
    by_side = _by_side(wide.astype(jnp.float16), axis=0).reshape(COLUMNS, -1)
    parts, each = _parts(by_side, 2 * size, axis=1), width // size
    return Query(
        tuple(parts[group * each : (group + 1) * each] for group in range(groups)),
        tuple(jnp.sum(part, axis=1) for part in _parts(wide, width, axis=1)),
        unit * factor,
    )


def attend_run(
    query: Query,
    refs: Any,
    first: jax.Array,
    rows: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    carry: Columns,
    *,
    bits: int,
    lanes: int,
    block_words: int,
) -> Columns:
    """Go on with an online softmax over some word-rows of a run.

    Args:
        query: the query heads.
        refs: `PackedRows` with words_k, words_v [W, H] and affine_k, affine_v [groups, W * lanes].
        first: first word-row of the run.
        rows: rows of the run.
        begin: first word-row to attend to, counted from `first`.
        end: the one behind the last.
        carry: the softmax so far.
        bits: width of the rows.
        lanes: scales of a word-row.
        block_words: word-rows of a block.
    """
    each, last = per_word(bits), max(refs.words_k.shape[0] - block_words, 0)

    def add(index: jax.Array, carry: Columns) -> Columns:
        maximum, total, mixed = carry
        own = begin + index * block_words
        words = jnp.minimum(first + own, last) + jnp.arange(block_words, dtype=jnp.int32)
        word = words - first
        there = jnp.where((word >= own) & (word < end), jnp.clip(rows - word * each, 0, each), 0)
        block = _Block(words, there, bits, lanes)
        products = _products(query, refs, block)
        highest = jnp.max(functools.reduce(jnp.maximum, products), axis=0) * query.unit
        new = jnp.maximum(maximum, highest)
        # A side that has not seen a row: shift it by 0, and its weights are exp(-inf).
        finite = jnp.where(new == -jnp.inf, 0.0, new)
        weights = [jnp.exp2(x * query.unit[None, :] - finite[None, :]) for x in products]
        decay = jnp.exp2(maximum - finite)
        total = total * decay + jnp.sum(functools.reduce(jnp.add, weights), axis=0)
        sums = _values(refs, block, weights, len(query.parts), mixed[0].shape[0])
        mixed = tuple(x * decay[None, :] + own for x, own in zip(mixed, sums, strict=True))
        return new, total, mixed

    return lax.fori_loop(0, trips(end - begin, block_words), add, carry)


def _products(query: Query, refs: Any, block: _Block) -> list[jax.Array]:
    """Of each pair of rows, query times key [words, C]; -inf where there is no row."""
    channel, found = 0, [jnp.zeros((block.words.size, COLUMNS), jnp.float32)] * len(block.units)
    for group, (parts, total) in enumerate(zip(query.parts, query.sums, strict=True)):
        products = [jnp.zeros_like(x) for x in found]
        for part in parts:
            columns = channel + jnp.arange(part.shape[1] // 2, dtype=jnp.int32)
            channel += columns.size
            for pair, codes in enumerate(block.codes(refs.words_k, columns)):
                codes = codes.reshape(codes.shape[0], -1)
                products[pair] += tiles.dot(codes, part, trans_b=True)
        affine = block.affine(refs.affine_k, group)
        for pair, ((scale, shift), unit) in enumerate(zip(affine, block.units, strict=True)):
            own = products[pair] * _columns(scale * (1 / unit))
            found[pair] += own + _columns(shift) * total[None, :]
    return [jnp.where(_columns(block.visible(i)), x, -jnp.inf) for i, x in enumerate(found)]


def _values(
    refs: Any, block: _Block, weights: list[jax.Array], groups: int, size: int
) -> list[jax.Array]:
    """The values' sum by the weights, parts of `size` channels [size, C]."""
    units, sums = block.units, []
    each = tiles.padded(refs.words_v.shape[1]) // groups // size
    for group in range(groups):
        affine = block.affine(refs.affine_v, group)
        shifts = [
            weight * _columns(shift) for weight, (_, shift) in zip(weights, affine, strict=True)
        ]
        shifts = jnp.sum(functools.reduce(jnp.add, shifts), axis=0)
        scaled = [
            weight * _columns(scale * (units[0] / own))
            for weight, (scale, _), own in zip(weights, affine, units, strict=True)
        ]
        largest = functools.reduce(jnp.maximum, [jnp.abs(x) for x in scaled])
        unit = _power_of_two(jnp.max(largest, axis=0))
        scaled = [(x * (1.0 / unit)[None, :]).astype(jnp.float16) for x in scaled]
        for part in range(group * each, (group + 1) * each):
            codes = block.codes(refs.words_v, part * size + jnp.arange(size, dtype=jnp.int32))
            products = [
                tiles.dot(_sides_as_rows(tile), _sides_as_rows(_by_side(x, axis=1)), trans_a=True)
                for tile, x in zip(codes, scaled, strict=True)
            ]
            product = functools.reduce(jnp.add, products)
            sums.append(product * (unit * (1.0 / units[0]))[None, :] + shifts[None, :])
    return sums


def _sides_as_rows(x: jax.Array) -> jax.Array:
    """[words, columns, 2] -> [2 * words, columns]."""
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


def as_columns(carry: Carry, groups: int) -> Columns:
    """A softmax over rows of full width, as the left side of one over packed rows.

    Args:
        carry: of the query heads [16], [16], [16, padded(H)].
        groups: of channels that have a scale of their own.
    """
    maximum, total, mixed = (_parts(x, COLUMNS, axis=0)[0] for x in carry)
    right = _right()
    maximum, total = jnp.where(right, -jnp.inf, maximum), jnp.where(right, 0.0, total)
    mixed = jnp.where(right[None, :], 0.0, mixed.T)
    return maximum, total, _parts(mixed, min(VALUE_CHANNELS, mixed.shape[0] // groups), axis=0)


def merge_sides(carry: Columns) -> Columns:
    """Both sides' columns as one for each head: [HEADS], [HEADS], parts [., HEADS]."""

    def sides(x: jax.Array) -> tuple[jax.Array, ...]:
        return _parts(x, HEADS, axis=x.ndim - 1)

    maximum, total, mixed = carry
    left, right = sides(maximum)
    highest = jnp.maximum(left, right)
    finite = jnp.where(highest == -jnp.inf, 0.0, highest)
    shares = jnp.exp2(left - finite), jnp.exp2(right - finite)

    def merged(x: jax.Array) -> jax.Array:
        left, right = sides(x)
        return left * shares[0] + right * shares[1]

    return highest, merged(total), tuple(merged(x) for x in mixed)
