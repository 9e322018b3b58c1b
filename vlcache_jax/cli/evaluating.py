"""The command `vlcache evaluate`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlcache_jax import demo
from vlcache_jax.cli import options
from vlcache_jax.cli.terminal import (
    cache_methods,
    find_question,
    open_model,
    print_result,
    progress_line,
    read_context,
    user_errors,
)

BUDGETS = ("0.05", "0.1", "0.2", "0.4")
"""What is tried where --kv-budget is not given."""

BUDGETS_OF = {"full": ("1",)}
"""Of methods that have no others."""


def evaluate(
    model: options.Model,
    requests: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='A request on each line: {"images": ["a.png"], "context": "...", "text": "..."}, '
            'or "videos": ["a.mp4"] with "frames": 8; all but the text may be left out. Images are '
            "named as --image does, or from the file's folder on, as videos are. 'demo' and "
            "'demo-small' stand for the pictures in this package, with their own questions.",
        ),
    ] = None,
    prompt: options.Prompt = None,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    context: options.Context = None,
    method: options.Methods = None,
    kv_budget: Annotated[
        list[str] | None,
        typer.Option(
            "--kv-budget",
            help="How much of the cache is kept: a share such as 0.1, or tokens per layer such as "
            f"256tok. {options.EACH}; {', '.join(BUDGETS)} by default.",
        ),
    ] = None,
    kv_bits: options.KvBitsList = None,
    max_new_tokens: options.MaxNewTokens = 64,
    tolerance: Annotated[
        float,
        typer.Option(help="Share of the tokens that have to be the full cache's, from 0 to 1."),
    ] = 0.95,
    out: options.Report = None,
    force: options.Force = False,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    raw_prompt: options.RawPrompt = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the budget that is safe for a model on your own requests. No right answers are needed.

    Each request is answered by the full cache. Every method, with every budget and every --kv-bits,
    is then fed that answer, and its prediction of each token is compared with the full cache's: KL
    in nats, and whether the likeliest token is the same. The smallest budget of a method is named
    whose share of same tokens lies above the tolerance with its whole 95 % interval.

    Example: vlcache evaluate demo --requests demo --method vl-cache --method snapkv

    Example: vlcache evaluate MODEL --requests mine.jsonl --kv-budget 0.1 --kv-budget 0.2
    --out report.html
    """
    from vlcache_jax import evaluation
    from vlcache_jax.files import check_file
    from vlcache_jax.results import display

    with user_errors():
        methods = [
            each
            for name in dict.fromkeys(method or list(options.COMPARED))
            for each in cache_methods([name], kv_budget or BUDGETS_OF.get(name, BUDGETS), kv_bits)
        ]
        if out is not None:
            check_file(out, "report", force=force)
        if requests is None:
            images, question, _ = find_question(image, prompt, video)
            own = {"images": images, "videos": video, "frames": frames, "text": question}
            names, asked = None, [own | {"context": read_context(context)}]
        elif image or video or frames or context or prompt is not None:
            raise ValueError(
                "give --requests, or one request by --image, --video, --context and --prompt"
            )
        else:
            names, asked = read_requests(requests)
        vlm, progress = open_model(model, revision, dtype, backend, mesh=mesh)
        with progress:
            found = evaluation.evaluate(
                vlm,
                asked,
                methods,
                max_new_tokens=max_new_tokens,
                tolerance=tolerance,
                raw_prompt=raw_prompt,
                names=names,
                progress=progress_line(progress, "evaluating"),
            )
        if out is not None:
            found.save(out, force=force)
    written = [] if out is None else [out]
    print_result(found.as_json(), display.evaluation_tables(found), as_json, written)


def read_requests(file: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The requests that a file has line by line, and what each is called: by its line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object of the fields that there are, or there is none.
    """
    from vlcache_jax.evaluation import check_fields

    if file in demo.MODELS:
        pictures = demo.pictures(file)
        asked = [{"images": [p.file], "text": p.prompt} for p in pictures]
        return [picture.name for picture in pictures], asked
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: write it as JSON lines") from None
    names, found = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        names.append(f"{path.name}, line {number}")
        try:
            request = json.loads(line)
            check_fields(request)
            found.append(_located(request, path.parent))
        except json.JSONDecodeError as error:
            at = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{names[-1]} is no JSON: {at}") from None
        except ValueError as error:
            raise ValueError(f"{names[-1]}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no request: write one on each line, as JSON")
    return names, found


def _located(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A request with the files of its images, and a demo picture's own question if it has none."""
    images = _names(request.get("images"), "images")
    own = [name.partition(":")[0] in demo.MODELS for name in images]
    given = [name if ours else str(folder / name) for name, ours in zip(images, own, strict=True)]
    videos = [folder / name for name in _names(request.get("videos"), "videos")]
    if request.get("text") is None and (own != [True] or videos):
        raise ValueError("text is missing: what is asked")
    files, text, _ = find_question(given, request.get("text"))
    shown = {"videos": videos} if videos else {}
    return request | {"images": files, "text": text} | shown


def _names(given: Any, field: str) -> list[str]:
    """The files that a field of a request names."""
    names = [given] if isinstance(given, str) else given or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field} must be a list of file names")
    return names
