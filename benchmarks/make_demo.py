"""Ship a trained model in the package: `python -m benchmarks.make_demo RUN`.

RUN is a folder that `python -m benchmarks.accuracy.train` has written. Its model goes into the
package, as `demo` if it is one around a published decoder and else as `demo-small`, with twelve
pictures of the tasks; its recipe and log, and those of the runs that it took parts of, go to
benchmarks/results. The pictures follow from the tasks' names alone: none is chosen by what the
model answers. `python -m benchmarks.report --demo` then brings the documents up to date.
"""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

import vlcache_jax
from benchmarks.accuracy.pages import make_page_item
from benchmarks.accuracy.pages.content import KINDS
from benchmarks.accuracy.tasks import IMAGE, TASKS, Item, make_item
from benchmarks.command import bad_input
from benchmarks.documents import RESULTS as ALL_RESULTS
from benchmarks.documents import read_log
from benchmarks.environment import environment, write_result, write_whole
from vlcache_jax import demo
from vlcache_jax.checkpoints.checkpoint import DECODER
from vlcache_jax.files import sha256, whole_directory
from vlcache_jax.loading import describe
from vlcache_jax.models.llava.config import with_vision

RESULTS = ALL_RESULTS / "training"
COUNT = 12
"""Pictures, equally many of each task."""


@dataclass(frozen=True)
class Kind:
    """What comes with a model of the package.

    Attributes:
        folder: of the model and its pictures, in `vlcache_jax/demo`.
        tasks: what it may be shown for.
        make: makes an item of a task's name, a seed, a split and further options.
        plain: options of the pictures.
        last: those of a task's last picture, where they differ.
        most_bytes: of the weights, that a package can well carry.
        ending: of the pictures' files.
    """

    folder: str
    tasks: Sequence[str]
    make: Callable[..., Item]
    plain: dict[str, str]
    last: dict[str, dict[str, str]]
    most_bytes: int
    ending: str


PLAIN = {"variant": "plain", "shape": "square"}
KINDS_OF = {
    # Pages are like photographs, and so are their files.
    "demo": Kind("pages", KINDS, make_page_item, {"variant": "plain"}, {}, 24 * 10**6, "jpg"),
    "demo-small": Kind(
        "small",
        tuple(TASKS),
        make_item,
        PLAIN,
        {"document": PLAIN | {"shape": "wide"}, "reading": PLAIN | {"variant": "question first"}},
        16 * 10**6,
        "png",
    ),
}


def recipes(kind: Kind, names: list[str]) -> list[dict[str, Any]]:
    """Task, seed and options of all pictures, in the order of the tasks.

    Raises:
        ValueError: a name is no task's, or there are not equally many pictures for all.
    """
    if not names or len({*names} & {*kind.tasks}) < len(names) or COUNT % len(names):
        counts = [count for count in range(1, len(kind.tasks) + 1) if COUNT % count == 0]
        raise ValueError(
            f"tasks {','.join(names)!r}: name {', '.join(map(str, counts[:-1]))} or {counts[-1]} "
            f"different ones of {', '.join(kind.tasks)}"
        )
    each = COUNT // len(names)
    return [
        {
            "task": name,
            "seed": seed,
            "split": "test",
            **(kind.last.get(name, kind.plain) if seed == each - 1 else kind.plain),
        }
        for name in names
        for seed in range(each)
    ]


def draw(kind: Kind, names: list[str]) -> list[tuple[dict[str, Any], Item]]:
    """The pictures' entries in the index, each with its item."""
    drawn = []
    for number, recipe in enumerate(recipes(kind, names), 1):
        task = recipe.pop("task")
        item = kind.make(task, **recipe)
        entry = {
            "file": f"{number:02}.{kind.ending}",
            "task": task,
            "prompt": item.prompt.removeprefix(IMAGE),  # images come first anyway
            "answer": item.answer,
            "drawn": recipe,
        }
        drawn.append((entry, item))
    return drawn


def write_pictures(kind: Kind, names: list[str], folder: Path) -> None:
    """Draw the pictures and write them with their index, each file whole or not at all."""
    drawn = draw(kind, names)
    for entry, item in drawn:
        data = io.BytesIO()
        saved = "jpeg" if kind.ending == "jpg" else kind.ending
        Image.fromarray(item.images[0]).save(data, saved, optimize=True, quality=90)
        write_whole(folder / entry["file"], data.getvalue())
    index = json.dumps([entry for entry, _ in drawn], indent=1) + "\n"
    write_whole(folder / demo.INDEX, index.encode())


def facts(model: Path, most_bytes: int) -> dict[str, Any]:
    """What documents say of a checkpoint, once it is seen to be fit to be shipped.

    Raises:
        ValueError: it is too large, not in bfloat16, or damaged.
        FileNotFoundError: a file is missing.
    """
    vlm = vlcache_jax.load(model)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if size > most_bytes:
        raise ValueError(f"the weights have {size:,} bytes: {most_bytes:,} are the most to ship")
    stored = describe(model)
    if stored["dtype"] != "bfloat16":
        raise ValueError(f"the model is stored in {stored['dtype']}: export it in bfloat16")
    config = with_vision(vlm.config)
    return {
        "sha256": fingerprint(model),
        "weights_bytes": size,
        "dtype": stored["dtype"],
        "parameters": stored["parameters"],
        "vision": asdict(config.vision) | {"layers_run": config.vision_layers},
        "text": asdict(config.text),
        "grid_pinpoints": config.grid_pinpoints,
    }


def fingerprint(model: Path) -> str:
    """SHA-256 of a checkpoint's weights, which are one file."""
    [file] = model.glob("*.safetensors")
    return sha256(file)


def name_of(run: Path) -> str:
    """What the model of a run is called in the package."""
    return "demo" if (run / "model" / DECODER).is_file() else "demo-small"


def make_demo(
    run: Path,
    names: list[str] | None,
    *,
    package: Path,
    results: Path,
    force: bool,
    before: Sequence[Path] = (),
) -> None:
    """Put a run's model into the package, with its pictures, recipe and log.

    The checkpoint is replaced whole or not at all, after everything was checked; one that is there
    only by `force`. Recipe, log and facts go to `results`, those of the runs `before`, which it
    took parts of, into folders of their names there.

    Raises:
        ValueError: the model is not fit to be shipped, or a file of the run is damaged.
        FileNotFoundError: a file of the run is missing.
        FileExistsError: there is a checkpoint, and it is not to be replaced.
    """
    kind = KINDS_OF[name_of(run)]
    names = list(kind.tasks) if names is None else names
    recipes(kind, names)  # bad names are refused before anything is done
    told = {run: _told(run), **{each: _told(each) for each in before}}
    last = read_log(told[run]["log.jsonl"])[-1]
    package.mkdir(parents=True, exist_ok=True)
    with whole_directory((package / "checkpoint").resolve(), force=force) as folder:
        # What is checked is the copy: a training that goes on may replace its model at any time.
        shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        found = facts(folder, kind.most_bytes)
    write_pictures(kind, names, package / "pictures")
    for each, files in told.items():
        for name, text in files.items():
            write_whole((results if each == run else results / each.name) / name, text.encode())
    made = environment() | {"command": "python -m benchmarks.make_demo RUN"}
    write_result(results / "model.json", {**made, "step": last["step"], "tasks": names, **found})


def _told(run: Path) -> dict[str, str]:
    """A run's recipe and log."""
    files = {name: (run / name).read_text("utf-8") for name in ("recipe.json", "log.jsonl")}
    try:
        json.loads(files["recipe.json"])
        read_log(files["log.jsonl"])[-1]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"recipe.json or log.jsonl of {run} cannot be read ({error}): wait until the training "
            "has saved its state"
        ) from None
    return files


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run of benchmarks.accuracy.train.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks to show, with commas between them: those that it learned."),
    ] = None,
    before: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run that it took a part of.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the demo that is there.")] = False,
) -> None:
    """Make a trained model the package's demo."""
    with bad_input():
        make_demo(
            run,
            None if tasks is None else tasks.split(","),
            package=Path(demo.__file__).with_name(KINDS_OF[name_of(run)].folder),
            results=RESULTS / name_of(run),
            force=force,
            before=before or (),
        )
    typer.echo("now run: python -m benchmarks.report --demo", err=True)


if __name__ == "__main__":
    typer.run(main)
