"""A conversation that goes on behind a compressed cache.

The first question is in the prompt, and the cache is compressed behind it. All that follows goes
through decode steps, one token each: what the user says is forced, what the model says is greedy.

    pool    picture, question 1
    tail    answer 1 </s> question 2 answer 2 </s> question 3 ...   each sequence at its own pace

Each sequence has its script, so that a step feeds one token to every one of them, whoever speaks.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.accuracy.comparison import Comparison
from benchmarks.accuracy.oracle import Oracle, attention_of_answer
from vlcache_jax.cache.method import CacheMethod, Observation
from vlcache_jax.cache.state import Pool
from vlcache_jax.cache.trace import attention_mass_recall
from vlcache_jax.generate import Generate
from vlcache_jax.models.llava import Params, bind
from vlcache_jax.processing import ModelInputs
from vlcache_jax.stages import DecodeState


class Script(NamedTuple):
    """What the users say. J turns, the first of them in the prompt.

    Attributes:
        tokens: the turns from the second on, one behind the other, int32 [B, S].
        ends: where each turn ends among them, int32 [B, J]; 0 for the first.
    """

    tokens: Any
    ends: Any


class Talk(NamedTuple):
    """What was fed behind the prompts.

    Attributes:
        tokens: int32 [B, R].
        turn: which turn each belongs to, int32 [B, R]; J and more behind the last one.
        said: whether it is a word of the model's answer, bool [B, R].
    """

    tokens: Any
    turn: Any
    said: Any


class Place(NamedTuple):
    """Where each sequence is in its script, int32 [B] each.

    Attributes:
        turn: the turn.
        at: tokens of the script that were fed.
        count: tokens of the answer so far.
    """

    turn: jax.Array
    at: jax.Array
    count: jax.Array


@dataclass(frozen=True)
class TurnOracle(Oracle):
    """An oracle of a conversation: it is told the attention of each turn, [J, B, L, K, T].

    Attributes:
        budget: as in `Oracle`, as are `shared_heads` and `allocation`.
        first_only: it knows of the first answer alone.
    """

    first_only: bool = False

    def told(self, seen: Observation, mass: Any) -> Observation:
        """What it saw of the prompt, with the attention that it knows beside it."""
        return super().told(seen, mass[0] if self.first_only else jnp.sum(mass, axis=0))


@dataclass(frozen=True)
class Conversation(Comparison):
    """The stages of a conversation, each a pure function of arrays.

    Attributes:
        config: the model.
        backend: attention backend.
        stop_ids: tokens that end an answer.
        rows: most tokens of all turns, R.
        end: the token that is fed behind an answer, however it ended.
        limit: most tokens of an answer.
    """

    stop_ids: tuple[int, ...] = ()
    rows: int = 1
    end: int = 0
    limit: int = 1

    def build(
        self,
        full: Pool,
        inputs: ModelInputs,
        seen: list[Observation],
        mass: jax.Array,
        *,
        methods: tuple[CacheMethod, ...],
    ) -> tuple[Pool, jax.Array]:
        """The pools of M methods as one of M * B sequences; shares of the attention that they keep.

        Args:
            full: the full cache.
            inputs: the prompts.
            seen: what each method saw.
            mass: attention to the prompt by turn, of `attend`.
            methods: of pools of the same shapes.

        Returns:
            The pool, and the shares float32 [M, J, B], the mean over layers and kv heads; not a
            number where a turn has no answer.
        """
        pools, shares = [], []
        for method, own in zip(methods, seen, strict=True):
            pool, _, kept = self.compressed(method, full, inputs, own, mass)
            kept = jnp.broadcast_to(kept, mass.shape[1:])
            pools.append(pool)
            shares.append(jnp.mean(attention_mass_recall(mass, kept), axis=(2, 3)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pools), jnp.stack(shares)

    def talk(
        self, params: Params, pool: Pool, token: jax.Array, position: jax.Array, script: Script
    ) -> Talk:
        """The conversations from the first token [B] of the first answer on.

        `position` is that token's, int32 [B]. It ends when all sequences are through their turns.
        """
        (batch, turns), nothing = script.ends.shape, jnp.zeros(position.shape, jnp.int32)
        token, place, said = self._next(token, Place(nothing, nothing, nothing), script)
        empty = jnp.zeros((batch, self.rows), jnp.int32)
        talk = Talk(empty, jnp.full_like(empty, turns), empty.astype(bool))
        generate = Generate(self.config, max_new_tokens=self.rows + 1, backend=self.backend)
        stages, segments = generate.stages, pool.segments()
        state = stages.start(token, position, generate.settings(batch), pool.k.dtype)

        def write(talk: Talk, index: jax.Array, *columns: jax.Array) -> Talk:
            pairs = zip(talk, columns, strict=True)
            return Talk(
                *(lax.dynamic_update_slice_in_dim(a, b[:, None], index, axis=1) for a, b in pairs)
            )

        def unfinished(carry: tuple[jax.Array, DecodeState, Place, Talk]) -> jax.Array:
            index, _, place, _ = carry
            return (index < self.rows) & jnp.any(place.turn < turns)

        def step(
            carry: tuple[jax.Array, DecodeState, Place, Talk],
        ) -> tuple[jax.Array, DecodeState, Place, Talk]:
            index, state, place, talk = carry
            state = stages.decode_step(params, pool, state, segments)[0]
            token, place, said = self._next(state.token, place, script)
            talk = write(talk, index, token, place.turn, said)
            return index + 1, replace(state, token=token), place, talk

        talk = write(talk, jnp.int32(0), token, place.turn, said)
        return lax.while_loop(unfinished, step, (jnp.int32(1), state, place, talk))[3]

    def _next(
        self, drawn: jax.Array, place: Place, script: Script
    ) -> tuple[jax.Array, Place, jax.Array]:
        """The token to feed after those that were fed, of which the model drew `drawn`.

        The script's while there is a question to be asked; else the drawn one, until the answer is
        over, which the end token says.

        Returns:
            The token, the place behind it, and whether it is a word of an answer.
        """
        turn = jnp.minimum(place.turn, script.ends.shape[1] - 1)
        asking = place.at < jnp.take_along_axis(script.ends, turn[:, None], axis=1)[:, 0]
        at = jnp.minimum(place.at, script.tokens.shape[1] - 1)
        asked = jnp.take_along_axis(script.tokens, at[:, None], axis=1)[:, 0]
        stops = jnp.any(drawn[:, None] == jnp.array(self.stop_ids, jnp.int32), axis=-1)
        over = ~asking & (stops | (place.count >= self.limit))
        said = ~asking & ~over
        token = jnp.where(asking, asked, jnp.where(over, self.end, drawn))
        count = jnp.where(said, place.count + 1, 0)
        return token, Place(place.turn + over, place.at + asking, count), said

    def attend(
        self,
        params: Params,
        full: Pool,
        inputs: ModelInputs,
        tokens: jax.Array,
        begin: Any,
        end: Any,
    ) -> jax.Array:
        """Attention to the prompt of the rows begin..end of each turn, float32 [J, B, L, K, T].

        Args:
            params: of the model.
            full: the full cache.
            inputs: the prompts.
            tokens: what was fed behind them, int32 [B, R].
            begin: the first row of each turn, int32 [J, B].
            end: the row behind its last one, likewise.
        """
        model, config = bind(self.config)(params), self.config.text

        def up_to(lengths: jax.Array) -> jax.Array:
            return attention_of_answer(
                model, config, full, inputs, tokens, lengths, self.backend
            ).mass

        # Only the last sum depends on the lengths: the rest is computed once for all of them.
        sums = jax.vmap(up_to)(jnp.concatenate([begin, end]))
        before, after = jnp.split(sums, 2)
        some, earlier = (x[:, :, None, None, None] for x in (end > begin, begin > 0))
        return jnp.where(some, after - jnp.where(earlier, before, 0.0), 0.0)


def spans(talk: Talk, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that each answer is predicted by: (begin, end), int32 [J, B] each, equal for none.

    They begin with the question's last token; of the first answer, which the prompt's last row
    predicts, with its own first word. The last word predicts the end.
    """
    said, turn = np.asarray(talk.said), np.asarray(talk.turn)
    begin = np.zeros((turns, said.shape[0]), np.int32)
    end = np.zeros_like(begin)
    for index, lane in np.ndindex(*begin.shape):
        rows = np.flatnonzero(said[lane] & (turn[lane] == index))
        if rows.size:
            begin[index, lane], end[index, lane] = max(0, rows[0] - 1), rows[-1] + 1
    return begin, end


def answers_of(talk: Talk, turns: int) -> list[list[list[int]]]:
    """Token ids of each answer, by sequence and turn."""
    tokens, turn, said = (np.asarray(part) for part in talk)
    return [
        [tokens[lane, said[lane] & (turn[lane] == index)].tolist() for index in range(turns)]
        for lane in range(tokens.shape[0])
    ]
