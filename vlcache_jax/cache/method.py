"""What a cache method is: how it looks at a prompt, decides what to keep, and makes the pool of it.

    observe (each layer) ─► Observation ─► plan ─► Plan ─► build ─► Pool or PackedPool

The methods themselves are in methods.py.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vlcache_jax.cache.allocate import Allocation, allocate, mixed
from vlcache_jax.cache.budget import POOL_SHARES, Budget, Prompt
from vlcache_jax.cache.compact import compact
from vlcache_jax.cache.packed import PackedPool, arrange, build_packed
from vlcache_jax.cache.quantize import Quantizer, groups
from vlcache_jax.cache.score import Layer, Look, Score, furthest, merged
from vlcache_jax.cache.select import kept_rows, last_marked, rank_rows
from vlcache_jax.cache.state import Pool, round_up, whole_capacity
from vlcache_jax.distributed.collectives import HEADS, mean, total
from vlcache_jax.models.config import TextConfig

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
        salience: largest activation of each token in front of each layer, float32 [B, L, T], by
            which a quantizer finds its pivots.
    """

    budgets: jax.Array
    order: jax.Array | None
    salience: jax.Array | None = None

    def kept(self, prompt: Prompt) -> jax.Array:
        """Which tokens are kept, bool [B, L, K or 1, T]."""
        if self.order is None:
            inside = prompt.inside[:, None, None, :]
            return jnp.broadcast_to(inside, (*self.budgets.shape, 1, prompt.rows))
        return kept_rows(self.order, self.budgets)


@dataclass(frozen=True)
class CacheMethod:
    """A way to keep a part of a prompt's cache; the base of all methods.

    The lengths are per layer: all kv heads of a layer keep equally many tokens, each its own unless
    `shared_heads`. A budget of 1 keeps everything: nothing is scored or moved.

    Attributes:
        budget: the share of the whole cache to keep (0.1 is 10 %), or tokens per layer ("256tok").
        shared_heads: one set of tokens per layer, by the sum of its heads' scores.
        quantize: how what is kept is quantized; not at all by default.
        keep_text: text tokens, all that are neither visual ones nor a context's, are kept before
            any ranking. Where they are more than half of a layer's budget (rounded down, but at
            least one token), the last ones fill that half. What they leave of the budget is
            divided as without them: the first and last tokens that the score always keeps are
            counted by it, and one of them that is text has its place already.
        uniform_share: u, the share of the budget that all layers are given alike: a layer's size is
            u * C + (1 - u) * the allocation's, C being the even size.

    Raises:
        ValueError: the budget or another setting is out of range.
    """

    name: ClassVar[str] = ""

    budget: float | str = 0.1
    shared_heads: bool = False
    quantize: Quantizer | None = field(default=None, kw_only=True)
    keep_text: bool = field(default=False, kw_only=True)
    uniform_share: float = field(default=0.0, kw_only=True)

    def __post_init__(self):
        if not 0 <= self.uniform_share <= 1:
            raise ValueError(f"uniform_share={self.uniform_share} must be from 0 to 1")
        # Made here so that a bad setting is refused now, not when the first prompt runs.
        _ = self.limit, self.rules()

    @property
    def limit(self) -> Budget:
        """The budget, read."""
        return Budget.parse(self.budget)

    def rules(self) -> tuple[Score, Allocation]:
        """What each token is worth, and how many of them each layer keeps."""
        raise NotImplementedError(f"{type(self).__name__} has no rules")

    def windows(self) -> list[Look]:
        """The windows of rows that the rules look at, and what they ask of them."""
        if self.limit.keeps_all:
            return []
        score, allocation = self.rules()
        found = list(score.looks)
        if allocation.window is not None:
            found.append(Look(allocation.window, allocation.threshold))
        return found

    @property
    def continued(self) -> tuple[Look, ...]:
        """What has to be remembered of earlier rows where a prompt is run in parts."""
        return tuple(look for look in merged(self.windows()) if look.window.continues)

    def reach(self, length: int, last_visual: int) -> int | None:
        """How many of a prompt's last rows have to be run together; see `Window.reach`."""
        if self.limit.keeps_all:
            return 1
        score, _ = self.rules()
        looks = (look.reach(length, last_visual) for look in self.windows())
        return furthest([score.reach(length, last_visual), *looks])

    @property
    def is_full(self) -> bool:
        """Whether the pool is the prompt's own keys and values."""
        return self.limit.keeps_all and self.quantize is None

    @property
    def label(self) -> str:
        """The name, with that of the quantizer behind it: "vl-cache+akvq"."""
        return self.name if self.quantize is None else f"{self.name}+{self.quantize.name}"

    @property
    def transforms(self) -> bool:
        """Whether the weights of the values have to be transformed (`models.fold`)."""
        return self.quantize is not None and self.quantize.transform

    def for_model(
        self, config: TextConfig, tsa_layers: tuple[int, ...] | None = None
    ) -> "CacheMethod":
        """This method for a model: what its quantizer takes from the model is filled in.

        Args:
            config: the decoder.
            tsa_layers: text-salient layers that were calibrated for the checkpoint, if any were.

        Raises:
            ValueError: the model cannot take a setting: groups that do not divide its head dim,
                layers that it does not have.
        """
        if self.quantize is None:
            return self
        groups(config.head_dim, self.quantize.group)  # refused now, not when rows are packed
        kind, layers = config.kind, config.num_layers
        return replace(self, quantize=self.quantize.for_decoder(kind, layers, tsa_layers))

    @property
    def any_budget(self) -> "CacheMethod":
        """This method without its budget, but for whether it keeps everything."""
        return self if self.limit.keeps_all else replace(self, budget=POOL_SHARES[0])

    def in_bucket(self, prompt_rows: int) -> "CacheMethod":
        """This method with the budget that its pool is made for, in a bucket of T prompt rows.

        Methods that differ in their budgets alone are then equal, and share programs.
        """
        return replace(self, budget=self.limit.bucket(prompt_rows).share)

    def observe(self, layer: Layer) -> Observation:
        """What is to be remembered of one layer of the running prompt.

        Raises:
            ValueError: a quantizer has pivots, and the layer lacks the stream that enters it.
        """
        salience = None
        if self.quantize is not None and self.quantize.pivots:
            salience = layer.salience()
        if self.limit.keeps_all:
            return Observation(salience=salience)
        score, allocation = self.rules()
        layer = layer.seeing(self.windows())
        return Observation(score(layer), allocation.measure(layer), salience)

    def always(
        self, budgets: jax.Array, prompt: Prompt
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """What layers with these budgets [B, L] keep whatever it is worth.

        Returns:
            How many of a prompt's first tokens and of its last, int32 [B, L], and which of its
            text, bool [B, L, T]; None where text is not kept for being text. Together they are
            never more than the budget.
        """
        score, _ = self.rules()
        if not self.keep_text:
            return *score.always(budgets, prompt), None
        text = last_marked(prompt.text, jnp.maximum(budgets // 2, 1))
        left = budgets - jnp.sum(text, axis=-1, dtype=jnp.int32)
        return *score.always(left, prompt), text

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
        _, allocation = self.rules()
        shown = seen.scores if allocation.by_scores else seen.measured
        sizes = allocation.sizes(prompt, shown)
        if self.uniform_share:
            sizes = mixed(sizes, self.uniform_share, prompt.budget, prompt.length)
        budgets = allocate(sizes, prompt.budget, prompt.length)
        scores = seen.scores
        if scores is None:
            scores = jnp.zeros((batch, layers, 1, prompt.rows), jnp.float32)
            if self.keep_text:  # ends that are text leave places: they go to the latest tokens
                scores += jnp.arange(prompt.rows, dtype=jnp.float32)
        if self.shared_heads:
            scores = total(jnp.sum(scores, axis=2, keepdims=True), HEADS)
        first, last, text = self.always(budgets, prompt)
        order = rank_rows(scores, first, last, prompt.length, text)
        return Plan(budgets, order, seen.salience)

    def pool_shapes(
        self,
        config: TextConfig,
        batch: int,
        prompt_rows: int,
        dtype: jnp.dtype,
        new_rows: int = 0,
        room: Budget | None = None,
    ) -> AnyPool:
        """What `build` makes for a batch, as shapes; nothing is allocated.

        Args:
            config: the decoder.
            batch: sequences, B.
            prompt_rows: the prompts' bucket, T.
            dtype: type of the cache.
            new_rows: rows of a layer's packed pool that are left free for new tokens.
            room: what the pool is made for; the method's own budget by default.
        """

        def array(kind: jax.typing.DTypeLike, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((batch, *shape), kind)

        layers, heads = config.num_layers, config.num_kv_heads
        rows = array(dtype, heads, whole_capacity(layers, prompt_rows), config.head_dim)
        order = None if self.limit.keeps_all else array("int32", layers, heads, prompt_rows)
        plan = Plan(array("int32", layers), order, array("float32", layers, prompt_rows))
        prompt = Prompt(array("int32"), array("bool", prompt_rows), layers, self.limit.data)
        build = partial(self.build, new_rows=new_rows, room=room)
        return jax.eval_shape(build, rows, rows, plan, prompt)

    def build(
        self,
        k: jax.Array,
        v: jax.Array,
        plan: Plan,
        prompt: Prompt,
        new_rows: int = 0,
        room: Budget | None = None,
    ) -> AnyPool:
        """Make the pool of what is kept.

        Args:
            k: keys of all layers [B, K, >= L * T, H], layer l at row l * T.
            v: values, in the shape of the keys.
            plan: what is kept.
            prompt: the prompts.
            new_rows: rows of a layer's packed pool that are left free for new tokens.
            room: what the pool is made for; the method's own budget by default. A prompt that keeps
                more than this has no place in it.

        Returns:
            The pool. With everything kept, in room for all, and nothing quantized it is the given
            arrays themselves, offset[l] = l * T.
        """
        room = room or self.limit
        visual = prompt.visual[:, None, None, :]
        if self.quantize is not None:
            kept, evicts = plan.kept(prompt), not self.limit.keeps_all
            rows = arrange(self.quantize, kept, plan.budgets, prompt, plan.salience, evicts)
            size = self.quantize.capacity(room, prompt.layers, prompt.rows, new_rows)
            return build_packed(self.quantize, k, v, *rows, _count(kept & visual), size)
        order = plan.order
        if order is None and room.keeps_all:
            offset = jnp.arange(prompt.layers, dtype=jnp.int32) * prompt.rows
            offset = jnp.broadcast_to(offset, plan.budgets.shape)
            visual = jnp.broadcast_to(visual, (*plan.budgets.shape, 1, prompt.rows))
            most = min(round_up(prompt.rows), k.shape[2])
            return Pool(k, v, offset, plan.budgets, _count(visual), most)
        if order is None:
            order = jnp.arange(prompt.rows, dtype=jnp.int32)
            order = jnp.broadcast_to(order, (*plan.budgets.shape, 1, prompt.rows))
        visual = jnp.take_along_axis(visual, order, axis=-1)
        visual = visual & (
            jnp.arange(prompt.rows, dtype=jnp.int32) < plan.budgets[:, :, None, None]
        )
        capacity = room.capacity(prompt.layers, prompt.rows)
        return compact(k, v, order, plan.budgets, _count(visual), capacity)


def _count(tokens: jax.Array) -> jax.Array:
    """Tokens of each layer, the mean over its heads: bool [B, L, K, T] -> float32 [B, L]."""
    return mean(jnp.mean(jnp.sum(tokens, axis=-1, dtype=jnp.float32), axis=-1), HEADS)
