"""Tokens to text, piece by piece, while they are drawn.

What a token adds to a text depends on its neighbours: a character may be spread over several
tokens, and decoders strip the space in front of the first one. So tokens are decoded behind the
last settled ones, a few at a time, and text is given out as soon as nothing can change it.

Tokens of single bytes (`<0xE2>`) are the hard case: for one that belongs to no character, their
decoder gives up a whole run of them, those already given out too. Here it costs only itself.
"""

from collections.abc import Callable, Iterable, Sequence
from os.path import commonprefix

BROKEN = "\ufffd"  # decoders write it for bytes that are no character, or not one yet
MOST_BYTES = 4  # of a character in UTF-8; a token is one byte or more
WINDOW = 12  # tokens decoded together where none of the borders between them is one of text


class Detokenizer:
    """The text of one answer, in pieces that are never taken back.

    However the tokens are cut into pushes, the joined pieces are what `decode` makes of all of them
    at once, up to the runs of bytes that the module tells of.

    Args:
        decode: token ids to text, special tokens left out or not.
        stop: a string that ends the text, or several. The text ends in front of the one that is
            complete first; of two that are so at once, in front of the longer.
        least: tokens that the text has at least: before these no stop string is looked for.
        lookahead: last characters of a text that `decode` may change once more follows; 0 unless
            it cleans the text up.

    Attributes:
        stopped: a stop string has appeared; nothing that follows has any effect.
        count: tokens pushed so far, up to and including the one that completed a stop string.

    Raises:
        ValueError: a stop string is empty, or is no string.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: str | Sequence[str] = (),
        *,
        least: int = 0,
        lookahead: int = 0,
    ):
        self.stopped = False
        self.count = 0
        self._decode = decode
        self._stop, self._least = check_stop(stop), least
        self._lookahead = lookahead
        self._context: list[int] = []  # settled tokens that the next ones are decoded behind
        self._before = ""  # their text
        self._pending: list[int] = []  # the tokens since, whose text may still change
        self._text = ""  # theirs
        self._shown = 0  # characters of it that were given out
        self._tail = ""  # settled text that may be the beginning of a stop string

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is settled now, and was not before.

        Args:
            tokens: the next ids of the answer, any number of them.
        """
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.count += 1
            pieces.append(self._until_stop(self._settle(int(token))))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, once no token follows: what was held back."""
        return "" if self.stopped else self._until_stop(self._text[self._shown :]) + self._tail

    def split(self, tokens: Iterable[int]) -> list[str]:
        """The text that each token of a whole answer adds; joined, they are the text.

        A token that does not complete a character adds "", and the one that does adds all of it.
        """
        pieces = [self.push([token]) for token in tokens]
        return [*pieces[:-1], pieces[-1] + self.finish()] if pieces else []

    def _settle(self, token: int) -> str:
        """Take one token, and give the text that it settles."""
        pending = [*self._pending, token]
        text = self._behind(pending)
        if text == self._text and not self._decode([token, token]):
            return ""  # a token that is left out wherever it stands
        piece, held = "", self._held(pending, text)
        if text.endswith(BROKEN) and len(text) < len(self._text):
            held = 0  # one mark, and before it one for each byte: they are the character U+FFFD
        elif text.endswith(BROKEN):
            for start in range(max(1, len(pending) - MOST_BYTES), len(pending)):
                last = pending[start:]
                if not self._decode(last).endswith(BROKEN) and self._behind(last):
                    # Characters, but for what is in front of them in their run.
                    piece = self._behind(pending[:start])[self._shown :]
                    pending, text, self._shown = last, self._behind(last), 0
                    held = self._held(pending, text)
                    break
        piece += text[self._shown : len(text) - held]
        if held:
            self._pending, self._text = pending, text
            self._shown = max(self._shown, len(text) - held)
            self._shorten()
            return piece
        own = self._decode(pending)
        if not own:  # a space, which the decoder strips at the beginning
            pending = [*self._context, *pending][-WINDOW:]
            own = self._decode(pending)
        if not self._context or not own.endswith(BROKEN):
            self._context, self._before = pending, own
        self._pending, self._text, self._shown = [], "", 0
        return piece

    def _behind(self, tokens: list[int]) -> str:
        """The text of tokens that follow the context."""
        text = self._decode(self._context + tokens)
        if text.startswith(self._before):
            return text[len(self._before) :]
        return self._decode(tokens)  # bytes that are no character spoil the context's

    def _held(self, pending: list[int], text: str) -> int:
        """How many characters at the end of the pending tokens' text may still change."""
        broken = len(text) - len(text.rstrip(BROKEN))
        if broken and len(pending) >= MOST_BYTES:
            settled = len(self._behind(pending[: 1 - MOST_BYTES]))
            broken = min(broken, max(0, len(text) - settled))
        return max(broken, min(len(text), self._lookahead))

    def _shorten(self) -> None:
        """Forget pending tokens that cannot change any more, so that they stay few."""
        told = self._shown and len(self._pending) > MOST_BYTES
        if told and BROKEN + self._behind(self._pending[1:]) == self._text:
            # The first is a byte that fits nowhere.
            self._pending, self._text = self._pending[1:], self._text[1:]
            self._shown -= 1
        if len(self._pending) > WINDOW:
            window, rest = self._pending[-WINDOW:], len(self._text) - self._shown
            self._context, self._pending = window[: -WINDOW // 2], window[-WINDOW // 2 :]
            whole = self._decode(window)
            settled = len(whole) - rest
            both = [self._decode(self._context), whole[:settled]]
            self._before = commonprefix(both)  # noqa: RUF071  (of texts)
            self._text, self._shown = whole[len(self._before) :], settled - len(self._before)

    def _until_stop(self, settled: str) -> str:
        """What may be given out of settled text: nothing that is, or may become, a stop string."""
        text = self._tail + settled
        if self.count < self._least:
            return text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._tail = True, ""
            return text[: min(found)[1]]
        keep = max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._tail = text[len(text) - keep :]
        return text[: len(text) - keep]


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings, one or several, as a tuple.

    Raises:
        ValueError: one of them is empty, or is no string.
    """
    strings = [stop] if isinstance(stop, str) else stop
    listed = isinstance(strings, list | tuple)
    if not listed or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"{stop=!r:.60} must be a string or a list of strings, none of them empty")
    return tuple(strings)
