"""What the kernel tests share: factors and the cases made of them, inputs, tolerances."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# A case that may choose takes the first value, so the cheapest one stands first.
SHAPES: dict[str, Sequence[Any]] = {
    "dtype": ("bfloat16", "float16", "float32"),
    "head_dim": (32, 64, 72, 80, 128),
    "group": (1, 4, 7, 8),
    "length": (1, 17, 255, 257, 1000),
}
FACTORS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "prefill_attention": SHAPES | {"causal": (True, False)},
    "chunk_attention": {
        "dtype": ("bfloat16", "float32"),
        "head_dim": (32, 80),
        "group": (1, 4),
        "rows": (7, 1, 133),
        "length": (255, 600),
        "layer": (0, 1, 2),
    },
    "window_scores": SHAPES | {"window": ("first", "inside", "last", "one", "all")},
    "ragged_decode_attention": SHAPES | {"splits": (1, 3, None)},
    "add_rms_norm": {
        "dtype": SHAPES["dtype"],
        "width": (1, 80, 128, 1000, 4096),
        "rows": ((1,), (2, 3), (17, 1)),
    },
    "sample_tokens": {
        "logits": ("normal", "tied", "some -inf"),
        "vocabulary": (5, 1, 512, 1301),
        "top_k": (0, 1, 7, "all", "beyond"),
        "top_p": (1.0, 1e-6, 0.3, 0.9),
        "temperature": (1.0, 0.2, 1e4, 1e30),
    },
}
"""Of each operation; `splits` None is the kernel's own choice, `rows` of a chunk its queries."""

TOLERANCES = {
    "float32": {1.0: 4e-6, 0.99: 1e-6, 0.9: 5e-7},
    "float16": {1.0: 1e-3, 0.99: 5e-4, 0.9: 2e-4},
    "bfloat16": {1.0: 1e-2, 0.99: 4e-3, 0.9: 1.5e-3},
}
"""Type of the result -> fraction of its elements -> their largest absolute error, as a share of the
largest reference value."""

# An interpreted kernel is mostly small fusions: by XLA's older code generator for the CPU, which is
# gone in jax 0.11, they compile in a third of the time.
_OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False

both_backends = pytest.mark.parametrize("backend", ["triton", "xla"])


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Cases in which any two values of different factors meet at least once.

    Greedy: each next case is the one of the full product with the most pairs not met yet, the
    first one of equals.
    """
    every = [(case, set(combinations(enumerate(case), 2))) for case in product(*factors.values())]
    missing = set().union(*(pairs for _, pairs in every))
    chosen = []
    while missing:
        case, pairs = max(every, key=lambda entry: len(entry[1] & missing))
        chosen.append(case)
        missing -= pairs
    return chosen


def covering(operation: str) -> pytest.MarkDecorator:
    """The argument `case`: a covering set of the operation's cases."""
    return _cases(pairwise(FACTORS[operation]))


def full_product(operation: str) -> pytest.MarkDecorator:
    """The argument `case`: all there are."""
    return _cases(product(*FACTORS[operation].values()))


def _cases(cases: Iterable[tuple[Any, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: "-".join(map(str, case)))


def compiled(function: Callable[..., Any], *static: str) -> Any:
    """The function under `jax.jit`, with the names of its compile-time arguments."""
    return jax.jit(function, static_argnames=static, compiler_options=_OPTIONS)


def kv_heads(group: int) -> int:
    """Two, but for groups so large that their interpreted kernels would take long."""
    return 2 if group < 7 else 1


def draw(*shapes: tuple[int, ...], dtype: str = "float32", sharpness: float = 3.0) -> list[Any]:
    """Normal numbers; the first array, the queries, times `sharpness`.

    So some keys count for much more than others, and no mean over many hides an error.
    """
    rng = np.random.default_rng(zlib.crc32(repr(shapes).encode()))
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays[0] *= sharpness
    return [array.astype(jnp.dtype(dtype)) for array in arrays]


def int32(*numbers: int) -> Any:
    """One number per sequence: lengths, offsets."""
    return np.array(numbers, np.int32)


def poison(array: Any, there: Any) -> Any:
    """The array with NaN where nothing is there: what stands in padding must not matter."""
    return np.where(there, array, np.array(np.nan, array.dtype))


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """RoPE of x [B, K, rows, H] by angles [B, H / 2], rounded to the type of x."""
    first, second = np.split(x.astype(np.float32), 2, axis=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def put(tail: Any, fill: Any, row: Any) -> Any:
    """The tail [B, K, R, H] with one row more, row [B, K, H] at `fill` of each sequence."""
    tail = np.array(tail)
    for b, at in enumerate(fill):
        tail[b, :, at] = row[b]
    return tail


def assert_close(ours: Any, reference: Any, dtype: str) -> None:
    """Within the tolerances of a type."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.isfinite(ours).all()
    errors = np.abs(ours - reference) / np.abs(reference).max()
    for fraction, largest in TOLERANCES[dtype].items():
        within = np.mean(errors <= largest)
        assert within >= fraction, f"{within:.4f} within {largest}, at most {errors.max():.2e}"


def same_bits(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether arrays are equal to the last bit, NaN too."""
    pairs = zip(some, others, strict=True)
    return all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs)
