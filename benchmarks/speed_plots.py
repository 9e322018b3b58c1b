"""The figures of docs/benchmarks.md, drawn from result files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.documents import DOCS, Plot, Result, panels, read
from benchmarks.models import MODELS
from benchmarks.roofline import decode_step
from benchmarks.speed.rows import cache_of
from benchmarks.speed_sections import CPU, DEVICE, GPU, PROGRAMS, SHOWN

CONTEXTS = tuple(2**power for power in range(11, 18))


def _draw_decode(programs: Result) -> Any:
    """The limit of a decode step against the context, and what was measured."""
    figure, ((axes,),) = panels(6.4, 4)
    config = MODELS[SHOWN[0]]
    measured = [
        row
        for file in (GPU / "paper_decode.json", GPU / "model_decode.json")
        for row in (read(file) or {"rows": []})["rows"]
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


def _draw_bytes(programs: Result) -> Any:
    """Where a decode program's bytes go."""
    figure, ((axes,),) = panels(6.4, 4)
    shown = [row for row in programs["rows"] if row["stage"] == "decode" and row["batch"] > 1]
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


def _stack(axes: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Bars of several parts, one behind the other."""
    left = [0.0] * len(names)
    for part, widths in parts.items():
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]


def _draw_profile(result: Result) -> Any:
    """Where the time of each program goes."""
    traced = [row for row in result["profiles"] if "scopes" in row]
    names = [f"{row['stage']}, {cache_of(row)}" for row in traced]
    shares = [{scope["scope"]: scope["share"] for scope in row["scopes"]} for row in traced]
    figure, ((axes,),) = panels(6.4, 3.2)
    scopes = dict.fromkeys(name for row in shares for name in row)
    _stack(axes, names, {scope: [row.get(scope, 0.0) for row in shares] for scope in scopes})
    axes.set(xlabel="share of the time of all instructions", xlim=(0, 1))
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    return figure


def _draw_throughput(result: Result) -> Any:
    """Tokens per second at the largest batch, and the limit."""
    rows = [row for row in result["rows"] if "sequences" in row]
    names = [f"{cache_of(row)}\n{row['sequences']:,} sequences" for row in rows]
    figure, ((axes,),) = panels(4.8, 3.2)
    axes.bar(names, [row["tokens_per_s"] for row in rows], label="measured")
    for index, row in enumerate(rows):
        axes.hlines(
            row["floor_tokens_per_s"], index - 0.4, index + 0.4, "black",
            label="" if index else "limit",
        )  # fmt: skip
    axes.set(ylabel="tokens per second")
    axes.legend()
    return figure


PLOTS = tuple(
    Plot(DOCS / f"{name}.svg", (file,), draw, name)
    for name, file, draw in (
        ("decode", PROGRAMS, _draw_decode),
        ("memory", PROGRAMS, _draw_bytes),
        ("profile", CPU / "profile.json", _draw_profile),
        ("throughput", CPU / "throughput.json", _draw_throughput),
    )
)
"""The figures of docs/benchmarks.md."""
