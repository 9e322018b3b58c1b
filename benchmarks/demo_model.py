"""What the documents say of the shipped model: made of the files of its training and of its runs.

`python -m benchmarks.report` puts these parts into README.md and docs/demo-model.md.
"""

import json
import statistics
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console

import vlcache_jax
from benchmarks.accuracy.metrics import METRICS, exact_match
from benchmarks.accuracy.report import measured
from benchmarks.documents import NOT_MEASURED, ROOT, source_of, table, write_figure
from benchmarks.environment import environment
from benchmarks.make_demo import RESULTS as TRAINING
from benchmarks.make_demo import fingerprint, read_log
from vlcache_jax import demo
from vlcache_jax.results.display import comparison_tables

RECIPE, LOG, MODEL = (TRAINING / name for name in ("recipe.json", "log.jsonl", "model.json"))
PLOT = ROOT / "docs" / "demo-training.svg"

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]


def run_demo() -> Result:
    """What `make demo` gives, and the answers to all pictures with the versions that gave them."""
    command = ["--no-compilation-cache", "compare", "demo", "--image", "demo", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "vlcache_jax.cli", *command], stdout=subprocess.PIPE, check=True
    )
    vlm, shown = vlcache_jax.load("demo"), demo.pictures()
    images, prompts = [picture.file for picture in shown], [picture.prompt for picture in shown]
    full = vlm.generate(images, prompts)
    kept = vlm.generate(images, prompts, cache=vlcache_jax.VLCache(0.1))
    return {
        **environment(),
        "sha256": fingerprint(demo.CHECKPOINT),
        "comparison": json.loads(done.stdout),
        "pictures": [
            {
                "name": picture.name,
                "task": picture.task,
                "right_answer": picture.answer,
                "full": all_of_it.text,
                "kept": tenth.text,
            }
            for picture, all_of_it, tenth in zip(shown, full, kept, strict=True)
        ],
    }


def demo_part(result: Result, model: Result | None) -> str:
    """What `make demo` prints, for the README."""
    console = Console(width=80, color_system=None)
    with console.capture() as printed:
        console.print(comparison_tables(result["comparison"]))
    what = "The shipped checkpoint has random weights: it shows that everything runs."
    if model is not None:
        what = (
            f"The shipped model is a LLaVA-NeXT in shape and small in size "
            f"({model['parameters']['total'] / 1e6:.1f} million parameters). The project has "
            "trained it on pictures that it draws itself, and "
            "[docs/demo-model.md](docs/demo-model.md) says what it can do and what not. The "
            "pictures that come with it are of seeds that it was not trained on."
        )
    return f"{what}\n\n```\n{printed.get().strip()}\n```\n\n{_right(result)}"


def _right(result: Result) -> str:
    """How many of the shipped pictures are answered right."""
    rows = result["pictures"]
    full, kept = (
        sum(exact_match(row[name], row["right_answer"]) for row in rows)
        for name in ("full", "kept")
    )
    return (
        f"Of the {len(rows)} pictures in the package {full:.0f} are answered right with the full "
        f"cache, and {kept:.0f} with a tenth of it, chosen by VL-Cache."
    )


def pictures_part(result: Result) -> str:
    """The answers to all pictures of the package."""

    def cell(text: str) -> str:
        # Whatever a model may answer: nothing that ends a cell of a table, or code in it.
        text = "".join(c if c.isprintable() and c not in "`|" else "?" for c in text)
        return f"`{' '.join(text.split()) or ' '}`"

    rows = []
    files = {picture.name: picture.file for picture in demo.pictures()}
    for row in result["pictures"]:
        answers = (cell(row[name]) for name in ("right_answer", "full", "kept"))
        file = f"../{files[row['name']].relative_to(ROOT).as_posix()}"
        rows.append([f"[{row['name']}]({file})", row["task"], *answers])
    head = ["picture", "task", "right answer", "full cache", "a tenth"]
    return f"{_right(result)}\n\n{table(head, rows)}"


def model_part(model: Result | None) -> str:
    """Shape and size of the checkpoint, and what it was shipped for."""
    if model is None:
        return (
            f"{NOT_MEASURED} The checkpoint has random weights: what is said below is not yet so."
        )
    vision, text, counts = model["vision"], model["text"], model["parameters"]
    tied = "tied to the embedding" if text["tie_embeddings"] else "of its own"
    shapes = {
        "vision": f"{vision['layers_run']} layers of {vision['hidden_size']}, "
        f"{vision['num_heads']} heads; tiles of {vision['image_size']} pixels, patches of "
        f"{vision['patch_size']}",
        "projector": f"two layers, {vision['hidden_size']} to {text['hidden_size']}",
        "embed": f"{text['vocab_size']} tokens",
        "layers": f"{text['num_layers']} layers of {text['hidden_size']}, {text['num_heads']} "
        f"query and {text['num_kv_heads']} kv heads of {text['head_dim']}, MLP of "
        f"{text['intermediate_size']}",
        "head": f"the last norm; the output projection is {tied}",
    }
    rows = [[name, shape, f"{counts[name]:,}"] for name, shape in shapes.items()]
    rows.append(["all", f"{model['weights_bytes'] / 1e6:.1f} MB", f"{counts['total']:,}"])
    shown = f"It is shipped for the tasks {_listed(model['tasks'])}."
    return f"{table(['part', 'shape', 'parameters'], rows)}\n\n{shown}"


@measured
def recipe_part(recipe: Result) -> str:
    """All settings of the training: those of each stage as a table."""
    stages = recipe["stages"]
    rows = (
        [name.replace("_", " "), *(_shown(stage.get(name)) for stage in stages)]
        for name in dict.fromkeys(name for stage in stages for name in stage)
    )
    rest = "; ".join(
        f"{name.replace('_', ' ')} {_shown(value)}"
        for name, value in recipe.items()
        if name not in ("stages", "vision", "text")
    )
    head = ["stage", *map(str, range(1, len(stages) + 1))]
    return f"{table(head, rows)}\n\nOf all stages: {rest}.\n\n{_guidance(stages)}"


def _guidance(stages: list[Result]) -> str:
    guided = [number for number, stage in enumerate(stages, 1) if stage.get("guide_weight")]
    if not guided:
        return "No loss led the attention: what the heads attend to, they learned from answers."
    steps = sum(stages[number - 1]["steps"] for number in guided)
    after = sum(stage["steps"] for stage in stages[guided[-1] :])
    return (
        "Guidance shapes what cache methods are measured on: an extra loss led some heads of two "
        f"middle layers to the patch to be read next, in stage {_listed(map(str, guided))}, for "
        f"{steps:,} steps. {after:,} steps without it follow."
    )


def log_part(log: list[Result] | None, recipe: Result | None) -> str:
    """How far the training went, and its curves."""
    if not log or recipe is None:
        return NOT_MEASURED
    last = log[-1]
    planned = sum(stage["steps"] for stage in recipe["stages"])
    done = f"{last['step']:,} of the recipe's {planned:,} steps"
    # The median over the log's lines: a pause between two slices does not count.
    times = [(line["step"], datetime.fromisoformat(line["time"]).timestamp()) for line in log]
    if len(times) > 1:
        rates = [(then - now) / (end - at) for (at, now), (end, then) in pairwise(times)]
        seconds = statistics.median(rates)
        done += (
            f", about {last['step'] * seconds / 3600:.1f} hours (the median time of a step, "
            f"{seconds:.2f} s, times the steps)"
        )
    values = "; ".join(f"{name} {_shown(value)}" for name, value in _curves(last).items())
    return (
        f"{done}. The last line of the log: {values}.\n\n"
        f"![Losses and accuracies over the steps]({PLOT.name})\n\n"
        "Held-out pictures are of seeds that are never trained on, as hard as those of the stage: "
        "where a stage begins, the curve may fall."
    )


def _curves(line: Result) -> dict[str, float]:
    """The numbers of a line of the log by their names."""
    found = {}
    for name, value in line.items():
        words = name.replace("_", " ")
        if isinstance(value, dict):
            found |= {f"{words}, {key}": number for key, number in value.items()}
        elif isinstance(value, int | float) and name != "step":
            found[words] = value
    return found


@measured
def accuracy_part(run: Result) -> str:
    """The full cache and VL-Cache on the tasks, from a run of `python -m benchmarks.accuracy`."""
    found = {share for methods in run["details"].values() for share in methods["vl-cache"]}
    kept = sorted((share for share in found if float(share) < 1), key=float, reverse=True)
    heads = ["task", "score", "full cache", *(f"VL-Cache, {float(share):.0%}" for share in kept)]
    rows = []
    for task, methods in run["details"].items():
        facts = [methods["full"]["1.0"], *(methods["vl-cache"].get(share) for share in kept)]
        cells = ("-" if each is None else f"{each['score']:.1%}" for each in facts)
        rows.append([task, METRICS[task], *cells])
    return (
        f"{run['n']:,} items of each task, by `python -m benchmarks.accuracy`:\n\n"
        f"{table(heads, rows)}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(words: Any) -> str:
    """1 → "a"; 3 → "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def plot_source() -> str | None:
    """A fingerprint of what the plot is made of, which is written into it; None without a log."""
    return source_of(RECIPE, LOG)


def write_plot() -> None:
    """Draw the curves of the training; without a log there is no plot."""
    write_figure(PLOT, [RECIPE, LOG], draw_training, salt="demo")


def draw_training() -> "Figure":
    """Losses and accuracies over the steps, with the ends of the stages."""
    from matplotlib.figure import Figure

    log = read_log(LOG.read_text(encoding="utf-8"))
    stages = json.loads(RECIPE.read_text(encoding="utf-8"))["stages"]
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        for name, value in _curves(line).items():
            curves.setdefault(name, []).append((line["step"], value))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, shares = figure.subplots(1, 2)
    for axes, title in ((losses, "loss"), (shares, "share that is right")):
        for name, points in curves.items():
            if ("loss" in name) == (title == "loss"):
                axes.plot(*zip(*points, strict=True), label=name)
        end = 0
        for stage in stages[:-1]:
            end += stage["steps"]
            if end < log[-1]["step"]:
                axes.axvline(end, color="0.85", linewidth=1, zorder=0)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small")
    losses.set_yscale("log")
    shares.set_ylim(0, 1.02)
    return figure
