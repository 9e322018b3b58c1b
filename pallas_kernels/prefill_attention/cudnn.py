"""NVIDIA's own fused attention, by JAX's public function."""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import current_device


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    """See the package's public function.

    Raises:
        NotImplementedError: the case is none that cuDNN does, or its GPU is not here.
    """
    require_gpu()
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN's attention is for 16 bits, not {q.dtype}: use 'triton'")
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        raise NotImplementedError(f"cuDNN has no attention for {q.shape[-1]=}: use 'triton'")
    # A weight of 0 times what stands behind a prompt is NaN where that is NaN.
    inside = (jnp.arange(k.shape[1], dtype=jnp.int32) < lengths[:, None])[:, :, None, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        jnp.where(inside, v, 0),
        scale=scale,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def require_gpu() -> None:
    """Ask for what nothing works without.

    Raises:
        NotImplementedError: the GPU is not here.
    """
    device = current_device()
    if device.platform != "gpu" or not device.present:
        raise NotImplementedError("backend 'cudnn' needs a GPU to be there: use 'xla'")
