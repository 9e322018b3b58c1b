"""The experiments, their parts of docs/accuracy.md, and their plots."""

import json
from functools import partial
from pathlib import Path

from benchmarks.accuracy.experiments import compared, long, rare, scores
from benchmarks.accuracy.report import RESULTS, Result, Section, measured
from benchmarks.documents import ROOT, write_figure

EXPERIMENTS = {
    "ablation": compared.ABLATION,
    "layers": compared.LAYERS,
    "settings": compared.VL_CACHE_SETTINGS,
    "variants": compared.PROMPTS,
    "long": long.LONG,
    "rare": rare.RARE,
    "quantized": compared.QUANTIZED,
    "scores": scores.SCORING,
}


def result_file(name: str) -> Path:
    """Where an experiment's result is."""
    return RESULTS / f"experiment-{name}.json"


def plot_file(name: str, folder: Path = ROOT / "docs") -> Path:
    """Where its plot is."""
    return folder / f"accuracy-{name}.svg"


def part(name: str, result: Result) -> str:
    """The text of an experiment, with its plot where it has one."""
    text = EXPERIMENTS[name].section(result)
    return f"![{name}]({plot_file(name).name})\n\n{text}" if EXPERIMENTS[name].draw else text


SECTIONS = tuple(
    Section(f"experiment-{name}", result_file(name), measured(partial(part, name)))
    for name in EXPERIMENTS
)
"""Further parts of docs/accuracy.md, as those of `report.SECTIONS`."""


def write_plots(folder: Path = ROOT / "docs") -> None:
    """Draw each experiment that has a plot; without a result there is none."""
    for name, experiment in EXPERIMENTS.items():
        file, draw = result_file(name), experiment.draw
        if draw:
            write_figure(
                plot_file(name, folder),
                [file],
                lambda file=file, draw=draw: draw(json.loads(file.read_text(encoding="utf-8"))),
                salt=name,
            )
