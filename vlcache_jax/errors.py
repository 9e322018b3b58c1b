"""What error messages have in common: one line, and no value at its full length.

And the checks of settings whose type Python does not look at.
"""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

SHOWN = 60
"""Characters of a value in a message."""


def short(value: Any, most: int = SHOWN) -> str:
    """A value for an error message: on one line, without its middle where it is long.

    Args:
        value: text or a path stands as it is, all else as its `repr`.
        most: characters.
    """
    text = value if isinstance(value, str) else str(value) if hasattr(value, "__fspath__") else ""
    try:
        # Of a long text both ends are enough; splitting a megabyte takes its time.
        text = text or repr(value)
    except Exception:  # any object may come here
        text = f"an object of type {type(value).__name__}"
    if len(text) > 4 * most:
        text = f"{text[: 2 * most]} {text[-2 * most :]}"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[half + 3 - most :]}"


def reason(error: BaseException, most: int = 200) -> str:
    """The first line of what an error of another library says, for a message of our own.

    The line behind it belongs to it where it ends in a colon.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    told = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return short(told, most) or type(error).__name__


def whole_number(value: Any, what: str, least: int | None = None) -> int:
    """A setting that must be a whole number.

    Args:
        value: what was given; numpy's numbers are numbers too, True is none.
        what: its name, for the error.
        least: the least that it may be.

    Raises:
        ValueError: it is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{what}={short(value)} must be a whole number")
    if least is not None and value < least:
        raise ValueError(f"{what}={short(value)} must be at least {least}")
    return int(value)


def real_number(value: Any, what: str) -> float:
    """A setting that must be a number, `whole_number`'s sister."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{what}={short(value)} must be a number")
    return float(value)


def whole_numbers(values: Any, what: str, least: int | None = 0) -> tuple[int, ...]:
    """A list of whole numbers as a tuple, which can be part of a program's key.

    Args:
        values: a list, tuple, array, range or set.
        what: its name, for the error.
        least: the least that each may be.

    Raises:
        ValueError: it is none of these, or an element is no whole number of that size.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{what}={short(values)} must be a list of whole numbers")
    return tuple(whole_number(value, f"{what}[{i}]", least) for i, value in enumerate(values))
