"""Numbers of a result file as text."""

from benchmarks.accuracy.report import Facts, Result, difference, per_cent, scored


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


def made_by(result: Result, items: str | None = None) -> str:
    """What was run: the first paragraph of a section.

    Args:
        result: of the experiment.
        items: which items; `n` of each task, seeds after one another, by default.
    """
    metrics = ", ".join(
        f"{name.replace('_', '-')} of {task}" for task, name in result["metric"].items()
    )
    first, count = result["seed"], result["n"]
    items = items or (
        f"{count:,} items of each task, seeds {first} to {first + count - 1} of the split "
        f"`{result['split']}`"
    )
    return (
        f"`{result['command']}`: {items}. Scores are in per cent ({metrics}), differences in "
        "points, with their 95 % intervals in brackets."
    )
