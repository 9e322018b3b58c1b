"""What is told of each method's pool, beside the full cache's own answers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy.oracle import Attended, Told
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Plan
from vlcache_jax.cache.state import Pool
from vlcache_jax.cache.trace import attention_mass_recall, cache_hit_rate
from vlcache_jax.results.report import kept_bytes, row_bytes


@dataclass(frozen=True)
class Comparison(Told):
    """Methods that are measured by what the full cache's answers attend to."""

    def measure(
        self,
        method: CacheMethod,
        pool: AnyPool,
        plan: Plan,
        full: Pool,
        prompt: Prompt,
        told: Attended,
    ) -> Any:
        """What is told of a method's pool: the arrays of an `evaluate.Outcome`, [B, L] each.

        Args:
            method: the method.
            pool: its pool.
            plan: its plan.
            full: the full cache.
            prompt: the prompts.
            told: what the full cache's answers attend to.
        """
        kept = jnp.broadcast_to(plan.kept(prompt), told.first.shape)
        count = jnp.broadcast_to(plan.budgets[:, :, None], kept.shape[:3])
        length, visual = (x[:, None] for x in (prompt.length, jnp.sum(prompt.visual, axis=-1)))
        by_head = {
            "hit_rate": cache_hit_rate(told.first, kept, count),
            "mass_recall": attention_mass_recall(told.first, kept),
            "answer_recall": attention_mass_recall(told.mass, kept),
        }
        return {
            "kept": pool.length / length,
            "kept_bytes": pool.counts @ self._row_shares(method, full) / length,
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
