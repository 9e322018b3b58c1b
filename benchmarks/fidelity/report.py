"""What docs/accuracy.md says of the real decoder."""

from benchmarks.documents import Result, table


def cell(facts: Result) -> str:
    """KL and share of the same top-1."""
    return f"{facts['kl']:.3f} / {facts['top1']:.2f}"


def tables(result: Result) -> str:
    """KL and share of the same top-1 by setting and budget."""
    rows = [[f"`{name}`", *map(cell, of.values())] for name, of in result["details"].items()]
    return table(["setting", *result["budgets"]], rows)
