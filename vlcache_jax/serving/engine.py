"""The engine: one thread that prefills requests between the decode chunks of those that run.

    submit ─► queue ─► see ─► extend ─► extend ─► finish ─► a free slot ─► decode_chunk ─► ...
                       one part of one prompt    decode chunk    next part    decode chunk   next ...

Prompts of all lengths have one bucket and are run in parts, so that a short one costs its rows.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import CacheLike, FullCache, as_method
from vlcache_jax.errors import short, whole_number
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.requests.inputs import Interpolation, ModelInputs
from vlcache_jax.running.generate import CHUNK
from vlcache_jax.running.parts import Rows, Runner, drained, reach
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.prompting import Tables
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.state import Buffers
from vlcache_jax.serving.slots import SlotGroup, Slots
from vlcache_jax.serving.ticket import QueueFull, Ticket
from vlcache_jax.streaming import Request
from vlcache_jax.vlm import VLM

METHODS = ("full", "vl-cache", "snapkv", "h2o", "consensus")
"""Cache methods that are compiled by default."""

GROUPS = (SlotGroup(8, 128), SlotGroup(2, 512), SlotGroup(1, 512, 1.0))
"""Slots by default: for short answers, for long ones, and for the full cache of any prompt."""

ALL_PROGRAMS = 10_000  # none is ever thrown away

BLANK = Image.new("RGB", (64, 64))

Progress = Callable[[str, int, int], None]
"""Handed what is compiled, how many programs are ready, and how many there are."""


class Load(NamedTuple):
    """What an engine is doing.

    Attributes:
        running: slots in use.
        slots: all of them.
        waiting: requests in the queue, and the one that is prefilled.
        queue: most requests in the queue.
    """

    running: int
    slots: int
    waiting: int
    queue: int


class Engine:
    """Answers many requests at once; see the module docstring and docs/serving.md.

    Args:
        vlm: the model. Requests are made by `vlm.request`.
        methods: cache methods that requests may ask for, with any budget. All have one quantizer,
            or none.
        groups: the slots.
        prompt_rows: most tokens of a prompt; rounded up to a bucket.
        prefill_chunk: rows of a prompt that are run between two decode chunks. A method that has to
            see more of them together (`CacheMethod.reach`) runs those at once; "h2o" all of them.
        chunk: most decode steps between two looks at the queue.
        queue: requests that may wait for a slot.

    Attributes:
        rows: the prompts' bucket, T.
        groups: the slots.
        ready: whether everything is compiled.
        error: what has ended the engine, None where nothing has.

    Raises:
        ValueError: a value is out of range, methods differ in their quantizers, or no slot has room
            for a method.
        NotImplementedError: a quantizer packs new tokens.
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
    ):
        self._vlm, text, buckets = vlm, vlm.config.text, vlm.processor.buckets
        wanted = min(whole_number(prompt_rows, "prompt_rows", 1), text.max_positions)
        self.rows = bucket_for(wanted, buckets.prompt)
        self._chunk = min(whole_number(prefill_chunk, "prefill_chunk", 1), self.rows)
        whole_number(chunk, "chunk", 1)
        self._most_waiting = whole_number(queue, "queue", 1)
        if isinstance(methods, str) or not methods or not groups:
            raise ValueError(
                "an engine has a list of methods and of slot groups, at least one each"
            )
        kinds = (as_method(method).for_model(text, vlm.tsa_layers) for method in methods)
        self._methods = list(dict.fromkeys(map(_kind, kinds)))
        [quantizer, *others] = {method.quantize for method in self._methods}
        if others:
            raise ValueError(f"methods {self._served} must all have the same quantizer, or none")
        if quantizer is not None and quantizer.residual is not None:
            raise NotImplementedError(
                f"{quantizer.name} with {quantizer.residual=}, which packs new tokens, in slots"
            )
        self._params = vlm.folded if self._methods[0].transforms else vlm.params
        self._dtype = self._params["embed"]["embedding"].dtype
        self._programs = Programs(ALL_PROGRAMS)
        self._text = vlm.request(text="a", raw_prompt=True)
        self._pictures = self._examples()
        stop_ids = self._text.settings.stop_ids.shape[1]
        own = {"rows": self.rows, "dtype": self._dtype, "stop_ids": stop_ids}
        own |= {"chunk": chunk, "backend": vlm.backend}
        for method in self._methods:
            if not any(one.serves(method) for one in groups):
                raise ValueError(
                    f"no slot is made for {method.label}: a quantized full cache needs a group with "
                    "a budget of 1, and other methods one with less"
                )
        order = sorted(groups, key=lambda each: (each.new_tokens, each.room.layer_rows(self.rows)))
        first = self._methods[0]
        self.groups = [Slots(self._programs, vlm.config, one, first, **own) for one in order]
        self._tables, self._buffers = self._empty(), None
        self._waiting: deque[Ticket] = deque()
        self._admission: _Admission | None = None
        self._changed, self._thread = threading.Condition(), None
        self._closing = self._draining = False
        self.ready, self.error = False, None

    def warm_up(self, progress: Progress = lambda name, done, count: None) -> None:
        """Compile everything, make the slots, and begin to serve.

        Args:
            progress: called in front of each program, and at the end.
        """
        steps = [*self._programs_of_all()]
        for done, (name, compile_one) in enumerate(steps):
            progress(name, done, len(steps))
            compile_one()
        self._tables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._tables)
        for group in self.groups:
            group.clear()
        self._thread = threading.Thread(target=self._serve, name="vlcache-engine", daemon=True)
        self._thread.start()
        # What is no program of a stage is compiled where it is met first: by a request of each.
        asked = [{"text": "a", "cache": method} for method in self._methods]
        if self._pictures:
            asked.append({"images": BLANK, "text": "<image>a"})
        for one in asked:
            request = self._vlm.request(**one, max_new_tokens=1, raw_prompt=True)
            self._enqueue(self._ticket(request)).answer
        progress("", len(steps), len(steps))
        self.ready = True

    def submit(self, request: Request) -> Ticket:
        """Put a request in the queue.

        Args:
            request: of `VLM.request`, of one prompt.

        Raises:
            ValueError: it is one that this engine does not serve; the message says what it does.
            NotImplementedError: it asks for a trace or has a video.
            QueueFull: as many requests wait as may.
            RuntimeError: the engine is not warm yet, or closed.
        """
        if not self.ready:
            raise RuntimeError("the engine is not ready: call warm_up first")
        return self._enqueue(self._ticket(request))

    @property
    def load(self) -> Load:
        """What is going on."""
        running = sum(len(group.running) for group in self.groups)
        slots = sum(group.group.slots for group in self.groups)
        waiting = len(self._waiting) + (self._admission is not None)
        return Load(running, slots, waiting, self._most_waiting)

    def close(self, drain: bool = False) -> None:
        """Stop, and wait for it.

        Args:
            drain: answer all that was asked before; else it is dropped.
        """
        with self._changed:
            self._closing, self._draining = True, drain
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is served

    @property
    def _served(self) -> str:
        return ", ".join(method.label for method in self._methods)

    def _ticket(self, request: Request) -> Ticket:
        """A request that can be served, made ready."""
        if not request.single:
            raise ValueError("an engine takes one prompt at a time: submit each of the list")
        if request.generate.trace:
            raise NotImplementedError("traces in the engine: leave trace out, or use vlm.generate")
        cache, [inputs] = request.generate.cache, request.groups
        if _kind(cache) not in self._methods:
            raise ValueError(
                f"the cache method {short(cache)} was not compiled: this engine serves "
                f"{self._served}, with any budget"
            )
        if (length := int(inputs.length[0])) > self.rows:
            raise ValueError(f"{length} prompt tokens: this engine takes at most {self.rows}")
        if len(inputs.tiles):
            known = [example.tiles.shape for example in self._pictures]
            if inputs.tiles.shape[1:] != known[0][1:]:
                raise NotImplementedError("videos in the engine: use vlm.generate")
            if inputs.tiles.shape not in known:
                most = max(shape[0] for shape in known)
                raise ValueError(f"the pictures take {len(inputs.tiles)} tiles, of {most} at most")
        stops = self._text.settings.stop_ids.shape
        if request.settings.stop_ids.shape != stops:
            raise ValueError(f"more than {stops[1]} stop tokens: this engine has no place for them")
        if not any(group.fits(request) for group in self.groups):
            raise ValueError(
                f"no slot has room for {request.generate.max_new_tokens} new tokens and what "
                f"{cache.label} with a budget of {cache.limit} keeps of {length} tokens: there are "
                f"slots for {'; '.join(str(group.group) for group in self.groups)}"
            )
        words = self._vlm.processor.detokenizer(request.stop)
        return Ticket(request, self._fitted(inputs), words)

    def _fitted(self, inputs: ModelInputs) -> ModelInputs:
        """A prompt in the engine's bucket, of the same structure with pictures and without."""
        inputs = inputs.padded(self.rows)
        like = self._pictures[0].interpolation if self._pictures else None
        if like is not None and inputs.interpolation is None:
            none = Interpolation(*(np.zeros_like(array) for array in like))
            inputs = replace(inputs, interpolation=none)
        return inputs

    def _enqueue(self, ticket: Ticket) -> Ticket:
        with self._changed:
            if self._closing or self.error is not None:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= self._most_waiting:
                raise QueueFull(f"{self._most_waiting} requests wait already: try again later")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    # What is compiled

    def _examples(self) -> list[ModelInputs]:
        """A prompt with pictures of each number of tiles, without their pixels."""
        config, found = self._vlm.config, []
        if not config.max_tiles:
            return []
        [inputs] = self._vlm.request(BLANK, "<image>a", raw_prompt=True).groups
        for size in self._vlm.processor.buckets.tile_sizes(self.rows, config):
            tiles = np.broadcast_to(np.float32(0), (size, *inputs.tiles.shape[1:]))
            layout = None if inputs.layout is None else np.full((size, 4), -1, np.int32)
            found.append(replace(inputs.padded(self.rows), tiles=tiles, layout=layout))
        return found

    def _empty(self) -> Tables:
        """The shapes of what is seen of the most pictures: tables of all prompts have them."""
        if not self._pictures:
            return ()
        stages = self.groups[0].stages(self._methods[0])
        return jax.eval_shape(stages.see, self._params, self._pictures[-1])

    def _programs_of_all(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each step of the warm-up, and its name."""
        for inputs in self._pictures:
            yield f"{len(inputs.tiles)} tiles", partial(self._see, inputs, dry=True)
        for method in self._methods:
            yield method.label, partial(self._compile_prompt, method)
        for group in self.groups:
            yield f"decoding with {group.group}", partial(group.decode, self._params, dry=True)

    def _compile_prompt(self, method: CacheMethod) -> None:
        """Compile what brings prompts of a method into a slot of each group."""
        [inputs], settings = self._text.groups, self._text.settings
        inputs = self._fitted(inputs)
        inputs = replace(inputs, length=np.array([self.rows], np.int32))
        ends = range(-1, self.rows)
        reaches = {method.reach(self.rows, last) or self.rows for last in ends}
        widths = {min(bucket_for(each, (self._chunk,)), self.rows) for each in reaches}
        for width in widths:
            for group in self.groups if width == max(widths) else self.groups[:1]:
                group.clear(dry=True)
                drained(self._prefill(method, inputs, settings, group, 0, width, dry=True))

    # The thread

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
            ticket.fail(_caused("the engine was closed", self.error))

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
                    if group.free is not None and group.fits(ticket.request):
                        self._waiting.remove(ticket)
                        return _Admission(ticket, group, self._admitting(ticket, group))
        return None

    def _admitting(self, ticket: Ticket, group: Slots) -> Generator[None, None, None]:
        """The parts of a prompt's prefill; with the last one it has a slot."""
        ticket.begin()
        request, inputs, row = ticket.request, ticket.inputs, group.free
        assert row is not None
        method = _kind(request.generate.cache)
        together = reach(method, inputs) or self.rows
        own = method, inputs, request.settings, group, row, together
        token = yield from self._prefill(*own)
        group.tickets[row] = ticket
        self._deliver(group, np.asarray(token)[:, None], row)

    def _prefill(
        self,
        method: CacheMethod,
        inputs: ModelInputs,
        settings: Settings,
        group: Slots,
        row: int,
        together: int,
        dry: bool = False,
    ) -> Generator[None, None, jax.Array]:
        """Run a prompt in parts, and write it into a slot: its first token, int32 [1]."""
        runner = Runner(self._programs, group.stages(method), dry)
        tables, buffers, self._buffers = self._tables, self._buffers, None
        if len(inputs.tiles):
            tables = self._see(inputs)
            yield
        if buffers is None:
            empty = partial(runner.stages.empty_buffers, 1, self.rows, self._dtype)
            buffers = jax.eval_shape(empty) if dry else empty()
        rows = Rows(tables, self._dtype, buffers=buffers)
        own = runner, self._params, inputs, settings, self._chunk, together, (self._chunk,)
        prefilled, token = yield from rows.finishing(*own)
        group.admit(runner, row, prefilled, token, inputs, settings)
        if not dry:
            self._buffers = Buffers(prefilled.k, prefilled.v)  # for the next prompt
        return token

    def _see(self, inputs: ModelInputs, dry: bool = False) -> Tables:
        """What is seen of a prompt's pictures, in tables of one size."""
        runner = Runner(self._programs, self.groups[0].stages(self._methods[0]), dry)
        rows = self._tables[0].shape[0]
        return runner.do("see", self.rows, self._params, inputs, rows=rows)

    def _decode(self, group: Slots) -> None:
        """Run a chunk of decode steps for a group."""
        try:
            drawn = np.asarray(group.decode(self._params))
        except Exception as error:
            self._fail(group, error)
            return
        self._deliver(group, drawn, *(row for row, _ in group.running))

    def _deliver(self, group: Slots, drawn: np.ndarray, *rows: int) -> None:
        """Hand on the tokens of some slots, int [B or 1, steps]; those that have ended are free."""
        count, done = jax.device_get((group.state.count, group.state.done))
        for row in rows:
            ticket = group.tickets[row]
            assert ticket is not None
            try:
                ticket.take(drawn[row if len(drawn) > 1 else 0], count[row])
                if done[row] or ticket.written.stopped:
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
            ticket.fail(_caused("the device failed while the request ran", error))
        group.clear()


class _Admission(NamedTuple):
    """A request whose prompt is run."""

    ticket: Ticket
    group: Slots
    steps: Generator[None, None, None]


def _kind(cache: CacheMethod) -> CacheMethod:
    """A method without its budget: those that keep everything are one."""
    return FullCache(quantize=cache.quantize) if cache.limit.keeps_all else cache.any_budget


def _caused(message: str, error: Exception | None) -> RuntimeError:
    made = RuntimeError(message)
    made.__cause__ = error
    return made
