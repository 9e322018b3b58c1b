"""Evaluations of made-up numbers, for tests of what shows them; no model is run."""

from vlcache_jax.evaluation import Evaluation, Setting

BUDGETS = (0.05, 0.1, 0.2, 0.4)


def made_up_setting(method="vl-cache", budget=0.1, kv_bits=None, *, top1: float | None, **others):
    """A setting whose numbers follow from its share of same tokens, unless they are given.

    Args:
        method: its name.
        budget: a share of the cache.
        kv_bits: the quantizer's name; a quarter of the bytes is kept with one.
        top1: share of same tokens, within 0.02 of which the interval lies; None for no tokens.
        others: fields of the setting that are to be otherwise.
    """
    label = f"{method}+{kv_bits}" if kv_bits else method
    numbers = {
        "label": f"{label} {budget}",
        "method": method,
        "budget": str(budget),
        "kv_bits": kv_bits,
        "kept_share": budget / 4 if kv_bits else budget,
        "top1": top1,
        "kl": None if top1 is None else (1 - top1) / 2,
        "kl_p95": None if top1 is None else 1 - top1,
        "same_answer": 1.0 if top1 is None else top1**8,
        "first_difference": None if top1 in (None, 1) else round(20 * top1) / 2,
    }
    if top1 is None:
        intervals = {"kl": None, "top1": None}
    else:
        low, high = max(top1 - 0.02, 0.0), min(top1 + 0.02, 1.0)
        intervals = {"kl": ((1 - high) / 2, (1 - low) / 2), "top1": (low, high)}
    return Setting(**{**numbers, "intervals": intervals, **others})


def made_up_evaluation(settings, **others):
    """An evaluation of twelve requests, unless another number is given."""
    facts = {"model": "made up", "requests": 12, "tokens": 340, "tolerance": 0.95}
    versions = {"python": "3.11.2", "jax": "0.10.2"}
    return Evaluation(**{**facts, "settings": list(settings), "versions": versions, **others})


def several_methods():
    """Two methods of four budgets, one of them with a quantizer too; not in the order of bytes."""
    same = {("vl-cache", None): (0.9, 0.94, 0.98, 1.0), ("h2o", None): (0.8, 0.85, 0.9, 0.93),
            ("vl-cache", "4"): (0.88, 0.92, 0.96, 0.965)}  # fmt: skip
    return made_up_evaluation(
        made_up_setting(method, budget, bits, top1=top1)
        for (method, bits), shares in same.items()
        for budget, top1 in zip(BUDGETS, shares, strict=True)
    )
