"""How rows are shared out among programs: every block once, and evenly."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.splits import shares, split_count, trips


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 50))
def test_every_block_is_read_once_and_no_split_reads_more_than_its_share(blocks, splits):
    seen = [[] for _ in blocks]
    sizes = []
    for split in range(splits):
        share = [tuple(map(int, bounds)) for bounds in shares(blocks, split, splits)]
        sizes.append(sum(end - begin for begin, end in share))
        for found, bounds in zip(seen, share, strict=True):
            found += range(*bounds)
    assert seen == [list(range(count)) for count in blocks]
    assert max(sizes) == -(-sum(blocks) // splits)
    assert sizes == sorted(sizes, reverse=True)  # the last has the fewest


@pytest.mark.parametrize("module", [np, jnp])
def test_shares_of_many_layers_at_once(module):
    blocks = module.array([[5], [0], [1], [64]]), module.array([[2], [2], [0], [0]])
    found = shares(blocks, module.arange(3), 3)
    sizes = [np.asarray(end) - np.asarray(begin) for begin, end in found]
    assert np.sum(sizes, axis=0).tolist() == [[3, 3, 1], [1, 1, 0], [1, 0, 0], [22, 22, 20]]


def test_trips_are_whole_blocks():
    assert [trips(rows, 64) for rows in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_the_largest_layer_decides_how_many_splits_there_are():
    assert split_count(8, (2048 + 128) // 64) == 17  # two blocks each
    assert split_count(8, (8192 + 128) // 64) == 33  # what fills the GPU
    assert split_count(8, 255 // 64) == split_count(1000, 10**6 // 64) == 1


@pytest.mark.parametrize(("per_core", "least"), [(2, 2), (4, 4), (1, 2)])
def test_keys_are_split_for_few_programs_and_long_prompts_only(per_core, least):
    sizes = {"per_core": per_core, "least": least}
    assert split_count(1, 0, **sizes) == split_count(10**6, 10**4, **sizes) == 1
    assert split_count(1, 10**4, **sizes) > split_count(100, 10**4, **sizes) > 1
    assert split_count(1, 10**4, **sizes) == 132 * per_core
    assert split_count(1, 10 * least, **sizes) == 10
