"""`python -m convert SRC DST`, which is also `vlcache convert`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


def convert_command(
    src: Annotated[
        str,
        typer.Argument(help="A model directory (safetensors or converted), GGUF file or hub id."),
    ],
    dst: Annotated[Path, typer.Argument(help="The directory to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DST, once the new one is complete.")
    ] = False,
    to_hf: Annotated[
        bool, typer.Option("--to-hf", help="Write safetensors that transformers loads.")
    ] = False,
) -> None:
    """Convert a checkpoint to Orbax, or with --to-hf to Hugging Face's format.

    DST appears when it is complete: a failed run leaves nothing behind.
    """
    from convert.program import convert  # here, so that --help is quick

    console = Console(stderr=True, highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    began = time.monotonic()
    try:
        with progress as bar:
            task = bar.add_task("opening", total=None)

            def show(piece: str, done: int, total: int) -> None:
                bar.update(task, description=piece, completed=done, total=total)

            target = convert(src, dst, dtype=dtype, force=force, to_hf=to_hf, progress=show)
    except (ValueError, NotImplementedError, FileNotFoundError, FileExistsError) as error:
        _fail(console, error, 2)
    except OSError as error:
        _fail(console, error, 1)
    except KeyboardInterrupt:
        _fail(console, "interrupted", 1)
    else:
        seconds = time.monotonic() - began
        console.print(f"wrote {target} in {seconds:.0f} s", markup=False, soft_wrap=True)


def _fail(console: Console, error: object, code: int) -> None:
    console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(code) from None


if __name__ == "__main__":
    typer.run(convert_command)
