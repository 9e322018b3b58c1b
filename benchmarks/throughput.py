"""Tokens per second of as many sequences as fit: `python -m benchmarks.throughput`.

A few prompts at a time are prefilled into one cache, which is donated from call to call and so
written in place, until it holds all sequences; then all are decoded together. What a small cache is
for: more sequences in the same memory.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import device as devices
from benchmarks import measure
from benchmarks.command import bad_input, check_known, check_out, counting_bar
from benchmarks.environment import environment, write_result
from benchmarks.roofline import WORKSPACE, Device, decode_step
from benchmarks.speed import limit
from benchmarks.speed.cases import Case, Variant, models
from benchmarks.speed.limit import in_type
from benchmarks.speed.options import Budgets, Dtype, KvBits, Methods, dtype_of, variants_of
from benchmarks.speed.rows import cache_of, described
from vlcache_jax.generate import Generate
from vlcache_jax.models.llava import Params, init_params
from vlcache_jax.report import human_bytes, token_bytes

CPU_MEMORY = 64 * 2**20
"""What a CPU's run takes for the device's memory, so that it ends within a minute."""

FEWER = 7 / 8
"""Of the sequences that did not fit, how many are tried next. A half would be a coarse answer."""


@dataclass(frozen=True)
class Load:
    """What is to be held and decoded.

    Attributes:
        case: the model and its prompts; its batch is how many are prefilled at a time.
        memory: bytes of the device that are used, weights included.
        sequences: how many to hold, None for as many as fit.
    """

    case: Case
    memory: int
    sequences: int | None = None

    def generate(self, variant: Variant) -> Generate:
        """The programs of a variant."""
        return self.case.generate(variant, self.case.new_tokens, self.case.chunk)

    def first_guess(self, variant: Variant, weights: int) -> int:
        """Sequences that should fit beside the weights, in whole groups of those prefilled at once.

        Room is left for all keys and values of one group, twice over for the full cache (once as
        what the prefill makes, once as it is handed on), and for a sixteenth of the memory, at most
        2 GB, of temporaries.

        Raises:
            ValueError: not even one group fits.
        """
        case, group = self.case, self.case.batch
        if self.sequences is not None:
            return math.ceil(self.sequences / group) * group
        dtype = jnp.dtype(case.dtype)
        shapes = jax.eval_shape(lambda: self.generate(variant).empty(1, case.context, dtype))
        each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes[0])) + sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes[1].tail)
        )
        prefill = 2 * group * case.context * token_bytes(case.config.text, dtype)
        room = self.memory - weights - prefill - min(WORKSPACE, self.memory // 16)
        count = math.floor(room / each / group) * group
        if count < group:
            raise ValueError(
                f"{human_bytes(self.memory)} do not hold the weights and {group} sequences of "
                f"{case.context} tokens, {variant}: give more --memory, or a smaller --group"
            )
        return count


def run(
    load: Load,
    variant: Variant,
    params: Params,
    device: Device,
    advance: Callable[[float], None] = lambda part: None,
) -> dict[str, Any]:
    """Hold as many sequences as fit, and decode them: the row of a variant.

    Args:
        load: what is to be held.
        variant: how the caches are kept.
        params: the model's weights.
        device: whose limit the decoding is compared with.
        advance: called with the share of the run that is done since the last call.
    """
    row, tried = described(load.case, variant), []
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    try:
        count = load.first_guess(variant, weights)
        while True:
            tried.append(count)
            try:
                found = _hold_and_decode(load, variant, params, count, advance)
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or count <= load.case.batch:
                    raise
            group = load.case.batch
            count = max(group, int(count * FEWER) // group * group)
    except Exception as error:  # whatever the compiler and the driver may raise
        return {**row, "tried": tried, "exception": f"{type(error).__name__}: {error}"[:2000]}
    case = load.case
    work = decode_step(
        case.config,
        case.context,
        count,
        found["kept_share"],
        found["stored_bits"],
        tail=case.new_tokens // 2,
    )
    floor = in_type(work, case.dtype).floor(device)
    rate = count / statistics.median(found["step_samples"])
    return {
        **row,
        "tried": tried,
        "sequences": count,
        "new_tokens": case.new_tokens,
        **found,
        "tokens_per_s": rate,
        "floor_tokens_per_s": count / floor,
        "share": rate * floor / count,
        "answers_per_s": count / (sum(found["prefill_samples"]) + found["decode_s"]),
    }


def _hold_and_decode(
    load: Load,
    variant: Variant,
    params: Params,
    count: int,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Prefill `count` sequences into one cache, then decode all of them to the end."""
    case, group, generate = load.case, load.case.batch, load.generate(variant)
    pool, state = generate.empty(count, case.context, jnp.dtype(case.dtype))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pool) if leaf.ndim == 4)
    tail = sum(leaf.nbytes for leaf in jax.tree.leaves(state.tail))
    fill = jax.jit(generate.prefill_into, donate_argnums=(1, 2))
    starts, key = range(0, count, group), jax.random.key(0)
    prefill, compile_s = [], {}
    for start in starts:
        rows, inputs = jnp.arange(start, start + group), jax.device_put(case.inputs(start))
        if start == 0:
            fill, compile_s["prefill"] = _compiled(fill, params, pool, state, rows, inputs, key)
        began = time.perf_counter()
        pool, state, _ = fill(params, pool, state, rows, inputs, key)
        jax.block_until_ready((pool, state))
        prefill.append(time.perf_counter() - began)
        advance(0.5 / len(starts))
    share = float(pool.length.mean()) / case.context
    bits = case.stored_bits(variant, np.asarray(pool.counts))
    chunk = jax.jit(generate.decode_chunk, donate_argnums=2)
    chunk, compile_s["decode"] = _compiled(chunk, params, pool, state)
    steps = []
    for _ in range(generate.num_chunks):
        began = time.perf_counter()
        state, tokens = chunk(params, pool, state)
        jax.block_until_ready(tokens)
        steps.append((time.perf_counter() - began) / generate.chunk_steps)
        advance(0.5 / generate.num_chunks)
    if not bool((state.count == generate.num_chunks * generate.chunk_steps + 1).all()):
        raise ArithmeticError(f"not every sequence has its tokens: {state.count}")
    return {
        "kept_share": share,
        "stored_bits": bits,
        "kept_bytes_share": share * bits / 16,
        "cache_bytes": held,
        "tail_bytes": tail,
        "prefilled_at_once": group,
        "compile_s": compile_s,
        "prefill_samples": prefill,
        "step_samples": steps,
        "decode_s": sum(steps) * generate.chunk_steps,
    }


def _compiled(program: Any, *arguments: Any) -> tuple[Any, float]:
    """A program compiled for its arguments, and the seconds that took."""
    began = time.perf_counter()
    return program.lower(*arguments).compile(), time.perf_counter() - began


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Set the rows beside the first one, the full cache."""
    full = rows[0]
    if "sequences" not in full:
        return
    for row in rows[1:]:
        if "sequences" in row:
            for name in ("sequences", "tokens_per_s", "floor_tokens_per_s", "answers_per_s"):
                row[f"{name}_over_full"] = row[name] / full[name]


def show(result: dict[str, Any], console: Console) -> None:
    """The rows for a terminal."""
    table = Table("cache")
    for name in ("sequences", "cache", "tokens/s", "of limit", "over full", "ideal", "answers/s"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        name = cache_of(row)
        if "exception" in row:
            console.print(f"{name}: {row['exception']}", style="red", markup=False)
            continue
        ratios = (row.get(f"{part}tokens_per_s_over_full") for part in ("", "floor_"))
        table.add_row(
            name,
            f"{row['sequences']:,}",
            human_bytes(row["cache_bytes"] + row["tail_bytes"]),
            f"{row['tokens_per_s']:,.1f}",
            f"{row['share']:.0%}",
            *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            f"{row['answers_per_s']:,.2f}",
        )
    console.print(
        f"{result['model']}, prompts of {result['context']} tokens, answers of "
        f"{result['new_tokens']}, in {human_bytes(result['memory_bytes'])}",
        highlight=False,
    )
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="demo, small-mha, small-gqa, or llava-...")] = "demo",
    context: Annotated[int, typer.Option(min=64, help="Tokens of a prompt.")] = 512,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences; as many as fit by default.")
    ] = None,
    group: Annotated[int, typer.Option(min=1, help="Prompts prefilled at a time.")] = 4,
    method: Methods = None,
    budget: Budgets = None,
    kv_bits: KvBits = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 65,
    memory: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes to fill; on a GPU all that JAX may use, else 64 MiB."),
    ] = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Fill the memory with sequences, decode them, and say how many tokens a second that is.

    Example: python -m benchmarks.throughput

    With a quantised cache: python -m benchmarks.throughput --kv-bits 16 --kv-bits akvq

    On a GPU: python -m benchmarks.throughput --model llava-v1.6-mistral-7b --context 8192
    """
    check_out(out, force=force)
    with bad_input():
        check_known("model", [model], models())
        variants, kind = variants_of(method, budget, kv_bits=kv_bits), dtype_of(dtype)
        size = memory or devices.memory_limit() or CPU_MEMORY
        case = Case(model, context, group, kind, new_tokens=new_tokens)
        load = Load(case, size, batch)
    errors = Console(stderr=True)
    with counting_bar(errors, transient=True) as bar:
        task = bar.add_task("measuring", total=len(variants))
        device, ceilings = limit.measured(kind, measure.BRIEF)
        device = replace(device, memory=size)
        params = init_params(case.config, dtype=jnp.dtype(kind))
        rows = [
            run(load, v, params, device, lambda part: bar.advance(task, part)) for v in variants
        ]
    compare(rows)
    result = {
        **environment(),
        **devices.describe(need_gpu=False),
        "limit": asdict(device),
        "ceilings": ceilings,
        "model": model,
        "context": context,
        "new_tokens": new_tokens,
        "memory_bytes": size,
        "rows": rows,
    }
    if out is not None:
        write_result(out, result)
    if as_json:
        print(json.dumps(result))
    else:
        show(result, Console(width=max(100, errors.width)))


if __name__ == "__main__":
    typer.run(main)
