"""What docs/accuracy.md says: every number of it comes from a result file.

`python -m benchmarks.report` puts these parts into the document and draws the plot. What was not
measured says so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import documents
from benchmarks.documents import DOCS, NOT_MEASURED, Part, Plot, Result, measured, panels, table

RESULTS = documents.RESULTS / "accuracy"
BUDGETS = RESULTS / "budgets.json"
"""What `python -m benchmarks.accuracy --out` wrote."""

PLOT_FILE = DOCS / "accuracy-budgets.svg"
SHOWN = "0.1"
"""The budget that the paper reports most, and of which most is told here."""

FULL = "full"
NEAR = 0.02
"""So far below the full cache counts as near it."""

Facts = dict[str, Any]


def scored(facts: Facts | None) -> str:
    """A score in per cent and its interval; a dash where there is none."""
    if facts is None:
        return "-"
    low, high = facts["interval"]
    return f"{100 * facts['score']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def points(interval: dict[str, float]) -> str:
    """A difference in points and its interval."""
    mean, low, high = (100 * interval[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def difference(facts: Facts | None) -> str:
    """The difference to the full cache in points and its interval; a dash where there is none."""
    return "-" if facts is None else points(facts["difference"])


def per_cent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}"


def budget_of(text: str) -> str:
    """A budget as files write it, in per cent."""
    return f"{100 * float(text):g} %"


def both(facts: Facts) -> str:
    """A score in per cent, and its difference to the full cache in points."""
    return f"{per_cent(facts['score'])}; {difference(facts)}"


def full_cache(details: Result) -> str:
    """The full cache's scores in one sentence."""
    scores = [f"{scored(of_task[FULL]['1.0'])} in {task}" for task, of_task in details.items()]
    return f"The full cache scores {', '.join(scores)}."


def columns_of(result: Result) -> dict[str, tuple[str, str]]:
    """A column for each task and budget: its head, and the two."""
    return {
        f"{task}, {budget_of(budget)}": (task, budget)
        for task in result["details"]
        for budget in result["budgets"]
    }


def by_kind(kinds: Mapping[str, Result], budgets: Sequence[str]) -> str:
    """A table of {label: {budget: facts}} for each kind of items: one column each."""
    first, *_ = kinds.values()
    rows = [[FULL, "100 %", *(scored(of[FULL]["1.0"]) for of in kinds.values())]]
    rows += [
        [name, budget_of(budget), *(both(of[name][budget]) for of in kinds.values())]
        for budget in budgets
        for name in first
        if name != FULL
    ]
    return table(["method", "budget", *kinds], rows)


def told(result: Result, *parts: str, items: str | None = None) -> str:
    """A part of the document: what was run, and what is said of it.

    Args:
        result: of the experiment.
        parts: paragraphs and tables.
        items: which items; `n` of each task, seeds after one another, by default.
    """
    metrics = ", ".join(f"{name} of {task}" for task, name in result["metric"].items())
    made_by = (
        f"`{result['command']}`: {items or items_of(result)}. Scores are in per cent ({metrics}), "
        "differences in points, with their 95 % intervals in brackets."
    )
    return "\n\n".join([made_by, *parts])


def of_methods(
    rows: Mapping[str, Any], columns: Mapping[str, Any], cell: Callable[[Any, Any], str]
) -> str:
    """A table with a row for each method: `cell` of what rows and columns stand for."""
    made = ([f"`{name}`", *(cell(row, each) for each in columns.values())]
            for name, row in rows.items())  # fmt: skip
    return table(["method", *columns], made)


def run_part(result: Result) -> str:
    """What was run, where, and how long it took."""
    shape, machine, seconds = result["architecture"], result["machine"], result["seconds"]
    return (
        f"{items_of(result)}. Model: {result['model']} "
        f"({shape['parameters'] / 1e6:.1f} million parameters, {shape['layers']} layers, "
        f"{shape['query_heads']} query and {shape['kv_heads']} kv heads of {shape['head_dim']}, "
        f"{shape['dtype']}; SHA-256 of the weights {shape['sha256'][:16]}). On "
        f"{machine['cores']} cores of {machine['cpu']}, {shape['device']}, with jax "
        f"{result['versions']['jax']}, commit {result['commit'][:12]}, {result['date'][:10]}, in "
        f"{seconds['total'] / 60:.0f} minutes, {seconds['compile'] / 60:.0f} of them for "
        f"compiling.\n\nCommand: `{result['command']}`"
    )


def items_of(result: Result) -> str:
    """Which items were run."""
    first, count = result["seed"], result["n"]
    return (
        f"{count:,} items of each task, seeds {first} to {first + count - 1} of the split "
        f"`{result['split']}`"
    )


def score_tables(result: Result) -> str:
    """A table of each task: its score by method and budget."""
    parts = []
    for task, of_task in result["details"].items():
        budgets = sorted({budget for of in of_task.values() for budget in of}, key=float)
        columns = {f"{float(budget):.0%}": budget for budget in budgets}
        cells = of_methods(of_task, columns, lambda of, budget: scored(of.get(budget)))
        title = f"**{task}** ({result['metric'][task]}, %, and its 95 % interval)"
        parts.append(f"{title}\n\n{cells}")
    return "\n\n".join(parts)


def scores_part(result: Result) -> str:
    """The tables, and the plot."""
    plot = f"![Scores and kept attention by budget]({PLOT_FILE.name})"
    return "\n\n".join([plot, score_tables(result), " ".join(result["notes"])])


def difference_part(result: Result) -> str:
    """How far each method is from the full cache, and from which budget on it is near it."""
    details = result["details"]
    names = {name: name for name in next(iter(details.values())) if name != FULL}

    def below(name: str, of_task: Result) -> str:
        return difference(of_task[name].get(SHOWN))

    def knee(name: str, of_task: Result) -> str:
        of = {**of_task[name], **of_task[FULL]}
        near = [budget for budget, facts in of.items() if facts["difference"]["mean"] >= -NEAR]
        return f"{float(min(near, key=float)):.0%}"

    def order(task: str) -> str:
        of = {name: each[SHOWN]["score"] for name, each in details[task].items() if SHOWN in each}
        best = sorted(of, key=lambda name: -of[name])
        return f"- {task}: {', '.join(f'`{name}` {per_cent(of[name])}' for name in best)}."

    return "\n\n".join(
        [
            f"Points below the full cache at {float(SHOWN):.0%}, item by item:",
            of_methods(names, details, below),
            f"The smallest budget that was run with a mean at most {100 * NEAR:g} points below:",
            of_methods(names, details, knee),
            f"The order at {float(SHOWN):.0%}:",
            "\n".join(map(order, details)),
        ]
    )


def attention_part(result: Result) -> str:
    """What was kept, and how much of what is attended to was among it."""
    columns: dict[str, Callable[[Facts], float]] = {
        "cache kept": lambda facts: facts["kept"],
        "visual tokens kept": lambda facts: facts["kept_visual"],
        "CacheHitRate": lambda facts: facts["hit_rate"],
        "first token's attention kept": lambda facts: facts["mass_recall"],
        "answer's attention kept": lambda facts: facts["answer_recall"],
        "same tokens": lambda facts: facts["agreement"]["tokens"],
        "same answers": lambda facts: facts["agreement"]["answers"],
    }
    parts = []
    for task, of_task in result["details"].items():
        shown = {name: of[SHOWN] for name, of in of_task.items() if SHOWN in of}
        cells = of_methods(shown, columns, lambda facts, pick: per_cent(pick(facts)))
        parts.append(f"**{task}**, %, at {float(SHOWN):.0%}\n\n{cells}")
    return "\n\n".join(parts)


def variants_part(result: Result) -> str:
    """Scores by the kind of prompt."""
    parts = []
    for task, of_task in result["details"].items():
        shown = {FULL: of_task[FULL]["1.0"]} | {
            name: of[SHOWN] for name, of in of_task.items() if SHOWN in of
        }
        kinds = shown[FULL]["variants"]
        columns = {f"{kind} ({facts['n']})": kind for kind, facts in kinds.items()}
        cells = of_methods(shown, columns, lambda facts, kind: scored(facts["variants"][kind]))
        parts.append(f"**{task}** at {float(SHOWN):.0%} (items)\n\n{cells}")
    return "\n\n".join(parts)


def layers_part(result: Result) -> str:
    """What each layer keeps under VL-Cache, and how much of the attention that is."""
    rows = []
    for task, of_task in result["details"].items():
        for name in ("vl-cache", "oracle-layers"):
            if SHOWN in of_task.get(name, {}):
                by_layer = of_task[name][SHOWN]["by_layer"]
                for what, key in (("kept", "kept"), ("answer's attention", "answer_recall")):
                    rows.append([task, f"`{name}`", what, *map(per_cent, by_layer[key])])
    layers = map(str, range(result["architecture"]["layers"]))
    head = ["task", "method", f"% at {float(SHOWN):.0%}", *layers]
    return table(head, rows) if rows else NOT_MEASURED


SECTIONS = tuple(
    Part(name, measured(make), (BUDGETS,))
    for name, make in (
        ("run", run_part),
        ("scores", scores_part),
        ("differences", difference_part),
        ("attention", attention_part),
        ("layers", layers_part),
        ("variants", variants_part),
    )
)
"""The generated parts of docs/accuracy.md."""


def draw_band(
    axes: Any,
    x: Sequence[float],
    middle: Any,
    low: Any,
    high: Any,
    *,
    alpha: float = 0.15,
    **style: Any,
) -> Any:
    """Draw a line with its intervals around it, and give the line."""
    (line,) = axes.plot(x, middle, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=alpha, linewidth=0)
    return line


def draw_budgets(result: Result) -> Any:
    """Scores and kept attention by budget, a column for each task."""
    details = result["details"]
    figure, grid = panels(3.2 * len(details), 6, 2, len(details), sharex=True, sharey="row")
    for column, (task, of_task) in enumerate(details.items()):
        above, below = grid[0, column], grid[1, column]
        above.axhline(of_task[FULL]["1.0"]["score"], color="black", linestyle=":", label=FULL)
        for name, of in of_task.items():
            budgets = sorted((budget for budget in of if float(budget) < 1), key=float)
            if not budgets:
                continue
            x, facts = [float(budget) for budget in budgets], [of[budget] for budget in budgets]
            style = {"label": name, "marker": ".", "linestyle": "--" if "oracle" in name else "-"}
            ends = zip(*((each["score"], *each["interval"]) for each in facts), strict=True)
            draw_band(above, x, *ends, alpha=0.12, **style)
            below.plot(x, [each["answer_recall"] for each in facts], **style)
        above.set(title=task, ylim=(0, 1.03))
        below.set(xlabel="budget", xscale="log", ylim=(0, 1.03))
        ticks = sorted({float(b) for of in of_task.values() for b in of if float(b) < 1})
        below.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        below.minorticks_off()
    grid[0, 0].set_ylabel("score")
    grid[1, 0].set_ylabel("share of the answer's attention kept")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    return figure


PLOT = Plot(PLOT_FILE, (BUDGETS,), draw_budgets, "accuracy")
