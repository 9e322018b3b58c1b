"""What the training needs to know of a model: its arrays, its questions, and its files."""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy import tasks
from benchmarks.accuracy.glyphs import CHARACTERS
from benchmarks.accuracy.loss import Bound, attend_patches
from benchmarks.accuracy.network import DIALOGUE, Dialogue, config_json, export, make_files
from vlcache_jax.models.families import bind, init_params
from vlcache_jax.models.llama import Attend, Residual
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.buckets import Buckets
from vlcache_jax.requests.processing import Processor

if TYPE_CHECKING:
    from benchmarks.accuracy.train import Stage


class Learner(ABC):
    """A model that is trained.

    Attributes:
        config_json: its `config.json`.
        files: its `transformers` processor.
        dialogue: how its chat is written.
        buckets: sizes that prefixes and tiles are padded to.
        round_to: segments and answers are padded to multiples of so many rows.
        fixed: arrays that do not change, in the type of the arithmetic.
    """

    config_json: dict[str, Any]
    files: Any
    dialogue: Dialogue
    buckets: Buckets
    round_to: int = 8
    fixed: Any = None

    @cached_property
    def config(self) -> LlavaConfig:
        """The model's shape."""
        return LlavaConfig.from_hf(self.config_json)

    @cached_property
    def processor(self) -> Processor:
        """Pictures and texts to arrays."""
        return Processor(self.config, self.files, self.buckets)

    @abstractmethod
    def initial(self, seed: int) -> Any:
        """What is learned, before it is: a tree of float32 arrays."""

    @abstractmethod
    def bind(self, learned: Any, fixed: Any) -> Bound:
        """The model inside a traced function."""

    @abstractmethod
    def draw(self, stage: "Stage", rng: np.random.Generator, split: str) -> list[list[tasks.Item]]:
        """The pictures of a step with the questions of each, all of one variant."""

    @abstractmethod
    def export(self, folder: Path, learned: Any) -> None:
        """Write the model, and replace the one that was there."""

    def read(self, folder: Path) -> Any:
        """What was learned of an exported model, like `initial`.

        Raises:
            ValueError: the model is another one.
            NotImplementedError: what was learned cannot be told from the model.
        """
        raise NotImplementedError(f"{folder} is a model: give the folder of its run")


class SmallLearner(Learner):
    """The small LLaVA, of which everything is learned.

    Args:
        vision: see `network.config_json`.
        text: likewise.
        dtype: type of the arithmetic.
    """

    dialogue = DIALOGUE
    # 352 for a whole picture, 704 for two of them.
    buckets = Buckets((64, 96, 128, 192, 256, 352, 704, 1408), (0, 5, 10, 20, 40, 80))

    def __init__(self, vision: dict[str, int], text: dict[str, int], dtype: Any):
        self.dtype = dtype
        self.files = make_files((*tasks.VOCABULARY_WORDS, "INST"))
        self.config_json = config_json(vision, text, len(self.files.tokenizer))
        self._bind = bind(self.config)

    def initial(self, seed: int) -> Any:
        """{"model": parameters, "glyphs": [classes + 1, D]}."""
        shape = len(CHARACTERS) + 1, self.config.text.hidden_size
        glyphs = 0.02 * jax.random.normal(jax.random.key(seed), shape)
        return {"model": init_params(self.config, seed), "glyphs": glyphs}

    def bind(self, learned: Any, fixed: Any) -> Bound:
        """The library's own modules, with a dense attention."""
        model = self._bind(jax.tree.map(lambda x: x.astype(self.dtype), learned["model"]))
        ideal = learned["glyphs"]

        def decode(rows: jax.Array, attend: Attend) -> tuple[jax.Array, jax.Array]:
            stream, guided = Residual(rows, None), []
            for layer in model.layers:
                stream, guide = layer(stream, attend, backend="xla")
                guided.append(guide)
            middle = len(guided) // 2
            guide = jnp.mean(jnp.stack(guided[max(middle - 1, 0) : middle + 1]))
            return stream.total(), guide

        return Bound(
            lambda tiles: model.visual_rows(tiles, attend_patches),
            ideal,
            lambda seen, ideal: seen @ ideal.T,
            ideal[-1],
            model.embed,
            decode,
            model.logits,
        )

    def draw(self, stage: "Stage", rng: np.random.Generator, split: str) -> list[list[tasks.Item]]:
        """Pictures of `tasks`; half as many where there are pairs."""
        variant, count = of_a_step(stage, rng)
        return [
            tasks.questions_of_one_picture(
                task,
                int(rng.integers(2**31)),
                1 if variant == "question first" else stage.questions,
                split=split,
                level=level_of(stage, rng),
                jitter=stage.jitter,
                variant=variant,
                manner=stage.manner,
            )
            for task in choose(rng, stage.tasks, count)
        ]

    def export(self, folder: Path, learned: Any) -> None:
        """Write a Hugging Face checkpoint in bfloat16."""
        export(folder, self.config_json, self.files, learned["model"], "bfloat16")


def choose(rng: np.random.Generator, weights: dict[str, float], count: int) -> list[str]:
    """So many keys, as often as their weights say."""
    values = np.array(list(weights.values()), float)
    return [str(name) for name in rng.choice(list(weights), count, p=values / values.sum())]


def of_a_step(stage: "Stage", rng: np.random.Generator) -> tuple[str, int]:
    """The variant of a step's items, and its pictures or pairs."""
    variant = choose(rng, stage.variants, 1)[0]
    count = stage.pictures // 2 if variant == "two pictures" else stage.pictures
    return variant, max(count, 1)


def level_of(stage: "Stage", rng: np.random.Generator) -> float:
    """The difficulty of a picture: the stage's of half of them, anywhere below of the others."""
    return stage.level if rng.random() < 0.5 else rng.uniform(0, stage.level)
