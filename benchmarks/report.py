"""Fill the documents' generated parts from committed files: `python -m benchmarks.report`.

`--demo` runs the shipped demo anew first. A part stands between two comments that name it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import cpu_decode, demo_model, quantization, speed_plots, speed_sections
from benchmarks.accuracy import parity, report
from benchmarks.accuracy.experiments import sections
from benchmarks.documents import ROOT, table
from benchmarks.environment import write_result
from benchmarks.make_demo import read_log

RESULTS = Path(__file__).parent / "results"


def conversion_part(result: dict[str, Any]) -> str:
    """Time and memory of converting and loading a checkpoint of the 7B shapes."""
    rows = []
    for key, name in (
        ("convert", "convert to Orbax"),
        ("load_safetensors", "load the Hugging Face directory"),
        ("load_converted", "load the converted directory"),
    ):
        step = result[key]
        peak = step["peak_rss_anon_bytes"] / 1e9
        rows.append([name, f"{step['process_s']:.0f} s", f"{peak:.1f} GB"])
    size = result["parameter_bytes"] / 1e9
    machine = result["machine"]
    return (
        f"{result['model']}, {size:.1f} GB of parameters, on {machine['cores']} cores "
        f"({machine['cpu']}):\n\n{table(['step', 'time', 'peak anonymous memory'], rows)}"
    )


class Part(NamedTuple):
    """A generated part of a document.

    Attributes:
        name: what its comments call it.
        make: the text, of what its files hold; None in place of one that is not there.
        files: JSON or lines of JSON.
        needed: how many of the files must be there.
    """

    name: str
    make: Callable[..., str]
    files: tuple[Path, ...]
    needed: int = 1


ACCURACY = (*report.SECTIONS, parity.SECTION, *sections.SECTIONS, quantization.SECTION)
"""The sections of docs/accuracy.md."""

_DEMO = RESULTS / "cpu" / "demo.json"

DOCUMENTS: dict[Path, tuple[Part, ...]] = {
    ROOT / "README.md": (
        Part("demo", demo_model.demo_part, (_DEMO, demo_model.MODEL)),
        Part("speed", speed_sections.summary_part, speed_sections.SUMMARY, needed=0),
        Part("conversion", conversion_part, (RESULTS / "cpu" / "conversion.json",)),
    ),
    ROOT / "docs" / "demo-model.md": (
        Part("model", demo_model.model_part, (demo_model.MODEL,), needed=0),
        Part("recipe", demo_model.recipe_part, (demo_model.RECIPE,), needed=0),
        Part("log", demo_model.log_part, (demo_model.LOG, demo_model.RECIPE), needed=0),
        Part(
            "accuracy", demo_model.accuracy_part, (RESULTS / "accuracy" / "budgets.json",), needed=0
        ),
        Part("pictures", demo_model.pictures_part, (_DEMO,)),
    ),
    ROOT / "docs" / "accuracy.md": tuple(
        Part(name, make, (file,), needed=0) for name, file, make in ACCURACY
    ),
    ROOT / "docs" / "benchmarks.md": tuple(
        Part(name, make, files, needed=0) for name, (make, files) in speed_sections.PARTS.items()
    ),
    ROOT / "docs" / "performance.md": (
        Part("decode-attention", cpu_decode.part, (RESULTS / "cpu" / "decode_attention.json",)),
    ),
}
"""The generated parts of each document."""


def read(file: Path) -> Any:
    """What a result file holds; None if it is not there."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    return read_log(text) if file.suffix == ".jsonl" else json.loads(text)


def fill(document: Path) -> str:
    """A document with every part generated anew from its result files.

    Raises:
        FileNotFoundError: a result file is missing.
        ValueError: a part's comments are missing.
    """
    text = document.read_text(encoding="utf-8")
    for name, make, files, needed in DOCUMENTS[document]:
        for file in files[:needed]:
            if not file.exists():
                raise FileNotFoundError(f"part {name!r} of {document.name} is made of {file}")
        made = make(*map(read, files))
        pattern = rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)"
        text, count = re.subn(
            pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"{document.name} must have one part {name!r} between its comments")
    return text


def main(
    demo: Annotated[bool, typer.Option("--demo", help="Run the shipped demo anew first.")] = False,
) -> None:
    """Write the generated parts of the README and the docs, and the plots."""
    if demo:
        write_result(_DEMO, demo_model.run_demo())
    for document in DOCUMENTS:
        document.write_text(fill(document), encoding="utf-8")
    demo_model.write_plot()
    report.write_plot()
    sections.write_plots()
    speed_plots.write_plots()


if __name__ == "__main__":
    typer.run(main)
