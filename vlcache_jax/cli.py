"""The command line: `vlcache generate`, `compare`, `info`, `calibrate`, and others' commands.

What answers go to stdout; progress and errors go to stderr. Input is checked before the
parameters are read. Heavy imports stand inside the commands, so that `--help` is quick.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from vlcache_jax.vlm import VLM, Answer, Stream

app = typer.Typer(
    name="vlcache",
    help="Run LLaVA-style vision-language models in JAX with a compressed key/value cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_errors = Console(stderr=True, highlight=False, emoji=False)  # "demo:x:" stays as it is

Model = Annotated[
    str,
    typer.Argument(
        help="A model directory (Hugging Face format or converted), a hub id such as "
        "llava-hf/llava-v1.6-mistral-7b-hf, or 'demo' for the tiny model in this package."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help="The question. <image> marks say where images go; else they come first. Without it a "
        "demo picture's own question is asked.",
        show_default=False,
    ),
]
Image = Annotated[
    list[str] | None,
    typer.Option(
        help="An image file, or one of the pictures in this package: 'demo' or demo:1, demo:2, ... "
        "('vlcache info demo' lists them). Give the option once for each image.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of the answer.")]
RawPrompt = Annotated[
    bool,
    typer.Option("--raw-prompt", help="Take the prompt as given, without the chat template."),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default."),
]
METHOD_HELP = (
    "What the cache keeps of the prompt: vl-cache, h2o, snapkv, pyramidkv, streaming-llm, random, "
    "or full."
)
BUDGET_HELP = (
    "How much of it: a share of the cache such as 0.1, or tokens per layer such as 256tok. 0.1 by "
    "default."
)
Method = Annotated[str, typer.Option(help=METHOD_HELP)]
Methods = Annotated[
    list[str] | None,
    typer.Option(help=f"{METHOD_HELP} Give the option once for each; vl-cache by default."),
]
KvBudget = Annotated[str | None, typer.Option(help=BUDGET_HELP, show_default=False)]
KvBudgets = Annotated[
    list[str] | None, typer.Option(help=f"{BUDGET_HELP} Give the option once for each.")
]
BITS_HELP = (
    "Quantise what is kept: 2, 4 or 8 bits for every token; akvq, which gives 16 or 4 bits to the "
    "tokens that matter most and 2 to the others; kivi, 2 bits with keys by channel. 16, the "
    "default, leaves it as it is. With --method full everything is kept, quantised."
)
KvBits = Annotated[str | None, typer.Option(help=BITS_HELP, show_default=False)]
KvBitsList = Annotated[
    list[str] | None,
    typer.Option("--kv-bits", help=f"{BITS_HELP} Give the option once for each."),
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
    from vlcache_jax.programs import keep_programs

    if compilation_cache:
        keep_programs()


@app.command()
def generate(
    model: Model,
    prompt: Prompt = None,
    image: Image = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw among the tokens that reach this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    dtype: Dtype = None,
    method: Method = "vl-cache",
    kv_budget: KvBudget = None,
    kv_bits: KvBits = None,
    backend: Backend = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Write what was kept, and why, layer by layer, to this file.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the trace file.")] = False,
    raw_prompt: RawPrompt = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question about images, or a question alone.

    VL-Cache keeps a tenth of the prompt's cache, chosen for this question.

    Another method or budget: --method, --kv-budget. The whole cache: --method full.

    Fewer bytes for each token that is kept: --kv-bits akvq.

    Example: vlcache generate demo --image demo --kv-budget 0.2
    """
    from vlcache_jax import display
    from vlcache_jax.cache.methods import make_method
    from vlcache_jax.cache.quantizers import make_quantizer
    from vlcache_jax.cache.trace import check_target

    with _user_errors():
        cache = make_method(method, kv_budget, make_quantizer(kv_bits))
        if trace is not None:
            check_target(trace, force=force)
        images, question, right = _question(image or [], prompt)
        vlm, progress = _open(model, dtype, backend, transform=cache.transforms)
        stream = vlm.stream(
            images,
            question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            raw_prompt=raw_prompt,
            cache=cache,
            trace=trace is not None,
        )
        _read(vlm, progress)
    answer = _drain(stream, echo=not as_json)
    if trace is not None and answer.trace is not None:
        with _user_errors():
            answer.trace.save(trace, force=force)
    facts = display.answer_facts(answer)
    if as_json:
        _print_json({**facts, "model": model, "versions": display.versions()})
    else:
        rows = display.question_rows(question, right) | display.prompt_rows(facts)
        Console().print(display.two_columns(rows | display.answer_rows(facts)))


@app.command()
def compare(
    model: Model,
    prompt: Prompt = None,
    image: Image = None,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Dtype = None,
    method: Methods = None,
    kv_budget: KvBudgets = None,
    kv_bits: KvBitsList = None,
    backend: Backend = None,
    raw_prompt: RawPrompt = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question with the full cache and with compressed ones, side by side.

    Shows whether the answers are the same, and what each cache takes.

    Every method is run with every budget and every --kv-bits. Each token is the most likely one,
    never a draw.

    Example: vlcache compare demo --image demo:2 --kv-budget 0.1 --kv-bits 16 --kv-bits akvq
    """
    from vlcache_jax import display
    from vlcache_jax.cache.methods import FullCache, make_method
    from vlcache_jax.cache.quantizers import make_quantizer

    with _user_errors():
        named = [
            make_method(name, budget, make_quantizer(bits))
            for name in method or ["vl-cache"]
            for budget in kv_budget or [None]
            for bits in kv_bits or [None]
        ]
        images, question, right = _question(image or [], prompt)
        vlm, progress = _open(model, dtype, backend)
        streams = [
            vlm.stream(
                images,
                question,
                max_new_tokens=max_new_tokens,
                raw_prompt=raw_prompt,
                cache=cache,
            )
            for cache in dict.fromkeys([FullCache(), *named])
        ]
        _read(vlm, progress)
    answers = [_drain(stream, echo=False) for stream in streams]
    facts = display.comparison(question, right, answers)
    if as_json:
        _print_json({**facts, "model": model, "versions": display.versions()})
    else:
        Console().print(display.comparison_tables(facts))


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
    kv_bits: KvBits = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's size, its cache per token, its buckets, and the memory that it needs.

    Of the demo it also shows the pictures, with their questions and answers. Reads the
    configuration only, never the weights.

    Example: vlcache info demo --method full --kv-bits akvq --batch 8
    """
    from vlcache_jax.cache.methods import make_method
    from vlcache_jax.cache.quantizers import make_quantizer
    from vlcache_jax.display import info_tables
    from vlcache_jax.loading import describe

    with _user_errors():
        cache = make_method(method, kv_budget, make_quantizer(kv_bits))
        facts = describe(
            model, dtype, context=context, batch=batch, new_tokens=new_tokens, cache=cache
        )
    if as_json:
        _print_json(facts)
    else:
        Console().print(info_tables(facts))


@app.command()
def calibrate(
    model: Model,
    image: Image = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The question to each image, in their order, or one for all of them. Without it "
            "demo pictures have their own.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Text share above which a layer is text-salient.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Where to write; by default kv_layers.json beside the model's weights.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    dtype: Dtype = None,
    backend: Backend = None,
    raw_prompt: RawPrompt = False,
    as_json: AsJson = False,
) -> None:
    """Find the layers that attend to text, for --kv-bits akvq.

    Reads a few pictures with questions, and measures how much of each layer's attention goes to
    text. AKVQ gives text more bits in layers where most does. The result is written beside the
    weights, where every later run finds it; without one, the layers are those that the paper found
    for Llama (the first two) and Mistral (none).

    Example: vlcache calibrate MODEL --image a.png --prompt "..." --image b.png --prompt "..."
    """
    from vlcache_jax import calibration, display

    with _user_errors():
        file = calibration.check_file(out or calibration.file_beside(model), force=force)
        asked = _questions(image or [], prompt or [])
        vlm, progress = _open(model, dtype, backend)
        task = progress.add_task("prompts", total=len(asked), amount="")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, amount=f"{done} of {total}")

        with progress:
            images, texts = [files for files, _ in asked], [text for _, text in asked]
            found = calibration.calibrate(
                vlm, images, texts, threshold=threshold, raw_prompt=raw_prompt, progress=show
            )
        found.save(file, force=force)
    facts = display.calibration_facts(found)
    if as_json:
        _print_json({**facts, "file": str(file), "model": model})
    else:
        Console().print(display.calibration_table(facts))
        sys.stdout.write(f"written to {file}\n")


def main() -> None:
    """Entry point of the `vlcache` program.

    Commands of other packages (conversion) are found by their entry points: the library itself
    imports none of them.
    """
    for entry in metadata.entry_points(group="vlcache.commands"):
        app.command(entry.name)(entry.load())
    from vlcache_jax.cli_inspect import inspect  # here, for it imports this module

    app.command()(inspect)
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


def _question(images: list[str], prompt: str | None) -> tuple[list[Path], str, str | None]:
    """The images, the prompt, and its right answer where the prompt is a demo picture's own."""
    from vlcache_jax import demo

    shown = [demo.find(name) for name in images]
    files = [
        picture.file if picture else Path(name) for picture, name in zip(shown, images, strict=True)
    ]
    if prompt is not None:
        return files, prompt, None
    if len(shown) == 1 and shown[0]:
        return files, shown[0].prompt, shown[0].answer
    raise ValueError(
        "give a --prompt; only where the one --image is a demo picture is its own question asked"
    )


def _questions(images: list[str], prompts: list[str]) -> list[tuple[list[Path], str]]:
    """Each image with its question."""
    if not images:
        raise ValueError("give one --image or more, and a --prompt to each of them or to all")
    if len(prompts) not in (0, 1, len(images)):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts: give one --prompt for each --image, "
            "or one for all; demo pictures have questions of their own"
        )
    texts = prompts * len(images) if len(prompts) == 1 else prompts or [None] * len(images)
    return [_question([image], text)[:2] for image, text in zip(images, texts, strict=True)]


def _open(
    model: str, dtype: str | None, backend: str | None, *, transform: bool = False
) -> tuple["VLM", Progress]:
    """The model with its parameters unread, and the bar that their reading moves."""
    from vlcache_jax.loading import load
    from vlcache_jax.report import human_bytes

    progress = Progress(
        TextColumn("reading {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=_errors,
        transient=True,
        disable=not _errors.is_terminal,
    )
    task = progress.add_task("parameters", total=None, amount="")

    def show(piece: str, done: int, total: int) -> None:
        amount = f"{human_bytes(done)} of {human_bytes(total)}"
        progress.update(task, description=piece, completed=done, total=total, amount=amount)

    vlm = load(model, dtype, backend=backend, transform=transform, lazy=True, progress=show)
    return vlm, progress


def _read(vlm: "VLM", progress: Progress) -> None:
    """Read the parameters, with the bar shown."""
    with progress:
        _ = vlm.params  # read where they are first asked for


def _drain(stream: "Stream", echo: bool) -> "Answer":
    """Read the stream to its end; until its first piece a spinner says what takes so long."""
    # A backend that does not support the model says so when a program is made: of the prompt, or,
    # behind the first piece, of the decoding.
    with _user_errors((NotImplementedError,)):
        with _errors.status("compiling, and reading the prompt ..."):
            first = next(stream, "")
        for piece in chain([first], stream):
            if echo:
                sys.stdout.write(piece)
                sys.stdout.flush()
    if echo:
        sys.stdout.write("\n")
    return stream.answer


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
