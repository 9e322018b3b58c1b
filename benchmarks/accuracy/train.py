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
from benchmarks.accuracy.learner import Learner, SmallLearner
from benchmarks.accuracy.loss import Scores, Weights, make_loss
from benchmarks.accuracy.packing import Batch, pack
from benchmarks.accuracy.pages.learner import PageLearner
from benchmarks.accuracy.scene import Manner
from benchmarks.command import bad_input, check_known, counting_bar
from benchmarks.environment import write_result
from vlcache_jax.checkpoints.checkpoint import quiet_orbax
from vlcache_jax.running import programs

RECIPE = "recipe.json"
"""In the folder of a run."""

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
        noise: of the visual tokens where there is no sight, as a share of theirs.
        frozen: a part of what is learned that stays as it is, "eyes" for instance.
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
    noise: float = 0.0
    frozen: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All that a training depends on.

    Attributes:
        seed: of the weights and of the pictures.
        dtype: type of the arithmetic, or around a published decoder of what is multiplied in it;
            the parameters are float32.
        vision: see `network.config_json`.
        text: likewise; of a decoder that is published nothing.
        rank: of the changes of the published decoder (pages/learner.py); 0 for the small LLaVA.
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
    rank: int = 0

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

    def learner(self) -> Learner:
        """The model that is trained.

        Raises:
            FileNotFoundError: the published decoder is not installed.
        """
        dtype = jnp.dtype(self.dtype)
        if self.rank:
            return PageLearner(self.vision, self.rank, dtype)
        return SmallLearner(self.vision, self.text, dtype)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the shapes of all that is learned depend on."""
        return self.vision, self.text, self.rank

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
        state: {"learned": the learner's tree, "optimizer": its own}.
    """

    recipe: Recipe
    step: int = 0
    state: dict[str, Any] = field(init=False)

    def __post_init__(self):
        recipe = self.recipe
        self.learner = recipe.learner()
        self.processor = self.learner.processor
        self.optimizer = recipe.optimizer()
        self._programs = cache(self._compiled)
        learned = self.learner.initial(recipe.seed)
        self.state = {"learned": learned, "optimizer": self.optimizer.init(learned)}

    def batch(self, step: int) -> Batch:
        """The pictures and questions of a step: the same in every run."""
        return self._draw(self.recipe.stage(step), step, "train")[1]

    def _draw(self, stage: Stage, step: int, split: str) -> tuple[list[list[tasks.Item]], Batch]:
        """The questions of each picture, and their batch."""
        rng = np.random.default_rng((self.recipe.seed, step, tasks.SPLITS.index(split)))
        groups = self.learner.draw(stage, rng, split)
        batch = pack(
            groups,
            self.processor,
            blanks=stage.blanks,
            rng=rng if stage.blanks < 1 else None,
            dialogue=self.learner.dialogue,
            round_to=self.learner.round_to,
        )
        return groups, batch

    def _of(self, stage: Stage) -> tuple[Any, Any]:
        """The programs of a stage."""
        return self._programs(stage.sight, stage.answers, stage.frozen)

    def _compiled(self, sight: bool, answers: bool, frozen: str | None) -> tuple[Any, Any]:
        """One step, and the scores of a batch, compiled."""
        learner = self.learner
        loss = make_loss(learner.config, learner.bind, sight=sight, answers=answers)
        step = jax.jit(partial(_advance, loss, self.optimizer, frozen), donate_argnums=0)

        def scores(learned: Any, fixed: Any, batch: Batch) -> Scores:
            return loss(learned, fixed, batch, Weights())[1]

        return step, jax.jit(scores)

    def advance(self, batch: Batch) -> Scores:
        """Do one step."""
        stage = self.recipe.stage(self.step)
        weights = Weights(
            jnp.float32(stage.glyph_weight),
            jnp.float32(stage.guide_weight),
            jnp.float32(stage.noise),
            jnp.int32(self.step),
        )
        step, _ = self._of(stage)
        self.state, scores = step(self.state, self.learner.fixed, batch, weights)
        self.step += 1
        return scores

    def held_out(self, count: int) -> dict[str, float]:
        """Share of answers that are right to the last token, for each task of the stage.

        The pictures, `count` batches, are like the stage's, of seeds that are never trained on.
        """
        stage = self.recipe.stage(self.step - 1)
        right, asked = dict.fromkeys(stage.tasks, 0), dict.fromkeys(stage.tasks, 0)
        _, test = self._of(stage)
        for index in range(count):
            groups, batch = self._draw(stage, index, "test")
            scores = test(self.state["learned"], self.learner.fixed, batch)
            for p, group in enumerate(groups):
                for q, item in enumerate(group):
                    right[item.task] += int(scores.exact[p, q])
                    asked[item.task] += int(scores.asked[p, q])
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
        self.learner.export(folder / "model", self.state["learned"])

    def restore(self, folder: Path) -> bool:
        """Go on from the newest state of a folder; False where there is none."""
        found = self._newest(folder)
        if found is not None:
            self.step, self.state = found
        return found is not None

    def take(self, part: str, folder: Path) -> None:
        """Begin with what another run has learned of a part, a key of the learned tree.

        Args:
            part: the key.
            folder: of the run, or of the model that it has exported.

        Raises:
            ValueError: there is no such part, or no run or model of the same shapes.
        """
        check_known("part", [part], self.state["learned"])
        if (folder / "config.json").is_file():
            self._take(part, self.learner.read(folder))
            return
        if not (folder / RECIPE).is_file():
            raise ValueError(f"{folder} is no folder of a run: train it first")
        if Recipe.read(folder / RECIPE).shape != self.recipe.shape:
            raise ValueError(f"the model of {folder} has another shape: take one of the same")
        found = self._newest(folder)
        if found is None:
            raise ValueError(f"{folder} has no state yet: let it save one")
        self._take(part, found[1]["learned"])

    def _take(self, part: str, learned: Any) -> None:
        self.state["learned"][part] = learned[part]
        # Each is donated: none may be shared, as equal ones of a checkpoint are.
        self.state = jax.tree.map(jnp.array, self.state)

    def begin(self, step: int) -> None:
        """Go on from a step with what was taken; the optimizer has no moments of it.

        Raises:
            ValueError: the recipe has no such step.
        """
        if not 0 <= step < self.recipe.steps:
            raise ValueError(f"step {step}: the recipe has those from 0 to {self.recipe.steps - 1}")
        self.step = step
        state = optax.tree.set(self.state["optimizer"], count=jnp.int32(step))
        self.state["optimizer"] = jax.tree.map(jnp.array, state)  # each is donated: none is shared

    def _newest(self, folder: Path) -> tuple[int, Any] | None:
        """The step and the state that a folder's run was saved at last."""
        found = sorted(path for path in (folder / "state").glob("[0-9]*") if path.name.isdigit())
        if not found:
            return None
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(found[-1].resolve(), self.state)
        return int(found[-1].name), state


def _advance(
    loss: Any,
    optimizer: Any,
    frozen: str | None,
    state: Any,
    fixed: Any,
    batch: Batch,
    weights: Weights,
) -> tuple[Any, Scores]:
    learned = state["learned"]

    def without_frozen(tree: Any) -> Any:
        return {
            part: jax.tree.map(jnp.zeros_like, of) if part == frozen else of
            for part, of in tree.items()
        }

    gradient, scores = jax.grad(loss, has_aux=True)(learned, fixed, batch, weights)
    updates, moments = optimizer.update(without_frozen(gradient), state["optimizer"], learned)
    updates = without_frozen(updates)  # which decays weights, too
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
    take: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART=RUN",
            help="Begin with a part that another run has learned, such as eyes=RUN; the folder of "
            "a model will do.",
        ),
    ] = None,
    begin: Annotated[
        int, typer.Option(help="The step that this run begins at, where those before are taken.")
    ] = 0,
) -> None:
    """Train, or go on with a training that was cut off."""
    errors = Console(stderr=True, highlight=False)
    programs.keep_programs()
    with bad_input():
        what = Recipe.read(recipe)
        trainer = Trainer(what)
        for pair in take or ():
            part, _, run = pair.partition("=")
            trainer.take(part, Path(run))
        trainer.begin(begin)
    kept = out / RECIPE
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
