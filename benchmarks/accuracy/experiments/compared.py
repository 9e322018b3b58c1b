"""The experiments that are a table of methods."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from benchmarks.accuracy.budgets import Bench
from benchmarks.accuracy.experiments.common import Experiment, compare, methods_of
from benchmarks.accuracy.report import (
    FULL,
    Result,
    both,
    budget_of,
    by_kind,
    columns_of,
    draw_band,
    full_cache,
    per_cent,
    points,
    scored,
    told,
)
from benchmarks.accuracy.tasks import VARIANTS
from benchmarks.documents import panels, table
from vlcache_jax.cache.allocate import Sparsity, Uniform
from vlcache_jax.cache.budget import POOL_SHARES, Budget, Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Observation, Plan
from vlcache_jax.cache.methods import Custom, VLCache, as_method, make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.cache.score import AllRows, ColumnSum, PostVisionRows

SCORES = {"post-vision": ColumnSum(PostVisionRows()), "full prompt": ColumnSum(AllRows())}
ALLOCATIONS = {"sparsity": Sparsity(), "uniform": Uniform()}
PAIRS = {", ".join(pair): pair for pair in product(SCORES, ALLOCATIONS)}
"""All keep the last 10 % of a layer's budget, so that nothing else differs: the first pair is
VL-Cache; the last one differs from H2O in that share, which is a half there."""

EFFECTS = {
    "score, under sparsity": ("post-vision, sparsity", "full prompt, sparsity"),
    "score, under uniform": ("post-vision, uniform", "full prompt, uniform"),
    "allocation, under post-vision": ("post-vision, sparsity", "post-vision, uniform"),
    "allocation, under full prompt": ("full prompt, sparsity", "full prompt, uniform"),
}
"""What differs in two of them: the first label is compared with the second."""


def _pairs(budget: float, layers: int) -> Mapping[str, CacheMethod]:
    return {
        label: Custom(budget, score=SCORES[score], allocation=ALLOCATIONS[allocation])
        for label, (score, allocation) in PAIRS.items()
    }


def _ablation(result: Result) -> str:
    rows, effects = [], []
    for budget, changed in result["effects"].items():
        for task, of_task in result["details"].items():
            cells = of_task[FULL]["1.0"], *(of_task[label][budget] for label in PAIRS)
            rows.append([task, budget_of(budget), *map(scored, cells)])
            found = (points(of[task]) for of in changed.values())
            effects.append([task, budget_of(budget), *found])
    return told(
        result,
        "Two token scores (attention of the rows after the picture, of all rows of the prompt) "
        "with two layer allocations (by the sparsity of the post-vision attention, equal). All "
        "else is VL-Cache's, so that 'post-vision, sparsity' is VL-Cache itself.",
        table(["task", "budget", "full cache", *PAIRS], rows),
        "What each axis changes, item by item: the post-vision score in place of the full "
        "prompt's, and the allocation by sparsity in place of the equal one.",
        table(["task", "budget", *EFFECTS], effects),
    )


ABLATION = Experiment(
    "Two scores by two allocations: is it VL-Cache's score that helps, or its layer budgets?",
    budgets=(0.05, 0.1),
    section=_ablation,
    methods=_pairs,
    effects=EFFECTS,
)

ALL = ("all layers, equal", "all layers, VL-Cache")


@dataclass(frozen=True)
class OneLayer(Custom):
    """Compress one layer as another method would, and keep every token of the others.

    The budget is that layer's alone. The pool is as large as the full cache's.
    """

    name: ClassVar[str] = "one-layer"

    layer: int = 0

    def plan(self, seen: Observation, prompt: Prompt) -> Plan:
        """The other method's plan, with the lengths of the other layers as they are."""
        plan = super().plan(seen, prompt)
        own = jnp.arange(prompt.layers) == self.layer
        return replace(plan, budgets=jnp.where(own, plan.budgets, prompt.length[:, None]))

    def build(
        self,
        k: jax.Array,
        v: jax.Array,
        plan: Plan,
        prompt: Prompt,
        new_rows: int = 0,
        room: Budget | None = None,
    ) -> AnyPool:
        """With room for every row."""
        room = room or Budget.parse(POOL_SHARES[-1])
        return super().build(k, v, plan, prompt, new_rows, room)


def _single_layers(budget: float, layers: int) -> Mapping[str, CacheMethod]:
    single = {
        f"layer {layer}": OneLayer(budget, allocation="uniform", layer=layer)
        for layer in range(layers)
    }
    return single | dict(
        zip(ALL, (Custom(budget, allocation="uniform"), VLCache(budget)), strict=True)
    )


def _layers(result: Result) -> str:
    details, parts = result["details"], []
    labels = [label for label in next(iter(details.values())) if label != FULL]
    for budget in result["budgets"]:
        rows = [["none", *(scored(of_task[FULL]["1.0"]) for of_task in details.values())]]
        rows += [[label, *(both(of[label][budget]) for of in details.values())] for label in labels]
        parts += [f"Budget of {budget_of(budget)}:", table(["compressed", *details], rows)]
    return told(
        result,
        "A single layer keeps the budget's share of its tokens, the best by the post-vision "
        "score, and all others keep everything. Below, all layers keep their share: each the "
        "same, or VL-Cache's. Each cell has the score, and the difference to the full cache.",
        *parts,
    )


def _draw_layers(result: Result) -> Any:
    """Difference to the full cache by the layer that is compressed."""
    budget, layers = result["budgets"][0], range(result["architecture"]["layers"])
    figure, ((axes,),) = panels(7, 3.4)
    for index, (task, of_task) in enumerate(result["details"].items()):
        changes = [of_task[f"layer {layer}"][budget]["difference"] for layer in layers]
        ends = ([100 * each[end] for each in changes] for end in ("mean", "low", "high"))
        line = draw_band(axes, layers, *ends, marker="o", label=task)
        for label, style in zip(ALL, ("--", ":"), strict=True):
            mean = 100 * of_task[label][budget]["difference"]["mean"]
            name = label if index == 0 else None
            axes.axhline(mean, color=line.get_color(), linestyle=style, linewidth=1, label=name)
    title = f"one layer compressed to {budget_of(budget)}"
    axes.set(xlabel="layer", ylabel="difference to full, points", title=title)
    axes.legend(fontsize="small")
    return figure


LAYERS = Experiment(
    "One layer compressed at a time, the others whole: which layers can spare their tokens?",
    budgets=(0.1,),
    section=_layers,
    methods=_single_layers,
    at_once=8,  # each of these has a pool of the full cache's size
    draw=_draw_layers,
)

DEFAULT = "default"
SETTINGS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.001, 0.003, 0.01, 0.03, 0.1),
    "recent_ratio": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
    "max_window": (1, 2, 4, 8, 16, 32, 512),
    "shared_heads": (False, True),
    "renormalize": (False, True),
}
"""Values of the fields of `VLCache`. The windows are the last rows of the post-vision ones; 512
is all of them."""

NAMES = {
    "threshold": ("p", "the share of its row's maximum below which attention counts as none"),
    "recent_ratio": ("recent ratio", "the share of the budget that goes to the last tokens"),
    "max_window": ("window", "how many of the rows behind the picture are looked from, the last"),
    "shared_heads": ("shared heads", "one set of tokens per layer"),
    "renormalize": ("renormalised", "what the clip of the shares cuts off is handed out again"),
}
"""What a document calls them, and what they are."""


def label_of(setting: str, value: Any) -> str:
    """What a file calls VL-Cache with one setting of its own."""
    return DEFAULT if getattr(VLCache(), setting) == value else f"{setting}={value}"


def _one_setting(budget: float, layers: int) -> Mapping[str, CacheMethod]:
    return {DEFAULT: VLCache(budget)} | {
        label_of(setting, value): VLCache(budget, **{setting: value})
        for setting, values in SETTINGS.items()
        for value in values
    }


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:g}"


def _settings(result: Result) -> str:
    details, columns = result["details"], columns_of(result)
    defaults = [scored(details[task][DEFAULT][budget]) for task, budget in columns.values()]
    parts = [table(["", *columns], [["defaults", *defaults]])]
    for setting, values in SETTINGS.items():
        rows = []
        for value in values:
            label = label_of(setting, value)
            if label == DEFAULT:
                rows.append([f"{_shown(value)} (default)", *["0"] * len(columns)])
            else:
                found = (details[task][label][budget] for task, budget in columns.values())
                rows.append([_shown(value), *(points(each["to_default"]) for each in found)])
        name, meaning = NAMES[setting]
        parts += [f"**{name}**, {meaning}", table([name, *columns], rows)]
    return told(
        result,
        "One setting at a time, all others at their defaults. The first table has the scores "
        "of the defaults, the others the difference to them, item by item. " + full_cache(details),
        *parts,
    )


def _draw_settings(result: Result) -> Any:
    """Scores by the settings that are numbers, at the largest budget."""
    budget = max(result["budgets"], key=float)
    numbers = {name: values for name, values in SETTINGS.items() if len(values) > 2}
    figure, (all_axes,) = panels(3.2 * len(numbers), 3.2, columns=len(numbers), sharey=True)
    for axes, (setting, values) in zip(all_axes, numbers.items(), strict=True):
        places = range(len(values))
        for task, of_task in result["details"].items():
            facts = [of_task[label_of(setting, value)][budget] for value in values]
            ends = ([100 * end for end in (of["score"], *of["interval"])] for of in facts)
            draw_band(axes, places, *zip(*ends, strict=True), marker="o", label=task)
        axes.set_xticks(places, list(map(_shown, values)))
        axes.set_xlabel(NAMES[setting][0])
    all_axes[0].set_ylabel(f"score at {budget_of(budget)}, %")
    all_axes[0].legend(fontsize="small")
    return figure


VL_CACHE_SETTINGS = Experiment(
    "VL-Cache's settings, one at a time around their defaults: threshold p, recent ratio, "
    "window rows, shared heads, renormalised shares.",
    budgets=(0.05, 0.1),
    section=_settings,
    methods=_one_setting,
    baseline=("to_default", lambda label: DEFAULT),
    draw=_draw_settings,
)


def _run_variants(bench: Bench) -> Result:
    cells, found = bench.cells(methods_of), {}
    for variant in VARIANTS:
        items = bench.items(variant=variant)
        found[variant] = compare(items, bench.run(items, cells, variant))
    return {"variants": found}


def _variants(result: Result) -> str:
    parts = []
    for task in result["metric"]:
        kinds = {variant: of[task] for variant, of in result["variants"].items()}
        parts += [f"Task {task}:", by_kind(kinds, result["budgets"])]
    return told(
        result,
        "Plain prompts have one picture and then the question; of several turns, the pictures "
        "are in the first. Where the question comes first, only the end of the user's turn "
        "stands behind the picture: these few rows are then VL-Cache's window. Each cell has "
        "the score, and the difference to the full cache on the same prompts.",
        *parts,
    )


PROMPTS = Experiment(
    "All methods on plain prompts, with the question first, two pictures, several turns.",
    budgets=(0.1,),
    section=_variants,
    run=_run_variants,
)

WHOLE_BITS = ("8", "4", "2", "kivi", "akvq")
"""What the full cache is quantized by, as `--kv-bits` calls it."""

EVICTING = ("vl-cache", "snapkv")
"""Methods whose kept tokens are quantized, by `BITS`."""

BITS = "akvq"


def _evicting(budget: float, layers: int) -> Mapping[str, CacheMethod]:
    return {
        f"{name}{suffix}": make_method(name, budget, make_quantizer(bits))
        for name in EVICTING
        for suffix, bits in (("", None), (f" + {BITS}", BITS))
    }


def _quantized(result: Result) -> str:
    details, rows = result["details"], []
    tasks = list(details)
    for label, of in details[tasks[0]].items():
        for budget, facts in of.items():
            own = [details[task][label][budget] for task in tasks]
            share = sum(each["kept_bytes"] for each in own) / len(own)
            bits = 16 * share * len(own) / sum(each["kept"] for each in own)
            agree = " / ".join(per_cent(each["agreement"]["answers"]) for each in own)
            versus = [points(each["to_method"]) if "to_method" in facts else "-" for each in own]
            rows.append(
                [label, budget_of(budget), f"{bits:.2f}", f"{share:.1%}", *map(both, own), agree,
                 *versus]
            )  # fmt: skip
    head = [
        "cache", "tokens", "bits of a value", "bytes", *tasks, f"same answers, {' / '.join(tasks)}",
        *(f"{task}, to the method as it is" for task in tasks),
    ]  # fmt: skip
    size, group = result["architecture"]["head_dim"], min(128, result["architecture"]["head_dim"])
    return told(
        result,
        f"The full cache, and what methods keep of it, quantized: by plain rounding behind the "
        f"Walsh-Hadamard transform (`8`, `4`, `2`), by KIVI, by AKVQ. Bytes are those of the "
        f"full cache, with scales, shifts and rows of 16 bit. A head of this model has {size} "
        f"values, so a scale and a shift stand for {group}, which is {32 / group:g} bit of "
        f"each value (of a head of 128, 0.25), and a prompt is short: AKVQ's 128 recent "
        f"tokens and 15 pivots of 16 bit are a larger part of it than of a long one. Each cell "
        f"has the score, and the difference to the full cache. {full_cache(details)}",
        table(head, rows),
    )


QUANTIZED = Experiment(
    "The cache in 8, 4 and 2 bits, by KIVI and by AKVQ, and AKVQ on top of methods that evict: "
    "what do the answers lose?",
    budgets=(0.1,),
    section=_quantized,
    methods=_evicting,
    whole=lambda: {f"{FULL} + {bits}": as_method(make_quantizer(bits)) for bits in WHOLE_BITS},
    baseline=("to_method", lambda label: label.removesuffix(f" + {BITS}")),
)
