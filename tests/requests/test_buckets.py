"""Buckets: few programs, little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_config
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.llava.anyres import num_tiles, visual_rows
from vlcache_jax.requests.buckets import Buckets, bucket_for, default_buckets, padding_shares

USUAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

increasing = st.sets(st.integers(1, 300), min_size=1, max_size=8).map(sorted)


@given(n=st.integers(0, 300), sizes=increasing)
def test_bucket_is_the_smallest_that_holds(n, sizes):
    size = bucket_for(n, sizes)
    assert size >= n
    assert size in sizes or size > sizes[-1]
    assert not any(n <= smaller < size for smaller in sizes)


def test_beyond_the_last_size_it_doubles():
    assert [bucket_for(n, (0, 5, 10)) for n in (0, 1, 5, 10, 11, 21, 81)] == [
        0,
        5,
        5,
        10,
        20,
        40,
        160,
    ]


@given(sizes=increasing)
def test_padding_shares_are_the_mean_over_all_lengths(sizes):
    expected = [
        np.mean([(size - n) / size for n in range(previous + 1, size + 1)])
        for previous, size in zip([0, *sizes], sizes, strict=False)
    ]
    np.testing.assert_allclose(padding_shares(sizes), expected, atol=1e-12)


def test_no_image_costs_no_padding():
    assert padding_shares((0, 5)) == (0.0, 0.4)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("prompt", ()),
        ("prompt", (0, 64)),
        ("prompt", (64, 64)),
        ("prompt", (128, 64)),
        ("tiles", ()),
        ("tiles", (-1, 5)),
    ],
)
def test_impossible_buckets_are_refused(name, sizes):
    lists = {"prompt": (64,), "tiles": (0, 1)} | {name: sizes}
    with pytest.raises(ValueError, match=f"buckets for {name} must be increasing"):
        Buckets(**lists)


def test_a_model_without_pictures_has_no_tiles():
    config = ModelConfig("llama", tiny_config("llava").text)
    assert default_buckets(config).tiles == (0,)
    assert bucket_for(0, (0,)) == 0
    assert bucket_for(3, (0,)) == 4  # a list of sizes always goes on


def test_default_buckets():
    next_buckets = default_buckets(tiny_config("llava_next", 336, 14, 1000, USUAL))
    assert next_buckets.prompt == (64, 96, 128, 192, 256, 384, 512, 768, 1000)
    assert next_buckets.tiles == (0, 5, 10, 20, 40)
    assert default_buckets(tiny_config("llava")).tiles == (0, 1, 2, 4, 8)
    assert default_buckets(tiny_config("llava", max_positions=96)).prompt == (64, 96)
    assert default_buckets(tiny_config("llava", max_positions=40)).prompt == (40,)


def test_the_tiles_of_any_prompt_are_of_few_sizes():
    config = tiny_config("llava_next")  # 16 tokens a tile, 5 tiles a picture
    assert Buckets((64, 160), (0, 5, 10)).tile_sizes(160, config) == [5, 10, 20]
    assert Buckets((64,), (15,)).tile_sizes(64, config) == [15]
    places = Buckets((128, 384, 1056, 2048), None)  # each tile is one token
    assert places.tile_sizes(384, config) == [32, 288]
    assert places.tile_sizes(1056, config) == [32, 288, 960]
    assert places.tile_sizes(2048, config) == [32, 288, 488, 960, 1952, 2048]


def test_default_prompt_buckets_waste_at_most_a_quarter_at_the_mean():
    shares = padding_shares(default_buckets(tiny_config("llava", max_positions=32768)).prompt)
    assert max(shares[1:]) < 0.25  # the first size also holds the very short prompts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", ["uniform", "log-uniform"])
@pytest.mark.parametrize(
    "config",
    [
        tiny_config("llava", 336, 14, 32768),
        tiny_config("llava_next", 336, 14, 32768, USUAL),
        tiny_config("llava_next", 56, 14, 32768),
    ],
    ids=["llava-1.5", "next", "tiny-next"],
)
def test_a_hundred_pictures_touch_few_buckets(config, spread, seed):
    rng = np.random.default_rng(seed)
    buckets = default_buckets(config)
    sides = rng.uniform(32, 2000, (100, 2))
    if spread == "log-uniform":
        sides = np.exp(rng.uniform(np.log(32), np.log(2000), (100, 2)))
    programs, rows, needed = set(), 0, 0
    for height, width in sides.astype(int).tolist():
        before, after = int(rng.integers(1, 8)), int(rng.integers(8, 80))
        length = before + len(visual_rows((height, width), config)) + after
        count = num_tiles((height, width), config)
        prompt = buckets.rows_for(length, count)
        tiles = buckets.tiles_for(count, prompt)
        programs.add((prompt, tiles))
        rows, needed = rows + prompt, needed + length
    assert len(programs) <= 8
    assert 1 - needed / rows <= 0.25
