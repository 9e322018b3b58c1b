"""How fast the decode attention over packed rows is, beside its floor and the rows in bfloat16."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.gpu_suite import ceilings, speed
from benchmarks.gpu_suite.checks import NOT_RUN
from benchmarks.gpu_suite.speed import DTYPE, HEAD_DIM, HEADS, DecodeCase
from benchmarks.gpu_suite.stages import Context
from benchmarks.roofline import Work
from pallas_kernels import quantized_decode_attention as op
from pallas_kernels.packing import join_affine, per_word
from pallas_kernels.rows import PackedRows, Segment, Tail

SIDES, DRY_SIDES = (128, 64, 128), (8, 5, 8)
"""Rows of full width in a layer, rows of the tail in use, rows of the tail."""


@dataclass(frozen=True)
class PackedCase:
    """One shape.

    Attributes:
        batch: B.
        kv_heads: K.
        runs: bits and rows of each run of a layer.
        xla: also time the XLA backend.
    """

    batch: int
    kv_heads: int
    runs: tuple[tuple[int, int], ...]
    xla: bool = False

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths of the runs."""
        return tuple(bits for bits, _ in self.runs)

    @property
    def words(self) -> tuple[int, ...]:
        """Word-rows of each run."""
        return tuple(-(-rows // per_word(bits)) for bits, rows in self.runs)

    @property
    def rows(self) -> int:
        """Packed rows of a layer."""
        return sum(rows for _, rows in self.runs)

    def __str__(self) -> str:
        runs = " and ".join(f"{rows} rows of {bits} bits" for bits, rows in self.runs)
        return f"batch {self.batch}, {self.kv_heads} kv heads, {runs}"


DRY = PackedCase(2, 8, ((8, 8), (4, 40)), xla=True)
CASES = (
    PackedCase(8, 8, ((2, 16384),), xla=True),
    PackedCase(8, 8, ((4, 2048), (2, 14336))),
    PackedCase(8, 8, ((4, 16384),)),
    PackedCase(8, 8, ((8, 16384),)),
    PackedCase(4, 32, ((2, 8192),)),
    PackedCase(64, 8, ((2, 3276),)),
    PackedCase(1, 8, ((2, 131072),)),
    PackedCase(24, 8, ((2, 3276),)),
    PackedCase(8, 8, ((2, 819),)),
)
"""The first seven are at least 512 MB in bfloat16; the last two are a tenth."""


def packed(context: Context) -> dict[str, Any]:
    """The stage: packed rows, and as many rows of the pool in bfloat16, in turns."""
    limit = ceilings.quick(context)
    rows: list[dict[str, Any]] = []
    cases = (DRY,) if context.dry else CASES
    for done, case in enumerate(cases):
        context.progress(done, len(cases))
        if context.late():
            rows.append({"case": str(case), "ok": None, "note": NOT_RUN})
            continue
        sets, shared, work = packed_sets(context, case)
        recent, *_ = DRY_SIDES if context.dry else SIDES
        same = DecodeCase(case.batch, case.kv_heads, case.rows + recent)
        pool_sets, pool, full = speed.decode_sets(context, same, layers=len(sets))
        programs: dict[str, Callable[[], Any]] = {
            backend: measure.chain(attend(case, backend), sets, shared, carries=True)
            for backend in (("triton", "xla") if case.xla else ("triton",))
        }
        programs["pool"] = speed.decode_program("triton", same, pool_sets, pool)
        others = {"pool": full}
        found = speed.rows_of(context, str(case), work, limit, programs, len(sets), others)
        rows += [{**row, "full_bytes": full.bytes} for row in found]
        del sets, shared, pool_sets, pool, programs
        context.save(rows=rows)
    shares = [row["share"] for row in rows if row.get("backend") == "triton" and "share" in row]
    headline = f"at best {max(shares, default=0.0):.0%} of the copy's bandwidth"
    return speed.result(rows, limit, headline)


def packed_sets(
    context: Context, case: PackedCase, head_dim: int = HEAD_DIM, dtype: str = DTYPE
) -> tuple[list[Any], tuple[Tail], Work]:
    """New tokens and layers of one pool as input sets, the tail, and the work of one layer."""
    batch, kv_heads, each = case.batch, case.kv_heads, sum(case.words)
    head_dim = 16 if context.dry else head_dim
    recent, fill, tail_rows = DRY_SIDES if context.dry else SIDES
    lanes, item = per_word(min(case.bits)), jnp.dtype(dtype).itemsize
    wide = batch * (recent + fill) * head_dim * item  # of a kv head, keys or values
    narrow = 4 * batch * (each * head_dim + case.rows)  # words and scales
    layers = measure.sets_for(2 * kv_heads * (wide + narrow), dry=context.dry)

    def draw(*shape: int) -> jax.Array:
        return measure.normal(context.key(), shape, dtype)

    def affine() -> jax.Array:
        shape = batch, kv_heads, 1, layers * each * lanes
        scale = jax.random.uniform(context.key(), shape, minval=0.1, maxval=0.3)
        return join_affine(scale, -1.5 * scale)

    size = batch, kv_heads, layers * each, head_dim
    words = [jax.random.bits(context.key(), size, jnp.uint32) for _ in range(2)]
    arrays = [*words, affine(), affine()]
    k, v = (draw(batch, kv_heads, layers * recent, head_dim) for _ in range(2))
    tail = [draw(batch, kv_heads, tail_rows, head_dim) for _ in range(2)]
    begins = jnp.array([sum(case.words[:run]) for run in range(len(case.runs))], jnp.int32)
    rows = jnp.tile(jnp.array([rows for _, rows in case.runs], jnp.int32), (batch, 1))

    def numbers(value: int) -> jax.Array:
        return jnp.full((batch,), value, jnp.int32)

    sets = [
        (
            speed.new_token(context, batch, kv_heads, head_dim, dtype),
            Segment(k, v, numbers(layer * recent), numbers(recent)),
            PackedRows(
                *arrays,
                first=jnp.tile(layer * each + begins, (batch, 1)),
                rows=rows,
                bits=case.bits,
            ),
        )
        for layer in range(layers)
    ]
    ops = 4 * batch * (case.rows + recent + fill) * HEADS * head_dim
    work = Work(2 * kv_heads * (wide + narrow) + 2 * sets[0][0].qkv.nbytes, ops)
    return sets, (Tail(*tail, fill=numbers(fill)),), work


def attend(case: PackedCase, backend: str) -> Callable[..., Any]:
    """The operation over one set of `packed_sets`."""
    most = {"most_rows": SIDES[0], "most_words": sum(case.words)}
    return speed.again(partial(op.append_and_attend, backend=backend, **most))
