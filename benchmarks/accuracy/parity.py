"""The same answers in transformers: `python -m benchmarks.accuracy.parity`.

The same checkpoint and the same items, with the full cache: greedily by Hugging Face's own model on
torch, one prompt at a time and in float32, by `VLM.generate` in float32, and by `VLM.generate` as
the checkpoint is shipped. The first two must agree token by token. Needs torch.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from benchmarks.accuracy import options
from benchmarks.accuracy.budgets import Plan, tile_of
from benchmarks.accuracy.metrics import mean_interval, score
from benchmarks.accuracy.packing import prompt_of
from benchmarks.accuracy.report import RESULTS, per_cent
from benchmarks.accuracy.scoring import plain, rows_by_task
from benchmarks.accuracy.tasks import Item
from benchmarks.command import AsJson, Force, Out, bad_input, check_out, counting_bar, finish
from benchmarks.documents import Part, measured, table
from benchmarks.environment import environment
from vlcache_jax.vlm import VLM

HUGGING_FACE = "transformers, float32"
OURS = "vlcache-jax, float32"
SHIPPED = "vlcache-jax, as shipped"

GROUP = 8
"""Prompts that are answered at a time."""

Advance = Callable[[int], object]
Answers = list[tuple[list[int], str]]
"""Tokens and text of each item's answer."""


def hugging_face_answers(
    path: Path,
    items: Sequence[Item],
    prompts: Sequence[str],
    stop_ids: Sequence[int],
    most: int,
    advance: Advance,
) -> Answers:
    """Greedy answers of transformers' own model, in float32, one prompt at a time.

    Args as of `our_answers`; the checkpoint is a LLaVA-NeXT in Hugging Face's format.

    Raises:
        ModuleNotFoundError: there is no torch.
    """
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    files: Any = LlavaNextProcessor.from_pretrained(path, backend="pil")
    found = []
    for item, text in zip(items, prompts, strict=True):
        inputs = files(images=list(item.images), text=text, return_tensors="pt")
        whole = model.eval().generate(
            **inputs, max_new_tokens=most, do_sample=False, eos_token_id=list(stop_ids),
            pad_token_id=files.tokenizer.pad_token_id,
        )  # fmt: skip
        drawn = whole[0, inputs["input_ids"].shape[1] :].tolist()
        ids = list(itertools.takewhile(lambda token: token not in stop_ids, drawn))
        found.append((ids, files.tokenizer.decode(ids, skip_special_tokens=True)))
        advance(1)
    return found


def our_answers(
    vlm: VLM, items: Sequence[Item], prompts: Sequence[str], most: int, advance: Advance
) -> Answers:
    """The same by `VLM.generate`, which `vlcache generate` calls, with the full cache.

    `prompts` are raw, one to each item. At most `most` tokens; `advance` is called with the
    number of items done at a time.
    """
    found: Answers = []
    for at in range(0, len(items), GROUP):
        group = items[at : at + GROUP]
        images = [list(item.images) for item in group]
        texts = list(prompts[at : at + GROUP])
        answers = vlm.generate(images, texts, raw_prompt=True, max_new_tokens=most)
        found += [(answer.tokens, answer.text) for answer in answers]
        advance(len(group))
    return found


def compare(
    items: Sequence[Item], prompts: Sequence[str], answers: Mapping[str, Answers]
) -> dict[str, Any]:
    """What a result file says of the answers of each side."""

    def interval(own: Answers, task: str, rows: list[int]) -> dict[str, float]:
        texts, right = [own[row][1] for row in rows], [items[row].answer for row in rows]
        return plain(mean_interval(score(task, texts, right)))

    theirs = answers[HUGGING_FACE]
    return {
        "same_tokens": {
            side: sum(a[0] == b[0] for a, b in zip(own, theirs, strict=True))
            for side, own in answers.items()
        },
        "scores": {
            task: {side: interval(own, task, rows) for side, own in answers.items()}
            for task, rows in rows_by_task(items).items()
        },
        "rows": [
            {
                "task": item.task,
                "prompt": prompts[row],
                "right": item.answer,
                "answers": {side: own[row][1] for side, own in answers.items()},
            }
            for row, item in enumerate(items)
        ],
    }


@measured
def parity_part(result: dict[str, Any]) -> str:
    """The part of docs/accuracy.md."""
    count = len(result["rows"])
    rows = (
        [side, f"{same} of {count}",
         *(per_cent(of[side]["mean"]) for of in result["scores"].values())]
        for side, same in result["same_tokens"].items()
    )  # fmt: skip
    head = ["full cache", "same tokens as transformers", *result["scores"]]
    return (
        f"{result['n']} items of each task, split `{result['split']}`, with transformers "
        f"{result['transformers']} and torch {result['torch']}; scores in %:\n\n"
        f"{table(head, rows)}"
    )


SECTION = Part("parity", parity_part, (RESULTS / "parity.json",))


def main(
    model: options.Model = "demo-small",
    tasks: options.Tasks = "document,reading",
    n: options.Items = 32,
    seed: options.Seed = 0,
    split: options.Split = "report",
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Ask the same LLaVA-NeXT the same questions by transformers and by this package.

    Exits with 1 if an answer in float32 differs by a single token.

    Example: python -m benchmarks.accuracy.parity --n 8
    """
    check_out(out, force=force)
    errors = Console(stderr=True, highlight=False)
    with errors.status("loading ..."), bad_input():
        import vlcache_jax
        from vlcache_jax.checkpoints.find import resolve

        path = resolve(model)
        plan = Plan(options.names(tasks), (), (1.0,), (), n, seed, split)
        try:
            torch, transformers = map(metadata.version, ("torch", "transformers"))
        except metadata.PackageNotFoundError:
            raise ValueError("this needs torch: pip install torch") from None
        exact, shipped = vlcache_jax.load(path, "float32"), vlcache_jax.load(path)
        if exact.config.family != "llava_next":
            raise ValueError(f"{model} is no LLaVA-NeXT model")
    items = plan.items(tile_of(exact))
    prompts = [prompt_of(item, exact.processor) for item in items]
    tokenizer = exact.processor.tokenizer
    most = 1 + max(len(tokenizer(item.answer).input_ids) for item in items)
    began = time.perf_counter()
    answers = {}
    with counting_bar(errors) as bar:
        for side, ask in (
            (HUGGING_FACE, partial(hugging_face_answers, path, items, prompts, exact.stop_ids)),
            (OURS, partial(our_answers, exact, items, prompts)),
            (SHIPPED, partial(our_answers, shipped, items, prompts)),
        ):
            task = bar.add_task(side, total=len(items))
            answers[side] = ask(most, lambda done, task=task: bar.advance(task, done))
    result = {
        **environment(), "torch": torch, "transformers": transformers, "model": model, "n": n,
        "seed": seed, "split": split, **compare(items, prompts, answers),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    finish(result, parity_part(result), as_json=as_json, out=out)
    raise typer.Exit(0 if result["same_tokens"][OURS] == len(items) else 1)


if __name__ == "__main__":
    typer.run(main)
