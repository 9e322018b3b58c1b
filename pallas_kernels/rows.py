"""What attention reads and writes: the arrays of one layer, by their roles."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backends import current_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewToken:
    """A layer's product of one new token of each sequence, before RoPE.

    Attributes:
        qkv: for each kv head its G query heads, its key and its value, [B, K, G + 2, H].
        cos: cosine of RoPE's angles at the token's position, float32 [B, H / 2].
        sin: sine of them, float32 [B, H / 2].
    """

    qkv: jax.Array
    cos: jax.Array
    sin: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segment:
    """One layer's rows of full width, in a pool that all layers share.

        k, v   . . . |<- length[b] ->| . . . .      the rows of other layers around them
                 offset[b]

    Attributes:
        k: keys of all layers, [B, K, capacity, H].
        v: values of all layers, [B, K, capacity, H].
        offset: first row of this layer, int32 [B].
        length: rows of this layer, int32 [B]; may be 0.
    """

    k: jax.Array
    v: jax.Array
    offset: jax.Array
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tail:
    """One layer's rows of the tokens decoded so far.

    Attributes:
        k: keys, [B, K, R, H].
        v: values, [B, K, R, H].
        fill: rows in use, the first ones, int32 [B]; may be 0.
    """

    k: jax.Array
    v: jax.Array
    fill: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRows:
    """One layer's rows in the buffer that a prefill fills: row t is row `first + t` of it.

        k, v   . . . |<- rows ->| . . . .      as many rows of each other layer around them
                   first

    Attributes:
        k: keys of all layers, [B, K, C, H].
        v: values of all layers, [B, K, C, H].
        first: first row of this layer, int32 []; `first + rows` is at most C.
        rows: static: most rows of a sequence in one layer, T.
    """

    k: jax.Array
    v: jax.Array
    first: jax.Array
    rows: int = field(metadata={"static": True})

    @classmethod
    def alone(cls, k: jax.Array, v: jax.Array) -> "LayerRows":
        """A layer that has a buffer of its own, of keys and values [B, T, K, H]."""
        buffers = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return cls(*buffers, first=jnp.zeros((), jnp.int32), rows=k.shape[1])

    def check(self, queries: tuple[int, ...]) -> None:
        """Refuse buffers that do not fit each other, or queries of a shape [B, rows, N, H].

        Raises:
            ValueError: they do not fit.
        """
        (batch, _, heads, head_dim), k, v = queries, self.k.shape, self.v.shape
        if k != v or len(k) != 4 or (k[0], k[3]) != (batch, head_dim):
            raise ValueError(f"{k=}, {v=}: expected [{batch}, K, C, {head_dim}] of both buffers")
        if self.first.shape or not 1 <= self.rows <= k[2]:
            raise ValueError(
                f"{self.first.shape=} must be (), and {self.rows=} from 1 to the buffer's {k[2]}"
            )
        check_heads(heads, k[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedRows:
    """One layer's packed rows, in arrays of words that all layers share: see `packing`.

        words   . . |<- run 0 ->|<- run 1 ->| . .      run i has rows of bits[i] bits
                    first[b, 0]  first[b, 1]

    Attributes:
        words_k: packed keys of all layers, uint32 [B, K, W, H].
        words_v: packed values of all layers, uint32 [B, K, W, H].
        affine_k: scales and shifts of the keys, uint32 [B, K, groups, W * lanes]; with `key_group`
            [B, K, W * lanes / key_group, H].
        affine_v: scales and shifts of the values, uint32 [B, K, groups, W * lanes].
        first: first word-row of each run, int32 [B, runs].
        rows: rows of each run, int32 [B, runs]; may be 0.
        bits: static: width of each run's rows, 2, 4 or 8.
        key_group: static: rows that share a scale per channel, of keys quantized by channel (KIVI);
            None for keys quantized in groups along H. All runs then have one width, and begin at a
            multiple of `key_group` rows.
    """

    words_k: jax.Array
    words_v: jax.Array
    affine_k: jax.Array
    affine_v: jax.Array
    first: jax.Array
    rows: jax.Array
    bits: tuple[int, ...] = field(metadata={"static": True})
    key_group: int | None = field(default=None, metadata={"static": True})


def check(new: NewToken, rows: Segment, tail: Tail) -> None:
    """Refuse shapes that do not fit each other.

    Args:
        new: the new token.
        rows: the layer's rows of full width.
        tail: its new tokens.

    Raises:
        ValueError: they do not fit.
    """
    batch, kv_heads, width, head_dim = new.qkv.shape
    if width < 3 or head_dim % 2:
        raise ValueError(f"{new.qkv.shape=}: expected [B, K, G + 2, H] with an even H")
    if not new.cos.shape == new.sin.shape == (batch, head_dim // 2):
        raise ValueError(f"{new.cos.shape=}, {new.sin.shape=} must be {(batch, head_dim // 2)}")
    for k, v in ((rows.k, rows.v), (tail.k, tail.v)):
        if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (batch, kv_heads, head_dim):
            raise ValueError(
                f"{k.shape=}, {v.shape=}: expected [{batch}, {kv_heads}, rows, {head_dim}] of both"
            )
    numbers = rows.offset.shape, rows.length.shape, tail.fill.shape
    if set(numbers) != {(batch,)}:
        raise ValueError(f"offset, length and fill {list(numbers)} must be {(batch,)}")


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuse query heads that cannot share the kv heads.

    Raises:
        ValueError: they are no multiple of them.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} kv heads")


def read_rows(
    array: jax.Array,
    start: jax.Array,
    count: int,
    *,
    number: jax.Array | None = None,
    axis: int = 2,
) -> jax.Array:
    """Rows from `start` on: [B, K, S, H] -> [B, K, count, H].

    Args:
        array: of all sequences; may be `writable`.
        start: int32 [], or of each sequence [B]; `start + count` is at most S.
        count: how many.
        number: of the only sequence to read, int32 [], which gives [1, K, count, H]; None for all.
        axis: where the rows are.
    """
    if array.dtype == jnp.bfloat16:
        # XLA on a CPU slices no bfloat16: it would convert the whole array to float32, in front of
        # the loop. It does slice integers; and what is tied to `start` it leaves in the loop.
        array, start = lax.optimization_barrier((array, start))
        array = lax.bitcast_convert_type(array, jnp.uint16)
    if start.ndim:
        cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=count, axis=axis - 1)
        return readable(jax.vmap(cut)(array, start))
    first, sizes = [jnp.zeros_like(start)] * array.ndim, list(array.shape)
    first[axis], sizes[axis] = start, count
    if number is not None:
        first[0], sizes[0] = number, 1
    found = lax.dynamic_slice(array, first, sizes)
    return readable(found)


def writable(array: jax.Array) -> jax.Array:
    """An array as `write_rows` and `read_rows` take it: where bfloat16 is not written, its bits.

    XLA on a CPU updates no bfloat16 in place: it would convert the whole array to float32 and back
    at every write. To change over costs one copy, so it is done once, in front of all writes.
    """
    if array.dtype == jnp.bfloat16 and current_device().platform == "cpu":
        return lax.bitcast_convert_type(array, jnp.uint16)
    return array


def readable(array: jax.Array) -> jax.Array:
    """The inverse of `writable`."""
    return lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array


def write_rows(
    array: jax.Array, rows: jax.Array, at: tuple[Any, ...], where: jax.Array | None = None
) -> jax.Array:
    """An array with rows written at a place of it, as `lax.dynamic_update_slice`.

    Args:
        array: of all rows, `writable`.
        rows: what is written.
        at: where, an index for each axis.
        where: which of the rows are written, bool that broadcasts to them; all by default.
    """
    rows = writable(rows)
    if where is not None:
        rows = jnp.where(where, rows, lax.dynamic_slice(array, at, rows.shape))
    return lax.dynamic_update_slice(array, rows, at)
