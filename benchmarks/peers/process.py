"""A process that answers questions: one JSON object a line, in and out."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.documents import ROOT


class PeerError(RuntimeError):
    """A process could not answer; the message is the exception's text, or how it ended."""


def serve(start: Callable[..., Any]) -> None:
    """Answer the questions that come in until there are no more: what such a process runs.

    The first question is "start"; later ones are methods of what `start` returned.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    peer = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("ask")
        try:
            if name == "start":
                peer = start(**request)
                reply = {"value": peer.about()}
            else:
                reply = {"value": getattr(peer, name)(**request)}
        except Exception as error:  # whatever the frameworks and their compilers may raise
            reply = {"exception": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(reply), file=replies, flush=True)


class Process:
    """`python -m module` that runs `serve`; used in a `with` block, and killed behind it.

    Args:
        module: what to run.
        settings: environment variables, beside those of this process.
    """

    def __init__(self, module: str, settings: Mapping[str, str]):
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed in __exit__
        self._child = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # with its compilers, it is killed as one group
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._child.communicate()
        self._log.close()

    def ask(self, name: str, limit_s: float, **request: Any) -> Any:
        """Ask, and wait for the answer.

        Args:
            name: the question.
            limit_s: seconds after which the process is killed.
            **request: arguments, which can be written as JSON.

        Raises:
            PeerError: the answer is an exception, or the process ended, or was killed.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            print(json.dumps({"ask": name, **request}), file=self._child.stdin, flush=True)
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            raise PeerError(f"TimeoutError: killed, since {name} took more than {limit_s:g} s")
        if not line:
            raise PeerError(
                f"the process ended with code {self._child.wait()}: {self._last_words()}"
            )
        reply = json.loads(line)
        if "exception" in reply:
            raise PeerError(reply["exception"])
        return reply["value"]

    def _kill(self) -> None:
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-1500:].strip()
