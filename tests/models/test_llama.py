"""The decoder layer: a long prompt's MLP is done part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlcache_jax.models import llama
from vlcache_jax.models.config import TextConfig
from vlcache_jax.models.llama import DecoderLayer

CONFIG = TextConfig(
    vocab_size=8, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1, head_dim=8
)


@pytest.mark.parametrize(
    ("batch", "length", "rows"), [(1, 1, 4), (1, 4, 4), (1, 5, 4), (2, 13, 4), (3, 7, 2), (1, 9, 1)]
)
def test_the_mlp_in_parts_is_the_mlp(monkeypatch, batch, length, rows):
    layer = DecoderLayer(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (batch, length, 16))
    gate, up = np.moveaxis(np.einsum("btd,dcf->btcf", x, layer.gate_up[...]), 2, 0)
    expected = np.einsum("btf,fd->btd", gate / (1 + np.exp(-gate)) * up, layer.down[...])
    monkeypatch.setattr(llama, "MLP_ROWS", rows)
    np.testing.assert_allclose(layer.mlp(x), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(layer.mlp)(x), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [4, 64])
def test_no_more_rows_are_widened_at_a_time(monkeypatch, rows):
    monkeypatch.setattr(llama, "MLP_ROWS", rows)
    layer = DecoderLayer(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    code = jax.jit(layer.mlp).lower(jnp.zeros((2, 11, 16))).as_text()
    shapes = {rows // 2: f"tensor<2x{rows // 2}x2x24xf32>", 11: "tensor<2x11x2x24xf32>"}
    assert shapes[min(rows // 2, 11)] in code
    assert (shapes[11] in code) == (rows // 2 >= 11)
