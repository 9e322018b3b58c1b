"""Bar charts over the layers of a model, as shapes for inline SVG."""

import math
from dataclasses import dataclass
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 40, 298, 10, 106
"""Edges of the drawing, in units of the SVG's own 300 x 128."""


@dataclass(frozen=True)
class Bar:
    """A rectangle, or a part of a stacked one: the layer and what it is, and its place."""

    layer: int
    part: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Chart:
    """The chart of one figure of one method.

    Attributes:
        title: what is drawn.
        bars: from the first layer to the last; none where the method has no such figure.
        bands: a background for each layer, that marks the chosen one.
        ticks: heights and texts of the scale.
        words: the same in words.
    """

    title: str
    bars: list[Bar]
    bands: list[Bar]
    ticks: list[tuple[float, str]]
    words: str


@dataclass(frozen=True)
class _Kind:
    """A chart that every method has: its title, the keys that are stacked, and its scale."""

    title: str
    parts: tuple[str, ...]
    top: float
    percent: bool = True

    def text(self, value: float) -> str:
        return f"{100 * value:.3g}%" if self.percent else f"{value:,.5g}"


def charts(methods: list[list[dict[str, Any]]]) -> list[list[Chart]]:
    """The charts of each method, of the same scales for all.

    Args:
        methods: for each method its layers, as of `Inspection.layers`.
    """
    layers = [layer for method in methods for layer in method]
    budget = max((layer["budget"] for layer in layers), default=0)
    beta = max((layer["beta"] or 0 for layer in layers), default=0)
    kinds = (
        _Kind("Budget, in tokens", ("visual", "text", "recent"), scale_end(budget), percent=False),
        _Kind("CacheHitRate", ("hit_rate",), 1.0),
        _Kind("Sparsity", ("sparsity",), 1.0),
        _Kind("Beta", ("beta",), scale_end(beta)),
    )
    return [[_chart(kind, method) for kind in kinds] for method in methods]


def _chart(kind: _Kind, layers: list[dict[str, Any]]) -> Chart:
    step = (RIGHT - LEFT) / len(layers)
    bars, bands, words = [], [], []
    for number, layer in enumerate(layers):
        x, bottom = LEFT + step * number, float(BOTTOM)
        bands.append(Bar(number, "band", x, TOP, step, BOTTOM - TOP))
        values = {part: layer[part] for part in kind.parts if layer[part] is not None}
        for part, value in values.items():
            height = (BOTTOM - TOP) * value / kind.top
            bottom -= height
            bars.append(Bar(number, part, x + 0.12 * step, bottom, 0.76 * step, height))
        shown = (
            f"{kind.text(v)} {p}" if len(values) > 1 else kind.text(v) for p, v in values.items()
        )
        words.append(f"layer {number}: {', '.join(shown)}")
    ticks = [(BOTTOM - (BOTTOM - TOP) * at, kind.text(kind.top * at)) for at in (0, 0.5, 1)]
    return Chart(kind.title, bars, bands, ticks, "; ".join(words))


def scale_end(largest: float) -> float:
    """The round number from `largest` on at which a scale may end; 1 for 0."""
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return next(
        unit * step for step in (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10) if unit * step >= largest
    )
