"""Flash-decoding over packed rows, in Pallas for the Triton backend.

    words   . . . | split 0 | split 1 | . . .   each run is cut into splits; the rows of full width,
            first                               the tail and the new token are one split more

It is the kernel of `ragged_decode_attention`, but reads its rows from words; how is told in
`packed_tiles`. A program has four query heads of a kv head: where there are more of them, several
programs read the same words.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import hadamard, tiles
from pallas_kernels.packing import per_word
from pallas_kernels.quantized_decode_attention import config as configs
from pallas_kernels.quantized_decode_attention.config import Config
from pallas_kernels.quantized_decode_attention.packed_tiles import (
    HEADS,
    Columns,
    as_columns,
    attend_run,
    first_rows,
    merge_sides,
    packed_query,
)
from pallas_kernels.ragged_decode_attention.triton import (
    attend,
    merge,
    new_token,
    nothing,
    of_head,
    rotated,
)
from pallas_kernels.tuning import best

LEAST_GROUP = 64
"""Channels with a scale of their own, where a row has several: more scales take more registers than
there are."""


class _Refs(NamedTuple):
    """References of one kv head of a sequence; those that a kernel does not have are None."""

    offset: Any  # [B]
    length: Any  # [B]
    fill: Any  # [B]
    first: Any  # [B, runs]
    rows: Any  # [B, runs]
    q: Any  # [G, H], or the product of the new token [G + 2, H]
    dense_k: Any  # [capacity, H]
    dense_v: Any
    words_k: Any  # [W, H]
    words_v: Any
    affine_k: Any  # [groups, W * lanes]
    affine_v: Any
    tail_k: Any  # [R, H]
    tail_v: Any
    cos: Any = None  # [H / 2]
    sin: Any = None
    out: Any = None  # [G, H]
    maximum: Any = None  # [S, G]
    total: Any = None  # [S, G]
    mixed: Any = None  # [S, G, H]
    new_k: Any = None  # [R, H], the same memory as `tail_k`
    new_v: Any = None


class _Case(NamedTuple):
    """What is known when the kernel is compiled."""

    group: int
    bits: tuple[int, ...]
    scale: float
    config: Config
    transform: bool

    @property
    def sets(self) -> int:
        """Programs that share a kv head's query heads."""
        return -(-self.group // HEADS)

    @property
    def lanes(self) -> int:
        """Scales of a word-row."""
        return per_word(min(self.bits))


def _turned(refs: _Refs, case: _Case, heads: jax.Array, there: jax.Array) -> jax.Array:
    """Query heads, or rows of the new token's product, as they meet the keys [16, padded(H)]."""
    if refs.cos is None:
        return tiles.load(refs.q, heads, there)
    rows = rotated(refs, heads, there)
    if not case.transform:
        return rows
    turned = hadamard.butterflies(rows.astype(jnp.float32), refs.q.shape[1])
    return turned.astype(rows.dtype)


class _Program(NamedTuple):
    """One program: its references, its query heads, and what it is of them."""

    refs: _Refs
    case: _Case
    batch: jax.Array
    first: jax.Array  # query head

    @property
    def groups(self) -> int:
        """Groups of channels that have a scale of their own."""
        return self.refs.affine_k.shape[0]

    @classmethod
    def begin(cls, arguments: Sequence[Any], fields: Sequence[str], case: _Case, axis: int) -> Self:
        """That of a kernel whose grid has kv heads along `axis` and sequences behind them."""
        refs = _Refs(**dict(zip(fields, arguments, strict=True)))
        first = pl.program_id(axis) % case.sets * HEADS
        return cls(refs, case, pl.program_id(axis + 1), first)

    @property
    def heads(self) -> jax.Array:
        """The query heads, int32 [HEADS]."""
        return self.first + jnp.arange(HEADS)

    def query(self) -> jax.Array:
        """The query heads as they meet the keys [16, padded(H)]; every fourth row is the same."""
        rows = self.first + jnp.arange(tiles.SMALLEST) % HEADS
        return _turned(self.refs, self.case, rows, rows < self.case.group)

    def full_width(self, q: jax.Array) -> Columns:
        """Over the new token, if there is one, the rows of full width, and the tail."""
        refs, case = self.refs, self.case
        sizes = {"scale": case.scale, "block_keys": case.config.block_keys}
        offset, length, fill = (x[self.batch] for x in (refs.offset, refs.length, refs.fill))
        carry = nothing(q)
        if refs.new_k is not None:
            rows = jnp.full((tiles.SMALLEST,), case.group)
            k = first_rows(_turned(refs, case, rows, rows == case.group), 1)
            carry = new_token(refs, q, k, fill, case.group, case.scale)
        carry = attend(q, refs.dense_k, refs.dense_v, offset, offset + length, carry, **sizes)
        carry = attend(q, refs.tail_k, refs.tail_v, jnp.zeros_like(fill), fill, carry, **sizes)
        return as_columns(carry, self.groups)

    def packed(self, q: jax.Array, carry: Columns, split: jax.Array | int, splits: int) -> Columns:
        """Over one of the parts of every run."""
        query = packed_query(q, self.groups, self.case.scale * tiles.LOG2_E)
        for run, bits in enumerate(self.case.bits):
            first, rows = (x[self.batch, run] for x in (self.refs.first, self.refs.rows))
            words = (rows + per_word(bits) - 1) // per_word(bits)
            each = (words + splits - 1) // splits
            begin = jnp.minimum(split * each, words)
            carry = attend_run(
                query,
                self.refs,
                first,
                rows,
                begin,
                jnp.minimum(begin + each, words),
                carry,
                bits=bits,
                lanes=self.case.lanes,
                block_words=self.case.config.block_words,
            )
        return carry

    def store(self, ref: Any, parts: Sequence[jax.Array], lead: tiles.Scalars = ()) -> None:
        """Write parts of the channels [., HEADS] to a reference [*lead, G, H]."""
        for number, part in enumerate(parts):
            columns = number * part.shape[0] + jnp.arange(part.shape[0])
            index = (*lead, self.heads[None, :], columns[:, None])
            valid = (self.heads < self.case.group)[None, :] & (columns < ref.shape[-1])[:, None]
            tiles.scatter(ref, index, valid, part)


def _single_kernel(*arguments: Any, fields: tuple[str, ...], case: _Case) -> None:
    """All of a kv head, or of four of its query heads."""
    program = _Program.begin(arguments, fields, case, axis=0)
    q = program.query()
    _, total, mixed = merge_sides(program.packed(q, program.full_width(q), 0, 1))
    divisor = jnp.where(total == 0.0, 1.0, total)[None, :]
    program.store(program.refs.out, [x / divisor for x in mixed])


def _split_kernel(*arguments: Any, fields: tuple[str, ...], case: _Case, splits: int) -> None:
    """One split, with the partial softmaxes as results."""
    program = _Program.begin(arguments, fields, case, axis=1)
    refs, split = program.refs, pl.program_id(0)

    def write(carry: Columns) -> None:
        maximum, total, mixed = merge_sides(carry)
        there = program.heads < case.group
        tiles.store_vector(refs.maximum, program.heads, there, maximum, lead=(split,))
        tiles.store_vector(refs.total, program.heads, there, total, lead=(split,))
        program.store(refs.mixed, mixed, lead=(split,))

    # Each branch loads its query: one for both would take registers of the other.
    @pl.when(split < splits)
    def _() -> None:
        q = program.query()
        write(program.packed(q, as_columns(nothing(q), program.groups), split, splits))

    @pl.when(split == splits)
    def _() -> None:
        write(program.full_width(program.query()))


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
    bits: tuple[int, ...],
    key_group: int | None,
    scale: float,
    mean_words: int,
    config: Config | None = None,
    splits: int | None = None,
) -> jax.Array:
    """See the package's public function.

    Args:
        q: as there.
        dense_k: as there.
        dense_v: as there.
        offset: as there.
        length: as there.
        words_k: as there.
        words_v: as there.
        affine_k: as there.
        affine_v: as there.
        first: as there.
        rows: as there.
        tail_k: as there.
        tail_v: as there.
        fill: as there.
        bits: as there.
        key_group: as there; not supported.
        scale: as there.
        mean_words: as there.
        config: block sizes; those of the device by default.
        splits: parts that each run is cut into; by the device's size by default.

    Raises:
        NotImplementedError: keys by channel, groups of few channels, or float32.
    """
    batch, heads, head_dim = q.shape
    kv_heads = dense_k.shape[1]
    given = {
        "offset": offset, "length": length, "fill": fill, "first": first, "rows": rows,
        "q": q.reshape(batch, kv_heads, heads // kv_heads, head_dim),
        "dense_k": dense_k, "dense_v": dense_v, "words_k": words_k, "words_v": words_v,
        "affine_k": affine_k, "affine_v": affine_v, "tail_k": tail_k, "tail_v": tail_v,
    }  # fmt: skip
    (out,) = _run(given, bits, key_group, scale, mean_words, config, splits)
    return out


def append_and_attend(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
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
    bits: tuple[int, ...],
    key_group: int | None,
    transform: bool,
    scale: float,
    mean_words: int,
    together: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See the package's public function; `config` and `splits` as above."""
    del together  # each sequence's row is written by a program of its own
    given = {
        "offset": offset, "length": length, "fill": fill, "first": first, "rows": rows, "q": qkv,
        "dense_k": dense_k, "dense_v": dense_v, "words_k": words_k, "words_v": words_v,
        "affine_k": affine_k, "affine_v": affine_v, "tail_k": tail_k, "tail_v": tail_v,
        "cos": cos, "sin": sin,
    }  # fmt: skip
    settings = bits, key_group, scale, mean_words, config, splits
    out, tail_k, tail_v = _run(given, *settings, transform=transform)
    return out, tail_k, tail_v


def _run(
    given: dict[str, jax.Array],
    bits: tuple[int, ...],
    key_group: int | None,
    scale: float,
    mean_words: int,
    config: Config | None,
    splits: int | None,
    *,
    transform: bool = False,
) -> tuple[jax.Array, ...]:
    """Attention [B, N, H] and, if the new token is appended, the tails that it was written into."""
    _check(given, key_group)
    q, tail_k = given["q"], given["tail_k"]
    batch, kv_heads, rows, head_dim = q.shape
    appends = "cos" in given
    group = rows - 2 if appends else rows
    if config is None:
        size = tiles.padded(head_dim)
        config = best("quantized_decode_attention", configs.candidates, tail_k.dtype, size)
    case = _Case(group, bits, scale, config, transform)
    if splits is None:
        splits = configs.splits(batch * kv_heads * case.sets, mean_words, config)

    whole = {"offset", "length", "fill", "first", "rows"}
    in_specs = [
        pl.BlockSpec(array.shape, lambda *_, sides=array.ndim: (0,) * sides)
        if name in whole
        else pl.BlockSpec((None, head_dim // 2), lambda *at: (at[-1], 0))
        if name in ("cos", "sin")
        else of_head(array, case.sets)
        for name, array in given.items()
    ]
    programs = (kv_heads * case.sets, batch)
    if splits == 1:
        kernel, grid, static = _single_kernel, programs, {}
        made = {"out": jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), q.dtype)}
    else:
        kernel, grid, static = _split_kernel, (splits + 1, *programs), {"splits": splits}
        each = (batch, kv_heads, splits + 1, group)
        shapes = {"maximum": each, "total": each, "mixed": (*each, head_dim)}
        made = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    own = len(made)
    aliases = {}
    if appends:
        for name, tail in (("new_k", "tail_k"), ("new_v", "tail_v")):
            aliases[list(given).index(tail)] = len(made)
            made[name] = jax.ShapeDtypeStruct(tail_k.shape, tail_k.dtype)
    lanes = mean_words * case.lanes
    read = batch * kv_heads * (lanes + tail_k.shape[2])
    results = tiles.call(
        kernel,
        "quantized_append_and_attend" if appends else "quantized_decode_attention",
        grid=grid,
        in_specs=in_specs,
        out_specs=[of_head(shape, case.sets) for shape in made.values()],
        out_shape=list(made.values()),
        aliases=aliases,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        cost=pl.CostEstimate(
            flops=4 * read * group * head_dim,
            transcendentals=read * group,
            bytes_accessed=8 * batch * kv_heads * (mean_words * head_dim + lanes),
        ),
        fields=(*given, *made),
        case=case,
        **static,
    )(*given.values())
    out = results[0] if splits == 1 else merge(*results[:own], dtype=q.dtype)
    return out.reshape(batch, kv_heads * group, head_dim), *results[own:]


def _check(given: dict[str, jax.Array], key_group: int | None) -> None:
    if key_group is not None:
        raise NotImplementedError("keys quantised by channel")
    if given["tail_k"].dtype == jnp.float32:  # codes meet numbers of half that width
        raise NotImplementedError("float32")
    head_dim = given["q"].shape[-1]
    keys, values = (given[name].shape[2] for name in ("affine_k", "affine_v"))
    fits = head_dim == tiles.padded(head_dim) and head_dim // keys >= LEAST_GROUP
    if keys != values or (keys > 1 and not fits):
        raise NotImplementedError(f"{keys} and {values} groups of {head_dim} channels")
