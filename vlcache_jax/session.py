"""Many questions about one picture: what stands in front of them is run once, and kept whole.

    prefix   system, context, pictures     run once: keys and values of all its rows
    ask      question ─► its rows, behind the prefix ─► scored over everything ─► a pool of its own

A method chooses for one question what to keep: here every question has a choice of its own. What
was answered before is text in front of the next question and is run again with it, so that a
conversation depends on its words alone, not on the methods that answered.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import jax
import numpy as np

from vlcache_jax.cache.methods import CacheLike
from vlcache_jax.errors import whole_number
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.requests.images import Images
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.requests.videos import Videos
from vlcache_jax.results.answer import Answer
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.parts import CHUNK_ROWS, Rows, Runner, last_visual, reach
from vlcache_jax.running.stores import check_store

if TYPE_CHECKING:
    from vlcache_jax.streaming import Request, Stream
    from vlcache_jax.vlm import VLM

ROOM = 128
"""Rows behind a prefix that its bucket has at least; a longer conversation takes a larger one."""


class SessionOptions(TypedDict, total=False):
    """Options of `VLM.session`; all may be left out.

    Attributes:
        videos: a video or a list of videos.
        frames: how many frames of each video the model is shown.
        context: a text that all questions are about.
        system: a message of the system in front of everything.
        store: where the prefix's keys and values lie between questions: "device", "host", or "8"
            and "4" for so many bits a value on the device (`running.stores`).
        prefill_chunk: rows of the prefix that are run at a time.
    """

    videos: Videos
    frames: int | None
    context: str | None
    system: str | None
    store: str
    prefill_chunk: int


class AskOptions(TypedDict, total=False):
    """Options of `Session.ask` and `Session.stream`; those of `VLM.generate` by the same names."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    stop: str | Sequence[str]
    cache: CacheLike
    trace: bool
    prefill_chunk: int | None


@dataclass(frozen=True)
class SessionReport:
    """What a session holds, and what it has spared.

    Attributes:
        prefix_tokens: tokens of the prefix, which are run once.
        visual_tokens: visual tokens among them.
        store: where their keys and values lie between questions.
        kv_bytes: keys and values, as they lie there.
        other_bytes: what was seen of the pictures, and what methods remember of the prefix.
        questions: how many were asked, of this session and its forks.
        prefilled_anew: how many of them were run whole, as their method looks at rows anywhere.
    """

    prefix_tokens: int
    visual_tokens: int
    store: str
    kv_bytes: int
    other_bytes: int
    questions: int
    prefilled_anew: int


class Prefix:
    """What a session and its forks share.

    Args:
        vlm: the model.
        images: of the conversation.
        **options: see `SessionOptions`.

    Attributes:
        subject: arguments of `VLM.request` that all questions have in common.
        first: the messages in front of the first question.
        length: tokens of the prefix, p.
        questions, anew: see `SessionReport`.
    """

    def __init__(
        self,
        vlm: "VLM",
        images: Images = None,
        *,
        videos: Videos = None,
        frames: int | None = None,
        context: str | None = None,
        system: str | None = None,
        store: str = "device",
        prefill_chunk: int = CHUNK_ROWS,
    ):
        self.vlm, self.store = vlm, check_store(store)
        self.chunk = whole_number(prefill_chunk, "prefill_chunk", 1)
        shown = vlm.processor.show(images, videos, frames)
        self.subject: dict[str, Any] = {"images": shown, "context": context}
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.questions = self.anew = 0
        self._rows: dict[bool, Rows] = {}
        self._lock = threading.Lock()
        # What two questions have in common in front of them does not depend on the question.
        one, other = (
            vlm.request(
                **self.subject, messages=[*self.first, user(text)], max_new_tokens=1
            ).groups[0]
            for text in ("a", "0 b")
        )
        self.length = common(one, other)
        visual = last_visual(one.visual_index[0]) + 1
        self.length = min(self.length, visual or self.length)
        self._fit(one)

    def _fit(self, inputs: ModelInputs) -> None:
        """Make room for a prompt that begins with the prefix."""
        count = max(self.length + ROOM, int(inputs.length[0]))
        total = bucket_for(count, self.vlm.processor.buckets.prompt)
        # One row of text stands behind it, as of every question: what is in front of it is known.
        end = np.array([self.length + 1], np.int32)
        self.inputs = inputs.padded(total, end)
        tables = [rows.tables for rows in self._rows.values()]
        self._tables = tables[0] if tables else ()
        self._rows.clear()

    def serves(self, cache: Any, inputs: ModelInputs) -> bool:
        """Whether a prompt can be run behind the prefix, for a method."""
        if reach(cache, inputs) is None or common(self.inputs, inputs) < self.length:
            return False
        ends = [
            (int(each.length[0]), last_visual(each.visual_index[0]))
            for each in (self.inputs, inputs)
        ]
        return all(look.window.basis(*ends[0]) == look.window.basis(*ends[1])
                   for look in cache.continued)  # fmt: skip

    def behind(self, request: "Request") -> "tuple[Request, Rows | None]":
        """A request as it is run behind the prefix, and the prefix's rows; None where it is not."""
        inputs, cache = request.groups[0], request.generate.cache
        with self._lock:
            self.questions += 1
            if not self.serves(cache, inputs):
                self.anew += 1
                return request, None
            if int(inputs.length[0]) > self.inputs.tokens.shape[1]:
                self._fit(inputs)
            rows = self.rows(request.generate)
        total = self.inputs.tokens.shape[1]
        return request._replace(groups=[inputs.without_tiles.padded(total)]), rows

    def rows(self, generate: Generate) -> Rows:
        """The rows of the prefix, with what a method remembers of them; run where they are not."""
        vlm, params = self.vlm, self.vlm.params_for(generate)
        runner = Runner(vlm.programs, generate.stages)
        transformed = generate.cache.transforms and not vlm.transformed
        rows = self._rows.get(transformed)
        if rows is None:
            rows = Rows(runner, params, self.inputs, self.store, self._tables)
            self._rows[transformed] = rows
        looks = generate.cache.continued
        if looks not in rows.memory:
            memory = rows.remembered(runner, 1, self.inputs.tokens.shape[1])
            until = np.array([self.length], np.int32)
            own = params, self.inputs, generate.settings(1), memory, until, self.chunk
            rows.memory[looks] = rows.extend(runner, *own)
            rows.release()
        return rows

    @property
    def report(self) -> SessionReport:
        """See `SessionReport`."""
        kv, other = 0, 0
        for rows in self._rows.values():
            kv += _bytes(rows.kept)
            other += _bytes((rows.tables, [*rows.memory.values()]))
        visual = int(np.sum(self.inputs.visual_index[0] >= 0))
        counts = self.questions, self.anew
        return SessionReport(self.length, visual, self.store, kv, other, *counts)


class Session:
    """A conversation about a prefix that is run once; made by `VLM.session`.

    Attributes:
        messages: the conversation so far.
    """

    def __init__(self, prefix: Prefix, messages: Sequence[dict[str, Any]]):
        self._prefix = prefix
        self.messages = list(messages)

    def ask(self, text: str, **options: Unpack[AskOptions]) -> Answer:
        """Answer the next question of the conversation.

        The same as `VLM.generate` with all of its messages.

        Args:
            text: the question.
            **options: see `AskOptions`.

        Raises:
            ValueError: as `VLM.generate`.
        """
        stream = self.stream(text, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, text: str, **options: Unpack[AskOptions]) -> "Stream":
        """Answer the next question piece by piece: see `VLM.stream`.

        The question and its answer are part of the conversation once the stream was read to its
        end.

        Raises:
            ValueError: as `VLM.generate`.
        """
        if unknown := options.keys() - AskOptions.__annotations__.keys():
            raise ValueError(f"a session's question takes no {', '.join(sorted(unknown))}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("a question must be a text that is not empty")
        messages, prefix = [*self.messages, user(text)], self._prefix
        request = prefix.vlm.request(**prefix.subject, messages=messages, **options)

        def done(answer: Answer) -> None:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

        return prefix.vlm.start(*prefix.behind(request), done)

    def fork(self) -> "Session":
        """A conversation of its own that goes on from here; nothing is copied."""
        return Session(self._prefix, self.messages)

    @property
    def bytes(self) -> int:
        """All that is kept between questions, in bytes."""
        report = self.report()
        return report.kv_bytes + report.other_bytes

    def report(self) -> SessionReport:
        """What the session holds, and what it has spared."""
        return self._prefix.report


def user(text: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": text}


def common(one: ModelInputs, other: ModelInputs) -> int:
    """How many tokens two prompts begin with alike."""
    count = min(int(one.length[0]), int(other.length[0]))
    differ = np.zeros(count, bool)
    for name in ("tokens", "visual_index", "positions"):
        first, second = getattr(one, name), getattr(other, name)
        if first is not None and second is not None:
            unlike = first[..., 0, :count] != second[..., 0, :count]
            differ |= unlike.reshape(-1, count).any(axis=0)
    return int(np.argmax(differ)) if differ.any() else count


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
