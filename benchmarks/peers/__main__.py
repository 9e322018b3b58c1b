"""The command: see the package."""

import os
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import command
from benchmarks.environment import environment
from benchmarks.peers.compare import BOUNDS, Differs, Plan, compare
from benchmarks.peers.model import MODELS, make_prompt
from benchmarks.peers.process import PeerError
from benchmarks.speed_sections import peers_part
from vlcache_jax.cache.methods import VLCache


def main(
    model: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "small",
    context: Annotated[int, typer.Option(help="Tokens of the prompt, most of them visual.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 1,
    dtype: Annotated[str, typer.Option(help=f"Of all sides: {', '.join(BOUNDS)}.")] = "float32",
    budget: Annotated[float, typer.Option(help="Share of the cache that VL-Cache keeps.")] = 0.1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of the longer answer.")] = 65,
    repeats: Annotated[int, typer.Option(min=2, help="Samples of each time.")] = 20,
    static: Annotated[
        bool,
        typer.Option(
            "--static/--no-static",
            help="Also the static cache with torch.compile, which takes as long as all the rest.",
        ),
    ] = True,
    limit: Annotated[
        float,
        typer.Option(min=1, help="Most seconds of one request: a compiler that takes longer ends."),
    ] = 300,
    as_json: command.AsJson = False,
    out: command.Out = None,
    force: command.Force = False,
) -> None:
    """Time Hugging Face transformers and this library in turns, on the same weights and prompt.

    Hugging Face with its default cache and SDPA, and with a static cache and torch.compile; ours
    with the full cache and with a tenth of it. Weights are random. Both must first give the same
    logits and the same greedy tokens, else the command fails. A step of decoding is the difference
    of a long answer and one of a single token, divided by the tokens between. A GPU is used where
    there is one; the checkpoint goes to TMPDIR, 15 GB of it for a 7B model. On a CPU only an idle
    machine compares fairly: the result says how busy it was before.

    For example:

    python -m benchmarks.peers

    python -m benchmarks.peers --context 2048 --budget 0.05 --no-static --out peers.json

    TMPDIR=/dev/shm python -m benchmarks.peers --model llava-v1.6-mistral-7b --dtype bfloat16
    --context 8192 --batch 4
    """
    command.check_out(out, force=force)
    with command.bad_input():
        command.check_known("model", [model], MODELS)
        command.check_known("dtype", [dtype], BOUNDS)
        VLCache(budget)
        plan = Plan(model, context, batch, dtype, budget, new_tokens, repeats, static, limit)
        make_prompt(plan.config, context)
    # A waiting OpenMP thread spins: beside other work PyTorch loses many times what XLA loses.
    load = os.getloadavg()
    with command.counting_bar() as bar:
        task = bar.add_task("taking turns, behind compiling", total=plan.steps)
        try:
            found = compare(plan, step=lambda: bar.advance(task))
        except (Differs, PeerError) as error:
            Console(stderr=True).print(f"Error: {error}", style="red", markup=False)
            raise typer.Exit(1) from None
    device = found["about"]["ours"].pop("device")
    result = {**environment(), **device, "load_average_before": load, **found}
    command.finish(result, peers_part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
