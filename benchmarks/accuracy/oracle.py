"""The ceiling of every choice: keep what the full cache's own answer really attends to.

prompt        0 . . . . . . . . . m     K and V as the prefill left them
answer                               [ 0 . . . n ]     the rows fed while it is decoded
attention     [ - - - - - - - - - ]  of these rows to the prompt: what a method has to keep
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from vlcache_jax.cache.allocate import Allocation, Uniform
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod, Observation
from vlcache_jax.cache.score import RecentScore, Score
from vlcache_jax.cache.state import Pool
from vlcache_jax.evaluation.comparison import SharedPrefill
from vlcache_jax.models.config import TextConfig
from vlcache_jax.models.decoder import Decoder
from vlcache_jax.models.families import Params, bind
from vlcache_jax.models.llama import Attend, Residual, rope_table, rotated
from vlcache_jax.requests.inputs import ModelInputs


class Attended(NamedTuple):
    """Attention of an answer's rows to the prompt, the mean over the query heads of a group.

    Attributes:
        first: of the first row, its own key left out, float32 [B, L, K, T]; rows sum to 1. It is
            what CacheHitRate is about (`vlcache_jax.cache.trace.prompt_attention`).
        mass: of all rows, added up, float32 [B, L, K, T].
    """

    first: jax.Array
    mass: jax.Array


def attention_of_answer(
    model: Decoder,
    config: TextConfig,
    full: Pool,
    inputs: ModelInputs,
    tokens: jax.Array,
    lengths: jax.Array,
    backend: str | None = None,
) -> Attended:
    """Feed an answer to the model, all tokens at once, behind the full cache of its prompt.

    Args:
        model: the model.
        config: its decoder.
        full: the prompts' whole cache.
        inputs: the prompts, T rows each.
        tokens: the answers, int32 [B, R].
        lengths: how many tokens each has, int32 [B]; one row is counted where it has none.
        backend: of the norms.
    """
    count, answer = inputs.tokens.shape[1], jnp.arange(tokens.shape[1])
    table = rope_table(inputs.next_position()[:, None] + answer, config)
    before = (jnp.arange(count) < inputs.length[:, None])[:, None, :]
    before = jnp.broadcast_to(before, (before.shape[0], answer.size, count))
    own = jnp.broadcast_to(jnp.tri(answer.size, dtype=bool), (*before.shape[:2], answer.size))
    visible = jnp.concatenate([before, own], axis=-1)[:, None, None]  # [B, 1, 1, R, T + R]
    fed = (answer < jnp.maximum(lengths, 1)[:, None])[:, None, None, :, None]
    exact = jax.lax.Precision.HIGHEST

    def attend_layer(index: int) -> Attend[Attended]:
        rows = slice(index * count, (index + 1) * count)

        def attend(qkv: jax.Array) -> tuple[jax.Array, Attended]:
            q, own_k, own_v = rotated(qkv, table)  # [B, R, N, H], [B, R, K, H]
            kind, q = q.dtype, q.astype(jnp.float32) * config.head_dim**-0.5
            q = q.reshape(*q.shape[:2], own_k.shape[2], -1, config.head_dim)
            keys, values = (
                jnp.concatenate([x[:, :, rows], own.swapaxes(1, 2)], axis=2).astype(jnp.float32)
                for x, own in ((full.k, own_k), (full.v, own_v))
            )  # [B, K, T + R, H]
            logits = jnp.einsum("brkgh,bksh->bkgrs", q, keys, precision=exact)
            weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
            mixed = jnp.einsum("bkgrs,bksh->brkgh", weights, values)
            far = weights[..., :count]
            first = far[:, :, :, 0] / jnp.sum(far[:, :, :, 0], axis=-1, keepdims=True)
            mass = jnp.sum(jnp.where(fed, far, 0.0), axis=3)
            seen = Attended(jnp.mean(first, axis=2), jnp.mean(mass, axis=2))
            return mixed.reshape(*qkv.shape[:2], -1, config.head_dim).astype(kind), seen

        return attend

    stream, seen = Residual(model.embed(tokens)), []
    for index, layer in enumerate(model.layers):
        stream, own = layer(stream, attend_layer(index), backend=backend)
        seen.append(own)
    return Attended(*(jnp.stack(parts, axis=1) for parts in zip(*seen, strict=True)))


@dataclass(frozen=True)
class AnswerAttention(RecentScore):
    """What the answer attends to: known after it was given, and so said by `Oracle.told` alone."""

    recent_ratio: float = 0.0


@dataclass(frozen=True)
class MostAttention(Allocation):
    """Layer sizes that keep the most attention in all, where each head keeps its own best tokens.

    A layer's next token is worth what its heads would gain by it on average. These gains fall from
    token to token, so taking the largest of all layers is the best that can be done.
    """

    def sizes(self, prompt: Prompt, measured: jax.Array | None) -> jax.Array:
        """How many of the largest gains are each layer's; `measured` is the mass [B, L, K, T]."""
        assert measured is not None  # `Oracle.told` gives it
        gains = jnp.mean(-jnp.sort(-measured, axis=-1), axis=2)  # [B, L, T]
        batch, layers, rows = gains.shape
        total = layers * prompt.budget.even_rows(prompt.length)
        order = jnp.argsort(-gains.reshape(batch, -1), axis=-1)  # stable: lower layers first
        chosen = jnp.argsort(order, axis=-1) < total[:, None]
        return jnp.sum(chosen.reshape(batch, layers, rows), axis=-1).astype(jnp.float32)


@dataclass(frozen=True)
class Oracle(CacheMethod):
    """Keep what the full cache's own answer attends to most; for stages that are `Told` alone.

    No method can know this. It tells what a budget allows, and so whether a loss is the budget's or
    the method's. `allocation` says how much each layer keeps.
    """

    name: ClassVar[str] = "oracle"

    allocation: Allocation = field(default_factory=Uniform)

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return AnswerAttention(), self.allocation

    def told(self, seen: Observation, mass: Any) -> Observation:
        """What it saw of the prompt, with the attention of the answer, [B, L, K, T], beside it."""
        knows = isinstance(self.allocation, MostAttention)
        return Observation(mass, mass if knows else seen.measured, seen.salience)


@dataclass(frozen=True)
class Told(SharedPrefill):
    """Stages whose oracles are told what the full cache's answers attend to."""

    def inform(self, method: CacheMethod, seen: Observation, told: Attended) -> Observation:
        """What a method plans by: an oracle by the attention of the answers."""
        return method.told(seen, told.mass) if isinstance(method, Oracle) else seen

    def attend(
        self,
        params: Params,
        full: Pool,
        inputs: ModelInputs,
        answers: tuple[jax.Array, jax.Array],
    ) -> Attended:
        """What the full cache's answers attend to: their tokens [B, R], and how many are theirs."""
        model = bind(self.config)(params)
        return attention_of_answer(model, self.config.text, full, inputs, *answers, self.backend)
