"""Configuration of a Qwen2.5-VL model; see `vlcache_jax.models.config`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from vlcache_jax.fields import ID, NUMBER, SECTION, SIZE, Kind, one_of, read_field
from vlcache_jax.models.config import ModelConfig, TextConfig, read_text, refuse_formats

FRAMES = 2
"""Frames of a video that a patch spans; a picture stands for as many that are alike."""


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer whose layers attend inside windows, but for a few.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: layers.
        num_heads: attention heads.
        patch_size: side of a square patch, in pixels.
        merge_size: patches along one side of a tile, the square that becomes one visual token.
        window_size: side of a square window, in pixels.
        full_layers: the layers that attend to the whole picture.
        rope_theta: base of the rotary frequencies.
    """

    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_layers: int = 32
    num_heads: int = 16
    patch_size: int = 14
    merge_size: int = 2
    window_size: int = 112
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def tile_side(self) -> int:
        """Side of a tile, in pixels."""
        return self.merge_size * self.patch_size

    @property
    def window_side(self) -> int:
        """Tiles along one side of a window."""
        return self.window_size // self.tile_side


@dataclass(frozen=True)
class QwenVLConfig(ModelConfig):
    """A Qwen2.5-VL model, of which pictures alone are taken.

    A tile is the square of 2 x 2 patches that becomes one visual token.

    Attributes:
        family: "qwen2_5_vl".
        text: the decoder.
        vision: the vision tower.
        image_token_id: the id that stands for one visual token of a picture in a prompt.
        video_token_id: that of a video, which is refused.
    """

    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656

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
        family = read_field(data, "model_type", one_of("qwen2_5_vl"))
        text, vision = _read_text(data), _read_vision(data)
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


# Fields of the tower that change the mathematics, each with the one value that is implemented.
_ONLY = {
    "hidden_act": "silu",
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
}
_LAYERS = Kind(
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
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_KINDS_OF_TEXT = one_of("qwen2_5_vl_text", "qwen2_5_vl")
_ROPES = "rope_scaling", "rope_parameters"  # the first is taken where both are there


def _read_text(data: Mapping[str, Any]) -> TextConfig:
    """The decoder: in a section of its own, or as the checkpoints have it, beside the tower's."""
    section = "" if data.get("text_config") is None else "text_config."
    own = read_field(data, "text_config", SECTION, data)
    read_field(data, f"{section}model_type", _KINDS_OF_TEXT, "qwen2_5_vl_text")
    # Of the heads null is a value of its own, not the default of the class.
    kept = {name for name in own if own[name] is not None or name == "num_key_value_heads"}
    plain = {**_TEXT, **{name: own[name] for name in kept}, "model_type": "qwen2"}
    at = next((name for name in _ROPES if plain.get(name)), _ROPES[0])
    sections = read_field(data, f"{section}{at}.mrope_section", _SECTIONS, (16, 24, 24))
    axes = tuple(i % 3 for i, count in enumerate(sections) for _ in range(count))
    rope = read_field(data, f"{section}{at}", SECTION, {})
    plain[at] = {key: "default" if value == "mrope" else value for key, value in rope.items()}
    whole = {**data, "text_config": plain} if section else plain
    config = read_text(whole, section)
    if config.head_dim != 2 * len(axes):
        raise ValueError(
            f"config.json: {section}{at}.mrope_section has {len(axes)} frequencies, but a head of "
            f"{config.head_dim} has {config.head_dim // 2}"
        )
    return replace(config, rope=replace(config.rope, axes=axes))


def _read_vision(data: Mapping[str, Any]) -> VisionConfig:
    section = "vision_config."
    read_field(data, f"{section}model_type", one_of("qwen2_5_vl_vision", "qwen2_5_vl"), "")
    for name, only in _ONLY.items():
        read_field(data, section + name, one_of(only), only)
    sizes = {
        name: read_field(data, section + theirs, SIZE, getattr(VisionConfig, name))
        for name, theirs in _SIZES.items()
    }
    layers = read_field(data, f"{section}fullatt_block_indexes", _LAYERS, VisionConfig.full_layers)
    theta = read_field(
        data, f"{section}rope_parameters.rope_theta", NUMBER, VisionConfig.rope_theta
    )
    config = VisionConfig(**sizes, full_layers=layers, rope_theta=theta)
    if config.hidden_size % (4 * config.num_heads):
        raise ValueError(
            f"config.json: {section}hidden_size={config.hidden_size} must be a multiple of 4 times "
            f"num_heads={config.num_heads}, for rotary positions of two axes"
        )
    if not config.window_side:
        raise ValueError(
            f"config.json: {section}window_size={config.window_size} must be at least "
            f"{config.tile_side}, the side of spatial_merge_size patches"
        )
    return config
