"""The same answers in transformers: `python -m benchmarks.accuracy.parity`.

The same checkpoint and the same items, with the full cache: greedily by Hugging Face's own model on
torch, one prompt at a time and in float32, by `VLM.generate` in float32, and by `VLM.generate` as
the checkpoint is shipped. The first two must agree token by token. Needs torch.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.accuracy.budgets import Plan, tile_of
from benchmarks.accuracy.metrics import METRICS, mean_interval, score
from benchmarks.accuracy.options import Force, Seed, Split, check_json, names
from benchmarks.accuracy.packing import render
from benchmarks.accuracy.report import RESULTS, Section, per_cent
from benchmarks.accuracy.scoring import interval
from benchmarks.accuracy.tasks import TASKS, Item
from benchmarks.command import bad_input, counting_bar
from benchmarks.documents import NOT_MEASURED, table
from benchmarks.environment import environment, write_result
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
    path: Path, items: Sequence[Item], stop_ids: Sequence[int], most: int, advance: Advance
) -> Answers:
    """Greedy answers of transformers' own model, in float32, one prompt at a time.

    Args:
        path: a LLaVA-NeXT checkpoint in Hugging Face's format.
        items: what is asked.
        stop_ids: tokens that end an answer.
        most: most tokens of an answer.
        advance: called with the number of items done at a time.

    Raises:
        ModuleNotFoundError: there is no torch.
    """
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    model.eval()
    files: Any = LlavaNextProcessor.from_pretrained(path, backend="pil")
    found = []
    for item in items:
        inputs = files(images=list(item.images), text=render(item), return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(
                **inputs, max_new_tokens=most, do_sample=False, eos_token_id=list(stop_ids),
                pad_token_id=files.tokenizer.pad_token_id,
            )  # fmt: skip
        drawn = whole[0, inputs["input_ids"].shape[1] :].tolist()
        ids = list(itertools.takewhile(lambda token: token not in stop_ids, drawn))
        found.append((ids, files.tokenizer.decode(ids, skip_special_tokens=True)))
        advance(1)
    return found


def our_answers(vlm: VLM, items: Sequence[Item], most: int, advance: Advance) -> Answers:
    """Greedy answers with the full cache by `VLM.generate`, which `vlcache generate` calls.

    Args:
        vlm: the model.
        items: what is asked.
        most: most tokens of an answer.
        advance: called with the number of items done at a time.
    """
    found: Answers = []
    for at in range(0, len(items), GROUP):
        group = items[at : at + GROUP]
        answers = vlm.generate(
            [list(item.images) for item in group],
            [render(item) for item in group],
            raw_prompt=True,
            max_new_tokens=most,
        )
        found += [(answer.tokens, answer.text) for answer in answers]
        advance(len(group))
    return found


def compare(items: Sequence[Item], answers: Mapping[str, Answers]) -> dict[str, Any]:
    """What a result file says of the answers of each side."""
    tasks = list(dict.fromkeys(item.task for item in items))
    theirs = answers[HUGGING_FACE]
    return {
        "same_tokens": {
            side: sum(a[0] == b[0] for a, b in zip(own, theirs, strict=True))
            for side, own in answers.items()
        },
        "scores": {
            task: {side: _score(task, items, own) for side, own in answers.items()}
            for task in tasks
        },
        "rows": [
            {
                "task": item.task,
                "prompt": render(item),
                "right": item.answer,
                "answers": {side: own[row][1] for side, own in answers.items()},
            }
            for row, item in enumerate(items)
        ],
    }


def _score(task: str, items: Sequence[Item], answers: Answers) -> dict[str, float]:
    pairs = [
        (text, item.answer)
        for item, (_, text) in zip(items, answers, strict=True)
        if item.task == task
    ]
    texts, right = zip(*pairs, strict=True)
    return interval(mean_interval(score(task, texts, right)[METRICS[task][0]]))


def parity_part(result: dict[str, Any] | None) -> str:
    """The part of docs/accuracy.md."""
    if result is None:
        return NOT_MEASURED
    sides, count = list(result["same_tokens"]), len(result["rows"])
    rows = (
        [side, f"{result['same_tokens'][side]} of {count}",
         *(per_cent(of[side]["mean"]) for of in result["scores"].values())]
        for side in sides
    )  # fmt: skip
    head = ["full cache", "same tokens as transformers", *result["scores"]]
    return (
        f"{result['n']} items of each task, split `{result['split']}`, with transformers "
        f"{result['transformers']} and torch {result['torch']}; scores in %:\n\n"
        f"{table(head, rows)}"
    )


SECTION = Section("parity", RESULTS / "parity.json", parity_part)


def main(
    model: Annotated[
        str, typer.Option(help="A LLaVA-NeXT directory, or 'demo' for the model in the package.")
    ] = "demo",
    tasks: Annotated[
        str, typer.Option(metavar="A,B", help=f"Some of {', '.join(TASKS)}.")
    ] = "document,reading",
    n: Annotated[int, typer.Option(min=1, help="Items of each task.")] = 32,
    seed: Seed = 0,
    split: Split = "report",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    force: Force = False,
) -> None:
    """Ask the same checkpoint the same questions by transformers and by this package.

    Exits with 1 if an answer in float32 differs by a single token.

    Example: python -m benchmarks.accuracy.parity --n 8
    """
    check_json(out, force=force)
    errors = Console(stderr=True, highlight=False)
    with errors.status("loading ..."), bad_input():
        import vlcache_jax
        from vlcache_jax.checkpoint import resolve

        path = resolve(model)
        plan = Plan(names(tasks), methods=(), budgets=(1.0,), extra=(), n=n, seed=seed, split=split)
        try:
            torch, transformers = map(metadata.version, ("torch", "transformers"))
        except metadata.PackageNotFoundError:
            raise ValueError("this needs torch: pip install torch") from None
        exact, shipped = vlcache_jax.load(path, "float32"), vlcache_jax.load(path)
        if exact.config.family != "llava_next":
            raise ValueError(f"{model} is no LLaVA-NeXT model")
    items = plan.items(tile_of(exact))
    tokenizer = exact.processor.tokenizer
    most = 1 + max(len(tokenizer(item.answer).input_ids) for item in items)
    began = time.perf_counter()
    with counting_bar(errors, transient=True) as bar:

        def side(name: str) -> Advance:
            task = bar.add_task(name, total=len(items))
            return lambda done: bar.advance(task, done)

        answers = {
            HUGGING_FACE: hugging_face_answers(
                path, items, exact.stop_ids, most, side(HUGGING_FACE)
            ),
            OURS: our_answers(exact, items, most, side(OURS)),
            SHIPPED: our_answers(shipped, items, most, side(SHIPPED)),
        }
    result = {
        **environment(), "torch": torch, "transformers": transformers, "model": model, "n": n,
        "seed": seed, "split": split, **compare(items, answers),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    if out is not None:
        write_result(out, result)
    if as_json:
        print(json.dumps(result))
    else:
        print(parity_part(result))
    raise typer.Exit(0 if result["same_tokens"][OURS] == len(items) else 1)


if __name__ == "__main__":
    typer.run(main)
