"""The command line: the commands of `vlcache`, and those of other packages.

Input is checked before the parameters are read. Heavy imports stand inside the commands, so that
`--help` is quick.
"""

import os
import sys
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from vlcache_jax.cache.methods import DEFAULT_METHOD
from vlcache_jax.cli import options
from vlcache_jax.cli.chatting import chat
from vlcache_jax.cli.evaluating import evaluate
from vlcache_jax.cli.serving import serve
from vlcache_jax.cli.several import several
from vlcache_jax.cli.terminal import (
    BAD_INPUT,
    ERRORS,
    cache_methods,
    drain,
    find_question,
    find_questions,
    open_model,
    print_result,
    progress_line,
    read_context,
    read_messages,
    read_params,
    stop_texts,
    user_errors,
)
from vlcache_jax.errors import reason

app = typer.Typer(
    name="vlcache",
    help="Run vision-language models and text decoders in JAX with a compressed key/value cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    compilation_cache: Annotated[
        bool, typer.Option(help="Keep compiled programs in the user's cache folder.")
    ] = True,
) -> None:
    from vlcache_jax.running.programs import keep_programs

    if compilation_cache:
        keep_programs()


@app.command()
@several
def generate(
    model: options.Model,
    prompt: options.Prompt = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help='A conversation in place of --prompt: [{"role": "user", "content": "..."}, ...]. '
            'The roles are system, user and assistant; a content may be a list of {"type": "text", '
            '"text": "..."}, {"type": "image"} and {"type": "video"}.',
        ),
    ] = None,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    context: options.Context = None,
    max_new_tokens: options.MaxNewTokens = 128,
    stop: options.Stop = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    method: options.Method = DEFAULT_METHOD,
    kv_budget: options.KvBudget = None,
    kv_bits: options.KvBits = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="Write what was kept, and why, layer by layer, to this file."
        ),
    ] = None,
    force: options.Force = False,
    raw_prompt: options.RawPrompt = False,
    prefill_chunk: options.PrefillChunk = None,
    as_json: options.AsJson = False,
) -> None:
    """Answer a question about images, videos or a text, or a question alone.

    A tenth of the prompt's cache is kept, chosen for this question.

    Another method or budget: --method, --kv-budget. The whole cache: --method full.

    Fewer bytes for each token that is kept: --kv-bits akvq.

    Example: vlcache generate demo --image demo --kv-budget 0.2

    Example: vlcache generate MODEL --context paper.txt --prompt "What is measured?"
    """
    from vlcache_jax.files import check_file
    from vlcache_jax.results import display
    from vlcache_jax.results.answer import versions

    with user_errors():
        [cache] = cache_methods([method], [kv_budget], [kv_bits])
        if trace is not None:
            check_file(trace, "trace file", force=force)
        if messages is not None and prompt is not None:
            raise ValueError("give --prompt or --messages, not both")
        turns = None if messages is None else read_messages(messages)
        images, question, right = find_question(image, prompt if turns is None else "", video)
        document = read_context(context)
        vlm, progress = open_model(model, revision, dtype, backend, cache=cache, mesh=mesh)
        stream = vlm.stream(
            images,
            question,
            messages=turns,
            videos=video,
            frames=frames,
            context=document,
            stop=stop_texts(stop),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            raw_prompt=raw_prompt,
            cache=cache,
            trace=trace is not None,
            prefill_chunk=prefill_chunk,
        )
        read_params(vlm, progress)
    answer = drain(stream, echo=not as_json)
    if trace is not None and answer.trace is not None:
        with user_errors():
            answer.trace.save(trace, force=force)
    facts = display.answer_facts(answer) | {"model": model, "versions": versions()}
    asked = {} if right is None else {"question": question, "right answer": right}
    rows = asked | display.prompt_rows(facts) | display.answer_rows(facts)
    print_result(facts, display.two_columns(rows), as_json)


@app.command()
def compare(
    model: options.Model,
    prompt: options.Prompt = None,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    context: options.Context = None,
    max_new_tokens: options.MaxNewTokens = 128,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    method: options.Methods = None,
    kv_budget: options.KvBudgets = None,
    kv_bits: options.KvBitsList = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    raw_prompt: options.RawPrompt = False,
    as_json: options.AsJson = False,
) -> None:
    """Answer a question with the full cache and with compressed ones, side by side.

    Shows whether the answers are the same, and what each cache takes.

    Every method is run with every budget and every --kv-bits. Each token is the most likely one,
    never a draw.

    Example: vlcache compare demo --image demo:2 --kv-budget 0.1 --kv-bits 16 --kv-bits akvq
    """
    from vlcache_jax.cache.methods import FullCache
    from vlcache_jax.results import display
    from vlcache_jax.results.answer import versions

    with user_errors():
        named = cache_methods(method or list(options.COMPARED), kv_budget, kv_bits)
        images, question, right = find_question(image, prompt, video)
        document = read_context(context)
        vlm, progress = open_model(model, revision, dtype, backend, mesh=mesh)
        streams = [
            vlm.stream(
                images,
                question,
                videos=video,
                frames=frames,
                context=document,
                max_new_tokens=max_new_tokens,
                raw_prompt=raw_prompt,
                cache=cache,
            )
            for cache in dict.fromkeys([FullCache(), *named])
        ]
        read_params(vlm, progress)
    answers = [drain(stream, echo=False) for stream in streams]
    facts = display.comparison(question, right, answers) | {"model": model, "versions": versions()}
    print_result(facts, display.comparison_tables(facts), as_json)


@app.command()
def info(
    model: options.Model,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt tokens of a sequence; 4096, or what fits, by default."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    method: options.Method = DEFAULT_METHOD,
    kv_budget: options.KvBudget = None,
    kv_bits: options.KvBits = None,
    as_json: options.AsJson = False,
) -> None:
    """Show a model's size, its cache per token, its buckets, and the memory that it needs.

    Of the demo it also shows the pictures, with their questions and answers. Reads the
    configuration only, never the weights.

    Example: vlcache info demo --method full --kv-bits akvq --batch 8
    """
    from vlcache_jax.loading import describe
    from vlcache_jax.results.display import info_tables

    with user_errors():
        [cache] = cache_methods([method], [kv_budget], [kv_bits])
        facts = describe(
            model,
            dtype,
            context=context,
            batch=batch,
            new_tokens=new_tokens,
            cache=cache,
            revision=revision,
        )
    print_result(facts, info_tables(facts), as_json)


@app.command()
def calibrate(
    model: options.Model,
    image: options.Image = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The question to each image and then to each video, in their order, or one for "
            "all of them. Without it demo pictures have their own."
        ),
    ] = None,
    video: options.Video = None,
    frames: options.Frames = None,
    threshold: Annotated[
        float, typer.Option(help="Text share above which a layer is text-salient.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Where to write; by default kv_layers.json beside the model's weights.",
        ),
    ] = None,
    force: options.Force = False,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    raw_prompt: options.RawPrompt = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the layers that attend to text, for --kv-bits akvq.

    Reads a few pictures or videos with questions, and measures how much of each layer's attention
    goes to text. AKVQ gives text more bits in layers where most does. The result is written beside
    the weights, where every later run finds it; without one, the layers are those that the paper
    found for Llama (the first two) and Mistral (none).

    Example: vlcache calibrate MODEL --image a.png --prompt "..." --image b.png --prompt "..."
    """
    from vlcache_jax import calibration
    from vlcache_jax.files import check_file
    from vlcache_jax.results import display

    with user_errors():
        file = check_file(out or calibration.file_beside(model), "calibration file", force=force)
        images, videos, texts = find_questions(image or [], video or [], prompt or [])
        vlm, progress = open_model(model, revision, dtype, backend)
        show = partial(progress_line(progress, "reading"), "prompts")
        with progress:
            found = calibration.calibrate(
                vlm,
                images,
                texts,
                videos=videos,
                frames=frames,
                threshold=threshold,
                raw_prompt=raw_prompt,
                progress=show,
            )
        found.save(file, force=force)
    facts = asdict(found) | {"tsa_layers": found.tsa_layers, "file": str(file), "model": model}
    print_result(facts, display.calibration_table(facts), as_json, written=[file])


@app.command()
def inspect(
    model: options.Model,
    prompt: options.Prompt = None,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    context: options.Context = None,
    method: Annotated[
        str | None, typer.Option(help=f"{options.METHOD_HELP} {DEFAULT_METHOD} by default.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD,METHOD,...",
            help="Several methods at the same budget, a column each, in place of --method.",
        ),
    ] = None,
    kv_budget: options.KvBudget = None,
    kv_bits: options.KvBitsList = None,
    out: options.Report = None,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Draw the figures as PNG files into this folder (needs matplotlib)."
        ),
    ] = None,
    force: options.Force = False,
    max_new_tokens: options.MaxNewTokens = 64,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    raw_prompt: options.RawPrompt = False,
    as_json: options.AsJson = False,
) -> None:
    """See what the cache keeps: one page that needs no network, figures, or the numbers.

    The page shows each picture with the patches that survive, layer by layer, the prompt shaded in
    the same way, what each layer keeps and why, and the answers beside that of the full cache.

    Each token is the most likely one, never a draw.

    Example: vlcache inspect demo --image demo --out report.html

    Example: vlcache inspect demo --image demo:2 --compare vl-cache,h2o,snapkv --kv-budget 0.2
    --out report.html --png figures
    """
    from vlcache_jax.files import check_file
    from vlcache_jax.results import display, inspection
    from vlcache_jax.results.inspection import figures

    with user_errors((*BAD_INPUT, ModuleNotFoundError)):
        if out is None and png is None and not as_json:
            raise ValueError("name what to make: --out report.html, --png DIR or --json")
        names = [method or DEFAULT_METHOD]
        if compare is not None:
            if method is not None:
                raise ValueError("give --method for one method, or --compare for several, not both")
            names = [name.strip() for name in compare.split(",") if name.strip()]
            if not names:
                raise ValueError("--compare names no method: --compare vl-cache,h2o for instance")
        methods = cache_methods(names, [kv_budget], kv_bits)
        if out is not None:
            check_file(out, "report", force=force)
        if png is not None:
            figures.check_folder(png, force=force)
        images, question, right = find_question(image, prompt, video)
        document = read_context(context)
        vlm, progress = open_model(model, revision, dtype, backend)
        with progress:
            found = inspection.inspect(
                vlm,
                images,
                question,
                methods=methods,
                videos=video,
                frames=frames,
                context=document,
                right_answer=right,
                max_new_tokens=max_new_tokens,
                raw_prompt=raw_prompt,
                progress=progress_line(progress, "answering"),
            )
            progress.add_task("writing", total=None)
            written = []
            if out is not None:
                found.save(out, force=force)
                written.append(out)
            if png is not None:
                written += found.save_figures(png, force=force)
    print_result(found.as_json(), display.inspection_table(found), as_json, written)


app.command()(chat)
app.command()(serve)
app.command()(several(evaluate))


def main() -> None:
    """Entry point of the `vlcache` program.

    Commands of other packages (conversion) are found by their entry points: the library itself
    imports none of them. What stands beside this package comes before what stands in the working
    directory, which `python -m` puts first.
    """
    # transformers would say that torch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    here = str(Path(__file__).parents[2])
    sys.path.insert(0, here)
    for entry in metadata.entry_points(group="vlcache.commands"):
        try:
            app.command(entry.name)(entry.load())
        except Exception as error:  # any code may stand there
            text = f"warning: the command {entry.name} of {entry.value} is left out"
            ERRORS.print(f"{text}: {reason(error)}", style="yellow", markup=False, soft_wrap=True)
    sys.path.remove(here)
    app()
