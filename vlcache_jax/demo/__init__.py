"""The model and the pictures in this package, for a first run without a download.

Both are made by `python -m benchmarks.make_demo`: a small LLaVA-NeXT, and twelve pictures with a
question to each and its right answer, of seeds that the model was not trained on.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""A Hugging Face model directory."""

INDEX = Path(__file__).parent / "pictures" / "index.json"
"""What each of the pictures beside it is."""


@dataclass(frozen=True)
class Picture:
    """A picture, a question about it, and the right answer.

    Attributes:
        name: what the command line calls it: "demo:1".
        task: the kind of question: document, reading, reasoning or caption.
        file: the picture.
        prompt: the question.
        answer: what is to be answered.
    """

    name: str
    task: str
    file: Path
    prompt: str
    answer: str


@cache
def pictures() -> tuple[Picture, ...]:
    """All pictures of the package, in their order."""
    entries = json.loads(INDEX.read_text(encoding="utf-8"))
    return tuple(
        Picture(
            name=f"demo:{number}",
            task=entry["task"],
            file=INDEX.parent / entry["file"],
            prompt=entry["prompt"],
            answer=entry["answer"],
        )
        for number, entry in enumerate(entries, 1)
    )


def find(name: str) -> Picture | None:
    """The picture that is called "demo" (the first), "demo:2", ...; None for any other name.

    A file of that name in the working directory has precedence.

    Raises:
        ValueError: there are not so many pictures.
    """
    if not re.fullmatch("demo(:.*)?", name) or Path(name).exists():
        return None
    known = {picture.name: picture for picture in pictures()}
    first, *_, last = known
    wanted = first if name == "demo" else name
    if wanted not in known:
        raise ValueError(
            f"there is no picture {name}: choose one of {first} to {last}, which "
            "`vlcache info demo` lists"
        )
    return known[wanted]
