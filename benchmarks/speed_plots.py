"""The figures of docs/benchmarks.md, drawn from result files."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.documents import ROOT, write_figure
from benchmarks.models import MODELS
from benchmarks.roofline import decode_step
from benchmarks.speed.rows import cache_of
from benchmarks.speed_sections import (
    DECODE_GPU,
    DEVICE,
    PAPER_GPU,
    PROFILE_CPU,
    PROGRAMS,
    SHOWN,
    THROUGHPUT_CPU,
    Result,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DECODE_PLOT = ROOT / "docs" / "decode.svg"
BYTES_PLOT = ROOT / "docs" / "memory.svg"
PROFILE_PLOT = ROOT / "docs" / "profile.svg"
THROUGHPUT_PLOT = ROOT / "docs" / "throughput.svg"
CONTEXTS = tuple(2**power for power in range(11, 18))


def write_plots() -> None:
    """Draw all figures; one whose results are missing is removed."""
    for plot, (files, draw) in PLOTS.items():
        write_figure(plot, files, draw, salt=plot.stem)


def _read(file: Path) -> Result:
    return json.loads(file.read_text(encoding="utf-8"))


def _draw_decode() -> "Figure":
    """The limit of a decode step against the context, and what was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes, config = figure.subplots(), MODELS[SHOWN[0]]
    measured = [
        row
        for file in (PAPER_GPU, DECODE_GPU)
        if file.is_file()
        for row in _read(file)["rows"]
        if row.get("seconds") and row["batch"] == 1
    ]
    for share, label, style in ((1.0, "full", "-"), (0.1, "a tenth", "--")):
        floors = [1e3 * decode_step(config, n, 1, share).floor(DEVICE) for n in CONTEXTS]
        axes.plot(CONTEXTS, floors, style, label=f"limit, {label}")
        points = [row for row in measured if (row["method"] == "full") == (share == 1.0)]
        if points:
            x, y = zip(*((row["context"], 1e3 * row["seconds"]) for row in points), strict=True)
            axes.plot(x, y, "o", label=f"measured, {label}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(CONTEXTS, [f"{n // 1024}k" for n in CONTEXTS])
    axes.set(xlabel="context", ylabel=f"ms per token, batch 1, {DEVICE.name}", ylim=(0, None))
    axes.legend()
    return figure


def _draw_bytes() -> "Figure":
    """Where a decode program's bytes go."""
    from matplotlib.figure import Figure

    rows = _read(PROGRAMS)["rows"]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in rows if row["stage"] == "decode" and row["batch"] > 1]
    names = [
        f"{row['model'].removeprefix('llava-')}\n{row['context']} x {row['batch']}, "
        f"{row['budget']:.0%}{'' if row.get('kv_bits', '16') == '16' else ' ' + row['kv_bits']}"
        for row in shown
    ]
    parts: dict[str, Callable[[Result], float]] = {
        "weights": lambda r: r["argument_bytes"] - r["cache_bytes"] - r["tail_bytes"],
        "cache": lambda r: r["cache_bytes"],
        "tail of new tokens": lambda r: r["tail_bytes"],
        "temporaries": lambda r: r["temp_bytes"],
    }
    _stack(axes, names, {part: [of(row) / 2**30 for row in shown] for part, of in parts.items()})
    axes.tick_params(labelsize="x-small")
    axes.set(xlabel="GiB")
    axes.legend(fontsize="small")
    return figure


def _stack(axes: "Axes", names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Bars of several parts, one behind the other."""
    left = [0.0] * len(names)
    for part, widths in parts.items():
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]


def _draw_profile() -> "Figure":
    """Where the time of each program goes."""
    from matplotlib.figure import Figure

    traced = [row for row in _read(PROFILE_CPU)["profiles"] if "scopes" in row]
    names = [f"{row['stage']}, {cache_of(row)}" for row in traced]
    shares = [{scope["scope"]: scope["share"] for scope in row["scopes"]} for row in traced]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes, scopes = figure.subplots(), dict.fromkeys(name for row in shares for name in row)
    _stack(axes, names, {scope: [row.get(scope, 0.0) for row in shares] for scope in scopes})
    axes.set(xlabel="share of the time of all instructions", xlim=(0, 1))
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    return figure


def _draw_throughput() -> "Figure":
    """Tokens per second at the largest batch, and the limit."""
    from matplotlib.figure import Figure

    rows = [row for row in _read(THROUGHPUT_CPU)["rows"] if "sequences" in row]
    names = [f"{cache_of(row)}\n{row['sequences']:,} sequences" for row in rows]
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(names, [row["tokens_per_s"] for row in rows], label="measured")
    for index, row in enumerate(rows):
        axes.hlines(
            row["floor_tokens_per_s"], index - 0.4, index + 0.4, "black",
            label="" if index else "limit",
        )  # fmt: skip
    axes.set(ylabel="tokens per second")
    axes.legend()
    return figure


PLOTS: dict[Path, tuple[list[Path], Callable[[], "Figure"]]] = {
    DECODE_PLOT: ([PROGRAMS], _draw_decode),
    BYTES_PLOT: ([PROGRAMS], _draw_bytes),
    PROFILE_PLOT: ([PROFILE_CPU], _draw_profile),
    THROUGHPUT_PLOT: ([THROUGHPUT_CPU], _draw_throughput),
}
"""The figures of docs/benchmarks.md, and what they are made of."""
