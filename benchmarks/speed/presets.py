"""Cases with a yardstick of their own: the paper's five rows, and the bar of a CPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.roofline import Device, Stage, decode_step
from benchmarks.speed.cases import FULL, Case
from benchmarks.speed.limit import in_type
from benchmarks.speed.prompts import answer_work, method_work, prefill_work
from vlcache_jax.cache.methods import FullCache, VLCache
from vlcache_jax.cache.quantizers import AKVQ

TENTH = VLCache(0.1)
PACKED = FullCache(quantize=AKVQ())
PACKED_TENTH = VLCache(0.1, quantize=AKVQ())

PAPER_MODEL = "llava-v1.6-mistral-7b"
PAPER: dict[tuple[int, int], dict[str, float]] = {
    (1, 2048): {"prefill": 0.96, "decode": 1.19, "end-to-end": 1.16},
    (1, 32768): {"prefill": 0.99, "decode": 3.32, "end-to-end": 1.85},
    (1, 131072): {"prefill": 0.99, "decode": 7.08, "end-to-end": 1.66},
    (4, 32768): {"prefill": 0.99, "decode": 6.07, "end-to-end": 2.06},
    (64, 2048): {"prefill": 0.98, "decode": 5.23, "end-to-end": 2.33},
}
"""Speed-ups that VL-Cache reports (arXiv 2410.23317) of a tenth over Hugging Face's default cache
with FlashAttention-2, by batch and context: 100 tokens, the last 50 of the prompt as window."""


def paper_cases(
    dtype: str, scale: int, contexts: Sequence[int], batches: Sequence[int]
) -> dict[tuple[int, int], Case]:
    """The paper's rows, of which contexts and batches choose some; all where none is given.

    Args:
        dtype: of weights and cache.
        scale: 1, or what the contexts are divided by, of the shipped small model.
        contexts: of the rows wanted, as in the paper.
        batches: of the rows wanted, as in the paper.
    """
    model = PAPER_MODEL if scale == 1 else "demo-small"
    return {
        (batch, context): Case(model, context // scale, batch, dtype)
        for batch, context in PAPER
        if context in (contexts or [context]) and batch in (batches or [batch])
    }


def paper_ratios(
    cases: Mapping[tuple[int, int], Case], rows: Sequence[dict[str, Any]], limit: Device
) -> list[dict[str, Any]]:
    """Speed-ups of our tenth over our full cache, beside the paper's and the limit's.

    Of `paper_cases`; those that no row was measured of are left out.
    """
    ratios = []
    for key, case in cases.items():
        own = [row for row in rows if (row["context"], row["batch"]) == (case.context, case.batch)]
        if not own:
            continue
        speedups = {row["stage"]: row.get("speedup") for row in own if row["method"] != "full"}
        plain, added = prefill_work(case).floor(limit), method_work(case, TENTH).floor(limit)
        answer = [answer_work(case, variant).floor(limit) for variant in (FULL, TENTH)]
        steps = [in_type(step, case.dtype).floor(limit) for step in _steps(case)]
        ideals = {
            "prefill": plain / (plain + added),
            "decode": steps[0] / steps[1],
            "end-to-end": answer[0] / answer[1],
        }
        about = {"batch": key[0], "context": key[1]}
        ratios += [
            {
                **about,
                "stage": stage,
                "paper": published,
                "ours": speedups.get(stage),
                "ideal": ideals[stage],
            }
            for stage, published in PAPER[key].items()
        ]
    return ratios


def _steps(case: Case) -> list[Stage]:
    """A decode step from the full cache, and one from a tenth."""
    return [decode_step(case.config, case.context, case.batch, share) for share in (1.0, 0.1)]


CPU_BAR = 0.6
"""Least share of (W + KV) / (W + 0.1 KV) that a CPU's speed-up must reach."""


def cpu_case(dtype: str) -> Case:
    """Batch 8 at 8k, K * H = 512: in float32 a pool of 1.07 GB beside 0.22 GB of weights."""
    return Case("small-gqa", 8192, 8, dtype, chunk=4)


def cpu_summary(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The speed-up of a tenth beside that of the bytes alone; the rows are decode steps of both."""
    whole, tenth = (in_type(step, case.dtype) for step in _steps(case))
    ideal = whole.bytes / tenth.bytes
    speedup = next((row["speedup"] for row in rows if "speedup" in row), None)
    return {
        "weight_bytes": round(whole.parts["products"].bytes),
        "cache_bytes": round(whole.parts["attention"].bytes),
        "speedup": speedup,
        "ideal": ideal,
        "share": None if speedup is None else speedup / ideal,
        "must_reach": CPU_BAR,
    }
