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
"""The name of the case in speed_prompt.py."""

Results = dict[str, dict[str, Any]]
"""Stage → its result file."""


@dataclass(frozen=True)
class Bar:
    """One thing to reach.

    Attributes:
        what: in words.
        must: at least this.
        aim: what is hoped for.
        shown: how numbers of it are written.
        measure: the number and a remark, or None where it was not measured.
    """

    what: str
    must: float
    aim: float
    shown: Callable[[float], str]
    measure: Callable[[Results], tuple[float, str] | None]

    def row(self, results: Results) -> dict[str, Any]:
        """For the table at the end."""
        found = self.measure(results)
        row = {"bar": self.what, "must": self.shown(self.must), "aim": self.shown(self.aim)}
        if found is None:
            return {**row, "measured": None, "state": "not measured", "remark": ""}
        value, remark = found
        state = "aim reached" if value >= self.aim else "reached"
        state = state if value >= self.must else "short"
        return {**row, "measured": self.shown(value), "state": state, "remark": remark}


def percent(value: float) -> str:
    """0.853 → "85.3 %"."""
    return f"{100 * value:.1f} %"


def tera(value: float) -> str:
    """4.93e14 → "493"."""
    return f"{value / 1e12:.0f}"


def right(results: Results) -> tuple[float, str] | None:
    """The share of the comparisons with references that are right."""
    rows = [
        row
        for name, result in results.items()
        if name.startswith("correctness")
        for row in result.get("rows", [])
        if row["ok"] is not None
    ]
    if not rows:
        return None
    wrong = sum(not row["ok"] for row in rows)
    return 1 - wrong / len(rows), f"{wrong} of {len(rows)} wrong"


def decode_share(results: Results) -> tuple[float, str] | None:
    """The least share of the copy's bandwidth, among reads of at least `LARGE_BYTES`."""
    result = results.get("speed_decode", {})
    rows = [row for row in _timed(result, "triton") if row["bytes"] >= LARGE_BYTES]
    if not rows:
        return None
    worst = min(rows, key=lambda row: row["bytes_per_s"])
    rate, copy = worst["bytes_per_s"], result["copy_bytes_per_s"]
    remark = f"{rate / 1e12:.2f} of {copy / 1e12:.2f} TB/s copied, {percent(rate / H200_COPY)} of "
    remark += f"{H200_COPY / 1e12} TB/s; worst: {worst['case']}"
    return rate / copy, remark


def packed_share(results: Results) -> tuple[float, str] | None:
    """The least share of the copy's bandwidth, among rows of `LARGE_BYTES` before packing."""
    result = results.get("speed_packed", {})
    rows = [row for row in _timed(result, "triton") if row["full_bytes"] >= LARGE_BYTES]
    if not rows:
        return None
    worst = min(rows, key=lambda row: row["bytes_per_s"])
    return worst["bytes_per_s"] / result["copy_bytes_per_s"], f"worst: {worst['case']}"


def packed_speed(results: Results) -> tuple[float, str] | None:
    """The speed over such rows, as a multiple of that over the same rows in bfloat16."""
    result = results.get("speed_packed", {})
    pool = {row["case"]: row["seconds"] for row in _timed(result, "pool")}
    speeds = {
        row["case"]: pool[row["case"]] / row["seconds"]
        for row in _timed(result, "triton")
        if row["full_bytes"] >= LARGE_BYTES and row["case"] in pool
    }
    if not speeds:
        return None
    worst = min(speeds, key=lambda case: speeds[case])
    return speeds[worst], f"worst: {worst}"


def prefill_rate(results: Results) -> tuple[float, str] | None:
    """Operations per second of Triton's prefill at 8192 tokens."""
    result = results.get("speed_prefill", {})
    rates = {
        name: row["ops_per_s"]
        for name in ("triton", "cudnn", "torch")
        for row in _timed(result, name)
        if row["case"] == PREFILL_CASE
    }
    if "triton" not in rates:
        return None
    others = [f"{name} {tera(rate)}" for name, rate in rates.items() if name != "triton"]
    return rates["triton"], ", ".join([*others, f"product {tera(result['matmul_ops_per_s'])}"])


def automatic(results: Results) -> tuple[float, str] | None:
    """The speed of the automatic choice, as a share of cuDNN's: the worst of the lengths."""
    result = results.get("speed_prefill", {})
    cudnn = {row["case"]: row["seconds"] for row in _timed(result, "cudnn")}
    shares = {
        row["case"]: cudnn[row["case"]] / row["seconds"]
        for row in _timed(result, "automatic")
        if row["case"] in cudnn
    }
    if not shares:
        return None
    worst = min(shares, key=lambda case: shares[case])
    return shares[worst], f"worst: {worst}"


def step_share(*sizes: tuple[int, int]) -> Callable[[Results], tuple[float, str] | None]:
    """The least share of its limit that a whole decode step reaches, at (context, batch)."""

    def measured(results: Results) -> tuple[float, str] | None:
        rows = [row for row in _steps(results) if (row["context"], row["batch"]) in sizes]
        if not rows:
            return None
        worst = min(rows, key=lambda row: row["share"])
        return worst["share"], f"worst: {_size(worst)}, budget {worst['budget']}"

    return measured


def speedup_share(results: Results) -> tuple[float, str] | None:
    """The least share of the ideal that a tenth's speed-up reaches."""
    rows = [row for row in _steps(results) if "share_of_ideal" in row]
    if not rows:
        return None
    worst = min(rows, key=lambda row: row["share_of_ideal"])
    return worst["share_of_ideal"], f"worst: {worst['speedup']:.2f}x at {_size(worst)}"


def _steps(results: Results) -> list[dict[str, Any]]:
    """Decode steps of the 7B model that were measured."""
    stages = ("model_decode", "paper_decode")
    rows = [row for stage in stages for row in results.get(stage, {}).get("rows", [])]
    return [row for row in rows if row.get("share") and row["model"] == PAPER_MODEL]


def _size(row: dict[str, Any]) -> str:
    return f"{row['context']} x {row['batch']}"


def _timed(result: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    rows = result.get("rows", [])
    return [row for row in rows if row["ok"] and row.get("backend") == backend]


BARS = (
    Bar("comparisons with references that are right", 1.0, 1.0, percent, right),
    Bar("decode attention, 512 MB or more: share of the copy", 0.85, 0.95, percent, decode_share),
    Bar("prefill attention, 8192 tokens, Triton: TFLOP/s", 390e12, 490e12, tera, prefill_rate),
    Bar("prefill attention, automatic choice: speed to cuDNN's", 0.95, 1.0, percent, automatic),
    Bar("decode step, 7B, batch 1: share of the limit", 0.75, 0.85, percent, step_share((2048, 1))),
    Bar(
        "decode step, 7B, batch 32 and 64: share of the limit", 0.8, 0.9, percent,
        step_share((2048, 32), (2048, 64), (8192, 64)),
    ),
    Bar("decode speed-up of 10 %: share of the ideal", 0.9, 0.97, percent, speedup_share),
    Bar("packed rows, 512 MB or more in bfloat16: share of the copy", 0.5, 0.8, percent,
        packed_share),
    Bar("the same: speed to the rows in bfloat16", 1.0, 1.5, percent, packed_speed),
)  # fmt: skip


def table(results: Results) -> list[dict[str, Any]]:
    """All bars."""
    return [bar.row(results) for bar in BARS]
