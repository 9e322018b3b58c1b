"""The command line: `vlcache generate`, `vlcache info`, and commands of other packages.

What answers go to stdout; progress and errors go to stderr. Input is checked before the
parameters are read. Heavy imports stand inside the commands, so that `--help` is quick.
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vlcache_jax.vlm import VLM, Answer, Stream

app = typer.Typer(
    name="vlcache",
    help="Run LLaVA-style vision-language models in JAX with a compressed key/value cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_errors = Console(stderr=True, highlight=False)

Model = Annotated[
    str,
    typer.Argument(
        help="A model directory (Hugging Face format or converted), a hub id such as "
        "llava-hf/llava-v1.6-mistral-7b-hf, or 'demo' for the tiny model in this package."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default."),
]
Method = Annotated[
    str,
    typer.Option(
        help="What the cache keeps of the prompt: vl-cache, h2o, snapkv, pyramidkv, "
        "streaming-llm, random, or full."
    ),
]
KvBudget = Annotated[
    str | None,
    typer.Option(
        help="How much of it: a share of the cache such as 0.1, or tokens per layer such as "
        "256tok. 0.1 by default.",
        show_default=False,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        envvar="VLCACHE_BACKEND",
        help="Attention kernels: triton, cudnn (the prefill only) or xla; by default the best for "
        "the device. On a CPU triton is interpreted, for tests, and slow.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.callback()
def _options(
    compilation_cache: Annotated[
        bool, typer.Option(help="Keep compiled programs in the user's cache folder.")
    ] = True,
) -> None:
    import jax

    if compilation_cache and not jax.config.values["jax_compilation_cache_dir"]:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(folder / "vlcache-jax" / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Option(help="The question. <image> marks say where images go; else they come first."),
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image file, or 'demo'. Give the option once for each image."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw among the tokens that reach this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    dtype: Dtype = None,
    method: Method = "vl-cache",
    kv_budget: KvBudget = None,
    backend: Backend = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Write what was kept, and why, layer by layer, to this file.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the trace file.")] = False,
    raw_prompt: Annotated[
        bool,
        typer.Option("--raw-prompt", help="Take the prompt as given, without the chat template."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about images, or a question alone.

    VL-Cache keeps a tenth of the prompt's cache, chosen for this question.

    Another method or budget: --method, --kv-budget. The whole cache: --method full.

    Example: vlcache generate demo --image demo --prompt "What is in the picture?" --kv-budget 0.2
    """
    from vlcache_jax.cache.methods import make_method
    from vlcache_jax.cache.trace import check_target

    with _user_errors():
        cache = make_method(method, kv_budget)
        if trace is not None:
            check_target(trace, force=force)
        images = [_image_path(name) for name in image or []]
        vlm, progress = _open(model, dtype, backend)
        stream = vlm.stream(
            images,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            raw_prompt=raw_prompt,
            cache=cache,
            trace=trace is not None,
        )
        with progress:
            vlm.params  # noqa: B018  reads them, with the progress bar shown
    answer = _drain(stream, echo=not as_json)
    if trace is not None and answer.trace is not None:
        with _user_errors():
            answer.trace.save(trace, force=force)
    if as_json:
        _print_json(_answer_json(answer, model))
    else:
        Console().print(_answer_table(answer))


@app.command()
def info(
    model: Model,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt tokens of a sequence; 4096, or what fits, by default."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    dtype: Dtype = None,
    method: Method = "vl-cache",
    kv_budget: KvBudget = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's size, its cache per token, its buckets, and the memory that it needs.

    Reads the configuration only, never the weights.
    """
    from vlcache_jax.cache.methods import make_method
    from vlcache_jax.loading import describe

    with _user_errors():
        cache = make_method(method, kv_budget)
        facts = describe(
            model, dtype, context=context, batch=batch, new_tokens=new_tokens, cache=cache
        )
    if as_json:
        _print_json(facts)
    else:
        _print_info(facts)


def main() -> None:
    """Entry point of the `vlcache` program.

    Commands of other packages (conversion) are found by their entry points: the library itself
    imports none of them.
    """
    for entry in metadata.entry_points(group="vlcache.commands"):
        app.command(entry.name)(entry.load())
    app()


_BAD_INPUT = ValueError, OSError, NotImplementedError


@contextmanager
def _user_errors(kinds: tuple[type[Exception], ...] = _BAD_INPUT) -> Iterator[None]:
    """Bad input ends the program with one line on stderr and exit code 2."""
    try:
        yield
    except kinds as error:
        text = f"error: {error or type(error).__name__}"
        _errors.print(text, style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _image_path(name: str) -> Path:
    from vlcache_jax.demo import IMAGE

    return IMAGE if name == "demo" and not Path(name).exists() else Path(name)


def _open(model: str, dtype: str | None, backend: str | None) -> tuple["VLM", Progress]:
    """The model with its parameters unread, and the bar that their reading moves."""
    from vlcache_jax.loading import load

    progress = Progress(
        TextColumn("reading {task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=_errors,
        transient=True,
    )
    task = progress.add_task("parameters", total=None)

    def show(piece: str, done: int, total: int) -> None:
        progress.update(task, description=piece, completed=done, total=total)

    return load(model, dtype, backend=backend, lazy=True, progress=show), progress


def _drain(stream: "Stream", echo: bool) -> "Answer":
    """Read the stream to its end; until its first piece a spinner says what takes so long."""
    # A backend that does not support the model says so when the program is made.
    unsupported = _user_errors((NotImplementedError,))
    with unsupported, _errors.status("compiling, and reading the prompt ..."):
        first = next(stream, "")
    for piece in chain([first], stream):
        if echo:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if echo:
        sys.stdout.write("\n")
    return stream.answer


def _answer_json(answer: "Answer", model: str) -> dict[str, Any]:
    timings = answer.timings
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "timings": {
            "compile_s": timings.compile_s,
            "prefill_s": timings.prefill_s,
            "decode_s": timings.decode_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
        "kv": dataclasses.asdict(answer.cache),
        "model": model,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("vlcache-jax", "jax", "jaxlib", "flax", "transformers")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def _answer_table(answer: "Answer") -> Table:
    from vlcache_jax.report import human_bytes

    cache, timings = answer.cache, answer.timings
    visual, speed = answer.visual_tokens, timings.decode_tokens_per_s
    rows = {
        "prompt tokens": f"{answer.prompt_tokens} "
        f"(visual {visual}, text {answer.prompt_tokens - visual})",
        "time to first token": f"{timings.prefill_s:.3f} s",
        "decode": "-" if speed is None else f"{speed:.1f} tokens/s",
        "method": f"{cache.method}, budget {cache.budget_requested}",
        "cache": f"{human_bytes(cache.kept_bytes)} of {human_bytes(cache.full_bytes)} "
        f"({cache.kept_share:.1%}), allocated {human_bytes(cache.allocated_bytes)}, "
        f"new tokens {human_bytes(cache.tail_bytes)}",
        "kept per layer": f"{min(cache.layer_budgets)} to {max(cache.layer_budgets)} tokens, "
        f"mean {cache.kept_visual:.1f} visual, {cache.kept_text:.1f} text",
        "compilation, apart": f"{timings.compile_s:.1f} s",
    }
    return _two_columns(rows)


def _print_info(facts: dict[str, Any]) -> None:
    from vlcache_jax.report import human_bytes

    console = Console()
    parts = facts["parameters"]
    need = facts["memory"]
    rows = {
        "model": f"{facts['model']} ({facts['family']}, {facts['dtype']})",
        "parameters": f"{parts['total']:,} "
        f"({', '.join(f'{name} {n:,}' for name, n in parts.items() if name != 'total')})",
        "cache per token": human_bytes(facts["kv_bytes_per_token"]),
        "positions": f"{facts['max_positions']:,}",
        "visual tokens of a tile": f"{facts['tile_tokens']:,}",
    }
    console.print(_two_columns(rows))
    console.print(
        f"\nMemory for {need['context']} prompt tokens (bucket {need['bucket']}), batch "
        f"{need['batch']}, {need['new_tokens']} new tokens, method {need['method']}, budget "
        f"{need['budget_requested']}:"
    )
    names = ("parameters", "pool", "prefill", "tail", "activations", "total")
    console.print(_two_columns({name: human_bytes(need[name]) for name in names}))
    console.print("\nBuckets that shapes are padded to, with the mean share of padding of each:")
    notes = {"prompt": "prompt tokens", "tiles": "image tiles"}
    sizes = {
        note: ", ".join(f"{b['size']} ({b['padding']:.0%})" for b in facts["buckets"][name])
        for name, note in notes.items()
    }
    console.print(_two_columns(sizes))


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
