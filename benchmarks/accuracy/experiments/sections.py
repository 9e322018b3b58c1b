"""The experiments' parts of docs/accuracy.md, and their plots."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.accuracy.experiments import (
    ablation,
    layers,
    long,
    quantized,
    rare,
    scores,
    settings,
    variants,
)
from benchmarks.accuracy.report import RESULTS, Result, Section
from benchmarks.documents import NOT_MEASURED, ROOT, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXTS: dict[str, Callable[[Result], str]] = {
    "ablation": ablation.section,
    "layers": layers.section,
    "settings": settings.section,
    "variants": variants.section,
    "long": long.section,
    "rare": rare.section,
    "quantized": quantized.section,
    "scores": scores.section,
}
PLOTS: dict[str, "Callable[[Result], Figure]"] = {
    "layers": layers.draw,
    "settings": settings.draw,
    "long": long.draw,
}


def result_file(name: str) -> Path:
    """Where an experiment's result is."""
    return RESULTS / f"experiment-{name}.json"


def plot_file(name: str, folder: Path = ROOT / "docs") -> Path:
    """Where its plot is."""
    return folder / f"accuracy-{name}.svg"


def part(name: str, result: Result | None) -> str:
    """The text of an experiment, with its plot where it has one."""
    if result is None:
        return NOT_MEASURED
    text = TEXTS[name](result)
    return f"![{name}]({plot_file(name).name})\n\n{text}" if name in PLOTS else text


SECTIONS = tuple(
    Section(f"experiment-{name}", result_file(name), partial(part, name)) for name in TEXTS
)
"""Further parts of docs/accuracy.md, as those of `report.SECTIONS`."""


def write_plots(folder: Path = ROOT / "docs") -> None:
    """Draw each experiment that has a plot; without a result there is none."""
    for name, draw in PLOTS.items():
        file = result_file(name)

        def drawn(file: Path = file, draw: "Callable[[Result], Figure]" = draw) -> "Figure":
            return draw(json.loads(file.read_text(encoding="utf-8")))

        write_figure(plot_file(name, folder), [file], drawn, salt=name)
