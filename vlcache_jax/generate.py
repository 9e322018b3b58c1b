"""Generation as pure functions: prefill, cache build, chunks of decode steps.

`Generate(config, ...)` is the factory: a frozen object whose call is the one pure function
`generate(params, inputs, rng) -> GenerateOutput`, to be compiled whole by `jax.jit`. Its stages
are methods of their own, for streaming and benchmarks:

    prefill ─► build_cache ─► start ─► decode_chunk ─► decode_chunk ─► ...
    K, V, what  Pool          first    `chunk_steps` scanned steps, end test between chunks
    was seen                  token

`begin` is all that comes before the decoding, as one program: the full K and V live no longer than
it takes to compact them. `prefill_into` does the same for a few sequences of a larger batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backends import check_backend
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rows import NewToken, Tail
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Observation, Plan
from vlcache_jax.cache.methods import FullCache, as_method
from vlcache_jax.cache.packed import PackedPool, spill
from vlcache_jax.cache.score import Layer
from vlcache_jax.cache.state import Pool, Tails, empty_tail, whole_capacity
from vlcache_jax.cache.trace import BatchTrace, prompt_attention, trace_batch
from vlcache_jax.config import LlavaConfig
from vlcache_jax.models.llama import Attend, Kept, Stream, rope_table, rotated
from vlcache_jax.models.llava import Llava, Params, bind
from vlcache_jax.processing import ModelInputs
from vlcache_jax.sampling import Sampling, sample

Carry = tuple[jax.Array, "DecodeState", jax.Array, AnyPool | None]
"""Of the loop over chunks: the chunk's number, the state, the tokens, the pool if it changes."""

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
        seen: what the cache method saw of the layers.
    """

    k: jax.Array
    v: jax.Array
    hidden: jax.Array
    seen: Observation


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

    tail: Tails
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
        kept_visual: visual tokens among them, the mean over the kv heads, float32 [B, L].
        counts: the kept tokens by their width: those of full width, then of each width of the
            quantiser, int32 [B, L, 1 + widths].
        trace: with `trace=True`, what was kept and why.
    """

    tokens: jax.Array
    lengths: jax.Array
    kept: jax.Array
    kept_visual: jax.Array
    counts: jax.Array
    trace: BatchTrace | None


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

    Raises:
        ValueError: `max_new_tokens` or `chunk` is below 1, or there is no such backend.
    """

    config: LlavaConfig
    cache: CacheMethod = field(default_factory=FullCache)
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    chunk: int = CHUNK
    backend: str | None = None
    trace: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")
        check_backend(self.backend)
        object.__setattr__(self, "cache", as_method(self.cache).for_model(self.config.text))

    @property
    def cache_backend(self) -> str | None:
        """Backend of all but the attention of a prompt, which is what cuDNN has."""
        return None if self.backend == "cudnn" else self.backend

    @property
    def num_chunks(self) -> int:
        """Chunks of a full-length answer; its first token comes from the prefill."""
        return -(-(self.max_new_tokens - 1) // self.chunk)

    @property
    def chunk_steps(self) -> int:
        """Steps of one chunk: all chunks are equal, with less than one step per chunk to spare."""
        return -(-(self.max_new_tokens - 1) // max(self.num_chunks, 1))

    @property
    def new_rows(self) -> int:
        """Most new tokens whose keys and values are kept."""
        return max(1, self.num_chunks * self.chunk_steps)

    @property
    def spilled_rows(self) -> int | None:
        """New tokens that are packed at a time, between two chunks; None where none are."""
        quantizer = self.cache.quantize
        return quantizer and quantizer.spilled_rows(self.chunk_steps)

    @property
    def tail_rows(self) -> int:
        """Rows of the tail, R: of all new tokens, or of those that are not packed yet."""
        quantizer = self.cache.quantize
        return quantizer.tail_rows(self.chunk_steps, self.new_rows) if quantizer else self.new_rows

    @property
    def reserved_rows(self) -> int:
        """Rows of a layer's pool that are kept free for new tokens."""
        return 0 if self.spilled_rows is None else self.new_rows + self.spilled_rows

    def __call__(self, params: Params, inputs: ModelInputs, rng: jax.Array) -> GenerateOutput:
        """Answer a batch of prompts: a pure function, for `jax.jit` to compile whole.

        Args:
            params: the tree of `vlcache_jax.models.llava.abstract_params`.
            inputs: prompts padded to their buckets.
            rng: a `jax.random.key`; not used when greedy.
        """
        pool, state, trace = self.begin(params, inputs, rng)
        first = state.token[:, None]
        steps = self.chunk_steps
        drawn = jnp.zeros((first.shape[0], self.num_chunks * steps), jnp.int32)

        spills = self.spilled_rows is not None
        # What no step changes stays outside of the loop: carried through it, it might be copied.
        changing = pool if spills else None

        def unfinished(carry: Carry) -> jax.Array:
            index, state, *_ = carry
            return (index < self.num_chunks) & ~jnp.all(state.done)

        def next_chunk(carry: Carry) -> Carry:
            index, state, drawn, changing = carry
            if changing is not None:
                changing, state = self.spill(changing, state)
            state, tokens = self.decode_chunk(params, changing or pool, state)
            drawn = lax.dynamic_update_slice_in_dim(drawn, tokens, index * steps, axis=1)
            return index + 1, state, drawn, changing

        if self.num_chunks:
            carry = jnp.int32(0), state, drawn, changing
            _, state, drawn, _ = lax.while_loop(unfinished, next_chunk, carry)
        tokens = jnp.concatenate([first, drawn], axis=1)[:, : self.max_new_tokens]
        lengths = jnp.minimum(state.count, self.max_new_tokens)
        return GenerateOutput(tokens, lengths, pool.length, pool.visual, pool.counts, trace)

    def begin(
        self, params: Params, inputs: ModelInputs, rng: jax.Array
    ) -> tuple[AnyPool, DecodeState, BatchTrace | None]:
        """Prefill, cache build and the first token: the stages up to the decode loop."""
        prefilled = self.prefill(params, inputs)
        state = self.start(params, prefilled, inputs, rng)
        trace = self.traced(params, prefilled, inputs, state) if self.trace else None
        return self.build_cache(prefilled, inputs), state, trace

    def prefill(self, params: Params, inputs: ModelInputs) -> Prefill:
        """Run the prompt through the model, keeping every layer's K and V in one buffer."""
        text, (batch, rows) = self.config.text, inputs.tokens.shape
        capacity = whole_capacity(text.num_layers, rows)
        shape = (batch, text.num_kv_heads, capacity, text.head_dim)
        model = bind(self.config)(params)
        dtype = model.embed.embedding.dtype
        buffers = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        seen = []

        def keep(layer: Layer, stream: Stream) -> Stream:
            nonlocal buffers
            at = (0, 0, layer.index * rows, 0)
            buffers = tuple(
                lax.dynamic_update_slice(buffer, part.swapaxes(1, 2), at)
                for buffer, part in zip(buffers, (layer.k, layer.v), strict=True)
            )
            with jax.named_scope("scores"):
                new = self.cache.observe(layer)
            # Else XLA does all of this after the last layer: every layer's q, k, v live until then.
            stream, buffers, new = lax.optimization_barrier((stream, buffers, new))
            seen.append(new)
            return stream

        x = self._run_prompt(model, inputs, keep)
        last = jnp.take_along_axis(x, (inputs.length - 1)[:, None, None], axis=1)
        return Prefill(*buffers, last[:, 0], Observation.stack(seen))

    def prompt_logits(self, params: Params, inputs: ModelInputs) -> jax.Array:
        """Logits of every prompt position, float32 [B, T, V]: for tests and scoring of texts."""
        model = bind(self.config)(params)
        return model.logits(self._run_prompt(model, inputs, lambda layer, stream: stream))

    def _run_prompt(
        self,
        model: Llava,
        inputs: ModelInputs,
        keep: Callable[[Layer, Stream], Stream],
    ) -> jax.Array:
        """Final hidden states [B, T, D].

        `keep(layer, stream)` is handed what each layer's attention was made of and the stream
        behind the layer; it gives the stream back.
        """

        def attend(
            qkv: jax.Array,
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
            with jax.named_scope("prefill_attention"):
                q, k, v = rotated(qkv, table)
                mixed = prefill_attention(q, k, v, inputs.length, backend=self.backend)
            return mixed, (q, k, v)

        stream = Stream(model.embed_prompt(inputs, self._attend_patches))
        table = rope_table(jnp.arange(stream.x.shape[1]), self.config.text)
        prompt = self._prompt(inputs)
        for index, layer in enumerate(model.layers):
            entering = stream
            stream, kept = layer(stream, attend, backend=self.cache_backend)
            own = Layer(index, *kept, prompt, self.cache_backend, entering.total())
            stream = keep(own, stream)
        return stream.total()

    def _attend_patches(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention of the vision tower."""
        return prefill_attention(q, k, v, causal=False, backend=self.backend)

    def _prompt(self, inputs: ModelInputs) -> Prompt:
        """The prompts as the cache method sees them."""
        visual = jnp.asarray(inputs.visual_index) >= 0
        return Prompt(
            jnp.asarray(inputs.length), visual, self.config.text.num_layers, self.cache.limit
        )

    @jax.named_scope("select")
    def plan(self, prefilled: Prefill, inputs: ModelInputs) -> Plan:
        """What the method keeps of the prompts."""
        return self.cache.plan(prefilled.seen, self._prompt(inputs))

    def build_cache(self, prefilled: Prefill, inputs: ModelInputs) -> AnyPool:
        """Give the prompt's keys and values to the method, which makes the pool of them."""
        plan = self.plan(prefilled, inputs)
        with jax.named_scope("compact"):
            prompt = self._prompt(inputs)
            return self.cache.build(prefilled.k, prefilled.v, plan, prompt, self.reserved_rows)

    def traced(
        self, params: Params, prefilled: Prefill, inputs: ModelInputs, state: DecodeState
    ) -> BatchTrace:
        """What the method keeps, and the attention of the first decoded token to it.

        Runs one decode step on the full cache; `state` is not changed by it.
        """
        prompt, everything = self._prompt(inputs), FullCache()
        plan = everything.plan(Observation(), prompt)
        full = everything.build(prefilled.k, prefilled.v, plan, prompt)
        assert isinstance(full, Pool)
        rows, none = prompt.rows, jnp.zeros_like(state.position)
        segments, table = full.segments(), rope_table(state.position[:, None], self.config.text)

        def attend_layer(index: int) -> Attend[jax.Array]:
            def attend(qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
                keys = full.k[:, :, index * rows : (index + 1) * rows]
                weights = prompt_attention(rotated(qkv, table)[0][:, 0], keys, prompt.length)
                empty = jnp.zeros_like(full.k[:, :, :1])  # a tail for the token's own row
                tail = Tail(empty, empty, none)
                own = self._attend_cache(qkv, table, full, segments[index], tail)
                return own[0], weights

            return attend

        model = bind(self.config)(params)
        _, weights = self._run_token(model, state.token, attend_layer)
        plan = self.plan(prefilled, inputs)
        return trace_batch(self.cache, prefilled.seen, plan, prompt, jnp.stack(weights, axis=1))

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

    def empty(self, batch: int, prompt_rows: int, dtype: jnp.dtype) -> tuple[AnyPool, DecodeState]:
        """A cache and a state for `prefill_into` to fill.

        Args:
            batch: sequences in all, B.
            prompt_rows: the bucket T that all of their prompts are padded to.
            dtype: type of the cache: that of the parameters.
        """
        text = self.config.text
        shapes = self.cache.pool_shapes(text, batch, prompt_rows, dtype, self.reserved_rows)
        # Every field is an array of its own: one that stands twice cannot be donated.
        pool = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        state = DecodeState(
            tail=empty_tail(text, batch, self.tail_rows, dtype),
            token=jnp.zeros((batch,), jnp.int32),
            position=jnp.zeros((batch,), jnp.int32),
            count=jnp.zeros((batch,), jnp.int32),
            done=jnp.zeros((batch,), bool),
            rng=jax.random.key(0),
        )
        return pool, state

    def prefill_into(
        self,
        params: Params,
        pool: AnyPool,
        state: DecodeState,
        rows: jax.Array,
        inputs: ModelInputs,
        rng: jax.Array,
    ) -> tuple[AnyPool, DecodeState, BatchTrace | None]:
        """Begin a few sequences of a larger batch, and write them into its cache.

        So the full K and V of a few sequences, not of the whole batch, bound the memory of prefill.
        Donate `pool` and `state` when this is compiled: they are then written in place. Decode once
        every sequence has begun.

        Args:
            params: as in a call.
            pool: the cache of the whole batch, first that of `empty`.
            state: the decode state of the whole batch, likewise.
            rows: which sequences of the batch these are, int32 [b].
            inputs: their b prompts, padded to the bucket that the pool was made for.
            rng: key of their first draws; the whole batch goes on with the one given last.

        Returns:
            The pool and state of the whole batch, and the trace of these sequences.
        """
        new_pool, new_state, trace = self.begin(params, inputs, rng)
        new_shapes, shapes = ([leaf.shape[1:] for leaf in jax.tree.leaves(each)]
                              for each in (new_pool, pool))  # fmt: skip
        if new_shapes != shapes or jax.tree.structure(new_pool) != jax.tree.structure(pool):
            raise ValueError(
                f"prompts padded to {inputs.tokens.shape[1]} rows make a pool of shapes "
                f"{new_shapes}, which do not fit {shapes}: pad all to one bucket"
            )

        def write(whole: jax.Array, part: jax.Array) -> jax.Array:
            for index in range(part.shape[0]):  # one update in place each; a scatter might copy
                start = (rows[index], *[0] * (whole.ndim - 1))
                whole = lax.dynamic_update_slice(whole, part[index : index + 1], start)
            return whole

        begun = DecodeState(
            tail=state.tail,  # the new one is as empty: it is not moved
            token=write(state.token, new_state.token),
            position=write(state.position, new_state.position),
            count=write(state.count, new_state.count),
            done=write(state.done, new_state.done),
            rng=new_state.rng,
        )
        return jax.tree.map(write, pool, new_pool), begun, trace

    def spill(self, pool: AnyPool, state: DecodeState) -> tuple[AnyPool, DecodeState]:
        """Pack the oldest new tokens where a quantiser's `residual` asks for it.

        To be called in front of every chunk if `spilled_rows` is not None; donate both.
        """
        assert isinstance(pool, PackedPool)
        pool, tail = spill(pool, state.tail, self.chunk_steps)
        return pool, replace(state, tail=tail)

    def decode_chunk(
        self, params: Params, pool: AnyPool, state: DecodeState
    ) -> tuple[DecodeState, jax.Array]:
        """Draw the next `chunk_steps` tokens: (state, int32 [B, chunk_steps]).

        Donate `state` when this is compiled alone: its tail is then written in place.
        """
        segments = pool.segments()  # here, not at every step
        column = jnp.arange(self.chunk_steps)

        def step(
            index: jax.Array, carry: tuple[DecodeState, jax.Array]
        ) -> tuple[DecodeState, jax.Array]:
            state, tokens = carry
            state = self.decode_step(params, pool, state, segments)[0]
            # Not an update at `index`, nor a scan's output: on a GPU these are a copy to an address
            # that the host has to work out, which keeps the step from being one command buffer.
            return state, jnp.where(column == index, state.token[:, None], tokens)

        tokens = jnp.zeros((state.token.shape[0], self.chunk_steps), jnp.int32)
        return lax.fori_loop(0, self.chunk_steps, step, (state, tokens))

    def decode_step(
        self,
        params: Params,
        pool: AnyPool,
        state: DecodeState,
        segments: tuple[Any, ...] | None = None,
    ) -> tuple[DecodeState, jax.Array]:
        """Draw one token, and give the logits it was drawn from, float32 [B, V].

        `segments` are the pool's, for a loop that takes them once before its steps.
        """
        segments = segments or pool.segments()
        model = bind(self.config)(params)
        table = rope_table(state.position[:, None], self.config.text)

        def attend_layer(index: int) -> Attend[Tail]:
            own = segments[index], state.tail.layer(index)
            return lambda qkv: self._attend_cache(qkv, table, pool, *own)

        x, tails = self._run_token(model, state.token, attend_layer)
        rng, key = jax.random.split(state.rng)
        logits = model.logits(x)
        token = sample(logits, key, self.sampling)
        done = state.done | self._stops(token)
        state = DecodeState(
            tail=Tails.of(tails),
            token=token,
            position=state.position + 1,
            count=state.count + jnp.where(done, 0, 1),
            done=done,
            rng=rng,
        )
        return state, logits

    def _run_token(
        self,
        model: Llava,
        token: jax.Array,
        attend_layer: Callable[[int], Attend[Kept]],
    ) -> tuple[jax.Array, list[Kept]]:
        """Run one token per sequence: its hidden states [B, D], and what each layer kept."""
        stream, kept = Stream(model.embed(token[:, None])), []
        for index, layer in enumerate(model.layers):
            stream, own = layer(stream, attend_layer(index), backend=self.cache_backend)
            kept.append(own)
        return stream.total()[:, 0], kept

    @jax.named_scope("decode_attention")
    def _attend_cache(
        self,
        qkv: jax.Array,
        table: tuple[jax.Array, jax.Array],
        pool: AnyPool,
        segment: Any,
        tail: Tail,
    ) -> tuple[jax.Array, Tail]:
        """`Pool.append_and_attend`, of a product and a table with the axis of the one token."""
        new = NewToken(qkv[:, 0], table[0][:, 0], table[1][:, 0])
        mixed, tail = pool.append_and_attend(new, segment, tail, self.cache_backend)
        return mixed[:, None], tail

    def _stops(self, token: jax.Array) -> jax.Array:
        done = jnp.zeros(token.shape, bool)
        for stop in self.stop_ids:
            done |= token == stop
        return done
