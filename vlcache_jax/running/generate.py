"""`Generate`: one way to generate, as one pure function.

`generate(params, inputs, rng) -> GenerateOutput` is to be compiled whole by `jax.jit`. What it is
made of, `generate.stages`, can be compiled one by one: so does the driver (driver.py), which runs
the same loop over chunks on the host.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.backends import check_backend
from vlcache_jax.cache.method import AnyPool, CacheMethod
from vlcache_jax.cache.methods import FullCache, as_method
from vlcache_jax.errors import whole_number, whole_numbers
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.families import Params
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.sampling import Sampling
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.stages import Stages
from vlcache_jax.running.state import DecodeState, GenerateOutput

Carry = tuple[jax.Array, DecodeState, jax.Array, AnyPool | None]
"""Of the loop over chunks: the chunk's number, the state, the tokens, the pool if it changes."""

CHUNK = 16
"""Most decode steps between two tests for the end: a twentieth of a second of a 7B model's time."""

CHUNKS = (1, 2, 3, 4, 6, 8)
"""Whole chunks that a tail has room for; beyond these, twice as many and so on."""


@dataclass(frozen=True)
class Generate:
    """One way to generate; see the module docstring.

    Attributes:
        config: the model.
        cache: what is kept of the prompt's keys and values.
        max_new_tokens: most tokens of an answer.
        sampling: how a token is drawn.
        stop_ids: tokens that end an answer.
        chunk: most decode steps between two tests for the end.
        backend: "triton", "cudnn", "xla", or None for the best that supports the case. "cudnn" is
            for the attention of the prefill; elsewhere it means None.
        trace: also tell what was kept and why, at the cost of one decode step on the full cache.
        min_new_tokens: before it has so many tokens no stop token ends an answer.

    Raises:
        ValueError: `max_new_tokens` or `chunk` is no whole number from 1 on, a stop token none from
            0 on, `min_new_tokens` none from 0 to `max_new_tokens`, there is no such backend, or the
            model cannot take the cache's settings.
    """

    config: ModelConfig
    cache: CacheMethod = field(default_factory=FullCache)
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    chunk: int = CHUNK
    backend: str | None = None
    trace: bool = False
    min_new_tokens: int = 0

    def __post_init__(self):
        for name in ("max_new_tokens", "chunk"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, 1))
        least = whole_number(self.min_new_tokens, "min_new_tokens", 0)
        if least > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={least} is above max_new_tokens={self.max_new_tokens}"
            )
        object.__setattr__(self, "stop_ids", whole_numbers(self.stop_ids, "stop_ids"))
        check_backend(self.backend)
        object.__setattr__(self, "cache", as_method(self.cache).for_model(self.config.text))

    @property
    def chunk_steps(self) -> int:
        """Steps of one chunk: fewer than `chunk` for a short answer.

        Where new tokens are packed, a whole number of chunks is what is packed at a time: so the
        schedule is the quantizer's own, whatever the chunk.
        """
        steps = min(self.chunk, 1 << max(0, self.max_new_tokens - 2).bit_length())
        quantizer = self.cache.quantize
        if quantizer is None or quantizer.residual is None:
            return steps
        return math.gcd(steps, quantizer.unit)

    @property
    def num_chunks(self) -> int:
        """Chunks of a full-length answer; its first token comes from the prefill."""
        return -(-(self.max_new_tokens - 1) // self.chunk_steps)

    @property
    def stages(self) -> Stages:
        """The functions that it is made of; the tail has room for a bucket of whole chunks."""
        steps = self.chunk_steps
        rows = steps * bucket_for(self.num_chunks, CHUNKS)
        return Stages(
            self.config,
            self.cache,
            backend=self.backend,
            trace=self.trace,
            chunk_steps=steps,
            new_rows=rows,
        )

    def settings(self, batch: int, seed: int = 0) -> Settings:
        """What is asked of a batch, as data: sequence i is request i.

        Args:
            batch: sequences, B.
            seed: of the draws, an integer.
        """
        requests = np.arange(batch, dtype=np.int32)
        own = self.cache.limit, self.sampling, self.stop_ids, self.max_new_tokens
        return Settings.of(*own, min_new_tokens=self.min_new_tokens, seed=seed, requests=requests)

    def __call__(self, params: Params, inputs: ModelInputs, rng: jax.Array) -> GenerateOutput:
        """Answer a batch of prompts: a pure function, for `jax.jit` to compile whole.

        Args:
            params: the tree of `vlcache_jax.models.families.abstract_params`.
            inputs: prompts padded to their buckets.
            rng: a `jax.random.key`; not used when greedy.
        """
        settings = self.settings(inputs.tokens.shape[0])
        seed = jnp.broadcast_to(jax.random.bits(rng, dtype=jnp.uint32), settings.draws.seed.shape)
        settings = replace(settings, draws=replace(settings.draws, seed=seed))
        stages, steps = self.stages, self.chunk_steps
        pool, state, trace = stages.begin(params, inputs, settings)
        first = state.token[:, None]
        drawn = jnp.zeros((first.shape[0], self.num_chunks * steps), jnp.int32)
        # What no step changes stays outside of the loop: carried through it, it might be copied.
        changing = pool if stages.residual else None

        def unfinished(carry: Carry) -> jax.Array:
            index, state, *_ = carry
            return (index < self.num_chunks) & ~jnp.all(state.done)

        def next_chunk(carry: Carry) -> Carry:
            index, state, drawn, changing = carry
            if changing is not None:
                changing, state = stages.spill(changing, state)
            state, tokens = stages.decode_chunk(params, changing or pool, state)
            drawn = lax.dynamic_update_slice_in_dim(drawn, tokens, index * steps, axis=1)
            return index + 1, state, drawn, changing

        if self.num_chunks:
            carry = jnp.int32(0), state, drawn, changing
            _, state, drawn, _ = lax.while_loop(unfinished, next_chunk, carry)
        tokens = jnp.concatenate([first, drawn], axis=1)[:, : self.max_new_tokens]
        return GenerateOutput(tokens, state.count, pool.length, pool.visual, pool.counts, trace)
