"""What a model answers."""

from dataclasses import dataclass

from vlcache_jax.cache.trace import Trace
from vlcache_jax.report import CacheReport


@dataclass(frozen=True)
class Timings:
    """Wall time in seconds, compilation apart.

    Attributes:
        compile_s: compiling the programs that this call was the first to need; 0 when none.
        prefill_s: from the prompt to its first token: vision, prefill, cache build. None where the
            call is one program, whose parts cannot be told apart.
        decode_s: all further tokens. None likewise.
        total_s: everything but compilation and processing.
        decode_tokens_per_s: decode steps per second of one sequence; None where none were run.
    """

    compile_s: float
    prefill_s: float | None
    decode_s: float | None
    total_s: float
    decode_tokens_per_s: float | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        text: the decoded answer.
        tokens: its token ids, without the stop token.
        prompt_tokens: true length of the prompt, visual tokens included.
        visual_tokens: visual tokens among them.
        cache: what is kept of this sequence's cache, in tokens and bytes.
        timings: of the whole call; a batch shares them.
        trace: what was kept and why, where it was asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    visual_tokens: int
    cache: CacheReport
    timings: Timings
    trace: Trace | None = None
