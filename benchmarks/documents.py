"""Parts and plots of the documents, which are made of result files."""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.environment import write_whole

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "Not measured."

Result = dict[str, Any]
"""What a result file holds."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def read(file: Path) -> Any:
    """What a result file holds, JSON or a log; None if it is not there."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    return read_log(text) if file.suffix == ".jsonl" else json.loads(text)


def read_log(text: str) -> list[Result]:
    """The lines of a training's log; of a step that was done twice the later one."""
    lines = {line["step"]: line for line in map(json.loads, text.splitlines())}
    return [lines[step] for step in sorted(lines)]


def measured(make: Callable[..., str]) -> Callable[..., str]:
    """Of a part whose results are all missing nothing is said but that."""

    @functools.wraps(make)
    def part(*results: Any) -> str:
        return make(*results) if any(results) else NOT_MEASURED

    return part


class Part(NamedTuple):
    """A generated part of a document.

    Attributes:
        name: what the comments around it call it.
        make: the text, of what each file holds; None in place of one that is not there.
        files: of results.
    """

    name: str
    make: Callable[..., str]
    files: tuple[Path, ...] = ()

    def text(self) -> str:
        """The part, made anew."""
        return self.make(*map(read, self.files))


def panels(
    width: float, height: float, rows: int = 1, columns: int = 1, **sharing: Any
) -> tuple[Any, Any]:
    """An empty figure, its size in inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


class Plot(NamedTuple):
    """A figure that says what it is made of.

    Attributes:
        path: an SVG file.
        files: of results.
        draw: makes the figure, of what each file holds.
        salt: of the ids in the SVG file.
    """

    path: Path
    files: tuple[Path, ...]
    draw: Callable[..., Any]
    salt: str

    def source(self) -> str | None:
        """A fingerprint of what it is made of, which stands in it; None where a file is missing."""
        if not all(file.is_file() for file in self.files):
            return None
        return hashlib.sha256(b"".join(file.read_bytes() for file in self.files)).hexdigest()

    def write(self) -> None:
        """Draw it; without its results there is none."""
        source = self.source()
        if source is None:
            self.path.unlink(missing_ok=True)
            return
        save_svg(self.draw(*map(read, self.files)), self.path, self.salt, source)


def save_svg(figure: Any, path: Path, salt: str, source: str | None = None) -> None:
    """Write a figure, the same at any time and place; `source` says what it is made of."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Description": source})
    write_whole(path, drawn.getvalue())
