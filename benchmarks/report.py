"""Fill the documents' generated parts from committed files: `python -m benchmarks.report`.

`--demo` runs the shipped models anew first. A part stands between two comments that name it.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import (
    conversion,
    cpu_decode,
    demo_model,
    quantization,
    serving,
    speed_plots,
    speed_sections,
    video_pixels,
)
from benchmarks.accuracy import parity, report
from benchmarks.accuracy.experiments import sections
from benchmarks.documents import DOCS, ROOT, Part
from benchmarks.environment import write_result
from benchmarks.fidelity import report as fidelity

DOCUMENTS: dict[Path, tuple[Part, ...]] = {
    ROOT / "README.md": (demo_model.DEMO, speed_sections.SUMMARY, conversion.SECTION),
    DOCS / "demo.md": demo_model.PAGES_SECTIONS,
    DOCS / "demo-small.md": demo_model.SMALL_SECTIONS,
    DOCS / "accuracy.md": (
        *fidelity.SECTIONS, *report.SECTIONS, parity.SECTION, *sections.SECTIONS,
        quantization.SECTION,
    ),
    DOCS / "benchmarks.md": (*speed_sections.SECTIONS, serving.SECTION),
    DOCS / "performance.md": (cpu_decode.SECTION,),
    DOCS / "models.md": (video_pixels.SECTION,),
}  # fmt: skip
"""The generated parts of each document."""

PLOTS = (
    *demo_model.PLOTS, report.PLOT, *fidelity.PLOTS, *sections.plots(), *speed_plots.PLOTS
)  # fmt: skip


def fill(document: Path) -> str:
    """A document with every part generated anew from its result files.

    Raises:
        ValueError: a part's comments are missing.
    """
    text = document.read_text(encoding="utf-8")
    for part in DOCUMENTS[document]:
        made = part.text()
        pattern = rf"(<!-- {part.name}: begin[^\n]*-->\n).*?(<!-- {part.name}: end -->)"
        text, count = re.subn(
            pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(
                f"{document.name} must have one part {part.name!r} between its comments"
            )
    return text


def main(
    demo: Annotated[
        bool, typer.Option("--demo", help="Run the shipped models anew first.")
    ] = False,
) -> None:
    """Write the generated parts of the README and the docs, and the plots."""
    if demo:
        for name in demo_model.SHOWN:
            write_result(demo_model.result_file(name), demo_model.run_demo(name))
    for document in DOCUMENTS:
        document.write_text(fill(document), encoding="utf-8")
    for plot in PLOTS:
        plot.write()


if __name__ == "__main__":
    typer.run(main)
