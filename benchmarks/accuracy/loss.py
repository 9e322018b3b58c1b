"""What the training minimises, as a function that JAX can differentiate.

The library's own modules, with another attention: dense, since a loop with a data-dependent number
of trips has no reverse derivative, and in two parts, prefix and segments (see packing.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.accuracy.packing import Batch
from vlcache_jax.config import LlavaConfig
from vlcache_jax.models.llama import Stream, rope_table, rotated
from vlcache_jax.models.llava import Params, bind


class Scores(NamedTuple):
    """How well a batch was done.

    Attributes:
        loss: mean cross-entropy of the answers' tokens.
        glyph_loss: that of the patches' glyphs.
        glyph_accuracy: share of the patches with a glyph that are named right.
        exact: which answers are right from their first token to the last, bool [P, Q]: just those
            that greedy decoding gives.
        asked: which questions there are, bool [P, Q].
    """

    loss: jax.Array
    glyph_loss: jax.Array
    glyph_accuracy: jax.Array
    exact: jax.Array
    asked: jax.Array


def make_loss(
    config: LlavaConfig, glyph_weight: float, dtype: Any
) -> Callable[[dict[str, Any], Batch], tuple[jax.Array, Scores]]:
    """The loss of `{"model": Params, "glyphs": [D, classes]}` on a batch.

    Args:
        config: the model.
        glyph_weight: weight of the auxiliary loss: which glyph does each patch show, by one linear
            map of its visual token. It is a part of training only.
        dtype: type of the arithmetic; the losses are float32.
    """
    model_of = bind(config)

    def loss(state: dict[str, Any], batch: Batch) -> tuple[jax.Array, Scores]:
        params: Params = jax.tree.map(lambda x: x.astype(dtype), state["model"])
        model, inputs = model_of(params), batch.inputs
        table = model.visual_rows(batch.inputs.tiles, _full_attention)
        answers = _answer_logits(model, config, batch, table)
        learned = batch.targets >= 0
        entropy = _cross_entropy(answers, batch.targets, learned)
        right = jnp.argmax(answers, axis=-1) == batch.targets
        patches = inputs.tiles.shape[0] * batch.glyphs.shape[1]
        named = table[:patches].astype(jnp.float32) @ state["glyphs"]
        shown = batch.glyphs.reshape(-1)
        glyph_entropy = _cross_entropy(named, shown, shown >= 0)
        named_right = (jnp.argmax(named, axis=-1) == shown) & (shown >= 0)
        asked = jnp.any(learned, axis=-1)
        scores = Scores(
            loss=entropy,
            glyph_loss=glyph_entropy,
            glyph_accuracy=jnp.sum(named_right) / jnp.maximum(jnp.sum(shown >= 0), 1),
            exact=jnp.all(right | ~learned, axis=-1) & asked,
            asked=asked,
        )
        return entropy + glyph_weight * glyph_entropy, scores

    return loss


def _cross_entropy(logits: jax.Array, targets: jax.Array, there: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.maximum(targets, 0)
    )
    return jnp.sum(jnp.where(there, losses, 0.0)) / jnp.maximum(jnp.sum(there), 1)


def _full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Of a tile's patches, [S, P + 1, N, H] each."""
    logits = jnp.einsum("sqnh,sknh->snqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("snqk,sknh->sqnh", weights.astype(v.dtype), v)


def _answer_logits(model: Any, config: LlavaConfig, batch: Batch, table: jax.Array) -> jax.Array:
    """Logits of the segments' tokens, [P, Q, R, V]."""
    inputs, (pictures, questions, rows) = batch.inputs, batch.tokens.shape
    visual = jnp.take(table, jnp.maximum(inputs.visual_index, 0), axis=0)
    prefix = jnp.where(inputs.visual_index[..., None] >= 0, visual, model.embed(inputs.tokens))
    segments = model.embed(batch.tokens.reshape(pictures, -1))
    prefix_rows = prefix.shape[1]
    own = jnp.tile(jnp.arange(rows), questions)
    positions = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.arange(prefix_rows), (pictures, prefix_rows)),
            inputs.length[:, None] + own,
        ],
        axis=1,
    )
    angles = rope_table(positions, config.text)
    there = jnp.arange(prefix_rows) < inputs.length[:, None]  # [P, T]

    def attend(qkv: jax.Array) -> tuple[jax.Array, None]:
        q, k, v = rotated(qkv, angles)
        first = _attend_prefix(q[:, :prefix_rows], k[:, :prefix_rows], v[:, :prefix_rows], there)
        second = _attend_segments(q, k, v, there, questions, rows)
        return jnp.concatenate([first, second], axis=1), None

    stream = Stream(jnp.concatenate([prefix, segments], axis=1), None)
    for layer in model.layers:

        def run(before: Stream, layer: Any = layer) -> Stream:
            return layer(before, attend, backend="xla")[0]

        # What a layer needs for its derivative is computed anew: eight layers' logits are large.
        stream = jax.checkpoint(run)(stream)
    hidden = stream.total()[:, prefix_rows:]
    return model.logits(hidden).reshape(pictures, questions, rows, -1)


def _attend_prefix(q: jax.Array, k: jax.Array, v: jax.Array, there: jax.Array) -> jax.Array:
    """Causal attention of the prefixes alone: q [P, T, N, H], k and v [P, T, K, H]."""
    pictures, rows, heads, width = q.shape
    grouped = q.reshape(pictures, rows, k.shape[2], -1, width)
    logits = jnp.einsum("ptkgh,pskh->pkgts", grouped, k, preferred_element_type=jnp.float32)
    seen = jnp.tri(rows, dtype=bool) & there[:, None, None, None, :]
    # Rows behind a prefix would see nothing: they see the first key, and nobody sees them.
    seen = seen | (jnp.arange(rows) == 0)
    weights = jax.nn.softmax(jnp.where(seen, logits * width**-0.5, -1e30), axis=-1)
    mixed = jnp.einsum("pkgts,pskh->ptkgh", weights.astype(v.dtype), v)
    return mixed.reshape(pictures, rows, heads, width)


def _attend_segments(
    q: jax.Array, k: jax.Array, v: jax.Array, there: jax.Array, questions: int, rows: int
) -> jax.Array:
    """Attention of each segment to the prefix and to itself: one softmax over both."""
    pictures, _, heads, width = q.shape
    prefix_rows, kv_heads = there.shape[1], k.shape[2]

    def cut(x: jax.Array, *heads: int) -> jax.Array:
        return x[:, prefix_rows:].reshape(pictures, questions, rows, *heads, width)

    q_own, k_own, v_own = cut(q, kv_heads, heads // kv_heads), cut(k, kv_heads), cut(v, kv_heads)
    k_first, v_first = k[:, :prefix_rows], v[:, :prefix_rows]
    far = jnp.einsum("pqrkgh,pskh->pqkgrs", q_own, k_first, preferred_element_type=jnp.float32)
    far = jnp.where(there[:, None, None, None, None, :], far, -1e30)
    near = jnp.einsum("pqrkgh,pqskh->pqkgrs", q_own, k_own, preferred_element_type=jnp.float32)
    near = jnp.where(jnp.tri(rows, dtype=bool), near, -1e30)
    weights = jax.nn.softmax(jnp.concatenate([far, near], axis=-1) * width**-0.5, axis=-1)
    weights = weights.astype(v.dtype)
    mixed = jnp.einsum("pqkgrs,pskh->pqrkgh", weights[..., :prefix_rows], v_first)
    mixed += jnp.einsum("pqkgrs,pqskh->pqrkgh", weights[..., prefix_rows:], v_own)
    return mixed.reshape(pictures, questions * rows, heads, width)
