"""Inspections of made-up numbers, for tests of what shows them; no model is run."""

import numpy as np
from PIL import Image

from vlcache_jax.cache.trace import Trace
from vlcache_jax.models.llava.patches import BASE, GRID, NEWLINE_PART
from vlcache_jax.results.inspection import Inspection, Outcome, ShownPicture
from vlcache_jax.results.report import CacheReport
from vlcache_jax.running.driver import Timings


def made_up_inspection(
    labels=("vl-cache 0.1",),
    *,
    layers=3,
    heads=2,
    base_side=2,
    grid_side=4,
    size=(80, 60),
    names=("shelf.png",),
    pieces=("<s>", "What", " is", " it", "?\n"),
    answer=("A", " shelf"),
    answers=None,
    right_answer=None,
    seed=0,
):
    """An inspection of random picks; the last token is always kept.

    Args:
        labels: of the methods.
        layers: of the model.
        heads: kv heads of the model.
        base_side: patches of a base tile's side.
        grid_side: patches of a grid's side; 0 for none.
        size: (width, height) of the pictures, in pixels.
        names: of the pictures.
        pieces: text tokens; the pictures come behind the first of them.
        answer: tokens of the full cache's answer.
        answers: tokens of each method's answer; those of the full cache by default.
        right_answer: what is to be answered; None where that is not known.
        seed: of the picks.
    """
    rng = np.random.default_rng(seed)
    rectangles, part = patches(size, base_side, grid_side)
    count = len(part)
    pictures = [
        ShownPicture(
            name, random_picture(rng, size), 1 + i * count + np.arange(count), rectangles, part
        )
        for i, name in enumerate(names)
    ]
    visual = np.zeros(len(pieces) + count * len(names), bool)
    visual[1 : 1 + count * len(names)] = True
    texts = iter(pieces)
    m = visual.size

    def outcome(label, tokens, budget):
        differs = [a != b for a, b in zip(tokens, answer, strict=False)]
        longer = min(len(tokens), len(answer)) if len(tokens) != len(answer) else None
        kept = np.full((layers, heads, budget.max()), -1, np.int32)
        for layer, head in np.ndindex(layers, heads):
            picked = rng.choice(m - 1, budget[layer] - 1, replace=False)
            kept[layer, head, : budget[layer]] = [*np.sort(picked), m - 1]
        everything = label == "full"
        trace = Trace(
            method=label.split()[0],
            budget_requested="all" if everything else "0.1",
            m=m,
            prompt_is_visual=visual,
            prompt_is_context=np.zeros_like(visual),
            budget=budget,
            kept=kept,
            hit_rate=rng.random((layers, heads)).astype(np.float32),
            mass_recall=rng.random((layers, heads)).astype(np.float32),
            sparsity=rng.random(layers) if label.startswith("vl-cache") else None,
            beta=budget / m if label.startswith("vl-cache") else None,
            recent=None if everything else np.ones(layers, np.int32),
        )
        return Outcome(
            label=label,
            text="".join(tokens),
            right=None if right_answer is None else "".join(tokens) == right_answer,
            pieces=list(tokens),
            first_difference=differs.index(True) if any(differs) else longer,
            cache=report(label, budget, m),
            timings=Timings(0.0, 0.25, 0.5, 0.75, 2.0),
            trace=trace,
        )

    full = outcome("full", answer, np.full(layers, m))
    budgets = [rng.integers(2, 1 + max(2, m // 3), layers) for _ in labels]
    return Inspection(
        model="made up",
        prompt="".join(pieces[1:]),
        right_answer=right_answer,
        pieces=["" if is_visual else next(texts) for is_visual in visual],
        visual=visual,
        context=np.zeros_like(visual),
        pictures=pictures,
        full=full,
        outcomes=[
            outcome(*row)
            for row in zip(labels, answers or [answer] * len(labels), budgets, strict=True)
        ],
        settings={
            "methods": {label: {"name": label, "score": {"window": 8}} for label in labels},
            "raw_prompt": False,
        },
        versions={"python": "3.11", "jax": "0.10.2"},
    )


def patches(size, base_side, grid_side):
    """Rectangles and parts: a base tile, and one grid with a newline behind each row."""
    rectangles, part = [], []
    for side, kind in ((base_side, BASE), (grid_side, GRID)):
        width, height = size[0] / max(side, 1), size[1] / max(side, 1)
        for row in range(side):
            for column in range(side):
                left, top = column * width, row * height
                rectangles.append((left, top, left + width, top + height))
                part.append(kind)
            if kind == GRID:
                rectangles.append((np.nan,) * 4)
                part.append(NEWLINE_PART)
    return np.array(rectangles), np.array(part, np.int8)


def random_picture(rng, size):
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def report(label, budget, m):
    """Bytes of 64 for each token of a layer."""
    full, kept = 64 * m * len(budget), 64 * int(budget.sum())
    return CacheReport(
        method=label.split()[0],
        label=label.split()[0],
        kv_bits=None,
        budget_requested="0.1",
        budget=0.1,
        full_bytes=full,
        kept_bytes=kept,
        kept_share=kept / full,
        compression_ratio=1 - kept / full,
        payload_bytes=0,
        scale_bytes=0,
        dense_bytes=kept,
        effective_bits=32,
        layer_budgets=budget.tolist(),
        kept_visual=1.5,
        kept_text=float(budget.mean()) - 1.5,
        allocated_bytes=full,
        tail_bytes=1024,
    )
