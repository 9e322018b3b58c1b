"""GGUF files of the Llama family: one file with configuration, tokenizer and quantised weights.

The package `gguf` reads the file and dequantises (https://github.com/ggml-org/ggml, docs/gguf.md);
this module says what its keys and tensors are to this library, and refuses by name what it does not
know. llama.cpp stores the rows of a query's and a key's head as they are rotated in pairs, 0 and
H / 2, 1 and H / 2 + 1, ...; Hugging Face and this library have both halves one after the other.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from vlcache_jax.checkpoints.checkpoint import Checkpoint
from vlcache_jax.checkpoints.gguf_tokenizer import read_tokenizer
from vlcache_jax.checkpoints.weights import cast, join, match
from vlcache_jax.errors import reason, short
from vlcache_jax.fields import COUNT, ID, NUMBER, REQUIRED, SIZE, Kind, one_of, read_value
from vlcache_jax.models.config import ModelConfig, RopeConfig
from vlcache_jax.models.families import read_config
from vlcache_jax.models.llama import rope_frequencies
from vlcache_jax.models.names import Names, decoder_table

_NAMES = Names(
    decoder_table(
        {
            "embed": "token_embd",
            "attention_norm": "blk.{}.attn_norm",
            "q": "blk.{}.attn_q",
            "k": "blk.{}.attn_k",
            "v": "blk.{}.attn_v",
            "out": "blk.{}.attn_output",
            "mlp_norm": "blk.{}.ffn_norm",
            "gate": "blk.{}.ffn_gate",
            "up": "blk.{}.ffn_up",
            "down": "blk.{}.ffn_down",
            "norm": "output_norm",
            "head": "output",
        }
    )
)
_PAIRED = re.compile(r"blk\.\d+\.attn_([qk])\.weight")
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = 1.0, 4.0, 8192  # low and high factor, positions before scaling: of every Llama 3
_BLOCK_BYTES = 1 << 20  # dequantised at a time: the package holds several times as much

# Keys of the architecture that say nothing beyond those that are read, and their one known value.
_ONLY: dict[str, Any] = {
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.causal": True,
    "llama.rope.scaling.attn_factor": 1.0,
}
_UNUSED = {"llama.vocab_size", "llama.rope.scaling.finetuned", "llama.tensor_data_layout"}


class GgufFile:
    """An opened GGUF file; of its tensors nothing is read yet.

    Args:
        path: the file.

    Attributes:
        path: the file.
        tensors: by their names, as the package has them; without the factors of the positions.

    Raises:
        ValueError: the package is missing, or the file is damaged or truncated.
        NotImplementedError: it holds another architecture or unknown types.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            gguf: Any = import_module("gguf")  # an extra
        except ImportError:
            raise ValueError(
                f"{short(path)} needs the package gguf: pip install 'vlcache-jax[gguf]'"
            ) from None

        class Reader(gguf.GGUFReader):
            """It cuts a memory map in pieces; of an array on it that takes a third of the time."""

            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, np.asarray(value) if name == "data" else value)

        try:
            # numpy warns of sums beyond 64 bits, which end behind the file's end.
            with np.errstate(all="ignore"):
                self._reader = Reader(path)
        except (
            ValueError,
            IndexError,
            KeyError,
            OverflowError,
            TypeError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"{short(path)} is truncated or damaged ({reason(error)}): download it again"
            ) from None
        self._dequantize = gguf.dequantize
        self._read: set[str] = set()
        self.field("general.architecture", one_of("llama"))
        self.field("general.type", one_of("model"), "model")
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        for kind, name in {
            tensor.tensor_type: name for name, tensor in self.tensors.items()
        }.items():
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except (NotImplementedError, KeyError):
                raise NotImplementedError(
                    f"{short(path)}: {short(name)} is stored as {kind.name}, which the package "
                    "gguf does not dequantise: use a file of another quantisation"
                ) from None
        factors = self.tensors.pop(_ROPE_FACTORS, None)
        self._factors = None if factors is None else np.asarray(factors.data, np.float32)

    def field(self, key: str, kind: Kind, default: Any = REQUIRED) -> Any:
        """The value of a key, checked as `read_value` does."""
        self._read.add(key)
        field = self._reader.fields.get(key)
        try:
            value = None if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{short(self.path)}: {key} is damaged ({reason(error)}): download it again"
            ) from None
        return read_value(value, key, kind, default, file=self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What Hugging Face's config.json says of the same model.

        Raises:
            ValueError: a key is missing, or has an impossible value.
            NotImplementedError: a key is not understood.
        """
        heads = self.field("llama.attention.head_count", SIZE)
        hidden = self.field("llama.embedding_length", SIZE)
        head_dim = self.field("llama.attention.key_length", SIZE, hidden // heads)
        self.field("llama.attention.value_length", one_of(head_dim), head_dim)
        self.field("llama.rope.dimension_count", one_of(head_dim), head_dim)
        for key, only in _ONLY.items():
            self.field(key, one_of(only), only)
        tokens = self.field("tokenizer.ggml.tokens", Kind("a list", lambda x: isinstance(x, list)))
        embedding = self.tensors.get("token_embd.weight")
        ends = [self.field(f"tokenizer.ggml.{name}_token_id", ID, None) for name in ("eos", "eot")]
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(tokens) if embedding is None else int(embedding.shape[-1]),
            "hidden_size": hidden,
            "intermediate_size": self.field("llama.feed_forward_length", SIZE),
            "num_hidden_layers": self.field("llama.block_count", SIZE),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("llama.attention.head_count_kv", SIZE, heads),
            "head_dim": head_dim,
            # As it was written: of 1e-5 the file has what a float32 makes of it.
            "rms_norm_eps": _decimal(self.field("llama.attention.layer_norm_rms_epsilon", NUMBER)),
            "max_position_embeddings": self.field("llama.context_length", COUNT),
            "sliding_window": self.field("llama.attention.sliding_window", COUNT, None),
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id", ID, None),
            "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
            "dtype": self.dtype.name,
        }
        for key in sorted(self._reader.fields):
            if key.startswith("llama.") and key not in self._read | _UNUSED:
                raise NotImplementedError(
                    f"{short(self.path)}: {short(key)} is not understood: use the Hugging Face "
                    "checkpoint of the same model"
                )
        return config

    def model(self) -> ModelConfig:
        """The model that it describes; errors name the file.

        Raises:
            ValueError: a key is missing, or a value is impossible.
            NotImplementedError: it is not implemented.
        """
        try:
            return read_config(self.config)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{short(self.path)}: {reason(error, 300)}") from None

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = _decimal(self.field("llama.rope.freq_base", NUMBER, RopeConfig.theta))
        old = self.field("llama.rope.scale_linear", NUMBER, None)
        kinds, default = one_of("none", "linear"), "none" if old is None else "linear"
        kind = self.field("llama.rope.scaling.type", kinds, default)
        factor = self.field("llama.rope.scaling.factor", NUMBER, old)
        low, high, positions = _LLAMA3
        positions = self.field("llama.rope.scaling.original_context_length", COUNT, positions)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            rope |= {"rope_type": "linear", "factor": factor}
        if self._factors is None or (self._factors == 1).all():
            return rope
        factor = float(self._factors.max())
        scaled = rope_frequencies(
            RopeConfig(theta, "llama3", factor, low, high, positions), head_dim
        )
        expected = rope_frequencies(RopeConfig(theta), head_dim) / scaled
        if kind == "linear" or not (
            self._factors.shape == expected.shape
            and np.allclose(self._factors, expected, rtol=1e-3, atol=0)
        ):
            raise NotImplementedError(
                f"{short(self.path)}: {_ROPE_FACTORS} scales positions by another rule than Llama "
                "3's, which is not understood: use the Hugging Face checkpoint of the same model"
            )
        return rope | {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": positions,
        }

    @property
    def dtype(self) -> np.dtype:
        """That of the matrices, if all have one of this library's; else float32."""
        kinds = {t.tensor_type.name for t in self.tensors.values() if len(t.shape) > 1}
        name = {"F16": "float16", "BF16": "bfloat16"}.get(min(kinds, default=""), "float32")
        return np.dtype(name if len(kinds) == 1 else "float32")

    def stored(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, type once it is dequantised, and shape of each tensor."""
        return [(n, "F32", tuple(map(int, t.shape[::-1]))) for n, t in self.tensors.items()]

    def tensor(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A tensor [out, in] in a number type, both halves of a head one after the other."""
        tensor, config = self.tensors[name], self.config
        data = tensor.data
        if paired := _PAIRED.fullmatch(name):
            heads = "num_attention_heads" if paired[1] == "q" else "num_key_value_heads"
            rows = data.reshape(config[heads], -1, 2, data.shape[-1])
            data = rows.swapaxes(1, 2).reshape(data.shape)
        whole = np.empty(tuple(map(int, tensor.shape[::-1])), dtype)
        step = max(1, _BLOCK_BYTES * len(whole) // max(whole.nbytes, 1))
        for start in range(0, len(whole), step):
            part = self._dequantize(data[start : start + step], tensor.tensor_type)
            whole[start : start + step] = cast(part, dtype, name)
        return whole


class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint; its weights are dequantised as they are read.

    Attributes:
        file: what is in it.
    """

    def __init__(self, path: Path):
        self.file = file = GgufFile(path)
        super().__init__(path, file.model())
        self.dtype = file.dtype
        try:
            self._sources = match(self.config, _NAMES, file.stored())
        except ValueError as error:
            raise ValueError(f"{short(path)}: {reason(error, 320)}") from None

    def read(self, piece: str, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each parameter of a piece, joined from its tensors one by one."""
        for name in self.pieces[piece]:
            tensors = (self.file.tensor(key, dtype) for key in self._sources[name])
            yield name, join(self.names, name, self.shapes[name], dtype, tensors)

    def processor(self) -> Any:
        """The tokenizer that the file describes."""
        return read_tokenizer(self.file)

    def write_files(self, directory: Path, dtype: np.dtype) -> None:
        """Write a config.json and the files of the tokenizer."""
        text = json.dumps({**self.file.config, "dtype": dtype.name}, indent=2)
        (directory / "config.json").write_text(f"{text}\n", encoding="utf-8")
        self.processor().save_pretrained(directory)


def _decimal(value: float) -> float:
    """The shortest decimal number that a float32 was made of."""
    return float(str(np.float32(value))) if math.isfinite(value) else value
