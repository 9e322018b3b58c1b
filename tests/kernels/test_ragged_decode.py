"""Attention of one new token over pool and tail, every backend against the dense version."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import online_softmax
from pallas_kernels.ragged_decode_attention import (
    append_and_attend,
    reference,
    triton,
    xla,
)
from pallas_kernels.rows import NewToken, Segment, Tail
from tests.kernels.cases import (
    assert_close,
    both_backends,
    compiled,
    covering,
    draw,
    full_product,
    int32,
    poison,
    put,
    rotate,
    same_bits,
)

TAIL_ROWS = {1: 70, 17: 1, 255: 17, 257: 5, 1000: 129}
"""By the rows of the pool: one row, a part of a block, and more than one block."""

append = compiled(append_and_attend, "most_rows", "together", "backend")
append_split = compiled(triton.append_and_attend, "scale", "most_rows", "splits")
expect: Any = reference.ragged_decode_attention
merge = compiled(triton.merge, "dtype")


def operation(backend, splits, capacity, head_dim):
    """The public function, or the kernel where the splits are not its own choice."""
    if backend != "triton" or splits is None:
        return functools.partial(append, backend=backend)
    sizes = {"scale": head_dim**-0.5, "most_rows": capacity, "splits": splits}
    return functools.partial(append_split, **sizes)


@functools.lru_cache(maxsize=1)  # both backends run a case one after the other
def make(dtype, head_dim, group, capacity, splits) -> Any:
    """Arguments of the operation, and what it gives: attention, tails.

    The sequences: the whole pool, the end of the pool, a layer of no rows, a single row, nothing
    but the token itself. The tails: empty, full with the token, and in between.
    """
    kv_heads, rows = 2, TAIL_ROWS[capacity]
    arrays: Any = draw(
        (5, kv_heads, group + 2, head_dim),
        *[(5, kv_heads, capacity, head_dim)] * 2,
        *[(5, kv_heads, rows, head_dim)] * 2,
        (5, head_dim // 2),
        dtype=dtype,
    )
    qkv, pool_k, pool_v, tail_k, tail_v, angles = arrays
    last = capacity // 3 + 1
    offset = int32(0, capacity - last, capacity // 2, capacity // 2, capacity)
    length = int32(capacity, last, 0, 1, 0)
    fill = np.maximum(int32(0, rows, rows, rows // 2, 0) - 1, 0)
    pool_row, tail_row = (np.arange(n)[:, None] for n in (capacity, rows))
    segment = slice(None), None, None, None
    in_pool = (pool_row >= offset[segment]) & (pool_row < (offset + length)[segment])
    pools = [poison(x, in_pool) for x in (pool_k, pool_v)]
    tails = [poison(x, tail_row < fill[segment]) for x in (tail_k, tail_v)]
    angles = angles.astype(np.float32)
    table = np.cos(angles), np.sin(angles)
    turned = rotate(qkv[:, :, : group + 1], *table)
    q = turned[:, :, :group].reshape(5, -1, head_dim)
    new_tails = put(tails[0], fill, turned[:, :, -1]), put(tails[1], fill, qkv[:, :, -1])
    given = Segment(pool_k, pool_v, offset, length), Tail(*new_tails, fill + 1)
    expected = expect(q, *given, scale=head_dim**-0.5)
    rows = Segment(*pools, offset=offset, length=length)
    return (NewToken(qkv, *table), rows, Tail(*tails, fill=fill)), expected, new_tails


def check(case, backend):
    arguments, expected, tails = make(*case)
    dtype, head_dim, group, capacity, splits = case
    run = operation(backend, splits, capacity, head_dim)
    out, new = run(*arguments)
    assert same_bits(jax.tree.leaves((out, new)), jax.tree.leaves(run(*arguments)))
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    alone = np.repeat(arguments[0].qkv[-1, :, -1], group, axis=0)
    assert same_bits([out[-1]], [alone])  # no other key: its own value
    fill = arguments[2].fill
    assert (new.fill == fill + 1).all()
    new_k, new_v = np.asarray(new.k), np.asarray(new.v)
    row_of = [new_k[b, :, at] for b, at in enumerate(fill)]
    assert_close(row_of, [tails[0][b, :, at] for b, at in enumerate(fill)], dtype)
    # Its value comes as it is, and no other row has changed.
    assert same_bits([put(new_k, fill, 0 * fill), new_v], [put(tails[0], fill, 0 * fill), tails[1]])


@both_backends
@covering("ragged_decode_attention")
def test_against_the_reference(case, backend):
    check(case, backend)


@pytest.mark.slow
@both_backends
@full_product("ragged_decode_attention")
def test_every_combination(case, backend):
    check(case, backend)


def small(*, fill=(3, 3, 3, 3, 3), splits=None) -> Any:
    """A case of 257 rows, of which the layers have all, a third, none, one, none."""
    (new, pool, tail), *_ = make("float32", 64, 4, 257, splits)
    ready = [np.nan_to_num(x) for x in (tail.k, tail.v)]
    return new, pool, Tail(*ready, fill=int32(*fill))


def test_sequences_of_one_age_are_appended_to_together():
    results = (append(*small(), backend="xla", together=x) for x in (False, True))
    assert same_bits(*map(jax.tree.leaves, results))


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("backend", ["triton", "xla", "xla, together"])
@pytest.mark.parametrize("beyond", [0, 1, 200])
def test_a_full_tail_is_left_as_it_is(backend, splits, beyond):
    backend, *together = backend.split(", ")
    new, pool, tail = small(fill=[TAIL_ROWS[257] + beyond] * 5)
    run = operation(backend, splits, 257, 64)
    out, after = run(new, pool, tail, **({"together": True} if together else {}))
    assert same_bits([after.k, after.v], [tail.k, tail.v])
    assert np.isfinite(np.asarray(out)).all()


def test_one_full_tail_does_not_keep_the_others_from_growing():
    fill = [TAIL_ROWS[257], 0, TAIL_ROWS[257] - 1, 2, TAIL_ROWS[257] + 7]
    for backend in ("triton", "xla"):
        new, pool, tail = small(fill=fill)
        _, after = append(new, pool, tail, backend=backend)
        changed = (np.asarray(after.v) != tail.v).any(axis=(1, 3))
        expected = np.arange(TAIL_ROWS[257]) == np.array(fill)[:, None]
        assert np.array_equal(changed, expected)


@pytest.mark.parametrize(("most_rows", "splits"), [(257, 40), (1, None), (1, 2), (10**6, None)])
def test_any_number_of_splits_serves_layers_of_any_size(most_rows, splits):
    """Also layers longer than the most they should have, and splits that nothing is left for."""
    arguments, expected, _ = make("float32", 64, 4, 257, None)
    sizes = {"scale": 64**-0.5, "most_rows": most_rows, "splits": splits}
    out, _ = append_split(*arguments, **sizes)
    assert_close(out, expected, "float32")


@pytest.mark.parametrize(("splits", "kernels"), [(1, 1), (2, 2), (33, 2)])
def test_a_layer_is_one_kernel_and_at_most_a_merge(splits, kernels):
    run = functools.partial(triton.append_and_attend, scale=1.0, most_rows=257, splits=splits)
    assert str(jax.make_jaxpr(run)(*small())).count("pallas_call") == kernels


@pytest.mark.parametrize("parts", [1, 4, 17, 70])
@pytest.mark.parametrize("empty", ["none", "first", "last", "all but one", "all"])
def test_merging_parts_of_which_some_are_empty(parts, empty):
    rng = np.random.default_rng(parts)
    of_rows = 2, 1, parts, 3
    # So low that a part which is not there would stand out, did it count as 0.
    maximum = (20 * rng.standard_normal(of_rows) - 300).astype(np.float32).astype(np.float64)
    total, mixed = 1 + rng.random(of_rows), rng.standard_normal((*of_rows, 24))
    number = np.arange(parts)
    gone = {
        "none": number < 0,
        "first": number == 0,
        "last": number == parts - 1,
        "all but one": number != parts // 2,
        "all": number >= 0,
    }[empty]
    maximum[:, :, gone], total[:, :, gone], mixed[:, :, gone] = -np.inf, 0, 0
    highest = np.max(maximum, axis=2, keepdims=True)
    weights = np.exp2(maximum - np.where(highest == -np.inf, 0, highest))
    divisor = (weights * total).sum(2)
    expected = (weights[..., None] * mixed).sum(2) / np.where(divisor == 0, 1, divisor)[..., None]
    total[:, :, gone] = mixed[:, :, gone] = np.nan  # a split that has seen no key leaves no more
    ours = merge(*(x.astype(np.float32) for x in (maximum, total, mixed)), dtype=jnp.float32)
    if gone.all():
        assert (np.asarray(ours) == 0).all()
    else:
        assert_close(ours, expected, "float32")


def finished(*arrays):
    """The attention of `xla.attend_segments`, [B, N, H]."""
    out = online_softmax.finish(xla.attend_segments(*arrays, scale=arrays[0].shape[-1] ** -0.5))
    return out.reshape(out.shape[0], -1, out.shape[-1])


@pytest.mark.parametrize("way", ["in turn", "narrow", "together"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"), [("float32", 64, 3), ("bfloat16", 80, 1), ("float16", 8, 8)]
)
def test_segments_end_beside_the_blocks(dtype, head_dim, group, way, monkeypatch):
    """Blocks of 64 rows and of 32: a CPU takes one sequence after the other, a GPU all of them; a
    CPU takes blocks of all where heads are narrow.
    """
    monkeypatch.setattr(xla, "MOST_WIDTH", 1000 if way == "narrow" else 0)
    monkeypatch.setattr(xla, "BATCH_ROWS", (32, 32))
    monkeypatch.setattr(xla, "TAIL_ROWS", 16)
    if way == "together":
        monkeypatch.setattr(xla, "current_device", lambda: SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(xla, "LARGE", 64 * 2 * head_dim)
    monkeypatch.setattr(xla, "SMALL", 32 * 2 * head_dim)
    capacity, rows, batch = 150, 20, 6
    offset, length = int32(0, 85, 1, 149, 70, 22), int32(150, 65, 64, 1, 0, 127)
    fill = int32(0, 20, 17, 16, 1, 15)
    q, *arrays = draw(
        (batch, 2, group, head_dim),
        *[(batch, 2, capacity, head_dim)] * 2,
        *[(batch, 2, rows, head_dim)] * 2,
        dtype=dtype,
    )
    first, count, used = (x[:, None, None, None] for x in (offset, length, fill))
    pool_row, tail_row = (np.arange(n)[:, None] for n in (capacity, rows))
    there = (pool_row >= first) & (pool_row < first + count)
    pool_k, pool_v = (poison(x, there) for x in arrays[:2])
    tail_k, tail_v = (poison(x, tail_row < used) for x in arrays[2:])
    given = pool_k, pool_v, offset, length, tail_k, tail_v, fill
    heads = q.reshape(batch, -1, head_dim)
    run = jax.jit(lambda *x: finished(*x))  # its own: what is traced differs
    expected = expect(heads, Segment(*given[:4]), Tail(*given[4:]), scale=head_dim**-0.5)
    assert_close(run(q, *given), expected, dtype)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_copy_of_the_cache_is_made(dtype, kv_heads):
    pool, tail, row = ((16, kv_heads, n, 64) for n in (4096, 8, 1))
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (row, pool, pool, tail, tail)]
    counts = [jax.ShapeDtypeStruct((16,), jnp.int32)] * 3
    q, pool_k, pool_v, *tails = shapes
    given = q, pool_k, pool_v, *counts[:2], *tails, counts[2]
    memory: Any = jax.jit(finished).lower(*given).compile().memory_analysis()
    assert memory.temp_size_in_bytes < pool_k.size * pool_k.dtype.itemsize / 4


@both_backends
def test_one_program_serves_every_allocation(backend):
    traces = []

    @jax.jit
    def run(*args):
        traces.append(1)
        return append_and_attend(*args, backend=backend)

    qkv, angles, pool, tail = draw((2, 2, 4, 16), (2, 8), (2, 2, 256, 16), (2, 2, 4, 16))
    new = NewToken(qkv, np.cos(angles), np.sin(angles))
    for offset, length in ([0, 10], [256, 0]), ([100, 3], [0, 200]):
        numbers = jnp.array(offset), jnp.array(length)
        run(new, Segment(pool, pool, *numbers), Tail(tail, tail, jnp.array([1, 2])))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": (1, 2, 2, 16)}, r"G \+ 2"),
        ({"qkv": (1, 2, 4, 15)}, "even H"),
        ({"qkv": (1, 1, 6, 16)}, "expected"),
        ({"qkv": (2, 2, 4, 16), "cos": (2, 8), "sin": (2, 8)}, "expected"),
        ({"cos": (1, 16)}, "cos.shape"),
        ({"pool_v": (1, 2, 9, 16)}, "expected"),
        ({"pool_k": (1, 3, 8, 16), "pool_v": (1, 3, 8, 16)}, "expected"),
        ({"tail_k": (1, 2, 3, 8), "tail_v": (1, 2, 3, 8)}, "expected"),
        ({"offset": (2,)}, "must be"),
        ({"fill": (2,)}, "must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    shapes = {"qkv": (1, 2, 4, 16), "cos": (1, 8), "sin": (1, 8)}
    shapes |= {"pool_k": (1, 2, 8, 16), "pool_v": (1, 2, 8, 16), "offset": (1,), "length": (1,)}
    shapes |= {"tail_k": (1, 2, 3, 16), "tail_v": (1, 2, 3, 16), "fill": (1,)}
    x = [jnp.zeros(shape) for shape in (shapes | changes).values()]
    with pytest.raises(ValueError, match=message):
        append_and_attend(NewToken(*x[:3]), Segment(*x[3:7]), Tail(*x[7:]))
