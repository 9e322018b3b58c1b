"""`vlcache inspect`: see what the cache keeps of pictures and of the prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vlcache_jax.cli.options import (
    METHOD_HELP,
    AsJson,
    Backend,
    Dtype,
    Image,
    KvBitsList,
    KvBudget,
    Model,
    Prompt,
    RawPrompt,
    Revision,
)
from vlcache_jax.cli.terminal import BAD_INPUT, ERRORS, find_question, print_json, user_errors

if TYPE_CHECKING:
    from vlcache_jax.cache.method import CacheMethod
    from vlcache_jax.inspection import Inspection


def inspect(
    model: Model,
    prompt: Prompt = None,
    image: Image = None,
    method: Annotated[
        str | None, typer.Option(help=f"{METHOD_HELP} vl-cache by default.", show_default=False)
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD,METHOD,...",
            help="Several methods at the same budget, a column each, in place of --method.",
            show_default=False,
        ),
    ] = None,
    kv_budget: KvBudget = None,
    kv_bits: KvBitsList = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="The page to write, or with a name in .json the numbers.",
            show_default=False,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Draw the figures as PNG files into this folder (needs matplotlib).",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    revision: Revision = None,
    dtype: Dtype = None,
    backend: Backend = None,
    raw_prompt: RawPrompt = False,
    as_json: AsJson = False,
) -> None:
    """See what the cache keeps: one page that needs no network, figures, or the numbers.

    The page shows each picture with the patches that survive, layer by layer, the prompt shaded in
    the same way, what each layer keeps and why, and the answers beside that of the full cache.

    Each token is the most likely one, never a draw.

    Example: vlcache inspect demo --image demo --out report.html

    Example: vlcache inspect demo --image demo:2 --compare vl-cache,h2o,snapkv --kv-budget 0.2
    --out report.html --png figures
    """
    with user_errors((*BAD_INPUT, ModuleNotFoundError)):
        if out is None and png is None and not as_json:
            raise ValueError("name what to make: --out report.html, --png DIR or --json")
        methods = _methods(method, compare, kv_budget, kv_bits or [None])
        from vlcache_jax.inspection import figures, files

        if out is not None:
            files.check_report(out, force=force)
        if png is not None:
            figures.check_folder(png, force=force)
        asked, question, _ = find_question(image or [], prompt)
        written: list[Path] = []
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=ERRORS,
            transient=True,
            disable=not ERRORS.is_terminal,
        )
        task = progress.add_task("checking", total=None, amount="")

        def reading(piece: str, done: int, total: int) -> None:
            amount = f"{human_bytes(done)} of {human_bytes(total)}"
            progress.update(
                task, description=f"reading {piece}", completed=done, total=total, amount=amount
            )

        def answering(label: str, done: int, total: int) -> None:
            amount = f"{done + 1} of {total}"
            progress.update(
                task, description=f"answering, {label}", completed=done, total=total, amount=amount
            )

        with progress:
            from vlcache_jax.inspection import inspect as run
            from vlcache_jax.loading import load
            from vlcache_jax.report import human_bytes

            vlm = load(
                model, dtype, backend=backend, revision=revision, lazy=True, progress=reading
            )
            found = run(
                vlm,
                list(asked),
                question,
                methods=methods,
                max_new_tokens=max_new_tokens,
                raw_prompt=raw_prompt,
                progress=answering,
            )
            progress.update(task, description="writing", total=None, amount="")
            if out is not None:
                found.save(out, force=force)
                written.append(out)
            if png is not None:
                written += found.save_figures(png, force=force)
    if as_json:
        print_json(found.as_json())
        return
    console = Console()
    console.print(_table(found))
    for file in written:
        console.print(f"written to {file}", markup=False, highlight=False, soft_wrap=True)


def _methods(
    method: str | None, compare: str | None, budget: str | None, bits: Sequence[str | None]
) -> "list[CacheMethod]":
    """The methods of the columns, each of them once."""
    from vlcache_jax.cache.methods import make_method
    from vlcache_jax.cache.quantizers import make_quantizer

    if compare is None:
        names = [method or "vl-cache"]
    elif method is not None:
        raise ValueError("give --method for one method, or --compare for several, not both")
    else:
        names = [name.strip() for name in compare.split(",") if name.strip()]
        if not names:
            raise ValueError("--compare names no method: --compare vl-cache,h2o for instance")
    made = [make_method(name, budget, make_quantizer(b)) for name in names for b in bits]
    return list(dict.fromkeys(made))


def _table(found: "Inspection") -> Table:
    """The answers, and what was kept for them."""
    table = Table("", "answer", "as the full cache", "cache kept", "CacheHitRate")
    for outcome in (found.full, *found.outcomes):
        at = outcome.first_difference
        table.add_row(
            Text(outcome.label),
            Text(outcome.text or "(nothing)"),
            "yes" if at is None else f"no, from token {at + 1} on",
            f"{outcome.cache.kept_share:.1%}",
            f"{outcome.trace.hit_rate.mean():.1%}",
        )
    return table
