"""The operations of `pallas_kernels` as the benchmarks ask for them: configurations and inputs.

Inputs are made by a `Draw`, of the size that is asked for: as shapes alone, on the host, or on the
device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from pallas_kernels import (
    add_rms_norm,
    prefill_attention,
    quantized_decode_attention,
    ragged_decode_attention,
    sample_tokens,
    tuning,
    window_scores,
)
from pallas_kernels.backends import current_device
from pallas_kernels.packing import per_word
from pallas_kernels.rows import LayerRows, NewToken, PackedRows, Segment, Tail

Draw = Callable[..., Any]
"""A function of a type and of the sides of an array: random numbers; "uint32" are random bits."""


class Operation(NamedTuple):
    """One operation.

    Attributes:
        kernel: its Triton version.
        fixed: arguments that every benchmark gives it.
        scaled: it takes the scale of logits: its size is a head's, else a row's.
    """

    kernel: Callable[..., Any]
    fixed: dict[str, Any]
    scaled: bool = True


def _prefill(q: Any, *arrays: Any, **settings: Any) -> Any:
    """Attention of whole prompts, or of chunks where a layer in a buffer follows the queries."""
    backend = prefill_attention.triton
    of_layer = isinstance(arrays[0], LayerRows)
    run = backend.chunk_attention if of_layer else backend.prefill_attention
    return run(q, *arrays, **settings)


OPERATIONS: dict[str, Operation] = {
    "prefill_attention": Operation(_prefill, {}),
    "window_scores": Operation(window_scores.triton.window_scores, {"threshold": 0.01}),
    "ragged_decode_attention": Operation(ragged_decode_attention.triton.append_and_attend, {}),
    "quantized_decode_attention": Operation(
        quantized_decode_attention.triton.append_and_attend, {"transform": True}
    ),
    "add_rms_norm": Operation(add_rms_norm.triton.add_rms_norm, {"eps": 1e-5}, scaled=False),
    "sample_tokens": Operation(sample_tokens.triton.sample_tokens, {}, scaled=False),
}


def candidates(
    operation: str, dtype: str, size: int, capability: int | None = None
) -> tuple[Any, ...]:
    """The configurations of an operation, the default first.

    Args:
        operation: a name of `OPERATIONS`.
        dtype: of the inputs.
        size: head dim, width or vocabulary.
        capability: of the GPU, in tenths; this device's by default, or Hopper's.
    """
    capability = capability or current_device().capability or 90
    return tuning.candidates(operation, capability, dtype, size)


def kernel(operation: str, size: int, **settings: Any) -> Callable[..., Any]:
    """The Triton version of an operation: a function of inputs and of its `config`."""
    function, fixed, scaled = OPERATIONS[operation]
    scale = {"scale": size**-0.5} if scaled else {}
    return partial(function, **fixed, **scale, **settings)


def short(config: Any) -> str:
    """A configuration in few letters: "block_q 128, block_k 64, ..."."""
    return ", ".join(f"{name} {value}" for name, value in vars(config).items())


def prompt(
    draw: Draw, dtype: str, batch: int, length: int, heads: tuple[int, int], head_dim: int
) -> tuple[Any, Any, Any]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] of prompts; `heads` are N and K."""
    q, k, v = (draw(dtype, batch, length, n, head_dim) for n in (*heads, heads[1]))
    return q, k, v


def layer_rows(
    draw: Draw, dtype: str, batch: int, kv_heads: int, head_dim: int, rows: int, layers: int
) -> LayerRows:
    """A layer of so many rows in the buffer of all layers; which one is random."""
    k, v = (draw(dtype, batch, kv_heads, layers * rows, head_dim) for _ in range(2))
    return LayerRows(k, v, draw("int32"), rows)


def layer(
    draw: Draw,
    dtype: str,
    batch: int,
    heads: tuple[int, int],
    head_dim: int,
    rows: int,
    tail: int,
) -> tuple[NewToken, Segment, Tail]:
    """A new token, a pool of so many rows for each kv head, and a tail; where they lie is random.

    The cosines and sines of the token are any numbers: it is turned and stretched.
    """
    n, kv_heads = heads
    cos, sin = (draw("float32", batch, head_dim // 2) for _ in range(2))
    new = NewToken(draw(dtype, batch, kv_heads, n // kv_heads + 2, head_dim), cos, sin)
    k, v = (draw(dtype, batch, kv_heads, rows, head_dim) for _ in range(2))
    tail_k, tail_v = (draw(dtype, batch, kv_heads, tail, head_dim) for _ in range(2))
    offset, length, fill = (draw("int32", batch) for _ in range(3))
    return new, Segment(k, v, offset, length), Tail(tail_k, tail_v, fill)


def packed_rows(
    draw: Draw,
    batch: int,
    kv_heads: int,
    head_dim: int,
    bits: tuple[int, ...],
    words: int,
    groups: int = 1,
) -> PackedRows:
    """Arrays of so many word-rows; scales, and where the runs lie, are random bits."""
    lanes = per_word(min(bits))
    return PackedRows(
        *(draw("uint32", batch, kv_heads, words, head_dim) for _ in range(2)),
        *(draw("uint32", batch, kv_heads, groups, words * lanes) for _ in range(2)),
        *(draw("int32", batch, len(bits)) for _ in range(2)),
        bits=bits,
    )
