"""The decoder layer: a long prompt's MLP is done part by part."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlcache_jax.models import llama
from vlcache_jax.models.config import RopeConfig, TextConfig
from vlcache_jax.models.llama import DecoderLayer, rope_table

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


def test_angles_of_three_axes():
    """Each pair turns by the position of its own axis (Qwen2-VL, section 2.1)."""
    axes = (0, 1, 2, 1)
    config = replace(CONFIG, rope=RopeConfig(theta=100.0, axes=axes))
    positions = np.random.default_rng(0).integers(0, 50, (3, 2, 5))
    cos, sin = rope_table(jnp.asarray(positions), config)
    for pair, axis in enumerate(axes):
        angle = positions[axis] / 100.0 ** (2 * pair / 8)
        np.testing.assert_allclose(cos[..., pair], np.cos(angle), atol=1e-5)
        np.testing.assert_allclose(sin[..., pair], np.sin(angle), atol=1e-5)
    same = jnp.broadcast_to(jnp.arange(5), (3, 2, 5))
    plain = rope_table(jnp.arange(5), config)
    for ours, one in zip(rope_table(same, config), plain, strict=True):
        np.testing.assert_array_equal(ours[0], one)


@pytest.mark.parametrize("rows", [4, 64])
def test_no_more_rows_are_widened_at_a_time(monkeypatch, rows):
    monkeypatch.setattr(llama, "MLP_ROWS", rows)
    layer = DecoderLayer(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    code = jax.jit(layer.mlp).lower(jnp.zeros((2, 11, 16))).as_text()
    shapes = {rows // 2: f"tensor<2x{rows // 2}x2x24xf32>", 11: "tensor<2x11x2x24xf32>"}
    assert shapes[min(rows // 2, 11)] in code
    assert (shapes[11] in code) == (rows // 2 >= 11)
