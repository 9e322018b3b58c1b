"""`ModelInputs`: a batch of prompts as arrays, all that a model sees of them."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = Any
"""numpy as the processor makes it, `jax.Array` on a device and inside a traced function."""


CONTEXT = -2
"""In `visual_index`: a token of the text that the question is about."""


class Interpolation(NamedTuple):
    """Visual tokens as weighted sums of C rows of the table of visual features.

    Attributes:
        rows: int32 `[B, T, C]`, counted as in `ModelInputs.visual_index`; 0 for all other tokens.
        weights: float32 `[B, T, C]`.
    """

    rows: Array
    weights: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelInputs:
    """A batch of prompts, padded to buckets; a pytree that any jitted function accepts.

    B prompts, T = prompt bucket, S = tile bucket of the whole batch, P = patches of a tile.

    Attributes:
        tokens: int32 `[B, T]`: prompt ids, the image or video token once per visual token; 0 after
            the end.
        length: int32 `[B]`: m, the true length of each prompt.
        visual_index: int32 `[B, T]`: -1 for text and padding, `CONTEXT` for the text of a
            context, which a cache method takes for visual tokens; else the row of the table of
            visual features: tile * P + patch, or S * P for a newline; the first where a token is
            interpolated.
        tiles: float32 `[S, 3, image_size, image_size]`: normalised pixels, zeros after the last
            tile; S = 0 where there is no image. `[S, frames, 3, image_size, image_size]` where a
            tile spans frames of a video, which a picture's are alike.
        positions: int32 `[3, B, T]`: where each token stands in time, down and across, for a model
            whose rotary positions have three axes, 0 after the end; None for 0, 1, 2, ...
        interpolation: what visual tokens are, of a family whose grids are scaled down; None where
            each is the row that `visual_index` says.
        layout: int32 `[S, 4]`: number of each tile's picture and of its window in the batch, its
            row and column in the picture; -1 after the last tile. Pictures of a video, which it
            has in time, are counted like others. For a tower that takes the tiles
            of all pictures as one sequence; None for others, and where there is no image.
    """

    tokens: Array
    length: Array
    visual_index: Array
    tiles: Array
    positions: Array | None = None
    interpolation: Interpolation | None = None
    layout: Array | None = None

    @property
    def without_tiles(self) -> "ModelInputs":
        """The same prompts, without the pictures."""
        return replace(self, tiles=self.tiles[:0], layout=None)

    def filled(self, count: int) -> "ModelInputs":
        """The same prompts, the last one repeated until they are so many; on the host."""
        number = np.minimum(np.arange(count), len(self.length) - 1)
        interpolation = self.interpolation
        return replace(
            self,
            tokens=self.tokens[number],
            length=self.length[number],
            visual_index=self.visual_index[number],
            positions=None if self.positions is None else self.positions[:, number],
            interpolation=interpolation and Interpolation(*(x[number] for x in interpolation)),
        )

    def padded(self, rows: int, length: Array | None = None) -> "ModelInputs":
        """The same prompts, or their first tokens, in another bucket; arrays on the host.

        Args:
            rows: of the bucket.
            length: how many tokens they then have, int32 `[B]`; all of them by default.
        """
        length = np.asarray(self.length if length is None else length)
        inside = np.arange(rows, dtype=np.int32) < length[:, None]  # [B, rows]

        def fit(array: Array, axis: int = 1, empty: int = 0) -> Array:
            count = min(rows, array.shape[axis])
            array = np.take(array, np.arange(count), axis)
            widths = [(0, rows - count if each == axis else 0) for each in range(array.ndim)]
            behind = (1,) * (array.ndim - axis - 1)
            return np.where(inside.reshape(*inside.shape, *behind), np.pad(array, widths), empty)

        return replace(
            self,
            tokens=fit(self.tokens),
            length=length,
            visual_index=fit(self.visual_index, empty=-1),
            positions=None if self.positions is None else fit(self.positions, 2),
            interpolation=self.interpolation and Interpolation(*map(fit, self.interpolation)),
        )

    def part(self, position: jax.Array) -> "ModelInputs":
        """The rows of each prompt at some positions, int32 `[B, W]`, without the tiles."""

        def take(rows: Array, axis: int = 1) -> jax.Array:
            behind = (1,) * (rows.ndim - axis - 1)
            index = position.reshape(*(1,) * (axis - 1), *position.shape, *behind)
            return jnp.take_along_axis(jnp.asarray(rows), index, axis=axis)

        return replace(
            self.without_tiles,
            tokens=take(self.tokens),
            visual_index=take(self.visual_index),
            positions=None if self.positions is None else take(self.positions, 2),
            interpolation=self.interpolation and Interpolation(*map(take, self.interpolation)),
        )

    def next_position(self) -> Array:
        """Where the first token of each answer stands, int32 `[B]`: behind the prompt's last one.

        That is not behind all of them where a video is long: transformers' `generate` goes on so.
        """
        if self.positions is None:
            return self.length
        last = self.positions[:, np.arange(len(self.length)), self.length - 1]  # [3, B]
        return last.max(0) + 1
