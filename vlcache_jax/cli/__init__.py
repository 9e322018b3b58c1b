"""The command line: `vlcache generate`, `compare`, `info`, `calibrate`, and others' commands.

Input is checked before the parameters are read. Heavy imports stand inside the commands, so that
`--help` is quick.
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlcache_jax.cli.inspect import inspect
from vlcache_jax.cli.options import (
    AsJson,
    Backend,
    Dtype,
    Image,
    KvBits,
    KvBitsList,
    KvBudget,
    KvBudgets,
    MaxNewTokens,
    Method,
    Methods,
    Model,
    Prompt,
    RawPrompt,
    Revision,
)
from vlcache_jax.cli.terminal import (
    drain,
    find_question,
    find_questions,
    open_model,
    print_json,
    read_messages,
    read_params,
    user_errors,
)

app = typer.Typer(
    name="vlcache",
    help="Run LLaVA-style vision-language models in JAX with a compressed key/value cache.",
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
    from vlcache_jax.programs import keep_programs

    if compilation_cache:
        keep_programs()


@app.command()
def generate(
    model: Model,
    prompt: Prompt = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help='A conversation in place of --prompt: [{"role": "user", "content": "..."}, ...]. '
            'The roles are system, user and assistant; a content may be a list of {"type": "text", '
            '"text": "..."} and {"type": "image"}.',
            show_default=False,
        ),
    ] = None,
    image: Image = None,
    max_new_tokens: MaxNewTokens = 128,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End the answer in front of this text. Give the option once for each; \\n stands "
            "for a new line.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw among the tokens that reach this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    revision: Revision = None,
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

    with user_errors():
        cache = make_method(method, kv_budget, make_quantizer(kv_bits))
        if trace is not None:
            check_target(trace, force=force)
        if messages is not None and prompt is not None:
            raise ValueError("give --prompt or --messages, not both")
        turns = None if messages is None else read_messages(messages)
        images, question, right = find_question(image or [], prompt if turns is None else "")
        vlm, progress = open_model(model, revision, dtype, backend, transform=cache.transforms)
        stream = vlm.stream(
            images,
            question,
            messages=turns,
            stop=[text.replace("\\n", "\n") for text in stop or []],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            raw_prompt=raw_prompt,
            cache=cache,
            trace=trace is not None,
        )
        read_params(vlm, progress)
    answer = drain(stream, echo=not as_json)
    if trace is not None and answer.trace is not None:
        with user_errors():
            answer.trace.save(trace, force=force)
    facts = display.answer_facts(answer)
    if as_json:
        print_json({**facts, "model": model, "versions": display.versions()})
    else:
        rows = display.question_rows(question, right) | display.prompt_rows(facts)
        Console().print(display.two_columns(rows | display.answer_rows(facts)))


@app.command()
def compare(
    model: Model,
    prompt: Prompt = None,
    image: Image = None,
    max_new_tokens: MaxNewTokens = 128,
    revision: Revision = None,
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

    with user_errors():
        named = [
            make_method(name, budget, make_quantizer(bits))
            for name in method or ["vl-cache"]
            for budget in kv_budget or [None]
            for bits in kv_bits or [None]
        ]
        images, question, right = find_question(image or [], prompt)
        vlm, progress = open_model(model, revision, dtype, backend)
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
        read_params(vlm, progress)
    answers = [drain(stream, echo=False) for stream in streams]
    facts = display.comparison(question, right, answers)
    if as_json:
        print_json({**facts, "model": model, "versions": display.versions()})
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
    revision: Revision = None,
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

    with user_errors():
        cache = make_method(method, kv_budget, make_quantizer(kv_bits))
        facts = describe(
            model,
            dtype,
            context=context,
            batch=batch,
            new_tokens=new_tokens,
            cache=cache,
            revision=revision,
        )
    if as_json:
        print_json(facts)
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
    revision: Revision = None,
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

    with user_errors():
        file = calibration.check_file(out or calibration.file_beside(model), force=force)
        asked = find_questions(image or [], prompt or [])
        vlm, progress = open_model(model, revision, dtype, backend)
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
        print_json({**facts, "file": str(file), "model": model})
    else:
        Console().print(display.calibration_table(facts))
        sys.stdout.write(f"written to {file}\n")


app.command()(inspect)


def main() -> None:
    """Entry point of the `vlcache` program.

    Commands of other packages (conversion) are found by their entry points: the library itself
    imports none of them.
    """
    for entry in metadata.entry_points(group="vlcache.commands"):
        app.command(entry.name)(entry.load())
    app()
