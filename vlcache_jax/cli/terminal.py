"""What the commands share: their checks of the input, their progress, what they print.

What answers go to stdout; progress and errors go to stderr.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from vlcache_jax.answer import Answer
    from vlcache_jax.vlm import VLM, Stream

ERRORS = Console(stderr=True, highlight=False, emoji=False)  # "demo:x:" stays as it is

BAD_INPUT = ValueError, OSError, NotImplementedError


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = BAD_INPUT) -> Iterator[None]:
    """Bad input ends the program with one line on stderr and exit code 2."""
    try:
        yield
    except kinds as error:
        text = f"error: {error or type(error).__name__}"
        ERRORS.print(text, style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def read_messages(file: Path) -> list[dict[str, Any]]:
    """The conversation that a JSON file holds."""
    from vlcache_jax.messages import is_one

    try:
        messages = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): correct it") from None
    if isinstance(messages, str) or not is_one(messages):
        raise ValueError(
            f'{file} must hold a list of messages, such as [{{"role": "user", "content": "..."}}]'
        )
    return messages


def find_question(images: list[str], prompt: str | None) -> tuple[list[Path], str, str | None]:
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


def find_questions(images: list[str], prompts: list[str]) -> list[tuple[list[Path], str]]:
    """Each image with its question."""
    if not images:
        raise ValueError("give one --image or more, and a --prompt to each of them or to all")
    if len(prompts) not in (0, 1, len(images)):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts: give one --prompt for each --image, "
            "or one for all; demo pictures have questions of their own"
        )
    texts = prompts * len(images) if len(prompts) == 1 else prompts or [None] * len(images)
    return [find_question([image], text)[:2] for image, text in zip(images, texts, strict=True)]


def open_model(
    model: str,
    revision: str | None,
    dtype: str | None,
    backend: str | None,
    *,
    transform: bool = False,
) -> tuple["VLM", Progress]:
    """The model with its parameters unread, and the bar that their reading moves."""
    from vlcache_jax.loading import load
    from vlcache_jax.report import human_bytes

    progress = Progress(
        TextColumn("reading {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=ERRORS,
        transient=True,
        disable=not ERRORS.is_terminal,
    )
    task = progress.add_task("parameters", total=None, amount="")

    def show(piece: str, done: int, total: int) -> None:
        amount = f"{human_bytes(done)} of {human_bytes(total)}"
        progress.update(task, description=piece, completed=done, total=total, amount=amount)

    vlm = load(
        model,
        dtype,
        backend=backend,
        transform=transform,
        revision=revision,
        lazy=True,
        progress=show,
    )
    return vlm, progress


def read_params(vlm: "VLM", progress: Progress) -> None:
    """Read the parameters, with the bar shown."""
    with progress:
        _ = vlm.params  # read where they are first asked for


def drain(stream: "Stream", echo: bool) -> "Answer":
    """Read the stream to its end; until its first piece a spinner says what takes so long."""
    # A backend that does not support the model says so when a program is made: of the prompt, or,
    # behind the first piece, of the decoding.
    with user_errors((NotImplementedError,)):
        with ERRORS.status("compiling, and reading the prompt ..."):
            first = next(stream, "")
        for piece in chain([first], stream):
            if echo:
                sys.stdout.write(piece)
                sys.stdout.flush()
    if echo:
        sys.stdout.write("\n")
    return stream.answer


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, and a newline."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
