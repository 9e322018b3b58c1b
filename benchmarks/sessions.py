"""A second question about a picture beside a new prefill: `python -m benchmarks.sessions`.

The time from its tokens to its first token and its pool: behind a prefix that was run before,
wherever its keys and values lie, and by a prefill of the whole prompt with its picture, also in
chunks. They take turns. Weights are random, of the shape of the model that reads pages unless
another is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from benchmarks import device, measure
from benchmarks.command import AsJson, Force, Out, bad_input, check_known, check_out, finish
from benchmarks.environment import environment
from benchmarks.speed.cases import Case, models, name_of
from benchmarks.speed_sections import sessions_part
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import DEFAULT_METHOD, METHODS, make_method
from vlcache_jax.models.families import Params, init_params
from vlcache_jax.requests.buckets import bucket_for, default_buckets
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.driver import Run
from vlcache_jax.running.parts import CHUNK_ROWS, Rows, Runner
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.stores import STORES, check_store
from vlcache_jax.sessions.prefix import ROOM

MODEL = "pages"
VISUAL = (576, 1200, 2900)
QUESTION = 30
NEW = "new prefill"
"""What the questions are timed beside."""


@dataclass(frozen=True)
class Subject:
    """A picture that questions are asked about.

    Attributes:
        model: a name of `models`.
        visual: its tokens, which are the prefix.
        question: tokens of a question.
        cache: what is kept of a prompt.
        dtype: of weights and cache.
        programs: what was compiled so far.
    """

    model: str
    visual: int
    question: int
    cache: CacheMethod
    dtype: str
    programs: Programs = field(default_factory=Programs)

    @cached_property
    def case(self) -> Case:
        """The prompts, in the bucket that a session takes."""
        case = Case(self.model, self.visual, 1, self.dtype, images=True, text=self.question)
        rows = self.visual + max(ROOM, self.question)
        return replace(case, context=bucket_for(rows, default_buckets(case.config).prompt))

    def inputs(self, seed: int) -> ModelInputs:
        """The prompt of a question; another seed is another question."""
        length = self.visual + self.question
        first, other = (self.case.inputs(each, length) for each in (0, seed))
        behind = np.arange(self.case.context) >= self.visual
        return replace(first, tokens=np.where(behind, other.tokens, first.tokens))

    def prefix(self, params: Params, store: str) -> Rows:
        """The picture's rows, run once."""
        generate = self.case.generate(self.cache, 1)
        runner, inputs = Runner(self.programs, generate.stages), self.inputs(0)
        rows = Rows.none(runner, params, inputs, store)
        until = np.array([self.visual], np.int32)
        rows.remember(runner, params, inputs, generate.settings(1), until, CHUNK_ROWS)
        return rows

    def ask(
        self,
        params: Params,
        inputs: ModelInputs,
        *,
        chunk: int | None = None,
        prefix: Rows | None = None,
    ) -> Any:
        """The first token of a question, and the pool that further ones are drawn from."""
        generate = self.case.generate(self.cache, 1)
        asked = self.programs, params, generate.stages, [inputs], generate.settings(1)
        run = Run(*asked, chunk, prefix)
        return next(iter(run)), run.pool


def measured(
    subject: Subject,
    params: Params,
    effort: measure.Effort,
    stores: Sequence[str] = STORES,
    chunks: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """The rows of a subject: the new prefill, whole and in chunks, and a question of each store."""
    inputs = subject.inputs(1)
    about: dict[str, dict[str, Any]] = {NEW: {}}
    programs: dict[str, Callable[[], Any]] = {NEW: partial(subject.ask, params, inputs)}
    for chunk in chunks:
        name = f"{NEW}, {chunk:,} rows at a time"
        about[name] = {"chunk": chunk}
        programs[name] = partial(subject.ask, params, inputs, chunk=chunk)
    for store in stores:
        name = f"second question, {store}"
        about[name] = {"store": store}
        prefix = subject.prefix(params, store)
        programs[name] = partial(subject.ask, params, inputs.without_tiles, prefix=prefix)
    found = measure.compare(programs, calls=1, effort=effort)
    whole, rows = found[NEW], []
    for name, timing in found.items():
        row = {
            "model": subject.model,
            "visual_tokens": subject.visual,
            "question_tokens": subject.question,
            "bucket": subject.case.context,
            "method": name_of(subject.cache),
            "dtype": subject.dtype,
            "way": name,
            **about[name],
        }
        if isinstance(timing, Exception):
            rows.append({**row, "exception": measure.reason(timing)})
            continue
        if name != NEW and isinstance(whole, measure.Timing):
            row["speedup"] = whole.seconds / timing.seconds
        rows.append({**row, **timing.record()})
    return rows


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(models())}.")] = MODEL,
    visual: Annotated[
        list[int] | None, typer.Option(min=1, help="Visual tokens; several times.")
    ] = None,
    question: Annotated[int, typer.Option(min=1, help="Tokens of a question.")] = QUESTION,
    store: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(STORES)}; all by default.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = DEFAULT_METHOD,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    chunk: Annotated[
        list[int] | None, typer.Option(min=1, help="Also a new prefill of so many rows at a time.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Samples of each timing.")] = 5,
    as_json: AsJson = False,
    out: Out = None,
    force: Force = False,
) -> None:
    """Time the second question about a picture beside a new prefill of the same prompt."""
    check_out(out, force=force)
    with bad_input():
        check_known("model", [model], models())
        check_known("method", [method], METHODS)
        stores = tuple(dict.fromkeys(map(check_store, store or STORES)))
        if dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype {dtype!r} is not one of bfloat16, float16, float32")
    params = init_params(models()[model], dtype=jnp.dtype(dtype))
    effort, rows = measure.Effort(warm_ups=1, repeats=repeats), []
    for count in visual or VISUAL:
        subject = Subject(model, count, question, make_method(method), dtype)
        rows += measured(subject, params, effort, stores, chunk or ())
    result = {**environment(), **device.describe(need_gpu=False), "rows": rows}
    finish(result, sessions_part(result), as_json=as_json, out=out)


if __name__ == "__main__":
    typer.run(main)
