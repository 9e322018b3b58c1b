"""The full cache's answer, fed again to other caches: how far their predictions are from its own.

    full cache   ─► answer: tokens [B, R], logits [B, R, V]
    other caches ─► the same tokens are fed, whatever they would say: KL, same top-1  [M * B, R]

Fed with the same tokens, a greedy answer is the full cache's until the first top-1 that differs, so
that nothing has to run free to know whether it would come out the same.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vlcache_jax.cache.method import AnyPool
from vlcache_jax.evaluation.comparison import Comparer
from vlcache_jax.models.families import Params
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.stages import Stages
from vlcache_jax.running.state import DecodeState


@dataclass(frozen=True)
class Replay:
    """Chunks of decode steps that tell the logits, or compare them: pure functions of arrays.

    Attributes:
        stages: those that decode.
    """

    stages: Stages

    def answer_chunk(
        self, params: Params, pool: AnyPool, state: DecodeState
    ) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
        """The next tokens and the logits that they are drawn from: [steps, B], [steps, B, V]."""
        segments = pool.segments()

        def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
            state, logits = self.stages.decode_step(params, pool, state, segments)
            return state, (state.token, logits)

        return lax.scan(step, state, length=self.stages.chunk_steps)

    def replay_chunk(
        self,
        params: Params,
        pool: AnyPool,
        state: DecodeState,
        fed: jax.Array,
        reference: jax.Array,
        start: jax.Array,
    ) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
        """Feed tokens to M * B sequences, and compare what they predict with the reference.

        Args:
            params: parameters.
            pool: the caches, B prompts of each of M methods.
            state: theirs.
            fed: tokens, int32 [R, B].
            reference: the full cache's logits behind each of them, float32 [R, B, V].
            start: the first row of these two that is fed now.

        Returns:
            The state, and of each step KL(full || this), in nats, float32 [steps, M * B], and
            whether the likeliest token is the same, bool [steps, M * B].
        """
        segments, batch = pool.segments(), fed.shape[1]

        def step(
            state: DecodeState, row: tuple[jax.Array, jax.Array]
        ) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
            token, full = row
            state = replace(state, token=jnp.tile(token, state.token.shape[0] // batch))
            state, logits = self.stages.decode_step(params, pool, state, segments)
            logits = logits.reshape(-1, *full.shape)  # [M, B, V]
            given, own = jax.nn.log_softmax(full), jax.nn.log_softmax(logits)
            kl = jnp.sum(jnp.exp(given) * (given - own), axis=-1)
            same = jnp.argmax(logits, axis=-1) == jnp.argmax(full, axis=-1)
            return state, (kl.ravel(), same.ravel())

        steps = self.stages.chunk_steps
        tokens = lax.dynamic_slice_in_dim(fed, start, steps)
        return lax.scan(step, state, (tokens, lax.dynamic_slice_in_dim(reference, start, steps)))


class Said(NamedTuple):
    """The full cache's greedy answers. B prompts, R rows of whole chunks.

    Attributes:
        first: first token of each, int32 [B]; it comes from the prefill, whatever is kept.
        fed: tokens that were fed, the first one in front, int32 [R, B].
        logits: what was predicted behind each of them, float32 [R, B, V].
        counts: tokens of each answer, the stop token left out, int [B].
        compared: rows of each that predict a token of the answer or its end, int [B].
    """

    first: np.ndarray
    fed: jax.Array
    logits: jax.Array
    counts: np.ndarray
    compared: np.ndarray

    def tokens(self, row: int) -> list[int]:
        """An answer's tokens."""
        return np.asarray(self.fed[: self.counts[row], row]).tolist()


def answer(comparer: Comparer, generate: Generate, pool: Any, token: Any, length: Any) -> Said:
    """Let the full cache answer greedily.

    Args:
        comparer: runs the programs.
        generate: how, with the full cache.
        pool: the full cache of B prompts.
        token: their first tokens, int32 [B].
        length: of the prompts, int32 [B].
    """
    params, stages = comparer.vlm.params, generate.stages
    way, first = _decoding(generate), np.asarray(token)
    state = _start(comparer, generate, first, length)
    drawn, logits, steps = [], [], 0
    while not np.all(state.done) and steps < stages.new_rows:
        state, (tokens, own) = comparer.do(way, "answer_chunk", params, pool, state, donate=(2,))
        drawn.append(np.asarray(tokens))
        logits.append(own)
        steps += stages.chunk_steps
    counts = np.asarray(state.count)
    whole = np.concatenate([first[None], *drawn])  # [1 + R, B]
    ended = np.isin(whole[counts.clip(max=steps), np.arange(len(first))], generate.stop_ids)
    ended &= counts < generate.max_new_tokens
    compared = np.where(counts == 0, 0, counts - ~ended)
    if not logits:
        vocab = generate.config.text.vocab_size
        return Said(
            first, jnp.asarray(whole[:0]), jnp.zeros((0, len(first), vocab)), counts, compared
        )
    return Said(first, jnp.asarray(whole[:-1]), jnp.concatenate(logits), counts, compared)


def replay(
    comparer: Comparer,
    generate: Generate,
    params: Params,
    pool: AnyPool,
    said: Said,
    length: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Feed the full cache's answers to M other caches of the same B prompts.

    Args:
        comparer: runs the programs.
        generate: how they decode: with one of their methods.
        params: parameters to decode with.
        pool: the caches, B sequences of each.
        said: the full cache's answers.
        length: of the prompts, int32 [B].

    Returns:
        KL(full || this) in nats, float32 [M, B, R], and whether the likeliest token is the same,
        bool [M, B, R]; what stands beyond `said.compared` has no meaning.
    """
    stages, way, batch = generate.stages, _decoding(generate), len(said.first)
    count = pool.length.shape[0] // batch
    token, length = np.tile(said.first, count), np.tile(np.asarray(length), count)
    state = _start(comparer, generate, token, length)
    found = [], []
    for start in range(0, int(said.compared.max(initial=0)), stages.chunk_steps):
        if stages.residual:
            pool, state = comparer.do(way.stages, "spill", pool, state, donate=(0, 1))
        given = params, pool, state, said.fed, said.logits, np.int32(start)
        state, parts = comparer.do(way, "replay_chunk", *given, donate=(2,))
        for rows, part in zip(found, parts, strict=True):
            rows.append(np.asarray(part).reshape(-1, count, batch))
    kl, same = (
        np.concatenate([np.zeros((0, count, batch), kind), *rows]).transpose(1, 2, 0)
        for kind, rows in zip((np.float32, bool), found, strict=True)
    )
    return kl, same


def _start(comparer: Comparer, generate: Generate, token: Any, length: Any) -> DecodeState:
    """The state in front of the first step."""
    dtype = comparer.vlm.params["embed"]["embedding"].dtype
    stages, settings = generate.stages.program("start", 1), generate.settings(len(token))
    return comparer.do(stages, "start", token, length, settings, dtype=dtype)


def _decoding(generate: Generate) -> Replay:
    """What is shared by all that decode alike."""
    return Replay(generate.stages.program("decode_chunk", 1))
