"""Vision transformers that are towers: patch features of one of their layers.

CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023). SigLIP has no class token and no norm in
front of its layers; its patches have a bias.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from vlcache_jax.models.layers import DType, LayerNorm, Linear, normal, product
from vlcache_jax.models.llava.config import VisionConfig

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Full attention of q, k and v [S, P (+ 1), N, H] each: the mixed heads, in the same shape."""


class VisionLayer(nnx.Module):
    """A pre-norm transformer layer with full attention."""

    def __init__(self, config: VisionConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        self.activation = config.activation
        self.attention_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.qkv = normal(rngs, (width, 3, heads, head_dim), dtype)
        self.qkv_bias = nnx.Param(jnp.zeros((3, heads, head_dim), dtype))
        self.out = normal(rngs, (heads, head_dim, width), dtype)
        self.out_bias = nnx.Param(jnp.zeros((width,), dtype))
        self.mlp_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.up = Linear(width, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.down = Linear(config.intermediate_size, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, attend: Attend) -> jax.Array:
        """[S, P (+ 1), D] -> the same."""
        qkv = product("spd,dcnh->spcnh", self.attention_norm(x), self.qkv) + self.qkv_bias[...]
        mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + product("spnh,nhd->spd", mixed, self.out) + self.out_bias[...]
        return x + self.down(_ACTIVATIONS[self.activation](self.up(self.mlp_norm(x))))


class VisionTower(nnx.Module):
    """The whole tower, so that its parameters are the checkpoint's, one to one.

    A run stops at the feature layer: the layers behind it and `post_norm` are never computed.
    """

    def __init__(self, config: VisionConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, patch, clip = config.hidden_size, config.patch_size, config.tower == "clip"
        self.config = config
        self.patch_embedding = normal(rngs, (3, patch, patch, width), dtype)
        self.patch_bias = None if clip else nnx.Param(jnp.zeros((width,), dtype))
        self.class_embedding = normal(rngs, (width,), dtype) if clip else None
        self.position_embedding = normal(rngs, (config.num_patches + clip, width), dtype)
        self.pre_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype) if clip else None
        layers = [VisionLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        self.layers = nnx.List(layers)
        self.post_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)

    def __call__(
        self, tiles: jax.Array, num_layers: int, *, attend: Attend, group: int = 20
    ) -> jax.Array:
        """Patch features [S, P, D] of the tiles, row-major over each, without a class token.

        Args:
            tiles: normalised pixels [S, 3, image_size, image_size].
            num_layers: how many layers to run.
            attend: the attention of a layer.
            group: most tiles encoded at a time, which bounds the memory of the activations.
        """
        count = tiles.shape[0]
        size = max(n for n in range(1, min(count, group) + 1) if count % n == 0)
        if size == count:
            return self._encode(tiles, num_layers, attend)
        groups = tiles.reshape(count // size, size, *tiles.shape[1:])
        features = lax.map(lambda pixels: self._encode(pixels, num_layers, attend), groups)
        return features.reshape(count, *features.shape[2:])

    def _encode(self, tiles: jax.Array, num_layers: int, attend: Attend) -> jax.Array:
        grid, patch = self.config.grid, self.config.patch_size
        pixels = tiles.astype(self.patch_embedding.dtype)[..., : grid * patch, : grid * patch]
        pixels = pixels.reshape(-1, 3, grid, patch, grid, patch)
        patches = product("scipjq,cpqd->sijd", pixels, self.patch_embedding)
        x = patches.reshape(-1, grid * grid, self.config.hidden_size)  # [S, P, D]
        if self.patch_bias is not None:
            x = x + self.patch_bias[...]
        if self.class_embedding is not None:
            first = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.position_embedding[...]
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for layer in self.layers[:num_layers]:
            x = layer(x, attend)
        return x[:, -grid * grid :]
