"""How the next token is drawn from the logits: `Sampling` says it, `Draws` is it as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sample_tokens import sample_tokens
from vlcache_jax.errors import real_number, whole_number


@dataclass(frozen=True)
class Sampling:
    """Greedy by default; otherwise temperature, then top-k, then top-p, as Hugging Face does.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: draw among the k most likely tokens; None for all.
        top_p: draw among the fewest tokens whose probabilities reach this sum (Holtzman et al.
            2020); 1 for all.

    Raises:
        ValueError: a value is out of range, or no number.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        real_number(self.temperature, "temperature")
        real_number(self.top_p, "top_p")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k is not None:
            whole_number(self.top_k, "top_k", 1)
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
            seed=each(whole_number(seed, "seed") % 2**32, np.uint32),
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
            return jax.random.uniform(jax.random.fold_in(key, step), dtype=jnp.float32)

        return jax.vmap(draw)(self.seed, self.request, step)

    @jax.named_scope("sampling")
    def sample(
        self, logits: jax.Array, uniform: jax.Array, backend: str | None = None
    ) -> jax.Array:
        """Draw one token for each sequence, int32 [B]. Of equal logits greedy takes the lower id.

        Args:
            logits: float32 [B, V].
            uniform: what decides the draw: `uniform` of the token's number, float32 [B].
            backend: "triton", "xla", or None for the best that supports the case on the device.
        """
        settings = self.temperature, self.top_k, self.top_p
        return sample_tokens(logits, *settings, uniform, backend=backend)


class Logprobs(NamedTuple):
    """How likely tokens were: logarithms of the model's probabilities, whatever draws from them.

    Attributes:
        drawn: of the token that was drawn, float32 [B].
        ids: the likeliest tokens, the first one first, int32 [B, n].
        values: theirs, float32 [B, n].
    """

    drawn: Any
    ids: Any
    values: Any

    @classmethod
    def of(cls, logits: jax.Array, token: jax.Array, most: int) -> "Logprobs":
        """Of logits, float32 [B, V], and the tokens drawn from them, int32 [B]."""
        logprobs = jax.nn.log_softmax(logits)
        values, ids = jax.lax.top_k(logprobs, min(most, logits.shape[-1]))
        drawn = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
        return cls(drawn, ids, values)
