"""Many questions about one picture: by a session, by new prefills, behind one compression.

A session keeps the picture's keys and values and chooses anew for each question; a new prefill does
the same at the price of the whole prompt. What was compressed for the first question alone is asked
the others too.
"""

import numpy as np

from benchmarks.accuracy.budgets import Bench
from benchmarks.accuracy.evaluate import Cell
from benchmarks.accuracy.experiments.common import Experiment
from benchmarks.accuracy.experiments.long import converse, dialogues
from benchmarks.accuracy.metrics import score
from benchmarks.accuracy.packing import MARK
from benchmarks.accuracy.report import FULL, Result, both, budget_of, told
from benchmarks.accuracy.scoring import facts_of, nested
from benchmarks.documents import table
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import DEFAULT_METHOD, VLCache, make_method

WAYS = ("a session", "new prefills", "one compression")
SHOWN = (DEFAULT_METHOD, VLCache.name, "snapkv")
NEW_TOKENS = 24


def methods(budget: float) -> dict[str, CacheMethod]:
    """Those that are run."""
    return {name: make_method(name, budget) for name in SHOWN}


def run(bench: Bench) -> Result:
    """Scores of all questions but a picture's first, in each of the `WAYS`.

    Raises:
        Refused: a task has too few questions about a picture.
    """
    cells = bench.cells(methods)
    chosen = {task: dialogues(bench, task) for task in bench.plan.tasks}
    result: Result = {"turns": {}, "looked_at": {}, "same": {}, "details": {}}
    for task, (found, looked_at) in chosen.items():
        pictures = [items[:-1] for items in found]  # the last asks the first one's again
        result["turns"][task], result["looked_at"][task] = len(pictures[0]), looked_at
        advance = bench.begin(task, 2 * len(pictures))
        answers: dict[Cell, dict[str, list[str]]] = {
            cell: {way: [] for way in WAYS} for cell in ((FULL, "1.0"), *cells)
        }
        for done, items in enumerate(pictures):
            [first, *_] = items
            session = bench.vlm.session([*first.images], cache=DEFAULT_METHOD)
            for item in items[1:]:
                text = item.prompt.replace(MARK, "").strip()
                for cell, said in answers.items():
                    asked = {"cache": cells.get(cell, FULL), "max_new_tokens": NEW_TOKENS}
                    said[WAYS[0]].append(session.fork().ask(text, **asked).text)
                    new = bench.vlm.generate([*first.images], text, **asked)
                    said[WAYS[1]].append(new.text)
            advance(done + 1)
        pairs = [[items[0], item] for items in pictures for item in items[1:]]
        spoken, _ = converse(bench.evaluation, pairs, cells)
        for cell, said in answers.items():
            said[WAYS[2]] = [turns[1] for turns in spoken[cell].answers]
        advance(2 * len(pictures))
        right = [item.answer for items in pictures for item in items[1:]]
        scores = {
            way: {cell: score(task, said[way], right) for cell, said in answers.items()}
            for way in WAYS
        }
        full = scores[WAYS[1]][FULL, "1.0"]
        result["details"][task] = {
            way: nested({cell: facts_of(own, full) for cell, own in of_way.items()})
            for way, of_way in scores.items()
        }
        result["same"][task] = nested(
            {
                cell: float(np.mean(np.equal(said[WAYS[0]], said[WAYS[1]])))
                for cell, said in answers.items()
            }
        )
    return result


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    parts = []
    for task, of_task in result["details"].items():
        rows = []
        for label, budgets in of_task[WAYS[0]].items():
            for budget in budgets:
                cells = [both(of_task[way][label][budget]) for way in WAYS]
                same = f"{100 * result['same'][task][label][budget]:.1f}"
                rows.append([label, budget_of(budget), *cells, same])
        head = ["method", "budget", *WAYS, "the same answer"]
        parts += [f"**{task}**, {result['turns'][task]} questions a picture", table(head, rows)]
    return told(
        result,
        "Of each picture all questions but the first are counted: by a session, which keeps the "
        "picture's keys and values and chooses anew for each question; by a new prefill for each; "
        "and behind the cache that was compressed for the first question and its answer. The last "
        "column has the share of questions with the same answer by a session as by a new prefill. "
        "Each cell has the score, and the difference to the full cache's new prefills.",
        *parts,
        items=items_of(result),
    )


def items_of(result: Result) -> str:
    """Which pictures."""
    looked = ", ".join(f"{count:,} of {task}" for task, count in result["looked_at"].items())
    return (
        f"{result['n']} pictures of each task, the first of the split `{result['split']}` from "
        f"seed {result['seed']} on that have enough different questions (looked at: {looked})"
    )


QUESTIONS = Experiment(
    "Many questions about one picture: a session, new prefills, one compression for all.",
    budgets=(0.1, 0.2),
    section=section,
    run=run,
)
