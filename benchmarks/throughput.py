"""Tokens per second of as many sequences as fit: `python -m benchmarks.throughput`.

The driver prefills a few prompts at a time into one cache, until it holds all sequences; then all
are decoded together. What a small cache is for: more sequences in the same memory.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from benchmarks import command, measure
from benchmarks import device as devices
from benchmarks.environment import environment
from benchmarks.models import MODELS, empty_cache
from benchmarks.roofline import WORKSPACE, Device, decode_step
from benchmarks.speed import limit
from benchmarks.speed.cases import Case, models, name_of
from benchmarks.speed.limit import in_type
from benchmarks.speed.options import Budgets, Dtype, KvBits, Methods, dtype_of, variants_of
from benchmarks.speed.rows import described
from benchmarks.speed_sections import throughput_part
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.models.families import Params, init_params
from vlcache_jax.results.report import human_bytes, token_bytes
from vlcache_jax.running.driver import Run
from vlcache_jax.running.programs import Programs

CPU_MEMORY = 64 * 2**20
"""What a CPU's run takes for the device's memory, so that it ends within a minute."""

FEWER = 7 / 8
"""Of the sequences that did not fit, how many are tried next. A half would be a coarse answer."""


def held_bytes(case: Case, variant: CacheMethod, new_tokens: int) -> int:
    """Bytes of one sequence: its cache and the tail of so many new tokens, as allocated."""
    generate, dtype = case.generate(variant, new_tokens), jnp.dtype(case.dtype)
    pool, state = jax.eval_shape(lambda: empty_cache(generate, 1, case.context, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((pool, state.tail)))


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

    def first_guess(self, variant: CacheMethod, weights: int) -> int:
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
        each = held_bytes(case, variant, case.new_tokens)
        prefill = 2 * group * case.context * token_bytes(case.config.text, dtype)
        room = self.memory - weights - prefill - min(WORKSPACE, self.memory // 16)
        count = math.floor(room / each / group) * group
        if count < group:
            raise ValueError(
                f"{human_bytes(self.memory)} do not hold the weights and {group} sequences of "
                f"{case.context} tokens, {name_of(variant)}: give more --memory, or a smaller "
                "--group"
            )
        return count


def run(load: Load, variant: CacheMethod, params: Params, device: Device) -> dict[str, Any]:
    """Hold as many sequences as fit, and decode them: the row of a variant."""
    case, tried = load.case, []
    row = described(case, variant)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    try:
        count = load.first_guess(variant, weights)
        while True:
            tried.append(count)
            try:
                found = _hold_and_decode(load, variant, params, count)
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or count <= case.batch:
                    raise
            count = max(case.batch, int(count * FEWER) // case.batch * case.batch)
    except Exception as error:  # whatever the compiler and the driver may raise
        return {**row, "tried": tried, "exception": measure.reason(error)}
    kept = found["kept_share"], found["stored_bits"]
    work = decode_step(case.config, case.context, count, *kept, tail=case.new_tokens // 2)
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
        "answers_per_s": count / (found["prefill_s"] + found["decode_s"]),
    }


def _hold_and_decode(
    load: Load, variant: CacheMethod, params: Params, count: int
) -> dict[str, Any]:
    """Prefill `count` sequences into one cache, then decode all of them to the end."""
    case = load.case
    generate = case.generate(variant, case.new_tokens)
    groups = [case.inputs(start) for start in range(0, count, case.batch)]
    run = Run(Programs(), params, generate.stages, groups, generate.settings(count))
    chunks, steps = iter(run), []
    next(chunks)
    for _ in chunks:
        steps.append((run.timings.decode_s or 0.0) / generate.chunk_steps - sum(steps))
    if not (run.counts == case.new_tokens).all():
        raise ArithmeticError(f"not every sequence has its tokens: {run.counts}")
    row = token_bytes(case.config.text, jnp.dtype(case.dtype))
    return {
        **case.kept(variant, run.pool),
        "cache_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(run.pool) if leaf.ndim == 4),
        "tail_bytes": count * generate.stages.tail_rows * row,
        "prefilled_at_once": case.batch,
        "compile_s": run.timings.compile_s,
        "prefill_s": run.timings.prefill_s,
        "step_samples": steps,
        "decode_s": run.timings.decode_s,
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Set the rows beside the first one, the full cache."""
    full = rows[0]
    if "sequences" not in full:
        return
    for row in rows[1:]:
        if "sequences" in row:
            for name in ("sequences", "tokens_per_s", "floor_tokens_per_s", "answers_per_s"):
                row[f"{name}_over_full"] = row[name] / full[name]


def main(
    model: Annotated[
        str, typer.Option(help=f"demo-small, small-mha, small-gqa, {', '.join(MODELS)}.")
    ] = "demo-small",
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
    as_json: command.AsJson = False,
    out: command.Out = None,
    force: command.Force = False,
) -> None:
    """Fill the memory with sequences, decode them, and say how many tokens a second that is.

    Example: python -m benchmarks.throughput

    With a quantized cache: python -m benchmarks.throughput --kv-bits 16 --kv-bits akvq

    On a GPU: python -m benchmarks.throughput --model llava-v1.6-mistral-7b --context 8192
    """
    command.check_out(out, force=force)
    with command.bad_input():
        command.check_known("model", [model], models())
        variants, kind = variants_of(method, budget, kv_bits), dtype_of(dtype)
        size = memory or devices.memory_limit() or CPU_MEMORY
        case = Case(model, context, group, kind, new_tokens=new_tokens)
        load = Load(case, size, batch)
    with command.counting_bar() as bar:
        task = bar.add_task("measuring", total=len(variants))
        device, ceilings = limit.measured(kind, measure.BRIEF)
        device = replace(device, memory=size)
        params = init_params(case.config, dtype=jnp.dtype(kind))
        rows = []
        for variant in variants:
            rows.append(run(load, variant, params, device))
            bar.advance(task)
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
    command.finish(result, throughput_part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
