"""The vision transformer of Qwen2.5-VL (Bai et al. 2025, section 2.1), and what Qwen3-VL's shares.

All pictures of a batch are one sequence of patches, window by window: `layout` makes their order.
A video is as many pictures as it has steps, each of two frames. Most layers attend inside windows,
the others inside pictures. Nothing depends on how many pictures there are or on their sizes, but
the length of the sequence.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from pallas_kernels.rope import rotate
from vlcache_jax.models.layers import DType, Linear, RMSNorm, normal, product
from vlcache_jax.models.qwen_vl.config import FRAMES, TowerConfig, VisionConfig

EPS = 1e-6  # of every norm of the tower

GROUP = 4096
"""Patches that are worked on at a time wherever they need no others but those near them, which
bounds the memory of the activations."""

Heads = tuple[jax.Array, jax.Array, jax.Array]
"""Queries, keys and values [M, N, H] each."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""Full attention of q, k, v [1, M, N, H] each, of which no row at or beyond the length, int32 [1],
is read: the mixed heads [1, M, N, H]."""


class VisionLayer(nnx.Module):
    """A pre-norm transformer layer; a family's own has an `mlp`.

    Args:
        norm: makes one of its norms.
    """

    def __init__(
        self,
        config: TowerConfig,
        norm: Callable[[], nnx.Module],
        *,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        width, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        self.attention_norm = norm()
        self.qkv = normal(rngs, (width, 3, heads, head_dim), dtype)
        self.qkv_bias = nnx.Param(jnp.zeros((3, heads, head_dim), dtype))
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()

    def __call__(
        self,
        x: jax.Array,
        table: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        group: int = GROUP,
    ) -> jax.Array:
        """[M, D] -> [M, D].

        Args:
            x: the patches.
            table: cosine and sine of their angles, [M, 1, H / 2] each.
            attend: q, k and v [M, N, H] -> the mixed heads [M, N, H].
            group: patches that go through what follows the attention at a time.
        """
        return in_groups(self.behind, x, attend(*self.heads(x, *table)), group=group)

    def heads(self, x: jax.Array, *table: jax.Array) -> Heads:
        """Queries, keys and values of the patches, turned by their angles."""
        qkv = product("md,dcnh->mcnh", self.attention_norm(x), self.qkv) + self.qkv_bias[...]
        return rotate(qkv[:, 0], *table), rotate(qkv[:, 1], *table), qkv[:, 2]

    def behind(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """What follows the attention: patches [M, D] and their mixed heads [M, N, H] -> [M, D]."""
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.mlp(self.mlp_norm(x))

    @abstractmethod
    def mlp(self, x: jax.Array) -> jax.Array:
        """[M, D] -> [M, D]."""


class GatedLayer(VisionLayer):
    """Qwen2.5-VL's: RMSNorm and a gated MLP."""

    def __init__(self, config: TowerConfig, *, dtype: DType, rngs: nnx.Rngs):
        width, wide = config.hidden_size, config.intermediate_size
        super().__init__(config, partial(RMSNorm, width, EPS, dtype=dtype), dtype=dtype, rngs=rngs)
        self.gate = Linear(width, wide, dtype=dtype, rngs=rngs)
        self.up = Linear(width, wide, dtype=dtype, rngs=rngs)
        self.down = Linear(wide, width, dtype=dtype, rngs=rngs)

    def mlp(self, x: jax.Array) -> jax.Array:
        """[M, D] -> [M, D]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class PatchTower(nnx.Module):
    """Patches, their angles, and layers: what a family's tower is made of.

    Args:
        layer: makes one of its layers.
    """

    def __init__(
        self,
        config: TowerConfig,
        layer: Callable[..., VisionLayer],
        *,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embedding = normal(rngs, (3, FRAMES, patch, patch, width), dtype)
        layers = [layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        self.layers = nnx.List(layers)

    def patches(self, tiles: jax.Array, layout: jax.Array) -> jax.Array:
        """What the first layer gets of the tiles, [M, D], without a bias or positions.

        Args:
            tiles: normalised pixels [S, 3, side, side] of pictures, or of frames
                [S, FRAMES, 3, side, side]; rows that are padding are not read.
            layout: int32 [S, 4], see `ModelInputs`.
        """
        merge, patch = self.config.merge_size, self.config.patch_size
        inside = (layout[:, 0] >= 0).reshape(-1, *[1] * (tiles.ndim - 1))
        pixels = jnp.where(inside, tiles, 0).astype(self.patch_embedding.dtype)
        if tiles.ndim == 4:
            pixels = pixels.reshape(-1, 3, 1, merge, patch, merge, patch)
            pixels = jnp.broadcast_to(pixels, (*pixels.shape[:2], FRAMES, *pixels.shape[3:]))
        else:
            pixels = pixels.reshape(-1, FRAMES, 3, merge, patch, merge, patch).swapaxes(1, 2)
        patches = product("scfipjq,cfpqd->sijd", pixels, self.patch_embedding)
        return patches.reshape(-1, self.config.hidden_size)

    def each_patch(self, of_tiles: jax.Array) -> jax.Array:
        """A column of the layout [S] for each patch, [M]."""
        return jnp.repeat(of_tiles, self.config.merge_size**2)

    def places(self, layout: jax.Array) -> jax.Array:
        """Row and column of each patch in its picture, int32 [S, merge * merge, 2]."""
        merge = self.config.merge_size
        corner = merge * layout[:, None, 2:]  # [S, 1, 2]
        return corner + np.indices((merge, merge), np.int32).reshape(2, -1).T

    def rope_table(self, layout: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine of each patch's angles, float32 [M, 1, H / 2]: down, then across."""
        count = self.config.head_dim // 4
        frequencies = self.config.rope_theta ** -(np.arange(count, dtype=np.float32) / count)
        angles = self.places(layout)[..., None].astype(jnp.float32) * frequencies
        angles = angles.reshape(-1, 1, 2 * count)
        return jnp.cos(angles), jnp.sin(angles)


class VisionTower(PatchTower):
    """Qwen2.5-VL's tower in front of the merger, which is the model's projector."""

    config: VisionConfig

    def __init__(self, config: VisionConfig, *, dtype: DType, rngs: nnx.Rngs):
        super().__init__(config, GatedLayer, dtype=dtype, rngs=rngs)

    def __call__(
        self, tiles: jax.Array, layout: jax.Array, *, attend: Attend, group: int = GROUP
    ) -> jax.Array:
        """Patch features [S, merge * merge, D] of the tiles.

        Args:
            tiles: normalised pixels [S, 3, side, side] of pictures, or of frames
                [S, FRAMES, 3, side, side]; rows that are padding are not read.
            layout: int32 [S, 4], see `ModelInputs`.
            attend: full attention.
            group: see `GROUP`.
        """
        merge, full = self.config.merge_size, self.config.full_layers
        picture, window = (self.each_patch(layout[:, i]) for i in (0, 1))
        x, table = self.patches(tiles, layout), self.rope_table(layout)
        most = (merge * self.config.window_side) ** 2

        def near(x: jax.Array, window: jax.Array, *table: jax.Array) -> jax.Array:
            for layer in run:
                x = layer.behind(x, window_attention(layer.heads(x, *table), window, most))
            return x

        for whole, numbered in groupby(enumerate(self.layers), lambda pair: pair[0] in full):
            run = [layer for _, layer in numbered]
            if not whole:  # of a window all rows are within `most` of each other
                x = in_groups(near, x, window, *table, group=group, halo=most)
                continue
            for layer in run:
                x = layer(x, table, lambda *heads: picture_attention(heads, picture, attend), group)
        return x.reshape(len(tiles), merge * merge, -1)


def in_groups(
    function: Callable[..., jax.Array],
    x: jax.Array,
    *more: jax.Array,
    group: int,
    halo: int = 0,
) -> jax.Array:
    """A function of rows, some of them at a time.

    The last group starts earlier, where it would reach past the end.

    Args:
        function: x [M, ...] and arrays of as many rows -> the same shape; what it makes of a row
            depends on rows that are at most `halo` away.
        x: the first argument.
        more: the other ones.
        group: rows of a group.
        halo: rows in front of a group and behind it that it is computed with.
    """
    rows, wide = x.shape[0], group + 2 * halo
    if rows <= wide:
        return function(x, *more)

    def one(index: jax.Array, out: jax.Array) -> jax.Array:
        first = jnp.minimum(index * group, rows - group)
        start = jnp.clip(first - halo, 0, rows - wide)
        parts = (lax.dynamic_slice_in_dim(part, start, wide) for part in (x, *more))
        own = lax.dynamic_slice_in_dim(function(*parts), first - start, group)
        return lax.dynamic_update_slice_in_dim(out, own, first, axis=0)

    return lax.fori_loop(0, -(-rows // group), one, x)


@jax.named_scope("window_attention")
def window_attention(heads: Heads, window: jax.Array, most: int) -> jax.Array:
    """Attention of each row to the rows of its window.

    Rows are cut into blocks as long as the largest window: a window lies in two neighbours at most,
    so that each block looks at itself and at those in front and behind, whatever the windows are.

    Args:
        heads: q, k and v [M, N, H], finite.
        window: int32 [M]: equal for the rows of a window, which follow each other.
        most: rows of the largest window.

    Returns:
        [M, N, H]; finite for rows of longer windows, but without a meaning.
    """
    rows = window.shape[0]
    blocks = -(-rows // most)
    end = (blocks + 1) * most - rows

    def around(x: jax.Array, fill: int = 0) -> jax.Array:
        """[M, ...] -> [blocks, 3 * most, ...]"""
        wide = [(most, end)] + [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, wide, constant_values=fill).reshape(-1, most, *x.shape[1:])
        return jnp.concatenate([x[:-2], x[1:-1], x[2:]], axis=1)

    q, k, v, near = *map(around, heads), around(window, -2)
    q, own = q[:, most : 2 * most], near[:, most : 2 * most]
    logits = product("bqnh,bknh->bnqk", q, k, jnp.float32) / math.sqrt(q.shape[-1])
    visible = own[:, None, :, None] == near[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1).astype(v.dtype)
    mixed = product("bnqk,bknh->bqnh", weights, v)
    return mixed.reshape(-1, *mixed.shape[2:])[:rows]


@jax.named_scope("picture_attention")
def picture_attention(heads: Heads, picture: jax.Array, attend: Attend) -> jax.Array:
    """Attention of each row to the rows of its picture, one picture after the other.

    Each is moved to the front, where `attend` takes it for a sequence with padding.

    Args:
        heads: q, k and v [M, N, H].
        picture: int32 [M]: the number of each row's picture from 0 on, whose rows follow each
            other; -1 for rows that are none's, whose result is 0.
        attend: full attention.
    """

    def one(index: jax.Array, mixed: jax.Array) -> jax.Array:
        own = picture == index
        first, length = lax.argmax(own, 0, jnp.int32), jnp.sum(own, dtype=jnp.int32)
        q, k, v = (jnp.roll(x, -first, axis=0)[None] for x in heads)
        part = jnp.roll(attend(q, k, v, length[None])[0], first, axis=0)
        return jnp.where(own[:, None, None], part, mixed)

    # Tied to q: else XLA makes the zeros of all layers at once, before the first one.
    q, zero = lax.optimization_barrier((heads[0], jnp.zeros((), heads[0].dtype)))
    return lax.fori_loop(0, jnp.max(picture) + 1, one, jnp.full_like(q, zero))
