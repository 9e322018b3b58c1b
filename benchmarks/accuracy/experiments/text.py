"""Results as text: what the parts of docs/accuracy.md have in common."""

from collections.abc import Mapping, Sequence

from benchmarks.accuracy.report import Facts, Result, difference, items_of, per_cent, scored
from benchmarks.documents import table


def budget_of(text: str) -> str:
    """A budget as files write it, in per cent."""
    return f"{100 * float(text):g} %"


def change(interval: dict[str, float]) -> str:
    """A difference in points and its interval."""
    return difference({"difference": interval})


def both(facts: Facts) -> str:
    """A score in per cent, and its difference to the full cache in points."""
    return f"{per_cent(facts['score'])}; {difference(facts)}"


def full_cache(details: Result) -> str:
    """The full cache's scores in one sentence."""
    scores = [f"{scored(of_task['full']['1.0'])} in {task}" for task, of_task in details.items()]
    return f"The full cache scores {', '.join(scores)}."


def columns_of(result: Result) -> dict[str, tuple[str, str]]:
    """A column for each task and budget: its head, and the two."""
    return {
        f"{task}, {budget_of(budget)}": (task, budget)
        for task in result["details"]
        for budget in result["budgets"]
    }


def by_kind(kinds: Mapping[str, Result], budgets: Sequence[str]) -> str:
    """A table of {label: {budget: facts}} for each kind of items: one column each."""
    first, *_ = kinds.values()
    rows = [["full", "100 %", *(scored(of["full"]["1.0"]) for of in kinds.values())]]
    rows += [
        [name, budget_of(budget), *(both(of[name][budget]) for of in kinds.values())]
        for budget in budgets
        for name in first
        if name != "full"
    ]
    return table(["method", "budget", *kinds], rows)


def told(result: Result, *parts: str, items: str | None = None) -> str:
    """A part of the document: what was run, and what is said of it.

    Args:
        result: of the experiment.
        parts: paragraphs and tables.
        items: which items; `n` of each task, seeds after one another, by default.
    """
    metrics = ", ".join(
        f"{name.replace('_', '-')} of {task}" for task, name in result["metric"].items()
    )
    made_by = (
        f"`{result['command']}`: {items or items_of(result)}. Scores are in per cent ({metrics}), "
        "differences in points, with their 95 % intervals in brackets."
    )
    return "\n\n".join([made_by, *parts])
