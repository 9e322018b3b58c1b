"""How fast a model can be at best, and how much fits: `python -m benchmarks.roofline`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.command import bad_input, check_known, check_out
from benchmarks.environment import environment, write_result
from benchmarks.models import MODELS
from benchmarks.roofline import (
    DEVICES,
    TAIL_ROWS,
    Device,
    Stage,
    decode_step,
    largest_batch,
    packing,
    prefill,
    scoring,
    sequence_bytes,
    stored_bits,
    tokens_per_second,
)
from benchmarks.roofline.packed import bits_of, quantized_rows
from benchmarks.roofline.trips import trip_rows, trip_table
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.quantizers import QUANTIZERS, make_quantizer
from vlcache_jax.config import LlavaConfig
from vlcache_jax.report import human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cache:
    """One way to keep the cache.

    Attributes:
        budget: share of it that is kept.
        bits: `stored_bits` of every value, where no quantizer says it.
        quantizer: how what is kept is quantized, for the model's decoder.
    """

    budget: float = 1.0
    bits: float = 16.0
    quantizer: Quantizer | None = None

    def stored(self, config: LlavaConfig, context: int) -> float:
        """Bits of a value of the pool, with all that belongs to it."""
        if self.quantizer is None:
            return self.bits
        rows = quantized_rows(config.text, self.quantizer, context, self.budget)
        return bits_of(config.text, self.quantizer, rows)

    def rows(self, config: LlavaConfig, context: int) -> dict[str, float]:
        """Rows of a layer by their bits, the mean over the layers; empty without a quantizer."""
        if self.quantizer is None:
            return {}
        mean = quantized_rows(config.text, self.quantizer, context, self.budget).mean(axis=0)
        return {
            str(bits): float(rows)
            for bits, rows in zip((16, *self.quantizer.widths), mean, strict=True)
        }


Caches = Mapping[str, Cache]
"""By the cache's name."""

PLOTTED = tuple(2**power for power in range(11, 18))
"""Contexts of the plot, 2k to 128k."""


def caches(
    config: LlavaConfig, budget: float, bits: int, stored: float, kv_bits: str = "16"
) -> Caches:
    """The caches that are compared: full, the budget, and the budget at fewer bits.

    Args:
        config: the model.
        budget: share of the cache.
        bits: of every value of the budget; 16 for none.
        stored: the same with what belongs to it.
        kv_bits: a name that `make_quantizer` takes: of the full cache and of the budget.
    """
    share, found = f"{100 * budget:g} %", {"full": Cache()}
    if budget < 1:
        found[share] = Cache(budget)
    if bits < 16:
        found[f"{share} at {bits} bit"] = Cache(budget, stored)
    quantizer = make_quantizer(kv_bits)
    if quantizer is not None:
        own = quantizer.for_decoder(config.text.kind, config.text.num_layers)
        for name, cache in list(found.items()):
            found[f"{name} + {kv_bits}"] = Cache(cache.budget, quantizer=own)
    return found


def stage_rows(
    device: Device, config: LlavaConfig, context: int, batch: int, compared: Caches, window: int
) -> list[dict[str, Any]]:
    """Bytes, operations and floor of every stage and its parts; decoding with every cache."""
    rows = [_stage_row("prefill", "", prefill(config, context, batch), device)]
    stored = {name: cache.stored(config, context) for name, cache in compared.items()}
    for name, cache in compared.items():
        if cache.budget < 1:
            method = scoring(config, context, batch, cache.budget, stored[name], window=window)
            rows.append(_stage_row("scoring", name, method, device))
        elif cache.quantizer is not None:
            rows.append(
                _stage_row("packing", name, packing(config, context, batch, stored[name]), device)
            )
    for name, cache in compared.items():
        step = decode_step(config, context, batch, cache.budget, stored[name])
        rows.append(_stage_row("decode", name, step, device))
    return rows


def _stage_row(stage: str, cache: str, found: Stage, device: Device) -> dict[str, Any]:
    return {
        "stage": stage,
        "cache": cache,
        "bytes": round(found.bytes),
        "operations": round(found.operations),
        "floor_s": found.floor(device),
        "parts": {
            name: {
                "bytes": round(part.bytes),
                "operations": round(part.operations),
                "floor_s": part.floor(device),
            }
            for name, part in found.parts.items()
        },
    }


def capacity_rows(
    device: Device, config: LlavaConfig, context: int, batch: int, compared: Caches
) -> list[dict[str, Any]]:
    """What every cache allows: faster steps at the same batch, and a larger batch."""
    rows, full = [], decode_step(config, context, batch).floor(device)
    for name, cache in compared.items():
        budget, bits = cache.budget, cache.stored(config, context)
        step = decode_step(config, context, batch, budget, bits).floor(device)
        most = largest_batch(device, config, context, budget, bits)
        rate = tokens_per_second(device, config, context, most, budget, bits) if most else 0.0
        rows.append(
            {
                "cache": name,
                "budget": budget,
                "stored_bits": bits,
                "rows_by_bits": cache.rows(config, context),
                "sequence_bytes": round(sequence_bytes(config, context, budget, bits)),
                "speedup": full / step,
                "fits": batch <= most,
                "largest_batch": most,
                "tokens_per_s": rate,
            }
        )
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """The tables for a terminal."""
    device = result["device"]
    console.print(
        f"{result['model']}, {result['context']} tokens x {result['batch']}, on {device['name']} "
        f"({device['source']}: {device['bandwidth'] / 1e12:.3g} TB/s, {device['flops'] / 1e12:.4g} "
        f"TFLOP/s, {device['memory'] / 2**30:.4g} GiB)",
        highlight=False,
    )
    stages = Table("stage", "cache")
    for name in ("bytes", "operations", "at least", "of it"):
        stages.add_column(name, justify="right")
    for row in result["rows"]:
        parts = row["parts"].items()
        stages.add_row(
            row["stage"],
            row["cache"],
            human_bytes(row["bytes"]),
            f"{row['operations'] / 1e12:,.2f} T",
            f"{row['floor_s'] * 1e3:,.3f} ms",
            "\n".join(f"{name} {part['floor_s'] / row['floor_s']:4.0%}" for name, part in parts),
        )
    fits = Table("cache")
    for name in ("bits", "of a sequence", "speed-up", "fits", "largest batch", "tokens/s then"):
        fits.add_column(name, justify="right")
    for row in result["capacity"]:
        fits.add_row(
            row["cache"],
            f"{row['stored_bits']:.3g}",
            human_bytes(row["sequence_bytes"]),
            f"{row['speedup']:.2f}x",
            "yes" if row["fits"] else "no",
            f"{row['largest_batch']:,}",
            f"{row['tokens_per_s']:,.0f}",
        )
    console.print(stages, fits, trip_table(result["serial_trips"]))


def draw(
    device: Device, name: str, batch: int, compared: Caches, contexts: tuple[int, ...] = PLOTTED
) -> "Figure":
    """The floor of a decode step against the context, dotted where the cache does not fit."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    config = MODELS[name]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, (label, cache) in enumerate(compared.items()):
        kept = [(cache.budget, cache.stored(config, context)) for context in contexts]
        times = [
            1e3 * decode_step(config, context, batch, *each).floor(device)
            for context, each in zip(contexts, kept, strict=True)
        ]
        fitting = sum(
            batch <= largest_batch(device, config, context, *each)
            for context, each in zip(contexts, kept, strict=True)
        )
        style: dict[str, Any] = {"color": f"C{index}", "marker": "."}
        axes.plot(contexts, times, linestyle=":", zorder=1, **style)
        axes.plot(contexts[:fitting], times[:fitting], label=label, zorder=2, **style)
    axes.set(
        title=f"{name} x {batch}, {device.name} ({device.source})",
        xlabel="context (dotted: does not fit)",
        ylabel="decode step, at least (ms)",
        xscale="log",
        yscale="log",
    )
    axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(title="cache")
    return figure


def _named(kind: str, known: Mapping[str, Any], name: str) -> Any:
    check_known(kind, [name], known)
    return known[name]


def main(
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "h200",
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = (
        "llava-v1.6-mistral-7b"
    ),
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt; may exceed the model's positions.")
    ] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    budget: Annotated[float, typer.Option(help="Share of the cache kept; 1 keeps all.")] = 0.1,
    bits: Annotated[int, typer.Option(help="Bits of a quantized value; 16 for none.")] = 16,
    group: Annotated[int, typer.Option(help="Values that share a scale and an offset.")] = 64,
    exact_rows: Annotated[
        int, typer.Option(help="Rows of a layer that stay at 16 bit beside the quantized ones.")
    ] = 0,
    kv_bits: Annotated[
        str,
        typer.Option(
            help=f"A quantizer in place of plain --bits, of the full cache and of the budget: "
            f"{', '.join(QUANTIZERS)}; 16 for none. Rows at 16 bit, groups and bits are its own."
        ),
    ] = "16",
    window: Annotated[int, typer.Option(min=1, help="Rows of the prompt that score.")] = 50,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bytes per second, measured, instead of the device's.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="bf16 operations per second, measured, likewise.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Bytes of memory, likewise.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw decode time against context into this SVG file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
) -> None:
    """Say how fast a model can be at best on a device, and how many sequences fit.

    It counts the bytes that must move and the operations that must run; nothing is measured.

    Example: python -m benchmarks.roofline --model llava-v1.6-34b --context 8192 --batch 32

    With 2 bit, and a plot: python -m benchmarks.roofline --bits 2 --plot decode.svg

    With AKVQ-VL's rows: python -m benchmarks.roofline --context 32768 --batch 24 --kv-bits akvq

    Your own device: python -m benchmarks.roofline --bandwidth 2e12 --flops 2e14 --memory 4e10
    """
    check_out(out, force=force)
    check_out(plot, force=force)
    with bad_input():
        chosen: Device = _named("device", DEVICES, device)
        config: LlavaConfig = _named("model", MODELS, model)
        given = {"bandwidth": bandwidth, "flops": flops, "memory": memory}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) == 3:
            chosen = Device("a device", source="given", **given)
        elif given:
            source = f"{', '.join(given)} given, else {chosen.source}"
            chosen = replace(chosen, source=source, **given)
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget:g} must be above 0 and at most 1 (0.1 keeps 10 %)")
        if kv_bits != "16" and (bits, group, exact_rows) != (16, 64, 0):
            raise ValueError(
                f"--kv-bits {kv_bits} has its own bits, groups and rows at 16 bit: leave --bits, "
                "--group and --exact-rows out"
            )
        stored = stored_bits(bits, context * budget, group=group, exact_rows=exact_rows)
        compared = caches(config, budget, bits, stored, kv_bits)
    result = {
        "device": asdict(chosen),
        "model": model,
        "context": context,
        "beyond_positions": context > config.text.max_positions,
        "batch": batch,
        "window": window,
        "tail_rows_at_largest_batch": TAIL_ROWS,
        "rows": stage_rows(chosen, config, context, batch, compared, window),
        "capacity": capacity_rows(chosen, config, context, batch, compared),
        "serial_trips": trip_rows(config.text),
    }
    if out is not None:
        write_result(out, {**environment(), **result})
    if plot is not None:
        _save(draw(chosen, model, batch, compared), plot)
    if as_json:
        print(json.dumps(result))
    else:
        show(result, Console(width=max(90, Console().width)))


def _save(figure: "Figure", path: Path) -> None:
    import matplotlib as mpl

    # Nothing in the file depends on when it was drawn.
    with mpl.rc_context({"svg.hashsalt": "roofline", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
