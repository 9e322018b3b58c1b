"""How the next token is drawn from the logits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    request: Any

    @classmethod
    def of(cls, sampling, seed, requests):
        n = len(requests)
        seed = np.uint32(seed & 0xFFFFFFFF) if isinstance(seed, int) else seed
        return cls(
            np.full(n, sampling.temperature, np.float32),
            np.full(n, sampling.top_k or 0, np.int32),
            np.full(n, sampling.top_p, np.float32),
            np.full(n, seed, np.uint32)
            if isinstance(seed, np.generic)
            else jnp.full(n, seed, jnp.uint32),
            np.asarray(requests, np.int32),
        )

    def sample(self, logits, step, backend):
        def one(logits, t, seed, request, step):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), step)
            return jax.random.categorical(key, logits / jnp.where(t > 0, t, 1))

        return jnp.where(
            self.temperature > 0,
            jax.vmap(one)(logits, self.temperature, self.seed, self.request, step),
            jnp.argmax(logits, -1),
        ).astype(jnp.int32)
