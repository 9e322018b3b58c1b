"""The models and the pictures in this package, for a first run without a model hub.

`demo` is a LLaVA-NeXT that reads pages of some 2,900 visual tokens. The package has what was
learned for it; its decoder is a published one, of a package of its own (docs/demo.md). `demo-small`
is whole in this package, and small. Twelve pictures come with each, a question to each and its
right answer, of seeds that it was not trained on; `python -m benchmarks.make_demo` makes both.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PAGES, _SMALL = (Path(__file__).parent / name / "checkpoint" for name in ("pages", "small"))

MODELS = {"demo": _PAGES, "demo-small": _SMALL}
"""Names of the models, with a directory each; their pictures stand beside it."""

INDEX = "index.json"
"""In the folder of the pictures: what each of them is."""


@dataclass(frozen=True)
class Picture:
    """A picture, a question about it, and the right answer.

    Attributes:
        name: what the command line calls it: "demo:1".
        task: the kind of question: look up, document, ...
        file: the picture.
        prompt: the question.
        answer: what is to be answered.
    """

    name: str
    task: str
    file: Path
    prompt: str
    answer: str


def pictures(model: str = "demo") -> tuple[Picture, ...]:
    """All pictures that come with a model of `MODELS`, in their order."""
    return _read(model, MODELS[model].with_name("pictures"))


@cache
def _read(model: str, folder: Path) -> tuple[Picture, ...]:
    entries = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return tuple(
        Picture(
            name=f"{model}:{number}",
            task=entry["task"],
            file=folder / entry["file"],
            prompt=entry["prompt"],
            answer=entry["answer"],
        )
        for number, entry in enumerate(entries, 1)
    )


def find(name: str) -> Picture | None:
    """The picture that is called "demo" (the first), "demo:2", "demo-small:3", ...; None for any
    other name.

    A file of that name in the working directory has precedence.

    Raises:
        ValueError: there are not so many pictures.
    """
    model, colon, _ = name.partition(":")
    if model not in MODELS or Path(name).exists():
        return None
    known = {picture.name: picture for picture in pictures(model)}
    first, *_, last = known
    wanted = name if colon else first
    if wanted not in known:
        raise ValueError(
            f"there is no picture {name}: choose one of {first} to {last}, which "
            f"`vlcache info {model}` lists"
        )
    return known[wanted]
