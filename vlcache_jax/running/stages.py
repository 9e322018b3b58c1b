"""The stages of generation, each a pure function of arrays that `jax.jit` can compile.

    prefill ─► build_cache ─► start ─► decode_chunk ─► decode_chunk ─► ...
    K, V, what  Pool          state    `chunk_steps` steps, end test between chunks
    was seen, first token

A stage takes what is asked of each sequence as data (`Settings`). What its program depends on
besides the shapes of its arguments is `Stages.program`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rows import Tail
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.method import AnyPool
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.cache.packed import PackedPool, spill
from vlcache_jax.cache.state import Tails, empty_tail
from vlcache_jax.cache.trace import BatchTrace, trace_batch
from vlcache_jax.distributed.collectives import DATA, number, shards
from vlcache_jax.models.families import Params, bind
from vlcache_jax.models.llama import Attend, rope_table
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.layers import attend_cache, run_token
from vlcache_jax.running.prompting import Prompting
from vlcache_jax.running.sampling import Logprobs
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.state import DecodeState, Prefill


@dataclass(frozen=True)
class Stages(Prompting):
    """The functions, those of `Prompting` among them; see the module docstring.

    Attributes:
        chunk_steps: decode steps of a chunk.
        new_rows: most new tokens whose keys and values are kept, whole chunks of them.
        room: what pools are made for, where it is not each method's own budget.
        together: all sequences of a batch begin to decode at once. Otherwise each row of the batch
            is a slot, which `admit` gives to one sequence after the other.
    """

    chunk_steps: int = 1
    new_rows: int = 1
    room: Budget | None = field(default=None, kw_only=True)
    together: bool = field(default=True, kw_only=True)

    @property
    def residual(self) -> bool:
        """Whether new tokens are packed too, between two chunks."""
        return self.cache.quantize is not None and self.cache.quantize.residual is not None

    @property
    def keeps_prefill(self) -> bool:
        """Whether the pool is the prefill's own buffers."""
        return self.cache.is_full and not self.trace

    @property
    def tail_rows(self) -> int:
        """Rows of the tail, R: of all new tokens, or of those that are not packed yet."""
        quantizer = self.cache.quantize
        return quantizer.tail_rows(self.new_rows) if quantizer else self.new_rows

    @property
    def reserved_rows(self) -> int:
        """Rows of a layer's pool that are kept free for new tokens."""
        quantizer = self.cache.quantize
        return self.new_rows + quantizer.unit if quantizer and self.residual else 0

    def program(self, stage: str, prompt_rows: int) -> "Stages":
        """What the program of a stage depends on: stages that are equal here share a program.

        A prefill's has the method without its budget, a cache build's with the pool's bucket;
        decoding knows no method.

        Args:
            stage: name of the function: "prefill", "see", "extend", "finish", "kept_share",
                "build_cache", "build_into", "empty_pool", "start", "admit", "spill", "decode_chunk"
                or "decode_chunk_told".
            prompt_rows: the prompts' bucket, T.
        """
        cache, config, backend = self.cache, self.config, self.backend
        if stage in ("see", "extend", "admit"):
            return Stages(config, backend=backend)
        if stage in ("prefill", "finish"):
            return Stages(config, cache.any_budget, backend=backend, trace=self.trace)
        if stage == "kept_share":
            return Stages(config, cache.any_budget)
        if stage in ("build_cache", "build_into", "empty_pool"):
            rows = self.new_rows if self.residual else 1
            own = cache.any_budget if self.room else cache.in_bucket(prompt_rows)
            return Stages(config, own, new_rows=rows, trace=self.trace, room=self.room)
        cache = FullCache(quantize=cache.quantize)
        if stage == "start":
            return Stages(config, cache, new_rows=self.new_rows)
        steps, together = self.chunk_steps, self.together
        return Stages(config, cache, chunk_steps=steps, backend=backend, together=together)

    def begin(
        self, params: Params, inputs: ModelInputs, settings: Settings
    ) -> tuple[AnyPool, DecodeState, BatchTrace | None]:
        """Prefill, cache build and the first token: the stages up to the decode loop."""
        prefilled, token = self.prefill(params, inputs, settings)
        pool, trace = self.build_cache(prefilled, inputs, settings)
        dtype = params["embed"]["embedding"].dtype
        return pool, self.start(token, inputs.next_position(), settings, dtype), trace

    def build_cache(
        self, prefilled: Prefill, inputs: ModelInputs, settings: Settings
    ) -> tuple[AnyPool, BatchTrace | None]:
        """Give the prompt's keys and values to the method, which makes the pool of them.

        Args:
            prefilled: what the prompt left behind; with the full cache donate it.
            inputs: the prompts, as they were prefilled.
            settings: what is asked of each sequence.

        Returns:
            The pool, and what was kept and why, where it is traced.
        """
        prompt, trace = self.prompt(inputs, settings), None
        with jax.named_scope("select"):
            plan = self.cache.plan(prefilled.seen, prompt)
        if prefilled.attention is not None:
            trace = trace_batch(self.cache, prefilled.seen, plan, prompt, prefilled.attention)
        with jax.named_scope("compact"):
            sizes = self.reserved_rows, self.room
            pool = self.cache.build(prefilled.k, prefilled.v, plan, prompt, *sizes)
        return pool, trace

    def kept_share(self, prefilled: Prefill, inputs: ModelInputs, settings: Settings) -> jax.Array:
        """How much of the cache keeps each token: the share of all kv heads of all layers.

        Args:
            prefilled: what the prompts left behind.
            inputs: the prompts, as they were prefilled.
            settings: what is asked of each sequence.

        Returns:
            float32 [b, T], from 0 to 1.
        """
        prompt = self.prompt(inputs, settings)
        kept = self.cache.plan(prefilled.seen, prompt).kept(prompt)
        return jnp.mean(kept, axis=(1, 2), dtype=jnp.float32)

    def empty_pool(self, batch: int, prompt_rows: int, dtype: jnp.dtype) -> AnyPool:
        """A cache for `build_into` to fill.

        Args:
            batch: sequences in all, B.
            prompt_rows: the bucket T that all of their prompts are padded to.
            dtype: type of the cache: that of the parameters.
        """
        sizes = self.config.text, batch, prompt_rows, dtype, self.reserved_rows, self.room
        # Every field is an array of its own: one that stands twice cannot be donated.
        shapes = self.cache.pool_shapes(*sizes)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def build_into(
        self,
        pool: AnyPool,
        rows: jax.Array,
        prefilled: Prefill,
        inputs: ModelInputs,
        settings: Settings,
    ) -> tuple[AnyPool, BatchTrace | None]:
        """`build_cache` of a few sequences of a larger batch, written into its pool.

        So the full K and V of a few sequences, not of the whole batch, bound the memory of prefill.

        Args:
            pool: the cache of the whole batch, first that of `empty_pool`; donate it.
            rows: which sequences of the batch these are, int32 [b].
            prefilled: what their b prompts left behind.
            inputs: the prompts, padded to the bucket that the pool was made for.
            settings: what is asked of the b sequences.

        Returns:
            The pool of the whole batch, and the trace of these sequences.

        Raises:
            ValueError: the prompts' bucket is not the pool's.
        """
        part, trace = self.build_cache(prefilled, inputs, settings)
        new_shapes, shapes = ([leaf.shape[1:] for leaf in jax.tree.leaves(each)]
                              for each in (part, pool))  # fmt: skip
        if new_shapes != shapes or jax.tree.structure(part) != jax.tree.structure(pool):
            raise ValueError(
                f"prompts padded to {inputs.tokens.shape[1]} rows make a pool of shapes "
                f"{new_shapes}, which do not fit {shapes}: pad all to one bucket"
            )
        return _written(pool, rows, part), trace

    def start(
        self, token: jax.Array, position: jax.Array, settings: Settings, dtype: jnp.dtype
    ) -> DecodeState:
        """The state in front of the first decode step, with an empty tail.

        Args:
            token: first token of each answer, int32 [B].
            position: where it stands, int32 [B] (`ModelInputs.next_position`).
            settings: what is asked of each sequence.
            dtype: type of the cache.
        """
        tail = empty_tail(self.config.text, token.shape[0], self.tail_rows, dtype)
        return self._begun(token, position, settings, tail)

    def admit(
        self,
        state: DecodeState,
        rows: jax.Array,
        token: jax.Array,
        position: jax.Array,
        settings: Settings,
    ) -> DecodeState:
        """`start` of a few sequences, in the place of others of a batch.

        Args:
            state: of the whole batch; donate it.
            rows: which sequences of the batch these are, int32 [b].
            token: first token of each answer, int32 [b].
            position: where it stands, int32 [b].
            settings: what is asked of the b sequences.
        """
        new = self._begun(token, position, settings, Tails((), (), jnp.zeros_like(token)))
        old = replace(state, tail=Tails((), (), state.tail.fill))
        state_of_all = _written(old, rows, new)
        return replace(state_of_all, tail=replace(state.tail, fill=state_of_all.tail.fill))

    def spill(self, pool: AnyPool, state: DecodeState) -> tuple[AnyPool, DecodeState]:
        """Pack the oldest new tokens where a quantizer's `residual` asks for it.

        To be called in front of every chunk where there is a `residual`; donate both.
        """
        assert isinstance(pool, PackedPool)
        pool, tail = spill(pool, state.tail)
        return pool, replace(state, tail=tail)

    def decode_chunk(
        self, params: Params, pool: AnyPool, state: DecodeState
    ) -> tuple[DecodeState, jax.Array]:
        """Draw the next `chunk_steps` tokens: (state, int32 [B, chunk_steps]).

        Donate `state` when this is compiled alone: its tail is then written in place.

        Raises:
            ValueError: the tail has fewer rows than that.
        """
        state, [tokens] = self._decode(params, pool, state, lambda logits, token: (token,))
        return state, tokens

    def decode_chunk_told(
        self, params: Params, pool: AnyPool, state: DecodeState, *, most: int
    ) -> tuple[DecodeState, jax.Array, Logprobs]:
        """`decode_chunk`, and how likely its tokens were: arrays [B, chunk_steps, ...].

        Static: `most` of the likeliest tokens are told at each step.
        """

        def tell(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, ...]:
            return token, *Logprobs.of(logits, token, most)

        state, [tokens, *told] = self._decode(params, pool, state, tell)
        return state, tokens, Logprobs(*told)

    def _decode(
        self,
        params: Params,
        pool: AnyPool,
        state: DecodeState,
        tell: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    ) -> tuple[DecodeState, tuple[jax.Array, ...]]:
        """A chunk of steps, and what `tell` makes of each one's logits [B, V] and tokens [B]."""
        steps, room = self.chunk_steps, state.tail.k[0].shape[2]
        if steps > room:
            raise ValueError(f"a chunk of {steps} steps does not fit into a tail of {room} rows")
        if not self.together:  # what has ended attends to nothing, as it waits for the next one
            running = ~state.done
            pool, state = pool.only(running), replace(state, tail=state.tail.only(running))
        segments = pool.segments()  # here, not at every step
        column = jnp.arange(steps, dtype=jnp.int32)
        uniforms = jax.vmap(state.settings.draws.uniform, 1, 1)(state.step[:, None] + column)

        def step(
            index: jax.Array, carry: tuple[DecodeState, tuple[jax.Array, ...]]
        ) -> tuple[DecodeState, tuple[jax.Array, ...]]:
            state, told = carry
            uniform = jnp.sum(jnp.where(column == index, uniforms, 0), axis=1)
            state, logits = self.decode_step(params, pool, state, segments, uniform)

            # Not an update at `index`, nor a scan's output: on a GPU these are a copy to an address
            # that the host has to work out, which keeps the step from being one command buffer.
            def put(all_steps: jax.Array, new: jax.Array) -> jax.Array:
                here = (column == index).reshape(steps, *[1] * (new.ndim - 1))
                return jnp.where(here, new[:, None], all_steps)

            return state, jax.tree.map(put, told, tell(logits, state.token))

        logits = jax.ShapeDtypeStruct((len(state.token), self.config.text.vocab_size), jnp.float32)
        shapes = jax.eval_shape(tell, logits, state.token)
        told = jax.tree.map(lambda x: jnp.zeros((len(x), steps, *x.shape[1:]), x.dtype), shapes)
        return lax.fori_loop(0, steps, step, (state, told))

    def decode_step(
        self,
        params: Params,
        pool: AnyPool,
        state: DecodeState,
        segments: tuple[Any, ...] | None = None,
        uniform: jax.Array | None = None,
    ) -> tuple[DecodeState, jax.Array]:
        """Draw one token, and give the logits it was drawn from, float32 [B, V].

        `segments` are the pool's and `uniform` [B] the draws' for the step: for a loop that takes
        them once before its steps.
        """
        segments, draws = segments or pool.segments(), state.settings.draws
        uniform = draws.uniform(state.step) if uniform is None else uniform
        model = bind(self.config)(params)
        table = rope_table(state.position[:, None], self.config.text)

        def attend_layer(index: int) -> Attend[Tail]:
            own = segments[index], state.tail.layer(index)
            return lambda qkv: attend_cache(
                qkv, table, pool, *own, self.cache_backend, self.together
            )

        x, tails = run_token(model, state.token, attend_layer, self.cache_backend)
        logits = model.logits(x)
        token = draws.sample(logits, uniform, self.cache_backend)
        return self._drawn(state, token, Tails.of(tails)), logits

    def _begun(
        self, token: jax.Array, position: jax.Array, settings: Settings, tail: Tails
    ) -> DecodeState:
        """The state behind the first token of each answer, int32 [B], with an empty tail."""
        zero = jnp.zeros_like(token)
        state = DecodeState(tail, token, position - 1, zero, zero, zero > 0, settings)
        return self._drawn(state, token, tail)

    def _drawn(self, state: DecodeState, token: jax.Array, tail: Tails) -> DecodeState:
        """The state behind a token that was drawn."""
        settings = state.settings
        stops = jnp.any(token[:, None] == settings.stop_ids, axis=-1)
        ended = state.done | (stops & (state.count >= settings.min_new_tokens))
        count = state.count + jnp.where(ended, 0, 1)
        return replace(
            state,
            tail=tail,
            token=token,
            position=state.position + 1,
            step=state.step + 1,
            count=count,
            done=ended | (count >= settings.max_new_tokens),
        )


def _written(whole: Any, rows: jax.Array, part: Any) -> Any:
    """Arrays of a batch [B, ...], those of some sequences [b, ...] put in their rows, int32 [b].

    Where devices split the batch, each writes those of its own rows.
    """
    split = shards(DATA) > 1

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        for index in range(part.shape[0]):  # one update in place each; a scatter might copy
            row, new = rows[index], part[index : index + 1]
            if split:
                row = row - number(DATA) * len(whole)
                mine, row = (row >= 0) & (row < len(whole)), jnp.clip(row, 0, len(whole) - 1)
                new = jnp.where(mine, new, lax.dynamic_slice_in_dim(whole, row, 1))
            start = (row, *[jnp.int32(0)] * (whole.ndim - 1))
            whole = lax.dynamic_update_slice(whole, new, start)
        return whole

    return jax.tree.map(write, whole, part)
