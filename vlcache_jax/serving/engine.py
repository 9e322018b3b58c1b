"""The engine: one thread that prefills requests between the decode chunks of those that run.

submit ─► queue ─► see ─► extend ─► extend ─► finish ─► a free slot ─► decode_chunk ─► ...
          └── one of these parts, then a chunk of each group of slots, ──┘
              then the next part, ...
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import CacheLike
from vlcache_jax.errors import short, whole_number
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.parts import Runner, drained
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.sampling import Logprobs
from vlcache_jax.running.state import Prefill
from vlcache_jax.serving.methods import kind, served
from vlcache_jax.serving.prefixes import NO_KEYS, Prefixes, keys_of
from vlcache_jax.serving.prompts import Prompts
from vlcache_jax.serving.slots import Load, SlotGroup, Slots
from vlcache_jax.serving.ticket import Closed, Notify, QueueFull, Ticket, nothing
from vlcache_jax.streaming import Request, Written
from vlcache_jax.vlm import VLM

METHODS = ("full", "vl-cache", "snapkv", "h2o", "consensus")
"""Cache methods that are compiled by default."""

GROUPS = (SlotGroup(8, 128), SlotGroup(2, 512), SlotGroup(1, 512, 1.0))
"""Slots by default: for short answers, for long ones, and for the full cache of any prompt."""

CHUNK = 8
"""Decode steps between two parts of prompts: the fewer, the sooner are free slots in use."""

ALL_PROGRAMS = 10_000  # none is ever thrown away

Progress = Callable[[str, int, int], None]
"""Handed what is compiled, how many programs are ready, and how many there are."""


class Engine:
    """Answers many requests at once; see the module docstring and docs/serving.md.

    Args:
        vlm: the model. Requests are made by `vlm.request`.
        methods: that requests may ask for, with any budget. All have one quantizer, or none.
        groups: the slots.
        prompt_rows: most tokens of a prompt; rounded up to a bucket.
        prefill_chunk: rows of a prompt that are run between two decode chunks. A method that has to
            see more of them together (`CacheMethod.reach`) runs those; "h2o" all.
        chunk: most decode steps between two looks at the queue.
        queue: requests that may wait for a slot.
        logprobs: most tokens that a request may ask the probabilities of, at each step.
        prefix_bytes, prefix_store: what may be kept of prompts, and where; see `Prefixes`.

    Attributes:
        rows: the prompts' bucket, T.
        groups: the slots.
        ready: whether everything is compiled.
        error: what has ended the engine, None where nothing has.

    Raises:
        ValueError: a value is out of range, methods differ in their quantizers, or no slot has room
            for a method, or the mesh cannot split the slots.
        NotImplementedError: a quantizer packs new tokens, or the mesh is one of several hosts.
    """

    def __init__(
        self,
        vlm: VLM,
        methods: Sequence[CacheLike] = METHODS,
        groups: Sequence[SlotGroup] = GROUPS,
        *,
        prompt_rows: int = 2048,
        prefill_chunk: int = 512,
        chunk: int = CHUNK,
        queue: int = 64,
        logprobs: int = 0,
        prefix_bytes: int = 0,
        prefix_store: str = "device",
    ):
        if vlm.mesh is not None:
            vlm.mesh.check_slots(group.slots for group in groups)
        self._vlm, text, buckets = vlm, vlm.config.text, vlm.processor.buckets
        wanted = min(whole_number(prompt_rows, "prompt_rows", 1), text.max_positions)
        self.rows = bucket_for(wanted, buckets.prompt)
        whole_number(prefill_chunk, "prefill_chunk", 1)
        whole_number(chunk, "chunk", 1)
        self._most_waiting = whole_number(queue, "queue", 1)
        self.logprobs = whole_number(logprobs, "logprobs", 0)
        self._methods = served(vlm, methods, groups)
        self._params = vlm.folded if self._methods[0].transforms else vlm.params
        self._programs = Programs(ALL_PROGRAMS, vlm.mesh)
        own = self._programs, text.num_layers, self.rows, prefix_bytes, prefix_store
        self._prompts = Prompts(vlm, self._params, self.rows, prefill_chunk, Prefixes(*own))
        self._settings = vlm.request(text="a", raw_prompt=True).settings  # of the warm-up
        order = sorted(groups, key=lambda each: (each.new_tokens, each.room.layer_rows(self.rows)))
        self.groups = [self._slots(group, chunk) for group in order]
        self._waiting: deque[Ticket] = deque()
        self._admission: _Admission | None = None
        self._changed, self._thread = threading.Condition(), None
        self._closing = self._draining = self.ready = False
        self.error: Exception | None = None

    def warm_up(self, progress: Progress = lambda name, done, count: None) -> None:
        """Compile everything, make the slots, and begin to serve.

        Args:
            progress: called behind each step.

        Raises:
            RuntimeError: that was done before.
        """
        if self._thread is not None:
            raise RuntimeError("the engine is warm already")
        for group in self.groups:
            group.clear(dry=True)
        steps = [*self._compilations()]
        progress("", 0, len(steps) + 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = {pool.submit(compile_one): name for name, compile_one in steps}
            for done, step in enumerate(as_completed(compiled), 1):
                step.result()
                progress(compiled[step], done, len(steps) + 1)
        for group in self.groups:
            group.clear()
        self._thread = threading.Thread(target=self._serve, name="vlcache-engine", daemon=True)
        self._thread.start()
        # What is no program of a stage is compiled where it is met first: by a request of each.
        for method in self._methods:
            request = self._vlm.request(text="a", cache=method, max_new_tokens=1, raw_prompt=True)
            _ = self._enqueue(self._ticket(request, self.logprobs, kv_map=True)).answer
        progress("the first requests", len(steps) + 1, len(steps) + 1)
        self.ready = True

    def submit(
        self,
        request: Request,
        *,
        logprobs: int | None = None,
        kv_map: bool = False,
        notify: Notify = nothing,
    ) -> Ticket:
        """Put a request in the queue.

        Args:
            request: of `VLM.request`, of one prompt.
            logprobs: how many of the likeliest tokens are told at each step, beside the one that
                was drawn; None for neither.
            kv_map: whether `Ticket.kept_share` is told.
            notify: called in the engine's thread whenever there is more of the answer, and at its
                end.

        Raises:
            ValueError: it is one that this engine does not serve; the message says what it does.
            NotImplementedError: it asks for a trace or has a video.
            QueueFull: as many requests wait as may.
            RuntimeError: the engine is not warm yet, or `Closed`.
        """
        if not self.ready:
            raise RuntimeError("the engine is not ready: call warm_up first")
        return self._enqueue(self._ticket(request, logprobs, kv_map, notify))

    @property
    def prefixes(self) -> Prefixes:
        """What is kept of prompts."""
        return self._prompts.prefixes

    @property
    def methods(self) -> tuple[CacheMethod, ...]:
        """The cache methods that are served, whatever their budgets here."""
        return tuple(self._methods)

    @property
    def load(self) -> Load:
        """What is going on."""
        running = sum(len(group.running) for group in self.groups)
        slots = sum(group.group.slots for group in self.groups)
        waiting = len(self._waiting) + (self._admission is not None)
        return Load(running, slots, waiting, self._most_waiting)

    def join(self) -> None:
        """Wait for the end: `close`, or what `error` tells of."""
        if self._thread is not None:
            self._thread.join()

    def close(self, drain: bool = False) -> None:
        """Stop, and wait for it.

        Args:
            drain: answer all that was asked before; else it is dropped.
        """
        with self._changed:
            self._closing, self._draining = True, drain
            self._changed.notify()
        self.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ticket(
        self, request: Request, logprobs: int | None, kv_map: bool, notify: Notify = nothing
    ) -> Ticket:
        """A request that can be served, made ready."""
        if logprobs is not None and whole_number(logprobs, "logprobs", 0) > self.logprobs:
            raise ValueError(f"logprobs={logprobs}: this engine tells those of {self.logprobs}")
        if not isinstance(request, Request) or request.generate.config != self._vlm.config:
            raise ValueError("an engine takes what `request` of its own model gives")
        if not request.single:
            raise ValueError("an engine takes one prompt at a time: submit each of the list")
        if request.generate.trace:
            raise NotImplementedError("traces in the engine: leave trace out, or use vlm.generate")
        cache = request.generate.cache
        if kind(cache) not in self._methods:
            raise ValueError(
                f"the cache method {short(cache)} was not compiled: this engine serves "
                f"{', '.join(method.label for method in self._methods)}, with any budget"
            )
        places = self._settings.stop_ids.shape[1]
        if request.settings.stop_ids.shape[1] != places:
            raise ValueError(f"this engine has places for {places} stop tokens")
        inputs = self._prompts.fit(request.groups[0])
        if not any(group.fits(request) for group in self.groups):
            raise ValueError(
                f"no slot has room for {request.generate.max_new_tokens} new tokens and what "
                f"{cache.label} with a budget of {cache.limit} keeps of {inputs.length[0]} tokens: "
                f"there are slots for {'; '.join(str(group.group) for group in self.groups)}"
            )
        keys = keys_of(inputs) if self.prefixes.most_bytes else NO_KEYS
        written = Written.of(self._vlm, request)
        return Ticket(request, inputs, keys, written, logprobs, kv_map, notify)

    def _enqueue(self, ticket: Ticket) -> Ticket:
        with self._changed:
            if self._closing or self.error is not None:
                raise Closed("the engine is closed") from self.error
            if len(self._waiting) >= self._most_waiting:
                raise QueueFull(f"{self._most_waiting} requests wait already: try again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _slots(self, group: SlotGroup, chunk: int) -> Slots:
        own = Generate(
            self._vlm.config,
            self._methods[0],
            group.new_tokens,
            chunk=chunk,
            backend=self._vlm.backend,
        )
        dtype = self._params["embed"]["embedding"].dtype
        stop_ids = self._settings.stop_ids.shape[1]
        return Slots(self._programs, group, own.stages, self.rows, dtype, stop_ids)

    def _compilations(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each step of the warm-up, and its name."""
        first = Runner(self._programs, self.groups[0].stages(self._methods[0]), dry=True)
        for inputs in self._prompts.pictures:
            yield f"{len(inputs.tiles)} tiles", partial(self._prompts.see, first, inputs)
        if self.prefixes.most_bytes:
            yield "prefixes", lambda: self.prefixes.warm_up(self._prompts.empty_buffers(first))
        for method in self._methods:
            yield method.label, partial(self._compile_prompt, method)
        for group in self.groups:
            for told in dict.fromkeys((0, self.logprobs)):
                decode = partial(group.decode, self._params, told, dry=True)
                yield f"decoding with {group.group}", decode

    def _compile_prompt(self, method: CacheMethod) -> None:
        """Compile what brings prompts of a method into a slot of each group."""
        widths = self._prompts.widths(method)
        # One of all rows has parts in front of the last, too.
        each = [
            (width, length, self.groups[0]) for width in widths for length in (width, self.rows)
        ]
        others = [(widths[0], widths[0], group) for group in self.groups[1:]]
        for width, length, group in [*each, *others]:
            inputs = replace(self._prompts.text, length=np.array([length], np.int32))
            runner = Runner(self._programs, group.stages(method), dry=True)
            into = partial(group.admit, runner, 0, inputs, self._settings, kv_map=True)
            drained(self._prompts.run(runner, inputs, self._settings, into, width))

    # The thread. Whatever a request or the device raises ends what it belongs to, nothing else.

    def _serve(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                for group in self.groups:
                    if group.running:
                        self._decode(group)
        except Exception as error:  # slots could not be made anew
            self.error = error
        with self._changed:
            self._closing = True
            left = [*self._waiting, *(ticket for one in self.groups for _, ticket in one.running)]
            if self._admission is not None:
                left.append(self._admission.ticket)
            self._waiting.clear()
        for ticket in left:
            ticket.fail(_caused(Closed("the engine was closed"), self.error))

    def _wait(self) -> bool:
        """Wait for work; false once there is to be no more."""

        def busy() -> bool:
            return self.load.running + self.load.waiting > 0

        with self._changed:
            self._changed.wait_for(lambda: self._closing or busy())
            return busy() if self._draining else not self._closing

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in dropped:
                self._waiting.remove(ticket)
        if self._admission is not None and self._admission.ticket.cancelled:
            dropped.append(self._admission.ticket)
            self._admission = None
        for group in self.groups:
            for row, ticket in group.running:
                if ticket.cancelled:
                    group.tickets[row] = None
                    dropped.append(ticket)
        for ticket in dropped:
            ticket.fail(CancelledError("the request was cancelled"))

    def _admit(self) -> None:
        """Run one part of a prompt, if one waits for which there is a slot."""
        self._admission = self._admission or self._next()
        if self._admission is None:
            return
        ticket, group, steps = self._admission
        try:
            next(steps)
        except StopIteration:
            self._admission = None
        except Exception as error:
            self._admission = None
            ticket.fail(error)
            if group.lost:
                self._fail(group, error)

    def _next(self) -> "_Admission | None":
        """The first request in the queue for which there is a free slot."""
        with self._changed:
            for ticket in self._waiting:
                for group in self.groups:
                    if None in group.tickets and group.fits(ticket.request):
                        self._waiting.remove(ticket)
                        return _Admission(ticket, group, self._admitting(ticket, group))
        return None

    def _admitting(self, ticket: Ticket, group: Slots) -> Generator[None, None, None]:
        """The parts of a prompt's prefill; with the last one it has a slot."""
        ticket.begin()
        row = group.tickets.index(None)
        settings, method = ticket.request.settings, kind(ticket.request.generate.cache)
        runner, told = Runner(self._programs, group.stages(method)), None

        def into(prefilled: Prefill, token: jax.Array) -> None:
            nonlocal told
            if ticket.logprobs is not None:
                told = _FIRST(prefilled.logits, token, self.logprobs)
            own = runner, row, ticket.inputs, settings, prefilled, token
            kept = group.admit(*own, ticket.kv_map)
            if kept is not None:
                ticket.kept_share = np.asarray(kept)[0, : int(ticket.inputs.length[0])]

        run = self._prompts.run(runner, ticket.inputs, settings, into, keys=ticket.keys)
        token, ticket.cached_tokens = yield from run
        drawn, counts, done, told = group.read((token, told))
        group.tickets[row] = ticket
        # One step, as of a chunk.
        told = jax.tree.map(lambda array: array[0][None], told)
        self._deliver(group, row, ticket, drawn, counts[row], done[row], told)

    def _decode(self, group: Slots) -> None:
        """Run a chunk of decode steps for a group."""
        try:
            asked = any(ticket.logprobs is not None for _, ticket in group.running)
            decoded = group.decode(self._params, self.logprobs if asked else 0)
            tokens, counts, done, told = group.read(decoded)
        except Exception as error:
            self._fail(group, error)
            return
        for row, ticket in group.running:
            own = jax.tree.map(lambda array, row=row: array[row], told)
            self._deliver(group, row, ticket, tokens[row], counts[row], done[row], own)

    def _deliver(
        self,
        group: Slots,
        row: int,
        ticket: Ticket,
        tokens: np.ndarray,
        count: int,
        done: bool,
        told: Logprobs | None,
    ) -> None:
        """Hand on what was drawn in a slot, int [steps]; one that has ended is free."""
        try:
            ticket.take(tokens, count, told)
            if done or ticket.written.stopped:
                group.tickets[row] = None
                stages = group.stages(ticket.request.generate.cache)
                ticket.succeed(self._vlm, *group.held(row), stages)
        except Exception as error:
            group.tickets[row] = None
            ticket.fail(error)

    def _fail(self, group: Slots, error: Exception) -> None:
        """Give up what runs in a group whose arrays are lost, and make new ones."""
        for row, ticket in group.running:
            group.tickets[row] = None
            failed = RuntimeError("the device failed while the request ran")
            ticket.fail(_caused(failed, error))
        group.clear()


_FIRST = jax.jit(Logprobs.of, static_argnums=2)


class _Admission(NamedTuple):
    """A request whose prompt is run."""

    ticket: Ticket
    group: Slots
    steps: Generator[None, None, None]


def _caused(made: Exception, error: Exception | None) -> Exception:
    made.__cause__ = error
    return made
