"""Bar charts over the layers of a model, as shapes for inline SVG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlcache_jax.results.numbers import scale_end

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


def charts(methods: list[list[dict[str, Any]]], kinds: Sequence[str]) -> list[list[Chart]]:
    """The charts of each method, of the same scales for all.

    Args:
        methods: for each method its layers, as of `Inspection.layers`.
        kinds: of the tokens that are kept.
    """
    layers = [layer for method in methods for layer in method]
    budget = max((layer["budget"] for layer in layers), default=0)
    beta = max((layer["beta"] or 0 for layer in layers), default=0)
    return [
        [
            _chart("Budget, in tokens", method, kinds, scale_end(budget), "{:,.5g}".format),
            _chart("CacheHitRate", method, ("hit_rate",), 1.0, _percent),
            _chart("Sparsity", method, ("sparsity",), 1.0, _percent),
            _chart("Beta", method, ("beta",), scale_end(beta), _percent),
        ]
        for method in methods
    ]


def _chart(
    title: str,
    layers: list[dict[str, Any]],
    parts: Sequence[str],
    top: float,
    text: Callable[[float], str],
) -> Chart:
    """A chart of some keys of the layers, stacked, on a scale from 0 to `top`."""
    step = (RIGHT - LEFT) / len(layers)
    bars, bands, words = [], [], []
    for number, layer in enumerate(layers):
        x, bottom = LEFT + step * number, float(BOTTOM)
        bands.append(Bar(number, "band", x, TOP, step, BOTTOM - TOP))
        values = {part: layer[part] for part in parts if layer[part] is not None}
        for part, value in values.items():
            height = (BOTTOM - TOP) * value / top
            bottom -= height
            bars.append(Bar(number, part, x + 0.12 * step, bottom, 0.76 * step, height))
        shown = (f"{text(v)} {p}" if len(values) > 1 else text(v) for p, v in values.items())
        words.append(f"layer {number}: {', '.join(shown)}")
    ticks = [(BOTTOM - (BOTTOM - TOP) * at, text(top * at)) for at in (0, 0.5, 1)]
    return Chart(title, bars, bands, ticks, "; ".join(words))


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"
