"""The experiments, their parts of docs/accuracy.md, and their plots."""

from functools import partial
from pathlib import Path

from benchmarks.accuracy.experiments import compared, long, questions, rare, scores
from benchmarks.accuracy.report import RESULTS
from benchmarks.documents import DOCS, Part, Plot, Result, measured

EXPERIMENTS = {
    "ablation": compared.ABLATION,
    "layers": compared.LAYERS,
    "settings": compared.VL_CACHE_SETTINGS,
    "variants": compared.PROMPTS,
    "long": long.LONG,
    "questions": questions.QUESTIONS,
    "rare": rare.RARE,
    "quantized": compared.QUANTIZED,
    "scores": scores.SCORING,
}


def result_file(name: str) -> Path:
    """Where an experiment's result is."""
    return RESULTS / f"experiment-{name}.json"


def plot_file(name: str, folder: Path = DOCS) -> Path:
    """Where its plot is."""
    return folder / f"accuracy-{name}.svg"


def part(name: str, result: Result) -> str:
    """The text of an experiment, with its plot where it has one."""
    text = EXPERIMENTS[name].section(result)
    return f"![{name}]({plot_file(name).name})\n\n{text}" if EXPERIMENTS[name].draw else text


SECTIONS = tuple(
    Part(f"experiment-{name}", measured(partial(part, name)), (result_file(name),))
    for name in EXPERIMENTS
)
"""Further parts of docs/accuracy.md, as those of `report.SECTIONS`."""


def plots(folder: Path = DOCS) -> list[Plot]:
    """The plots of the experiments that have one."""
    return [
        Plot(plot_file(name, folder), (result_file(name),), experiment.draw, name)
        for name, experiment in EXPERIMENTS.items()
        if experiment.draw
    ]
