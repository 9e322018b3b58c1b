"""What docs/accuracy.md says: every number of it comes from a result file.

`python -m benchmarks.report` puts these parts into the document and draws the plot. A further
experiment is a further entry of `SECTIONS`: a name, the file of its result, and a function that
makes the text of it. What was not measured says so.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.documents import NOT_MEASURED, ROOT, table, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
BUDGETS = RESULTS / "budgets.json"
"""What `python -m benchmarks.accuracy --out` wrote."""

PLOT = ROOT / "docs" / "accuracy-budgets.svg"
SHOWN = "0.1"
"""The budget that the paper reports most, and of which most is told here."""

NEAR = 0.02
"""So far below the full cache counts as near it."""

Result = dict[str, Any]
Facts = dict[str, Any]


class Section(NamedTuple):
    """A generated part of the document.

    Attributes:
        name: what the comments around it call it.
        file: its result file.
        make: the text, of what the file holds, or of None where it is not there.
    """

    name: str
    file: Path
    make: Callable[[Result | None], str]


def scored(facts: Facts | None) -> str:
    """A score in per cent and its interval; a dash where there is none."""
    if facts is None:
        return "-"
    low, high = facts["interval"]
    return f"{100 * facts['score']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def difference(facts: Facts | None) -> str:
    """The difference to the full cache in points and its interval."""
    if facts is None:
        return "-"
    mean, low, high = (100 * facts["difference"][name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def per_cent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}"


def run_part(result: Result | None) -> str:
    """What was run, where, and how long it took."""
    if result is None:
        return NOT_MEASURED
    shape, machine, seconds = result["architecture"], result["machine"], result["seconds"]
    first, count = result["seed"], result["n"]
    return (
        f"{count:,} items of each task, seeds {first} to {first + count - 1} of the split "
        f"`{result['split']}`{_made_easier(result)}. Model: {result['model']} "
        f"({shape['parameters'] / 1e6:.1f} million parameters, {shape['layers']} layers, "
        f"{shape['query_heads']} query and {shape['kv_heads']} kv heads of {shape['head_dim']}, "
        f"{shape['dtype']}; SHA-256 of the weights {shape['sha256'][:16]}). On "
        f"{machine['cores']} cores of {machine['cpu']}, {shape['device']}, with jax "
        f"{result['versions']['jax']}, commit {result['commit'][:12]}, {result['date'][:10]}, in "
        f"{seconds['total'] / 60:.0f} minutes, {seconds['compile'] / 60:.0f} of them for "
        f"compiling.\n\nCommand: `{result['command']}`"
    )


def _made_easier(result: Result) -> str:
    """In what the items differ from the benchmark's own."""
    usual = {"level": 1, "jitter": 2, "variant": None, "manner": "full"}
    changed = [f"{name} {result[name]}" for name in usual if result[name] != usual[name]]
    return f" ({', '.join(changed)})" if changed else ""


def scores_part(result: Result | None) -> str:
    """A table of each task, and the plot."""
    if result is None:
        return NOT_MEASURED
    parts = [f"![Scores and kept attention by budget]({PLOT.name})"]
    for task, of_task in result["details"].items():
        budgets = sorted({budget for of in of_task.values() for budget in of}, key=float)
        rows = (
            [f"`{name}`", *(scored(of.get(budget)) for budget in budgets)]
            for name, of in of_task.items()
        )
        metric = result["metric"][task].replace("_", "-")
        head = ["method", *(f"{float(budget):.0%}" for budget in budgets)]
        parts.append(f"**{task}** ({metric}, %, and its 95 % interval)\n\n{table(head, rows)}")
    return "\n\n".join([*parts, " ".join(result["notes"])])


def difference_part(result: Result | None) -> str:
    """How far each method is from the full cache, and from which budget on it is near it."""
    if result is None:
        return NOT_MEASURED
    tasks, details = list(result["details"]), result["details"]
    names = [name for name in details[tasks[0]] if name != "full"]
    rows = (
        [f"`{name}`", *(difference(details[task][name].get(SHOWN)) for task in tasks)]
        for name in names
    )
    near = (
        [f"`{name}`", *(_knee(details[task][name], details[task]["full"]) for task in tasks)]
        for name in names
    )
    order = (f"- {task}: " + ", ".join(_order(details[task], names)) + "." for task in tasks)
    return "\n\n".join(
        [
            f"Points below the full cache at {float(SHOWN):.0%}, item by item:",
            table(["method", *tasks], rows),
            f"The smallest budget that was run with a mean at most {100 * NEAR:g} points below:",
            table(["method", *tasks], near),
            f"The order at {float(SHOWN):.0%}:",
            "\n".join(order),
        ]
    )


def _knee(of: dict[str, Facts], full: dict[str, Facts]) -> str:
    near = [
        budget for budget, facts in {**of, **full}.items() if facts["difference"]["mean"] >= -NEAR
    ]
    return f"{float(min(near, key=float)):.0%}"


def _order(of_task: dict[str, dict[str, Facts]], names: list[str]) -> list[str]:
    scores = {name: of_task[name][SHOWN]["score"] for name in names if SHOWN in of_task[name]}
    return [
        f"`{name}` {per_cent(scores[name])}" for name in sorted(scores, key=lambda n: -scores[n])
    ]


def attention_part(result: Result | None) -> str:
    """What was kept, and how much of what is attended to was among it."""
    if result is None:
        return NOT_MEASURED
    columns = {
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
        rows = (
            [f"`{name}`", *(per_cent(pick(of[SHOWN])) for pick in columns.values())]
            for name, of in of_task.items()
            if SHOWN in of
        )
        parts.append(f"**{task}**, %, at {float(SHOWN):.0%}\n\n{table(['method', *columns], rows)}")
    return "\n\n".join(parts)


def variants_part(result: Result | None) -> str:
    """Scores by the kind of prompt."""
    if result is None:
        return NOT_MEASURED
    parts = []
    for task, of_task in result["details"].items():
        shown = {"full": of_task["full"]["1.0"]} | {
            name: of[SHOWN] for name, of in of_task.items() if SHOWN in of
        }
        kinds = list(shown["full"]["variants"])
        counts = [f"{kind} ({shown['full']['variants'][kind]['n']})" for kind in kinds]
        rows = (
            [f"`{name}`", *(scored(facts["variants"][kind]) for kind in kinds)]
            for name, facts in shown.items()
        )
        head = ["method", *counts]
        parts.append(f"**{task}** at {float(SHOWN):.0%} (items)\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def layers_part(result: Result | None) -> str:
    """What each layer keeps under VL-Cache, and how much of the attention that is."""
    if result is None or not all("vl-cache" in of for of in result["details"].values()):
        return NOT_MEASURED
    count = result["architecture"]["layers"]
    rows = []
    for task, of_task in result["details"].items():
        for name in ("vl-cache", "oracle-layers"):
            if SHOWN in of_task.get(name, {}):
                by_layer = of_task[name][SHOWN]["by_layer"]
                for what, key in (("kept", "kept"), ("answer's attention", "answer_recall")):
                    values = [per_cent(value) for value in by_layer[key]]
                    rows.append([task, f"`{name}`", what, *values])
    head = ["task", "method", f"% at {float(SHOWN):.0%}", *map(str, range(count))]
    return table(head, rows)


SECTIONS: tuple[Section, ...] = (
    Section("run", BUDGETS, run_part),
    Section("scores", BUDGETS, scores_part),
    Section("differences", BUDGETS, difference_part),
    Section("attention", BUDGETS, attention_part),
    Section("layers", BUDGETS, layers_part),
    Section("variants", BUDGETS, variants_part),
)
"""The generated parts of docs/accuracy.md."""


def write_plot(file: Path = BUDGETS, plot: Path = PLOT) -> None:
    """Draw scores and kept attention by budget; without a result there is no plot."""

    def draw() -> "Figure":
        return draw_budgets(json.loads(file.read_text(encoding="utf-8"))["details"])

    write_figure(plot, [file], draw, salt="accuracy")


def draw_budgets(details: Result) -> "Figure":
    """Scores and kept attention by budget, a column for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(details), 6), layout="constrained")
    grid = figure.subplots(2, len(details), sharex=True, sharey="row", squeeze=False)
    for column, (task, of_task) in enumerate(details.items()):
        above, below = grid[0, column], grid[1, column]
        above.axhline(of_task["full"]["1.0"]["score"], color="black", linestyle=":", label="full")
        for name, of in of_task.items():
            budgets = sorted((budget for budget in of if float(budget) < 1), key=float)
            if not budgets:
                continue
            x, facts = [float(budget) for budget in budgets], [of[budget] for budget in budgets]
            style = {"label": name, "marker": ".", "linestyle": "--" if "oracle" in name else "-"}
            (line,) = above.plot(x, [each["score"] for each in facts], **style)
            low, high = zip(*(each["interval"] for each in facts), strict=True)
            above.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
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
