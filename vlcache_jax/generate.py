"""Generation as pure functions: prefill, cache build, chunks of decode steps.

`Generate(config, ...)` is the factory: a frozen object whose call is the one pure function
`generate(params, inputs, rng) -> GenerateOutput`, to be compiled whole by `jax.jit`. Its stages
are methods of their own, for streaming and benchmarks:

    prefill ─► build_cache ─► start ─► decode_chunk ─► decode_chunk ─► ...
    K, V, logits   Pool       first token   `chunk_steps` scanned steps, end test between chunks
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.ragged_decode_attention import ragged_decode_attention
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.cache.state import Pool, Tail, append, empty_tail
from vlcache_jax.config import LlavaConfig
from vlcache_jax.models.llama import rope_table
from vlcache_jax.models.llava import Llava, Params, bind
from vlcache_jax.processing import ModelInputs
from vlcache_jax.sampling import Sampling, sample

CHUNK = 32
"""Most decode steps between two tests for the end."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefill:
    """What the prompt leaves behind.

    Attributes:
        k: keys of all layers after RoPE, [B, K, >= L * T, H]; layer l at rows l * T.
        v: values, likewise.
        hidden: final hidden state of the last prompt token, [B, D].
    """

    k: jax.Array
    v: jax.Array
    hidden: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a decode step changes; the pool stands beside it and is only read.

    Attributes:
        tail: keys and values of the tokens decoded so far.
        token: the token to feed next, int32 [B].
        position: its position, the true count of tokens before it, int32 [B].
        count: tokens of the answer so far, the stop token left out, int32 [B].
        done: a stop token was drawn, bool [B].
        rng: key of the next draw.
    """

    tail: Tail
    token: jax.Array
    position: jax.Array
    count: jax.Array
    done: jax.Array
    rng: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GenerateOutput:
    """The answers of a batch.

    Attributes:
        tokens: int32 [B, max_new_tokens]; what stands at or beyond `lengths` has no meaning.
        lengths: tokens of each answer, the stop token left out, int32 [B].
        kept: prompt tokens kept by each layer, int32 [B, L].
    """

    tokens: jax.Array
    lengths: jax.Array
    kept: jax.Array


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
        backend: attention backend, None for the best that supports the case.

    Raises:
        ValueError: `max_new_tokens` or `chunk` is below 1.
    """

    config: LlavaConfig
    cache: FullCache = field(default_factory=FullCache)
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    chunk: int = CHUNK
    backend: str | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")

    @property
    def num_chunks(self) -> int:
        """Chunks of a full-length answer; its first token comes from the prefill."""
        return -(-(self.max_new_tokens - 1) // self.chunk)

    @property
    def chunk_steps(self) -> int:
        """Steps of one chunk: all chunks are equal, with less than one step per chunk to spare."""
        return -(-(self.max_new_tokens - 1) // max(self.num_chunks, 1))

    @property
    def tail_rows(self) -> int:
        """Rows of the tail, R."""
        return max(1, self.num_chunks * self.chunk_steps)

    def __call__(self, params: Params, inputs: ModelInputs, rng: jax.Array) -> GenerateOutput:
        """Answer a batch of prompts: a pure function, for `jax.jit` to compile whole.

        Args:
            params: the tree of `vlcache_jax.models.llava.abstract_params`.
            inputs: prompts padded to their buckets.
            rng: a `jax.random.key`; not used when greedy.
        """
        pool, state = self.begin(params, inputs, rng)
        first = state.token[:, None]
        steps = self.chunk_steps
        drawn = jnp.zeros((first.shape[0], self.num_chunks * steps), jnp.int32)

        def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
            index, state, _ = carry
            return (index < self.num_chunks) & ~jnp.all(state.done)

        def next_chunk(
            carry: tuple[jax.Array, DecodeState, jax.Array],
        ) -> tuple[jax.Array, DecodeState, jax.Array]:
            index, state, drawn = carry
            state, tokens = self.decode_chunk(params, pool, state)
            drawn = lax.dynamic_update_slice_in_dim(drawn, tokens, index * steps, axis=1)
            return index + 1, state, drawn

        if self.num_chunks:
            _, state, drawn = lax.while_loop(unfinished, next_chunk, (jnp.int32(0), state, drawn))
        tokens = jnp.concatenate([first, drawn], axis=1)[:, : self.max_new_tokens]
        lengths = jnp.minimum(state.count, self.max_new_tokens)
        return GenerateOutput(tokens, lengths, kept=pool.length)

    def begin(
        self, params: Params, inputs: ModelInputs, rng: jax.Array
    ) -> tuple[Pool, DecodeState]:
        """Prefill, cache build and the first token: the stages up to the decode loop."""
        prefilled = self.prefill(params, inputs)
        pool = self.build_cache(prefilled, inputs)
        return pool, self.start(params, prefilled, inputs, rng)

    def prefill(self, params: Params, inputs: ModelInputs) -> Prefill:
        """Run the prompt through the model, keeping every layer's K and V in one buffer."""
        text, (batch, rows) = self.config.text, inputs.tokens.shape
        capacity = FullCache().capacity(text.num_layers, rows)
        shape = (batch, text.num_kv_heads, capacity, text.head_dim)
        model = bind(self.config)(params)
        dtype = model.embed.embedding.dtype
        buffers = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        def keep(index: int, *new: jax.Array) -> None:
            nonlocal buffers
            at = (0, 0, index * rows, 0)
            buffers = tuple(
                lax.dynamic_update_slice(buffer, part.swapaxes(1, 2), at)
                for buffer, part in zip(buffers, new, strict=True)
            )

        x = self._run_prompt(model, inputs, keep)
        last = jnp.take_along_axis(x, (inputs.length - 1)[:, None, None], axis=1)
        return Prefill(*buffers, last[:, 0])

    def prompt_logits(self, params: Params, inputs: ModelInputs) -> jax.Array:
        """Logits of every prompt position, float32 [B, T, V]: for tests and scoring of texts."""
        model = bind(self.config)(params)
        return model.logits(self._run_prompt(model, inputs, lambda index, k, v: None))

    def _run_prompt(
        self, model: Llava, inputs: ModelInputs, keep: Callable[[int, jax.Array, jax.Array], None]
    ) -> jax.Array:
        """Final hidden states [B, T, D]; `keep(layer, k, v)` is handed k, v [B, T, K, H]."""

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            return prefill_attention(q, k, v, inputs.length, backend=self.backend), (k, v)

        x = model.embed_prompt(inputs, backend=self.backend)
        table = rope_table(jnp.arange(x.shape[1]), self.config.text)
        for index, layer in enumerate(model.layers):
            x, (k, v) = layer(x, table, attend)
            keep(index, k, v)
        return x

    def build_cache(self, prefilled: Prefill, inputs: ModelInputs) -> Pool:
        """Give the prompt's keys and values to the method, which makes the pool of them."""
        layers, rows = self.config.text.num_layers, inputs.tokens.shape[1]
        return self.cache.build(prefilled.k, prefilled.v, inputs.length, layers, rows)

    def start(
        self, params: Params, prefilled: Prefill, inputs: ModelInputs, rng: jax.Array
    ) -> DecodeState:
        """Draw the first token and lay out an empty tail."""
        rng, key = jax.random.split(rng)
        logits = bind(self.config)(params).logits(prefilled.hidden)
        token = sample(logits, key, self.sampling)
        batch, dtype = token.shape[0], prefilled.k.dtype
        done = self._stops(token)
        return DecodeState(
            tail=empty_tail(self.config.text, batch, self.tail_rows, dtype),
            token=token,
            position=inputs.length,
            count=jnp.where(done, 0, 1),
            done=done,
            rng=rng,
        )

    def decode_chunk(
        self, params: Params, pool: Pool, state: DecodeState
    ) -> tuple[DecodeState, jax.Array]:
        """Draw the next `chunk_steps` tokens: (state, int32 [B, chunk_steps]).

        Donate `state` when this is compiled alone: its tail is then written in place.
        """
        model = bind(self.config)(params)

        def step(state: DecodeState, _: None) -> tuple[DecodeState, jax.Array]:
            state = self._decode_step(model, pool, state)
            return state, state.token

        state, tokens = lax.scan(step, state, length=self.chunk_steps)
        return state, tokens.T

    def _decode_step(self, model: Llava, pool: Pool, state: DecodeState) -> DecodeState:
        tail, fill = state.tail, state.tail.fill
        tail_k, tail_v = [], []
        x = model.embed(state.token[:, None])
        table = rope_table(state.position[:, None], self.config.text)
        for index, layer in enumerate(model.layers):

            def attend(
                q: jax.Array, k: jax.Array, v: jax.Array, index: int = index
            ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                # All rows began together: their fills are equal, one update in place serves all.
                new_k = append(tail.k[index], k[:, 0], fill[0])
                new_v = append(tail.v[index], v[:, 0], fill[0])
                offset, length = pool.offset[:, index], pool.length[:, index]
                mixed = ragged_decode_attention(
                    q[:, 0], pool.k, pool.v, offset, length, new_k, new_v, fill + 1,
                    backend=self.backend,
                )  # fmt: skip
                return mixed[:, None], (new_k, new_v)

            x, (new_k, new_v) = layer(x, table, attend)
            tail_k.append(new_k)
            tail_v.append(new_v)
        rng, key = jax.random.split(state.rng)
        token = sample(model.logits(x[:, 0]), key, self.sampling)
        done = state.done | self._stops(token)
        return DecodeState(
            tail=Tail(tuple(tail_k), tuple(tail_v), fill + 1),
            token=token,
            position=state.position + 1,
            count=state.count + jnp.where(done, 0, 1),
            done=done,
            rng=rng,
        )

    def _stops(self, token: jax.Array) -> jax.Array:
        done = jnp.zeros(token.shape, bool)
        for stop in self.stop_ids:
            done |= token == stop
        return done
