"""Reading checkpoints: a Hugging Face directory of safetensors, or one that `convert` has made.

Both kinds are read piece by piece (vision, projector, embed, layer_000..., head), and inside a
piece array by array, so that the host holds little beside the parameters themselves. Everything
that can be checked without reading the weights is checked when a checkpoint is opened.
"""

import json
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import orbax.checkpoint as ocp
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from vlcache_jax import demo
from vlcache_jax.config import LlavaConfig
from vlcache_jax.models.fold import fold_layer
from vlcache_jax.models.llava import Params, abstract_params
from vlcache_jax.weights import (
    DTYPES,
    EMBEDDING,
    FLOAT_KINDS,
    LM_HEAD,
    Shape,
    cast,
    hub_name,
    join,
    match,
    parameter_name,
    parameter_shapes,
    parse_dtype,
    piece_of,
    refuse,
)

MANIFEST = "MANIFEST.json"
"""File that a finished conversion has and an interrupted one lacks."""

FORMAT = 1
"""Version of the converted layout; raised when an older reader would misread it."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG_PATTERNS = ("*.json", "tokenizer.model", "*.jinja")
"""Files of a model directory beside its weights: configuration, tokenizer and processor."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")

Progress = Callable[[str, int, int], None]
"""Called after each parameter with its piece, the bytes done and the bytes in all."""


def resolve(model: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model: a local one, or a download of a Hugging Face hub id.

    "demo" is the checkpoint in this package, where there is no directory of that name.

    Only weights in safetensors, configuration and tokenizer files are fetched; nothing that is
    fetched is ever run.

    Args:
        model: a directory, or `owner/name` where no such directory exists.
        weights: whether a download includes the weights.

    Raises:
        ValueError: it is a file.
        FileNotFoundError: there is no such directory, nor such a model on the hub.
        ConnectionError: the hub cannot be reached and the model is not in the local cache.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file: give the model's directory")
    name = str(model)
    if name == "demo":
        return demo.CHECKPOINT
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"no directory {name}: give a model's directory or a hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    patterns = [*CONFIG_PATTERNS, "*.safetensors"] if weights else [*CONFIG_PATTERNS]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no directory {name}, and no model of that name on the Hugging Face hub: check the "
            "spelling, or log in with `hf auth login` if the model is private or gated"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"no directory {name}, and the Hugging Face hub cannot be reached "
            f"({_first_line(error)}): go online, or download the model elsewhere and give its "
            "directory"
        ) from None


@dataclass(frozen=True)
class Checkpoint(ABC):
    """An opened checkpoint: everything is known and checked, no weight has been read.

    Attributes:
        path: its directory.
        config: the model.
        dtype: number type of all weights; None where they differ.
        shapes: name and shape of every parameter, in the order of the pieces.
    """

    path: Path
    config: LlavaConfig
    dtype: np.dtype | None
    shapes: Mapping[str, Shape]

    @property
    def pieces(self) -> dict[str, list[str]]:
        """Names of the parameters of each piece, in the order in which they are read."""
        pieces: dict[str, list[str]] = {}
        for name in self.shapes:
            pieces.setdefault(piece_of(name)[0], []).append(name)
        return pieces

    def target_dtype(self, dtype: Any = None) -> np.dtype:
        """The number type that was asked for, or the checkpoint's own.

        Raises:
            ValueError: the type is not supported, or none was asked for and the weights differ.
        """
        if dtype is not None:
            return parse_dtype(dtype)
        if self.dtype is None:
            raise ValueError(
                f"the weights in {self.path} have different number types: choose one, "
                f"dtype={' or '.join(DTYPES)}"
            )
        return self.dtype

    def num_bytes(self, dtype: np.dtype) -> int:
        """Size of all parameters in a number type."""
        return dtype.itemsize * sum(int(np.prod(shape)) for shape in self.shapes.values())

    @abstractmethod
    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each parameter of a piece.

        Raises:
            ValueError: the file is damaged, or a value does not fit the number type.
        """


@dataclass(frozen=True)
class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face checkpoint.

    Attributes:
        sources: for each parameter the names of its tensors.
        files: for each tensor the open file that holds it.
    """

    sources: Mapping[str, tuple[str, ...]]
    files: Mapping[str, Any]

    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """See `Checkpoint.read`."""
        if piece == "embed":
            self._check_tied()
        for name in self.pieces[piece]:
            tensors = (self.files[key].get_tensor(key) for key in self.sources[name])
            yield name, join(name, self.shapes[name], dtype, tensors)

    def _check_tied(self) -> None:
        """An output projection that is stored although it is tied must be the embedding."""
        keys = {hub_name(key): key for key in self.files}
        if not self.config.text.tie_embeddings or LM_HEAD not in keys:
            return
        head, embedding = (
            self.files[keys[key]].get_tensor(keys[key]) for key in (LM_HEAD, EMBEDDING)
        )
        if not np.array_equal(head, embedding):
            raise ValueError(
                f"config.json ties the output projection to the embedding, but {keys[LM_HEAD]} "
                "differs from it: set tie_word_embeddings to false"
            )


@dataclass(frozen=True)
class ConvertedCheckpoint(Checkpoint):
    """A checkpoint that `convert` has made: one Orbax checkpoint per piece."""

    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """See `Checkpoint.read`."""
        names = self.pieces[piece]
        # A numpy leaf makes Orbax restore to numpy; the pages of these are never touched.
        like = {piece_of(name)[1]: np.empty(self.shapes[name], self.dtype) for name in names}
        directory = piece_directory(self.path, piece)
        try:
            with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore(directory, like)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{directory} is damaged ({_first_line(error)}): convert the model again"
            ) from None
        del like
        for name in names:
            yield name, cast(arrays.pop(piece_of(name)[1]), dtype, name)


def open_checkpoint(path: str | Path, config: LlavaConfig | None = None) -> Checkpoint:
    """Open a model directory of either kind and check all that can be checked without reading it.

    Args:
        path: the directory.
        config: the model; read from the directory's config.json by default.

    Raises:
        FileNotFoundError: there are no weights, or files of them are missing.
        ValueError: the weights do not fit the configuration, a file is damaged, the weights are
            pickles, or the conversion that made the directory was interrupted.
        NotImplementedError: the configuration describes another kind of model.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no model directory at {path}")
    config = config or LlavaConfig.from_file(path)
    if (path / MANIFEST).is_file():
        return _open_converted(path, config)
    if (path / "params").is_dir():
        raise ValueError(
            f"{path} has params but no {MANIFEST}: its conversion was interrupted; delete the "
            "directory and convert the model again"
        )
    return _open_safetensors(path, config)


def load_params(
    source: str | Path | Checkpoint,
    dtype: Any = None,
    progress: Progress | None = None,
    *,
    transform: bool = False,
) -> Params:
    """The parameters of a model directory of either kind, on the default device.

    Args:
        source: the directory, or what `open_checkpoint` made of it.
        dtype: float32, bfloat16 or float16; as stored by default.
        progress: called after each parameter with its piece, the bytes done and the bytes in all.
        transform: fold the transform of the values into each layer as it is read (`models.fold`).

    Returns:
        The nested dict of arrays that `vlcache_jax.models.llava.abstract_params` describes.

    Raises:
        FileNotFoundError: there are no weights, or files of them are missing.
        ValueError: the weights do not fit the configuration, are damaged, are pickles, or have
            several number types and no `dtype` is given.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    dtype = checkpoint.target_dtype(dtype)
    total = checkpoint.num_bytes(dtype)
    done = 0
    leaves: dict[str, jax.Array] = {}
    for piece in checkpoint.pieces:
        for name, array in checkpoint.read(piece, dtype):
            # Waiting keeps the host from holding every array whose transfer is under way.
            leaves[name] = jax.device_put(array).block_until_ready()
            done += array.nbytes
            if progress is not None:
                progress(piece, done, total)
        if transform and piece.startswith("layer_"):
            kernels = [name for name in checkpoint.pieces[piece] if name.endswith((".qkv", ".out"))]
            kernels.sort(reverse=True)  # qkv, out
            leaves |= zip(kernels, fold_layer(*(leaves[name] for name in kernels)), strict=True)
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params(checkpoint.config))
    return tree.unflatten([leaves[parameter_name(path)] for path, _ in paths])


def piece_directory(path: Path, piece: str) -> Path:
    """Where a converted checkpoint keeps a piece; Orbax wants an absolute path."""
    return path.absolute() / "params" / piece


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep Orbax from logging the traceback of an error that it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _open_safetensors(path: Path, config: LlavaConfig) -> SafetensorsCheckpoint:
    files: dict[str, Any] = {}
    stored: list[tuple[str, str, Shape]] = []
    for name in _weight_files(path):
        file = _open_file(path / name)
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(key)
            stored.append((key, part.get_dtype(), tuple(part.get_shape())))
            files[key] = file
    sources = match(config, stored)
    used = {key for keys in sources.values() for key in keys}
    kinds = Counter(kind for key, kind, _ in stored if key in used)
    return SafetensorsCheckpoint(
        path=path,
        config=config,
        dtype=FLOAT_KINDS[next(iter(kinds))] if len(kinds) == 1 else None,
        shapes=parameter_shapes(config),
        sources=sources,
        files=files,
    )


def _weight_files(path: Path) -> list[str]:
    """Names of a Hugging Face checkpoint's weight files."""
    if (path / INDEX).is_file():
        return _indexed_files(path)
    if (path / WEIGHTS).is_file():
        return [WEIGHTS]
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ValueError(
            f"{path} has only pickled weights ({pickles[0]}), which can run any code and are never "
            "opened: use a safetensors checkpoint"
        )
    raise FileNotFoundError(
        f"no weights in {path}: expected {WEIGHTS}, {INDEX} or a converted checkpoint's {MANIFEST}"
    )


def _indexed_files(path: Path) -> list[str]:
    index = _read_json(path / INDEX)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{path / INDEX} has no weight_map: download it again")
    names = sorted(set(where.values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path / INDEX} names files outside of its directory: {names}")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path / INDEX} names {len(missing)} of {len(names)} files that are not there "
            f"({', '.join(missing[:3])}): download them again"
        )
    return names


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged ({_first_line(error)}): download it again"
        ) from None


def _open_converted(path: Path, config: LlavaConfig) -> ConvertedCheckpoint:
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path / MANIFEST} has format {manifest.get('format')!r}, this version reads "
            f"{FORMAT}: convert the model again"
        )
    try:
        dtype = parse_dtype(manifest["dtype"])
        listed = {
            name: (tuple(entry["shape"]), entry["dtype"])
            for name, entry in manifest["parameters"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path / MANIFEST} is damaged: convert the model again") from None
    shapes = parameter_shapes(config)
    expected = {name: (shape, dtype.name) for name, shape in shapes.items()}
    _compare(expected, listed, f"{path / MANIFEST} does not fit config.json")
    checkpoint = ConvertedCheckpoint(path=path, config=config, dtype=dtype, shapes=shapes)
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        found = {
            (piece, leaf): (tuple(array.shape), np.dtype(array.dtype).name)
            for piece in checkpoint.pieces
            for leaf, array in _metadata(checkpointer, piece_directory(path, piece)).items()
        }
    # Orbax itself restores another shape than the one asked for without a word.
    _compare(
        {"/".join(piece_of(name)): spec for name, spec in expected.items()},
        {"/".join(place): spec for place, spec in found.items()},
        f"{path / 'params'} does not hold what {MANIFEST} says; convert the model again",
    )
    return checkpoint


def _metadata(checkpointer: ocp.StandardCheckpointer, directory: Path) -> Mapping[str, Any]:
    """Shape and type of each array of an Orbax checkpoint."""
    if not directory.is_dir():
        return {}
    metadata: Any = checkpointer.metadata(directory)
    tree = metadata.item_metadata
    return {} if tree is None else tree.tree


def _compare(
    expected: Mapping[str, tuple[Shape, str]], found: Mapping[str, tuple[Shape, str]], what: str
) -> None:
    """Refuse a tree of (shape, type) that is not the expected one."""

    def show(spec: tuple[Shape, str]) -> str:
        return f"{spec[1]}{list(spec[0])}"

    problems = {
        "missing": [f"{name} {show(expected[name])}" for name in expected if name not in found],
        "unknown": [f"{name} {show(found[name])}" for name in found if name not in expected],
        "different": [
            f"{name} is {show(found[name])}, expected {show(spec)}"
            for name, spec in expected.items()
            if name in found and found[name] != spec
        ],
    }
    refuse(problems, what)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get the file again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
