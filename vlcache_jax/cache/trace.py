"""What a method kept and how well it chose: for reports, tests and debugging.

How well is measured by the first decoded token: one extra decode step on the full cache, before it
is freed, gives the attention that this token pays to the prompt.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.cache.allocate import AllocationFunction, Sparsity
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod, Observation, Plan
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
    inside = jnp.arange(rows) < lengths[:, None, None, None]
    logits = jnp.where(inside, logits / np.sqrt(head_dim), -jnp.inf)
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=2)


def cache_hit_rate(weights: jax.Array, kept: jax.Array, count: jax.Array) -> jax.Array:
    """CacheHitRate: the share of the `count` keys with the most attention that are kept.

    As VL-Cache defines it (section 3), for the attention of the first decoded token; that `count`
    is the layer's own budget is a choice of this library. Ties go to the lower position.

    Args:
        weights: attention to each key, float32 [..., T], 0 for keys that are not there.
        kept: which keys are kept, bool [..., T].
        count: int32 [...], at least 1.
    """
    order = jnp.argsort(-weights, axis=-1, stable=True)
    best = jnp.argsort(order, axis=-1) < count[..., None]
    return jnp.sum(best & kept, axis=-1) / count.astype(jnp.float32)


def attention_mass_recall(weights: jax.Array, kept: jax.Array) -> jax.Array:
    """The share of the attention that goes to kept keys: float32 [..., T], bool [..., T] -> [...].

    A choice of this library, beside `cache_hit_rate`.
    """
    return jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) / jnp.sum(weights, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchTrace:
    """The trace of a batch, on the device; None stands for what a method does not have.

    Attributes:
        kept: bool [B, L, K, T].
        budget: int32 [B, L].
        hit_rate: float32 [B, L, K].
        mass_recall: float32 [B, L, K].
        scores: float32 [B, L, K, T].
        sparsity: float32 [B, L].
        beta: float32 [B, L].
        window: rows of the scoring window, int32 [B].
        recent: kept tokens that are the prompt's last ones by rule, int32 [B, L].
    """

    kept: jax.Array
    budget: jax.Array
    hit_rate: jax.Array
    mass_recall: jax.Array
    scores: jax.Array | None
    sparsity: jax.Array | None
    beta: jax.Array | None
    window: jax.Array | None
    recent: jax.Array | None

    def row(self, row: int, method: CacheMethod, visual: np.ndarray) -> "Trace":
        """The trace of one prompt, with host arrays.

        Args:
            row: which sequence of the batch.
            method: what was run.
            visual: which tokens are visual, bool [m].
        """
        m, budget = visual.shape[0], np.asarray(self.budget[row])
        mask = np.asarray(self.kept[row])[..., :m]
        kept = np.full((*mask.shape[:2], int(budget.max())), -1, np.int32)
        for layer, head in np.ndindex(*mask.shape[:2]):
            positions = np.flatnonzero(mask[layer, head])
            kept[layer, head, : positions.size] = positions

        def pick(values: jax.Array | None) -> np.ndarray | None:
            return None if values is None else np.asarray(values[row])

        scores, window = pick(self.scores), pick(self.window)
        return Trace(
            method=method.label,
            budget_requested=str(method.limit),
            m=m,
            prompt_is_visual=visual,
            budget=budget,
            kept=kept,
            hit_rate=np.asarray(self.hit_rate[row]),
            mass_recall=np.asarray(self.mass_recall[row]),
            scores=None if scores is None else scores[..., :m],
            sparsity=pick(self.sparsity),
            beta=pick(self.beta),
            tau=None if window is None else int(window),
            window_start=None if window is None else m - int(window),
            recent=pick(self.recent),
        )


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
    count = jnp.broadcast_to(plan.budgets[:, :, None], weights.shape[:3])
    sparsity = beta = window = recent = None
    if not method.limit.keeps_all:
        score, allocation = method.rules()
        _, recent = score.always(plan.budgets, prompt)
        if score.window is not None:
            window = score.window.rows(prompt)
        if isinstance(allocation, Sparsity | AllocationFunction):
            sparsity = seen.measured
        if isinstance(allocation, Sparsity) and seen.measured is not None:
            beta = allocation.beta(prompt, seen.measured)
    return BatchTrace(
        kept=kept,
        budget=plan.budgets,
        hit_rate=cache_hit_rate(weights, kept, count),
        mass_recall=attention_mass_recall(weights, kept),
        scores=seen.scores,
        sparsity=sparsity,
        beta=beta,
        window=window,
        recent=recent,
    )


@dataclass(frozen=True)
class Trace:
    """What was kept of one prompt, and why; None stands for what a method does not have.

    Attributes:
        method: its label, the quantizer included: "vl-cache+akvq".
        budget_requested: as it was given: "0.1", "256tok".
        m: true length of the prompt, visual tokens expanded.
        prompt_is_visual: which tokens are visual, bool [m].
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
            int32 [L].
    """

    method: str
    budget_requested: str
    m: int
    prompt_is_visual: np.ndarray
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
