"""The friendly object: a model with its parameters, its processor and its compiled programs."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import jax
import numpy as np

from vlcache_jax.answer import Answer, Timings
from vlcache_jax.cache.method import AnyPool, CacheMethod
from vlcache_jax.cache.methods import as_method
from vlcache_jax.cache.quantize import Quantizer
from vlcache_jax.cache.trace import BatchTrace
from vlcache_jax.config import LlavaConfig
from vlcache_jax.generate import CHUNK, DecodeState, Generate
from vlcache_jax.models.fold import fold_transform
from vlcache_jax.models.llava import Params
from vlcache_jax.processing import Images, ModelInputs, Processor
from vlcache_jax.report import cache_report
from vlcache_jax.sampling import Sampling

STREAM_CHUNK = 16
"""Decode steps between two pieces of a stream: about a tenth of a second of a 7B model's time."""


class Options(TypedDict, total=False):
    """Options of `VLM.generate` and `VLM.stream`; all may be left out.

    Attributes:
        max_new_tokens: most tokens of an answer, 128 by default.
        temperature: 0, the default, is greedy.
        top_k: draw among the k most likely tokens; all by default.
        top_p: draw among the most likely tokens that reach this probability together; 1 by default.
        seed: of the draws, 0 by default.
        raw_prompt: take the text as it is, without the chat template.
        cache: what is kept of the prompt's keys and values, `VLCache(budget=0.1)` for instance;
            everything by default. A quantiser alone, `AKVQ()`, keeps everything, quantised.
        trace: also give each answer its `Trace`, at the cost of one more decode step.
        prefill_batch: prompts of a batch that are prefilled at a time, all by default. The memory
            of a prefill is that of these, not of the whole batch.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    raw_prompt: bool
    cache: CacheMethod | Quantizer | None
    trace: bool
    prefill_batch: int | None


class Program:
    """A function compiled once per set of argument shapes, compile time kept apart."""

    def __init__(self, function: Callable[..., Any], donate: tuple[int, ...] = ()):
        self._jitted = jax.jit(function, donate_argnums=donate)
        self._compiled: dict[Any, Any] = {}

    def ready(self, *args: Any) -> tuple[Callable[..., Any], float]:
        """The program for arguments like these, and the seconds that compiling it took just now.

        Calling it runs it and waits for the result.
        """
        key = self._key(args)
        began, seconds = time.perf_counter(), 0.0
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(*args).compile()
            seconds = time.perf_counter() - began
        compiled = self._compiled[key]
        return lambda *args: jax.block_until_ready(compiled(*args)), seconds

    @staticmethod
    def _key(args: tuple[Any, ...]) -> Any:
        leaves, tree = jax.tree.flatten(args)
        return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


class VLM:
    """A vision-language model ready to answer; made by `vlcache_jax.load`.

    Attributes:
        config: the model's configuration.
        params: its parameters, a nested dict of arrays, read when they are first needed.
        processor: prompts and images to model inputs.
        stop_ids: tokens that end an answer.
        name: what was loaded.
        backend: attention backend, None for the best that supports the case.
        transformed: the parameters that are read have the transform of the values folded in
            (`models.fold`): every method runs on them. Else a method that needs it makes folded
            copies of the attention's weights when it is first used, and keeps them beside.
        tsa_layers: text-salient layers that `calibrate` found, for an `AKVQ` that names none; None
            for those of the kind of decoder.
    """

    def __init__(
        self,
        config: LlavaConfig,
        read_params: Callable[[], Params],
        processor: Processor,
        *,
        stop_ids: Sequence[int],
        name: str = "",
        backend: str | None = None,
        transformed: bool = False,
        tsa_layers: tuple[int, ...] | None = None,
    ):
        self.config = config
        self._read_params = read_params
        self.processor = processor
        self.stop_ids = tuple(stop_ids)
        self.name = name
        self.backend = backend
        self.transformed = transformed
        self.tsa_layers = tsa_layers
        self._programs: dict[tuple[Generate, str], Program] = {}

    @cached_property
    def params(self) -> Params:
        """The parameters, read at the first use."""
        return self._read_params()

    @cached_property
    def _folded(self) -> Params:
        return self.params if self.transformed else fold_transform(self.params)

    def _params_for(self, generate: Generate) -> Params:
        """The parameters that a way to generate runs on."""
        return self._folded if generate.cache.transforms else self.params

    @overload
    def generate(
        self, images: Images = None, text: str = "", **options: Unpack[Options]
    ) -> Answer: ...

    @overload
    def generate(
        self, images: Sequence[Images] | None, text: list[str], **options: Unpack[Options]
    ) -> list[Answer]: ...

    @overload
    def generate(self, *, text: list[str], **options: Unpack[Options]) -> list[Answer]: ...

    def generate(
        self,
        images: Images | Sequence[Images] = None,
        text: str | list[str] = "",
        **options: Unpack[Options],
    ) -> Answer | list[Answer]:
        """Answer one prompt, or a batch of them given as lists.

        The whole generation is one compiled program per bucket of prompt length and tile count.

        Args:
            images: for one prompt: None, an image or a list of images; for a batch: a list with
                one such entry per prompt. An image is a path, a PIL image or uint8 [H, W, 3].
            text: the prompt, or a list of prompts. `<image>` marks say where the images go;
                without marks they come first.
            **options: see `Options`.

        Returns:
            An `Answer` for a string, a list of them for a list.

        Raises:
            ValueError: bad images or prompts, or more tokens than the model has positions for.
            FileNotFoundError: an image file does not exist.
        """
        return self._answers(text, *self._request(images, text, CHUNK, **options))

    def generate_each(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """Answer one request after the other, the next one made ready while the device works.

        Reading and resizing a request's images and padding its prompts is the host's work: here it
        is done in a thread, one request ahead, and costs no time of the device.

        Args:
            requests: the arguments of `generate` by their names, a mapping for each request. It is
                read in that thread, one request at a time, so that a generator may open files.

        Yields:
            What `generate` returns, in the order of the requests.

        Raises:
            ValueError: as `generate`, when the request's turn comes.
            FileNotFoundError: likewise.
        """
        pending = iter(requests)

        def prepare() -> Prepared | None:
            for request in pending:
                arguments = dict(request)
                images, text = arguments.pop("images", None), arguments.pop("text", "")
                return Prepared(text, *self._request(images, text, CHUNK, **arguments))
            return None

        with ThreadPoolExecutor(max_workers=1) as worker:
            ahead = worker.submit(prepare)
            while (prepared := ahead.result()) is not None:
                ahead = worker.submit(prepare)
                yield self._answers(*prepared)

    def _answers(
        self,
        text: str | list[str],
        generate: Generate,
        groups: list[ModelInputs],
        key: jax.Array,
    ) -> Answer | list[Answer]:
        """The answers to a request that was checked and padded."""
        if len(groups) == 1:
            run = self._run_whole(generate, groups[0], key)
        else:
            run = self._run_in_groups(generate, groups, len(text), key)
        answers = []
        for row, length in enumerate(run.lengths):
            group, place = divmod(row, len(groups[0].length))
            kept = Kept(run.counts[row], run.kept_visual[row], run.traces[group])
            tokens = run.tokens[row, :length]
            answers.append(self._answer(generate, groups[group], place, tokens, kept, run.timings))
        return answers[0] if isinstance(text, str) else answers

    def _run_whole(self, generate: Generate, inputs: ModelInputs, key: jax.Array) -> "Run":
        """Everything in one program."""
        args = (self._params_for(generate), jax.device_put(inputs), key)
        program, compile_s = self._program(generate, "__call__").ready(*args)
        began = time.perf_counter()
        output = program(*args)
        timings = Timings(compile_s, None, None, time.perf_counter() - began)
        output = jax.device_get(output)
        return Run(
            output.tokens,
            output.lengths,
            output.counts,
            output.kept_visual,
            [output.trace],
            timings,
        )

    def _run_in_groups(
        self, generate: Generate, groups: list[ModelInputs], count: int, key: jax.Array
    ) -> "Run":
        """Prefill group after group into the cache of all `count` prompts, then decode at once."""
        params = self._params_for(generate)
        prefill = self._program(generate, "prefill_into", donate=(1, 2))
        dtype = params["embed"]["embedding"].dtype
        pool, state = generate.empty(count, groups[0].tokens.shape[1], dtype)
        compile_s, prefill_s, decode_s, steps, traces = 0.0, 0.0, 0.0, 0, []
        for index, group in enumerate(groups):
            size = len(group.length)
            # The repeated prompts that fill up the last group are written where the last one is.
            rows = np.minimum(np.arange(size, dtype=np.int32) + index * size, count - 1)
            own = jax.random.fold_in(key, index)
            args = (params, pool, state, rows, jax.device_put(group), own)
            program, seconds = prefill.ready(*args)
            compile_s += seconds
            began = time.perf_counter()
            pool, state, trace = program(*args)
            prefill_s += time.perf_counter() - began
            traces.append(jax.device_get(trace))
        columns = [np.asarray(state.token)[:, None]]
        for _ in range(generate.num_chunks):
            if np.all(state.done):
                break
            pool, state, drawn, chunk = self._chunk(generate, params, pool, state)
            compile_s += chunk.compile_s
            decode_s += chunk.total_s
            steps += generate.chunk_steps
            columns.append(np.asarray(drawn))
        return Run(
            np.concatenate(columns, axis=1),
            np.minimum(np.asarray(state.count), generate.max_new_tokens),
            np.asarray(pool.counts),
            np.asarray(pool.visual),
            traces,
            _timings(compile_s, prefill_s, decode_s, steps),
        )

    def _chunk(
        self, generate: Generate, params: Params, pool: AnyPool, state: DecodeState
    ) -> tuple[AnyPool, DecodeState, jax.Array, Timings]:
        """The next chunk of decode steps: pool, state, tokens [B, steps], and its times."""
        compile_s = total_s = 0.0
        if generate.spilled_rows is not None:
            spill = self._program(generate, "spill", donate=(0, 1))
            program, compile_s = spill.ready(pool, state)
            began = time.perf_counter()
            pool, state = program(pool, state)
            total_s = time.perf_counter() - began
        program, seconds = self._program(generate, "decode_chunk", donate=(2,)).ready(
            params, pool, state
        )
        began = time.perf_counter()
        state, drawn = program(params, pool, state)
        total_s += time.perf_counter() - began
        return pool, state, drawn, Timings(compile_s + seconds, None, total_s, total_s)

    def stream(self, images: Images = None, text: str = "", **options: Unpack[Options]) -> "Stream":
        """Answer one prompt piece by piece: the arguments of `generate`, a single prompt.

        Input is checked before this returns; the work is done while the stream is read.

        Returns:
            An iterator over pieces of text; its `answer` is there once it is exhausted.

        Raises:
            ValueError: as `generate`, or `text` is not one string.
            FileNotFoundError: an image file does not exist.
        """
        if not isinstance(text, str):
            raise ValueError("stream answers one prompt: use generate for a list of them")
        generate, [inputs], key = self._request(images, text, STREAM_CHUNK, **options)
        return Stream(self, generate, inputs, key)

    def _request(
        self,
        images: Images | Sequence[Images],
        text: str | list[str],
        chunk: int,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        raw_prompt: bool = False,
        cache: CacheMethod | Quantizer | None = None,
        trace: bool = False,
        prefill_batch: int | None = None,
    ) -> tuple[Generate, list[ModelInputs], jax.Array]:
        """Check a request: the way to generate, the padded inputs in groups, the random key."""
        generate = Generate(
            self.config,
            as_method(cache).for_model(self.config.text, self.tsa_layers),
            max_new_tokens,
            Sampling(temperature, top_k, top_p),
            self.stop_ids,
            chunk,
            self.backend,
            trace,
        )
        groups = self.processor.groups(images, text, prefill_batch, raw_prompt=raw_prompt)
        longest = max(int(group.length.max()) for group in groups)
        limit = self.config.text.max_positions
        if longest + max_new_tokens - 1 > limit:
            raise ValueError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's "
                f"{limit} positions: at most {limit + 1 - longest} new tokens fit"
            )
        return generate, groups, jax.random.key(seed)

    def _program(self, generate: Generate, stage: str, donate: tuple[int, ...] = ()) -> Program:
        key = (generate, stage)
        if key not in self._programs:
            self._programs[key] = Program(getattr(generate, stage), donate)
        return self._programs[key]

    def _answer(
        self,
        generate: Generate,
        inputs: ModelInputs,
        row: int,
        tokens: Sequence[int] | np.ndarray,
        kept: "Kept",
        timings: Timings,
    ) -> Answer:
        """The answer of one row of a batch."""
        length = int(inputs.length[row])
        visual = inputs.visual_index[row, :length] >= 0
        report = cache_report(
            self.config.text,
            generate.cache,
            self.params["embed"]["embedding"].dtype,
            prompt_tokens=length,
            counts=kept.counts,
            kept_visual=kept.visual,
            prompt_rows=inputs.tokens.shape[1],
            tail_rows=generate.tail_rows,
            reserved_rows=generate.reserved_rows,
        )
        ids = [int(token) for token in tokens]
        trace = kept.trace.row(row, generate.cache, visual) if kept.trace else None
        return Answer(
            text=self.processor.decode(ids),
            tokens=ids,
            prompt_tokens=length,
            visual_tokens=int(visual.sum()),
            cache=report,
            timings=timings,
            trace=trace,
        )


class Prepared(NamedTuple):
    """A request, checked: its text, how to generate, its padded inputs in groups, the key."""

    text: str | list[str]
    generate: Generate
    groups: list[ModelInputs]
    key: jax.Array


class Run(NamedTuple):
    """What came of a batch, on the host: a `GenerateOutput` with a trace for each group."""

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    kept_visual: np.ndarray
    traces: list[BatchTrace | None]
    timings: Timings


class Kept(NamedTuple):
    """What was kept of one prompt: tokens by width [L, 1 + widths], visual ones [L], the trace."""

    counts: np.ndarray
    visual: np.ndarray
    trace: BatchTrace | None


def _timings(compile_s: float, prefill_s: float, decode_s: float, steps: int) -> Timings:
    speed = steps / decode_s if steps else None
    return Timings(compile_s, prefill_s, decode_s, prefill_s + decode_s, speed)


class Stream(Iterator[str]):
    """An answer in pieces of text; see `VLM.stream`."""

    def __init__(self, vlm: VLM, generate: Generate, inputs: ModelInputs, key: jax.Array):
        self._vlm, self._generate, self._inputs = vlm, generate, inputs
        self._answer: Answer | None = None
        self._pieces = self._run(key)

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

    def _run(self, key: jax.Array) -> Iterator[str]:
        generate, vlm = self._generate, self._vlm
        params = vlm._params_for(generate)
        begin = vlm._program(generate, "begin")
        args = (params, jax.device_put(self._inputs), key)
        run, compile_s = begin.ready(*args)
        began = time.perf_counter()
        pool, state, trace = run(*args)
        prefill_s = time.perf_counter() - began
        tokens = [int(state.token[0])][: int(state.count[0])]
        shown = ""
        decode_s, steps = 0.0, 0
        for index in range(generate.num_chunks + 1):
            text = vlm.processor.decode(tokens)
            # An unfinished character decodes to U+FFFD: hold it back until the rest is there.
            if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
            if index == generate.num_chunks or bool(state.done[0]):
                break
            pool, state, drawn, chunk = vlm._chunk(generate, params, pool, state)
            compile_s += chunk.compile_s
            decode_s += chunk.total_s
            steps += generate.chunk_steps
            tokens.extend(int(token) for token in np.asarray(drawn[0]))
            tokens = tokens[: min(int(state.count[0]), generate.max_new_tokens)]
        timings = _timings(compile_s, prefill_s, decode_s, steps)
        kept = Kept(np.asarray(pool.counts[0]), np.asarray(pool.visual[0]), trace)
        self._answer = vlm._answer(generate, self._inputs, 0, tokens, kept, timings)
        if self._answer.text != shown:
            yield self._answer.text[len(shown) :]
