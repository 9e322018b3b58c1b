"""Configuration of a Qwen3-VL model, the dense ones; see `vlcache_jax.models.config`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vlcache_jax.fields import SIZE, Kind, one_of, read_field
from vlcache_jax.models.config import TextConfig
from vlcache_jax.models.qwen_vl.config import (
    LAYERS,
    QwenConfig,
    TowerConfig,
    read_tower,
    read_turned_text,
)


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """A tower whose layers attend to the whole picture.

    Attributes:
        num_positions: rows of the learned table of positions; the largest square of them is used.
        deep_layers: the layers whose features are added inside the decoder (DeepStack).
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    patch_size: int = 16
    num_positions: int = 2304
    deep_layers: tuple[int, ...] = (8, 16, 24)

    @property
    def positions_side(self) -> int:
        """Rows along one side of the square table of positions."""
        return math.isqrt(self.num_positions)


@dataclass(frozen=True)
class Qwen3VLConfig(QwenConfig):
    """A Qwen3-VL model."""

    vision: VisionConfig

    MODEL_TYPE: ClassVar[str] = "qwen3_vl"

    @staticmethod
    def read_parts(data: Mapping[str, Any]) -> tuple[TextConfig, VisionConfig]:
        """The decoder and the tower of a config.json."""
        return _read_text(data), _read_vision(data)


# Defaults of the decoder, which are not all Qwen3's.
_TEXT = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 128000,
    "rope_theta": 5e5,
}


_SECTIONS = Kind(
    "a list of three positive whole numbers",
    lambda x: isinstance(x, list | tuple) and len(x) == 3 and all(map(SIZE.accepts, x)),
)


def _read_text(data: Mapping[str, Any]) -> TextConfig:
    section = "text_config."
    read_field(data, f"{section}model_type", one_of("qwen3_vl_text"), "")
    for name in ("rope_scaling", "rope_parameters"):
        read_field(data, f"{section}{name}.mrope_interleaved", one_of(True), True)
        read_field(data, f"{section}{name}.mrope_section", _SECTIONS, ())
    return read_turned_text(data, section, _TEXT, (24, 20, 20), interleaved_axes)


def interleaved_axes(sections: tuple[int, ...], pairs: int) -> tuple[int, ...]:
    """The axis that turns each pair: time, down and across in turn from the first pair on.

    Once a section of the two is used up, time takes what would be its pairs (Qwen3-VL's
    interleaved M-RoPE).

    Args:
        sections: how many pairs turn in time, down and across.
        pairs: how many there are.
    """
    return tuple(i % 3 if i // 3 < sections[i % 3] else 0 for i in range(pairs))


def _read_vision(data: Mapping[str, Any]) -> VisionConfig:
    types = "qwen3_vl_vision", "qwen3_vl"
    found = read_tower(data, VisionConfig, types, "gelu_pytorch_tanh")
    name = "vision_config.deepstack_visual_indexes"
    return VisionConfig(
        **found, deep_layers=read_field(data, name, LAYERS, VisionConfig.deep_layers)
    )
