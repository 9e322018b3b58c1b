"""Many questions about one picture: what stands in front of them is run once, and kept whole.

    prefix   system, context, pictures     run once: keys and values of all its rows
    ask      question ─► its rows, behind the prefix ─► scored over everything ─► a pool of its own

A method chooses for one question what to keep: here every question has a choice of its own. What
was answered before is text in front of the next question and is run again with it, so that a
conversation depends on its words alone, not on the methods that answered.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from vlcache_jax.cache.methods import CacheLike
from vlcache_jax.requests.videos import Videos
from vlcache_jax.results.answer import Answer
from vlcache_jax.sessions.prefix import Prefix, SessionReport, user
from vlcache_jax.sessions.saved import save

if TYPE_CHECKING:
    from vlcache_jax.streaming import Stream


class SessionOptions(TypedDict, total=False):
    """Options of `VLM.session`; all may be left out.

    Attributes:
        videos: a video or a list of videos.
        frames: how many frames of each video the model is shown.
        context: a text that all questions are about.
        system: a message of the system in front of everything.
        cache: what questions are asked with where they do not say; what it remembers of the prefix
            is made with it. By default what the model was loaded with.
        store: where the prefix's keys and values lie between questions: "device", "host", or "8"
            and "4" for so many bits a value on the device (`running.stores`).
        prefill_chunk: rows of the prefix that are run at a time.
    """

    videos: Videos
    frames: int | None
    context: str | None
    system: str | None
    cache: CacheLike
    store: str
    prefill_chunk: int


class AskOptions(TypedDict, total=False):
    """Options of `Session.ask` and `Session.stream`; what they mean is told by `VLM.generate`'s
    (`vlm.Options`), which has them too.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    stop: str | Sequence[str]
    cache: CacheLike
    trace: bool
    prefill_chunk: int | None


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
        asked = {"cache": prefix.cache, **prefix.subject, **options}
        request = prefix.vlm.request(messages=messages, **asked)

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

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the session to a file, for `VLM.open_session`.

        Args:
            path: its place, ending in .safetensors.
            force: whether a file that is there is overwritten.

        Raises:
            ValueError: the name does not end so.
            FileExistsError: there is a file and `force` is not set.
            OSError: it cannot be written.
            NotImplementedError: the session is about a video.
        """
        save(self._prefix, self.messages, path, force=force)
