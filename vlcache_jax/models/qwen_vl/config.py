"""Configuration of a Qwen2.5-VL model, and what of it other models of the line share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vlcache_jax.fields import ID, NUMBER, SECTION, SIZE, Kind, one_of, read_field
from vlcache_jax.models.config import ModelConfig, TextConfig, read_text, refuse_formats

FRAMES = 2
"""Frames of a video that a patch spans; a picture stands for as many that are alike."""


@dataclass(frozen=True)
class TowerConfig:
    """A vision transformer that takes pictures of any size as patches.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: layers.
        num_heads: attention heads.
        patch_size: side of a square patch, in pixels.
        merge_size: patches along one side of a tile, the square that becomes one visual token.
        rope_theta: base of the rotary frequencies.
        tokens_per_second: how far a second of a video moves the decoder's positions in time; 0
            where the prompt says in words when a step is shown.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    merge_size: int = 2
    rope_theta: float = 10000.0
    tokens_per_second: float = 0.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def tile_side(self) -> int:
        """Side of a tile, in pixels."""
        return self.merge_size * self.patch_size

    @property
    def window_side(self) -> int | None:
        """Tiles along one side of a window; None where all layers attend to the whole picture."""
        return None


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """A tower whose layers attend inside windows, but for a few.

    Attributes:
        window_size: side of a square window, in pixels.
        full_layers: the layers that attend to the whole picture.
    """

    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_layers: int = 32
    num_heads: int = 16
    patch_size: int = 14
    window_size: int = 112
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: float = 4.0

    @property
    def window_side(self) -> int:
        """Tiles along one side of a window."""
        return self.window_size // self.tile_side


@dataclass(frozen=True)
class QwenConfig(ModelConfig, ABC):
    """A model of the Qwen-VL line.

    A tile is the square of 2 x 2 patches that becomes one visual token.

    Attributes:
        family: its `MODEL_TYPE`.
        text: the decoder.
        vision: the vision tower.
        image_token_id: the id that stands for one visual token of a picture in a prompt.
        video_token_id: that of a video.
    """

    vision: TowerConfig
    image_token_id: int = 151655
    video_token_id: int = 151656

    MODEL_TYPE: ClassVar[str]

    @property
    def max_tiles(self) -> int:
        """The most tiles that one image can become: each is a token of the prompt."""
        return self.text.max_positions

    @property
    def tile_side(self) -> int:
        """Side of a square tile, in pixels."""
        return self.vision.tile_side

    @property
    def tile_tokens(self) -> int:
        """The visual tokens that a tile becomes."""
        return 1

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read the content of a Hugging Face `config.json`; see `ModelConfig.from_hf`."""
        refuse_formats(data)
        family = read_field(data, "model_type", one_of(cls.MODEL_TYPE))
        text, vision = cls.read_parts(data)
        width = read_field(data, "vision_config.out_hidden_size", SIZE, 3584)
        if width != text.hidden_size:
            raise ValueError(
                f"config.json: vision_config.out_hidden_size={width} must be the decoder's "
                f"hidden_size={text.hidden_size}"
            )
        return cls(
            family=family,
            text=text,
            vision=vision,
            image_token_id=read_field(data, "image_token_id", ID, cls.image_token_id),
            video_token_id=read_field(data, "video_token_id", ID, cls.video_token_id),
        )

    @staticmethod
    @abstractmethod
    def read_parts(data: Mapping[str, Any]) -> tuple[TextConfig, Any]:
        """The decoder and the tower of a config.json."""


@dataclass(frozen=True)
class QwenVLConfig(QwenConfig):
    """A Qwen2.5-VL model."""

    vision: VisionConfig

    MODEL_TYPE: ClassVar[str] = "qwen2_5_vl"

    @staticmethod
    def read_parts(data: Mapping[str, Any]) -> tuple[TextConfig, VisionConfig]:
        """The decoder and the tower of a config.json."""
        return _read_text(data), _read_vision(data)


# Fields of a tower that change the mathematics, each with the one value that is implemented.
_ONLY = {
    "in_channels": 3,
    "in_chans": 3,
    "temporal_patch_size": FRAMES,
    "rope_parameters.rope_type": "axial",
}
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "num_positions": "num_position_embeddings",
}
LAYERS = Kind(
    "a list of layers, whole numbers",
    lambda x: isinstance(x, list | tuple) and all(type(i) is int for i in x),
    tuple,
)
_SECTIONS = Kind(
    "a list of positive whole numbers",
    lambda x: isinstance(x, list | tuple) and len(x) > 0 and all(map(SIZE.accepts, x)),
    tuple,
)

# Defaults of the decoder that are not Qwen2's.
_TEXT = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_ROPES = "rope_scaling", "rope_parameters"  # the first is taken where both are there


def _read_text(data: Mapping[str, Any]) -> TextConfig:
    """The decoder: in a section of its own, or as the checkpoints have it, beside the tower's."""
    section = "" if data.get("text_config") is None else "text_config."
    read_field(data, f"{section}model_type", one_of("qwen2_5_vl_text", "qwen2_5_vl"), "qwen2_5_vl")
    return read_turned_text(data, section, _TEXT, (16, 24, 24), _axes)


def _axes(sections: tuple[int, ...], pairs: int) -> tuple[int, ...]:
    """Axes in turn, of each as many pairs as its section says."""
    return tuple(i % 3 for i, count in enumerate(sections) for _ in range(count))


def read_turned_text(
    data: Mapping[str, Any],
    section: str,
    defaults: Mapping[str, Any],
    sections: tuple[int, ...],
    axes_of: Callable[[tuple[int, ...], int], tuple[int, ...]],
) -> TextConfig:
    """A decoder whose pairs turn by the positions of three axes (M-RoPE).

    Args:
        data: the whole file.
        section: in front of the decoder's fields, "text_config."; nothing where they have none.
        defaults: of the decoder; its `model_type` is the kind that it is.
        sections: the default of `mrope_section`.
        axes_of: from sections and the number of pairs the axis of each pair.

    Raises:
        ValueError: a value is impossible.
        NotImplementedError: a value asks for what is not implemented.
    """
    own = read_field(data, section[:-1], SECTION, {}) if section else data
    # Of the heads null is a value of its own, not the default of the class.
    kept = {name for name in own if own[name] is not None or name == "num_key_value_heads"}
    kind = {"model_type": defaults["model_type"]}
    plain = {**defaults, **{name: own[name] for name in kept}, **kind}
    at = next((name for name in _ROPES if plain.get(name)), _ROPES[0])
    sections = read_field(data, f"{section}{at}.mrope_section", _SECTIONS, sections)
    rope = read_field(data, f"{section}{at}", SECTION, {})
    plain[at] = {key: "default" if value == "mrope" else value for key, value in rope.items()}
    whole = {**data, "text_config": plain} if section else plain
    config = read_text(whole, section)
    axes = axes_of(sections, config.head_dim // 2)
    if config.head_dim != 2 * len(axes):
        raise ValueError(
            f"config.json: {section}{at}.mrope_section has {len(axes)} frequencies, but a head of "
            f"{config.head_dim} has {config.head_dim // 2}"
        )
    return replace(config, rope=replace(config.rope, axes=axes))


def read_tower(
    data: Mapping[str, Any], kind: type[TowerConfig], types: tuple[str, ...], activation: str
) -> dict[str, Any]:
    """The fields of a tower that its family does not read itself.

    Args:
        data: the whole file.
        kind: what is made of them.
        types: what its `model_type` may be.
        activation: the one of its MLP.

    Raises:
        ValueError: a value is impossible.
        NotImplementedError: a value asks for what is not implemented.
    """
    section = "vision_config."
    read_field(data, f"{section}model_type", one_of(*types), "")
    for name, only in {**_ONLY, "hidden_act": activation}.items():
        read_field(data, section + name, one_of(only), only)
    found = {
        name: read_field(data, section + theirs, SIZE, getattr(kind, name))
        for name, theirs in _SIZES.items()
        if hasattr(kind, name)
    }
    theta = read_field(data, f"{section}rope_parameters.rope_theta", NUMBER, kind.rope_theta)
    if found["hidden_size"] % (4 * found["num_heads"]):
        raise ValueError(
            f"config.json: {section}hidden_size={found['hidden_size']} must be a multiple of 4 "
            f"times num_heads={found['num_heads']}, for rotary positions of two axes"
        )
    return {**found, "rope_theta": theta}


def _read_vision(data: Mapping[str, Any]) -> VisionConfig:
    section, types = "vision_config.", ("qwen2_5_vl_vision", "qwen2_5_vl")
    found = read_tower(data, VisionConfig, types, "silu")
    layers = read_field(data, f"{section}fullatt_block_indexes", LAYERS, VisionConfig.full_layers)
    speed = read_field(data, f"{section}tokens_per_second", NUMBER, VisionConfig.tokens_per_second)
    config = VisionConfig(**found, full_layers=layers, tokens_per_second=speed)
    if not config.window_side:
        raise ValueError(
            f"config.json: {section}window_size={config.window_size} must be at least "
            f"{config.tile_side}, the side of spatial_merge_size patches"
        )
    return config
