"""Many methods that watch one prefill: what each sees of it, plans and builds.

    prompts ─► prefill ─┬─► the full cache                                     [B]
               K, V     └─► plan, build: pools of M methods of like shapes     [M * B]

Methods whose pools have the same shapes, which is to say about the same budget and quantizer, stand
one after the other along the batch axis and are decoded together. Values that a quantizer wants
transformed are so when its pool is built, and decoded by the folded weights: what a prefill by
these would leave behind, but for the rounding.
"""

import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp

from pallas_kernels.hadamard import transform
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod, Observation, Plan
from vlcache_jax.cache.score import LastRows, Layer
from vlcache_jax.cache.state import Pool
from vlcache_jax.models.config import ModelConfig, TextConfig
from vlcache_jax.models.families import Params
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.stages import Stages
from vlcache_jax.vlm import VLM

LANES = 64
"""Most sequences that are decoded together: those of several methods."""

Key = TypeVar("Key", bound=Hashable)


@lru_cache(maxsize=1024)
def pool_shape(method: CacheMethod, config: TextConfig, rows: int) -> Any:
    """The shapes of a method's pool of prompts of T rows, by which pools fit together or not."""
    pool = method.pool_shapes(config, 1, rows, jnp.dtype(jnp.bfloat16))
    return jax.tree.structure(pool), *(leaf.shape for leaf in jax.tree.leaves(pool))


@dataclass(frozen=True)
class Together(CacheMethod):
    """Several methods that watch the same prefill; they plan and build on their own.

    `budget` and `shared_heads` are without meaning.
    """

    methods: tuple[CacheMethod, ...] = ()

    def __post_init__(self):
        """Nothing to check: the methods are made."""

    def observe(self, layer: Layer) -> Any:
        """What each method saw, in their order; what no budget changes is watched once for all."""
        # Last rows are as many as a method's budget allows.
        alike: dict[Budget | None, list[CacheMethod]] = defaultdict(list)
        for method in self.methods:
            moving = any(isinstance(look.window, LastRows) for look in method.windows())
            alike[method.limit if moving else None].append(method)
        found = {}
        for group in alike.values():
            prompt = replace(layer.prompt, budget=group[0].limit.data)
            looks = [look for method in group for look in method.windows()]
            watched = replace(layer, prompt=prompt).seeing(looks)
            for method in group:
                prompt = replace(layer.prompt, budget=method.limit.data)
                found[method] = method.observe(replace(watched, prompt=prompt))
        return tuple(found[method] for method in self.methods)


@dataclass(frozen=True)
class SharedPrefill:
    """What many methods do with one prefill: pure functions of arrays, to be compiled.

    Attributes:
        config: the model.
        backend: attention backend.
        transformed: the parameters have the transform of the values folded in.
        max_new_tokens: of an answer: a pool that packs new tokens too has room for them.
    """

    config: ModelConfig
    backend: str | None = None
    transformed: bool = False
    max_new_tokens: int = 1

    def prefill(
        self, params: Params, inputs: ModelInputs, *, methods: tuple[CacheMethod, ...]
    ) -> tuple[Pool, jax.Array, tuple[Observation, ...]]:
        """The full cache, the likeliest first token [B], and what each method saw."""
        generate = Generate(self.config, Together(methods=methods), 1, backend=self.backend)
        settings = generate.settings(inputs.tokens.shape[0])
        prefilled, token = generate.stages.prefill(params, inputs, settings)
        nothing = replace(prefilled, seen=Observation())
        full, _ = Stages(self.config).build_cache(nothing, inputs, settings)
        assert isinstance(full, Pool)  # nothing is quantized
        # What is stacked are the methods' observations of each layer, in the shape of `observe`.
        return full, token, cast(Any, prefilled.seen)

    def build(
        self,
        full: Pool,
        inputs: ModelInputs,
        seen: list[Observation],
        told: Any,
        *,
        methods: tuple[CacheMethod, ...],
    ) -> tuple[AnyPool, Any]:
        """The pools of M methods as one of M * B sequences, and `measure` of each, stacked.

        Args:
            full: the full cache.
            inputs: the prompts.
            seen: what each method saw.
            told: what else is known, for `inform` and `measure`.
            methods: of pools of the same shapes.
        """
        pools, measures = [], []
        for method, own in zip(methods, seen, strict=True):
            generate = Generate(self.config, method, self.max_new_tokens)
            prompt = generate.stages.prompt(inputs, generate.settings(inputs.tokens.shape[0]))
            plan = method.plan(self.inform(method, own, told), prompt)
            moved = method.transforms and not self.transformed
            v = transform(full.v) if moved else full.v
            pool = method.build(full.k, v, plan, prompt, generate.stages.reserved_rows)
            pools.append(pool)
            measures.append(self.measure(method, pool, plan, full, prompt, told))
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *measures)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pools), stacked

    def inform(self, method: CacheMethod, seen: Observation, told: Any) -> Observation:
        """What a method plans by, of what it saw and what it may be told beside."""
        return seen

    def measure(
        self,
        method: CacheMethod,
        pool: AnyPool,
        plan: Plan,
        full: Pool,
        prompt: Prompt,
        told: Any,
    ) -> Any:
        """What is to be told of a method's pool, a tree of arrays: nothing here."""


class Pools(NamedTuple):
    """Pools of some methods, of like shapes.

    Attributes:
        keys: what the methods are called, M of them.
        method: one of them: all decode as it does.
        params: parameters to decode with.
        pool: of M * B sequences.
        measures: of `SharedPrefill.measure`, stacked.
    """

    keys: list[Any]
    method: CacheMethod
    params: Params
    pool: AnyPool
    measures: Any


class Comparer:
    """Runs programs of a comparison on a model, and keeps them compiled.

    Args:
        vlm: the model.

    Attributes:
        seconds: spent so far on "compile", and on each of the programs.
    """

    def __init__(self, vlm: VLM):
        if vlm.mesh is not None and vlm.mesh.data > 1:
            raise NotImplementedError(
                f"an evaluation on mesh {vlm.mesh} does not split its requests yet: use model="
                f"{vlm.mesh.model} alone"
            )
        self.vlm = vlm
        self.seconds: dict[str, float] = defaultdict(float, compile=0.0)
        self._programs = Programs(mesh=vlm.mesh)

    def pools(
        self,
        way: SharedPrefill,
        full: Pool,
        inputs: ModelInputs,
        methods: Mapping[Key, CacheMethod],
        seen: tuple[Observation, ...],
        told: Any = None,
    ) -> Iterator[Pools]:
        """The pools of all methods, by the shapes of them.

        Args:
            way: the stages.
            full: the full cache of B prompts.
            inputs: the prompts.
            methods: by what they are called, made for the model; none is the full cache.
            seen: what each of them saw.
            told: what else is known, see `SharedPrefill.build`.
        """
        groups, saw = defaultdict(list), dict(zip(methods, seen, strict=True))
        batch, rows = inputs.tokens.shape
        for key, method in methods.items():
            groups[pool_shape(method, self.vlm.config.text, rows)].append(key)
        most = max(1, LANES // batch)
        parts = [
            alike[at : at + most] for alike in groups.values() for at in range(0, len(alike), most)
        ]
        for keys in parts:
            some, own = tuple(methods[key] for key in keys), [saw[key] for key in keys]
            pool, measures = self.do(way, "build", full, inputs, own, told, methods=some)
            params = self.vlm.folded if some[0].transforms else self.vlm.params
            yield Pools(keys, some[0], params, pool, measures)

    def do(
        self, owner: Any, name: str, *args: Any, donate: tuple[int, ...] = (), **static: Any
    ) -> Any:
        """Run a method of `owner` as a compiled program.

        Args:
            owner: what has the method; equal owners share programs.
            name: the method's.
            args: trees of arrays.
            donate: numbers of those that are given up.
            static: further arguments, which are compiled in.
        """
        key, function = (owner, name, *static.items()), partial(getattr(owner, name), **static)
        program, compiling = self._programs.ready(key, function, *args, donate=donate)
        began = time.perf_counter()
        result = program(*args)
        self.seconds["compile"] += compiling
        self.seconds[name] += time.perf_counter() - began
        return result
