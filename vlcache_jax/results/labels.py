"""What methods are called where several are shown, and their settings as plain values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.errors import short


def label(method: CacheMethod) -> str:
    """What a method is called among others: its name, and its budget where it has one."""
    return method.label if method.limit.keeps_all else f"{method.label} {method.limit}"


def labels(methods: Sequence[CacheMethod]) -> list[str]:
    """What each of some methods is called, no two alike.

    Raises:
        ValueError: two cannot be told apart by their settings.
    """
    names, settings = [label(method) for method in methods], [_flat(m) for m in methods]
    found = []
    for name, own in zip(names, settings, strict=True):
        alike = [other for other, its in zip(settings, names, strict=True) if its == name]
        unlike = [n for n in own if any(other.get(n) != own[n] for other in alike)]
        found.append(", ".join([name, *(f"{n}={short(own[n])}" for n in unlike)]))
    if twice := [name for name in found if found.count(name) > 1]:
        raise ValueError(
            f"several columns would be called {short(twice[0])!r}: give each method once, and "
            "leave out the full cache, which is always shown"
        )
    return found


def settings_of(setting: Any) -> Any:
    """A method's or a quantizer's settings as plain values."""
    if isinstance(setting, CacheMethod | Quantizer):
        names = [field.name for field in dataclasses.fields(setting)]
        return {"name": setting.name} | {n: settings_of(getattr(setting, n)) for n in names}
    if isinstance(setting, tuple):
        return [settings_of(value) for value in setting]
    if setting is None or isinstance(setting, str | int | float):
        return setting
    return getattr(setting, "__qualname__", None) or repr(setting)


def _flat(setting: CacheMethod | Quantizer) -> dict[str, Any]:
    """A method's settings by name but its budget, a quantizer's among them."""
    own = {each.name: getattr(setting, each.name) for each in dataclasses.fields(setting)}
    if isinstance(own.get("quantize"), Quantizer):
        own |= _flat(own.pop("quantize"))
    return {name: settings_of(value) for name, value in own.items() if name != "budget"}
