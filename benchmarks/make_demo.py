"""Ship a trained model as the package's demo: `python -m benchmarks.make_demo RUN`.

RUN is a folder that `python -m benchmarks.accuracy.train` has written. Its model goes into the
package, with twelve pictures of the tasks, and its recipe and log go to benchmarks/results.
The pictures follow from the tasks' names alone: none is chosen by what the model answers.
`python -m benchmarks.report --demo` then brings the documents up to date.
"""

import hashlib
import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

import vlcache_jax
from benchmarks.accuracy.tasks import IMAGE, TASKS, Item, make_item
from benchmarks.command import bad_input
from benchmarks.documents import RESULTS as ALL_RESULTS
from benchmarks.documents import read_log
from benchmarks.environment import environment, write_result, write_whole
from vlcache_jax import demo
from vlcache_jax.files import whole_directory
from vlcache_jax.loading import describe
from vlcache_jax.models.llava.config import with_vision

RESULTS = ALL_RESULTS / "training"
COUNT = 12
"""Pictures, equally many of each task."""

MOST_BYTES = 16 * 10**6
"""Of the weights: what a package can well carry."""

PLAIN = {"variant": "plain", "shape": "square"}
LAST = {
    "document": {"variant": "plain", "shape": "wide"},
    "reading": {"variant": "question first", "shape": "square"},
}
"""How each task's last picture differs from the others, which are plain squares."""


def recipes(names: list[str]) -> list[dict[str, Any]]:
    """The arguments of `make_item` for all pictures.

    Raises:
        ValueError: a name is no task's, or there are not equally many pictures for all.
    """
    if not names or len({*names} & {*TASKS}) < len(names) or COUNT % len(names):
        raise ValueError(
            f"tasks {','.join(names)!r}: name 1 or 2 different ones of {', '.join(TASKS)}"
        )
    each = COUNT // len(names)
    return [
        {"task": name, "seed": seed, "split": "test", **(LAST[name] if seed == each - 1 else PLAIN)}
        for name in names
        for seed in range(each)
    ]


def draw(names: list[str]) -> list[tuple[dict[str, Any], Item]]:
    """The pictures' entries in the index, each with its item."""
    drawn = []
    for number, recipe in enumerate(recipes(names), 1):
        item = make_item(**recipe)
        entry = {
            "file": f"{number:02}.png",
            "task": recipe.pop("task"),
            "prompt": item.prompt.removeprefix(IMAGE),  # images come first anyway
            "answer": item.answer,
            "drawn": recipe,
        }
        drawn.append((entry, item))
    return drawn


def write_pictures(names: list[str], folder: Path) -> None:
    """Draw the pictures and write them with their index, each file whole or not at all."""
    drawn = draw(names)
    for entry, item in drawn:
        png = io.BytesIO()
        Image.fromarray(item.images[0]).save(png, "png", optimize=True)
        write_whole(folder / entry["file"], png.getvalue())
    index = json.dumps([entry for entry, _ in drawn], indent=1) + "\n"
    write_whole(folder / demo.INDEX.name, index.encode())


def facts(model: Path) -> dict[str, Any]:
    """What documents say of a checkpoint, once it is seen to be fit to be shipped.

    Raises:
        ValueError: it is too large, not in bfloat16, or damaged.
        FileNotFoundError: a file is missing.
    """
    vlm = vlcache_jax.load(model)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if size > MOST_BYTES:
        raise ValueError(f"the weights have {size:,} bytes: {MOST_BYTES:,} are the most to ship")
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
    """SHA-256 of a checkpoint's weights."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make_demo(run: Path, names: list[str], *, package: Path, results: Path, force: bool) -> None:
    """Put a run's model into the package, with its pictures, recipe and log.

    The checkpoint is replaced whole or not at all, after everything was checked; one that is there
    only by `force`. Recipe, log and facts go to `results`.

    Raises:
        ValueError: the model is not fit to be shipped, or a file of the run is damaged.
        FileNotFoundError: a file of the run is missing.
        FileExistsError: there is a checkpoint, and it is not to be replaced.
    """
    recipes(names)  # bad names are refused before anything is done
    recipe, log = ((run / name).read_text("utf-8") for name in ("recipe.json", "log.jsonl"))
    try:
        json.loads(recipe)
        last = read_log(log)[-1]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"recipe.json or log.jsonl of {run} cannot be read ({error}): wait until the training "
            "has saved its state"
        ) from None
    package.mkdir(parents=True, exist_ok=True)
    with whole_directory((package / demo.CHECKPOINT.name).resolve(), force=force) as folder:
        # What is checked is the copy: a training that goes on may replace its model at any time.
        shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        found = facts(folder)
    write_pictures(names, package / demo.INDEX.parent.name)
    write_whole(results / "recipe.json", recipe.encode())
    write_whole(results / "log.jsonl", log.encode())
    made = environment() | {"command": "python -m benchmarks.make_demo RUN"}
    write_result(results / "model.json", {**made, "step": last["step"], "tasks": names, **found})


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run of benchmarks.accuracy.train.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks to show, with commas between them: those that it learned.")
    ] = ",".join(TASKS),
    force: Annotated[bool, typer.Option("--force", help="Replace the demo that is there.")] = False,
) -> None:
    """Make a trained model the package's demo."""
    package = demo.CHECKPOINT.parent
    with bad_input():
        make_demo(run, tasks.split(","), package=package, results=RESULTS, force=force)
    typer.echo("now run: python -m benchmarks.report --demo", err=True)


if __name__ == "__main__":
    typer.run(main)
