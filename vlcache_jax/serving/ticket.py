"""A request on its way through the engine, as its sender and the scheduler see it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from vlcache_jax.cache.method import AnyPool
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.results.answer import Answer
from vlcache_jax.running.driver import Timings
from vlcache_jax.running.sampling import Logprobs
from vlcache_jax.running.stages import Stages
from vlcache_jax.serving.prefixes import Keys
from vlcache_jax.streaming import Request, Written

if TYPE_CHECKING:
    from vlcache_jax.vlm import VLM


Notify = Callable[[], None]
"""Told that there is more to be read."""


def nothing() -> None:
    """A `Notify` of nobody."""


@dataclass
class Times:
    """When what happened to a request, by `time.perf_counter`; 0 for not yet.

    Attributes:
        submitted: it came into the queue.
        began: it was taken from there.
        first: its first token was drawn.
        ended: its last one was.
    """

    submitted: float
    began: float = 0.0
    first: float = 0.0
    ended: float = 0.0


class QueueFull(RuntimeError):
    """As many requests wait as may: try again later."""


class Closed(RuntimeError):
    """The engine has ended; its `error` says why, where it was not closed."""


class Ticket(Iterator[str]):
    """A request on its way: iterating it, in one thread, gives its text in pieces.

    Args:
        request: what was asked.
        inputs: its prompt as the engine runs it.
        keys: of the prompt's blocks.
        written: the answer so far; the scheduler writes it.
        logprobs: how many of the likeliest tokens are told at each step, or None.
        kv_map: whether it is told how much of the cache keeps each token of the prompt.
        notify: called by the scheduler whenever there is more, and at the end.

    Attributes:
        request, inputs, keys, written, logprobs, kv_map: as given.
        told: of each token drawn so far, how likely it was and what others were, where asked.
        kept_share: of the kv heads of all layers that keep each token of the prompt, float32 [m];
            None where it is not asked, or not known yet.
        cached_tokens: tokens of the prompt that were not run, as they were kept.
        cancelled: `cancel` was called.
        times: when it was submitted, taken from the queue, had its first token and its last.
    """

    def __init__(
        self,
        request: Request,
        inputs: ModelInputs,
        keys: Keys,
        written: Written,
        logprobs: int | None = None,
        kv_map: bool = False,
        notify: Notify = nothing,
    ):
        self.request, self.inputs, self.keys, self.written = request, inputs, keys, written
        self.logprobs, self.kv_map, self._notify = logprobs, kv_map, notify
        self.kept_share: np.ndarray | None = None
        self.told: list[Logprobs] = []
        self.cached_tokens = 0
        self.cancelled = False
        self.times = Times(time.perf_counter())
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._result: Future[Answer] = Future()
        self._ended = threading.Event()  # the reader has seen the end

    def __next__(self) -> str:
        piece = None if self._ended.is_set() else self._pieces.get()
        if piece is not None:
            return piece
        self._ended.set()
        error = self._result.exception()
        if error is None or self.cancelled:
            raise StopIteration
        raise error

    @property
    def answer(self) -> Answer:
        """The whole answer; waits for it.

        Raises:
            CancelledError: it was cancelled.
            Exception: what has ended it otherwise.
        """
        return self._result.result()

    @property
    def done(self) -> bool:
        """Whether it has ended: answered, failed or cancelled."""
        return self._result.done()

    def cancel(self) -> None:
        """Drop the request: its slot is free behind the chunk that runs now."""
        self.cancelled = True

    def begin(self) -> None:
        """The scheduler has taken it from the queue."""
        self.times.began = time.perf_counter()

    def take(self, drawn: np.ndarray, count: int, told: Logprobs | None = None) -> None:
        """Tokens were drawn for it, and so likely they were; see `Written.take`."""
        self.times.first = self.times.first or time.perf_counter()
        piece, before = self.written.take(drawn, count), len(self.told)
        if told is not None and self.logprobs is not None:
            steps = range(len(self.written.tokens) - before)
            self.told += [Logprobs(*(array[step] for array in told)) for step in steps]
        self._push(piece)

    def succeed(self, vlm: "VLM", pool: AnyPool, pool_bytes: int, stages: Stages) -> None:
        """It is answered: no token follows.

        Args:
            vlm: the model.
            pool: of its slot alone, the small arrays on the host.
            pool_bytes: of that slot, as allocated.
            stages: by which it was made.
        """
        self._push(self.written.finish())
        times = self.times
        times.ended = time.perf_counter()
        prefill, decode = times.first - times.began, times.ended - times.first
        steps = len(self.written.tokens) - 1
        speed = steps / decode if steps > 0 else None
        timings = Timings(0.0, prefill, decode, prefill + decode, speed)
        answer = self.written.answer(vlm, self.request, pool, 0, timings, stages)
        report = replace(answer.cache, allocated_bytes=pool_bytes)
        self._end(lambda: self._result.set_result(replace(answer, cache=report)))

    def fail(self, error: Exception) -> None:
        """It has ended without an answer."""
        self._end(lambda: self._result.set_exception(error))

    def _end(self, settle: Callable[[], None]) -> None:
        settle()
        self._pieces.put(None)
        self._tell()

    def _tell(self) -> None:
        with suppress(Exception):  # whoever listens: it is no reason to end the engine
            self._notify()

    def _push(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)
            self._tell()
