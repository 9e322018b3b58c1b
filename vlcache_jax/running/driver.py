"""The one loop from prompts to tokens: every answer, streamed or whole, alone or in a batch.

groups of prompts ─► prefill ─► build_cache ─┐ (several groups: into the pool of all)
                                             ├─► start ─► decode_chunk ─► decode_chunk ─► ...
                                             ┘   tokens [B, 1]   [B, steps]      until all end
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from vlcache_jax.cache.method import AnyPool
from vlcache_jax.cache.trace import BatchTrace
from vlcache_jax.distributed.mesh import fetched
from vlcache_jax.models.families import Params
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.parts import CHUNK_ROWS, Rows, Runner, reach
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.stages import DecodeState, Stages
from vlcache_jax.running.state import Prefill


@dataclass(frozen=True)
class Timings:
    """Wall time in seconds, compilation apart.

    Attributes:
        compile_s: compiling the programs that this call was the first to need; 0 when none.
        prefill_s: from the prompt to its first token: vision, prefill, cache build.
        decode_s: all further tokens.
        total_s: everything but compilation and processing.
        decode_tokens_per_s: decode steps per second of one sequence; None where none were run.
    """

    compile_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    decode_tokens_per_s: float | None = None


class Run:
    """A batch on its way. Iterating it runs it: tokens int32 [B, 1], then [B, steps] of each chunk.

    Args:
        programs: what was compiled so far.
        params: parameters.
        stages: the functions to run.
        groups: the prompts, equally many in each group, padded to the same shapes; what stands
            beyond the batch in the last one is not answered.
        settings: what is asked of each sequence, arrays on the host.
        chunk: rows of the prompts that are run at a time; None for all of them.
        prefix: rows of the prompt, which is one, that were run before.

    Attributes:
        counts: tokens of each answer so far, the stop token left out, int [B].
        done: which answers have ended, bool [B]. Setting one ends it: the loop goes on until all
            have.
        traces: of each group; None where nothing is traced.
    """

    def __init__(
        self,
        programs: Programs,
        params: Params,
        stages: Stages,
        groups: Sequence[ModelInputs],
        settings: Settings,
        chunk: int | None = None,
        prefix: Rows | None = None,
    ):
        self._runner = Runner(programs, stages)
        self._params, self._stages = params, stages
        self._batch = batch = len(settings.max_new_tokens)
        if programs.mesh is not None and batch > 1 and len(groups) == 1:
            # As many as the devices divide: the last one is repeated, and not answered.
            batch += -batch % programs.mesh.data
            groups = [groups[0].filled(batch)]
            settings = settings.rows(np.minimum(np.arange(batch), self._batch - 1))
        self._groups, self._settings = groups, settings
        self._chunk, self._prefix = chunk, prefix
        self._rows = groups[0].tokens.shape[1]
        self._prefill_s = self._decode_s = 0.0
        self._steps = 0
        self.traces: list[BatchTrace | None] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self._begin()
        while not self.done.all():
            yield self.advance()

    @property
    def timings(self) -> Timings:
        """Of all that was run so far."""
        speed = self._steps / self._decode_s if self._steps else None
        total = self._prefill_s + self._decode_s
        return Timings(self._runner.compile_s, self._prefill_s, self._decode_s, total, speed)

    def advance(self) -> np.ndarray:
        """Run a chunk of decode steps: its tokens, int32 [B, steps].

        Raises:
            ValueError: the tail has no room for them.
        """
        steps, room = self._stages.chunk_steps, self._stages.new_rows - self._steps
        if steps > room:
            raise ValueError(f"{steps} more steps do not fit: the tail has room for {room}")
        began, compiled = time.perf_counter(), self._runner.compile_s
        if self._stages.residual:
            self.pool, self._state = self._do("spill", self.pool, self._state)
        self._state, tokens = self._do("decode_chunk", self._params, self.pool, self._state)
        self._read()
        self._decode_s += time.perf_counter() - began - (self._runner.compile_s - compiled)
        self._steps += steps
        return fetched(tokens)[: self._batch]

    def _begin(self) -> np.ndarray:
        """Prefill, cache build and the first tokens, int32 [B, 1]."""
        began = time.perf_counter()
        batch, size = len(self._settings.max_new_tokens), len(self._groups[0].length)
        dtype = self._params["embed"]["embedding"].dtype
        tokens, positions = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for index, group in enumerate(self._groups):
            # The repeated prompts that fill up the last group are written where the last one is.
            rows = np.minimum(np.arange(size, dtype=np.int32) + index * size, batch - 1)
            settings = self._settings.rows(rows)
            if self._prefix is not None:
                token, pool, trace = self._behind(self._prefix, group, settings)
            else:
                inputs = jax.device_put(group)
                prefilled, token = self._prefill(group, inputs, settings)
                if len(self._groups) == 1:
                    donate = (0,) if self._stages.keeps_prefill else ()
                    args = prefilled, inputs, settings
                    pool, trace = self._do("build_cache", *args, donate=donate)
                else:
                    if not index:
                        stages = self._stages.program("empty_pool", self._rows)
                        make = partial(stages.empty_pool, batch, self._rows, dtype)
                        pool = self._runner.programs.zeros(make)
                    pool, trace = self._do("build_into", pool, rows, prefilled, inputs, settings)
                del prefilled  # the next group's takes its place
            tokens[rows], positions[rows] = fetched(token), group.next_position()
            self.traces.append(fetched(trace))
        self.pool: AnyPool = pool
        self._state: DecodeState = self._do("start", tokens, positions, self._settings, dtype=dtype)
        self._read()
        self._prefill_s = time.perf_counter() - began - self._runner.compile_s
        return tokens[: self._batch, None]

    def _read(self) -> None:
        """What has ended, on the host."""
        counts, done = fetched((self._state.count, self._state.done))
        self.counts = counts[: self._batch]
        self.done = getattr(self, "done", False) | done[: self._batch]

    def _prefill(
        self, group: ModelInputs, inputs: ModelInputs, settings: Settings
    ) -> tuple[Prefill, jax.Array]:
        """What a group of prompts leaves behind, run whole or in parts, and its first tokens."""
        together = None if self._chunk is None else reach(self._stages.cache, group)
        if self._chunk is None or together is None:
            return self._do("prefill", self._params, inputs, settings)
        rows = Rows.none(self._runner, self._params, inputs)
        return rows.finish(self._runner, self._params, group, settings, self._chunk, together)

    def _behind(
        self, prefix: Rows, inputs: ModelInputs, settings: Settings
    ) -> tuple[jax.Array, AnyPool, BatchTrace | None]:
        """The first token and the pool of a prompt that is run behind a prefix."""
        together = reach(self._stages.cache, inputs) or self._rows
        chunk = self._chunk or CHUNK_ROWS
        with prefix.lock:
            prefilled, token = prefix.finish(
                self._runner, self._params, inputs, settings, chunk, together
            )
            pool, trace = self._do("build_cache", prefilled, inputs, settings)
            prefix.release()
        return token, pool, trace

    def _do(self, stage: str, *args: Any, **options: Any) -> Any:
        """Run a stage on prompts of this bucket."""
        return self._runner.do(stage, self._rows, *args, **options)
