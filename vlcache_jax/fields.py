"""Fields of the JSON files of a model directory, read by the kind of value that each must have.

A field that is null counts as left out: both take the default. Anything else that is not of the
wanted kind is refused in one line that names the file and the field.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlcache_jax.errors import reason, short

REQUIRED = object()
"""The default of a field that has none."""

LARGEST = 2**31 - 1
"""The largest int32, in which positions and token ids are held."""


REMOTE_CODE = (
    "asks for remote code (auto_map), which is never run: use a checkpoint of the plain "
    "architecture"
)
"""What is said of a file that is refused for it."""


class Kind(NamedTuple):
    """What a field may hold.

    Attributes:
        what: the same in words, for "must be ...".
        accepts: whether a value, never null, is of the kind.
        convert: makes of such a value what is returned.
        error: what is raised for any other value.
    """

    what: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    error: type[Exception] = ValueError


def whole(low: int, high: int) -> Kind:
    """Whole numbers from `low` to `high`, without 2.0 and true."""
    return Kind(
        f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high
    )


def one_of(*known: Any) -> Kind:
    """The values that are implemented; others raise NotImplementedError."""
    return Kind(
        f"{' or '.join(map(json.dumps, known))} (others are not supported)",
        lambda x: any(x == k and isinstance(x, bool) == isinstance(k, bool) for k in known),
        error=NotImplementedError,
    )


def token_ids(vocab_size: int) -> Kind:
    """One id below the size of the vocabulary, or a list of them; a tuple comes of it."""
    one = whole(0, vocab_size - 1)
    return Kind(
        f"a token id of the vocabulary, {one.what}, or a list of such",
        lambda x: all(map(one.accepts, x)) if isinstance(x, list) else one.accepts(x),
        lambda x: tuple(x) if isinstance(x, list) else (x,),
    )


SECTION = Kind("an object", lambda x: isinstance(x, Mapping))
TEXT = Kind("a string", lambda x: isinstance(x, str))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
SIZE = whole(1, 2**20)
COUNT = whole(1, LARGEST)
ID = whole(0, LARGEST)
# Bounds whose products and quotients stay within float32.
NUMBER = Kind(
    "a number from 1e-15 to 1e15",
    lambda x: type(x) in (int, float) and 1e-15 <= x <= 1e15,
    float,
)
PAIRS = Kind(
    "a list of [height, width], two positive whole numbers each",
    lambda x: isinstance(x, (list, tuple)) and x != [] and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(SIZE.accepts, pair))
        for pair in x
    ),
    lambda x: tuple(map(tuple, x)),
)  # fmt: skip


def read_field(
    data: Mapping[str, Any],
    name: str,
    kind: Kind,
    default: Any = REQUIRED,
    *,
    file: str | Path = "config.json",
) -> Any:
    """A field of a JSON object.

    Args:
        data: the whole object, as it is in the file.
        name: the field; dots lead into the objects inside: "text_config.hidden_size".
        kind: what it may hold.
        default: what is returned, as it is, where the field is missing or null; it must be there
            unless a default is given.
        file: where the object comes from, for the error.

    Raises:
        ValueError: the field holds something else, or is missing and has no default.
        NotImplementedError: the same, of a kind whose `error` it is.
    """
    section, _, key = name.rpartition(".")
    holder = read_field(data, section, SECTION, {}, file=file) if section else data
    return read_value(holder.get(key), name, kind, default, file=file)


def read_value(
    value: Any, name: str, kind: Kind, default: Any = REQUIRED, *, file: str | Path
) -> Any:
    """The value of a field that was found already, None for none; see `read_field`."""
    if value is None and default is not REQUIRED:
        return default
    if value is None or not kind.accepts(value):
        found = f"{name}, which is missing," if value is None else f"{name}={shown(value)}"
        raise kind.error(f"{short(file)}: {found} must be {kind.what}")
    return kind.convert(value)


def shown(value: Any) -> str:
    """A value of a JSON file for an error message, on one line and not at its full length."""
    return repr(short(value)) if isinstance(value, str) else short(value)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # too deep a nesting
        raise ValueError(
            f"{short(path)} is not valid JSON ({reason(error)}): download it again"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{short(path)} must hold a JSON object, not {type(data).__name__}")
    return data


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def local_path(value: Any) -> Path:
    """A path, the user's home for a `~`, that the system can look for.

    Raises:
        ValueError: the value is no path, or one that the system cannot look for.
    """
    try:
        path = Path(value).expanduser()
        path.exists()
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{shown(value)} is no path ({reason(error)}): give a model's directory or a hub id"
        ) from None
    return path
