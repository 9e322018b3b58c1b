"""The figures of an inspection as PNG files, for papers; needs matplotlib.

Several methods stand side by side, with the same scales.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlcache_jax.files import check_file
from vlcache_jax.requests.packing import BASE, GRID

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlcache_jax.results.inspection import Inspection, ShownPicture

WIDTH, DPI = 3.2, 200
"""Width of a column in inches, and dots per inch."""

TALLEST = 2
"""Height of a row in widths of a column, at most."""

OPACITY = 0.65
"""Of a kept patch over its picture; one that is never kept is not coloured."""

SPLIT = {"visual": "#3b75af", "context": "#2c8a6b", "text": "#ef8636", "recent": "#9a9a9a"}
"""Colours of the kinds of kept tokens."""

PARTS = {BASE: "whole picture", GRID: "tiles"}
"""What the rows of a heat map are called."""


def check_folder(folder: str | Path, *, force: bool) -> Path:
    """The folder that the figures may be written to; to be asked before any work is done.

    Raises:
        FileExistsError: one of the files is there and `force` is not set.
        FileNotFoundError: the directory that the folder is to be made in does not exist.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: it is a file.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the figures need matplotlib: pip install 'vlcache-jax[bench]'")
    target = Path(folder)
    if target.is_dir():
        for name in FIGURES:
            check_file(target / name, "figure", force=force)
    elif target.exists():
        raise ValueError(f"{target} is a file: name a folder for the figures")
    elif not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"no directory {target.parent} for the folder {target.name}")
    return target


def draw_heat(inspection: "Inspection") -> "Figure":
    """Each picture, shaded where layers and kv heads keep its patches: a column per method."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    outcomes = inspection.outcomes
    rows = [
        (picture, part)
        for picture in inspection.pictures
        for part in PARTS
        if np.any(picture.part == part)
    ]
    shares = [inspection.kept_share(outcome) for outcome in outcomes]
    largest = max((float(s[inspection.visual].max(initial=0)) for s in shares), default=0)
    scale = Normalize(0, largest or 1), mpl.colormaps["YlOrRd"]
    heights = [WIDTH * min(p.image.height / p.image.width, TALLEST) for p, _ in rows] or [0.5]
    figure = Figure(figsize=(WIDTH * len(outcomes) + 0.8, sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(heights), len(outcomes), squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for (picture, part), line in zip(rows, grid, strict=False):
        line[0].set_ylabel(PARTS[part])
        for axes, share in zip(line, shares, strict=True):
            _shade(axes, picture, part, share, scale)
    for axes, outcome in zip(grid[0], outcomes, strict=True):
        axes.set_title(outcome.label)
    if rows:
        figure.colorbar(
            ScalarMappable(*scale),
            ax=list(grid.flat),
            label="share of layers and heads that keep it",
            alpha=OPACITY,
        )
    else:
        grid[0, 0].set_xlabel("the prompt has no picture")
    return figure


def _shade(
    axes: "Axes", picture: "ShownPicture", part: int, share: np.ndarray, scale: tuple[Any, Any]
) -> None:
    """One picture, in light greys so that colours look alike on all of it, and its patches."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    width, height = picture.image.size
    extent = (0, width, height, 0)
    axes.imshow(picture.image.convert("L"), cmap="gray", vmin=-255, vmax=255, extent=extent)
    own = picture.part == part
    own[own] = share[picture.positions[own]] > 0
    norm, colours = scale
    patches = PatchCollection(
        [Rectangle((x, y), end - x, low - y) for x, y, end, low in picture.rectangles[own]],
        facecolor=colours(norm(share[picture.positions[own]])),
        alpha=OPACITY,
        linewidth=0,
    )
    axes.add_collection(patches)
    axes.set(xlim=(0, width), ylim=(height, 0))


def draw_layers(inspection: "Inspection") -> "Figure":
    """What each layer keeps, and the sparsity and beta that its budget comes from."""
    from matplotlib.figure import Figure

    outcomes = inspection.outcomes
    figure = Figure(figsize=(WIDTH * len(outcomes) + 0.8, 4.8), layout="constrained")
    budgets, shares = figure.subplots(2, len(outcomes), squeeze=False, sharex="col", sharey="row")
    for upper, lower, outcome in zip(budgets, shares, outcomes, strict=True):
        layers, bottom = inspection.layers(outcome), np.zeros(len(outcome.trace.budget))
        for kind in (*inspection.kinds, "recent"):
            values = _column(layers, kind)
            upper.bar(range(len(layers)), values, bottom=bottom, color=SPLIT[kind], label=kind)
            bottom += values
        upper.set_title(outcome.label)
        for name, style in (("sparsity", "o-"), ("beta", "s--")):
            if layers[0][name] is not None:
                lower.plot(_column(layers, name), style, markersize=3, label=name)
                lower.legend()
        if not lower.lines:
            lower.text(0.5, 0.5, "not used", ha="center", va="center", transform=lower.transAxes)
        lower.set(xlabel="layer", ylim=(0, None))
    budgets[0].set_ylabel("kept tokens")
    handles, names = budgets[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    shares[0].set_ylabel("share")
    return figure


def draw_hits(inspection: "Inspection") -> "Figure":
    """How much of what the first decoded token attends to is kept, layer by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * WIDTH + 1, 3), layout="constrained")
    names = {"hit_rate": "CacheHitRate", "mass_recall": "share of the attention that is kept"}
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        for outcome in inspection.outcomes:
            values = _column(inspection.layers(outcome), name)
            axes.plot(values, "o-", markersize=3, label=outcome.label)
        axes.set(title=title, xlabel="layer", ylim=(0, 1.02))
    figure.axes[0].legend()
    return figure


def _column(layers: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([layer[name] for layer in layers], np.float64)


FIGURES: "dict[str, Callable[[Inspection], Figure]]" = {
    "heat.png": draw_heat,
    "layers.png": draw_layers,
    "hit-rate.png": draw_hits,
}
"""The files, and what draws them."""
