"""What a method kept and how well it chose: for reports, tests and debugging.

How well is measured by the first decoded token: one extra decode step on the full cache, before it
is freed, gives the attention that this token pays to the prompt.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.allocate import Sparsity
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod, Observation, Plan
from vlcache_jax.distributed.collectives import GROUP, mean
from vlcache_jax.files import check_file, whole_file


def prompt_attention(q: jax.Array, k: jax.Array, lengths: jax.Array) -> jax.Array:
    """Attention of one token to the prompt, the token's own key left out.

    Args:
        q: its queries [B, N, H].
        k: the prompt's keys [B, K, T, H].
        lengths: true length of each prompt, int32 [B].

    Returns:
        The mean over the query heads of a group, float32 [B, K, T]; rows sum to 1.
    """
    batch, kv_heads, rows, head_dim = k.shape
    grouped = q.reshape(batch, kv_heads, -1, head_dim).astype(jnp.float32)
    logits = jnp.einsum(
        "bkgh,bkth->bkgt", grouped, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    inside = jnp.arange(rows, dtype=jnp.int32) < lengths[:, None, None, None]
    logits = jnp.where(inside, logits / math.sqrt(head_dim), -jnp.inf)
    return mean(jnp.mean(jax.nn.softmax(logits, axis=-1), axis=2), GROUP)


def cache_hit_rate(weights: jax.Array, kept: jax.Array, count: jax.Array) -> jax.Array:
    """CacheHitRate: the share of the `count` keys with the most attention that are kept.

    As VL-Cache defines it (section 3), for the attention of the first decoded token; that `count`
    is the layer's own budget is a choice of this library. Ties go to the lower position.

    Args:
        weights: attention to each key, float32 [..., T], 0 for keys that are not there.
        kept: which keys are kept, bool [..., T].
        count: int32 [...], at least 1; broadcast to these.
    """
    order = jnp.argsort(-weights, axis=-1, stable=True)
    best = jnp.argsort(order, axis=-1) < count[..., None]
    return jnp.sum(best & kept, axis=-1, dtype=jnp.int32) / count.astype(jnp.float32)


def attention_mass_recall(weights: jax.Array, kept: jax.Array) -> jax.Array:
    """The share of the attention that goes to kept keys: float32 [..., T], bool [..., T] -> [...].

    A choice of this library, beside `cache_hit_rate`.
    """
    return jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) / jnp.sum(weights, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchTrace:
    """The traces of a batch, on the device.

    Attributes:
        arrays: the fields of `Trace` that the method has, with an axis B in front and T in place of
            m; but `kept` tells which tokens are kept, bool [B, L, K, T].
    """

    arrays: dict[str, jax.Array]

    def row(
        self, row: int, method: CacheMethod, visual: np.ndarray, context: np.ndarray
    ) -> "Trace":
        """The trace of one prompt, with host arrays.

        Args:
            row: which sequence of the batch.
            method: what was run.
            visual: which tokens are visual, bool [m].
            context: which tokens are the context's, bool [m].
        """
        m = visual.shape[0]
        own: dict[str, Any] = {name: np.asarray(part[row]) for name, part in self.arrays.items()}
        mask = own["kept"][..., :m]
        own["kept"] = kept = np.full((*mask.shape[:2], int(own["budget"].max())), -1, np.int32)
        for place in np.ndindex(*mask.shape[:2]):
            positions = np.flatnonzero(mask[place])
            kept[place][: positions.size] = positions
        if "scores" in own:
            own["scores"] = own["scores"][..., :m]
        if "tau" in own:
            own["tau"] = int(own["tau"])
            own["window_start"] = m - own["tau"]
        return Trace(method.label, str(method.limit), m, visual, context, **own)


def trace_batch(
    method: CacheMethod, seen: Observation, plan: Plan, prompt: Prompt, weights: jax.Array
) -> BatchTrace:
    """Everything that a trace tells, of a batch.

    Args:
        method: what was run.
        seen: what it saw.
        plan: what it keeps.
        prompt: the prompts.
        weights: attention of the first decoded token, float32 [B, L, K, T].
    """
    kept = jnp.broadcast_to(plan.kept(prompt), weights.shape)
    found: dict[str, jax.Array | None] = {
        "budget": plan.budgets,
        "kept": kept,
        "hit_rate": cache_hit_rate(weights, kept, plan.budgets[..., None]),
        "mass_recall": attention_mass_recall(weights, kept),
        "scores": seen.scores,
    }
    if not method.limit.keeps_all:
        score, allocation = method.rules()
        _, found["recent"], _ = method.always(plan.budgets, prompt)
        if score.window is not None:
            found["tau"] = score.window.rows(prompt)
        if allocation.threshold is not None:
            found["sparsity"] = seen.measured
        if isinstance(allocation, Sparsity) and seen.measured is not None:
            found["beta"] = allocation.beta(prompt, seen.measured)
    return BatchTrace({name: part for name, part in found.items() if part is not None})


@dataclass(frozen=True)
class Trace:
    """What was kept of one prompt, and why; None stands for what a method does not have.

    Attributes:
        method: its label, the quantizer included: "vl-cache+akvq".
        budget_requested: as it was given: "0.1", "256tok".
        m: true length of the prompt, visual tokens expanded.
        prompt_is_visual: which tokens are visual, bool [m].
        prompt_is_context: which tokens are the context's, bool [m].
        budget: kept tokens of each layer, int32 [L].
        kept: their positions, ascending, padded with -1, int32 [L, K, max(budget)].
        hit_rate: `cache_hit_rate` of the first decoded token, float32 [L, K].
        mass_recall: `attention_mass_recall` of the first decoded token, float32 [L, K].
        scores: worth of each token, float32 [L, K, m].
        sparsity: gamma', float32 [L].
        beta: VL-Cache's shares after the clip, float32 [L].
        tau: rows of the scoring window.
        window_start: its first row, m - tau.
        recent: how many of the kept tokens are the prompt's last ones whatever they are worth,
            int32 [L]; text that is kept for being text is not counted.
    """

    method: str
    budget_requested: str
    m: int
    prompt_is_visual: np.ndarray
    prompt_is_context: np.ndarray
    budget: np.ndarray
    kept: np.ndarray
    hit_rate: np.ndarray
    mass_recall: np.ndarray
    scores: np.ndarray | None = None
    sparsity: np.ndarray | None = None
    beta: np.ndarray | None = None
    tau: int | None = None
    window_start: int | None = None
    recent: np.ndarray | None = None

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the fields that are there to a .npz file, which appears whole or not at all.

        Raises:
            FileExistsError: the file exists and `force` is not set.
            FileNotFoundError: its directory does not exist.
        """
        target = check_file(path, "trace file", force=force)
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        with whole_file(target, force=force) as file:
            np.savez_compressed(file, **fields)
