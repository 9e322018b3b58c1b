"""What the documents say of the shipped models: made of the files of their training and runs.

`python -m benchmarks.report` puts these parts into README.md, docs/demo.md and docs/demo-small.md.
"""

import json
import statistics
import subprocess
import sys
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

import vlcache_jax
from benchmarks.accuracy.metrics import METRICS, exact_match
from benchmarks.accuracy.report import BUDGETS
from benchmarks.documents import (
    DOCS,
    NOT_MEASURED,
    RESULTS,
    ROOT,
    Part,
    Plot,
    Result,
    measured,
    panels,
    table,
)  # fmt: skip
from benchmarks.environment import environment
from benchmarks.make_demo import RESULTS as TRAINING
from benchmarks.make_demo import fingerprint
from vlcache_jax import demo
from vlcache_jax.cache.methods import make_method
from vlcache_jax.cli.options import COMPARED
from vlcache_jax.results.display import comparison_tables

SHOWN = ("demo", "demo-small")
"""The models of the package, by their own names."""


def result_file(name: str) -> Path:
    """What a model of the package answers, of a name of `demo.MODELS`."""
    return RESULTS / "cpu" / f"{name}.json"


def training_files(folder: Path) -> tuple[Path, Path]:
    """Recipe and log of a run."""
    return folder / "recipe.json", folder / "log.jsonl"


def run_demo(name: str) -> Result:
    """What `compare` shows of a model's first picture, and the answers to all of its pictures."""
    command = ["--no-compilation-cache", "compare", name, "--image", name, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "vlcache_jax.cli", *command], stdout=subprocess.PIPE, check=True
    )
    vlm, shown = vlcache_jax.load(name), demo.pictures(name)
    images, prompts = [picture.file for picture in shown], [picture.prompt for picture in shown]
    caches = [make_method("full"), *(make_method(name, 0.1) for name in COMPARED)]
    answers = {cache.name: vlm.generate(images, prompts, cache=cache) for cache in caches}
    return {
        **environment(),
        "model": name,
        "sha256": fingerprint(demo.MODELS[name]),
        "comparison": json.loads(done.stdout),
        "pictures": [
            {
                "name": picture.name,
                "task": picture.task,
                "right_answer": picture.answer,
                "answers": {method: found[index].text for method, found in answers.items()},
            }
            for index, picture in enumerate(shown)
        ],
    }


@measured
def demo_part(result: Result, model: Result | None) -> str:
    """What `make demo` prints, for the README."""
    console = Console(width=80, color_system=None)
    with console.capture() as printed:
        console.print(comparison_tables(result["comparison"]))
    what = "The shipped checkpoint has random weights: it shows that everything runs."
    if model is not None:
        what = (
            "The model is a LLaVA-NeXT around a published decoder "
            f"({model['parameters']['total'] / 1e6:.0f} million parameters). The project has "
            "trained what is not the decoder's, on pages that it draws itself, and "
            "[docs/demo.md](docs/demo.md) says what it can do and what not. The pictures that come "
            "with it are of seeds that it was not trained on; none was chosen."
        )
    return f"{what}\n\n```\n{printed.get().strip()}\n```\n\n{_right(result)}"


def _right(result: Result) -> str:
    """How many of the shipped pictures are answered right."""
    rows = result["pictures"]
    full, *kept = (
        (name, sum(exact_match(row["answers"][name], row["right_answer"]) for row in rows))
        for name in rows[0]["answers"]
    )
    tenths = _listed(f"{right:.0f} by {name}" for name, right in kept)
    return (
        f"Of the {len(rows)} pictures in the package {full[1]:.0f} are answered right with the "
        f"full cache. With a tenth of it, chosen by a method: {tenths}."
    )


@measured
def pictures_part(result: Result) -> str:
    """The answers to all pictures of the package."""

    def cell(text: str) -> str:
        # Whatever a model may answer: nothing that ends a cell of a table, or code in it.
        text = "".join(c if c.isprintable() and c not in "`|" else "?" for c in text)
        return f"`{' '.join(text.split()) or ' '}`"

    rows = []
    files = {picture.name: picture.file for name in SHOWN for picture in demo.pictures(name)}
    for row in result["pictures"]:
        answers = map(cell, (row["right_answer"], *row["answers"].values()))
        file = f"../{files[row['name']].relative_to(ROOT).as_posix()}"
        rows.append([f"[{row['name']}]({file})", row["task"], *answers])
    _, *tenths = result["pictures"][0]["answers"]
    head = ["picture", "task", "right answer", "full cache", *(f"{name}, 10%" for name in tenths)]
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


def log_part(plot: str, recipe: Result | None, log: list[Result] | None) -> str:
    """How far the training went, and its curves, which the file `plot` shows."""
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
        f"![Losses and accuracies over the steps]({plot})\n\n"
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
    """The full cache and what `COMPARED` names on the tasks, by `python -m benchmarks.accuracy`."""
    kept = sorted(
        {
            (name, share)
            for methods in run["details"].values()
            for name in COMPARED
            for share in methods.get(name, ())
            if float(share) < 1
        },
        key=lambda each: (COMPARED.index(each[0]), -float(each[1])),
    )
    heads = [
        "task",
        "score",
        "full cache",
        *(f"{name}, {float(share):.0%}" for name, share in kept),
    ]
    rows = []
    for task, methods in run["details"].items():
        tenths = (methods[name].get(share) for name, share in kept)
        facts = [methods["full"]["1.0"], *tenths]
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


def draw_training(recipe: Result, log: list[Result]) -> Any:
    """Losses and accuracies over the steps, with the ends of the stages."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        for name, value in _curves(line).items():
            curves.setdefault(name, []).append((line["step"], value))
    figure, ((losses, shares),) = panels(9, 3.6, columns=2)
    for axes, title in ((losses, "loss"), (shares, "share that is right")):
        for name, points in curves.items():
            if ("loss" in name) == (title == "loss"):
                axes.plot(*zip(*points, strict=True), label=name)
        end = 0
        for stage in recipe["stages"][:-1]:
            end += stage["steps"]
            if end < log[-1]["step"]:
                axes.axvline(end, color="0.85", linewidth=1, zorder=0)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small")
    losses.set_yscale("log")
    shares.set_ylim(0, 1.02)
    return figure


def _model_file(name: str) -> Path:
    return TRAINING / name / "model.json"


SMALL_PLOT = Plot(
    DOCS / "demo-small-training.svg", training_files(TRAINING / "demo-small"), draw_training, "demo"
)
PAGES_PLOTS = {
    run: Plot(
        DOCS / f"demo-training{suffix}.svg", training_files(TRAINING / path), draw_training, "demo"
    )
    for run, suffix, path in (
        ("tower", "-tower", "demo/tower"),
        ("decoder", "-decoder", "demo/decoder"),
        ("together", "", "demo"),
    )
}
"""Of the runs that the model of pages was trained by."""

PAGES = RESULTS / "accuracy" / "pages.json"
"""What it answers, by `python -m benchmarks.accuracy`."""

DEMO = Part("demo", demo_part, (result_file("demo"), _model_file("demo")))
"""Of the README."""

PAGES_SECTIONS = (
    Part("model", model_part, (_model_file("demo"),)),
    Part("accuracy", accuracy_part, (PAGES,)),
    Part("pictures", pictures_part, (result_file("demo"),)),
    *(Part(f"recipe-{run}", recipe_part, plot.files[:1]) for run, plot in PAGES_PLOTS.items()),
    *(
        Part(f"log-{run}", partial(log_part, plot.path.name), plot.files)
        for run, plot in PAGES_PLOTS.items()
    ),
)
"""Of docs/demo.md."""

SMALL_SECTIONS = (
    Part("model", model_part, (_model_file("demo-small"),)),
    Part("recipe", recipe_part, SMALL_PLOT.files[:1]),
    Part("log", partial(log_part, SMALL_PLOT.path.name), SMALL_PLOT.files),
    Part("accuracy", accuracy_part, (BUDGETS,)),
    Part("pictures", pictures_part, (result_file("demo-small"),)),
)
"""Of docs/demo-small.md."""

PLOTS = (SMALL_PLOT, *PAGES_PLOTS.values())
