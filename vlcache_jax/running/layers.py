"""The layers of a model over prompts and over single tokens, whatever attends and is kept."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.rows import NewToken, Tail
from vlcache_jax.cache.method import AnyPool
from vlcache_jax.models.decoder import Decoder, Embedded
from vlcache_jax.models.llama import Attend, Kept, Residual

Keep = Callable[[int, Any, Residual, Residual], Residual]
"""Handed what a layer's attention kept, and the stream in front of it and behind it: gives the
latter back."""


def run_rows(
    model: Decoder,
    rows: Embedded,
    visual_index: jax.Array,
    attend_layer: Callable[[int], Attend[Any]],
    backend: str | None,
    keep: Keep | None = None,
) -> jax.Array:
    """Run rows of prompts: their final hidden states [B, T, D].

    Args:
        model: the model.
        rows: what its first layer is given.
        visual_index: of the rows, see `ModelInputs`.
        attend_layer: the attention of each layer.
        backend: of the norms.
        keep: called behind each layer.
    """
    stream = Residual(rows.x)
    for index, layer in enumerate(model.layers):
        entering = stream
        stream, kept = layer(stream, attend_layer(index), backend=backend)
        stream = rows.behind(index, stream, visual_index)
        if keep is not None:
            stream = keep(index, kept, entering, stream)
    return stream.total()


def run_token(
    model: Decoder,
    token: jax.Array,
    attend_layer: Callable[[int], Attend[Kept]],
    backend: str | None,
) -> tuple[jax.Array, list[Kept]]:
    """Run one token per sequence, int32 [B]: its hidden states [B, D], and what each layer kept."""
    stream, kept = Residual(model.embed(token[:, None])), []
    for index, layer in enumerate(model.layers):
        stream, own = layer(stream, attend_layer(index), backend=backend)
        kept.append(own)
    return stream.total()[:, 0], kept


@jax.named_scope("decode_attention")
def attend_cache(
    qkv: jax.Array,
    table: tuple[jax.Array, jax.Array],
    pool: AnyPool,
    segment: Any,
    tail: Tail,
    backend: str | None,
    together: bool = True,
) -> tuple[jax.Array, Tail]:
    """`Pool.append_and_attend`, of a product and a table with the axis of the one token."""
    new = NewToken(qkv[:, 0], table[0][:, 0], table[1][:, 0])
    mixed, tail = pool.append_and_attend(new, segment, tail, backend, together)
    return mixed[:, None], tail
