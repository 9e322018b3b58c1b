"""How fast a model can be at best, and how much fits: `python -m benchmarks.roofline`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import roofline
from benchmarks.command import AsJson, Force, Out, bad_input, check_known, check_out, finish
from benchmarks.documents import panels, save_svg, table
from benchmarks.environment import environment
from benchmarks.models import MODELS
from benchmarks.roofline.links import LINKS, Split, split_rows, split_table
from benchmarks.roofline.packed import Caches, caches
from benchmarks.roofline.trips import trip_rows, trip_table
from vlcache_jax.cache.budget import Budget
from vlcache_jax.cache.quantizers import QUANTIZERS
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.results.report import human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTTED = tuple(2**power for power in range(11, 18))
"""Contexts of the plot, 2k to 128k."""


def stage_rows(
    device: roofline.Device, config: ModelConfig, context: int, batch: int, compared: Caches
) -> list[dict[str, Any]]:
    """Bytes, operations and floor of every stage and its parts; decoding with every cache."""
    size = config, context, batch
    found = [("prefill", "", roofline.prefill(*size))]
    kept = {name: cache.kept(config, context) for name, cache in compared.items()}
    for name, cache in compared.items():
        if cache.budget < 1:
            found.append(("scoring", name, roofline.scoring(*size, *kept[name])))
        elif cache.quantizer is not None:
            found.append(("packing", name, roofline.packing(*size, kept[name][1])))
    found += [("decode", name, roofline.decode_step(*size, *each)) for name, each in kept.items()]

    def numbers(work: roofline.Work | roofline.Stage) -> dict[str, float]:
        return {
            "bytes": round(work.bytes),
            "operations": round(work.operations),
            "floor_s": work.floor(device),
        }

    return [
        {
            "stage": stage,
            "cache": cache,
            **numbers(work),
            "parts": {name: numbers(part) for name, part in work.parts.items()},
        }
        for stage, cache, work in found
    ]


def capacity_rows(
    device: roofline.Device, config: ModelConfig, context: int, batch: int, compared: Caches
) -> list[dict[str, Any]]:
    """What every cache allows: faster steps at the same batch, and a larger batch."""
    rows, full = [], roofline.decode_step(config, context, batch).floor(device)
    for name, cache in compared.items():
        kept = cache.kept(config, context)
        most = roofline.largest_batch(device, config, context, *kept)
        rate = roofline.tokens_per_second(device, config, context, most, *kept) if most else 0.0
        rows.append(
            {
                "cache": name,
                "budget": cache.budget,
                "stored_bits": kept[1],
                "rows_by_bits": cache.rows(config, context),
                "sequence_bytes": round(roofline.sequence_bytes(config, context, *kept)),
                "speedup": full / roofline.decode_step(config, context, batch, *kept).floor(device),
                "fits": batch <= most,
                "largest_batch": most,
                "tokens_per_s": rate,
            }
        )
    return rows


def text_of(result: dict[str, Any], split: Split) -> str:
    """The result in Markdown."""
    device = result["device"]
    stages = [
        [
            row["stage"],
            row["cache"],
            human_bytes(row["bytes"]),
            f"{row['operations'] / 1e12:,.2f} T",
            f"{row['floor_s'] * 1e3:,.3f} ms",
            ", ".join(
                f"{name} {part['floor_s'] / row['floor_s']:.0%}"
                for name, part in row["parts"].items()
            ),
        ]
        for row in result["rows"]
    ]
    capacity = [
        [
            row["cache"],
            f"{row['stored_bits']:.3g}",
            human_bytes(row["sequence_bytes"]),
            f"{row['speedup']:.2f}x",
            "yes" if row["fits"] else "no",
            f"{row['largest_batch']:,}",
            f"{row['tokens_per_s']:,.0f}",
        ]
        for row in result["capacity"]
    ]
    head = ["cache", "bits", "of a sequence", "speed-up", "fits", "largest batch", "tokens/s then"]
    return "\n\n".join(
        [
            f"{result['model']}, {result['context']} tokens x {result['batch']}, on "
            f"{device['name']} ({device['source']}: {device['bandwidth'] / 1e12:.3g} TB/s, "
            f"{device['flops'] / 1e12:.4g} TFLOP/s, {device['memory'] / 2**30:.4g} GiB):",
            table(["stage", "cache", "bytes", "operations", "at least", "of it"], stages),
            table(head, capacity),
            *([split_table(split, result["split"])] if result["split"] else []),
            trip_table(result["serial_trips"]),
        ]
    )  # fmt: skip


def draw(
    device: roofline.Device,
    name: str,
    batch: int,
    compared: Caches,
    contexts: tuple[int, ...] = PLOTTED,
) -> "Figure":
    """The floor of a decode step against the context, dotted where the cache does not fit."""
    from matplotlib.ticker import LogLocator

    config = MODELS[name]
    figure, [[axes]] = panels(6, 4)
    for index, (label, cache) in enumerate(compared.items()):
        kept = [cache.kept(config, context) for context in contexts]
        times = [
            1e3 * roofline.decode_step(config, context, batch, *each).floor(device)
            for context, each in zip(contexts, kept, strict=True)
        ]
        fitting = sum(
            batch <= roofline.largest_batch(device, config, context, *each)
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


def main(
    device: Annotated[str, typer.Option(help=f"One of {', '.join(roofline.DEVICES)}.")] = "h200",
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = (
        "llava-v1.6-mistral-7b"
    ),
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt; may exceed the model's positions.")
    ] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    budget: Annotated[float, typer.Option(help="Share of the cache kept; 1 keeps all.")] = 0.1,
    kv_bits: Annotated[
        str,
        typer.Option(
            help=f"Also the full cache and the budget quantized: {', '.join(QUANTIZERS)}; 16 for "
            "none."
        ),
    ] = "16",
    devices: Annotated[
        int, typer.Option(min=1, help="Also so many devices, each with a part of every layer.")
    ] = 1,
    link: Annotated[str, typer.Option(help=f"Between them: {', '.join(LINKS)}.")] = "nvlink",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the floor of a decode step against the context, an SVG file."),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Say how fast a model can be at best on a device, and how many sequences fit.

    It counts the bytes that must move and the operations that must run; nothing is measured.

    Example: python -m benchmarks.roofline --model llava-v1.6-34b --context 8192 --batch 32

    On four devices: python -m benchmarks.roofline --model llava-v1.6-34b --devices 4

    With a plot: python -m benchmarks.roofline --plot decode.svg

    With AKVQ-VL's rows: python -m benchmarks.roofline --context 32768 --batch 24 --kv-bits akvq
    """
    check_out(out, force=force)
    check_out(plot, "plot", force=force)
    with bad_input():
        check_known("device", [device], roofline.DEVICES)
        check_known("model", [model], MODELS)
        check_known("link", [link], LINKS)
        chosen, config = roofline.DEVICES[device], MODELS[model]
        Budget(budget)
        compared = caches(config, budget, kv_bits)
        split = Split(config, devices, LINKS[link])
    size = chosen, config, context, batch, compared
    result = {
        **environment(),
        "device": asdict(chosen),
        "model": model,
        "context": context,
        "beyond_positions": context > config.text.max_positions,
        "batch": batch,
        "tail_rows_at_largest_batch": roofline.TAIL_ROWS,
        "rows": stage_rows(*size),
        "capacity": capacity_rows(*size),
        "devices": devices,
        "link": asdict(split.link),
        "split": split_rows(split, chosen, context, batch, compared) if devices > 1 else [],
        "serial_trips": trip_rows(config.text),
    }
    if plot is not None:
        save_svg(draw(chosen, model, batch, compared), plot, salt="roofline")
    finish(result, text_of(result, split), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
