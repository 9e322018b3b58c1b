"""The stages that run a prompt: whole, or in parts, each behind the rows that were run before.

    prefill                              all rows at once
    see ─► extend ─► extend ─► finish    the pictures; rows behind rows; the last ones, which the
                                         method's windows see

    rows of a layer   0 . . . . . . start . . . . . . . . . . m . . T
    extend, finish    |  in the buffer  | run now, written there |

A part is as wide as its static `rows`, and where it begins is data: one program serves all prompts
of a bucket.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prefill_attention import chunk_attention, prefill_attention
from pallas_kernels.rows import LayerRows, Tail, readable, writable, write_rows
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod, Observation
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.cache.score import Layer, Look, Part, WindowScores
from vlcache_jax.cache.state import Pool, whole_capacity
from vlcache_jax.cache.trace import prompt_attention
from vlcache_jax.distributed.collectives import HEADS, own
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.decoder import Decoder
from vlcache_jax.models.families import Params, bind
from vlcache_jax.models.llama import Attend, Residual, rope_table, rotated
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.layers import Keep, attend_cache, run_rows, run_token
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.state import Buffers, Memory, Prefill

Heads = tuple[jax.Array, jax.Array, jax.Array]
"""Queries [B, T, N, H], keys and values [B, T, K, H] of a layer."""

Tables = tuple[jax.Array, ...]
"""Of `Decoder.visual_tables`."""


@dataclass(frozen=True)
class Prompting:
    """The functions; see the module docstring.

    Attributes:
        config: the model.
        cache: what is kept of the prompt's keys and values, made for the model.
        backend: "triton", "cudnn", "xla", or None for the best that supports the case. "cudnn" is
            for the attention of whole prompts; elsewhere it means None.
        trace: also tell what was kept and why, at the cost of one decode step on the full cache.
    """

    config: ModelConfig
    cache: CacheMethod = field(default_factory=FullCache)
    backend: str | None = field(default=None, kw_only=True)
    trace: bool = field(default=False, kw_only=True)

    @property
    def cache_backend(self) -> str | None:
        """Backend of all but the attention of a whole prompt, which is what cuDNN has."""
        return None if self.backend == "cudnn" else self.backend

    def prompt(self, inputs: ModelInputs, settings: Settings) -> Prompt:
        """The prompts as the cache method sees them."""
        visual, layers = jnp.asarray(inputs.visual_index) != -1, self.config.text.num_layers
        return Prompt(jnp.asarray(inputs.length), visual, layers, settings.limits)

    def empty_buffers(self, batch: int, rows: int, dtype: jnp.dtype) -> Buffers:
        """Zeros for the keys and values of all layers, of prompts in a bucket of T rows."""
        text = self.config.text
        capacity = whole_capacity(text.num_layers, rows)
        shape = batch, own(text.num_kv_heads, HEADS), capacity, text.head_dim
        return Buffers(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def empty_memory(self, batch: int, rows: int, looks: tuple[Look, ...]) -> Memory:
        """That of prompts in a bucket of T rows, of which nothing was run yet."""
        text = self.config.text

        def zeros(kind: jax.typing.DTypeLike, *shape: int) -> jax.Array:
            return jnp.zeros((batch, text.num_layers, *shape), kind)

        def nothing(look: Look) -> WindowScores:
            scores = zeros(jnp.float32, own(text.num_kv_heads, HEADS), rows)
            if look.threshold is None:
                return WindowScores(scores, None, None, None)
            counts = zeros(jnp.int32, own(text.num_heads))
            return WindowScores(scores, counts, counts, None)

        seen = tuple(nothing(look) for look in looks)
        return Memory(jnp.zeros((batch,), jnp.int32), seen, zeros(jnp.float32, rows))

    def prefill(
        self, params: Params, inputs: ModelInputs, settings: Settings
    ) -> tuple[Prefill, jax.Array]:
        """Run the prompt through the model, keeping every layer's K and V in one buffer.

        Args:
            params: parameters.
            inputs: prompts padded to their buckets.
            settings: what is asked of each sequence.

        Returns:
            What the prompt leaves behind, and the first token of each answer, int32 [B].
        """
        batch, rows = inputs.tokens.shape
        model = bind(self.config)(params)
        empty = self.empty_buffers(batch, rows, model.embed.embedding.dtype)
        buffers = Buffers(*map(writable, empty))
        seen, prompt = [], self.prompt(inputs, settings)

        def keep(index: int, heads: Heads, entering: Residual, stream: Residual) -> Residual:
            nonlocal buffers
            buffers = Buffers(
                *(
                    write_rows(buffer, part.swapaxes(1, 2), (0, 0, index * rows, 0))
                    for buffer, part in zip(buffers, heads[1:], strict=True)
                )
            )
            with jax.named_scope("scores"):
                layer = Layer(index, *heads, prompt, self.cache_backend, entering.total())
                new = self.cache.observe(layer)
            # Else XLA does all of this after the last layer: every layer's q, k, v live until then.
            stream, buffers, new = lax.optimization_barrier((stream, buffers, new))
            seen.append(new)
            return stream

        x = self._run_prompt(model, inputs, keep)
        return self._prefilled(model, x, inputs.length - 1, buffers, seen, inputs, settings)

    def prompt_logits(self, params: Params, inputs: ModelInputs) -> jax.Array:
        """Logits of every prompt position, float32 [B, T, V]: for tests and scoring of texts."""
        model = bind(self.config)(params)
        return model.logits(self._run_prompt(model, inputs))

    def see(self, params: Params, inputs: ModelInputs, *, rows: int | None = None) -> Tables:
        """The visual rows of all pictures, for `extend` and `finish`.

        Args:
            params: parameters.
            inputs: the prompts.
            rows: static: that the tables are padded to, so that one program serves any tiles.
        """
        tables = bind(self.config)(params).visual_tables(inputs, self._patches)
        if rows is None:
            return tables
        return tuple(jnp.pad(table, ((0, rows - len(table)), (0, 0))) for table in tables)

    def extend(
        self,
        params: Params,
        tables: Tables,
        inputs: ModelInputs,
        buffers: Buffers,
        memory: Memory,
        start: jax.Array,
        until: jax.Array,
        settings: Settings,
        *,
        rows: int,
        looks: tuple[Look, ...],
    ) -> tuple[Buffers, Memory]:
        """Run some rows of the prompts behind those that were run before.

        Args:
            params: parameters.
            tables: what was seen of the pictures.
            inputs: the whole prompts; their tiles are not looked at.
            buffers: keys and values of the rows before; donate them.
            memory: what those left behind besides.
            start: position of the first row of each sequence, int32 [B], where `memory` ends or in
                front of that; `rows` of them fit into the bucket.
            until: where the sequences end for now, int32 [B]: what is run beyond does not count.
            settings: what is asked of each sequence.
            rows: static: how many rows are run.
            looks: static: what is remembered, `CacheMethod.continued`.

        Returns:
            The buffers with these rows, and what all rows up to `until` leave behind.
        """
        model = bind(self.config)(params)

        def observe(layer: Layer) -> tuple[tuple[WindowScores, ...], jax.Array]:
            seen = tuple(layer.watch(look.window, look.threshold) for look in looks)
            return seen, layer.salience()

        prompt = self.prompt(inputs, settings)
        where = start, until, rows
        _, buffers, seen = self._run_part(
            model, tables, inputs, buffers, memory, where, prompt, looks, observe
        )
        seen, salience = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *seen)
        end = jnp.maximum(memory.length, jnp.minimum(start + rows, until))
        return _readable(buffers), Memory(end, seen, salience)

    def finish(
        self,
        params: Params,
        tables: Tables,
        inputs: ModelInputs,
        buffers: Buffers,
        memory: Memory,
        start: jax.Array,
        settings: Settings,
        *,
        rows: int,
    ) -> tuple[Prefill, jax.Array]:
        """`extend` by the last rows of the prompts, up to their ends: then `prefill` is done.

        The arguments are those of `extend`; `memory` is of the method's `continued`, and no row
        that the method has to see together with the last ones (`CacheMethod.reach`) is in front of
        `start`.

        Returns:
            As `prefill`.
        """
        model, cache = bind(self.config)(params), self.cache
        prompt, where = self.prompt(inputs, settings), (start, inputs.length, rows)
        x, buffers, seen = self._run_part(
            model,
            tables,
            inputs,
            buffers,
            memory,
            where,
            prompt,
            cache.continued,
            cache.observe,
            whole=rows == inputs.tokens.shape[1],
        )
        last = inputs.length - 1 - start
        return self._prefilled(model, x, last, buffers, seen, inputs, settings)

    def _run_prompt(
        self, model: Decoder, inputs: ModelInputs, keep: Keep | None = None
    ) -> jax.Array:
        """Final hidden states of whole prompts, [B, T, D]; `keep` is handed each layer's heads."""

        def attend(qkv: jax.Array) -> tuple[jax.Array, Heads]:
            with jax.named_scope("prefill_attention"):
                q, k, v = rotated(qkv, table)
                mixed = prefill_attention(q, k, v, inputs.length, backend=self.backend)
            return mixed, (q, k, v)

        prompt = model.embed_prompt(inputs, self._patches)
        positions = jnp.arange(inputs.tokens.shape[1], dtype=jnp.int32)
        if inputs.positions is not None:
            positions = jnp.asarray(inputs.positions)
        table = rope_table(positions, self.config.text)
        own = inputs.visual_index, lambda index: attend, self.cache_backend, keep
        return run_rows(model, prompt, *own)

    def _run_part(
        self,
        model: Decoder,
        tables: Tables,
        inputs: ModelInputs,
        buffers: Buffers,
        memory: Memory,
        where: tuple[jax.Array, jax.Array, int],
        prompt: Prompt,
        looks: tuple[Look, ...],
        observe: Callable[[Layer], Any],
        whole: bool = False,
    ) -> tuple[jax.Array, Buffers, list[Any]]:
        """Final hidden states of some rows [B, rows, D], the buffers, and what each layer showed.

        `where` is the rows' start, the end of those that count, and how many are run. The `whole`
        prompt, as all rows at once, is what every rule knows.
        """
        start, until, count = where
        batch, total = inputs.tokens.shape
        position = start[:, None] + jnp.arange(count, dtype=jnp.int32)  # [B, rows]
        # What was kept stays to the bit, however often the rows are run again.
        new = (position >= memory.length[:, None])[:, None, :, None]
        own = inputs.part(jnp.minimum(position, total - 1))
        table = rope_table(position if own.positions is None else own.positions, self.config.text)

        def write(buffer: jax.Array, part: jax.Array, first: int) -> jax.Array:
            part = part.swapaxes(1, 2)  # [B, K, rows, H]
            for b in range(batch):  # one update in place each; a scatter might copy
                at = (b, 0, first + start[b] + turn, 0)
                buffer = write_rows(buffer, part[b : b + 1], at, new[b : b + 1])
            return buffer

        def attend_layer(index: int) -> Attend[tuple[jax.Array, LayerRows]]:
            def attend(qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, LayerRows]]:
                nonlocal buffers
                q, k, v = rotated(qkv, table)
                first = index * total
                buffers = Buffers(write(buffers.k, k, first), write(buffers.v, v, first))
                keys = LayerRows(*buffers, jnp.int32(first), total)
                with jax.named_scope("prefill_attention"):
                    mixed = chunk_attention(
                        q, keys, start, prompt.length, backend=self.cache_backend
                    )
                return mixed, (q, keys)

            return attend

        seen, turn, buffers = [], jnp.int32(0), Buffers(*map(writable, buffers))

        def keep(index: int, kept: Any, entering: Residual, stream: Residual) -> Residual:
            nonlocal buffers, turn
            q, keys = kept
            before, salience = jax.tree.map(lambda x: x[:, index], (memory.seen, memory.salience))
            windows = {look.window: each for look, each in zip(looks, before, strict=True)}
            end = jnp.minimum(until, start + count)
            part = Part(keys, start, memory.length, end, windows, salience)
            if whole:
                part = None
            with jax.named_scope("scores"):
                # As [B, T, K, H] for the rules that want them so; where none does, XLA drops it.
                k, v = (
                    readable(lax.slice_in_dim(x, index * total, (index + 1) * total, axis=2))
                    for x in buffers
                )
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
                entered = entering.total()
                layer = Layer(index, q, k, v, prompt, self.cache_backend, entered, part=part)
                found = observe(layer)
            stream, buffers, found = lax.optimization_barrier((stream, buffers, found))
            seen.append(found)
            turn = _zero_after(found)
            return stream

        embedded = model.embed_rows(own, tables)
        x = run_rows(model, embedded, own.visual_index, attend_layer, self.cache_backend, keep)
        return x, buffers, seen

    def _prefilled(
        self,
        model: Decoder,
        x: jax.Array,
        last: jax.Array,
        buffers: Buffers,
        seen: list[Observation],
        inputs: ModelInputs,
        settings: Settings,
    ) -> tuple[Prefill, jax.Array]:
        """What prompts leave behind and their first tokens, by hidden states and the last row."""
        x, buffers = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], _readable(buffers)
        uniform = settings.draws.uniform(jnp.zeros((len(x),), jnp.int32))
        logits = model.logits(x)
        token = settings.draws.sample(logits, uniform, self.cache_backend)
        attention = None
        if self.trace:
            attention = self._first_attention(model, buffers, inputs, settings, token)
        return Prefill(*buffers, Observation.stack(seen), logits, attention), token

    def _first_attention(
        self,
        model: Decoder,
        buffers: Buffers,
        inputs: ModelInputs,
        settings: Settings,
        token: jax.Array,
    ) -> jax.Array:
        """What the first decoded token attends to, by one decode step on the full cache."""
        everything, prompt = FullCache(), self.prompt(inputs, settings)
        full = everything.build(*buffers, everything.plan(Observation(), prompt), prompt)
        assert isinstance(full, Pool)
        rows, none = prompt.rows, jnp.zeros_like(prompt.length)
        segments = full.segments()
        table = rope_table(jnp.asarray(inputs.next_position())[:, None], self.config.text)

        def attend_layer(index: int) -> Attend[jax.Array]:
            def attend(qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
                keys = full.k[:, :, index * rows : (index + 1) * rows]
                weights = prompt_attention(rotated(qkv, table)[0][:, 0], keys, prompt.length)
                empty = jnp.zeros_like(full.k[:, :, :1])  # a tail for the token's own row
                own = segments[index], Tail(empty, empty, none)
                return attend_cache(qkv, table, full, *own, self.cache_backend)[0], weights

            return attend

        _, weights = run_token(model, token, attend_layer, self.cache_backend)
        return jnp.stack(weights, axis=1)

    @property
    def _patches(self) -> Callable[..., jax.Array]:
        """Full attention of a vision tower."""
        return partial(prefill_attention, causal=False, backend=self.backend)


def _readable(buffers: Buffers) -> Buffers:
    return Buffers(*map(readable, buffers))


def _zero_after(found: Any) -> jax.Array:
    """Zero, int32 [], known when all of these arrays are.

    What writes a buffer at a place that depends on it comes behind all that has read the buffer for
    them. A barrier is not enough: it is gone when XLA decides which buffers it has to copy.
    """
    ones = (leaf.reshape(-1)[0] for leaf in jax.tree.leaves(found))
    never = [one < one - 1 for one in ones]
    return jnp.any(jnp.stack(never)).astype(jnp.int32) if never else jnp.int32(0)
