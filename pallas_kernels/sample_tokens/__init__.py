"""The next token of every sequence, greedy or drawn, as each one's own settings say."""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import choose
from pallas_kernels.sample_tokens import triton, xla

BACKENDS = {"triton": triton.sample_tokens, "xla": xla.sample_tokens}
"""In the order of preference."""


def sample_tokens(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    uniform: jax.Array,
    *,
    backend: str | None = None,
) -> jax.Array:
    """Draw one token per row from softmax(logits / temperature), cut to its top k, then its top p.

    Equals at the border of the top k stay together, as in transformers; of those at the border of
    the top p only as many stay as are needed, the lower ids first. What stays is drawn by inverse
    CDF: the first id, in the order of ids, whose cumulative probability exceeds `uniform`. Settings
    are data: greedy and sampled rows share a program and a batch, and no row depends on another. A
    logit of -inf is never drawn beside a finite one.

    Args:
        logits: float32 [B, V].
        temperature: float32 [B]. A row is greedy (`jnp.argmax`: the lower of equal ids) where it is
            0, below the smallest normal float32, or so small that its largest logit / temperature
            is not finite; also where that logit is infinite or NaN.
        top_k: keep the tokens whose logit is not below the k-th largest, int32 [B]; 0 for all.
        top_p: keep the fewest tokens, of those that top_k left, whose probabilities reach this,
            float32 [B]; at least one; 1 for all.
        uniform: decides the draw, in [0, 1), float32 [B]; greedy rows ignore it.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Returns:
        The tokens, int32 [B].

    Raises:
        ValueError: the shapes do not fit each other, or the logits are not float32.
        NotImplementedError: there is no such backend.
    """
    settings = temperature, top_k, top_p, uniform
    if logits.ndim != 2 or any(array.shape != logits.shape[:1] for array in settings):
        shapes = [array.shape for array in settings]
        raise ValueError(f"{logits.shape=}, settings of shapes {shapes}: expected [B, V] and [B]")
    if logits.dtype != jnp.float32:
        raise ValueError(f"{logits.dtype=} must be float32: cast the logits")
    return choose("sample_tokens", backend, BACKENDS, logits, *settings)
