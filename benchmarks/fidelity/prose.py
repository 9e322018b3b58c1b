"""Real texts with questions, for measuring methods on text decoders: `passages` gives prompts.

The texts are on the machine already: the topics of Python's own help, and the long descriptions of
the installed packages whose versions constraints.txt pins. None of them is in this repository, and
results name them by document, version and hash (`facts`).

Topics of the help repeat one another: `compound` holds all of `for`, `try` and `with`. One that a
longer topic mostly holds is left out, so that no text is in two documents, and thereby in both
splits. A topic that is then shorter than `ENOUGH` is joined with those that follow it in the
alphabet, no further than needed: alone, nearly all of these are too short for 2,000 tokens, and
the more of them are joined, the fewer documents there are to split, and the less they are about.
"""

import hashlib
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from packaging.requirements import Requirement

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"

ENOUGH = 10_000
"""Characters of a topic that is a document by itself: about 2,500 tokens."""

SPLITS = ("tune", "report")

KINDS: Mapping[str, tuple[str, ...]] = {
    "summarise": (
        "Summarise the text above in a few sentences.",
        "What are the main points of the text above?",
        "Write a short summary of this text for somebody who has not read it.",
    ),
    "about": (
        "What is the text above about?",
        "Who is this text written for, and what does it tell them?",
        "Give the text above a title, and explain it in one sentence.",
    ),
    "how": (
        "How do I use {word}?",
        "When do I need {word}, and how does it work?",
        "According to the text above, what do I have to know about {word}?",
    ),
    "quote": (
        'Quote the sentence that mentions "{word}".',
        'Where does the text say something about "{word}"? Repeat that sentence word for word.',
        'Copy the first line of the text that contains "{word}".',
    ),
    "continue": (
        "Continue the text above from where it stops.",
        "The text above breaks off. Write what comes next.",
        "Write the next paragraph of this text, in the same style.",
    ),
}
"""Wordings of each kind of question; `{word}` stands for a word of the text (see `passages`)."""

_ADDRESS = re.compile(r"\w+://[^\s)>\]\"'`]+")
_WORD = re.compile(r"(?<![\w@/.:-])[^\W\d]\w{2,}(?![\w@/-])")
_IDENTIFIER = re.compile(r"^__\w+__$|[^\W_]_[^\W_]|[a-z][A-Z]|[A-Za-z]{2}\d")


@dataclass(frozen=True)
class Document:
    r"""A text of this machine.

    Attributes:
        name: "python:<topic>", "python:<first topic>..<last topic>" or "package:<name>".
        version: of the interpreter or the package.
        sha256: of the text in UTF-8, in hexadecimal digits.
        text: as it was found, with "\n" at the ends of lines.
    """

    name: str
    version: str
    sha256: str
    text: str


@dataclass(frozen=True)
class Passage:
    """A piece of a document with a question, which is to stand behind it.

    Attributes:
        document: its name.
        version: the document's.
        sha256: of the piece's text in UTF-8, in hexadecimal digits.
        start: where the piece begins in the document, in characters.
        tokens: of the piece, where its document is tokenised in one; see `passages`.
        kind: of the question, one of `KINDS`.
        question: the words of it.
        context: the piece's text.
    """

    document: str
    version: str
    sha256: str
    start: int
    tokens: int
    kind: str
    question: str
    context: str


def documents() -> list[Document]:
    """All texts that there are, by name. Packages that are not at their pin's version are left out.

    Source: `pydoc_data.topics` of the standard library, and the descriptions in the metadata of the
    installed packages that constraints.txt names.
    """
    python = platform.python_version()
    found = [_document(f"python:{name}", python, text) for name, text in _topics().items()]
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if not (pin := line.partition("#")[0].strip()):
            continue
        package = Requirement(pin)
        if package.marker is not None and not package.marker.evaluate():
            continue
        try:
            distribution = metadata.distribution(package.name)
        except metadata.PackageNotFoundError:
            continue
        version, described = distribution.version, distribution.metadata
        if "Description" in described and package.specifier.contains(version, prereleases=True):
            found.append(_document(f"package:{package.name}", version, described["Description"]))
    return sorted(found, key=lambda document: document.name)


def split_of(name: str) -> str:
    """The split of a document, "tune" for about a third of all names and "report" for the rest."""
    return "report" if int(_sha256(name), 16) % 3 else "tune"


def passages(tokenizer: Any, tokens: int, n: int, split: str = "report") -> list[Passage]:
    """The first `n` prompts of a split, the same ones every time.

    A document is tokenised in one and cut after every `tokens` of its tokens; what is left at its
    end is not used. Tokenised alone, a piece may have a token or two more or less, where it was cut
    within a word or a character. First come the first pieces of all documents, in an order that is
    mixed by hashes of their names, then the second ones and so on, each with the next kind of
    question. When there are no more pieces, all come again, each with the kind behind its last one.

    A question that needs a word asks for the identifier that is most frequent in the middle half of
    its piece, or for the longest word there; a piece without a word is left out.

    Args:
        tokenizer: a fast tokenizer of transformers, which gives offsets.
        tokens: of every piece.
        n: prompts that are wanted.
        split: "tune" or "report"; see `split_of`.

    Raises:
        ValueError: the split is not known, or it has fewer than `n` prompts of that length.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if tokens < 1 or n < 1:
        raise ValueError(f"tokens and n must be at least 1, got {tokens} and {n}")
    own = [document for document in documents() if split_of(document.name) == split]
    own.sort(key=lambda document: _sha256(document.name))
    columns = [list(_pieces(tokenizer, document, tokens)) for document in own]
    pieces = [piece for row in zip_longest(*columns) for piece in row if piece is not None]
    if n > (most := len(pieces) * len(KINDS)):
        raise ValueError(
            f"n must be at most {most} for {tokens} tokens and the {split} split, which has "
            f"{len(pieces)} pieces for {len(KINDS)} kinds of question, got {n}"
        )
    kinds = list(KINDS)
    found = []
    for index in range(n):
        again, place = divmod(index, len(pieces))
        document, start, context, word = pieces[place]
        turn, kind = divmod(place + again, len(kinds))
        wordings = KINDS[kinds[kind]]
        question = wordings[turn % len(wordings)].format(word=word)
        found.append(
            Passage(
                document.name, document.version, _sha256(context), start, tokens, kinds[kind],
                question, context,
            )
        )  # fmt: skip
    return found


def facts(passages: list[Passage]) -> list[dict[str, Any]]:
    """What a result file says of each passage: all but its text."""
    names = ("document", "version", "sha256", "start", "tokens", "kind", "question")
    return [{name: getattr(passage, name) for name in names} for passage in passages]


def _topics() -> dict[str, str]:
    """The texts of Python's help: each once, the short ones joined."""
    seen, once = set(), {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [" ".join(words.split()) for words in re.split(r"\n\s*\n", topics[name])]
        repeated = sum(len(words) for words in paragraphs if words in seen)
        if repeated < sum(map(len, paragraphs)) / 2:
            seen.update(paragraphs)
            once[name] = topics[name]
    found = {name: text for name, text in once.items() if len(text) >= ENOUGH}
    joined: list[str] = []
    short = sorted(once.keys() - found.keys())
    for name in short:
        joined.append(name)
        text = "\n\n".join(once[each] for each in joined)
        if len(text) >= ENOUGH or name == short[-1]:
            found[name if joined == [name] else f"{joined[0]}..{name}"] = text
            joined.clear()
    return found


def _document(name: str, version: str, text: str) -> Document:
    return Document(name, version, _sha256(text), text)


def _pieces(
    tokenizer: Any, document: Document, tokens: int
) -> Iterator[tuple[Document, int, str, str]]:
    """The pieces of a document in order: where each begins, its text, and the word to ask for."""
    text = document.text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    first = 0
    while first + tokens <= len(offsets):
        start, end = offsets[first][0], offsets[first + tokens - 1][1]
        first += tokens
        # A character may be several tokens, which all have its offsets: it is the first piece's.
        while first < len(offsets) and offsets[first][0] < end:
            first += 1
        if word := _word(text[start:end]):
            yield document, start, text[start:end], word


def _word(text: str) -> str | None:
    # Addresses are blanked, so that what is left stays where it is.
    text = _ADDRESS.sub(lambda match: " " * len(match.group()), text)
    found, quarter = list(_WORD.finditer(text)), len(text) / 4
    middle = [match for match in found if quarter <= match.start() < 3 * quarter] or found
    counts = Counter(match.group() for match in middle)
    identifiers = [word for word in counts if _IDENTIFIER.search(word)]
    if identifiers:
        return max(identifiers, key=counts.__getitem__)
    return max(counts, key=len, default=None)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
