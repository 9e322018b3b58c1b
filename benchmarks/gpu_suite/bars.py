"""What must be reached: plain arithmetic on the stages' results.

The bars are shares of what the same run measured of the GPU, and, of matrix products, operations
per second of an H200 or H100, whose matrix units are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.presets import PAPER_MODEL

H200_COPY = 4.3e12
"""Bytes per second that an H200 copied when the bar was set, read and written together."""

LARGE_BYTES = 512 * 10**6
"""From this on a decode step's attention is bound by bandwidth alone."""

PREFILL_CASE = "causal, 8192 tokens"
"""The name of the case in speed.py."""

Results = dict[str, dict[str, Any]]
"""Stage → its result file."""

Found = tuple[float, str] | None
"""A number and a remark; None where it was not measured."""


@dataclass(frozen=True)
class Bar:
    """One thing to reach.

    Attributes:
        what: in words.
        must: at least this.
        aim: what is hoped for.
        measure: the number and a remark.
        shown: how numbers of it are written.
    """

    what: str
    must: float
    aim: float
    measure: Callable[[Results], Found]
    shown: Callable[[float], str] = lambda value: f"{100 * value:.1f} %"

    def row(self, results: Results) -> dict[str, Any]:
        """For the table at the end."""
        row = {"bar": self.what, "must": self.shown(self.must), "aim": self.shown(self.aim)}
        found = self.measure(results)
        if found is None:
            return {**row, "measured": None, "state": "not measured", "remark": ""}
        value, remark = found
        state = "aim reached" if value >= self.aim else "reached"
        state = state if value >= self.must else "short"
        return {**row, "measured": self.shown(value), "state": state, "remark": remark}


def tera(value: float) -> str:
    """4.93e14 → "493"."""
    return f"{value / 1e12:.0f}"


def right(results: Results) -> Found:
    """The share of the comparisons with references that are right."""
    rows = [
        row
        for name, result in results.items()
        if name.startswith("correctness")
        for row in result.get("rows", [])
        if row["ok"] is not None
    ]
    wrong = sum(not row["ok"] for row in rows)
    return (1 - wrong / len(rows), f"{wrong} of {len(rows)} wrong") if rows else None


def share_of_copy(stage: str, size: str) -> Callable[[Results], Found]:
    """The least share of the copy's bandwidth, among rows of at least `LARGE_BYTES` by `size`."""

    def measured(results: Results) -> Found:
        result, rows = _timed(results, stage, "triton")
        rows = [row for row in rows if row[size] >= LARGE_BYTES]
        if not rows:
            return None
        worst = min(rows, key=lambda row: row["bytes_per_s"])
        rate, copy = worst["bytes_per_s"], result["copy_bytes_per_s"]
        remark = f"{rate / 1e12:.2f} of {copy / 1e12:.2f} TB/s copied, "
        remark += f"{100 * rate / H200_COPY:.1f} % of {H200_COPY / 1e12} TB/s"
        return rate / copy, f"{remark}; worst: {worst['case']}"

    return measured


def prefill_rate(results: Results) -> Found:
    """Operations per second of Triton's prefill at 8192 tokens."""
    rates: dict[str, float] = {}
    for name in ("triton", "cudnn"):
        for row in _timed(results, "speed_prefill", name)[1]:
            if row["case"] == PREFILL_CASE:
                rates[name] = row["ops_per_s"]
    if "triton" not in rates:
        return None
    product = results["speed_prefill"]["matmul_ops_per_s"]
    others = [f"{name} {tera(rate)}" for name, rate in rates.items() if name != "triton"]
    return rates["triton"], ", ".join([*others, f"product {tera(product)}"])


def speed_to(stage: str, backend: str, other: str) -> Callable[[Results], Found]:
    """The least speed of one way beside another one; of packed rows at least `LARGE_BYTES`."""

    def measured(results: Results) -> Found:
        theirs = {row["case"]: row["seconds"] for row in _timed(results, stage, other)[1]}
        return _worst(
            {
                row["case"]: theirs[row["case"]] / row["seconds"]
                for row in _timed(results, stage, backend)[1]
                if row["case"] in theirs and row.get("full_bytes", LARGE_BYTES) >= LARGE_BYTES
            }
        )

    return measured


def step_share(*sizes: tuple[int, int]) -> Callable[[Results], Found]:
    """The least share of its limit that a whole decode step reaches, at (context, batch)."""

    def measured(results: Results) -> Found:
        rows = [row for row in _steps(results) if (row["context"], row["batch"]) in sizes]
        return _worst({f"{_size(row)}, budget {row['budget']}": row["share"] for row in rows})

    return measured


def speedup_share(results: Results) -> Found:
    """The least share of the ideal that a tenth's speed-up reaches."""
    rows = [row for row in _steps(results) if "share_of_ideal" in row]
    return _worst({f"{row['speedup']:.2f}x at {_size(row)}": row["share_of_ideal"] for row in rows})


def _worst(values: dict[str, float]) -> Found:
    """The least of the values, by what they are of."""
    worst = min(values, key=lambda name: values[name], default="")
    return (values[worst], f"worst: {worst}") if values else None


def _steps(results: Results) -> list[dict[str, Any]]:
    """Decode steps of the 7B model that were measured."""
    stages = ("model_decode", "paper_decode")
    rows = [row for stage in stages for row in results.get(stage, {}).get("rows", [])]
    return [row for row in rows if row.get("share") and row["model"] == PAPER_MODEL]


def _size(row: dict[str, Any]) -> str:
    return f"{row['context']} x {row['batch']}"


def _timed(
    results: Results, stage: str, backend: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A stage's result, and the rows of a backend in it."""
    result = results.get(stage, {})
    rows = result.get("rows", [])
    return result, [row for row in rows if row["ok"] and row.get("backend") == backend]


LARGE_STEPS = ((2048, 32), (2048, 64), (8192, 64))

BARS = (
    Bar("comparisons with references that are right", 1.0, 1.0, right),
    Bar("decode attention, 512 MB or more: share of the copy", 0.85, 0.95,
        share_of_copy("speed_decode", "bytes")),
    Bar("prefill attention, 8192 tokens, Triton: TFLOP/s", 390e12, 490e12, prefill_rate, tera),
    Bar("prefill attention, automatic choice: speed to cuDNN's", 0.95, 1.0,
        speed_to("speed_prefill", "automatic", "cudnn")),
    Bar("decode step, 7B, batch 1: share of the limit", 0.75, 0.85, step_share((2048, 1))),
    Bar("decode step, 7B, batch 32 and 64: share of the limit", 0.8, 0.9, step_share(*LARGE_STEPS)),
    Bar("decode speed-up of 10 %: share of the ideal", 0.9, 0.97, speedup_share),
    Bar("packed rows, 512 MB or more in bfloat16: share of the copy", 0.5, 0.8,
        share_of_copy("speed_packed", "full_bytes")),
    Bar("the same: speed to the rows in bfloat16", 1.0, 1.5,
        speed_to("speed_packed", "triton", "pool")),
)  # fmt: skip


def table(results: Results) -> list[dict[str, Any]]:
    """All bars."""
    return [bar.row(results) for bar in BARS]
