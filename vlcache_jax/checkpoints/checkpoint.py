"""Reading checkpoints: a Hugging Face directory of safetensors, or one that `convert` has made.

GGUF files are the third kind (`vlcache_jax.checkpoints.gguf`), and what was learned beside one the
fourth (`changed`). All are read piece by piece (vision,
projector, embed, layer_000..., head; a decoder alone has no first two), and inside a piece array by
array, so that the host holds little beside the parameters themselves. Everything that can be
checked without reading the weights is checked when a checkpoint is opened.
"""

import json
import logging
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open

from vlcache_jax.checkpoints.weights import (
    DTYPE,
    DTYPES,
    FLOAT_KINDS,
    Shape,
    cast,
    join,
    join_part,
    match,
    parameter_name,
    parameter_shapes,
    parse_dtype,
    piece_of,
    refuse_differences,
)
from vlcache_jax.distributed.mesh import DeviceMesh
from vlcache_jax.distributed.weights import Read, place
from vlcache_jax.errors import reason, short
from vlcache_jax.fields import COUNT, SECTION, local_path, read_field, read_json
from vlcache_jax.models.config import ModelConfig, read_config_json
from vlcache_jax.models.families import Params, abstract_params, family_of, read_config
from vlcache_jax.models.fold import FOLDED, fold_layer

MANIFEST = "MANIFEST.json"
"""File that a finished conversion has and an interrupted one lacks."""

FORMAT = 1
"""Version of the converted layout; raised when an older reader would misread it."""

DECODER = "decoder.json"
"""File of a directory that holds changes of a published decoder, see `changed`."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG_PATTERNS = ("*.json", "tokenizer.model", "*.jinja")
"""Files of a model directory beside its weights: configuration, tokenizer and processor."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")

Progress = Callable[[str, int, int], None]
"""Called after each parameter with its piece, the bytes done and the bytes in all."""

Pieces: TypeAlias = Iterator[tuple[str, Iterator[tuple[str, Any]]]]
"""The pieces of a checkpoint in their order, each with the names and values of its parameters."""


class Checkpoint(ABC):
    """An opened checkpoint: everything is known and checked, no weight has been read.

    Attributes:
        path: its directory.
        config: the model.
        names: what its tensors are called.
        dtype: number type of all weights; None where they differ.
        shapes: name and shape of every parameter, in the order of the pieces.
        pieces: names of the parameters of each piece, in the order in which they are read.
    """

    dtype: np.dtype | None

    def __init__(self, path: Path, config: ModelConfig):
        self.path, self.config = path, config
        self.names = family_of(config).names
        self.shapes = parameter_shapes(config)
        groups = groupby(self.shapes, lambda name: piece_of(name)[0])
        self.pieces = {piece: list(names) for piece, names in groups}

    def target_dtype(self, dtype: Any = None) -> np.dtype:
        """The number type that was asked for by name or object, or the checkpoint's own.

        Raises:
            ValueError: the type is not supported, or none was asked for and the weights differ.
        """
        if dtype is not None:
            return parse_dtype(dtype)
        if self.dtype is None:
            raise ValueError(
                f"the weights in {short(self.path)} have different number types: choose one, "
                f"dtype={' or '.join(DTYPES)}"
            )
        return self.dtype

    def num_bytes(self, dtype: np.dtype) -> int:
        """Size of all parameters in a number type."""
        return dtype.itemsize * sum(map(math.prod, self.shapes.values()))

    def processor(self) -> Any:
        """The `transformers` processor or tokenizer that belongs to the weights.

        Raises:
            FileNotFoundError: a file of it is missing.
            ValueError: the files cannot be read, or ask for remote code.
            NotImplementedError: a GGUF file describes an unknown tokenizer.
        """
        return family_of(self.config).packing.read(self.path, self.config)

    def write_files(self, directory: Path, dtype: np.dtype) -> None:
        """Write the files beside the weights; config.json names a new number type."""
        for file in config_files(self.path):
            target = directory / file.name
            if file.name != "config.json" or dtype == self.dtype:
                shutil.copyfile(file, target)
                continue
            config = read_json(file)
            for part in (
                config,
                config.get("text_config") or {},
                config.get("vision_config") or {},
            ):
                for key in {"dtype", "torch_dtype"} & set(part):
                    part[key] = dtype.name
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @abstractmethod
    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each parameter of a piece ("vision", ...), in the number type.

        Raises:
            ValueError: the file is damaged, or a value does not fit the number type.
        """

    def parts(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, Read]]:
        """Name of each parameter of a piece, and what reads a part of it; see `read`."""
        for name, array in self.read(piece, dtype):
            yield name, array.__getitem__

    def read_all(
        self, dtype: np.dtype, progress: Progress | None = None, mesh: DeviceMesh | None = None
    ) -> Pieces:
        """Every piece with what `read` gives of it, or on a mesh with the arrays of its devices.

        Args:
            dtype: the number type.
            mesh: the devices.
            progress: called after each parameter with its piece, the bytes done and those in all.
        """
        total, done = self.num_bytes(dtype), 0

        def arrays(piece: str) -> Iterator[tuple[str, np.ndarray]]:
            nonlocal done
            for name, array in self.read(piece, dtype) if mesh is None else placed(mesh, piece):
                yield name, array
                done += dtype.itemsize * math.prod(self.shapes[name])
                if progress is not None:
                    progress(piece, done, total)

        def placed(mesh: DeviceMesh, piece: str) -> Iterator[tuple[str, Any]]:
            for name, read in self.parts(piece, dtype):
                yield name, place(mesh, name, self.shapes[name], read)

        for piece in self.pieces:
            yield piece, arrays(piece)

    def load(
        self,
        dtype: Any = None,
        progress: Progress | None = None,
        *,
        transform: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> Params:
        """The parameters on the default device, in the tree of `models.families.abstract_params`.

        Args:
            dtype: float32, bfloat16 or float16; as stored by default.
            progress: called after each parameter with its piece, the bytes done and those in all.
            transform: fold the transform of the values into each layer as it is read
                (`models.fold`).
            mesh: devices that hold the parameters together, each its own part.

        Raises:
            ValueError: a file is damaged, a value does not fit the number type, or the weights have
                several types and no `dtype` is given.
        """
        leaves: dict[str, jax.Array] = {}
        for piece, arrays in self.read_all(self.target_dtype(dtype), progress, mesh):
            for name, array in arrays:
                # Waiting keeps the host from holding every array whose transfer is under way.
                leaves[name] = (array if mesh else jax.device_put(array)).block_until_ready()
            if transform and piece.startswith("layer_"):  # at once: never two layers unfolded
                names = {leaf: f"layers.{int(piece[6:])}.{leaf}" for leaf in FOLDED}
                own = {leaf: leaves.pop(name) for leaf, name in names.items() if name in leaves}
                folded = jax.block_until_ready(fold_layer(own, mesh))
                leaves.update({names[leaf]: array for leaf, array in folded.items()})
        paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params(self.config))
        return tree.unflatten([leaves[parameter_name(path)] for path, _ in paths])


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face checkpoint: tensors in one file or several."""

    def __init__(self, path: Path, config: ModelConfig):
        super().__init__(path, config)
        self._files: dict[str, Any] = {}  # for each tensor the open file that holds it
        stored: list[tuple[str, str, Shape]] = []
        for file in _weight_files(path):
            try:
                tensors: Any = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(
                    f"{short(file)} is truncated or damaged ({reason(error)}): download it again"
                ) from None
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(key)
                stored.append((key, part.get_dtype(), tuple(part.get_shape())))
                self._files[key] = tensors
        self._sources = match(
            config, self.names, stored
        )  # for each parameter the names of its tensors
        used = {key for keys in self._sources.values() for key in keys}
        kinds = {kind for key, kind, _ in stored if key in used}
        self.dtype = FLOAT_KINDS[kinds.pop()] if len(kinds) == 1 else None

    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each parameter of a piece, joined from its tensors one by one."""
        if piece == "embed":
            self._check_tied()
        for name in self.pieces[piece]:
            tensors = (self._files[key].get_tensor(key) for key in self._sources[name])
            yield name, join(self.names, name, self.shapes[name], dtype, tensors)

    def parts(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, Read]]:
        """What reads a part of each parameter, and no more of the files."""
        if piece == "embed":
            self._check_tied()
        for name in self.pieces[piece]:
            tensors = [self._files[key].get_slice(key) for key in self._sources[name]]
            own = self.names, name, self.shapes[name], dtype
            yield name, partial(join_part, *own, tensors)

    def _check_tied(self) -> None:
        """An output projection that is stored although it is tied must be the embedding."""
        keys = {self.names.own(key): key for key in self._files}
        if self.config.text.tie_embeddings and self.names.head in keys:
            pair = [keys[self.names.head], keys[self.names.embedding]]
            if not np.array_equal(*(self._files[key].get_tensor(key) for key in pair)):
                raise ValueError(
                    f"config.json ties the output projection to the embedding, but {pair[0]} "
                    "differs from it: set tie_word_embeddings to false"
                )


class ConvertedCheckpoint(Checkpoint):
    """A checkpoint that `convert` has made: one Orbax checkpoint per piece."""

    def __init__(self, path: Path, config: ModelConfig):
        super().__init__(path, config)
        file = path / MANIFEST
        manifest = read_json(file)
        given = partial(read_field, manifest, file=file)
        if (version := given("format", COUNT)) != FORMAT:
            raise ValueError(
                f"{short(file)} has format {version}, this version reads {FORMAT}: convert the "
                "model again"
            )
        self.dtype = DTYPES[given("dtype", DTYPE)]
        listed = {
            name: f"{entry['dtype']}{entry['shape']}"
            if isinstance(entry, dict) and {"dtype", "shape"} <= entry.keys()
            else short(entry)
            for name, entry in given("parameters", SECTION).items()
        }
        expected = {name: f"{self.dtype}{list(shape)}" for name, shape in self.shapes.items()}
        refuse_differences(f"{short(file)} does not fit config.json", expected, listed)
        # Orbax itself restores another shape than the one asked for without a word.
        found: dict[str, str] = {}
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            for piece in self.pieces:
                arrays: Any = checkpointer.metadata(piece_directory(path, piece)).item_metadata
                for leaf, array in arrays.tree.items() if arrays is not None else ():
                    found[f"{piece}/{leaf}"] = f"{np.dtype(array.dtype)}{list(array.shape)}"
        refuse_differences(
            f"{short(path / 'params')} does not hold what {MANIFEST} says; convert the model again",
            {"/".join(piece_of(name)): spec for name, spec in expected.items()},
            found,
        )

    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each parameter of a piece, restored together."""
        names = self.pieces[piece]
        # A numpy leaf makes Orbax restore to numpy; the pages of these are never touched.
        like = {piece_of(name)[1]: np.empty(self.shapes[name], self.dtype) for name in names}
        directory = piece_directory(self.path, piece)
        try:
            with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore(directory, like)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{short(directory)} is damaged ({reason(error)}): convert the model again"
            ) from None
        del like
        for name in names:
            yield name, cast(arrays.pop(piece_of(name)[1]), dtype, name)


def config_files(path: Path) -> list[Path]:
    """Configuration, tokenizer and processor files beside the weights of a directory."""
    files = {file for pattern in CONFIG_PATTERNS for file in path.glob(pattern)}
    own = (MANIFEST, INDEX, DECODER)
    return sorted(file for file in files if file.name not in own and file.is_file())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory of any kind, or a GGUF file, and check all that can be checked
    without reading the weights.

    Raises:
        FileNotFoundError: there are no weights, or files of them are missing, or the package with
            the decoder that they change.
        ValueError: the weights do not fit the configuration, a file is damaged, the weights are
            pickles, or the conversion that made the directory was interrupted.
        NotImplementedError: the configuration describes another kind of model.
    """
    path = local_path(path)
    if path.is_file():
        from vlcache_jax.checkpoints.gguf import GgufCheckpoint  # which is a `Checkpoint` too

        return GgufCheckpoint(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no model directory at {short(path)}")
    config, fields = read_model(path)
    # Not used here, but transformers looks them up as it reads the processor.
    for section, name in product(("", "text_config.", "vision_config."), ("dtype", "torch_dtype")):
        read_field(fields, f"{section}{name}", DTYPE, None)
    if (path / MANIFEST).is_file():
        return ConvertedCheckpoint(path, config)
    if (path / DECODER).is_file():
        from vlcache_jax.checkpoints.changed import ChangedCheckpoint  # see above

        return ChangedCheckpoint(path, config)
    if (path / "params").is_dir():
        raise ValueError(
            f"{short(path)} has params but no {MANIFEST}: its conversion was interrupted; delete "
            "the directory and convert the model again"
        )
    return SafetensorsCheckpoint(path, config)


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """What a model directory's config.json says, or a GGUF file in its place, and its fields.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
        NotImplementedError: it describes a model that this library does not implement.
    """
    if path.is_file():
        from vlcache_jax.checkpoints.gguf import GgufFile  # see above

        file = GgufFile(path)
        return file.model(), file.config
    fields = read_config_json(path)
    return read_config(fields), fields


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


def _weight_files(path: Path) -> list[Path]:
    """A Hugging Face checkpoint's weight files."""
    if (path / WEIGHTS).is_file():  # an index beside it is older, as transformers takes it too
        return [path / WEIGHTS]
    index = path / INDEX
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"{short(index)} has no weight_map: download it again")
        names = sorted(set(where.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{short(index)} names files outside of its directory: {short(names)}")
        missing = sorted(set(names) - {file.name for file in path.iterdir()})
        if missing or not names:
            raise FileNotFoundError(
                f"{short(index)} is stale or its download incomplete: it names {len(missing)} of "
                f"{len(names)} files that are not there ({short(', '.join(missing))}): download "
                "the checkpoint again"
            )
        return [path / name for name in names]
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ValueError(
            f"{short(path)} has only pickled weights ({short(pickles[0])}), which can run any code "
            "and are never opened: use a safetensors checkpoint"
        )
    raise FileNotFoundError(
        f"no weights in {short(path)}: expected {WEIGHTS}, {INDEX} or a converted checkpoint's "
        f"{MANIFEST}"
    )
