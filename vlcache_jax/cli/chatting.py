"""`vlcache chat`: the command, the lines that it reads, and Ctrl-C."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from vlcache_jax.cache.methods import DEFAULT_METHOD, METHODS
from vlcache_jax.cli import options
from vlcache_jax.cli.conversation import COMMANDS, Chat
from vlcache_jax.cli.terminal import (
    READING,
    cache_methods,
    find_images,
    note,
    open_model,
    read_context,
    stop_texts,
    user_errors,
)

PROMPT = "> "


def read_lines() -> Callable[[], str]:
    """What gives the next line of stdin, or raises EOFError behind the last.

    In a terminal prompt_toolkit reads them, where it is installed.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _piped
    note("/help lists the commands")
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.shortcuts import CompleteStyle
    except ImportError:
        note("for a history, and completed commands: pip install 'vlcache-jax[chat]'")
        return _typed
    commands = [f"/{name}" for name in COMMANDS] + [f"/method {name}" for name in METHODS]
    # Whole lines are completed, as a slash is no part of a word. The history is kept in memory.
    whole, by_tab = WordCompleter(commands, sentence=True), CompleteStyle.READLINE_LIKE
    return PromptSession[str](PROMPT, completer=whole, complete_style=by_tab).prompt


def _typed() -> str:
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        note("")  # the prompt's line is not ended yet
        raise


def _piped() -> str:
    if line := sys.stdin.readline():
        return line.removeprefix("\ufeff").rstrip("\n")
    raise EOFError


def talk(chat: Chat, read: Callable[[], str]) -> None:
    """Give a chat the lines that are read, until one of them ends it or none follows."""
    while True:
        try:
            line = read()
            with _stopping(chat):
                if not chat.handle(line):
                    return
        except KeyboardInterrupt:
            note("/quit, or Ctrl-D, ends the conversation")
        except EOFError:
            return


@contextmanager
def _stopping(chat: Chat) -> Iterator[None]:
    """Ctrl-C stops the answer behind the step that runs.

    In the midst of a step it would take from the session the arrays that are written in place.
    """

    def stop(*_: Any) -> None:
        chat.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def chat(
    model: options.Model,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    context: options.Context = None,
    system: Annotated[
        str | None, typer.Option(help="A message of the system in front of the conversation.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where the keys and values of the pictures lie between questions: device (the "
            "default), host, or 8 or 4 for so many bits a value on the device."
        ),
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on with a conversation that /save wrote, in place of --image, --video, "
            "--frames, --context, --system and --store.",
        ),
    ] = None,
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
    prefill_chunk: options.PrefillChunk = None,
) -> None:
    """Have a conversation about images, videos or a text, whose keys and values are made once.

    Each line is a question, or a command such as /help. What the cache keeps is chosen anew for
    every question. Lines may be piped in: answers go to stdout, all else to stderr.

    Example: vlcache chat demo --image demo --kv-budget 0.2
    """
    asked: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop_texts(stop),
        "prefill_chunk": prefill_chunk,
    }
    with user_errors():
        [cache] = cache_methods([method], [kv_budget], [kv_bits])
        images = find_images(image)
        given = {"videos": video, "frames": frames, "system": system, "store": store}
        shown: dict[str, Any] = {
            name: value
            for name, value in (given | {"context": read_context(context)}).items()
            if value is not None
        }
        if session is not None and (images or shown):
            names = ["image"] * bool(images) + [{"videos": "video"}.get(x, x) for x in shown]
            raise ValueError(f"--session has its own: leave --{' and --'.join(names)} out")
        vlm, progress = open_model(model, revision, dtype, backend, cache=cache, mesh=mesh)
        vlm.request(text="a", **asked)
        if prefill_chunk is not None:
            shown["prefill_chunk"] = prefill_chunk
        progress.add_task(READING, total=None)
        with progress:
            begun = vlm.session(images, **shown) if session is None else vlm.open_session(session)
    setting = method, kv_budget, kv_bits
    chat = Chat(vlm, begun, setting, asked, images if session is None else None, shown)
    with user_errors(()):
        talk(chat, read_lines())
