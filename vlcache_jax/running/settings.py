"""What is asked for each sequence of a batch, as data: none of it is part of a compiled program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vlcache_jax.cache.budget import Budget, Limits
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.running.sampling import Draws, Sampling

STOP_IDS = 8
"""Stop tokens that a sequence has places for; twice as many, and so on, where more are given."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """Settings of B sequences, which may differ from one to the next.

    Attributes:
        limits: their budgets, arrays [B].
        draws: how their tokens are drawn.
        stop_ids: tokens that end an answer, int32 [B, S]; -1 where there are fewer.
        max_new_tokens: most tokens of an answer, int32 [B].
        min_new_tokens: before it has so many tokens no stop token ends an answer, int32 [B].
    """

    limits: Limits
    draws: Draws
    stop_ids: Any
    max_new_tokens: Any
    min_new_tokens: Any

    @classmethod
    def of(
        cls,
        budget: Budget,
        sampling: Sampling,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        *,
        min_new_tokens: int = 0,
        seed: Any = 0,
        requests: Any,
    ) -> "Settings":
        """The same settings for every sequence, as arrays on the host.

        Args:
            budget: what is kept of each prompt's cache.
            sampling: how a token is drawn.
            stop_ids: tokens that end an answer.
            max_new_tokens: most tokens of an answer.
            min_new_tokens: before it has so many tokens no stop token ends an answer.
            seed: of the draws, an integer.
            requests: the number by which each sequence draws, int32 [B].
        """
        batch = len(requests)
        stops = np.full((batch, bucket_for(len(stop_ids), (STOP_IDS,))), -1, np.int32)
        stops[:, : len(stop_ids)] = stop_ids
        return cls(
            jax.tree.map(lambda number: np.full(batch, number), budget.data),
            Draws.of(sampling, seed, requests),
            stops,
            np.full(batch, max_new_tokens, np.int32),
            np.full(batch, min_new_tokens, np.int32),
        )

    def rows(self, rows: np.ndarray) -> "Settings":
        """Those of some sequences, int [b]: of arrays on the host."""
        return jax.tree.map(lambda array: array[rows], self)
