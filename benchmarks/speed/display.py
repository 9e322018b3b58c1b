"""The results for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.rows import cache_of


def show(result: dict[str, Any], console: Console) -> None:
    """All tables of a result."""
    limit = result["limit"]
    console.print(
        f"{limit['name']} ({limit['source']}): {limit['bandwidth'] / 1e9:,.1f} GB/s, "
        f"{limit['flops'] / 1e12:,.3g} TFLOP/s",
        highlight=False,
    )
    if result["rows"]:
        console.print(_timings(result["rows"]))
    if result.get("paper"):
        console.print(_paper(result["paper"]))
    if summary := result.get("cpu"):
        console.print(_cpu(summary), highlight=False)
    for row in result["rows"] + result.get("profiles", []):
        if "exception" in row:
            console.print(f"{_name(row)}: {row['exception']}", style="red", markup=False)
    for row in result.get("profiles", []):
        if "scopes" in row:
            console.print(_profile(row))


def _name(row: dict[str, Any]) -> str:
    return f"{row['stage']}, {row['model']}, {row['context']} x {row['batch']}, {_cache(row)}"


def _cache(row: dict[str, Any]) -> str:
    return " ".join([cache_of(row), *([row["backend"]] if row["backend"] else [])])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _timings(rows: list[dict[str, Any]]) -> Table:
    table = Table("stage", "model", "T x batch", "cache")
    for name in ("ms", "spread", "at least", "of limit", "speed-up", "ideal", "programs", "first"):
        table.add_column(name, justify="right")
    for row in rows:
        about = (row["stage"], row["model"], f"{row['context']} x {row['batch']}", _cache(row))
        if "exception" in row:
            table.add_row(*about, row["exception"].split(":")[0])
            continue
        low, high = (f"{1e3 * value:,.4g}" for value in row["spread"])
        table.add_row(
            *about,
            f"{1e3 * row['seconds']:,.4g}",
            f"{low} - {high}",
            f"{1e3 * row['floor_s']:,.4g}",
            _number(row["share"], ".0%"),
            _number(row.get("speedup"), ".2f"),
            _number(row.get("ideal_speedup"), ".2f"),
            _number(row.get("programs"), "d"),
            f"{row['compile_s']:.1f} s",
        )
    return table


def _paper(rows: list[dict[str, Any]]) -> Table:
    table = Table("batch x prompt", "stage", title="A tenth against the full cache")
    for name in ("ours", "ideal of ours", "paper, against Hugging Face"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (_number(row[name], ".2f") for name in ("ours", "ideal", "paper"))
        table.add_row(f"{row['batch']} x {row['context'] // 1024}K", row["stage"], *numbers)
    return table


def _cpu(summary: dict[str, Any]) -> str:
    weights, cache = summary["weight_bytes"], summary["cache_bytes"]
    return (
        f"W = {weights / 1e9:.2f} GB, KV = {cache / 1e9:.2f} GB ({cache / weights:.1f} times W): "
        f"a tenth decodes {_number(summary['speedup'], '.2f')} times as fast as the full cache; "
        f"(W + KV) / (W + 0.1 KV) = {summary['ideal']:.2f}, of which that is "
        f"{_number(summary['share'], '.0%')} (must reach {summary['must_reach']:.0%})"
    )


def _profile(row: dict[str, Any]) -> Table:
    table = Table("scope", title=f"{_name(row)}: {1e3 * row['seconds']:,.3g} ms")
    for name in ("ms", "share", "launches"):
        table.add_column(name, justify="right")
    for scope in row["scopes"]:
        table.add_row(
            scope["scope"],
            f"{1e3 * scope['seconds']:,.4g}",
            f"{scope['share']:.1%}",
            f"{scope['launches']:,.0f}",
        )
    return table
