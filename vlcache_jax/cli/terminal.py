"""What the commands share: their checks of the input, their progress, what they print.

What answers go to stdout; progress and errors go to stderr.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import Progress

from vlcache_jax.errors import reason, short

if TYPE_CHECKING:
    from vlcache_jax.cache.method import CacheMethod
    from vlcache_jax.results.answer import Answer
    from vlcache_jax.vlm import VLM, Stream

ERRORS = Console(stderr=True, highlight=False, emoji=False)  # "demo:x:" stays as it is

LONGEST = 390
"""Characters of an error or a warning."""

READING = "compiling, and reading the prompt ..."
"""What is done until an answer's first piece."""

BAD_INPUT = ValueError, OSError, NotImplementedError


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = BAD_INPUT) -> Iterator[None]:
    """Bad input ends the program with one line on stderr and exit code 2; so are warnings shown."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of damage that it can read over
            warnings.filterwarnings("always", module="vlcache_jax")
            warnings.showwarning = lambda message, *_: _line("warning", message, "yellow")
            yield
    except kinds as error:
        show_error(error)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def show_error(error: object) -> None:
    """One line on stderr about bad input."""
    _line("error", error, "red")


def _line(kind: str, message: object, style: str) -> None:
    """One line on stderr."""
    text = short(str(message) or type(message).__name__, LONGEST)
    ERRORS.print(f"{kind}: {text}", style=style, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """One line on stderr that is no fault."""
    ERRORS.print(text, style="dim", markup=False, soft_wrap=True)


def cache_methods(
    names: Sequence[str], budgets: Sequence[str | None] | None, bits: Sequence[str | None] | None
) -> "list[CacheMethod]":
    """Every method with every --kv-budget and every --kv-bits, each of them once."""
    from vlcache_jax.cache.methods import make_method
    from vlcache_jax.cache.quantizers import make_quantizer

    settings = product(names, budgets or [None], map(make_quantizer, bits or [None]))
    return list(dict.fromkeys(make_method(*each) for each in settings))


def read_messages(file: Path) -> list[dict[str, Any]]:
    """The conversation that a JSON file holds."""
    from vlcache_jax.requests.messages import is_one

    try:
        messages = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): correct it") from None
    if isinstance(messages, str) or not is_one(messages):
        raise ValueError(
            f'{file} must hold a list of messages, such as [{{"role": "user", "content": "..."}}]'
        )
    return messages


def read_context(file: Path | None) -> str | None:
    """The text of a file, None for none."""
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({reason(error)}): convert it") from None
    if not text.strip():
        raise ValueError(f"{file} has no text: name a file with one, or leave --context out")
    return text


def stop_texts(given: Sequence[str] | None) -> list[str]:
    """Texts that end an answer: a backslash and an n stand for a new line."""
    return [text.replace("\\n", "\n") for text in given or []]


def find_images(names: Sequence[str] | None) -> list[Path]:
    """The files of images, and of pictures of this package."""
    from vlcache_jax import demo

    shown = [(name, demo.find(name)) for name in names or ()]
    return [picture.file if picture else Path(name) for name, picture in shown]


def find_question(
    images: Sequence[str] | None, prompt: str | None, videos: Sequence[Any] | None = None
) -> tuple[list[Path], str, str | None]:
    """The images, the prompt, and its right answer where the prompt is a demo picture's own."""
    from vlcache_jax import demo

    files = find_images(images)
    if prompt is not None:
        return files, prompt, None
    if images and len(images) == 1 and not videos and (own := demo.find(images[0])):
        return files, own.prompt, own.answer
    raise ValueError(
        "give a --prompt; only where the one --image is a demo picture is its own question asked"
    )


def find_questions(
    images: list[str], videos: list[Path], prompts: list[str]
) -> tuple[list[list[Path]], list[list[Path]], list[str]]:
    """The images, the videos and the text of a question to each image, then to each video."""
    shown = [([image], []) for image in images] + [([], [video]) for video in videos]
    if not shown:
        raise ValueError(
            "give one --image or --video or more, and a --prompt to each of them or to all"
        )
    if len(prompts) not in (0, 1, len(shown)):
        raise ValueError(
            f"{len(images)} images, {len(videos)} videos and {len(prompts)} prompts: give one "
            "--prompt for each --image and --video, or one for all; demo pictures have questions "
            "of their own"
        )
    texts = prompts if len(prompts) > 1 else (prompts or [None]) * len(shown)
    asked = [find_question(one, text, film) for (one, film), text in zip(shown, texts, strict=True)]
    films = [film for _, film in shown]
    return [files for files, _, _ in asked], films, [question for _, question, _ in asked]


def open_model(
    model: str,
    revision: str | None,
    dtype: str | None,
    backend: str | None,
    *,
    cache: "CacheMethod | None" = None,
    mesh: str | None = None,
) -> tuple["VLM", Progress]:
    """The model with its parameters unread, and the progress that shows their reading."""
    from vlcache_jax.loading import load
    from vlcache_jax.results.report import human_bytes

    progress = Progress(console=ERRORS, transient=True, disable=not ERRORS.is_terminal)
    vlm = load(
        model,
        dtype,
        backend=backend,
        cache=cache,
        revision=revision,
        lazy=True,
        mesh=mesh,
        progress=progress_line(progress, "reading", human_bytes),
    )
    return vlm, progress


def progress_line(
    progress: Progress, verb: str, amount: Callable[[int], str] = str
) -> Callable[[str, int, int], None]:
    """A new line of the progress, to be called with what is done now, how much, and of how much."""
    task = progress.add_task(verb, total=None)

    def show(what: str, done: int, total: int) -> None:
        words = f"{verb} {what}, {amount(done)} of {amount(total)}"
        progress.update(task, description=words, completed=done, total=total)

    return show


def read_params(vlm: "VLM", progress: Progress) -> None:
    """Read the parameters, with the progress shown."""
    with progress:
        _ = vlm.params  # read where they are first asked for


def drain(stream: "Stream", echo: bool) -> "Answer":
    """Read the stream to its end; until its first piece a spinner says what takes so long."""
    # A backend that does not support the model says so when a program is made: of the prompt, or,
    # behind the first piece, of the decoding.
    with user_errors((NotImplementedError,)):
        with ERRORS.status(READING):
            first = next(stream, "")
        for piece in chain([first], stream):
            if echo:
                sys.stdout.write(piece)
                sys.stdout.flush()
    if echo:
        sys.stdout.write("\n")
    return stream.answer


def print_result(
    facts: dict[str, Any], tables: RenderableType, as_json: bool, written: Sequence[Path] = ()
) -> None:
    """Print one JSON object and nothing else, or tables and the files that were written."""
    if as_json:
        sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
        return
    Console().print(tables)
    for file in written:
        sys.stdout.write(f"written to {file}\n")
