"""The cache methods of an engine: those that share its slots, whatever their budgets."""

from collections.abc import Sequence

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import CacheLike, FullCache, as_method
from vlcache_jax.serving.slots import SlotGroup
from vlcache_jax.vlm import VLM


def served(
    vlm: VLM, methods: Sequence[CacheLike], groups: Sequence[SlotGroup]
) -> list[CacheMethod]:
    """The methods that are served, without their budgets."""
    lists = all(isinstance(each, Sequence) and each for each in (methods, groups))
    if not lists or isinstance(methods, str) or not all(isinstance(x, SlotGroup) for x in groups):
        raise ValueError(
            "an engine has a list of methods and one of `SlotGroup`, at least one each"
        )
    own = (as_method(each).for_model(vlm.config.text, vlm.tsa_layers) for each in methods)
    made = list(dict.fromkeys(map(kind, own)))
    [quantizer, *others] = {method.quantize for method in made}
    if others:
        names = ", ".join(method.label for method in made)
        raise ValueError(f"the methods {names} must all have the same quantizer, or none")
    if quantizer is not None and quantizer.residual is not None:
        raise NotImplementedError(
            f"{quantizer.name} packs new tokens (residual={quantizer.residual}), which slots of "
            "different age cannot: leave residual out"
        )
    for method in made:
        if not any(group.serves(method) for group in groups):
            raise ValueError(
                f"no slot is made for {method.label}: a quantized full cache needs a group with a "
                "budget of 1, and other methods one with less"
            )
    return made


def kind(cache: CacheMethod) -> CacheMethod:
    """A method without its budget: those that keep everything are one."""
    return FullCache(quantize=cache.quantize) if cache.limit.keeps_all else cache.any_budget
