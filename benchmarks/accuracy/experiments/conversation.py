"""A conversation that goes on behind a compressed cache.

The first question is in the prompt, and the cache is compressed behind it. All that follows goes
through decode steps, one token each: what the user says is forced, what the model says is greedy.

    pool    picture, question 1
    tail    answer 1 </s> question 2 answer 2 </s> question 3 ...   each sequence at its own pace

Each sequence has its script, so that a step feeds one token to every one of them, whoever speaks.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.accuracy.comparison import Comparison
from benchmarks.accuracy.oracle import Attended, Oracle, attention_of_answer
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import AnyPool, Observation, Plan
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


Carry = tuple[jax.Array, DecodeState, Place, Talk]
"""Rows that were fed, and where the sequences are."""


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

    def measure(
        self,
        pool: AnyPool,
        plan: Plan,
        kept: jax.Array,
        prompt: Prompt,
        attended: Attended,
        row_shares: jax.Array,
    ) -> jax.Array:
        """Shares of each turn's attention that are kept, float32 [J, B].

        The mean over layers and kv heads; not a number where a turn has no answer. Of the arguments
        (see `Comparison.measure`) it takes `kept`, and `attended` of `attend`.
        """
        return jnp.mean(attention_mass_recall(attended.mass, kept), axis=(2, 3))

    def talk(
        self, params: Params, pool: Pool, token: jax.Array, length: jax.Array, script: Script
    ) -> Talk:
        """The conversations behind prompts of `length` [B], until all are through their turns.

        `token` [B] is the first of the first answer.
        """
        batch, turns = script.ends.shape
        generate = Generate(self.config, max_new_tokens=self.rows + 1, backend=self.backend)
        stages, segments = generate.stages, pool.segments()

        def say(index: jax.Array, state: DecodeState, place: Place, talk: Talk) -> Carry:
            """Take down the next token of each sequence, whoever says it."""
            token, place, said = self._next(state.token, place, script)
            columns = zip(talk, (token, place.turn, said), strict=True)
            write = partial(lax.dynamic_update_slice_in_dim, start_index=index, axis=1)
            talk = Talk(*(write(whole, column[:, None]) for whole, column in columns))
            return index + 1, replace(state, token=token), place, talk

        def unfinished(carry: Carry) -> jax.Array:
            index, _, place, _ = carry
            return (index < self.rows) & jnp.any(place.turn < turns)

        def step(carry: Carry) -> Carry:
            index, state, place, talk = carry
            return say(index, stages.decode_step(params, pool, state, segments)[0], place, talk)

        state = stages.start(token, length, generate.settings(batch), pool.k.dtype)
        nothing, empty = jnp.zeros_like(token), jnp.zeros((batch, self.rows), jnp.int32)
        talk = Talk(empty, jnp.full_like(empty, turns), empty.astype(bool))
        first = say(jnp.int32(0), state, Place(nothing, nothing, nothing), talk)
        return lax.while_loop(unfinished, step, first)[3]

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
        self, params: Params, full: Pool, inputs: ModelInputs, answers: tuple[jax.Array, ...]
    ) -> Attended:
        """Attention to the prompt of some rows of each turn; the mass is [J, B, L, K, T].

        Args:
            params: of the model.
            full: the full cache.
            inputs: the prompts.
            answers: what was fed behind them, int32 [B, R]; the first row of each turn, int32
                [J, B]; the row behind its last one, likewise.
        """
        (tokens, begin, end), model = answers, bind(self.config)(params)

        def up_to(lengths: jax.Array) -> Attended:
            return attention_of_answer(
                model, self.config.text, full, inputs, tokens, lengths, self.backend
            )

        # Only the last sum depends on the lengths: the rest is computed once for all of them.
        sums = jax.vmap(up_to)(jnp.concatenate([begin, end]))
        before, after = jnp.split(sums.mass, 2)
        some, earlier = (x[:, :, None, None, None] for x in (end > begin, begin > 0))
        mass = jnp.where(some, after - jnp.where(earlier, before, 0.0), 0.0)
        return Attended(sums.first[0], mass)


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
