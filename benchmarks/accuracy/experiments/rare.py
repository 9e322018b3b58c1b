"""Rare against frequent glyphs: are letters lost sooner than digits?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy.budgets import Bench, Refused
from benchmarks.accuracy.evaluate import WHOLE, Cell, Outcome
from benchmarks.accuracy.experiments.common import Experiment, methods_of
from benchmarks.accuracy.glyphs import DIGITS, LETTERS
from benchmarks.accuracy.metrics import score
from benchmarks.accuracy.report import FULL, Result, by_kind, told
from benchmarks.accuracy.scoring import facts_of, nested
from benchmarks.accuracy.tasks import Item

TASK = "document"  # of all tasks its values alone have letters and digits
CLASSES = {"digits alone": False, "with letters": True}
GLYPHS = {"digit": DIGITS, "letter": LETTERS}
TOLD = {
    "values": "ANLS of the values",
    "characters": "Characters that stand at their place, the mean of the answers' shares; the "
    "first one of an answer, which is predicted before anything is compressed, is left out",
}


def run(bench: Bench) -> Result:
    """Scores of the two kinds of values, and how many of each kind of glyph are right.

    Raises:
        Refused: another task is among those to be run.
    """
    if bench.plan.tasks != (TASK,):
        raise Refused(f"only values of {TASK} have letters and digits: leave other tasks out")
    items = bench.items()
    return split_by_class(items, bench.run(items, bench.cells(methods_of), "methods"))


def split_by_class(items: Sequence[Item], outcomes: Mapping[Cell, Outcome]) -> Result:
    """The outcomes by what the values are made of; classes without an item are left out.

    Returns:
        "values" {class: {label: {budget: facts}}}, "characters" likewise of the mean share of an
        answer's characters that stand at their place, see `in_place`, and "glyphs", how often each
        is in the right answers: {class: {"glyphs", "characters"}}.
    """
    right = [item.answer for item in items]
    lettered = np.array([not set(answer) <= set(DIGITS) for answer in right])
    scores = {cell: score(TASK, outcome.answers, right) for cell, outcome in outcomes.items()}

    def facts(scores: Mapping[Cell, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
        full = scores[WHOLE][chosen]
        return nested({cell: facts_of(own[chosen], full) for cell, own in scores.items()})

    def placed(answers: Sequence[str], glyphs: str) -> np.ndarray:
        return np.array([in_place(*pair, glyphs) for pair in zip(answers, right, strict=True)])

    values, characters = {}, {}
    for name, has_letters in CLASSES.items():
        chosen = lettered == has_letters
        if chosen.any():
            values[name] = facts(scores, chosen)
    for name, glyphs in GLYPHS.items():
        chosen = np.array([bool(set(answer[1:]) & set(glyphs)) for answer in right])
        if chosen.any():
            found = {cell: placed(outcome.answers, glyphs) for cell, outcome in outcomes.items()}
            characters[name] = facts(found, chosen)
    counts = {
        name: {
            "glyphs": len(glyphs),
            "characters": sum(answer.count(glyph) for answer in right for glyph in glyphs),
        }
        for name, glyphs in GLYPHS.items()
    }
    return {"values": values, "characters": characters, "glyphs": counts}


def in_place(answer: str, right: str, glyphs: str) -> float:
    """Share of the right answer's characters among `glyphs` that the answer has at their place.

    The first one is left out: the prompt itself predicts it, before anything is compressed. Where
    there is no other: 0, which is not counted.
    """
    places = [place for place, glyph in enumerate(right) if place and glyph in glyphs]
    return sum(answer[place : place + 1] == right[place] for place in places) / max(len(places), 1)


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    parts = []
    for kind, what in TOLD.items():
        sizes = {f"{name} (n = {of[FULL]['1.0']['n']})": of for name, of in result[kind].items()}
        parts += [f"{what}:", by_kind(sizes, result["budgets"])]
    rates = {
        name: counts["characters"] / counts["glyphs"] for name, counts in result["glyphs"].items()
    }
    often = f"{rates['digit'] / rates['letter']:.1f}" if rates["letter"] else "many"
    return told(
        result,
        "Half of the values are digits alone, so that in the answers of these items, as in the "
        f"training, a digit stands {often} times as often as a letter. Each cell has the "
        "score, and the difference to the full cache on the same items.",
        *parts,
    )


RARE = Experiment(
    "Values of digits alone against values with letters, which are rarer: what is lost first?",
    budgets=(0.05, 0.1),
    section=section,
    tasks=(TASK,),
    run=run,
)
