"""What the questions of a session and of its forks have in common, run once and kept whole."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import CacheLike
from vlcache_jax.errors import whole_number
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.requests.images import Images
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.requests.videos import Videos
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.parts import CHUNK_ROWS, Rows, Runner, last_visual, reach
from vlcache_jax.running.prompting import Tables
from vlcache_jax.running.stores import check_store, tree_bytes

if TYPE_CHECKING:
    from vlcache_jax.streaming import Request
    from vlcache_jax.vlm import VLM

ROOM = 128
"""Rows behind a prefix that its bucket has at least; a longer conversation takes a larger one."""


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
        cache: what questions are asked with where they do not say.
        all_rows: its rows, by whether they were made with transformed values.
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
        cache: CacheLike = None,
        store: str = "device",
        prefill_chunk: int = CHUNK_ROWS,
    ):
        self.vlm, self.store = vlm, check_store(store)
        self.chunk = whole_number(prefill_chunk, "prefill_chunk", 1)
        shown = vlm.processor.show(images, videos, frames)
        self.first = [] if system is None else [{"role": "system", "content": system}]
        # What two questions have in common in front of them does not depend on the question.
        asked = [[*self.first, user(text)] for text in ("a", "0 b")]
        subject = {"images": shown, "context": context, "max_new_tokens": 1, "cache": cache}
        requests = [vlm.request(messages=messages, **subject) for messages in asked]
        one, other = (request.groups[0] for request in requests)
        same = common(one, other)
        self.length = min(same, last_visual(one.visual_index[0]) + 1 or same)
        self.subject: dict[str, Any] = {"images": shown.without_pixels, "context": context}
        self.cache = requests[0].generate.cache
        self._begin()
        self._fit(one)
        self.rows(requests[0].generate)

    @classmethod
    def restored(cls, vlm: "VLM", state: dict[str, Any], rows: dict[bool, Rows]) -> "Prefix":
        """That of a session which was saved; see `saved`."""
        self = cls.__new__(cls)
        self.vlm, self.cache = vlm, vlm.cache
        self.store, self.chunk, self.length = state["store"], state["chunk"], state["length"]
        self.first, self.inputs = state["first"], state["inputs"]
        self.subject = {"images": state["shown"], "context": state["context"]}
        self._begin()
        self.all_rows = rows
        self._tables = next((each.tables for each in rows.values()), ())
        return self

    def _begin(self) -> None:
        self.questions = self.anew = 0
        self.all_rows: dict[bool, Rows] = {}
        self._tables: Tables = ()
        self._lock = threading.Lock()

    def _fit(self, inputs: ModelInputs) -> None:
        """Make room for a prompt that begins with the prefix."""
        count = max(self.length + ROOM, int(inputs.length[0]))
        total = bucket_for(count, self.vlm.processor.buckets.prompt)
        # One row of text stands behind it, as of every question: what is in front of it is known.
        end = np.array([self.length + 1], np.int32)
        self.inputs = inputs.padded(total, end)
        self.all_rows.clear()

    def serves(self, cache: CacheMethod, inputs: ModelInputs) -> bool:
        """Whether a prompt begins with the prefix, and a method would remember the same of it."""
        if common(self.inputs, inputs) < self.length:
            return False
        ends = [
            (int(each.length[0]), last_visual(each.visual_index[0]))
            for each in (self.inputs, inputs)
        ]
        windows = [look.window for look in cache.continued]
        return all(window.basis(*ends[0]) == window.basis(*ends[1]) for window in windows)

    def behind(self, request: "Request") -> "tuple[Request, Rows]":
        """A request as it is run behind the prefix, and the rows that it is run behind."""
        inputs, generate = request.groups[0], request.generate
        with self._lock:
            if int(inputs.length[0]) > self.inputs.tokens.shape[1]:
                self._fit(inputs)
            serves = self.serves(generate.cache, inputs)
            inputs = inputs.without_tiles.padded(self.inputs.tokens.shape[1])
            if serves:
                rows = self.rows(generate)
            else:
                runner = Runner(self.vlm.programs, generate.stages)
                params = self.vlm.params_for(generate)
                rows = Rows.none(runner, params, inputs, tables=self._tables)
            self.questions += 1
            self.anew += not serves or reach(generate.cache, inputs) is None
        return request._replace(groups=[inputs]), rows

    def rows(self, generate: Generate) -> Rows:
        """The rows of the prefix, with what a method remembers of them; run where they are not."""
        vlm, params = self.vlm, self.vlm.params_for(generate)
        runner = Runner(vlm.programs, generate.stages)
        transformed = generate.cache.transforms and not vlm.transformed
        rows = self.all_rows.get(transformed)
        if rows is None or rows.lost:
            rows = Rows.none(runner, params, self.inputs, self.store, self._tables)
            self.all_rows[transformed] = rows
            self._tables, self.inputs = rows.tables, self.inputs.without_tiles
        until = np.array([self.length], np.int32)
        rows.remember(runner, params, self.inputs, generate.settings(1), until, self.chunk)
        return rows

    @property
    def report(self) -> SessionReport:
        """See `SessionReport`."""
        kv, other = 0, 0
        for rows in self.all_rows.values():
            kv += tree_bytes(rows.kept)
            other += tree_bytes((rows.tables, [*rows.memory.values()]))
        visual = int(np.sum(self.inputs.visual_index[0] >= 0))
        counts = self.questions, self.anew
        return SessionReport(self.length, visual, self.store, kv, other, *counts)


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
