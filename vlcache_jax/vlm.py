"""The friendly object: a model with its parameters, its processor and its compiled programs."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, overload

import jax
import numpy as np

from vlcache_jax.cache.methods import CacheLike, as_method
from vlcache_jax.distributed.mesh import DeviceMesh
from vlcache_jax.errors import whole_number, whole_numbers
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.families import Params, abstract_params
from vlcache_jax.models.fold import fold_transform
from vlcache_jax.requests.detokenize import check_stop
from vlcache_jax.requests.images import Images
from vlcache_jax.requests.messages import Messages, is_one
from vlcache_jax.requests.processing import Contexts, Processor
from vlcache_jax.requests.videos import Videos
from vlcache_jax.results.answer import Answer
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.parts import Rows
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.sampling import Sampling
from vlcache_jax.sessions.prefix import Prefix
from vlcache_jax.sessions.saved import open_saved
from vlcache_jax.sessions.session import AskOptions, Session, SessionOptions
from vlcache_jax.streaming import Progress, Request, Stream


class Options(AskOptions, total=False):
    """Options of `VLM.generate` and `VLM.stream`; all may be left out.

    None of them but `cache`, `trace` and `raw_prompt` is part of a compiled program; of `cache`,
    the budget is only by the size of its pool (`POOL_SHARES`), and `max_new_tokens` by that of the
    tail.

    Attributes:
        messages: a conversation instead of `text`, `[{"role": "user", "content": "..."}, ...]`, or
            a list of them (`vlcache_jax.requests.messages.Messages`).
        videos: for one prompt a video or a list of videos, for a batch a list with one such entry
            per prompt. `requests.videos.Videos` has the forms of a video. `<video>` marks say where
            they go; without marks they come first, behind the images.
        frames: how many frames of each video the model is shown, evenly chosen; by default what the
            checkpoint's processor says, often all of them.
        context: a text that the question is about, put in front of it; for the cache it is what a
            picture's tokens are. For a list of prompts, a list of texts or None.
        max_new_tokens: most tokens of an answer, 128 by default.
        temperature: 0, the default, is greedy.
        top_k: draw among the k most likely tokens; all by default.
        top_p: draw among the most likely tokens that reach this probability together; 1 by default.
        seed: of the draws, 0 by default. What is drawn depends on it, on the number of the text in
            the call and on the token's number, on nothing else.
        stop: texts that end an answer, which ends in front of the first of them.
        min_new_tokens: before an answer has so many tokens, no stop token and no stop text ends it;
            0 by default. A stop token among them is a token like others.
        ignore_eos: no stop token ends an answer, as measurements of speed want it.
        raw_prompt: take the text as it is, without the chat template.
        cache: what is kept of the prompt's keys and values, `VLCache(budget=0.1)` for instance;
            by default what the model was loaded with, else everything. A quantizer alone, `AKVQ()`,
            keeps everything, quantized. A method's name or class stands for its defaults, a number
            for VL-Cache with that budget.
        trace: also give each answer its `Trace`, at the cost of one more decode step.
        prefill_batch: prompts of a batch that are prefilled at a time, all by default. The memory
            of a prefill is that of these, not of the whole batch.
        prefill_chunk: rows of the prompts that are prefilled at a time, all by default. Beside the
            cache the memory of a prefill is then that of so many rows. A method that looks at rows
            anywhere (`tgv-kv`, a score of your own) runs its prompts whole.
    """

    messages: Messages | Sequence[Messages] | None
    videos: Videos | Sequence[Videos]
    frames: int | None
    context: Contexts
    min_new_tokens: int
    ignore_eos: bool
    raw_prompt: bool
    prefill_batch: int | None


class VLM:
    """A vision-language model ready to answer; made by `vlcache_jax.load`.

    Attributes:
        config: the model's configuration.
        params: its parameters, a nested dict of arrays, read when they are first needed.
        processor: prompts and images to model inputs.
        stop_ids: tokens that end an answer.
        name: what was loaded.
        backend: attention backend, None for the best that supports the case.
        cache: what is kept of a prompt where a call does not say.
        transformed: the parameters that are read have the transform of the values folded in
            (`models.fold`): every method runs on them. Else a method that needs it makes folded
            copies of the attention's weights when it is first used, and keeps them beside.
        tsa_layers: text-salient layers that `calibrate` found, for an `AKVQ` that names none; None
            for those of the kind of decoder.
        mesh: devices that run it together; None for one.
    """

    def __init__(
        self,
        config: ModelConfig,
        read_params: Callable[[], Params],
        processor: Processor,
        *,
        stop_ids: Sequence[int],
        name: str = "",
        backend: str | None = None,
        cache: CacheLike = None,
        transformed: bool = False,
        tsa_layers: Sequence[int] | None = None,
        mesh: DeviceMesh | None = None,
    ):
        self.config = config
        self._read_params = read_params
        self.processor = processor
        self.stop_ids = whole_numbers(stop_ids, "stop_ids")
        self.name = name
        self.backend = backend
        self.cache = as_method(cache)
        self.transformed = transformed
        self.tsa_layers = None if tsa_layers is None else whole_numbers(tsa_layers, "tsa_layers")
        self.mesh = mesh
        self.programs = Programs(mesh=mesh)

    @cached_property
    def params(self) -> Params:
        """The parameters, read at the first use."""
        return self._read_params()

    @cached_property
    def fingerprint(self) -> str:
        """What tells the model from others: a sum over its configuration and a part of each array,
        in hexadecimal digits.
        """
        digest = hashlib.blake2b(repr(self.config).encode(), digest_size=16)
        shapes = jax.tree.leaves(abstract_params(self.config))
        # On a mesh the arrays have other shapes, and the same numbers in front.
        for (path, array), own in zip(jax.tree.leaves_with_path(self.params), shapes, strict=True):
            digest.update(f"{jax.tree_util.keystr(path)} {own.shape} {array.dtype}".encode())
            part = np.asarray(array[(0,) * (array.ndim - 1)])[: own.shape[-1]]
            digest.update(part.view(np.uint8).data)
        return digest.hexdigest()

    @cached_property
    def folded(self) -> Params:
        """The parameters with the transform of the values folded in, made at the first use."""
        return self.params if self.transformed else fold_transform(self.params, self.mesh)

    def params_for(self, generate: Generate) -> Params:
        """The parameters that a way to generate runs on."""
        return self.folded if generate.cache.transforms else self.params

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

        Args:
            images: for one prompt: None, an image or a list of images; for a batch: a list with
                one such entry per prompt. `requests.images.ImageLike` has the forms of an image.
            text: the prompt, or a list of prompts. `<image>` marks say where the images go;
                without marks they come first.
            **options: see `Options`.

        Returns:
            An `Answer` for a single prompt, a list of them for a list.

        Raises:
            ValueError: bad images, videos or prompts, or more tokens than the model has positions
                for.
            FileNotFoundError: a file of an image or a video does not exist.
        """
        return self._answer(self.request(images, text, **options))

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
            FileNotFoundError: an image file does not exist, when the request's turn comes.
        """
        pending = iter(requests)

        def prepare() -> Request | None:
            for request in pending:
                return self.request(**request)
            return None

        with ThreadPoolExecutor(max_workers=1) as worker:
            ahead = worker.submit(prepare)
            while (request := ahead.result()) is not None:
                ahead = worker.submit(prepare)
                yield self._answer(request)

    def stream(self, images: Images = None, text: str = "", **options: Unpack[Options]) -> "Stream":
        """Answer one prompt piece by piece: the arguments of `generate`, a single prompt.

        Input is checked before this returns; the work is done while the stream is read.

        Returns:
            An iterator over pieces of text; its `answer` is there once it is exhausted.

        Raises:
            ValueError: as `generate`, or it is a list of prompts.
            FileNotFoundError: a file of an image or a video does not exist.
        """
        request = self.request(images, text, **options)
        if not request.single:
            raise ValueError("stream answers one prompt: use generate for a list of them")
        return self.start(request)

    def start(
        self,
        request: Request,
        prefix: Rows | None = None,
        done: Callable[[Answer], None] | None = None,
    ) -> "Stream":
        """`stream` of a request that was checked.

        Args:
            request: of one prompt.
            prefix: rows of it that were run before.
            done: called with the answer once the stream was read to its end.
        """
        return Stream(self, request, prefix, done)

    def session(self, images: Images = None, **options: Unpack[SessionOptions]) -> Session:
        """A conversation whose pictures are run once, for all questions.

        Args:
            images: None, an image or a list of images.
            **options: see `SessionOptions`.

        Raises:
            ValueError: as `generate`.
            FileNotFoundError: a file of an image or a video does not exist.
        """
        prefix = Prefix(self, images, **options)
        return Session(prefix, prefix.first)

    def open_session(self, path: str | Path) -> Session:
        """Go on with a session that was saved.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no session, or one of another model.
        """
        return Session(*open_saved(self, path))

    def _answer(self, request: Request) -> Answer | list[Answer]:
        """The answers to a request: its stream, read to the end."""
        progress = Progress(self, request)
        for _ in progress.pieces():
            pass
        answers = progress.answers()
        return answers[0] if request.single else answers

    def request(
        self,
        images: Images | Sequence[Images] = None,
        text: Any = "",
        *,
        messages: Any = None,
        videos: Videos | Sequence[Videos] = None,
        frames: int | None = None,
        context: Contexts = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        min_new_tokens: int = 0,
        ignore_eos: bool = False,
        raw_prompt: bool = False,
        cache: CacheLike = None,
        trace: bool = False,
        prefill_batch: int | None = None,
        prefill_chunk: int | None = None,
    ) -> Request:
        """Check the arguments of `generate`, and pad its inputs; nothing is run.

        Raises:
            ValueError: as `generate`.
            FileNotFoundError: a file of an image or a video does not exist.
        """
        if messages is not None:
            if text:
                raise ValueError("give text or messages, not both")
            text = messages
        stops = check_stop(stop)
        if prefill_chunk is not None:
            prefill_chunk = whole_number(prefill_chunk, "prefill_chunk", 1)
        generate = Generate(
            self.config,
            as_method(self.cache if cache is None else cache).for_model(
                self.config.text, self.tsa_layers
            ),
            max_new_tokens,
            Sampling(temperature, top_k, top_p),
            () if ignore_eos else self.stop_ids,
            backend=self.backend,
            trace=trace,
            min_new_tokens=min_new_tokens,
        )
        groups = self.processor.groups(
            images,
            text,
            prefill_batch,
            videos=videos,
            frames=frames,
            context=context,
            raw_prompt=raw_prompt,
        )
        if len(groups) > 1 and self.mesh is not None and self.mesh.data > 1:
            raise NotImplementedError(
                f"{prefill_batch=} with requests split over data={self.mesh.data}: leave "
                "prefill_batch out, or give a mesh with data=1"
            )
        longest = max(int(group.length.max()) for group in groups)
        limit = self.config.text.max_positions
        if longest + max_new_tokens - 1 > limit:
            raise ValueError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's "
                f"{limit} positions: at most {limit + 1 - longest} new tokens fit"
            )
        single = is_one(text)
        settings = generate.settings(1 if single else len(text), seed)
        return Request(single, generate, groups, settings, stops, prefill_chunk)
