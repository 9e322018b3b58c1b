"""The residual stream's addition and the norm behind it, in one pass over the rows."""

import jax

from pallas_kernels.add_rms_norm import triton, xla
from pallas_kernels.backends import choose

BACKENDS = {"triton": triton.add_rms_norm, "xla": xla.add_rms_norm}
"""In the order of preference."""


def add_rms_norm(
    x: jax.Array, delta: jax.Array, scale: jax.Array, *, eps: float, backend: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """X + delta, and its root-mean-square normalisation (Zhang and Sennrich 2019).

    A decode step is made of many small programs, and launching them takes longer than some run: XLA
    makes three of these lines, the kernel is one.

    Args:
        x: the residual stream [..., D].
        delta: what is added to it, [..., D] in x's type.
        scale: the norm's weight [D].
        eps: added to the mean square.
        backend: "triton", "xla", or None for the best that supports the case on the device.

    Returns:
        The sum, rounded to x's type, and its norm, computed in float32: [..., D] each in x's type.

    Raises:
        ValueError: the shapes do not fit each other.
        NotImplementedError: there is no such backend.
    """
    if x.shape != delta.shape or scale.shape != x.shape[-1:]:
        raise ValueError(f"{x.shape=}, {delta.shape=}, {scale.shape=}: expected [..., D] and [D]")
    return choose("add_rms_norm", backend, BACKENDS, x, delta, scale, eps=eps)
