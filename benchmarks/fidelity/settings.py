"""What is measured: methods by budget, scores by layers, one layer at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.accuracy.budgets import EXTRA
from benchmarks.accuracy.oracle import Oracle
from benchmarks.candidates import candidates
from vlcache_jax.cache.allocate import Allocation, Sparsity
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import METHODS, Custom, make_method
from vlcache_jax.cache.score import (
    AllRows,
    ColumnSum,
    PooledWindow,
    PostVisionRows,
    RowMaximum,
    Score,
)

Cell = tuple[str, str]
"""A label and a budget."""

SCORES: dict[str, Score] = {
    "post-vision": ColumnSum(PostVisionRows()),
    "all rows": ColumnSum(AllRows()),
    "all rows, half recent": ColumnSum(AllRows(), recent_ratio=0.5),
    "last 32 rows, pooled": PooledWindow(),
    "maximum, pooled": RowMaximum(),
}
"""VL-Cache's score, its own over all rows, H2O's, SnapKV's, and the best of the small model's."""

LAYERS = ("uniform", "sparsity", "pyramid")


@dataclass(frozen=True)
class Alone(Allocation):
    """One layer has the budget's share of its tokens, all others keep theirs.

    Attributes:
        layer: that one.
        share: what it keeps of its tokens.
    """

    layer: int = 0
    share: float = 0.1

    def sizes(self, prompt: Prompt, measured: jax.Array | None) -> jax.Array:
        """See `Allocation.sizes`."""
        chosen = jnp.arange(prompt.layers) == self.layer
        return jnp.where(chosen, self.share, 1.0) * prompt.length[:, None].astype(jnp.float32)


def methods(budgets: tuple[float, ...], layers: int) -> dict[Cell, CacheMethod]:
    """Every method, VL-Cache's score with equal layers, and the oracle with three divisions."""
    names = [name for name in METHODS if name != "full"]
    made: dict[str, Callable[[float], CacheMethod]] = {
        name: (lambda budget, name=name: make_method(name, budget)) for name in names
    }
    made |= EXTRA | {"oracle-sparsity": lambda budget: Oracle(budget, allocation=Sparsity())}
    return {(name, str(b)): make(b) for b in budgets for name, make in made.items()}


def ablation(budgets: tuple[float, ...], layers: int) -> dict[Cell, CacheMethod]:
    """Every score with every division over the layers."""
    return {
        (f"{score}, {rule}", str(b)): Custom(b, score=SCORES[score], allocation=rule)
        for b in budgets
        for score in SCORES
        for rule in LAYERS
    }


def alone(budgets: tuple[float, ...], layers: int) -> dict[Cell, CacheMethod]:
    """One layer after the other, compressed alone by VL-Cache's score."""
    return {
        (f"layer {layer}", str(b)): Custom(
            1 - (1 - b) / layers, score="post-vision", allocation=Alone(layer=layer, share=b)
        )
        for b in budgets
        for layer in range(layers)
    }


def search(budgets: tuple[float, ...], layers: int) -> dict[Cell, CacheMethod]:
    """What the recommended method is chosen among, and what is published beside it."""
    names = "vl-cache", "h2o", "snapkv"
    tried = {
        str(b): {name: make_method(name, b) for name in names} | candidates(b) for b in budgets
    }
    return {(label, b): method for b, own in tried.items() for label, method in own.items()}


PARTS: Mapping[str, Callable[[tuple[float, ...], int], dict[Cell, CacheMethod]]] = {
    "methods": methods,
    "ablation": ablation,
    "layers": alone,
    "candidates": search,
}
