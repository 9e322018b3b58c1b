"""What the training minimises, as a function that JAX can differentiate.

The library's own modules, with another attention: dense, since a loop with a data-dependent number
of trips has no reverse derivative, and in two parts, prefix and segments (see packing.py). Heads
come before rows in it: so every product is one that XLA has a fast loop for on a CPU too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.accuracy.packing import Batch
from vlcache_jax.models.families import Params, bind
from vlcache_jax.models.llama import Residual, rope_table, rotated
from vlcache_jax.models.llava.config import LlavaConfig

HIDDEN = -1e30
"""Logit of a key that is not seen."""


class Scores(NamedTuple):
    """How well a batch was done.

    Attributes:
        loss: mean cross-entropy of the answers' tokens.
        glyph_loss: that of the patches' glyphs.
        glyph_accuracy: share of the patches with a glyph that are named right.
        guide_loss: mean of -log of the attention that guided heads pay to the patch to be read.
        exact: which answers are right from their first token to the last, bool [P, Q]: just those
            that greedy decoding gives.
        asked: which questions there are, bool [P, Q].
    """

    loss: jax.Array
    glyph_loss: jax.Array
    glyph_accuracy: jax.Array
    guide_loss: jax.Array
    exact: jax.Array
    asked: jax.Array


def make_loss(
    config: LlavaConfig, dtype: Any, *, sight: bool = True, answers: bool = True
) -> Callable[[dict[str, Any], Batch, Any, Any], tuple[jax.Array, Scores]]:
    """The loss of `{"model": Params, "glyphs": [classes + 1, D]}` on a batch.

    `glyphs` has the visual token that each glyph should be, the last row for none. It takes the
    place of the visual tokens where there is no sight: so the decoder can be trained without the
    tower, on the same tasks. With sight there is an auxiliary loss: each visual token is to be that
    of its glyph, and of no other.

    The last two arguments of the loss are the weights of the auxiliary losses, which are a part of
    training only: the glyphs', and the guidance's: the first query head of every kv head of two
    middle layers is to attend to the patch that is read next.

    Args:
        config: the model.
        dtype: type of the arithmetic; the losses are float32.
        sight: run the vision tower.
        answers: run the decoder; else the tower is trained alone.
    """
    model_of = bind(config)

    def loss(
        state: dict[str, Any], batch: Batch, glyph_weight: Any, guide_weight: Any
    ) -> tuple[jax.Array, Scores]:
        params: Params = jax.tree.map(lambda x: x.astype(dtype), state["model"])
        model, ideal = model_of(params), state["glyphs"]
        shown = batch.glyphs.reshape(-1)
        there = shown >= 0
        zero = jnp.float32(0)
        glyph_entropy, named_right = zero, zero
        if sight:
            table = model.visual_rows(batch.inputs.tiles, attend_patches)
            fixed = jax.lax.stop_gradient(ideal)
            seen = table[: shown.size].astype(jnp.float32)
            named = seen @ fixed.T
            glyph_entropy = _glyph_loss(seen, named, shown, there, fixed)
            # Blank patches are many and easy: all together they count as much as the glyphs.
            glyph_entropy += _glyph_loss(
                seen, named, jnp.full_like(shown, ideal.shape[0] - 1), ~there, fixed
            )
            named_right = jnp.sum((jnp.argmax(named, axis=-1) == shown) & there)
            named_right /= jnp.maximum(jnp.sum(there), 1)
        else:
            # A row more for the newlines. The last class is what -1 means.
            table = jnp.take(ideal, jnp.append(shown, -1), axis=0, mode="wrap").astype(dtype)
        learned = batch.targets >= 0
        asked = jnp.any(learned, axis=-1)
        entropy, guide, exact = zero, zero, jnp.zeros_like(asked)
        if answers:
            logits, guide = answer_logits(model, config, batch, table)
            entropy = _cross_entropy(logits, batch.targets, learned)
            right = jnp.argmax(logits, axis=-1) == batch.targets
            exact = jnp.all(right | ~learned, axis=-1) & asked
        scores = Scores(entropy, glyph_entropy, named_right, guide, exact, asked)
        return entropy + glyph_weight * glyph_entropy + guide_weight * guide, scores

    return loss


def _cross_entropy(logits: jax.Array, targets: jax.Array, there: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.maximum(targets, 0)
    )
    return jnp.sum(jnp.where(there, losses, 0.0)) / jnp.maximum(jnp.sum(there), 1)


def _glyph_loss(
    seen: jax.Array, named: jax.Array, shown: jax.Array, there: jax.Array, ideal: jax.Array
) -> jax.Array:
    """Cross-entropy of the glyphs' names, and distance of the tokens in units of their variance."""
    distance = jnp.mean(jnp.square(seen - ideal[shown]), axis=-1) / jnp.mean(jnp.square(ideal))
    distance = jnp.sum(jnp.where(there, distance, 0.0)) / jnp.maximum(jnp.sum(there), 1)
    return _cross_entropy(named, shown, there) + distance


def attend_patches(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of a tile's patches to each other, [S, P + 1, N, H] each."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    weights = jax.nn.softmax(_dot("snqh,snkh->snqk", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return _dot("snqk,snkh->snqh", weights.astype(v.dtype), v).astype(v.dtype).swapaxes(1, 2)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def answer_logits(
    model: Any, config: LlavaConfig, batch: Batch, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of the segments' tokens, [P, Q, R, V], and the loss of the guided heads."""
    inputs, (pictures, questions, rows) = batch.inputs, batch.tokens.shape
    visual = jnp.take(table, jnp.maximum(inputs.visual_index, 0), axis=0)
    prefix = jnp.where(inputs.visual_index[..., None] >= 0, visual, model.embed(inputs.tokens))
    segments = model.embed(batch.tokens.reshape(pictures, -1))
    own = batch.begin[:, None] + jnp.tile(jnp.arange(rows), questions)
    angles = rope_table(jnp.concatenate([batch.positions, own], axis=1), config.text)
    there = jnp.arange(prefix.shape[1]) < inputs.length[:, None]  # [P, T]

    def attend(qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _attend(*rotated(qkv, angles), there, batch.sources)

    stream = Residual(jnp.concatenate([prefix, segments], axis=1), None)
    guided = []
    for layer in model.layers:
        stream, guide = layer(stream, attend, backend="xla")
        guided.append(guide)
    hidden = stream.total()[:, prefix.shape[1] :]
    middle = len(guided) // 2
    guide = jnp.mean(jnp.stack(guided[max(middle - 1, 0) : middle + 1]))
    return model.logits(hidden).reshape(pictures, questions, rows, -1), guide


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, there: jax.Array, sources: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of the prefixes to themselves and of the segments to both, and the guidance's loss.

    Args:
        q: [P, T + Q * R, N, H].
        k: [P, T + Q * R, K, H].
        v: likewise.
        there: which rows of the prefixes there are, [P, T].
        sources: see `packing.Batch`, [P, Q, R].
    """
    (pictures, total, heads, width), prefix_rows = q.shape, there.shape[1]
    kv_heads = k.shape[2]
    questions, rows = sources.shape[1:]
    q = (q * width**-0.5).reshape(pictures, total, kv_heads, -1, width)
    q = jnp.moveaxis(q, 1, 3)  # [P, K, G, T + Q * R, H]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def cut(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, rest = x[..., :prefix_rows, :], x[..., prefix_rows:, :]
        return first, rest.reshape(*rest.shape[:-2], questions, rows, width)

    (q_first, q_own), (k_first, k_own), (v_first, v_own) = map(cut, (q, k, v))
    first = _attend_prefix(q_first, k_first, v_first, there)

    q_own = q_own.swapaxes(2, 3).reshape(pictures, kv_heads, questions, -1, width)  # G * R rows
    far = _dot("pkqmh,pksh->pkqms", q_own, k_first)
    far = jnp.where(there[:, None, None, None], far, HIDDEN)
    near = _dot("pkqmh,pkqsh->pkqms", q_own, k_own)
    near = jnp.where(jnp.tile(jnp.tri(rows, dtype=bool), (heads // kv_heads, 1)), near, HIDDEN)
    weights = jax.nn.softmax(jnp.concatenate([far, near], axis=-1), axis=-1)
    far, near = weights[..., :prefix_rows], weights[..., prefix_rows:]
    mixed = _dot("pkqms,pksh->pkqmh", far.astype(v.dtype), v_first)
    mixed += _dot("pkqms,pkqsh->pkqmh", near.astype(v.dtype), v_own)
    mixed = mixed.astype(v.dtype).reshape(pictures, kv_heads, questions, -1, rows, width)
    second = mixed.transpose(0, 2, 4, 1, 3, 5).reshape(pictures, -1, heads, width)

    guided = far[:, :, :, :rows]  # of the first query head of each group, [P, K, Q, R, T]
    read = jnp.maximum(sources, 0)[:, None, ..., None]
    paid = jnp.take_along_axis(guided, read, axis=-1)[..., 0]
    asked = (sources >= 0)[:, None]
    loss = jnp.sum(jnp.where(asked, -jnp.log(paid + 1e-6), 0.0), axis=(0, 2, 3))
    guide = jnp.mean(loss) / jnp.maximum(jnp.sum(asked), 1)
    return jnp.concatenate([first, second], axis=1), guide


def _attend_prefix(q: jax.Array, k: jax.Array, v: jax.Array, there: jax.Array) -> jax.Array:
    """Causal attention of the prefixes alone: q [P, K, G, T, H], k and v [P, K, T, H]."""
    pictures, kv_heads, group, rows, width = q.shape
    logits = _dot("pkmh,pksh->pkms", q.reshape(pictures, kv_heads, -1, width), k)
    # Rows behind a prefix would see nothing: they see the first key, and nobody sees them.
    seen = jnp.tri(rows, dtype=bool) & there[:, None, :] | (jnp.arange(rows) == 0)
    seen = jnp.tile(seen, (1, group, 1))[:, None]  # [P, 1, G * T, T]
    weights = jax.nn.softmax(jnp.where(seen, logits, HIDDEN), axis=-1)
    mixed = _dot("pkms,pksh->pkmh", weights.astype(v.dtype), v).astype(v.dtype)
    return mixed.reshape(q.shape).transpose(0, 3, 1, 2, 4).reshape(pictures, rows, -1, width)
