"""The vision tower in groups of tiles."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.prefill_attention import prefill_attention
from vlcache_jax.models.llava.clip import VisionTower
from vlcache_jax.models.llava.config import VisionConfig

CONFIG = VisionConfig(32, 64, 3, 2, image_size=30, patch_size=14)  # two pixels are left over


def make():
    return VisionTower(CONFIG, dtype=np.float32, rngs=nnx.Rngs(0))


GRAPHDEF, _ = nnx.split(nnx.eval_shape(make))


@jax.jit
def init():
    return nnx.to_pure_dict(nnx.state(make()))


@pytest.fixture(scope="module")
def params():
    return init()


@partial(jax.jit, static_argnums=(2, 3))
def encode(params, tiles, num_layers, group):
    attend = partial(prefill_attention, causal=False)
    return nnx.merge(GRAPHDEF, params)(tiles, num_layers, attend=attend, group=group)


def run(params, tiles, num_layers, group=20):
    return np.asarray(encode(params, tiles, num_layers, group))


@pytest.mark.parametrize("count", [1, 7, 12])
def test_groups_give_what_all_tiles_at_once_give(params, count):
    tiles = np.random.default_rng(count).standard_normal((count, 3, 30, 30), np.float32)
    together = run(params, tiles, 2)
    assert together.shape == (count, CONFIG.num_patches, 32)
    np.testing.assert_allclose(run(params, tiles, 2, group=4), together, atol=1e-5)
    np.testing.assert_allclose(run(params, tiles[-1:], 2), together[-1:], atol=1e-5)


def test_layers_behind_the_feature_layer_do_not_matter(params):
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["layers"][2]["up"]["kernel"] += 1.0
    changed["post_norm"]["scale"] += 1.0
    tiles = np.ones((1, 3, 30, 30), np.float32)
    np.testing.assert_array_equal(run(params, tiles, 2), run(changed, tiles, 2))
    assert not np.array_equal(run(params, tiles, 3), run(changed, tiles, 3))
