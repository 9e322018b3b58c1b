"""A request on its way through the engine, as its sender and the scheduler see it."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from vlcache_jax.cache.method import AnyPool
from vlcache_jax.requests.detokenize import Detokenizer
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.results.answer import Answer
from vlcache_jax.running.driver import Timings
from vlcache_jax.running.stages import Stages
from vlcache_jax.streaming import Request, Written

if TYPE_CHECKING:
    from vlcache_jax.vlm import VLM


class QueueFull(RuntimeError):
    """As many requests wait as may: try again later."""


class Ticket(Iterator[str]):
    """A request on its way: iterating it, in one thread, gives its text in pieces.

    Args:
        request: what was asked.
        inputs: its prompt as the engine runs it.
        words: makes its tokens text.

    Attributes:
        request: as given.
        inputs: as given.
        written: the answer so far; the scheduler's.
        cancelled: `cancel` was called.
    """

    def __init__(self, request: Request, inputs: ModelInputs, words: Detokenizer):
        self.request, self.inputs, self.written = request, inputs, Written(words)
        self.cancelled = False
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._result: Future[Answer] = Future()
        self._ended = threading.Event()  # the reader has seen the end
        self._began = self._first = 0.0

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
        self._began = time.perf_counter()

    def take(self, drawn: np.ndarray, count: int) -> None:
        """Tokens were drawn for it; see `Written.take`."""
        self._first = self._first or time.perf_counter()
        self._push(self.written.take(drawn, count))

    def succeed(self, vlm: "VLM", pool: AnyPool, pool_bytes: int, stages: Stages) -> None:
        """It is answered: no token follows.

        Args:
            vlm: the model.
            pool: of its slot alone, the small arrays on the host.
            pool_bytes: of that slot, as allocated.
            stages: by which it was made.
        """
        self._push(self.written.finish())
        prefill, decode = self._first - self._began, time.perf_counter() - self._first
        steps = len(self.written.tokens) - 1
        speed = steps / decode if steps > 0 else None
        timings = Timings(0.0, prefill, decode, prefill + decode, speed)
        answer = self.written.answer(vlm, self.request, pool, 0, timings, stages)
        report = replace(answer.cache, allocated_bytes=pool_bytes)
        self._result.set_result(replace(answer, cache=report))
        self._pieces.put(None)

    def fail(self, error: Exception) -> None:
        """It has ended without an answer."""
        self._result.set_exception(error)
        self._pieces.put(None)

    def _push(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)
