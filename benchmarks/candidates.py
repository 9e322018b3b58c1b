"""What the recommended method was searched among: parts of the library, combined.

Both searches try these, on the parts of their items that are for choosing: `python -m
benchmarks.accuracy.experiments scores` on drawn pictures, `python -m benchmarks.fidelity --part
candidates --split tune` on prose. A label names what differs from one of the first ones.
"""

from vlcache_jax.cache.allocate import GlobalBest, Sparsity
from vlcache_jax.cache.blended import Blend, Pooled, PowerMean, ValueNorm
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import Custom
from vlcache_jax.cache.score import AllRows, ColumnSum, PostVisionRows, RowMaximum, Score
from vlcache_jax.cache.windows import RowsInFront

WIDER = RowMaximum(kernel=15)
"""`MAXIMUM` over fifteen neighbours."""

SUM = ColumnSum(PostVisionRows())
"""VL-Cache's score: the attention of the question's rows, summed."""

MAXIMUM = RowMaximum()
"""The largest of it that any row pays, averaged over nine neighbours."""

EVERY = ColumnSum(AllRows())
"""The attention of all rows, summed: H2O's score."""

SAMPLED = ColumnSum(AllRows(sample=256))
"""The same from 256 rows and all behind the picture or the context."""


FRONT = ColumnSum(RowsInFront(256))
"""Of 256 rows in front of the question, half of them the last ones."""


def three(maximum: float, summed: float, every: float, *, rows: Score = SAMPLED) -> Blend:
    """The three as one, with these weights.

    Args:
        maximum: of `MAXIMUM`.
        summed: of `SUM`.
        every: of `rows`.
        rows: the score of all rows.
    """
    sums = summed + every
    return Blend(MAXIMUM, Blend(SUM, rows, every / sums), sums / (maximum + sums))


SCORES: dict[str, Score] = {
    "sum": SUM,
    "sum, pooled 9": Pooled(SUM, 9),
    "sum, value norm": ValueNorm(SUM),
    "maximum, pooled 1": RowMaximum(kernel=1),
    "maximum, pooled 5": RowMaximum(kernel=5),
    "maximum": MAXIMUM,
    "maximum, pooled 15": RowMaximum(kernel=15),
    "all rows": SAMPLED,
    "every row": EVERY,
    "sum + all rows": Blend(SUM, SAMPLED),
    "sum + every row": Blend(SUM, EVERY),
    "maximum + sum": Blend(MAXIMUM, SUM),
    "maximum + all rows": Blend(MAXIMUM, SAMPLED),
    "2 maximum + all rows": Blend(MAXIMUM, SAMPLED, 1 / 3),
    "2 maximum + sum + all rows": three(2, 1, 1),
    "maximum + sum + all rows": three(1, 1, 1),
    "maximum + sum + every row": three(1, 1, 1, rows=EVERY),
    "maximum + 2 sum + 2 all rows": three(1, 2, 2),
    "maximum + sum + 2 all rows": three(1, 1, 2),
    "maximum + sum + all rows, pooled 5": three(1, 1, 1, rows=Pooled(SAMPLED)),
}
"""Each is tried with equal layers."""

AGREED: dict[str, PowerMean] = {
    "agreed: maximum, sum, front": PowerMean((MAXIMUM, SUM, FRONT)),
    "agreed: maximum, sum, 2 front": PowerMean((MAXIMUM, SUM, FRONT), weights=(1, 1, 2)),
    "agreed: maximum 15, sum, front": PowerMean((WIDER, SUM, FRONT)),
    "agreed: 2 maximum 15, sum, 2 front": PowerMean((WIDER, SUM, FRONT), weights=(2, 1, 2)),
}
"""Power means, tried with half of the budget by the best of all layers."""


def candidates(budget: float | str) -> dict[str, CacheMethod]:
    """All that is tried at a budget, by label."""
    made: dict[str, CacheMethod] = {
        label: Custom(budget, score=score, allocation="uniform") for label, score in SCORES.items()
    }
    for label in ("sum", "maximum", "maximum + sum + all rows"):
        score = SCORES[label]
        made |= {
            f"{label}; text kept": Custom(
                budget, score=score, allocation="uniform", keep_text=True
            ),
            f"{label}; layers by sparsity": Custom(budget, score=score, allocation=Sparsity()),
            f"{label}; a fifth by sparsity": Custom(
                budget, score=score, allocation=Sparsity(), uniform_share=0.8
            ),
            f"{label}; half by the best of all layers": Custom(
                budget, score=score, allocation=GlobalBest(), uniform_share=0.5
            ),
        }
    for label, score in AGREED.items():
        made[f"{label}; half by the best of all layers"] = Custom(
            budget, score=score, allocation=GlobalBest(), uniform_share=0.5
        )
    for label in ("agreed: maximum, sum, front", "agreed: maximum 15, sum, front"):
        made[f"{label}; four fifths by the best of all layers"] = Custom(
            budget, score=AGREED[label], allocation=GlobalBest(), uniform_share=0.2
        )
    wider = AGREED["agreed: maximum 15, sum, front"]
    best = SCORES["maximum + sum + all rows"]
    made["agreed: maximum 15, sum, front"] = Custom(budget, score=wider, allocation="uniform")
    made["maximum + sum + all rows; value norm"] = Custom(
        budget, score=ValueNorm(best), allocation="uniform"
    )
    for ratio in (0.0, 0.25):
        made[f"maximum + sum + all rows; recent {ratio:g}"] = Custom(
            budget, score=best, allocation="uniform", recent_ratio=ratio
        )
    return made
