"""How the next token is drawn from the logits: `Sampling` says it, `Draws` is it as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.sample_tokens import sample_tokens


@dataclass(frozen=True)
class Sampling:
    """Greedy by default; otherwise temperature, then top-k, then top-p, as Hugging Face does.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: draw among the k most likely tokens; None for all.
        top_p: draw among the fewest tokens whose probabilities reach this sum (Holtzman et al.
            2020); 1 for all.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """How the tokens of each sequence are drawn, as data: one program serves all settings.

    A token depends on its sequence's logits, settings, seed, request and step alone, not on the
    batch that it is drawn in.

    Attributes:
        temperature: 0 takes the most likely token, float32 [B].
        top_k: draw among the k most likely tokens, int32 [B]; 0 for all.
        top_p: draw among the fewest tokens whose probabilities reach this sum, float32 [B].
        seed: of the random numbers, uint32 [B].
        request: number of the sequence among those of its seed, int32 [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    request: jax.Array

    @classmethod
    def of(cls, sampling: Sampling, seed: int, requests: Sequence[int] | np.ndarray) -> "Draws":
        """The same settings for some sequences, as numpy arrays on the host.

        Args:
            sampling: the settings.
            seed: any integer; taken modulo 2**32, so that -1 is 2**32 - 1.
            requests: number of each sequence, [B]: those of equal seed and number, and equal
                logits, get equal tokens.
        """
        request: Any = np.asarray(requests, np.int32)

        def each(value: float, dtype: Any) -> Any:
            return np.full(request.shape, value, dtype)

        return cls(
            temperature=each(
                min(sampling.temperature, float(np.finfo(np.float32).max)), np.float32
            ),
            top_k=each(min(sampling.top_k or 0, np.iinfo(np.int32).max), np.int32),
            top_p=each(sampling.top_p, np.float32),
            seed=each(seed % 2**32, np.uint32),
            request=request,
        )

    def uniform(self, step: jax.Array) -> jax.Array:
        """One number in [0, 1) for each sequence, float32 [B].

        Args:
            step: number of the token among those of its sequence, int32 [B].
        """

        def draw(seed: jax.Array, request: jax.Array, step: jax.Array) -> jax.Array:
            # Other generators' numbers depend on the batch.
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), request)
            return jax.random.uniform(jax.random.fold_in(key, step))

        return jax.vmap(draw)(self.seed, self.request, step)

    @jax.named_scope("sampling")
    def sample(self, logits: jax.Array, step: jax.Array, backend: str | None = None) -> jax.Array:
        """Draw one token for each sequence, int32 [B]. Of equal logits greedy takes the lower id.

        Args:
            logits: float32 [B, V].
            step: number of the token among those of its sequence, int32 [B].
            backend: "triton", "xla", or None for the best that supports the case on the device.
        """
        settings = self.temperature, self.top_k, self.top_p
        return sample_tokens(logits, *settings, self.uniform(step), backend=backend)


@jax.named_scope("sampling")
def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw one token per row: logits [B, V] float32 -> int32 [B]. Ties go to the lower id."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / sampling.temperature, sampling)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Set the tokens that may not be drawn to -inf; at least one token per row is left."""
    vocabulary = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        least = lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ranked, axis=-1)
        # A token stays while the sum before it is below top_p: the first one always does.
        stays = jnp.cumsum(chances, axis=-1) - chances < sampling.top_p
        least = jnp.min(jnp.where(stays, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
