"""Tables and figures of the documents, which are made of result files."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
NOT_MEASURED = "Not measured."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def source_of(*files: Path) -> str | None:
    """A fingerprint of what a figure is made of; None where a file is missing."""
    if not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write_figure(
    path: Path, files: Sequence[Path], draw: "Callable[[], Figure]", *, salt: str
) -> None:
    """Draw a figure into a file that says what it is made of; without its results there is none.

    Args:
        path: an SVG file.
        files: the results; `source_of` them stands in the figure.
        draw: makes the figure.
        salt: of the ids in the file.
    """
    source = source_of(*files)
    if source is None:
        path.unlink(missing_ok=True)
        return
    save_svg(draw(), path, salt=salt, Description=source)


def save_svg(figure: "Figure", path: Path, *, salt: str, **metadata: str) -> None:
    """Write a figure, in a file that does not depend on when or where it was drawn."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, **metadata})
