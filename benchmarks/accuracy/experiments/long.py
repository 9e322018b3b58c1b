"""Long outputs: whether the kept tokens stay right while a conversation goes on behind them.

The answers of the tasks are short, so that a long output is a conversation: the cache is compressed
behind the first question about a picture, other questions about it follow, and at last the first
one again. No question but the first was there to be looked at when the tokens were chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.accuracy.budgets import Bench, Refused, tile_of
from benchmarks.accuracy.evaluate import TOKEN_STEP, WHOLE, Cell, Evaluation
from benchmarks.accuracy.experiments.common import Experiment, methods_of
from benchmarks.accuracy.experiments.conversation import (
    Conversation,
    Script,
    Talk,
    TurnOracle,
    talk,
)
from benchmarks.accuracy.metrics import score
from benchmarks.accuracy.packing import MARK, render
from benchmarks.accuracy.report import FULL, Result, both, budget_of, per_cent, scored, told
from benchmarks.accuracy.scoring import facts_of, nested, rounded
from benchmarks.accuracy.tasks import Item, questions_of_one_picture
from benchmarks.documents import panels, table
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.state import round_up
from vlcache_jax.vlm import VLM

ORACLES = {"oracle, first answer": True, "oracle, all answers": False}
"""Whether they know the attention of the first answer alone."""

TURNS = {"document": 12, "reading": 8}
"""Different questions that are asked: for 300 tokens and more, where pictures have so many."""

LOOKED_AT = 200
"""Pictures that are looked at, at most, for each that is taken."""

Dialogue = list[Item]
"""Items of one picture, a turn each."""


@dataclass(frozen=True)
class Spoken:
    """What a method said. n pictures, J turns.

    Attributes:
        answers: texts, [n][J].
        recall: share of the full cache's attention to the prompt, while it gives the same answer,
            that goes to kept tokens, float32 [n, J]; not a number where that answer has no words.
    """

    answers: list[list[str]]
    recall: np.ndarray


def run(bench: Bench) -> Result:
    """Scores and kept attention by turn, for all methods and oracles.

    Raises:
        Refused: a task has too few questions about a picture.
    """
    cells = bench.cells(
        lambda budget: (
            methods_of(budget)
            | {
                name: TurnOracle(budget, first_only=first_only)
                for name, first_only in ORACLES.items()
            }
        )
    )
    chosen = {task: dialogues(bench, task) for task in bench.plan.tasks}
    result: Result = {"turns": {}, "looked_at": {}, "before": {}, "details": {}}
    for task, (pictures, looked_at) in chosen.items():
        result["turns"][task] = len(pictures[0]) - 1
        advance = bench.begin(task, len(pictures))
        spoken, before = converse(bench.evaluation, pictures, cells, advance)
        right = [[item.answer for item in items] for items in pictures]
        result["looked_at"][task] = looked_at
        result["before"][task] = rounded(before)
        result["details"][task] = _facts(task, spoken, right)
    return result


def dialogues(bench: Bench, task: str) -> tuple[list[Dialogue], int]:
    """Pictures on which as many different questions as asked for can be asked.

    The first question is asked again at last. A question that was asked before could be answered
    from the conversation, so that no other one is.

    Returns:
        The dialogues, and how many pictures were looked at to find them.

    Raises:
        Refused: such pictures are too rare.
    """
    plan, found = bench.plan, []
    turns = bench.turns or TURNS[task]
    for looked_at in range(1, LOOKED_AT * plan.n + 1):
        items = questions_of_one_picture(
            task, plan.seed + looked_at - 1, turns, split=plan.split, variant="plain",
            manner="brief", tile=tile_of(bench.vlm),
        )  # fmt: skip
        if len({(item.answer, item.evidence) for item in items}) == turns:
            found.append([*items, items[0]])
        if len(found) == plan.n:
            return found, looked_at
    raise Refused(
        f"of {LOOKED_AT * plan.n} pictures of {task}, {len(found)} have {turns} different "
        "questions: ask fewer with --turns"
    )


def converse(
    evaluation: Evaluation,
    pictures: Sequence[Dialogue],
    cells: Mapping[Cell, CacheMethod],
    advance: Callable[[int], object] = lambda done: None,
) -> tuple[dict[Cell, Spoken], np.ndarray]:
    """Hold the dialogues behind each method's cache.

    Args:
        evaluation: the model.
        pictures: dialogues of the same number of turns, with pictures of the same size.
        cells: the methods.
        advance: called with the number of dialogues done at a time.

    Returns:
        What each method said, the full cache among them; and how many tokens stand between the
        prompt and the first word of each answer, and behind the last answer, the mean of the full
        cache's dialogues, [J + 1].

    Raises:
        ValueError: a dialogue is longer than the model's positions.
    """
    vlm, turns = evaluation.vlm, len(pictures[0])
    way, script = _plan(vlm, pictures)
    hold, attend = partial(talk, evaluation, way), partial(evaluation.do, way, "attend", vlm.params)
    answers: dict[Cell, list[list[str]]] = {cell: [[]] * len(pictures) for cell in (WHOLE, *cells)}
    recall = {cell: np.zeros((len(pictures), turns), np.float32) for cell in answers}
    before = np.zeros((len(pictures), turns + 1))
    for rows, inputs in evaluation.batches([items[0] for items in pictures], way.rows):
        own = Script(*(part[rows] for part in script))
        for cell, said, shares in evaluation.compare(way, inputs, cells, (own,), hold, attend):
            said = Talk(*said)
            if cell == WHOLE:
                shares = np.where(said.end > said.begin, 1.0, np.nan).T
                before[rows] = np.column_stack([said.begin, said.end[:, -1]])
            recall[cell][rows] = shares.T
            for lane, row in enumerate(rows.tolist()):
                answers[cell][row] = list(map(vlm.processor.decode, said.answers(lane)))
        advance(np.unique(rows).size)
    return {cell: Spoken(answers[cell], recall[cell]) for cell in answers}, before.mean(axis=0)


def _plan(vlm: VLM, pictures: Sequence[Dialogue]) -> tuple[Conversation, Script]:
    """The conversation's shape, and what its users say."""
    turns = len(pictures[0])

    def ids_of(text: str) -> list[int]:
        return vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def asked(item: Item) -> list[int]:
        return ids_of(render(replace(item, prompt=item.prompt.replace(MARK, ""))))

    said = [[asked(item) for item in items[1:]] for items in pictures]
    lengths = np.array([[0, *map(len, each)] for each in said], np.int32)
    ends = np.cumsum(lengths, axis=1, dtype=np.int32)
    tokens = np.zeros((len(pictures), max(1, int(ends.max()))), np.int32)
    for row, each in enumerate(said):
        tokens[row, : ends[row, -1]] = [token for ids in each for token in ids]
    longest = max(len(ids_of(item.answer)) for items in pictures for item in items)
    limit = round_up(longest + 1, TOKEN_STEP)
    rows = round_up(tokens.shape[1] + turns * (limit + 1), 16)
    end = vlm.processor.eos_token_id
    end = vlm.stop_ids[0] if end is None else end
    way = Conversation(
        vlm.config, vlm.backend, stop_ids=vlm.stop_ids, rows=rows, end=end, limit=limit
    )
    return way, Script(tokens, ends)


def _facts(
    task: str, spoken: Mapping[Cell, Spoken], right: Sequence[Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """{label: {budget: facts}}: of each of the "turns", and of the mean of all "follow_ups"."""
    turns = range(len(right[0]))
    scores = {
        cell: np.stack(
            [
                score(task, [said[turn] for said in own.answers], [each[turn] for each in right])
                for turn in turns
            ],
            axis=1,
        )
        for cell, own in spoken.items()
    }  # [n, J]

    def facts(cell: Cell, columns: Sequence[int]) -> dict[str, Any]:
        own, full = (scores[each][:, columns].mean(1) for each in (cell, WHOLE))
        shares = spoken[cell].recall[:, columns]
        there = shares[~np.isnan(shares)]
        recall = rounded(there.mean()) if there.size else None
        return {**facts_of(own, full), "answer_recall": recall}

    return nested(
        {
            cell: {
                "turns": [facts(cell, [turn]) for turn in turns],
                "follow_ups": facts(cell, turns[1:-1]),
            }
            for cell in spoken
        }
    )


def section(result: Result) -> str:
    """The part of docs/accuracy.md."""
    parts, shown = [], result["budgets"][0]
    for task, of_task in result["details"].items():
        before = result["before"][task]

        def facts(budget: str, of_task: Result = of_task) -> dict[str, Any]:
            return {label: of.get(budget) or of["1.0"] for label, of in of_task.items()}

        for budget in result["budgets"]:
            rows = []
            for label, of in facts(budget).items():
                three = [of["turns"][0], of["follow_ups"], of["turns"][-1]]
                cells = map(scored if label == FULL else both, three)
                rows.append([label, *cells, *map(_recall, three)])
            kinds = ("first", "others", "first again")
            head = ["method", *kinds, *(f"attention kept, {kind}" for kind in kinds)]
            parts += [f"**{task}** at {budget_of(budget)}", table(head, rows)]
        rows = [
            [label, *(f"{per_cent(each['score'])}; {_recall(each)}" for each in of["turns"])]
            for label, of in facts(shown).items()
        ]
        head = [f"{turn} ({tokens:.0f})" for turn, tokens in enumerate(before[:-1], 1)]
        parts += [
            f"**{task}** at {budget_of(shown)} by turn, with the tokens in front of the answer in "
            f"brackets; {before[-1]:.0f} in all. Each cell has the score, and the share of the "
            "attention that is kept.",
            table(["method", *head], rows),
        ]
    found = ", ".join(
        f"{turns} of {task} (pictures looked at: {result['looked_at'][task]:,})"
        for task, turns in result["turns"].items()
    )
    return told(
        result,
        "The cache is compressed behind the first question. The others are asked one after "
        "the other behind the compressed cache, each when the answer before it is there, and "
        "at last the first one again. Questions are forced, answers are greedy, and both are "
        "kept. 'others' is the mean of all questions but the first. An answer to the first "
        "one again can also be copied from the conversation. The attention kept is "
        "the share of what the full cache's answer to that question pays to the prompt. "
        "Conversations of so many turns are longer than those of the training: compare with "
        "the full cache. One oracle knows what the first answer attends to, the other what "
        "all of them do. Each cell has the score, and the difference to the full cache.",
        *parts,
        items=f"{result['n']:,} pictures of each task, the first of the split `{result['split']}` "
        f"from seed {result['seed']} on that have enough different questions, {found}",
    )


def _recall(facts: dict[str, Any]) -> str:
    return "-" if facts["answer_recall"] is None else per_cent(facts["answer_recall"])


def draw(result: Result) -> Any:
    """Scores and kept attention by the tokens in front of the answer."""
    budget, details = result["budgets"][0], result["details"]
    figure, grid = panels(4.2 * len(details), 6, 2, len(details), sharey="row")
    for column, (task, of_task) in enumerate(details.items()):
        x = result["before"][task][:-1]
        for label, of in of_task.items():
            turns = (of.get(budget) or of["1.0"])["turns"]
            style = {"label": label, "marker": ".", "linestyle": "--" if "oracle" in label else "-"}
            grid[0, column].plot(x, [each["score"] for each in turns], **style)
            shares = [each["answer_recall"] for each in turns]
            there = [(place, share) for place, share in zip(x, shares, strict=True)
                     if share is not None]  # fmt: skip
            grid[1, column].plot(*(zip(*there, strict=True) if there else ([], [])), **style)
        grid[0, column].set(title=f"{task} at {budget_of(budget)}", ylim=(0, 1.03))
        grid[1, column].set(xlabel="tokens in front of the answer", ylim=(0, 1.03))
    grid[0, 0].set_ylabel("score")
    grid[1, 0].set_ylabel("share of the attention kept")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


LONG = Experiment(
    "Conversations of hundreds of tokens behind a cache that was compressed at the first "
    "question: do the kept tokens stay right?",
    budgets=(0.1, 0.2),
    section=section,
    draw=draw,
    run=run,
)
