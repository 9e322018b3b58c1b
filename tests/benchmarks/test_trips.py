"""Serial trips of decode attention: the benchmark's count, and that it is the kernel's."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.models import MODELS
from benchmarks.roofline import TAIL_ROWS
from benchmarks.roofline.trips import (
    CONTEXTS,
    SERIES,
    serial_blocks,
    trip_rows,
)
from benchmarks.speed.cases import layer_rows
from pallas_kernels.ragged_decode_attention import triton
from pallas_kernels.rows import NewToken, Segment, Tail
from vlcache_jax.cache.methods import VLCache

TEXT = replace(MODELS["llava-v1.6-mistral-7b"].text, num_layers=30)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", SERIES)
def test_layers_have_all_of_the_budget_and_no_more_than_the_prompt(name, context):
    rows = np.asarray(layer_rows(VLCache(0.1), SERIES[name](30)[None], context))[0]
    assert len(rows) == 30
    assert rows.sum() == pytest.approx(0.1 * 30 * context, rel=1e-3)
    assert 1 <= rows.min() < rows.max() <= context
    assert rows[0] == rows.max()


def test_the_slowest_program_is_near_an_even_split():
    rows = trip_rows(TEXT)
    assert len(rows) == len(SERIES) * len(CONTEXTS)
    for row in rows:
        assert row["ratio"] <= 2
        assert row["step"] <= 1.2
    assert rows[0]["slowest"] == 2


def test_serial_blocks_by_hand():
    tail = TAIL_ROWS // 64
    rows = np.array([0, 1, 64, 65, 1000])  # 0, 1, 1, 2, 16 blocks
    assert serial_blocks(rows, 1, 64).tolist() == [tail, 1 + tail, 1 + tail, 2 + tail, 16 + tail]
    assert serial_blocks(rows, 4, 64).tolist() == [1, 1, 1, 1, 5]


@pytest.mark.parametrize(("context", "splits"), [(100, 1), (2048, 17), (8192, 33)])
def test_the_kernel_has_as_many_programs(context, splits):
    def shapes(*shape, dtype="bfloat16") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    new = NewToken(shapes(1, 8, 6, 128), *[shapes(1, 64, dtype="float32")] * 2)
    pool, tail = ([shapes(1, 8, n, 128)] * 2 for n in (3 * context, TAIL_ROWS))
    one = shapes(1, dtype="int32")
    layer = new, Segment(*pool, offset=one, length=one), Tail(*tail, fill=one)

    def run(*layer):
        return triton.append_and_attend(*layer, scale=1.0, most_rows=context)

    kernel, *_ = (e for e in jax.make_jaxpr(run)(*layer).eqns if e.primitive.name == "pallas_call")
    assert kernel.params["grid_mapping"].grid == (splits, 8, 1)
