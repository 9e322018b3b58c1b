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
from vlcache_jax.models.llama import Attend, rope_table, rotated
from vlcache_jax.models.llava.config import LlavaConfig

HIDDEN = -1e30
"""Logit of a key that is not seen."""

BLOCK = 256
"""Rows of a prefix that attend at once."""


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


class Weights(NamedTuple):
    """What the loss takes beside a batch, float32 scalars.

    Attributes:
        glyphs: weight of the auxiliary loss that names the glyphs.
        guide: of the one that leads the attention.
        noise: standard deviation of what is added to the ideal visual tokens, as a share of theirs.
        seed: of that noise, int32.
    """

    glyphs: Any = 0.0
    guide: Any = 0.0
    noise: Any = 0.0
    seed: Any = 0


class Bound(NamedTuple):
    """A model inside a traced function, as the loss sees it.

    Attributes:
        visual_rows: tiles to the table of visual rows.
        ideal: the visual token that each glyph should be, the last row for none, [classes + 1, D].
        name: the glyphs' logits of visual tokens, [n, D] and `ideal` to [n, classes + 1].
        newline: the visual token at the end of a row of patches, [D].
        embed: token ids to rows, [..., D].
        decode: runs the layers: rows [B, T, D] and an attention to the hidden states, and the loss
            of the guided heads.
        logits: of hidden states.
    """

    visual_rows: Callable[[jax.Array], jax.Array]
    ideal: jax.Array
    name: Callable[[jax.Array, jax.Array], jax.Array]
    newline: jax.Array
    embed: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array, Attend], tuple[jax.Array, jax.Array]]
    logits: Callable[[jax.Array], jax.Array]


def make_loss(
    config: LlavaConfig,
    bind: Callable[[Any, Any], Bound],
    *,
    sight: bool = True,
    answers: bool = True,
) -> Callable[[Any, Any, Batch, Weights], tuple[jax.Array, Scores]]:
    """The loss of what is learned on a batch, given what is not: (learned, fixed, batch, weights).

    The ideal tokens take the place of the visual ones where there is no sight: so the decoder can
    be trained without the tower, on the same tasks. With sight there is an auxiliary loss: each
    visual token is to be that of its glyph, and of no other. The other auxiliary loss is the
    guidance's: the first query head of every kv head of two middle layers is to attend to the patch
    that is read next. Both are a part of training only.

    Args:
        config: the model.
        bind: makes the model of what is learned and what is not.
        sight: run the vision tower.
        answers: run the decoder; else the tower is trained alone.
    """

    def loss(learned: Any, fixed: Any, batch: Batch, weights: Weights) -> tuple[jax.Array, Scores]:
        model = bind(learned, fixed)
        shown = batch.glyphs.reshape(-1)
        there = shown >= 0
        zero = jnp.float32(0)
        glyph_entropy, named_right = zero, zero
        if sight:
            table = model.visual_rows(batch.inputs.tiles)
            ideal = jax.lax.stop_gradient(model.ideal)
            seen = table[: shown.size].astype(jnp.float32)
            named = model.name(seen, ideal)
            glyph_entropy = _glyph_loss(seen, named, shown, there, ideal)
            # Blank patches are many and easy: all together they count as much as the glyphs.
            glyph_entropy += _glyph_loss(
                seen, named, jnp.full_like(shown, ideal.shape[0] - 1), ~there, ideal
            )
            named_right = jnp.sum((jnp.argmax(named, axis=-1) == shown) & there)
            named_right /= jnp.maximum(jnp.sum(there), 1)
        else:
            table = jnp.take(model.ideal, shown, axis=0, mode="wrap")  # the last class is -1
            table = jnp.concatenate([table, model.newline[None]])
            drawn = jax.random.normal(jax.random.key(weights.seed), table.shape, table.dtype)
            scale = weights.noise * jnp.sqrt(jnp.mean(jnp.square(model.ideal)))
            table += scale.astype(table.dtype) * drawn
        asked = jnp.any(batch.targets >= 0, axis=-1)
        entropy, guide, exact = zero, zero, jnp.zeros_like(asked)
        if answers:
            logits, guide = answer_logits(model, config, batch, table)
            targets = jnp.take_along_axis(batch.targets, batch.answers, axis=-1)
            learned_here = targets >= 0
            entropy = _cross_entropy(logits, targets, learned_here)
            right = jnp.argmax(logits, axis=-1) == targets
            exact = jnp.all(right | ~learned_here, axis=-1) & asked
        scores = Scores(entropy, glyph_entropy, named_right, guide, exact, asked)
        return entropy + weights.glyphs * glyph_entropy + weights.guide * guide, scores

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
    model: Bound, config: LlavaConfig, batch: Batch, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of the answers' tokens, [P, Q, A, V], and the loss of the guided heads."""
    inputs, (pictures, questions, rows) = batch.inputs, batch.tokens.shape
    visual = jnp.take(table, jnp.maximum(inputs.visual_index, 0), axis=0)
    prefix = jnp.where(inputs.visual_index[..., None] >= 0, visual, model.embed(inputs.tokens))
    segments = model.embed(batch.tokens.reshape(pictures, -1))
    own = batch.begin[:, None] + jnp.tile(jnp.arange(rows), questions)
    angles = rope_table(jnp.concatenate([batch.positions, own], axis=1), config.text)
    there = jnp.arange(prefix.shape[1]) < inputs.length[:, None]  # [P, T]
    shares = jnp.where(there, jnp.log(batch.counts), HIDDEN)

    def attend(qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _attend(*rotated(qkv, angles), shares, batch.sources)

    hidden, guide = model.decode(jnp.concatenate([prefix, segments], axis=1), attend)
    hidden = hidden[:, prefix.shape[1] :].reshape(pictures, questions, rows, -1)
    said = jnp.take_along_axis(hidden, batch.answers[..., None], axis=2)
    return model.logits(said), guide


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, shares: jax.Array, sources: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of the prefixes to themselves and of the segments to both, and the guidance's loss.

    One picture and kv head at a time, block by block: what they attend with is never there as a
    whole, which would not fit a CPU's cache, and is made again on the way back.

    Args:
        q: [P, T + Q * R, N, H].
        k: [P, T + Q * R, K, H].
        v: likewise.
        shares: logarithm of how many rows each of the prefixes' stands for, `HIDDEN` of those that
            are not there, [P, T].
        sources: see `packing.Batch`, [P, Q, R].
    """
    (pictures, total, heads, width), kv_heads = q.shape, k.shape[2]
    q = (q * width**-0.5).reshape(pictures, total, kv_heads, -1, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(-1, heads // kv_heads, total, width)
    k, v = (x.swapaxes(1, 2).reshape(-1, total, width) for x in (k, v))
    shares, sources = (jnp.repeat(x, kv_heads, axis=0) for x in (shares, sources))
    one = jax.checkpoint(lambda each: _attend_group(*each))
    mixed, paid = jax.lax.map(one, (q, k, v, shares, sources))

    sources, paid = (x.reshape(pictures, kv_heads, *x.shape[1:]) for x in (sources, paid))
    asked = sources >= 0
    loss = jnp.sum(jnp.where(asked, -jnp.log(paid + 1e-6), 0.0), axis=(0, 2, 3))
    guide = jnp.mean(loss) / jnp.maximum(jnp.sum(asked[:, 0]), 1)
    mixed = mixed.reshape(pictures, heads, total, width)
    return mixed.swapaxes(1, 2), guide


def _attend_group(
    q: jax.Array, k: jax.Array, v: jax.Array, shares: jax.Array, sources: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One picture's query heads of one kv head: q [G, T + Q * R, H], k and v [T + Q * R, H].

    Returns:
        What they mix, like q; the weight that the first of them gives each source, [Q, R].
    """
    (group, _, width), rows, (questions, length) = q.shape, shares.shape[0], sources.shape
    mixed = []
    for first in range(0, rows, BLOCK):
        end = min(first + BLOCK, rows)
        own = q[:, first:end].reshape(-1, width)
        logits = _dot("mh,sh->ms", own, k[:end]).reshape(group, -1, end)
        # Rows behind a prefix would see nothing: they see the first key, and nobody sees them.
        seen = jnp.where(jnp.arange(end) == 0, 0.0, shares[:end])
        logits += jnp.where(jnp.tri(end - first, end, first, dtype=bool), seen, HIDDEN)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(-1, end)
        mixed.append(_dot("ms,sh->mh", weights, v[:end]).reshape(group, -1, width))

    q, k_own, v_own = (
        x[..., rows:, :].reshape(*x.shape[:-2], questions, length, width) for x in (q, k, v)
    )
    q = q.swapaxes(0, 1).reshape(questions, -1, width)  # G * R rows of each question
    far = _dot("qmh,sh->qms", q, k[:rows]) + shares
    near = _dot("qmh,qsh->qms", q, k_own)
    near = jnp.where(jnp.tile(jnp.tri(length, dtype=bool), (group, 1)), near, HIDDEN)
    # One softmax over both, which are not put together: that would copy them.
    top = jnp.maximum(far.max(axis=-1, keepdims=True), near.max(axis=-1, keepdims=True))
    far, near = (jnp.exp(x - jax.lax.stop_gradient(top)) for x in (far, near))
    whole = far.sum(axis=-1, keepdims=True) + near.sum(axis=-1, keepdims=True)
    far, near = far / whole, near / whole
    answers = _dot("qms,sh->qmh", far.astype(v.dtype), v[:rows])
    answers += _dot("qms,qsh->qmh", near.astype(v.dtype), v_own)
    answers = answers.reshape(questions, group, length, width).swapaxes(0, 1)
    mixed.append(answers.reshape(group, -1, width))

    read = jnp.maximum(sources, 0)[..., None]
    paid = jnp.take_along_axis(far[:, :length], read, axis=-1)[..., 0]
    return jnp.concatenate(mixed, axis=1).astype(v.dtype), paid
