"""Cache methods: what is kept of a prompt's keys and values.

Every method is a pair of a token score and a layer allocation, so that any pair can be run:

    method          score (score.py)            allocation (allocate.py)   always kept
    full            -                           everything                 everything
    vl-cache        ColumnSum(PostVisionRows)   Sparsity                   last 10 % of the budget
    h2o             ColumnSum(AllRows)          Uniform                    last half of the budget
    snapkv          PooledWindow                Uniform                    the window
    pyramidkv       PooledWindow                Pyramid                    the window
    streaming-llm   Ends                        Uniform                    first 4, last rest
    random          Noise                       Uniform                    last 10 % of the budget
    aircache        EliteRows                   StrengthAndSkewness        text (aircache.py)
    tgv-kv          TextGuided                  AttentionToVision          text (tgvkv.py)
    mixkv           Diverse(PooledWindow)       Uniform                    the window
    adaretake       ColumnSum(PostVisionRows)   GlobalBest                 last 10 % of the budget
    consensus       PowerMean of three looks    half GlobalBest            last 10 % of the budget

How such a pair becomes a cache is in method.py, as are the settings of all methods: budget,
shared_heads, quantize, keep_text and uniform_share. A method is a frozen dataclass: equal settings
share one compiled program.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import ClassVar, TypeVar

import jax

from vlcache_jax.cache.aircache import AirCache
from vlcache_jax.cache.allocate import (
    ALLOCATIONS,
    Allocation,
    AllocationFunction,
    GlobalBest,
    Pyramid,
    Sparsity,
    Uniform,
)
from vlcache_jax.cache.blended import Diverse, PowerMean
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.score import (
    SCORES,
    AllRows,
    ColumnSum,
    Ends,
    LastRows,
    Layer,
    Noise,
    PooledWindow,
    PostVisionRows,
    RecentScore,
    RowMaximum,
    Score,
    ScoreFunction,
)
from vlcache_jax.cache.tgvkv import TGVKV
from vlcache_jax.cache.windows import RowsInFront


@dataclass(frozen=True)
class FullCache(CacheMethod):
    """Every prompt token is kept."""

    name: ClassVar[str] = "full"

    budget: float | str = 1.0

    def __post_init__(self):
        if not self.limit.keeps_all:
            raise ValueError(
                f"method full keeps everything, budget={self.budget!r} does not: leave the budget "
                "out, or choose another method"
            )


@dataclass(frozen=True)
class VLCache(CacheMethod):
    """VL-Cache (Tu et al., ICLR 2025): budgets by the sparsity of the post-vision attention.

    Query-aware: what is kept depends on the question. A later question about the same picture needs
    a choice of its own (`VLM.session`), or the full cache.

    Attributes:
        recent_ratio: share of each layer's budget that goes to the prompt's last tokens.
        renormalize: hand out again what the clip of the layers' shares cut off (not in the paper).
        fallback_window: rows to look from where no text follows the last image, or there is none.
        max_window: the most rows to look from, the last ones of a long question.
        threshold: p: attention below this share of its row's maximum counts as zero.
    """

    name: ClassVar[str] = "vl-cache"

    recent_ratio: float = 0.1
    renormalize: bool = False
    fallback_window: int = 32
    max_window: int = 512
    threshold: float = 0.01

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        window = PostVisionRows(self.fallback_window, self.max_window)
        score = ColumnSum(window, recent_ratio=self.recent_ratio)
        return score, Sparsity(self.renormalize, window, self.threshold)


@dataclass(frozen=True)
class H2O(CacheMethod):
    """H2O (Zhang et al., 2023) at the end of a prefill: half heavy hitters, half recent tokens.

    Attributes:
        recent_ratio: share of each layer's budget that goes to the prompt's last tokens.
    """

    name: ClassVar[str] = "h2o"

    recent_ratio: float = 0.5

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return ColumnSum(AllRows(), recent_ratio=self.recent_ratio), Uniform()


@dataclass(frozen=True)
class SnapKV(CacheMethod):
    """SnapKV (Li et al., 2024): what the last rows attend to, smoothed over neighbours.

    Attributes:
        window: rows to look from, always kept; at most half of the budget.
        kernel: neighbours of the smoothing, an odd number.
    """

    name: ClassVar[str] = "snapkv"

    window: int = 32
    kernel: int = 5

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return PooledWindow(LastRows(self.window), self.kernel), Uniform()


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV (Cai et al., 2024): SnapKV's score, sizes that fall from the first layer on.

    Attributes:
        slope: the last layer's size is the mean divided by this.
    """

    name: ClassVar[str] = "pyramidkv"

    slope: int = 20

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return super().rules()[0], Pyramid(self.window, self.slope)


@dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """StreamingLLM (Xiao et al., 2023): the first tokens and the last ones, for all heads.

    Attributes:
        sinks: first tokens; at most half of the budget.
    """

    name: ClassVar[str] = "streaming-llm"

    sinks: int = 4

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return Ends(self.sinks), Uniform()


@dataclass(frozen=True)
class RandomKV(CacheMethod):
    """Random tokens: the control.

    Attributes:
        recent_ratio: share of each layer's budget that goes to the prompt's last tokens.
        seed: of the draws.
    """

    name: ClassVar[str] = "random"

    recent_ratio: float = 0.1
    seed: int = 0

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return Noise(self.seed, recent_ratio=self.recent_ratio), Uniform()


@dataclass(frozen=True)
class MixKV(SnapKV):
    """MixKV (arXiv 2510.20707, ICLR 2026) around SnapKV: important tokens, and unlike ones.

    Around another score it is `Custom(score=Diverse(...))`.
    """

    name: ClassVar[str] = "mixkv"

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        score, allocation = super().rules()
        return Diverse(score), allocation


@dataclass(frozen=True)
class AdaReTaKe(CacheMethod):
    """AdaReTaKe's division over the layers (arXiv 2503.12559): by the best tokens of all layers.

    What it does along a video, to which it gives budgets chunk by chunk, is not part of it.

    Attributes:
        recent_ratio: share of each layer's budget that goes to the prompt's last tokens.
    """

    name: ClassVar[str] = "adaretake"

    recent_ratio: float = 0.1

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return ColumnSum(recent_ratio=self.recent_ratio), GlobalBest()


@dataclass(frozen=True)
class Consensus(CacheMethod):
    """What three looks at the prompt agree on: this library's own method.

    The looks are the attention of the question's rows, summed; the largest of it that any of them
    pays, averaged over neighbours; and the attention of 256 rows in front of the question. Each
    becomes shares of its sum, per kv head, and a token is worth the mean of their square roots,
    squared, in which the first counts half of each other: what all looks find good comes before
    what one finds very good. Half of the budget is given to all layers alike, half by the best
    tokens of all layers. It was searched on texts and pictures that no figure is reported of
    (docs/accuracy.md).
    """

    name: ClassVar[str] = "consensus"

    uniform_share: float = field(default=0.5, kw_only=True)

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        looks = ColumnSum(), RowMaximum(kernel=15), ColumnSum(RowsInFront(256))
        return PowerMean(looks, power=0.5, weights=(1, 2, 2)), GlobalBest()


@dataclass(frozen=True)
class Custom(CacheMethod):
    """Any score with any allocation, or your own.

    Attributes:
        score: a name of `SCORES`, a `Score`, or a function of a `Layer` that returns the worth of
            each token, [B, K, T].
        allocation: a name of `ALLOCATIONS`, an `Allocation`, or a function of (prompt, sparsity
            [B, L]) that returns the layers' sizes in tokens, [B, L].
        recent_ratio: share of each layer's budget that goes to the prompt's last tokens; the
            score's own by default, 0.1 for a function.

    Raises:
        ValueError: there is no score or allocation of that name, or a setting is out of range.
    """

    name: ClassVar[str] = "custom"

    score: str | Score | Callable[[Layer], jax.Array] = "post-vision"
    allocation: str | Allocation | Callable[[Prompt, jax.Array], jax.Array] = "sparsity"
    recent_ratio: float | None = None

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        score = _named(self.score, SCORES, "score")
        allocation = _named(self.allocation, ALLOCATIONS, "allocation")
        if not isinstance(score, Score):
            score = ScoreFunction(score)
        if not isinstance(allocation, Allocation):
            allocation = AllocationFunction(allocation)
        if self.recent_ratio is not None:
            if not isinstance(score, RecentScore):
                raise ValueError(
                    f"{type(score).__name__} decides itself what is always kept: leave "
                    f"recent_ratio={self.recent_ratio} out"
                )
            score = replace(score, recent_ratio=self.recent_ratio)
        return score, allocation


_Rule = TypeVar("_Rule")


def _named(rule: str | _Rule, table: Mapping[str, _Rule], what: str) -> _Rule:
    """The rule that a name stands for; one that is no name is itself."""
    if not isinstance(rule, str):
        return rule
    if rule not in table:
        raise ValueError(f"there is no {what} {rule!r}: choose one of {', '.join(table)}")
    return table[rule]


METHODS: dict[str, type[CacheMethod]] = {
    method.name: method
    for method in (
        FullCache, VLCache, H2O, SnapKV, PyramidKV, StreamingLLM, RandomKV,
        AirCache, TGVKV, MixKV, AdaReTaKe, Consensus,
    )
}  # fmt: skip
"""The methods of this library by the name that the command line, JSON and files use."""

DEFAULT_METHOD = Consensus.name
"""What the command line keeps where no method is named."""

CacheLike = CacheMethod | Quantizer | type[CacheMethod] | type[Quantizer] | str | float | None
"""What `as_method` takes."""


def make_method(
    name: str, budget: float | str | None = None, quantize: Quantizer | None = None
) -> CacheMethod:
    """A method by its name, with its other settings at their defaults.

    Args:
        name: one of `METHODS`, or the name of an entry point of another package, in the group
            `vlcache.methods`, that is a class like those above.
        budget: the share of the whole cache to keep (0.1 is 10 %), or tokens per layer ("256tok");
            the method's own default where it is None.
        quantize: how what is kept is quantized; None for not at all.

    Raises:
        ValueError: there is no such method, or the budget does not fit it.
        NotImplementedError: the method is known and not implemented.
    """
    if name == "fastv":
        raise NotImplementedError("method fastv, which prunes tokens, is not implemented")
    method = METHODS.get(name)
    if method is None:
        others = {entry.name: entry for entry in metadata.entry_points(group="vlcache.methods")}
        if name not in others:
            names = ", ".join([*METHODS, *others])
            raise ValueError(f"method {name!r} is not implemented: choose one of {names}")
        method = others[name].load()
    made = method() if budget is None else method(budget=budget)
    return made if quantize is None else replace(made, quantize=quantize)


def as_method(cache: CacheLike) -> CacheMethod:
    """The method that a setting stands for.

    Args:
        cache: a method; a quantizer, or None, for the full cache; a method's or a quantizer's class
            or a method's name for its defaults; a number for VL-Cache with that budget.

    Raises:
        ValueError: it is none of these.
        NotImplementedError: the method is known and not implemented.
    """
    if isinstance(cache, type) and issubclass(cache, CacheMethod | Quantizer):
        cache = cache()
    if isinstance(cache, CacheMethod):
        return cache
    if cache is None or isinstance(cache, Quantizer):
        return FullCache(quantize=cache)
    if isinstance(cache, str):
        return make_method(cache)
    if isinstance(cache, int | float) and not isinstance(cache, bool):
        return VLCache(cache)
    raise ValueError(
        f"cache={cache!r:.60} is no cache method: write VLCache(0.1), 'vl-cache', or 0.1 for "
        "VL-Cache with a tenth"
    )
