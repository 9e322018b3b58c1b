"""The settings of VL-Cache, one at a time around their defaults."""

from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.experiments.common import Bench, Cell, compare, differences
from benchmarks.accuracy.experiments.text import budget_of, change, full_cache, made_by
from benchmarks.accuracy.report import Result, scored
from benchmarks.documents import table
from vlcache_jax.cache.methods import VLCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    is_default = getattr(VLCache(), setting) == value
    return DEFAULT if is_default else f"{setting}={value}"


def run(bench: Bench) -> Result:
    """Scores of each setting, and the difference to the defaults."""
    cells: dict[Cell, VLCache] = {}
    for text, budget in bench.budgets:
        cells[DEFAULT, text] = VLCache(budget)
        for setting, values in SETTINGS.items():
            for value in values:
                label = label_of(setting, value)
                if label != DEFAULT:
                    cells[label, text] = VLCache(budget, **{setting: value})
    items = bench.items()
    outcomes = bench.run(items, cells, "settings")
    details = compare(items, outcomes)
    for label, budget in cells:
        changed = differences(items, outcomes[label, budget], outcomes[DEFAULT, budget])
        for task, of_task in details.items():
            of_task[label][budget]["to_default"] = changed[task]
    labels = {
        setting: {_shown(value): label_of(setting, value) for value in values}
        for setting, values in SETTINGS.items()
    }
    return {"settings": labels, "details": details}


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    details = result["details"]
    columns = [(task, budget) for task in details for budget in result["budgets"]]
    head = [f"{task}, {budget_of(budget)}" for task, budget in columns]
    defaults = [scored(details[task][DEFAULT][budget]) for task, budget in columns]
    parts = [table(["", *head], [["defaults", *defaults]])]
    for setting, labels in result["settings"].items():
        rows = []
        for value, label in labels.items():
            if label == DEFAULT:
                rows.append([f"{value} (default)", *["0"] * len(columns)])
            else:
                found = [details[task][label][budget]["to_default"] for task, budget in columns]
                rows.append([value, *map(change, found)])
        name, meaning = NAMES[setting]
        parts += [f"**{name}**, {meaning}", table([name, *head], rows)]
    return "\n\n".join(
        [
            made_by(result),
            "One setting at a time, all others at their defaults. The first table has the scores "
            "of the defaults, the others the difference to them, item by item. "
            + full_cache(details),
            *parts,
        ]
    )


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:g}"


def draw(result: Result) -> "Figure":
    """Scores by the settings that are numbers, at the largest budget."""
    from matplotlib.figure import Figure

    budget = max(result["budgets"], key=float)
    numbers = {name: labels for name, labels in result["settings"].items() if len(labels) > 2}
    figure = Figure(figsize=(3.2 * len(numbers), 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for axes, (setting, labels) in zip(all_axes, numbers.items(), strict=True):
        places = range(len(labels))
        for task, of_task in result["details"].items():
            facts = [of_task[label][budget] for label in labels.values()]
            scores = [100 * of["score"] for of in facts]
            (line,) = axes.plot(places, scores, marker="o", label=task)
            low, high = ([100 * of["interval"][end] for of in facts] for end in (0, 1))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xticks(places, list(labels))
        axes.set_xlabel(NAMES[setting][0])
    all_axes[0].set_ylabel(f"score at {budget_of(budget)}, %")
    all_axes[0].legend(fontsize="small")
    return figure
