"""What a model answers."""

import operator
import platform
from dataclasses import dataclass
from importlib import metadata
from itertools import takewhile

from vlcache_jax.cache.trace import Trace
from vlcache_jax.results.report import CacheReport
from vlcache_jax.running.driver import Timings


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        text: the decoded answer.
        tokens: its token ids, without the stop token.
        finish_reason: "stop" where a stop token or text has ended it, "length" where it has as many
            tokens as it may.
        prompt_tokens: true length of the prompt, visual tokens included.
        visual_tokens: visual tokens among them.
        context_tokens: tokens of the context among them.
        cache: what is kept of this sequence's cache, in tokens and bytes.
        timings: of the whole call; a batch shares them.
        trace: what was kept and why, where it was asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    visual_tokens: int
    context_tokens: int
    cache: CacheReport
    timings: Timings
    trace: Trace | None = None

    def is_right(self, right: str | None) -> bool | None:
        """Whether this is the right answer; None where that is not known."""
        return None if right is None else self.text.strip() == right


def same_tokens(first: list[int], second: list[int]) -> int:
    """How many tokens two answers have in common before they differ, or one of them ends."""
    return sum(takewhile(bool, map(operator.eq, first, second)))


def versions() -> dict[str, str]:
    """Of Python and the packages that an answer depends on."""
    packages = ("vlcache-jax", "jax", "jaxlib", "flax", "transformers")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
