"""What error messages have in common: one line, and no value at its full length."""

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
    """The first line of what an error of another library says, for a message of our own."""
    lines = str(error).strip().splitlines()
    return short(lines[0], most) if lines else type(error).__name__
