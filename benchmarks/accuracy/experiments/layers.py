"""One layer compressed while the others keep everything, against all layers compressed."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from benchmarks.accuracy.evaluate import FULL
from benchmarks.accuracy.experiments.common import Bench, Cell, compare
from benchmarks.accuracy.experiments.text import both, budget_of, made_by
from benchmarks.accuracy.report import Result, scored
from benchmarks.documents import table
from vlcache_jax.cache.budget import POOL_SHARES, Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Observation, Plan
from vlcache_jax.cache.methods import Custom, VLCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = {"all layers, equal": "uniform", "all layers, VL-Cache": "sparsity"}
AT_ONCE = 8  # each of these has a pool of the full cache's size


@dataclass(frozen=True)
class OneLayer(Custom):
    """Compress one layer as another method would, and keep every token of the others.

    The budget is that layer's alone. The pool is as large as the full cache's.

    Attributes:
        budget: as in `Custom`, as are `shared_heads`, `score`, `allocation`, `recent_ratio`.
        layer: which one.
    """

    name: ClassVar[str] = "one-layer"

    layer: int = 0

    def plan(self, seen: Observation, prompt: Prompt) -> Plan:
        """The other method's plan, with the lengths of the other layers as they are."""
        plan = super().plan(seen, prompt)
        own = jnp.arange(prompt.layers) == self.layer
        return replace(plan, budgets=jnp.where(own, plan.budgets, prompt.length[:, None]))

    def build(
        self, k: jax.Array, v: jax.Array, plan: Plan, prompt: Prompt, new_rows: int = 0
    ) -> AnyPool:
        """As of a budget whose pool has room for every row."""
        return Custom(POOL_SHARES[-1]).build(k, v, plan, prompt, new_rows)


def run(bench: Bench) -> Result:
    """Scores with each single layer compressed, and with all of them."""
    layers = bench.vlm.config.text.num_layers
    cells: dict[Cell, CacheMethod] = {}
    for text, budget in bench.budgets:
        cells |= {
            (f"layer {layer}", text): OneLayer(budget, allocation="uniform", layer=layer)
            for layer in range(layers)
        }
        cells |= {
            (label, text): VLCache(budget)
            if allocation == "sparsity"
            else Custom(budget, allocation=allocation)
            for label, allocation in ALL.items()
        }
    items = bench.items()
    details = compare(items, bench.run(items, cells, "layers", at_once=AT_ONCE))
    return {"layers": layers, "details": details}


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    details, parts = result["details"], []
    for budget in result["budgets"]:
        rows = [["none", *(scored(of_task[FULL]["1.0"]) for of_task in details.values())]]
        for label in [*(f"layer {layer}" for layer in range(result["layers"])), *ALL]:
            rows.append([label, *(both(of_task[label][budget]) for of_task in details.values())])
        parts += [f"Budget of {budget_of(budget)}:", table(["compressed", *details], rows)]
    return "\n\n".join(
        [
            made_by(result),
            "A single layer keeps the budget's share of its tokens, the best by the post-vision "
            "score, and all others keep everything. Below, all layers keep their share: each the "
            "same, or VL-Cache's. Each cell has the score, and the difference to the full cache.",
            *parts,
        ]
    )


def draw(result: Result) -> "Figure":
    """Difference to the full cache by the layer that is compressed."""
    from matplotlib.figure import Figure

    budget, layers = result["budgets"][0], result["layers"]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for index, (task, of_task) in enumerate(result["details"].items()):
        changes = [of_task[f"layer {layer}"][budget]["difference"] for layer in range(layers)]
        middle = [100 * change["mean"] for change in changes]
        low, high = ([100 * change[end] for change in changes] for end in ("low", "high"))
        (line,) = axes.plot(range(layers), middle, marker="o", label=task)
        axes.fill_between(range(layers), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for label, style in zip(ALL, ("--", ":"), strict=True):
            mean = 100 * of_task[label][budget]["difference"]["mean"]
            name = label if index == 0 else None
            axes.axhline(mean, color=line.get_color(), linestyle=style, linewidth=1, label=name)
    title = f"one layer compressed to {budget_of(budget)}"
    axes.set(xlabel="layer", ylabel="difference to full, points", title=title)
    axes.legend(fontsize="small")
    return figure
