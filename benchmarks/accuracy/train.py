"""Train the small LLaVA: `python -m benchmarks.accuracy.train RECIPE --out DIR`.

Everything is in the recipe; the same recipe with the same versions trains the same model. A run
saves its state as it goes and is gone on with by the same command, so that it may be cut into
slices (`--minutes`). At the end of a slice the model is in DIR/model, in Hugging Face's format, and
DIR/log.jsonl has the losses, and the accuracy on pictures of seeds that are never trained on.
"""

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.accuracy import tasks
from benchmarks.accuracy.glyphs import CLASSES
from benchmarks.accuracy.loss import Scores, make_loss
from benchmarks.accuracy.network import config_json, export, make_files, make_inputs
from benchmarks.accuracy.packing import Batch, pack, sharing
from benchmarks.environment import write_result
from vlcache_jax.checkpoint import quiet_orbax
from vlcache_jax.config import LlavaConfig
from vlcache_jax.models.llava import init_params
from vlcache_jax.processing import Processor

PREFIX_ROWS = (352, 704, 1408)
"""Sizes that prefixes are padded to: one picture, two of them."""

AHEAD = 4
"""Batches that are drawn ahead, in a thread."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        steps: how many.
        tasks: task to its weight in the draw.
        pictures: pictures of a step, P.
        questions: of each, Q.
        level: difficulty, 0 to 1 (`tasks.make_item`).
        jitter: pixels that a glyph may stand away from its cell.
        glyph_weight: weight of the auxiliary loss.
    """

    steps: int
    tasks: dict[str, float]
    pictures: int
    questions: int
    level: float
    jitter: int
    glyph_weight: float


@dataclass(frozen=True)
class Recipe:
    """All that a training depends on.

    Attributes:
        seed: of the weights and of the pictures.
        dtype: type of the arithmetic; the parameters are float32.
        vision: see `network.config_json`.
        text: likewise.
        peak_lr: learning rate behind the warm-up.
        last_lr: at the end of the last stage, down a cosine.
        warmup_steps: steps of the warm-up.
        stages: in order.
        b2: AdamW's second decay.
        weight_decay: AdamW's.
        clip: largest norm of a gradient.
    """

    seed: int
    dtype: str
    vision: dict[str, int]
    text: dict[str, int]
    peak_lr: float
    last_lr: float
    warmup_steps: int
    stages: tuple[Stage, ...]
    b2: float = 0.95
    weight_decay: float = 0.05
    clip: float = 1.0

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a JSON file.

        Raises:
            ValueError: it is no recipe.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**data, "stages": tuple(Stage(**stage) for stage in data["stages"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no recipe ({error}): see benchmarks/accuracy/recipes"
            ) from None

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipped gradients; vectors, which are norms and biases, do not decay."""
        steps = max(self.steps, self.warmup_steps + 1)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.peak_lr, self.warmup_steps, steps, self.last_lr
        )
        decays: Callable[[Any], Any] = partial(jax.tree.map, lambda x: x.ndim > 1)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(rate, b2=self.b2, weight_decay=self.weight_decay, mask=decays),
        )


@dataclass
class Trainer:
    """A training with its state.

    Attributes:
        recipe: what is done.
        step: steps done.
        state: {"learned": {"model": parameters, "glyphs": [D, classes]}, "optimizer": its own}.
    """

    recipe: Recipe
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.files = make_files((*tasks.VOCABULARY_WORDS, "INST"))
        self.config_json = config_json(
            self.recipe.vision, self.recipe.text, len(self.files.tokenizer)
        )
        self.config = LlavaConfig.from_hf(self.config_json)
        self.processor: Processor = make_inputs(self.config, self.files, PREFIX_ROWS)
        self.optimizer = self.recipe.optimizer()
        self._programs: dict[float, Any] = {}
        if not self.state:
            learned = {
                "model": init_params(self.config, self.recipe.seed),
                "glyphs": jnp.zeros((self.config.text.hidden_size, len(CLASSES))),
            }
            self.state = {"learned": learned, "optimizer": self.optimizer.init(learned)}

    def batch(self, step: int) -> Batch:
        """The pictures and questions of a step: the same in every run."""
        return pack(self._draw(self.recipe.stage(step), step, "train"), self.processor)

    def held_out(self, count: int) -> Iterator[Batch]:
        """Batches of the last stage that the training never draws."""
        for index in range(count):
            yield pack(self._draw(self.recipe.stages[-1], index, "tune"), self.processor)

    def _draw(self, stage: Stage, step: int, split: str) -> list[list[tasks.Item]]:
        rng = np.random.default_rng((self.recipe.seed, step))
        names, weights = list(stage.tasks), np.array(list(stage.tasks.values()), float)
        chosen = rng.choice(names, stage.pictures, p=weights / weights.sum())
        seeds = rng.integers(2**31, size=stage.pictures)
        return [
            sharing(
                tasks.questions_of_one_picture(
                    str(task), int(seed), stage.questions,
                    split=split, level=stage.level, jitter=stage.jitter,
                )
            )
            for task, seed in zip(chosen, seeds, strict=True)
        ]  # fmt: skip

    def advance(self, batch: Batch) -> Scores:
        """Do one step."""
        weight = self.recipe.stage(self.step).glyph_weight
        if weight not in self._programs:
            loss = make_loss(self.config, weight, jnp.dtype(self.recipe.dtype))
            self._programs[weight] = jax.jit(
                partial(_advance, loss, self.optimizer), donate_argnums=0
            )
        self.state, scores = self._programs[weight](self.state, batch)
        self.step += 1
        return scores

    @cached_property
    def _test(self) -> Callable[[Any, Batch], Scores]:
        loss = make_loss(self.config, 0.0, jnp.dtype(self.recipe.dtype))
        return jax.jit(lambda learned, batch: loss(learned, batch)[1])

    def accuracy(self, batches: Iterator[Batch]) -> float:
        """Share of answers that are right to the last token."""
        right = asked = 0
        for batch in batches:
            scores = self._test(self.state["learned"], batch)
            right += int(scores.exact.sum())
            asked += int(scores.asked.sum())
        return right / max(asked, 1)

    def save(self, folder: Path) -> None:
        """Write the model, and the state beside the last one; older ones are removed."""
        path = (folder / "state" / f"{self.step:07d}").resolve()
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, self.state, force=True)
            checkpointer.wait_until_finished()
        for old in sorted(path.parent.glob("[0-9]*"))[:-2]:
            shutil.rmtree(old)
        export(
            folder / "model",
            self.config_json,
            self.files,
            self.state["learned"]["model"],
            "bfloat16",
        )

    def restore(self, folder: Path) -> bool:
        """Go on from the newest state of a folder; False where there is none."""
        found = sorted(path for path in (folder / "state").glob("[0-9]*") if path.name.isdigit())
        if not found:
            return False
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            self.state = checkpointer.restore(found[-1].resolve(), self.state)
        self.step = int(found[-1].name)
        return True


def _advance(loss: Any, optimizer: Any, state: Any, batch: Batch) -> tuple[Any, Scores]:
    learned = state["learned"]
    gradient, scores = jax.grad(loss, has_aux=True)(learned, batch)
    updates, moments = optimizer.update(gradient, state["optimizer"], learned)
    return {"learned": optax.apply_updates(learned, updates), "optimizer": moments}, scores


def drawn_ahead(make: Callable[[int], Batch], first: int, last: int) -> Iterator[Batch]:
    """Batches of the steps first..last, made in a thread while the device computes."""
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def draw() -> None:
        for step in range(first, last):
            try:
                item = make(step)
            except Exception as error:  # to be raised where the batch is asked for
                item = error
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stopped.is_set():
                return

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def main(
    recipe: Annotated[Path, typer.Argument(help="A JSON file, see benchmarks/accuracy/recipes.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the run; one that is there is gone on with.")
    ],
    minutes: Annotated[
        float | None, typer.Option(help="Length of this slice; no end by default.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between two tests and saves.")] = 250,
    held_out: Annotated[int, typer.Option(min=1, help="Batches of a test.")] = 4,
) -> None:
    """Train, or go on with a training that was cut off."""
    errors = Console(stderr=True, highlight=False)
    try:
        what = Recipe.read(recipe)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    trainer = Trainer(what)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "recipe.json"
    if kept.exists() and Recipe.read(kept) != what:
        raise typer.BadParameter(f"{out} holds the run of another recipe: choose another folder")
    write_result(kept, asdict(what))
    if trainer.restore(out):
        errors.print(f"going on at step {trainer.step}")
    until = time.monotonic() + (minutes * 60 if minutes else float("inf"))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=what.steps, completed=trainer.step)
        for batch in drawn_ahead(trainer.batch, trainer.step, what.steps):
            scores = trainer.advance(batch)
            bar.update(task, completed=trainer.step, description=f"loss {float(scores.loss):.3f}")
            over = time.monotonic() > until
            if over or trainer.step % every == 0 or trainer.step == what.steps:
                _log(trainer, scores, held_out, out, errors)
                trainer.save(out)
            if over:
                break
    errors.print(f"step {trainer.step} of {what.steps}; the model is in {out / 'model'}")


def _log(trainer: Trainer, scores: Scores, held_out: int, out: Path, errors: Console) -> None:
    right = trainer.accuracy(trainer.held_out(held_out))
    line = {
        "step": trainer.step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "loss": round(float(scores.loss), 4),
        "glyph_loss": round(float(scores.glyph_loss), 4),
        "glyph_accuracy": round(float(scores.glyph_accuracy), 4),
        "exact": round(float(scores.exact.sum() / jnp.maximum(scores.asked.sum(), 1)), 4),
        "held_out_exact": round(right, 4),
    }
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    errors.print(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
