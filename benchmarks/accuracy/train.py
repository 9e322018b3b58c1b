"""Train the small LLaVA: `python -m benchmarks.accuracy.train RECIPE --out DIR`.

Everything is in the recipe; the same recipe with the same versions trains the same model. A run
saves its state as it goes and is gone on with by the same command, so that it may be cut into
slices (`--minutes`). At the end of a slice the model is in DIR/model, in Hugging Face's format, and
DIR/log.jsonl has the losses, and the accuracy on pictures of seeds that are never trained on.
"""

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from rich.console import Console

from benchmarks.accuracy import tasks
from benchmarks.accuracy.glyphs import CHARACTERS
from benchmarks.accuracy.loss import Scores, make_loss
from benchmarks.accuracy.network import config_json, export, make_files
from benchmarks.accuracy.packing import Batch, pack
from benchmarks.accuracy.scene import Manner
from benchmarks.command import bad_input, counting_bar
from benchmarks.environment import write_result
from vlcache_jax.checkpoints.checkpoint import quiet_orbax
from vlcache_jax.models.families import init_params
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.buckets import Buckets
from vlcache_jax.requests.processing import Processor

PREFIX_ROWS = (64, 96, 128, 192, 256, 352, 704, 1408)
"""Sizes that prefixes are padded to: 352 for a whole picture, 704 for two of them."""

AHEAD = 4
"""Batches that are drawn ahead, in a thread."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        steps: how many.
        lr: learning rate at its beginning.
        last_lr: at its end, down a cosine.
        tasks: task to its weight in the draw.
        pictures: pictures of a step, P; half as many pairs.
        questions: of each, Q; one where it comes before the picture.
        level: greatest difficulty, 0 to 1 (`tasks.make_item`): of half of the pictures, the others
            are anywhere below.
        jitter: pixels that a glyph may stand away from its cell.
        variants: variant to its weight in the draw, `tasks.VARIANTS`.
        manner: how questions are put.
        sight: run the vision tower; without it the visual tokens are those that it should give.
        answers: run the decoder; without it the vision tower learns alone.
        blanks: share of the visual tokens without a glyph that are there.
        glyph_weight: weight of the auxiliary loss that names the glyphs.
        guide_weight: of the one that leads the attention, see loss.py.
    """

    steps: int
    lr: float
    last_lr: float
    tasks: dict[str, float]
    pictures: int
    questions: int
    level: float
    jitter: int
    variants: dict[str, float] = field(default_factory=lambda: dict(tasks.VARIANTS))
    manner: Manner = "full"
    sight: bool = True
    answers: bool = True
    blanks: float = 1.0
    glyph_weight: float = 0.0
    guide_weight: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """All that a training depends on.

    Attributes:
        seed: of the weights and of the pictures.
        dtype: type of the arithmetic; the parameters are float32.
        vision: see `network.config_json`.
        text: likewise.
        warmup_steps: steps of the first stage in which the learning rate rises from 0.
        stages: in order.
        b2: AdamW's second decay.
        weight_decay: AdamW's.
        clip: largest norm of a gradient.
    """

    seed: int
    dtype: str
    vision: dict[str, int]
    text: dict[str, int]
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
        ends = np.cumsum([stage.steps for stage in self.stages[:-1]])
        return self.stages[np.searchsorted(ends, step, side="right")]

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipped gradients; vectors, which are norms and biases, do not decay."""
        ends = np.cumsum([stage.steps for stage in self.stages])
        falls = [
            optax.cosine_decay_schedule(stage.lr, stage.steps, stage.last_lr / stage.lr)
            for stage in self.stages
        ]
        along = optax.join_schedules(falls, ends[:-1].tolist())

        def rate(step: Any) -> jax.Array:
            return jnp.asarray(along(step)) * jnp.minimum(1.0, (step + 1) / self.warmup_steps)

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
        state: {"learned": {"model": parameters, "glyphs": [classes + 1, D]}, "optimizer": its own}.
    """

    recipe: Recipe
    step: int = 0
    state: dict[str, Any] = field(init=False)

    def __post_init__(self):
        recipe = self.recipe
        self.files = make_files((*tasks.VOCABULARY_WORDS, "INST"))
        self.config_json = config_json(recipe.vision, recipe.text, len(self.files.tokenizer))
        self.config = LlavaConfig.from_hf(self.config_json)
        buckets = Buckets(PREFIX_ROWS, (0, 5, 10, 20, 40, 80))
        self.processor = Processor(self.config, self.files, buckets)
        self.optimizer = recipe.optimizer()
        self._programs = cache(self._compiled)
        shape = len(CHARACTERS) + 1, self.config.text.hidden_size
        glyphs = 0.02 * jax.random.normal(jax.random.key(recipe.seed), shape)
        learned = {"model": init_params(self.config, recipe.seed), "glyphs": glyphs}
        self.state = {"learned": learned, "optimizer": self.optimizer.init(learned)}

    def batch(self, step: int) -> Batch:
        """The pictures and questions of a step: the same in every run."""
        return self._draw(self.recipe.stage(step), step, "train")[1]

    def _draw(self, stage: Stage, step: int, split: str) -> tuple[list[str], Batch]:
        """The task of each group, and their batch: all of one variant, whose sizes are alike."""
        rng = np.random.default_rng((self.recipe.seed, step, tasks.SPLITS.index(split)))
        variant = _choose(rng, stage.variants, 1)[0]
        count = stage.pictures // 2 if variant == "two pictures" else stage.pictures
        chosen = _choose(rng, stage.tasks, max(count, 1))
        groups = [
            tasks.questions_of_one_picture(
                task,
                int(rng.integers(2**31)),
                1 if variant == "question first" else stage.questions,
                split=split,
                level=stage.level if rng.random() < 0.5 else rng.uniform(0, stage.level),
                jitter=stage.jitter,
                variant=variant,
                manner=stage.manner,
            )
            for task in chosen
        ]
        some = rng if stage.blanks < 1 else None
        return chosen, pack(groups, self.processor, blanks=stage.blanks, rng=some)

    def _compiled(self, sight: bool, answers: bool) -> tuple[Any, Any]:
        """One step, and the scores of a batch, compiled."""
        dtype = jnp.dtype(self.recipe.dtype)
        loss = make_loss(self.config, dtype, sight=sight, answers=answers)
        step = jax.jit(partial(_advance, loss, self.optimizer), donate_argnums=0)
        return step, jax.jit(lambda learned, batch: loss(learned, batch, 0.0, 0.0)[1])

    def advance(self, batch: Batch) -> Scores:
        """Do one step."""
        stage = self.recipe.stage(self.step)
        weights = jnp.float32(stage.glyph_weight), jnp.float32(stage.guide_weight)
        step, _ = self._programs(stage.sight, stage.answers)
        self.state, scores = step(self.state, batch, *weights)
        self.step += 1
        return scores

    def held_out(self, count: int) -> dict[str, float]:
        """Share of answers that are right to the last token, for each task of the stage.

        The pictures, `count` batches, are like the stage's, of seeds that are never trained on.
        """
        stage = self.recipe.stage(self.step - 1)
        right, asked = dict.fromkeys(stage.tasks, 0), dict.fromkeys(stage.tasks, 0)
        _, test = self._programs(stage.sight, stage.answers)
        for index in range(count):
            chosen, batch = self._draw(stage, index, "test")
            scores = test(self.state["learned"], batch)
            for p, task in enumerate(chosen):
                right[task] += int(scores.exact[p].sum())
                asked[task] += int(scores.asked[p].sum())
        return {task: right[task] / max(asked[task], 1) for task in right}

    def log(self, scores: Scores, held_out: int) -> dict[str, Any]:
        """A line of the log: the last batch's scores, and those of so many others held out."""
        losses = ("loss", "glyph_loss", "glyph_accuracy", "guide_loss")
        right = self.held_out(held_out)
        return {
            "step": self.step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **{name: round(float(getattr(scores, name)), 4) for name in losses},
            "exact": round(float(scores.exact.sum() / jnp.maximum(scores.asked.sum(), 1)), 4),
            "held_out_exact": {task: round(share, 4) for task, share in right.items()},
        }

    def save(self, folder: Path) -> None:
        """Write the model, and the state beside the last one; older ones are removed."""
        path = (folder / "state" / f"{self.step:07d}").resolve()
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, self.state, force=True)
            checkpointer.wait_until_finished()
        for old in sorted(path.parent.glob("[0-9]*"))[:-2]:
            shutil.rmtree(old)
        params = self.state["learned"]["model"]
        export(folder / "model", self.config_json, self.files, params, "bfloat16")

    def restore(self, folder: Path) -> bool:
        """Go on from the newest state of a folder; False where there is none."""
        found = sorted(path for path in (folder / "state").glob("[0-9]*") if path.name.isdigit())
        if found:
            with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
                self.state = checkpointer.restore(found[-1].resolve(), self.state)
            self.step = int(found[-1].name)
        return bool(found)


def _choose(rng: np.random.Generator, weights: dict[str, float], count: int) -> list[str]:
    values = np.array(list(weights.values()), float)
    return [str(name) for name in rng.choice(list(weights), count, p=values / values.sum())]


def _advance(
    loss: Any, optimizer: Any, state: Any, batch: Batch, *weights: jax.Array
) -> tuple[Any, Scores]:
    learned = state["learned"]
    gradient, scores = jax.grad(loss, has_aux=True)(learned, batch, *weights)
    updates, moments = optimizer.update(gradient, state["optimizer"], learned)
    return {"learned": optax.apply_updates(learned, updates), "optimizer": moments}, scores


def drawn_ahead(make: Callable[[int], Batch], first: int, last: int) -> Iterator[Batch]:
    """Batches of the steps first..last, made in a thread while the device computes."""
    pool = ThreadPoolExecutor(1)
    steps = iter(range(first, last))
    ready = deque(pool.submit(make, step) for step in islice(steps, AHEAD))
    try:
        while ready:
            yield ready.popleft().result()
            ready.extend(pool.submit(make, step) for step in islice(steps, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def main(
    recipe: Annotated[Path, typer.Argument(help="A JSON file, see benchmarks/accuracy/recipes.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the run; one that is there is gone on with.")
    ],
    minutes: Annotated[
        float, typer.Option(help="Length of this slice; no end by default.")
    ] = math.inf,
    every: Annotated[int, typer.Option(min=1, help="Steps between two tests and saves.")] = 250,
    held_out: Annotated[int, typer.Option(min=1, help="Batches of a test.")] = 4,
) -> None:
    """Train, or go on with a training that was cut off."""
    errors = Console(stderr=True, highlight=False)
    with bad_input():
        what = Recipe.read(recipe)
    trainer = Trainer(what)
    kept = out / "recipe.json"
    if kept.exists() and Recipe.read(kept) != what:
        raise typer.BadParameter(f"{out} holds the run of another recipe: choose another folder")
    write_result(kept, asdict(what))
    if trainer.restore(out):
        errors.print(f"going on at step {trainer.step}")
    until = time.monotonic() + minutes * 60
    with counting_bar(errors, transient=False) as bar:
        task = bar.add_task("", total=what.steps, completed=trainer.step)
        for batch in drawn_ahead(trainer.batch, trainer.step, what.steps):
            scores = trainer.advance(batch)
            if trainer.step % 10 == 0:  # a look at the loss waits for the step
                loss = f"loss {float(scores.loss):.3f}"
                bar.update(task, completed=trainer.step, description=loss)
            over = time.monotonic() > until
            if over or trainer.step % every == 0 or trainer.step == what.steps:
                line = json.dumps(trainer.log(scores, held_out))
                with (out / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
                errors.print(line)
                trainer.save(out)
            if over:
                break
    errors.print(f"step {trainer.step} of {what.steps}; the model is in {out / 'model'}")


if __name__ == "__main__":
    typer.run(main)
