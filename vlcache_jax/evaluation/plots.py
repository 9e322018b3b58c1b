"""Plots of an evaluation against the bytes that are kept, as shapes for inline SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vlcache_jax.results.numbers import bits, scale_end, share, small, with_interval

if TYPE_CHECKING:
    from vlcache_jax.evaluation import Evaluation, Setting

LEFT, RIGHT, TOP, BOTTOM = 62, 468, 14, 246
"""Edges of the drawing, in units of the SVG's own 480 x 290."""

MARGIN = 24
"""Between the left and right edges and the ends of the scale of bytes."""

ASIDE = 7
"""From the points of a series to those of the next with the same bytes, at most."""

LEAST_KL = 1e-6
"""Means below it do not lengthen the scale, which has no 0."""

MOST_TICKS = 7
"""Of a logarithmic scale; it has powers of ten alone where there would be more."""

SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",  # circle
    "M-4.5 -4.5h9v9h-9z",  # square
    "M0 -6L5.8 4.5H-5.8z",  # triangle
    "M0 -6.5L6.5 0L0 6.5L-6.5 0z",  # diamond
    "M-1.8 -6h3.6v4.2h4.2v3.6h-4.2v4.2h-3.6v-4.2h-4.2v-3.6h4.2z",  # plus
    "M0 6L5.8 -4.5H-5.8z",  # triangle upside down
)
"""Of the points, around their places."""

HUES = (255, 45, 155, 340, 90, 210, 300)
"""Of the points; as many as have no divisor in common with the shapes, so that pairs differ."""


class Point(NamedTuple):
    """A setting: its place, the ends of its interval there, and the numbers in words."""

    x: float
    y: float
    ends: tuple[float, float] | None
    words: str


class Series(NamedTuple):
    """The settings of one method and quantizer, of which something was measured.

    Attributes:
        name: of both.
        shape: of the points.
        hue: of the points and what joins them.
        points: from the least bytes to the most.
    """

    name: str
    shape: str
    hue: int
    points: list[Point]


class Axis(NamedTuple):
    """The place of any number, and the places and texts of some."""

    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Plot:
    """A figure against the bytes that are kept.

    Attributes:
        title: what is drawn.
        series: in the order of the settings.
        columns: places and texts of the scale of bytes.
        rows: heights and texts of the other scale.
        limit: height and text of a line across; None for none.
    """

    title: str
    series: list[Series]
    columns: list[tuple[float, str]]
    rows: list[tuple[float, str]]
    limit: tuple[float, str] | None = None

    @property
    def words(self) -> str:
        """All numbers in words; "" where there are none."""
        return "; ".join(point.words for series in self.series for point in series.points)


def plots(found: "Evaluation") -> list[Plot]:
    """Same tokens and KL, each against the bytes that are kept."""
    kept = [setting.kept_share for setting in found.settings]
    ends = min([*kept, 0.5]), max([*kept, 1.0])
    columns = _logarithmic(*ends, (LEFT + MARGIN, RIGHT - MARGIN), _percent)
    length = scale_end(1 - min([*_values(found, "top1"), found.tolerance]))
    quarters = [1 - length * number / 4 for number in range(5)]

    def height(value: float) -> float:
        return TOP + (BOTTOM - TOP) * (1 - value) / length

    same = Axis(height, [(height(value), _percent(value)) for value in quarters])
    kl = _kl_axis(_values(found, "kl"), [setting.kl or 0.0 for setting in found.settings])
    limit = height(found.tolerance), f"tolerance {_percent(found.tolerance)}"
    return [
        Plot("Same top-1", _series(found, "top1", columns, same, share),
             columns.ticks, same.ticks, limit),
        Plot("KL, in nats", _series(found, "kl", columns, kl, small), columns.ticks, kl.ticks),
    ]  # fmt: skip


def _series(
    found: "Evaluation", what: str, columns: Axis, rows: Axis, text: Callable[[float | None], str]
) -> list[Series]:
    """The points of "top1" or "kl" by method and quantizer, each series a little aside."""
    groups: dict[str, list[Setting]] = {}
    for setting in found.settings:
        name = ", ".join(filter(None, (setting.method, bits(setting.kv_bits))))
        groups.setdefault(name, []).append(setting)
    step = min(ASIDE, 2 * MARGIN / len(groups))
    series = []
    for number, (name, settings) in enumerate(groups.items()):
        aside, points = step * (number - (len(groups) - 1) / 2), []
        for setting in sorted(settings, key=lambda setting: setting.kept_share):
            value, interval = getattr(setting, what), setting.intervals[what]
            if value is None:
                continue
            ends = interval and (rows.place(interval[0]), rows.place(interval[1]))
            words = (
                f"{setting.label}: {share(setting.kept_share)} of the bytes, "
                f"{with_interval(value, interval, text)}"
            )
            x = columns.place(setting.kept_share) + aside
            points.append(Point(x, rows.place(value), ends, words))
        shape, hue = SHAPES[number % len(SHAPES)], HUES[number % len(HUES)]
        series.append(Series(name, shape, hue, points))
    return series


def _values(found: "Evaluation", what: str) -> list[float]:
    """All values of "top1" or "kl", and the ends of their intervals."""
    of_all = ((getattr(one, what), *(one.intervals[what] or ())) for one in found.settings)
    return [value for values in of_all for value in values if value is not None]


def _kl_axis(values: Sequence[float], means: Sequence[float]) -> Axis:
    """The scale of KL, from well below the least mean on; less, 0 even, stands at its edge."""
    least = min((mean for mean in means if mean >= LEAST_KL), default=LEAST_KL)
    start = float(f"1e{math.ceil(math.log10(least / 2)) - 1}")
    axis = _logarithmic(start, max([start, *values]), (BOTTOM, TOP), small)
    (edge, text), *others = axis.ticks
    below = any(value < start for value in values)
    return Axis(axis.place, [(edge, f"≤ {text}" if below else text), *others])


def _logarithmic(
    low: float, high: float, edges: tuple[float, float], text: Callable[[float], str]
) -> Axis:
    """A scale that has room for numbers from `low` to `high`, from one edge to the other."""
    steps = _steps(low, high)
    first, last = math.log(steps[0]), math.log(steps[-1])

    def place(value: float) -> float:
        part = (math.log(max(value, steps[0])) - first) / (last - first)
        return edges[0] + (edges[1] - edges[0]) * part

    powers = [step for step in steps if math.log10(step).is_integer()]
    shown = steps if len(steps) <= MOST_TICKS else powers
    return Axis(place, [(place(step), text(step)) for step in shown])


def _steps(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, two or more, from `low` or below to `high` or above."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    every = [float(f"{unit}e{power}") for power in powers for unit in (1, 2, 5)]
    first = max(i for i, step in enumerate(every) if step <= low)
    last = next(i for i, step in enumerate(every) if step >= high and i > first)
    return every[first : last + 1]


def _percent(value: float) -> str:
    """A share as exactly as a scale has it."""
    return f"{100 * value:.6g} %"
