"""Every cache method in plain numpy, by the formulas alone: what the library is compared with.

All of it is about one prompt without padding, whose whole attention matrices are at hand. L layers,
N query heads, K kv heads, m prompt tokens; float32 like the library, since sizes are rounded.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

F = np.float32

METHODS = {
    "vl-cache": ("post-vision", "sparsity"),
    "h2o": ("h2o", "uniform"),
    "snapkv": ("snapkv", "uniform"),
    "pyramidkv": ("snapkv", "pyramid"),
    "streaming-llm": ("streaming-llm", "uniform"),
    "random": ("random", "uniform"),
    "aircache": ("aircache", "strength-and-skewness"),
    "tgv-kv": ("tgv-kv", "attention-to-vision"),
    "mixkv": ("mixkv", "uniform"),
    "adaretake": ("post-vision", "global-best"),
    "consensus": ("consensus", "global-best"),
}
"""Each method's score and allocation."""

KEEP_TEXT = {"aircache"}
"""Methods that keep text first."""

RECENT = {"post-vision": 0.1, "row-maximum": 0.1, "h2o": 0.5, "random": 0.1, "consensus": 0.1}
"""Share of a layer's budget that each of these scores leaves to the last tokens."""

Allocate = Callable[[int, np.ndarray], np.ndarray]
"""An allocation of one's own: (m, sparsity [L]) -> sizes [L]."""


class Expected(NamedTuple):
    """What a method does with a prompt; None stands for what it does not have.

    `kept[layer][head]` are positions in ascending order, the last `recent[layer]` of them kept
    whatever they are worth. `gap` is how far any decision is from a rounding tie: the smallest
    relative distance of two scores on either side of a cut, or of an attention weight from the
    threshold below which it counts as zero. Exact ties are none.
    """

    tau: int | None
    sparsity: np.ndarray | None
    beta: np.ndarray | None
    budget: list[int]
    kept: list[list[list[int]]]
    scores: np.ndarray | None
    gap: float
    recent: list[int] | None


class Limits(NamedTuple):
    """A budget for a prompt of m tokens."""

    alpha: np.float32  # share of the cache
    floor: np.float32  # least share of a layer, before it is rounded
    least: int  # lo: fewest tokens of a layer
    most: int  # most tokens of a layer, on average
    even: int  # C: tokens of each layer where all have as many
    exact: bool  # all layers have L * most tokens together, whatever an allocation asks for


def limits(budget: float | str, m: int) -> Limits:
    """A share such as 0.1, or tokens per layer such as "40tok"."""
    hundredth = -(-m // 100)  # 0.01 m, rounded up
    if isinstance(budget, str):
        tokens = min(int(budget.removesuffix("tok")), m)
        floor = min(Fraction(1, 100), Fraction(tokens, 10 * m))
        least = math.ceil(floor * m)
        return Limits(F(tokens) / F(m), F(floor), least, tokens, tokens, True)
    most = math.ceil((Fraction(str(budget)) + Fraction("0.01")) * m) + 1
    even = math.floor(F(budget) * F(m) + F(0.5))
    return Limits(F(budget), F(0.01), hundredth, min(m, most), min(max(even, 1), m), False)


def run(
    attention: np.ndarray,
    visual: np.ndarray,
    kv_heads: int,
    budget: float | str,
    score: str,
    allocation: str | Allocate,
    *,
    noise: np.ndarray | None = None,
    shared_heads: bool = False,
    recent_ratio: float | None = None,
    renormalize: bool = False,
    fallback_window: int = 32,
    max_window: int = 512,
    threshold: float = 0.01,
    window: int = 32,
    kernel: int = 5,
    slope: int = 20,
    sinks: int = 4,
    share: float = 0.9,
    keep_text: bool = False,
    uniform_share: float = 0.0,
    keys: np.ndarray | None = None,
) -> Expected:
    """Run a pair of a score and an allocation.

    Args:
        attention: softmax weights, causal, float32 [L, N, m, m].
        visual: which tokens are visual, bool [m].
        kv_heads: K.
        budget: as in `limits`.
        score: one of "post-vision", "row-maximum", "h2o", "snapkv", "streaming-llm", "random",
            "aircache", "tgv-kv", "mixkv", "consensus".
        allocation: "sparsity", "uniform", "pyramid", "strength-and-skewness",
            "attention-to-vision", "global-best", or a function.
        noise: the scores of "random", [L, K, m].
        shared_heads: the heads of a layer keep the same tokens, by the sum of their scores.
        recent_ratio: in place of `RECENT`.
        renormalize: of "sparsity": hand out again what the clip cut off.
        fallback_window: rows of the post-vision window where no text follows an image.
        max_window: most rows of the post-vision window.
        threshold: p, the share of its row's maximum below which a weight counts as zero.
        window: rows of SnapKV's window.
        kernel: neighbours that SnapKV averages.
        slope: of the pyramid.
        sinks: first tokens that StreamingLLM keeps.
        share: of the largest attention, from which on AirCache's rows are elite.
        keep_text: text is kept before any ranking, up to half of a layer's budget.
        uniform_share: that share of the budget is given to all layers alike.
        keys: those after RoPE, and the values too, [L, m, K, H]: what MixKV looks at beside.
    """
    layers, _, m, _ = attention.shape
    if not isinstance(budget, str) and budget >= 1:  # the full cache: nothing is scored
        everything = [[list(range(m))] * kv_heads] * layers
        return Expected(None, None, None, [m] * layers, everything, None, math.inf, None)
    limit = limits(budget, m)
    after = post_vision_rows(visual, fallback_window, max_window)
    watched = min(window, max(1, limit.even // 2))

    tau, scores = None, noise if score == "random" else None
    if score in ("post-vision", "row-maximum", "h2o", "snapkv", "mixkv"):
        tau = {"h2o": m, "snapkv": watched, "mixkv": watched}.get(score, after)
        scores = column_sums(attention[:, :, m - tau :], kv_heads)
        if score in ("snapkv", "mixkv"):
            scores = pooled(scores, m - watched, kernel)
        if score == "mixkv":
            assert keys is not None
            scores = np.stack([mixed(*of) for of in zip(scores, keys, keys, strict=True)])
        if score == "row-maximum":
            scores = pooled(column_maxima(attention[:, :, m - tau :], kv_heads), m, 9)
    if score == "consensus":
        scores = consensus(attention, m - after, kv_heads)
    if score == "aircache":
        scores = np.stack([elite_scores(of, visual, kv_heads, share) for of in attention])
    if score == "tgv-kv":
        scores = np.stack([text_guided(of, visual, kv_heads) for of in attention])

    sparsity, beta, gap = None, None, math.inf
    if allocation == "uniform":
        sizes = np.full(layers, limit.even, F)
    elif allocation == "pyramid":
        sizes = pyramid(layers, m, limit.even, watched, slope)
    elif allocation == "strength-and-skewness":
        assert scores is not None
        sizes = strength_and_skewness(scores, visual, limit.even)
    elif allocation == "attention-to-vision":
        mass = attention[:, :, ~visual][..., visual].sum((1, 2, 3), dtype=float)
        sizes = fair(mass) * limit.even * layers
    elif allocation == "global-best":
        assert scores is not None
        sizes, gap = global_best(scores, limit)
    else:
        sparsity, gap = sparsities(attention[:, :, m - after :], threshold)
        if callable(allocation):
            sizes = allocation(m, sparsity).astype(F)
        else:
            beta = sparsity_shares(sparsity, limit, renormalize)
            sizes = beta * F(m)
    sizes = uniform_share * limit.even + (1 - uniform_share) * sizes
    k = [m] * layers if limit.alpha >= 1 else whole(sizes.astype(F), m, limit)

    kept, recent = [], []
    for layer in range(layers):
        text = [j for j in range(m) if not visual[j]] if keep_text else []
        text = text[-max(1, k[layer] // 2) :]
        left = k[layer] - len(text)
        if scores is None:  # StreamingLLM: position alone decides
            first = min(sinks, left // 2)
            positions = [*range(first), *range(m - (left - first), m)]
            kept.append([positions] * kv_heads)
            recent.append(left - first)
            continue
        if score in ("snapkv", "mixkv"):
            last = min(watched, left)
        else:
            ratio = RECENT.get(score, 0) if recent_ratio is None else recent_ratio
            last = math.floor(Fraction(str(ratio)) * left)
        always = {*text, *range(m - last, m)}
        heads = scores[layer].sum(0, keepdims=True) if shared_heads else scores[layer]
        others = [j for j in range(m) if j not in always]
        chosen = [top(head, others, k[layer] - len(always)) for head in heads]
        gap = min([gap] + [distance for _, distance in chosen])
        own = [sorted({*positions, *always}) for positions, _ in chosen]
        recent.append(last)
        kept.append(own * kv_heads if shared_heads else own)
    return Expected(tau, sparsity, beta, k, kept, scores, gap, recent)


def post_vision_rows(visual: np.ndarray, fallback: int, most: int) -> int:
    """tau: the tokens behind the last visual one; the last ones where there are none."""
    m, last = len(visual), np.flatnonzero(visual)
    rows = m - 1 - last[-1] if last.size else 0
    return int(min(rows if rows else fallback, most, m))


def sparsities(rows: np.ndarray, threshold: float) -> tuple[np.ndarray, float]:
    """Sparsity gamma' [L] of the last rows [L, N, tau, m], and the distance to the threshold."""
    tau, m = rows.shape[2:]
    visible = np.tri(m, dtype=bool)[m - tau :]
    limit = F(threshold) * rows.max(-1, keepdims=True)
    zeroed = (rows < limit)[:, :, visible].sum(-1)  # [L, N]
    per_head = zeroed.astype(F) / F(visible.sum())
    gap = np.abs(rows / limit - 1)[:, :, visible].min()
    return per_head.mean(-1, dtype=F), float(gap)


def sparsity_shares(sparsity: np.ndarray, limit: Limits, renormalize: bool) -> np.ndarray:
    """VL-Cache's shares, beta [L]."""
    layers = len(sparsity)
    dense = F(1) - sparsity
    total = dense.sum(dtype=F)
    part = dense / total if total > 0 else np.full(layers, 1 / layers, F)
    if renormalize or limit.exact:
        return filled(part, float(limit.floor), 1.0, float(limit.alpha) * layers)
    return np.clip(part * limit.alpha * F(layers), F(0.01), F(1))


def filled(part: np.ndarray, least: float, most: float, wanted: float) -> np.ndarray:
    """clip(part * scale, least, most) with the scale that gives the wanted sum, or a large one."""
    # The sum is piecewise linear in the scale, with its corners where a layer meets a bound: the
    # scale that gives the wanted sum lies between two of them.
    there = part[part > 0].astype(float)
    corners = np.sort(np.concatenate([[0.0], least / there, most / there]))
    sums = [np.clip(part * corner, least, most).sum() for corner in corners]
    scale = np.interp(wanted, sums, corners)
    return np.clip(part * scale, least, most).astype(F)


def pyramid(layers: int, m: int, even: int, window: int, slope: int) -> np.ndarray:
    """Sizes [L] that fall linearly, the window included."""
    rest = even - window
    least = rest // slope
    most = 2 * rest - least
    if most > m - window:
        most = m - window
        least = 2 * rest - most
    if layers == 1:
        return np.array([even], F)
    return np.array([most - i * (most - least) / (layers - 1) + window for i in range(layers)], F)


def whole(sizes: np.ndarray, m: int, limit: Limits, asked: np.float32 | None = None) -> list[int]:
    """Whole numbers, one token at a time; `asked` is the sum of the sizes, in another order."""
    layers = len(sizes)
    asked = sizes.sum(dtype=F) if asked is None else asked
    assert asked is not None
    total = math.floor(asked + F(0.5) + F(1e-3))
    total = min(layers * m, max(layers * limit.least, total), layers * limit.most)
    if limit.exact:
        total = layers * limit.most
        if abs(asked - total) > 0.5 + 1e-5 * total:
            part = sizes / asked if asked > 0 else np.full(layers, 1 / layers, F)
            sizes = filled(part, limit.least, m, total)
    k = [min(max(math.floor(x), limit.least), m) for x in sizes]
    while sum(k) < total:
        room = [x - F(n) if n < m else -math.inf for x, n in zip(sizes, k, strict=True)]
        k[room.index(max(room))] += 1
    while sum(k) > total:
        room = [x - F(n) if n > limit.least else math.inf for x, n in zip(sizes, k, strict=True)]
        k[room.index(min(room))] -= 1
    return k


def column_sums(rows: np.ndarray, kv_heads: int) -> np.ndarray:
    """[L, N, tau, m] -> [L, K, m]: the sum over the rows, then over the query heads of a group."""
    layers, heads, _, m = rows.shape
    return rows.sum(2, dtype=F).reshape(layers, kv_heads, heads // kv_heads, m).sum(2, dtype=F)


def column_maxima(rows: np.ndarray, kv_heads: int) -> np.ndarray:
    """[L, N, tau, m] -> [L, K, m]: the largest of the rows, summed over a group's query heads."""
    layers, heads, _, m = rows.shape
    return rows.max(2).reshape(layers, kv_heads, heads // kv_heads, m).sum(2, dtype=F)


def pooled(scores: np.ndarray, before: int, kernel: int) -> np.ndarray:
    """The mean over neighbours of the first `before` columns, zeros around them; the others 0."""
    side = kernel // 2
    padded = np.pad(scores[..., :before], ((0, 0), (0, 0), (side, side)))
    out = np.zeros_like(scores)
    for j in range(before):
        out[..., j] = padded[..., j : j + kernel].sum(-1, dtype=F) / F(kernel)
    return out


def consensus(attention: np.ndarray, n: int, kv_heads: int) -> np.ndarray:
    """The mean of square roots of three scores' shares, squared: [L, N, m, m] -> [L, K, m].

    The first n rows stand in front of the question.
    """
    m, before = attention.shape[3], max(n - 128, 0)
    some = min(before, 128)
    rows = [(i + 1) * before // some - 1 for i in range(some)] + list(range(before, n))
    looks = [
        column_sums(attention[:, :, n:], kv_heads),
        pooled(column_maxima(attention[:, :, n:], kv_heads), m, 15),
        column_sums(attention[:, :, rows], kv_heads),
    ]
    totals = [look.sum(-1, keepdims=True, dtype=float) for look in looks]
    shares = [
        look / total if total.all() else np.full(look.shape, 1 / m)
        for look, total in zip(looks, totals, strict=True)
    ]
    return np.average([share**0.5 for share in shares], axis=0, weights=(1, 2, 2)) ** 2


def fair(sizes: np.ndarray) -> np.ndarray:
    """Shares of their sum; equal ones where all are 0."""
    return sizes / sizes.sum() if sizes.sum() > 0 else np.full(len(sizes), 1 / len(sizes))


def mixed(scores: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """MixKV of one layer: scores [K, m], keys and values [m, K, H] -> [K, m]."""
    found = []
    for own, k, v in zip(scores, keys.swapaxes(0, 1), values.swapaxes(0, 1), strict=True):
        m, unit = len(k), k / np.linalg.norm(k, axis=1, keepdims=True)
        cosines = unit.astype(float) @ unit.T
        r = 0.0 if m == 1 else (cosines.sum() - m) / (m * (m - 1))
        r = min(max(r, 0.0), 1.0)
        importance = unit_range(own * np.linalg.norm(v, axis=1))
        found.append((1 - r) * importance + r * unit_range(-cosines.mean(1)))
    return np.array(found)


def unit_range(x: np.ndarray) -> np.ndarray:
    """Scaled to 0..1; 0 where all are alike."""
    return (x - x.min()) / np.ptp(x) if np.ptp(x) > 0 else 0 * x


def elite_scores(
    attention: np.ndarray, visual: np.ndarray, kv_heads: int, share: float
) -> np.ndarray:
    """AirCache's scores of one layer, attention [N, m, m] -> [K, m]."""
    heads, m, _ = attention.shape
    text = np.flatnonzero(~visual).tolist()
    behind = [j for j in text if j > np.flatnonzero(visual).max(initial=-1)][-512:]
    elite: list[int] = []
    if behind:
        last = attention[:, m - 1, text].astype(float)
        worth = dict(zip(text, (last / last.sum(1, keepdims=True)).mean(0), strict=True))
        most = max((worth[j] for j in behind if j > 0), default=0)
        elite = [j for j in behind if worth[j] >= share * most or j == m - 1]
    found = np.zeros((heads, m))
    for row in elite or [m - 1]:
        keys = [j for j in range(row + 1) if visual[j] or j in elite]
        own = attention[:, row, keys].astype(float)
        found[:, keys] += own / own.sum(1, keepdims=True)
    found[:, ~visual] = 0
    return found.reshape(kv_heads, -1, m).sum(1) / max(len(elite), 1)


def strength_and_skewness(scores: np.ndarray, visual: np.ndarray, even: int) -> np.ndarray:
    """AirCache's sizes [L] from its scores [L, K, m]."""
    strength, skewness, n = [], [], int(visual.sum())
    for layer in scores:
        worth = layer[:, visual].sum(0, dtype=float)
        strength.append(worth.sum())
        spread = n > 2 and worth.std(ddof=1) > 1e-6 * worth.mean()
        cubes = ((worth - worth.mean()) / worth.std(ddof=1)) ** 3 if spread else np.zeros(1)
        skewness.append(max(n * cubes.sum() / max((n - 1) * (n - 2), 1), 0))
    rate = (fair(np.array(strength)) + fair(np.array(skewness))) / 2 * len(scores)
    text = min(len(visual) - n, max(even // 2, 1))
    return text + (even - text) * rate


def text_guided(attention: np.ndarray, visual: np.ndarray, kv_heads: int) -> np.ndarray:
    """TGV-KV's scores of one layer, attention [N, m, m] -> [K, m]; text in front of all others."""
    heads, m, _ = attention.shape
    text = np.flatnonzero(~visual)
    found = np.zeros((kv_heads, m))
    for kv_head in range(kv_heads):
        group = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
        summed = attention[group].sum(0, dtype=float)  # [m, m]
        worth = summed[text].sum(0)
        weights = [worth[j] / (len(text) - place) for place, j in enumerate(text)]
        guided = sum(w * summed[i] for w, i in zip(weights, text, strict=True))
        found[kv_head] = guided / max(sum(weights), 1e-30)
        found[kv_head, text] = worth[text] * 2.0**100 + heads
    return found


def global_best(scores: np.ndarray, limit: Limits) -> tuple[np.ndarray, float]:
    """How many of the best tokens of all layers each has [L], scores [L, K, m]; and the gap."""
    layers, _, m = scores.shape
    total = scores.sum(2, keepdims=True, dtype=float)
    worth = np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / m).mean(1)
    taken = math.floor(limit.alpha * F(m * layers) + F(0.5))
    row = worth.T.ravel()  # the lower position first, then the lower layer
    chosen, gap = top(row, list(range(m * layers)), taken)
    return np.bincount(np.array(chosen, int) % layers, minlength=layers).astype(F), gap


def top(scores: np.ndarray, among: list[int], count: int) -> tuple[list[int], float]:
    """The best `count` of some positions, the lower of equal ones; and the gap."""
    order = sorted(among, key=lambda j: (-scores[j], j))
    gap = math.inf
    if 0 < count < len(among):
        worst, next_best = scores[order[count - 1]], scores[order[count]]
        if worst != next_best:
            gap = float((worst - next_best) / worst)
    return sorted(order[:count]), gap
