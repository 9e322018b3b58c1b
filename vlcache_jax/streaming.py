"""An answer while it is made: a request that was checked, and its text piece by piece."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from vlcache_jax.requests.inputs import CONTEXT, ModelInputs
from vlcache_jax.results.answer import Answer
from vlcache_jax.results.report import cache_report
from vlcache_jax.running.driver import Run
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.parts import Rows
from vlcache_jax.running.settings import Settings

if TYPE_CHECKING:
    from vlcache_jax.vlm import VLM


class Request(NamedTuple):
    """A request that was checked.

    Attributes:
        single: whether it is one prompt, not a list.
        generate: how it is answered.
        groups: its padded inputs.
        settings: what is asked of each sequence.
        stop: texts that end an answer.
        chunk: rows of the prompts that are run at a time; None for all.
    """

    single: bool
    generate: Generate
    groups: list[ModelInputs]
    settings: Settings
    stop: tuple[str, ...]
    chunk: int | None = None


class Progress:
    """The answers to a request while they are made: the driver's tokens, turned into text."""

    def __init__(self, vlm: "VLM", request: Request, prefix: Rows | None = None):
        self._vlm, self._request = vlm, request
        generate = request.generate
        params, settings = vlm.params_for(generate), request.settings
        own = request.groups, settings, request.chunk, prefix
        self._run = Run(vlm.programs, params, generate.stages, *own)
        batch = len(settings.max_new_tokens)
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._texts = [""] * batch
        self._words = [vlm.processor.detokenizer(request.stop) for _ in range(batch)]

    def pieces(self) -> Iterator[list[str]]:
        """Run it to the end: for each answer the text that a chunk has added."""
        for drawn in self._run:
            new = [""] * len(self._tokens)
            for row, tokens in enumerate(self._tokens):
                words = self._words[row]
                if not words.stopped:
                    more = drawn[row, : self._run.counts[row] - len(tokens)].tolist()
                    tokens.extend(more)
                    new[row] = words.push(more)
                    self._run.done[row] |= words.stopped
            self._add(new)
            yield new
        new = [words.finish() for words in self._words]
        self._add(new)
        yield new

    def _add(self, pieces: list[str]) -> None:
        self._texts = [text + piece for text, piece in zip(self._texts, pieces, strict=True)]

    def answers(self) -> list[Answer]:
        """The whole answers, once all pieces were read."""
        generate, groups, run = self._request.generate, self._request.groups, self._run
        stages, timings = generate.stages, run.timings
        # On the host, where no operation is a program: all but keys and values, [B, K, rows, H].
        pool = jax.tree.map(lambda leaf: np.asarray(leaf) if leaf.ndim < 4 else leaf, run.pool)
        counts, kept_visual = np.asarray(pool.counts), pool.visual
        answers = []
        for row, (text, tokens) in enumerate(zip(self._texts, self._tokens, strict=True)):
            group, place = divmod(row, len(groups[0].length))
            inputs, trace = groups[group], run.traces[group]
            length = int(inputs.length[place])
            index = inputs.visual_index[place, :length]
            visual, context = index >= 0, index == CONTEXT
            report = cache_report(
                self._vlm.config.text,
                generate.cache,
                self._vlm.params["embed"]["embedding"].dtype,
                prompt_tokens=length,
                counts=counts[row],
                kept_visual=kept_visual[row],
                prompt_rows=inputs.tokens.shape[1],
                tail_rows=stages.tail_rows,
                reserved_rows=stages.reserved_rows,
            )
            answers.append(
                Answer(
                    text=text,
                    tokens=tokens[: self._words[row].count],
                    prompt_tokens=length,
                    visual_tokens=int(visual.sum()),
                    context_tokens=int(context.sum()),
                    cache=report,
                    timings=timings,
                    trace=trace and trace.row(place, generate.cache, visual, context),
                )
            )
        return answers


class Stream(Iterator[str]):
    """An answer in pieces of text; see `VLM.stream`."""

    def __init__(
        self,
        vlm: "VLM",
        request: Request,
        prefix: Rows | None = None,
        done: Callable[[Answer], None] | None = None,
    ):
        self._vlm, self._request, self._prefix, self._done = vlm, request, prefix, done
        self._answer: Answer | None = None
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            ValueError: the stream was not read to its end yet.
        """
        if self._answer is None:
            raise ValueError("the answer is there once the stream was read to its end")
        return self._answer

    def _read(self) -> Iterator[str]:
        progress = Progress(self._vlm, self._request, self._prefix)
        for [piece] in progress.pieces():
            if piece:
                yield piece
        [self._answer] = progress.answers()
        if self._done is not None:
            self._done(self._answer)
