"""Prompts that are run in parts: chunk by chunk, or behind a prefix that was run before.

    0 . . . . . . . prefix . . . . . . . . . m - reach . . m
    |  kept rows  | extend | extend | extend |   finish    |

Reach is how many of its last rows the method has to see together: those of its windows. What it
sees of rows anywhere is continued from part to part (`CacheMethod.continued`).
"""

import functools
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.models.families import Params
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.prompting import Tables
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.stages import Stages
from vlcache_jax.running.state import Buffers, Memory, Prefill
from vlcache_jax.running.stores import get, put

CHUNK_ROWS = 2048
"""Rows of a prefix that are run at a time, by default: enough to keep a GPU busy."""

ROWS = (32, 64, 96, 128, 192, 256, 384, 512)
"""Rows of a part that a program is made for; beyond these, twice as many and so on."""

DONATED = {
    "extend": (3,),
    "finish": (3,),
    "build_into": (0,),
    "admit": (0,),
    "spill": (0, 1),
    "decode_chunk": (2,),
    "decode_chunk_told": (2,),
}
"""Arguments of the stages that are written in place."""


class Runner:
    """Runs the stages of one way to generate, each compiled when it is first needed.

    Args:
        programs: what was compiled so far.
        stages: the functions.
        dry: make the programs ready and run none of them: what comes back are shapes.

    Attributes:
        compile_s: seconds that compiling took.
    """

    def __init__(self, programs: Programs, stages: Stages, dry: bool = False):
        self.programs, self.stages, self.dry = programs, stages, dry
        self.compile_s = 0.0

    def do(
        self, stage: str, prompt_rows: int, *args: Any, donate: tuple[int, ...] = (), **static: Any
    ) -> Any:
        """Run a stage.

        Args:
            stage: its name.
            prompt_rows: the prompts' bucket, T.
            args: its arguments.
            donate: those that are given up, beside `DONATED`.
            static: its static arguments.
        """
        stages = self.stages.program(stage, prompt_rows)
        name = stages, stage, donate, tuple(static.items())
        function = functools.partial(getattr(stages, stage), **static)
        donate = (*DONATED.get(stage, ()), *donate)
        if self.dry:
            return self.programs.shapes(name, function, *args, donate=donate)
        program, compile_s = self.programs.ready(name, function, *args, donate=donate)
        self.compile_s += compile_s
        return program(*args)


def reach(cache: CacheMethod, inputs: ModelInputs) -> int | None:
    """How many last rows of a batch's prompts a method has to see together; None for all."""
    found = []
    for length, index in zip(inputs.length, inputs.visual_index, strict=True):
        found.append(cache.reach(int(length), last_visual(index)))
    return None if None in found else max(found)


def last_visual(index: np.ndarray) -> int:
    """Position of a prompt's last visual token, -1 where there is none: of a `visual_index` [T]."""
    return int(np.max(np.flatnonzero(index != -1), initial=-1))


_Result = TypeVar("_Result")


def drained(steps: Generator[None, None, _Result]) -> _Result:
    """What a generator gives in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Rows:
    """The rows of prompts that were run, on the device.

    Args:
        tables: what was seen of the pictures.
        dtype: type of the keys and values.
        store: where these lie while no question runs, see `stores`.
        buffers: keys and values.
        kept: what the store has of them.
        memory: see below.

    Attributes:
        tables: as given.
        memory: what the rows leave behind beside keys and values: the fields of `Memory`, but what
            was seen by the name of each `Look`.
        lock: held from a question's first row to its pool, which are made in the buffers.
    """

    def __init__(
        self,
        tables: Tables,
        dtype: Any,
        store: str = "device",
        *,
        buffers: Buffers | None = None,
        kept: Any = None,
        memory: Mapping[str, Any] | None = None,
    ):
        self.tables, self._dtype, self._store = tables, dtype, store
        self._buffers, self._kept = buffers, kept
        self.memory, self.lock = dict(memory or {}), threading.RLock()

    @classmethod
    def none(
        cls,
        runner: Runner,
        params: Params,
        inputs: ModelInputs,
        store: str = "device",
        tables: Tables = (),
    ) -> "Rows":
        """None yet, of prompts whose pictures are looked at now, unless there are `tables`."""
        batch, total = inputs.tokens.shape
        dtype = params["embed"]["embedding"].dtype
        if len(inputs.tiles) and not tables:
            tables = runner.do("see", total, params, inputs)
        make = functools.partial(runner.stages.empty_buffers, batch, total, dtype)
        buffers = runner.programs.zeros(make)
        return cls(tables, dtype, store, buffers=buffers)

    @property
    def buffers(self) -> Buffers:
        """Keys and values, at full width on the device."""
        if self._buffers is None:
            self._buffers = get(self._store, self._kept, self._dtype)
        return self._buffers

    @property
    def kept(self) -> Any:
        """Keys and values as they lie between questions, arrays."""
        return self._buffers if self._kept is None else self._kept

    @property
    def lost(self) -> bool:
        """Whether there are none: what was to write them was interrupted."""
        return self._buffers is None and self._kept is None

    def _give_up(self) -> Buffers:
        """The buffers, for a stage that writes them in place."""
        buffers, self._buffers = self.buffers, None
        return buffers

    def release(self) -> None:
        """Leave keys and values to the store, until they are needed again."""
        if self._store != "device":
            self._kept = put(self._store, self.buffers) if self._kept is None else self._kept
            self._buffers = None

    def knows(self, cache: CacheMethod) -> bool:
        """Whether all is known that a method has to remember of the rows."""
        return {"length", *map(repr, cache.continued)} <= self.memory.keys()

    def remembered(self, runner: Runner, batch: int, total: int) -> Memory:
        """What the rows leave behind for a method; where that is not known, of none of them."""
        looks = runner.stages.cache.continued
        if not self.knows(runner.stages.cache):
            make = functools.partial(runner.stages.empty_memory, batch, total, looks)
            return runner.programs.zeros(make)
        seen = tuple(self.memory[repr(look)] for look in looks)
        return Memory(self.memory["length"], seen, self.memory["salience"])

    def remember(
        self,
        runner: Runner,
        params: Params,
        inputs: ModelInputs,
        settings: Settings,
        until: np.ndarray,
        chunk: int,
    ) -> None:
        """Run the rows up to `until` [B], where it is not known yet what a method sees of them.

        The other arguments are those of `finishing`.
        """
        if not self.knows(cache := runner.stages.cache):
            memory = self.remembered(runner, *inputs.tokens.shape)
            own = params, inputs, settings, memory, until, chunk
            found = drained(self.extending(runner, *own))
            seen = zip(map(repr, cache.continued), found.seen, strict=True)
            self.memory |= {"length": found.length, "salience": found.salience, **dict(seen)}
            self.release()

    def extending(
        self,
        runner: Runner,
        params: Params,
        inputs: ModelInputs,
        settings: Settings,
        memory: Memory,
        until: np.ndarray,
        chunk: int,
    ) -> Generator[None, None, Memory]:
        """Run the rows behind those of a memory, up to `until` [B]; it stops behind each chunk."""
        (batch, total), inputs = inputs.tokens.shape, inputs.without_tiles
        looks, width = runner.stages.cache.continued, min(chunk, total)
        for first in range(int(np.min(memory.length)), int(np.max(until)), width):
            start = np.full(batch, min(first, total - width), np.int32)
            args = self.tables, inputs, self._give_up(), memory, start, until, settings
            self._buffers, memory = runner.do(
                "extend", total, params, *args, rows=width, looks=looks
            )
            yield
        return memory

    def finish(self, *args: Any) -> tuple[Prefill, jax.Array]:
        """Run all rows behind those of the method's memory: all of `finishing`."""
        return drained(self.finishing(*args))

    def finishing(
        self,
        runner: Runner,
        params: Params,
        inputs: ModelInputs,
        settings: Settings,
        chunk: int,
        together: int,
        widths: Sequence[int] = ROWS,
    ) -> Generator[None, None, tuple[Prefill, jax.Array]]:
        """`finish` in its parts, up to the prompts' ends: it stops behind each but the last.

        Args:
            runner: runs the stages.
            params: parameters.
            inputs: the whole prompts, arrays on the host; those of their rows that were run are not
                run again, but for some that have to be run together with the last.
            settings: what is asked of each sequence.
            chunk: rows that are run at a time, beside those that have to be run together.
            together: how many these are; T for the whole prompt.
            widths: rows of the last part that a program is made for, see `ROWS`.
        """
        (batch, total), inputs = inputs.tokens.shape, inputs.without_tiles
        length, memory = np.asarray(inputs.length), self.remembered(runner, batch, total)
        start = np.minimum(np.asarray(memory.length), np.maximum(length - together, 0))
        if np.max(length - start) > chunk:
            # As many as the smallest program takes: else some of its rows would be run twice.
            start = np.maximum(length - max(together, widths[0]), 0).astype(np.int32)
            own = params, inputs, settings, memory, start, chunk
            memory = yield from self.extending(runner, *own)
        width = min(bucket_for(int(np.max(length - start)), widths), total)
        if together >= total:
            width = total
        start = np.minimum(start, total - width).astype(np.int32)
        args = self.tables, inputs, self._give_up(), memory, start, settings
        prefilled, token = runner.do("finish", total, params, *args, rows=width)
        self._buffers = Buffers(prefilled.k, prefilled.v)
        return prefilled, token
