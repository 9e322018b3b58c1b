"""The pool's arithmetic."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.method import Observation
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.cache.state import BLOCK, Pool, round_up


@given(st.integers(0, 10**7), st.integers(1, 1000))
def test_round_up(count, block):
    rounded = round_up(count, block)
    assert rounded % block == 0
    assert max(count, 1) <= rounded < count + block + (count == 0)


@pytest.mark.parametrize(("layers", "rows"), [(1, 1), (2, 64), (32, 2048), (60, 3072)])
def test_the_full_pool_has_room_for_every_layer(layers, rows):
    capacity = FullCache().limit.capacity(layers, rows)
    assert capacity >= layers * rows
    assert capacity - layers * rows < BLOCK
    visual = jnp.zeros((2, rows), bool).at[:, 0].set(True)
    prompt = Prompt(jnp.array([rows, 1]), visual, layers, Budget(share=1.0).data)
    buffer = jnp.zeros((2, 1, capacity, 1))
    method = FullCache()
    pool = method.build(buffer, buffer, method.plan(Observation(), prompt), prompt)
    assert isinstance(pool, Pool)
    assert pool.k is buffer
    assert pool.most == min(-(-rows // BLOCK) * BLOCK, capacity)  # whole blocks
    assert pool.offset.tolist() == [[layer * rows for layer in range(layers)]] * 2
    assert pool.length.tolist() == [[rows] * layers, [1] * layers]
    assert pool.visual.tolist() == [[1.0] * layers] * 2
