"""Decoder layers of Llama's kind (Llama, Vicuna, Mistral, Yi, Qwen2, Qwen3): RMSNorm, RoPE, GQA,
gated MLP. Qwen2 adds a bias to queries, keys and values, Qwen3 a norm of each query and key head.

A layer does not know what a cache is, nor at which positions its tokens stand. Its caller passes
`attend`, which receives the product qkv [B, T, K, G + 2, H] and returns the mixed heads
[B, T, N, H] with whatever it wants to keep. Prefill and decode differ in that function alone;
`rotated` is its first step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from pallas_kernels.add_rms_norm.xla import rms_norm
from pallas_kernels.rope import rotate
from vlcache_jax.distributed import collectives
from vlcache_jax.models.config import RopeConfig, TextConfig
from vlcache_jax.models.layers import DType, RMSNorm, normal, product

MLP_ROWS = 8192
"""Rows of a batch that the MLP takes at a time: what is in its middle is many times as wide as what
goes in, and would be the largest thing in memory at 32k tokens. So many rows keep a GPU busy."""

Kept = TypeVar("Kept")
Attend = Callable[[jax.Array], tuple[jax.Array, Kept]]


class Residual(NamedTuple):
    """The residual stream between two layers, x + delta, added up where it is normalised.

    Attributes:
        x: [B, T, D].
        delta: the last layer's MLP, [B, T, D]; None in front of the first layer.
    """

    x: jax.Array
    delta: jax.Array | None = None

    def total(self) -> jax.Array:
        """The hidden states [B, T, D]."""
        return self.x if self.delta is None else self.x + self.delta


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [H / 2] (RoFormer, section 3.2.2).

    "llama3" is the rule published with Llama 3.1: wavelengths above
    original_max_positions / low_freq_factor are stretched by `factor`, those below
    original_max_positions / high_freq_factor are kept, with a linear ramp between.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = 1.0 / np.float32(config.theta) ** exponent
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        turns = config.original_max_positions * frequencies / (2 * math.pi)
        ramp = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = np.clip(ramp, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / config.factor
    return frequencies


def rope_table(positions: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles.

    Args:
        positions: int32 [T] or [B, T]; [3, B, T] where they have three axes (`RopeConfig.axes`), of
            which text has three times the same.
        config: the decoder.

    Returns:
        Two float32 [T, H / 2] or [B, T, H / 2].
    """
    frequencies = rope_frequencies(config.rope, config.head_dim)
    each = positions[..., None]
    if positions.ndim == 3:
        each = jnp.moveaxis(positions[np.array(config.rope.axes)], 0, -1)
    angles = each.astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotated(
    qkv: jax.Array, table: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A layer's product taken apart, query and key turned by RoPE.

    Args:
        qkv: [B, T, K, G + 2, H].
        table: `rope_table` of the positions, [T, H / 2] or [B, T, H / 2].

    Returns:
        q [B, T, N, H], k and v [B, T, K, H].
    """
    cos, sin = (part[..., None, :] for part in table)  # [..., T, 1, H / 2]
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    q = q.reshape(*qkv.shape[:2], -1, qkv.shape[-1])
    return rotate(q, cos, sin), rotate(k, cos, sin), v


class DecoderLayer(nnx.Module):
    """One pre-norm decoder layer with fused q, k, v and gate, up products.

    Attributes:
        qkv: [D, K, G + 2, H]: for each kv head its G query heads, then its key and its value.
        qkv_bias: [K, G + 2, H]; None but for Qwen2.
        q_norm, k_norm: norms over H; None but for Qwen3.
        out: [K, G, H, D].
        gate_up: [D, 2, F].
        down: [F, D].
    """

    def __init__(self, config: TextConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, kv_heads, group = config.hidden_size, config.num_kv_heads, config.group_size
        self.attention_norm = RMSNorm(width, config.rms_norm_eps, dtype=dtype)
        head_dim = config.head_dim
        self.qkv = normal(rngs, (width, kv_heads, group + 2, head_dim), dtype)
        shape = (kv_heads, group + 2, head_dim)
        self.qkv_bias = nnx.Param(jnp.zeros(shape, dtype)) if config.qkv_bias else None
        norm = partial(RMSNorm, head_dim, config.rms_norm_eps, dtype=dtype)
        self.q_norm, self.k_norm = (norm(), norm()) if config.qk_norm else (None, None)
        self.out = normal(rngs, (kv_heads, group, head_dim, width), dtype)
        self.mlp_norm = RMSNorm(width, config.rms_norm_eps, dtype=dtype)
        self.gate_up = normal(rngs, (width, 2, config.intermediate_size), dtype)
        self.down = normal(rngs, (config.intermediate_size, width), dtype)

    def __call__(
        self, stream: Residual, attend: Attend[Kept], *, backend: str | None = None
    ) -> tuple[Residual, Kept]:
        """The residual stream behind the layer, and what `attend` kept.

        Args:
            stream: in front of it.
            attend: see the module.
            backend: of the norms, see `pallas_kernels.add_rms_norm`.
        """
        x, normed = self.attention_norm.add(*stream, backend)
        batch, length, _ = x.shape
        with jax.named_scope("projections"):
            qkv = self._with_extras(product("btd,dkch->btkch", normed, self.qkv))
        mixed, kept = attend(qkv)
        # As two matrices: a product over several axes at once makes XLA transpose the kernel.
        mixed = mixed.reshape(batch, length, -1)  # [B, T, K * G * H]
        with jax.named_scope("projections"):
            out = self.out[...].reshape(mixed.shape[-1], -1)
            delta = collectives.total(product("bti,id->btd", mixed, out))
        x, normed = self.mlp_norm.add(x, delta, backend)
        return Residual(x, self.mlp(normed)), kept

    def _with_extras(self, qkv: jax.Array) -> jax.Array:
        """The product [B, T, K, G + 2, H] with its bias, or its queries and keys normalised."""
        if self.qkv_bias is not None:
            qkv += self.qkv_bias[...]
        if self.q_norm is not None and self.k_norm is not None:
            # At once: each part by itself would be launches of its own.
            head = jnp.arange(qkv.shape[-2])[:, None]
            key = qkv.shape[-2] - 2
            scale = jnp.where(head < key, self.q_norm.scale[...], self.k_norm.scale[...])
            qkv = jnp.where(head <= key, rms_norm(qkv, scale, self.q_norm.eps), qkv)
        return qkv

    @jax.named_scope("mlp")
    def mlp(self, x: jax.Array) -> jax.Array:
        """The gated MLP, [B, T, D] -> [B, T, D]; a long prompt goes through it part by part."""
        batch, length, _ = x.shape
        rows = max(1, MLP_ROWS // batch)
        if length <= rows:
            return self._mlp(x)
        parts: list[jax.Array] = []
        for start in range(0, length, rows):
            parts.append(self._mlp(x[:, start : start + rows]))
            # One after the other, or all of them are in memory at once. In a loop of XLA's each
            # layer's weights would be copied in front of it.
            x, parts[-1] = lax.optimization_barrier((x, parts[-1]))
        return jnp.concatenate(parts, axis=1)

    def _mlp(self, x: jax.Array) -> jax.Array:
        gate_up = product("btd,dcf->btcf", x, self.gate_up)
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return collectives.total(product("btf,fd->btd", hidden, self.down))


class Embedding(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, config: TextConfig, *, dtype: DType, rngs: nnx.Rngs):
        self.vocab_size = config.vocab_size
        self.embedding = normal(rngs, (config.vocab_size, config.hidden_size), dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] int32 -> [B, T, D]; ids outside the vocabulary are clamped, never read wild."""
        table, parts = self.embedding[...], collectives.shards()
        if parts == 1:
            return jnp.take(table, tokens, axis=0, mode="clip")
        row = jnp.clip(tokens, 0, self.vocab_size - 1) - collectives.number() * len(table)
        mine = (row >= 0) & (row < len(table))
        found = jnp.take(table, row, axis=0, mode="clip")
        return collectives.total(jnp.where(mine[..., None], found, 0))


class Head(nnx.Module):
    """Final norm and output projection [D, V]; a tied model has no projection of its own."""

    def __init__(self, config: TextConfig, *, dtype: DType, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.vocab_size = config.vocab_size
        shape = (config.hidden_size, config.vocab_size)
        self.kernel = None if config.tie_embeddings else normal(rngs, shape, dtype)

    @jax.named_scope("head")
    def __call__(self, x: jax.Array, embedding: Embedding) -> jax.Array:
        """[..., D] -> logits [..., V] in float32."""
        x = self.norm(x)
        if self.kernel is None:
            logits = product("...d,vd->...v", x, embedding.embedding, out=jnp.float32)
        else:
            logits = product("...d,dv->...v", x, self.kernel, out=jnp.float32)
        if collectives.shards() == 1:
            return logits
        return collectives.gathered(logits, logits.ndim - 1)[..., : self.vocab_size]
