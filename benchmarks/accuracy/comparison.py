"""Many methods that watch one prefill: what each sees of it, plans and builds.

Values that a quantizer wants transformed are so when its pool is built, and decoded by the folded
weights: what a prefill by these would leave behind, but for the rounding.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy.oracle import Attended, Oracle, attention_of_answer
from benchmarks.roofline.packed import kept_bytes
from pallas_kernels.hadamard import transform
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Observation, Plan
from vlcache_jax.cache.score import LastRows, Layer
from vlcache_jax.cache.state import Pool
from vlcache_jax.cache.trace import attention_mass_recall, cache_hit_rate
from vlcache_jax.models.config import ModelConfig, TextConfig
from vlcache_jax.models.families import Params, bind
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.results.report import row_bytes
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.stages import Stages


@lru_cache(maxsize=1024)
def pool_shape(method: CacheMethod, config: TextConfig, rows: int) -> Any:
    """The shapes of a method's pool of prompts of T rows, by which pools fit together or not."""
    pool = method.pool_shapes(config, 1, rows, jnp.dtype(jnp.bfloat16))
    return jax.tree.structure(pool), *(leaf.shape for leaf in jax.tree.leaves(pool))


@dataclass(frozen=True)
class Together(CacheMethod):
    """Several methods that watch the same prefill; they plan and build on their own.

    `budget` and `shared_heads` are without meaning.
    """

    methods: tuple[CacheMethod, ...] = ()

    def __post_init__(self):
        """Nothing to check: the methods are made."""

    def observe(self, layer: Layer) -> Any:
        """What each method saw, in their order; what no budget changes is watched once for all."""
        # Last rows are as many as a method's budget allows.
        alike: dict[Budget | None, list[CacheMethod]] = defaultdict(list)
        for method in self.methods:
            moving = any(isinstance(window, LastRows) for window, _ in method.windows())
            alike[method.limit if moving else None].append(method)
        found = {}
        for group in alike.values():
            prompt = replace(layer.prompt, budget=group[0].limit.data)
            windows = [window for method in group for window in method.windows()]
            watched = replace(layer, prompt=prompt).seeing(windows)
            for method in group:
                prompt = replace(layer.prompt, budget=method.limit.data)
                found[method] = method.observe(replace(watched, prompt=prompt))
        return tuple(found[method] for method in self.methods)


@dataclass(frozen=True)
class Comparison:
    """What many methods do with one prefill: pure functions of arrays, to be compiled."""

    config: ModelConfig
    backend: str | None = None

    def prefill(
        self, params: Params, inputs: ModelInputs, *, methods: tuple[CacheMethod, ...]
    ) -> tuple[Pool, jax.Array, tuple[Observation, ...]]:
        """The full cache, the likeliest first token [B], and what each method saw."""
        generate = Generate(self.config, Together(methods=methods), 1, backend=self.backend)
        settings = generate.settings(inputs.tokens.shape[0])
        prefilled, token = generate.stages.prefill(params, inputs, settings)
        nothing = replace(prefilled, seen=Observation())
        full, _ = Stages(self.config).build_cache(nothing, inputs, settings)
        assert isinstance(full, Pool)  # nothing is quantized
        # What is stacked are the methods' observations of each layer, in the shape of `observe`.
        return full, token, cast(Any, prefilled.seen)

    def build(
        self,
        full: Pool,
        inputs: ModelInputs,
        seen: list[Observation],
        attended: Attended,
        *,
        methods: tuple[CacheMethod, ...],
    ) -> tuple[AnyPool, Any]:
        """The pools of M methods as one of M * B sequences, and `measure` of each, stacked.

        Args:
            full: the full cache.
            inputs: the prompts.
            seen: what each method saw.
            attended: what the full cache's answers attend to.
            methods: of pools of the same shapes.
        """
        pools, measures = [], []
        visual = inputs.visual_index >= 0
        for method, own in zip(methods, seen, strict=True):
            prompt = Prompt(inputs.length, visual, self.config.text.num_layers, method.limit.data)
            if isinstance(method, Oracle):
                own = method.told(own, attended.mass)
            plan = method.plan(own, prompt)
            v = transform(full.v) if method.transforms else full.v
            pools.append(method.build(full.k, v, plan, prompt))
            kept = jnp.broadcast_to(plan.kept(prompt), attended.first.shape)
            shares = self._row_shares(method, full)
            measures.append(self.measure(pools[-1], plan, kept, prompt, attended, shares))
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *measures)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pools), stacked

    def measure(
        self,
        pool: AnyPool,
        plan: Plan,
        kept: jax.Array,
        prompt: Prompt,
        attended: Attended,
        row_shares: jax.Array,
    ) -> Any:
        """What is told of a method's pool: the arrays of an `evaluate.Outcome`, [B, L] each.

        Args:
            pool: the pool.
            plan: its plan.
            kept: which tokens are kept, bool [B, L, K, T].
            prompt: the prompts.
            attended: what the full cache's answers attend to.
            row_shares: bytes of a row of each width as shares of one of full width.
        """
        count = jnp.broadcast_to(plan.budgets[:, :, None], kept.shape[:3])
        length, visual = (x[:, None] for x in (prompt.length, jnp.sum(prompt.visual, axis=-1)))
        by_head = {
            "hit_rate": cache_hit_rate(attended.first, kept, count),
            "mass_recall": attention_mass_recall(attended.first, kept),
            "answer_recall": attention_mass_recall(attended.mass, kept),
        }
        return {
            "kept": pool.length / length,
            "kept_bytes": pool.counts @ row_shares / length,
            "kept_visual": pool.visual / jnp.maximum(visual, 1),
            **{name: jnp.mean(share, axis=-1) for name, share in by_head.items()},
        }

    def _row_shares(self, method: CacheMethod, full: Pool) -> jax.Array:
        """Bytes of a row of each width, with its scales, as shares of one of full width."""
        text, quantizer, kind = self.config.text, method.quantize, full.k.dtype
        unit = 1 if quantizer is None else quantizer.key_group or 1  # rows of full groups
        widths = 1 if quantizer is None else 1 + len(quantizer.widths)
        each = [kept_bytes(text, quantizer, unit * row, kind) for row in np.eye(widths, dtype=int)]
        return jnp.array(each, jnp.float32) / (unit * row_bytes(text, kind))

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
