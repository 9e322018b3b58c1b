"""The command: `python -m benchmarks.fidelity`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import command
from benchmarks.accuracy import options
from benchmarks.environment import environment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BUDGETS = {
    "methods": "0.02,0.05,0.1,0.2,0.4",
    "ablation": "0.1",
    "layers": "0.1",
    "candidates": "0.05,0.1,0.2",
}


@app.command()
def main(
    part: Annotated[
        str,
        typer.Option(
            help="methods: all of them by budget; ablation: scores by divisions over the layers; "
            "layers: one layer compressed at a time; candidates: what the recommended method is "
            "chosen among, with --split tune."
        ),
    ] = "methods",
    model: Annotated[
        str | None,
        typer.Option(help="A text decoder; the one that `make testbed` installs by default."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text in each prompt.")] = 2000,
    n: Annotated[int, typer.Option(min=1, help="Prompts.")] = 96,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Shares of the cache; 0.02,0.05,0.1,0.2,0.4 of methods, "
            "0.1 of the others by default.",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="tune or report: by document. Choose on the one, report the other.")
    ] = "report",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 33,
    minutes: Annotated[
        float | None, typer.Option(help="Stop behind the first prompt that ends after this.")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Where each result is kept as it comes, so that a run goes on where it "
            "was cut off; in the user's cache folder by default."
        ),
    ] = None,
    as_json: command.AsJson = False,
    out: command.Out = None,
    force: command.Force = False,
) -> None:
    """Measure how far each method's predictions are from the full cache's, on prose.

    Real text, a question about it, the full cache's greedy answer; each setting is fed the same
    tokens. KL in nats per token, and how many tokens' likeliest is the same, with 95 % intervals
    over documents.

    Example: python -m benchmarks.fidelity --n 4 --budgets 0.1

    Example: python -m benchmarks.fidelity --part layers --n 32
    """
    command.check_out(out, force=force)
    import vlcache_jax
    from benchmarks.accuracy.budgets import architecture
    from benchmarks.fidelity import prose, report, run
    from benchmarks.fidelity.settings import PARTS
    from vlcache_jax.checkpoints.changed import SMOLLM2
    from vlcache_jax.files import cache_folder
    from vlcache_jax.running.programs import keep_programs

    errors, began = Console(stderr=True, highlight=False), time.perf_counter()
    with command.bad_input():
        command.check_known("part", [part], PARTS)
        shares = options.shares(budgets or BUDGETS[part])
        vlm = vlcache_jax.load(model or SMOLLM2.file(), lazy=True)
        passages = prose.passages(vlm.processor.tokenizer, tokens, n, split)
        cells = PARTS[part](shares, vlm.config.text.num_layers)
        first = passages[0]
        vlm.request(None, first.question, context=first.context, max_new_tokens=max_new_tokens)
    keep_programs()
    with errors.status("loading ..."), command.bad_input():
        shape = architecture(vlm)
        methods = {run.name_of(cell): method for cell, method in cells.items()}
        replays = run.Prose(vlm, methods, max_new_tokens)
        identity = {"model": shape["sha256"], "max_new_tokens": max_new_tokens}
        log = log or cache_folder() / f"fidelity-{part}-{shape['sha256'][:8]}.jsonl"
        kept = run.Log(log, identity)

    with command.counting_bar(errors) as bar:
        task = bar.add_task("prompts", total=len(passages))
        for passage in passages:
            run.measure(replays, passage, kept)
            bar.advance(task)
            if minutes is not None and time.perf_counter() - began > 60 * minutes:
                break
    there = [p for p in passages if len(kept.of(run.key_of(p))) >= len(methods)]
    if len(there) < len(passages):
        errors.print(f"{len(there)} of {len(passages)} prompts so far: run it again to go on")
        raise typer.Exit(1)
    result = {
        **environment(),
        "model": "SmolLM2-135M-Instruct" if model is None else model,
        "architecture": shape,
        "part": part,
        "tokens": tokens,
        "n": n,
        "split": split,
        "budgets": list(map(str, shares)),
        "max_new_tokens": max_new_tokens,
        "documents": len({passage.document for passage in passages}),
        "prompts": prose.facts(passages),
        "details": run.details(cells, passages, kept),
    }
    command.finish(result, report.tables(result), as_json=as_json, out=out)


if __name__ == "__main__":
    app()
