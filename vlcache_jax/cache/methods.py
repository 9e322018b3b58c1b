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

Any of them may also quantise what it keeps (quantize.py); alone, a quantiser stands for the full
cache, quantised. A method is a frozen dataclass: equal settings share one compiled program.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.allocate import (
    ALLOCATIONS,
    Allocation,
    AllocationFunction,
    Pyramid,
    Sparsity,
    Uniform,
    allocate,
)
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.compact import compact
from vlcache_jax.cache.packed import PackedPool, arrange, build_packed
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.score import (
    SCORES,
    AllRows,
    ColumnSum,
    Ends,
    Layer,
    Noise,
    PooledWindow,
    PostVisionRows,
    RecentScore,
    Score,
    ScoreFunction,
)
from vlcache_jax.cache.select import kept_rows, rank_rows
from vlcache_jax.cache.state import Pool, whole_capacity
from vlcache_jax.config import TextConfig

AnyPool = Pool | PackedPool
"""What a method makes: rows of full width, or most of them packed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What a method saw of the layers while the prompt ran; None where it did not look.

    Attributes:
        scores: of each token, float32 [B, K, T] for one layer, [B, L, K, T] for all.
        measured: the allocation's measure, float32 [B] for one layer, [B, L] for all.
        salience: largest activation of each token in the residual stream that enters the layer,
            float32 [B, T] for one layer, [B, L, T] for all.
    """

    scores: jax.Array | None = None
    measured: jax.Array | None = None
    salience: jax.Array | None = None

    @classmethod
    def stack(cls, layers: "list[Observation]") -> "Observation":
        """The observations of all layers as one."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *layers)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What is to be kept.

    Attributes:
        budgets: k, rows of each layer, int32 [B, L].
        order: positions by worth, of which each kv head keeps the first k, int32 [B, L, K, T], or
            [B, L, 1, T] where the heads keep the same ones; None where every row is kept.
        salience: as in `Observation`: by it a quantiser finds its pivots.
    """

    budgets: jax.Array
    order: jax.Array | None
    salience: jax.Array | None = None

    def kept(self, prompt: Prompt) -> jax.Array:
        """Which tokens are kept, bool [B, L, K or 1, T]."""
        if self.order is None:
            inside = jnp.arange(prompt.rows) < prompt.length[:, None]
            return jnp.broadcast_to(inside[:, None, None, :], (*self.budgets.shape, 1, prompt.rows))
        return kept_rows(self.order, self.budgets)


@dataclass(frozen=True)
class CacheMethod:
    """A way to keep a part of a prompt's cache; the base of all methods.

    The lengths are per layer: all kv heads of a layer keep equally many tokens, each its own unless
    `shared_heads`. A budget of 1 or more keeps everything: nothing is scored or moved.

    Attributes:
        budget: the share of the whole cache to keep (0.1 is 10 %), or tokens per layer ("256tok").
        shared_heads: one set of tokens per layer, by the sum of its heads' scores.
        quantize: how what is kept is quantised; not at all by default.

    Raises:
        ValueError: the budget or another setting is out of range.
    """

    name: ClassVar[str] = ""

    budget: float | str = 0.1
    shared_heads: bool = False
    quantize: Quantizer | None = field(default=None, kw_only=True)

    def __post_init__(self):
        # Made here so that a bad setting is refused now, not when the first prompt runs.
        _ = self.limit, self.rules()

    @property
    def limit(self) -> Budget:
        """The budget, read."""
        return Budget.parse(self.budget)

    def rules(self) -> tuple[Score, Allocation]:
        """What each token is worth, and how many of them each layer keeps."""
        raise NotImplementedError(f"{type(self).__name__} has no rules")

    @property
    def label(self) -> str:
        """The name, with that of the quantiser behind it: "vl-cache+akvq"."""
        return self.name if self.quantize is None else f"{self.name}+{self.quantize.name}"

    @property
    def transforms(self) -> bool:
        """Whether the weights of the values have to be transformed (`models.fold`)."""
        return self.quantize is not None and self.quantize.transform

    def for_model(
        self, config: TextConfig, tsa_layers: tuple[int, ...] | None = None
    ) -> "CacheMethod":
        """This method for a model: what its quantiser takes from the model is filled in.

        Args:
            config: the decoder.
            tsa_layers: text-salient layers that were calibrated for the checkpoint, if any were.
        """
        if self.quantize is None:
            return self
        filled = self.quantize.for_decoder(config.kind, config.num_layers, tsa_layers)
        return self if filled == self.quantize else replace(self, quantize=filled)

    def capacity(self, layers: int, prompt_rows: int) -> int:
        """Rows of the pool for L layers and a bucket of T prompt rows, were it not quantised."""
        return self.limit.capacity(layers, prompt_rows)

    def observe(self, layer: Layer) -> Observation:
        """Look at one layer of the running prompt."""
        salience = None
        if self.quantize is not None and self.quantize.watches_stream:
            if layer.entering is None:
                raise ValueError("pivots are found by the stream that enters a layer: give it")
            salience = jnp.max(jnp.abs(layer.entering), axis=-1).astype(jnp.float32)
        if self.limit.keeps_all:
            return Observation(salience=salience)
        score, allocation = self.rules()
        measured = allocation.measure(layer)
        return Observation(score(layer), measured, salience)

    def plan(self, seen: Observation, prompt: Prompt) -> Plan:
        """Decide what is kept: budgets by the allocation, tokens by the score.

        Args:
            seen: the observations of all layers.
            prompt: the prompts.
        """
        batch, layers = *prompt.length.shape, prompt.layers
        if self.limit.keeps_all:
            budgets = jnp.broadcast_to(prompt.length[:, None], (batch, layers))
            return Plan(budgets, None, seen.salience)
        score, allocation = self.rules()
        sizes = allocation.sizes(prompt, seen.measured)
        budgets = allocate(sizes, self.limit, prompt.length)
        scores = seen.scores
        if scores is None:
            scores = jnp.zeros((batch, layers, 1, prompt.rows), jnp.float32)
        if self.shared_heads:
            scores = jnp.sum(scores, axis=2, keepdims=True)
        first, last = score.always(budgets, prompt)
        return Plan(budgets, rank_rows(scores, first, last, prompt.length), seen.salience)

    def pool_shapes(
        self,
        config: TextConfig,
        batch: int,
        prompt_rows: int,
        dtype: jnp.dtype,
        new_rows: int = 0,
    ) -> AnyPool:
        """What `build` makes for a bucket of T prompt rows, as shapes; nothing is allocated."""
        layers, heads = config.num_layers, config.num_kv_heads
        shape = batch, heads, whole_capacity(layers, prompt_rows), config.head_dim
        evicts = not self.limit.keeps_all

        def make() -> AnyPool:
            rows = jnp.zeros(shape, dtype)
            prompt = Prompt(
                jnp.zeros((batch,), jnp.int32),
                jnp.zeros((batch, prompt_rows), bool),
                layers,
                self.limit,
            )
            order = jnp.zeros((batch, layers, heads, prompt_rows), jnp.int32) if evicts else None
            salience = jnp.zeros((batch, layers, prompt_rows))
            plan = Plan(jnp.zeros((batch, layers), jnp.int32), order, salience)
            return self.build(rows, rows, plan, prompt, new_rows)

        return jax.eval_shape(make)

    def build(
        self, k: jax.Array, v: jax.Array, plan: Plan, prompt: Prompt, new_rows: int = 0
    ) -> AnyPool:
        """Make the pool of what is kept.

        Args:
            k: keys of all layers [B, K, >= L * T, H], layer l at row l * T.
            v: values, likewise.
            plan: what is kept.
            prompt: the prompts.
            new_rows: rows of a layer's packed pool that are left free for new tokens.

        Returns:
            The pool. With everything kept and nothing quantised it is the given arrays themselves,
            offset[l] = l * T.
        """
        visual = prompt.visual[:, None, None, :]
        if self.quantize is not None:
            kept = plan.kept(prompt)
            arrangement = arrange(self.quantize, kept, plan.budgets, prompt, plan.salience)
            size = self.quantize.capacity(self.limit, prompt.layers, prompt.rows, new_rows)
            return build_packed(self.quantize, k, v, arrangement, _count(kept & visual), size)
        if plan.order is None:
            offset = jnp.arange(prompt.layers, dtype=jnp.int32) * prompt.rows
            offset = jnp.broadcast_to(offset, plan.budgets.shape)
            visual = jnp.broadcast_to(visual, (*plan.budgets.shape, 1, prompt.rows))
            return Pool(k, v, offset, plan.budgets, _count(visual))
        visual = jnp.take_along_axis(visual, plan.order, axis=-1)
        visual = visual & (jnp.arange(prompt.rows) < plan.budgets[:, :, None, None])
        order = jnp.broadcast_to(
            plan.order, (*plan.order.shape[:2], k.shape[1], plan.order.shape[3])
        )
        capacity = self.capacity(prompt.layers, prompt.rows)
        return compact(k, v, order, plan.budgets, _count(visual), capacity)


def _count(tokens: jax.Array) -> jax.Array:
    """Tokens of each layer, the mean over its heads: bool [B, L, K, T] -> float32 [B, L]."""
    return jnp.mean(jnp.sum(tokens, axis=-1, dtype=jnp.float32), axis=-1)


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
    the full cache, or a new prefill.

    Attributes:
        budget: as in `CacheMethod`.
        shared_heads: likewise.
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
        budget: as in `CacheMethod`.
        shared_heads: likewise.
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
        budget: as in `CacheMethod`.
        shared_heads: likewise.
        window: rows to look from, always kept; at most half of the budget.
        kernel: neighbours of the smoothing, an odd number.
    """

    name: ClassVar[str] = "snapkv"

    window: int = 32
    kernel: int = 5

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return PooledWindow(self.window, self.kernel), Uniform()


@dataclass(frozen=True)
class PyramidKV(CacheMethod):
    """PyramidKV (Cai et al., 2024): SnapKV's score, sizes that fall from the first layer on.

    Attributes:
        budget: as in `CacheMethod`.
        shared_heads: likewise.
        window: as in `SnapKV`.
        kernel: as in `SnapKV`.
        slope: the last layer's size is the mean divided by this.
    """

    name: ClassVar[str] = "pyramidkv"

    window: int = 32
    kernel: int = 5
    slope: int = 20

    def rules(self) -> tuple[Score, Allocation]:
        """See the class."""
        return PooledWindow(self.window, self.kernel), Pyramid(self.window, self.slope)


@dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """StreamingLLM (Xiao et al., 2023): the first tokens and the last ones.

    Attributes:
        budget: as in `CacheMethod`.
        shared_heads: without effect: the heads keep the same tokens anyway.
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
        budget: as in `CacheMethod`.
        shared_heads: likewise.
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
class Custom(CacheMethod):
    """Any score with any allocation, or your own.

    The budgets that an allocation gives are lengths per layer, the same for all kv heads of it.

    Attributes:
        budget: as in `CacheMethod`.
        shared_heads: likewise.
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
        score, allocation = self.score, self.allocation
        if isinstance(score, str):
            score = _named(score, SCORES, "score")
        if not isinstance(score, Score):
            score = ScoreFunction(score)
        if self.recent_ratio is not None:
            if not isinstance(score, RecentScore):
                raise ValueError(
                    f"{type(score).__name__} decides itself what is always kept: leave "
                    f"recent_ratio={self.recent_ratio} out"
                )
            score = replace(score, recent_ratio=self.recent_ratio)
        if isinstance(allocation, str):
            allocation = _named(allocation, ALLOCATIONS, "allocation")
        if not isinstance(allocation, Allocation):
            allocation = AllocationFunction(allocation)
        return score, allocation


_Rule = TypeVar("_Rule")


def _named(name: str, table: dict[str, _Rule], what: str) -> _Rule:
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}: choose one of {', '.join(table)}")
    return table[name]


def as_method(cache: CacheMethod | Quantizer | None) -> CacheMethod:
    """The method that a setting stands for: the full cache for None, quantised for a quantiser."""
    if isinstance(cache, CacheMethod):
        return cache
    return FullCache(quantize=cache)


METHODS: dict[str, type[CacheMethod]] = {
    method.name: method
    for method in (FullCache, VLCache, H2O, SnapKV, PyramidKV, StreamingLLM, RandomKV)
}
"""The methods of this library by the name that the command line, JSON and files use."""


def make_method(
    name: str, budget: float | str | None = None, quantize: Quantizer | None = None
) -> CacheMethod:
    """A method by its name, with its other settings at their defaults.

    Methods of other packages are found by their entry points in the group `vlcache.methods`, each
    a class like those above.

    Args:
        name: a name of `METHODS` or of an entry point.
        budget: see `CacheMethod`; the method's own default where it is None.
        quantize: see `CacheMethod`.

    Raises:
        ValueError: there is no such method, or the budget does not fit it.
        NotImplementedError: the method is known and not implemented.
    """
    if name == "fastv":
        raise NotImplementedError("method fastv, which prunes tokens, is not implemented")
    others = {entry.name: entry for entry in metadata.entry_points(group="vlcache.methods")}
    if name not in METHODS and name not in others:
        names = ", ".join([*METHODS, *others])
        raise ValueError(f"method {name!r} is not implemented: choose one of {names}")
    method = METHODS[name] if name in METHODS else others[name].load()
    made = method() if budget is None else method(budget=budget)
    return made if quantize is None else replace(made, quantize=quantize)
