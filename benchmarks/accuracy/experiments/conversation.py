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

from benchmarks.accuracy.comparison import Comparison
from benchmarks.accuracy.evaluate import Evaluation
from benchmarks.accuracy.oracle import Attended, Oracle, attention_of_answer
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Observation, Plan
from vlcache_jax.cache.state import Pool
from vlcache_jax.cache.trace import attention_mass_recall
from vlcache_jax.models.families import Params, bind
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.stages import DecodeState


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
        begin: where the answer of each turn begins among them, int32 [B, J].
        end: the place behind its last word, where the end token stands, int32 [B, J].
    """

    tokens: Any
    begin: Any
    end: Any

    def answers(self, lane: int) -> list[list[int]]:
        """Token ids of each answer of a sequence."""
        spans = zip(self.begin[lane], self.end[lane], strict=True)
        return [self.tokens[lane, begin:end].tolist() for begin, end in spans]


@dataclass(frozen=True)
class TurnOracle(Oracle):
    """An oracle of a conversation: it is told the attention of each turn, [J, B, L, K, T].

    With `first_only` it knows of the first answer alone.
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
        method: CacheMethod,
        pool: AnyPool,
        plan: Plan,
        full: Pool,
        prompt: Prompt,
        told: Attended,
    ) -> jax.Array:
        """Shares of each turn's attention that are kept, float32 [J, B].

        The mean over layers and kv heads; not a number where a turn has no answer. Of the arguments
        (see `Comparison.measure`) it takes the plan, and `told` of `attend`.
        """
        kept = jnp.broadcast_to(plan.kept(prompt), told.first.shape)
        return jnp.mean(attention_mass_recall(told.mass, kept), axis=(2, 3))

    def step(self, params: Params, pool: Pool, state: DecodeState) -> DecodeState:
        """Feed a token to each sequence, and draw the next one."""
        return self.generate.stages.decode_step(params, pool, state)[0]

    @property
    def generate(self) -> Generate:
        """Of which `step` is a part."""
        return Generate(self.config, max_new_tokens=self.rows + 1, backend=self.backend)

    def attend(self, params: Params, full: Pool, inputs: ModelInputs, talk: Talk) -> Attended:
        """Attention to the prompt of the rows that predict each answer, [J, B, L, K, T] the mass.

        They begin with the question's last token; of the first answer, which the prompt's last row
        predicts, with its own first word. The last word predicts the end.
        """
        model, words = bind(self.config)(params), (talk.end > talk.begin).T
        begin = jnp.where(words, jnp.maximum(talk.begin.T - 1, 0), 0)

        def up_to(lengths: jax.Array) -> Attended:
            return attention_of_answer(
                model, self.config.text, full, inputs, talk.tokens, lengths, self.backend
            )

        # Only the last sum depends on the lengths: the rest is computed once for all of them.
        sums = jax.vmap(up_to)(jnp.concatenate([begin, talk.end.T]))
        before, after = jnp.split(sums.mass, 2)
        some, earlier = (x[:, :, None, None, None] for x in (words, begin > 0))
        mass = jnp.where(some, after - jnp.where(earlier, before, 0.0), 0.0)
        return Attended(sums.first[0], mass)


def talk(
    evaluation: Evaluation,
    way: Conversation,
    params: Params,
    pool: Pool,
    token: np.ndarray,
    length: np.ndarray,
    script: Script,
) -> Talk:
    """Hold conversations until all of them are through their turns.

    The script's tokens are fed while there is a question to be asked; else those that the model
    draws, until the answer is over, which the end token says.

    Args:
        evaluation: runs the programs.
        way: the conversations.
        params: of the model.
        pool: the cache of B prompts.
        token: the first one of each first answer, int32 [B].
        length: of each prompt, int32 [B].
        script: what the users say.
    """
    (batch, turns), stages = script.ends.shape, way.generate.stages
    settings, dtype = way.generate.settings(batch), pool.k.dtype
    state = evaluation.do(stages, "start", token, length, settings, dtype=dtype)
    turn, at, count = np.zeros((3, batch), np.int32)  # of the script, and of the answer so far
    begin, end = np.zeros((2, batch, turns), np.int32)
    tokens, lanes = np.zeros((batch, way.rows), np.int32), np.arange(batch)
    for row in range(way.rows):
        drawn, there = np.asarray(state.token), turn < turns
        if not there.any():
            break
        asking = at < script.ends[lanes, np.minimum(turn, turns - 1)]
        over = ~asking & (np.isin(drawn, way.stop_ids) | (count >= way.limit))
        for ends, chosen in ((begin, there & ~asking & (count == 0)), (end, there & over)):
            ends[lanes[chosen], turn[chosen]] = row
        asked = script.tokens[lanes, np.minimum(at, script.tokens.shape[1] - 1)]
        tokens[:, row] = np.where(asking, asked, np.where(over, way.end, drawn))
        turn, at, count = turn + over, at + asking, np.where(asking | over, 0, count + 1)
        state = replace(state, token=tokens[:, row])
        state = evaluation.do(way, "step", params, pool, state, donate=(2,))
    return Talk(tokens, begin, end)
