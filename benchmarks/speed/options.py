"""Options that the commands of speed and throughput have in common, and what they stand for."""

from collections.abc import Sequence
from typing import Annotated

import jax
import typer

from benchmarks.command import check_known
from benchmarks.speed.cases import FULL
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import METHODS, VLCache, as_method, make_method
from vlcache_jax.cache.quantizers import QUANTIZERS, make_quantizer

Methods = Annotated[
    list[str] | None,
    typer.Option(help=f"Of {', '.join(METHODS)}; {VLCache.name} by default; several times."),
]
Budgets = Annotated[
    list[str] | None, typer.Option(help="As 0.1 or 256tok; 0.1 by default; several times.")
]
KvBits = Annotated[
    list[str] | None,
    typer.Option(
        help=f"How what is kept is quantized, of {', '.join(QUANTIZERS)}, or 16 for not at all "
        "(the default); the full cache too; several times."
    ),
]
Dtype = Annotated[str | None, typer.Option(help="bfloat16 by default on a GPU, elsewhere float32.")]


def variants_of(
    methods: Sequence[str] | None,
    budgets: Sequence[str] | None,
    kv_bits: Sequence[str] | None = None,
) -> tuple[CacheMethod, ...]:
    """The full cache, and every method (VL-Cache) at every budget (0.1).

    With `kv_bits` each of these in every one of them, and the full cache as it is besides.

    Raises:
        ValueError: there is no such method, budget or quantizer.
    """
    quantizers = [make_quantizer(name) for name in kv_bits or ["16"]]
    caches: list[CacheMethod] = [as_method(each) for each in quantizers if each is not None]
    caches += [
        make_method(name, budget, quantizer)
        for name in methods or [VLCache.name]
        if name != FULL.name
        for budget in budgets or ["0.1"]
        for quantizer in quantizers
    ]
    return FULL, *caches


def dtype_of(dtype: str | None) -> str:
    """Type of weights and cache: by default what the device is fast with.

    Raises:
        ValueError: there is no such type.
    """
    kind = dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    check_known("dtype", [kind], ("bfloat16", "float16", "float32"))
    return kind
