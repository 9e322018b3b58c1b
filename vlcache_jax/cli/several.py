"""Commands that several processes run together."""

import ctypes
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Annotated, Any

import typer

from vlcache_jax.cli.terminal import show_error, user_errors

LOST = "another process was lost, or could not be reached"

_OPTIONS = {
    "coordinator": Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the first of several processes is found, which run the model together. "
            "Give all of them the same command.",
        ),
    ],
    "process_id": Annotated[
        int | None, typer.Option(min=0, help="Number of this process, from 0 on.")
    ],
    "processes": Annotated[int | None, typer.Option(min=1, help="How many processes there are.")],
}


def several(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options by which processes find each other. The first one speaks."""

    @functools.wraps(command)
    def run(
        *,
        coordinator: str | None = None,
        process_id: int | None = None,
        processes: int | None = None,
        **options: Any,
    ) -> None:
        given = coordinator, process_id, processes
        if given == (None, None, None):
            command(**options)
            return
        from vlcache_jax.distributed.processes import check, join

        with user_errors():
            if coordinator is None or process_id is None or processes is None:
                raise ValueError(
                    "give --coordinator, --process-id and --processes together, or none of them"
                )
            check(coordinator, process_id, processes)
            if options.get("trace") is not None:
                raise NotImplementedError("--trace with several processes: leave it out")
        if process_id and "out" in options:
            options["out"] = None
        _watched()
        with _words_alone(process_id == 0), _ending_at_once():
            join(coordinator, process_id, processes)
            command(**options)

    signature = inspect.signature(command)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _OPTIONS.items()
    ]
    found: Any = run  # with what typer reads
    found.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
    found.__annotations__ = {**command.__annotations__, **_OPTIONS}
    return found


def _watched() -> None:
    """Go on in a child, whose end this process tells in one line.

    JAX's runtime aborts a process when it hears that another one was lost: nothing is said then but
    its own words, and a stack of addresses.
    """
    child = os.fork()
    if not child:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child too
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        show_error(LOST)
    elif code < 0:
        show_error(f"ended by signal {-code}")
    os._exit(code if code >= 0 else 1)


@contextmanager
def _words_alone(speaks: bool) -> Iterator[None]:
    """What is written is the command's own; on stdout nothing where it does not speak.

    The runtime and the library by which CPUs exchange arrays write to the same files.
    """
    with ExitStack() as stack:
        files = os.devnull, os.dup(1), os.dup(2)
        nowhere, stdout, stderr = (
            stack.enter_context(open(file, "w", encoding="utf-8")) for file in files
        )
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        stack.enter_context(redirect_stdout(stdout if speaks else nowhere))
        stack.enter_context(redirect_stderr(stderr))
        yield


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Where something fails, end at once: an orderly end would wait for the other processes."""
    from jax.errors import JaxRuntimeError

    code = 0
    try:
        with user_errors():
            yield
    except JaxRuntimeError as error:
        show_error(f"{LOST}: {str(error).partition(chr(10))[0]}")
        code = 1
    except typer.Exit as end:
        code = end.exit_code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            os._exit(code)
