"""An answer while it is made: a request that was checked, and its text piece by piece."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from vlcache_jax.cache.method import AnyPool
from vlcache_jax.cache.trace import BatchTrace
from vlcache_jax.distributed.mesh import fetched
from vlcache_jax.requests.detokenize import Detokenizer
from vlcache_jax.requests.inputs import CONTEXT, ModelInputs
from vlcache_jax.results.answer import Answer
from vlcache_jax.results.report import cache_report
from vlcache_jax.running.driver import Run, Timings
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.parts import Rows
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.stages import Stages

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


class Written:
    """An answer while it is made: its tokens so far, and their text.

    Args:
        words: of this answer alone.

    Attributes:
        tokens: those drawn so far; beyond the ones that complete a stop text, too.
        text: theirs, as far as it is settled.
    """

    def __init__(self, words: Detokenizer):
        self._words = words
        self.tokens: list[int] = []
        self.text = ""

    @classmethod
    def of(cls, vlm: "VLM", request: Request) -> "Written":
        """The beginning of an answer to a request."""
        least = request.generate.min_new_tokens
        return cls(vlm.processor.detokenizer(request.stop, least=least))

    @property
    def stopped(self) -> bool:
        """Whether a stop text has appeared."""
        return self._words.stopped

    def take(self, drawn: np.ndarray, count: int) -> str:
        """The text that is settled now, and was not before.

        Args:
            drawn: tokens since the last call, int [n], and any others behind them.
            count: how many tokens the answer has.
        """
        if self.stopped:
            return ""
        more = drawn[: count - len(self.tokens)].tolist()
        self.tokens.extend(more)
        return self._add(self._words.push(more))

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        return self._add(self._words.finish())

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece

    def answer(
        self,
        vlm: "VLM",
        request: Request,
        pool: AnyPool,
        row: int,
        timings: Timings,
        stages: Stages,
        *,
        group: int = 0,
        place: int = 0,
        trace: BatchTrace | None = None,
    ) -> Answer:
        """The whole answer.

        Args:
            vlm: the model.
            request: what was asked.
            pool: of the batch, its small arrays on the host (`on_host`).
            row: the answer's row of the batch.
            timings: of the whole call.
            stages: by which it was made.
            group: number of the inputs that its prompt stands in.
            place: its row of them.
            trace: of these inputs.
        """
        inputs, cache = request.groups[group], request.generate.cache
        length = int(inputs.length[place])
        index = inputs.visual_index[place, :length]
        visual, context = index >= 0, index == CONTEXT
        report = cache_report(
            vlm.config.text,
            cache,
            vlm.params["embed"]["embedding"].dtype,
            prompt_tokens=length,
            counts=np.asarray(pool.counts)[row],
            kept_visual=np.asarray(pool.visual)[row],
            prompt_rows=inputs.tokens.shape[1],
            tail_rows=stages.tail_rows,
            reserved_rows=stages.reserved_rows,
        )
        tokens = self.tokens[: self._words.count]
        full = len(tokens) == request.generate.max_new_tokens and not self.stopped
        return Answer(
            text=self.text,
            tokens=tokens,
            finish_reason="length" if full else "stop",
            prompt_tokens=length,
            visual_tokens=int(visual.sum()),
            context_tokens=int(context.sum()),
            cache=report,
            timings=timings,
            trace=trace and trace.row(place, cache, visual, context),
        )


def on_host(pool: AnyPool, rows: slice = slice(None)) -> AnyPool:
    """A pool with all but keys and values, [B, K, rows, H], where no operation is a program.

    Args:
        pool: of a batch.
        rows: its sequences; keys and values are those of all.
    """
    return jax.tree.map(lambda leaf: fetched(leaf)[rows] if leaf.ndim < 4 else leaf, pool)


class Progress:
    """The answers to a request while they are made: the driver's tokens, turned into text."""

    def __init__(self, vlm: "VLM", request: Request, prefix: Rows | None = None):
        self._vlm, self._request = vlm, request
        generate = request.generate
        params, settings = vlm.params_for(generate), request.settings
        own = request.groups, settings, request.chunk, prefix
        self._run = Run(vlm.programs, params, generate.stages, *own)
        batch = range(len(settings.max_new_tokens))
        self._written = [Written.of(vlm, request) for _ in batch]

    def pieces(self) -> Iterator[list[str]]:
        """Run it to the end: for each answer the text that a chunk has added."""
        run = self._run
        for drawn in run:
            rows = zip(self._written, drawn, run.counts, strict=True)
            yield [one.take(tokens, count) for one, tokens, count in rows]
            run.done |= np.array([one.stopped for one in self._written])
        yield [one.finish() for one in self._written]

    def answers(self) -> list[Answer]:
        """The whole answers, once all pieces were read."""
        run, stages, answers = self._run, self._request.generate.stages, []
        pool, size = on_host(run.pool), len(self._request.groups[0].length)
        for row, one in enumerate(self._written):
            group, place = divmod(row, size)
            answers.append(
                one.answer(
                    self._vlm,
                    self._request,
                    pool,
                    row,
                    run.timings,
                    stages,
                    group=group,
                    place=place,
                    trace=run.traces[group],
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
