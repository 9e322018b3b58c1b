"""Numbers as people read them, "-" for those that are not there."""

import math
from collections.abc import Callable


def share(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """A number, with one decimal where it is not whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def small(value: float | None) -> str:
    """A number of any size, with three digits."""
    return "-" if value is None else f"{value:.3g}"


def with_interval(
    value: float | None,
    interval: tuple[float, float] | None,
    text: Callable[[float | None], str],
) -> str:
    """A number with its interval behind it, if it has one, as `text` writes them."""
    if interval is None:
        return text(value)
    low, high = (text(end).removesuffix(" %") for end in interval)
    return f"{text(value)} ({low} to {high})"


def bits(quantizer: str | None) -> str | None:
    """A quantizer as `report.kv_bits` calls it, in words; None for none."""
    return f"{quantizer} bits" if quantizer and quantizer.isdecimal() else quantizer


def scale_end(largest: float) -> float:
    """The round number from `largest` on at which a scale may end; 1 for 0."""
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    steps = (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10)
    return next(unit * step for step in steps if unit * step >= largest)
