"""A conversation in the terminal, and what its commands do to it; no terminal is needed.

    line ─► Chat.handle ─┬► a question ─► Session.stream ─► stdout
                         └► a command  ─► the session, the method, a file

Answers go to stdout, all else to stderr.
"""

import os
import sys
import time
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlcache_jax.cache.methods import METHODS, FullCache
from vlcache_jax.cli.terminal import (
    BAD_INPUT,
    ERRORS,
    READING,
    cache_methods,
    find_images,
    note,
    show_error,
)
from vlcache_jax.errors import short

if TYPE_CHECKING:
    from vlcache_jax.cache.method import CacheMethod
    from vlcache_jax.results.answer import Answer
    from vlcache_jax.vlm import VLM, Session

COMMANDS = {
    "image": ("FILE", "begin anew, with this picture behind those that are there"),
    "budget": ("SHARE", "keep 0.2 of the cache, or 256tok for each layer; alone: what is kept now"),
    "method": ("NAME", f"choose by {', '.join(METHODS)}; alone: what is kept now"),
    "full": ("", "the last question again with the full cache, differences marked"),
    "save": (
        "FILE",
        "write the conversation to a file, for --session; --force behind it overwrites",
    ),
    "help": ("", "this list"),
    "quit": ("", "end, as Ctrl-D does; Ctrl-C stops an answer"),
}
"""What each command takes, and what it does."""


class Chat:
    """A conversation, and what its commands do to it.

    What is refused changes nothing.

    Args:
        vlm: the model.
        session: the conversation so far.
        setting: method, budget and bits, as the command line calls them.
        asked: other options of each question, see `AskOptions`.
        images: the pictures; None where a new session cannot be made of them.
        shown: what else a new session is made of, see `SessionOptions`.

    Attributes:
        stopped: set to stop the answer that is being made; a new line begins with False.
    """

    def __init__(
        self,
        vlm: "VLM",
        session: "Session",
        setting: tuple[str, str | None, str | None],
        asked: dict[str, Any],
        images: list[Path] | None = None,
        shown: dict[str, Any] | None = None,
    ):
        self._vlm, self._session, self._asked = vlm, session, asked
        self._images, self._shown = images, shown or {}
        self._method, self._budget, self._bits = setting
        [self._cache] = cache_methods([self._method], [self._budget], [self._bits])
        self._last: tuple[Session, str, Answer] | None = None
        self.stopped = False

    def handle(self, line: str) -> bool:
        """Answer a question, or do what a line that begins with "/" commands.

        Returns:
            Whether the conversation goes on.
        """
        from jax.errors import JaxRuntimeError  # most of all, that memory is short

        self.stopped, commands = False, line.startswith("/")
        try:
            if commands:
                return self._command(line)
            if question := line.strip():
                self._ask(question)
        except BrokenPipeError:
            raise  # nobody reads what is answered
        except (*BAD_INPUT, JaxRuntimeError) as error:
            show_error(error)
            if not commands:
                note("the question is not part of the conversation")
        return True

    def _command(self, line: str) -> bool:
        command, *behind = line.split(None, 1)
        name, given = command[1:], "".join(behind).strip()
        if name not in COMMANDS:
            raise ValueError(
                f"there is no command {short(command)}: /help lists them; a question may begin so "
                "behind a space"
            )
        if given and not COMMANDS[name][0]:
            raise ValueError(f"/{name} takes nothing behind it: leave {short(given)} out")
        if name != "quit":
            getattr(self, f"_do_{name}")(given)
        return name != "quit"

    def _ask(self, question: str) -> None:
        """Put the next question."""
        before = self._session.fork()
        answer = self._answer(self._session, question, self._cache)
        if answer is None:
            note("stopped: neither question nor answer is part of the conversation")
        else:
            self._last = before, question, answer

    def _answer(
        self, session: "Session", question: str, cache: "CacheMethod", *, echo: bool = True
    ) -> "Answer | None":
        """Put a question to a session, and show what the answer took; None where it is stopped."""
        from vlcache_jax.results import display

        programs, began = self._vlm.programs, time.perf_counter()
        held, report, compiled = session.bytes, session.report(), programs.compile_s
        with ERRORS.status(READING):
            stream = session.stream(question, cache=cache, **self._asked)
            # By now the prefix is run for a method that is new to it; no stream counts that.
            begin_s = time.perf_counter() - began - (programs.compile_s - compiled)
            anew = session.report().prefilled_anew > report.prefilled_anew
            known = session.bytes == held and not anew
            if self.stopped:
                return None
            first = [*islice(stream, 1)]
        try:
            for piece in chain(first, stream):
                if echo:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                if self.stopped:
                    return None
        finally:
            if echo:
                sys.stdout.write("\n")
        facts = display.answer_facts(stream.answer)
        facts["timings"]["prefill_s"] += begin_s
        facts["timings"]["compile_s"] = programs.compile_s - compiled
        note(display.answer_line(facts, report.prefix_tokens if known else 0))
        return stream.answer

    def _do_image(self, given: str) -> None:
        if self._images is None:
            raise ValueError(
                "a saved conversation has no files of its pictures: start again with --image for "
                "each picture"
            )
        images = [*self._images, *find_images([_file(given, "image")])]
        with ERRORS.status(READING):
            self._session = self._vlm.session(images, cache=self._cache, **self._shown)
        self._images, self._last = images, None
        note(f"a new conversation about {', '.join(image.name for image in images)}")

    def _do_budget(self, given: str) -> None:
        if given:
            [self._cache] = cache_methods([self._method], [given], [self._bits])
            self._budget = given
        self._note_setting()

    def _do_method(self, given: str) -> None:
        if given:
            # The full cache has no budget; a method behind it has the one of before.
            budget = None if given == FullCache.name else self._budget
            [self._cache] = cache_methods([given], [budget], [self._bits])
            self._method = given
        self._note_setting()

    def _note_setting(self) -> None:
        note(f"{self._cache.label}, budget {self._cache.budget}")

    def _do_full(self, _: str) -> None:
        from vlcache_jax.results import display

        if self._last is None:
            raise ValueError("nothing was asked yet: ask a question, then /full")
        before, question, own = self._last
        full = self._answer(before.fork(), question, FullCache(), echo=False)
        if full is None:
            note("stopped: there is nothing to compare with")
            return
        words = partial(self._vlm.processor.detokenizer, self._asked.get("stop", ()))
        Console().print(display.differences(own, full, lambda tokens: words().split(tokens)))

    def _do_save(self, given: str) -> None:
        name, _, last = given.rpartition(" ")
        force = last == "--force"
        file = _file(name if force else given, "save")
        self._session.save(file, force=force)
        note(f"written to {file}")

    def _do_help(self, _: str) -> None:
        for name, (takes, what) in COMMANDS.items():
            note(f"/{f'{name} {takes}':<14}{what}")


def _file(given: str, command: str) -> str:
    """The file that a command names, without the quotes that a shell would have taken."""
    if len(given) > 1 and given[0] == given[-1] and given[0] in "'\"":
        given = given[1:-1]
    if not given:
        raise ValueError(f"/{command} needs a file: /{command} FILE")
    return os.path.expanduser(given)
