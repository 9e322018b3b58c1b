"""Configuration of a LLaVA model: frozen dataclasses, read from a Hugging Face `config.json`.

Old and new spellings of a field are both read; a field left out of the file takes the default of
the Hugging Face class. A value that would change the mathematics and is not implemented raises
`NotImplementedError` naming the field, so that no model is ever run almost right.
"""

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_jax.errors import short, whole_numbers
from vlcache_jax.fields import (
    FLAG,
    ID,
    PAIRS,
    REMOTE_CODE,
    SECTION,
    TEXT,
    Kind,
    local_path,
    one_of,
    read_field,
    read_json,
    shown,
)
from vlcache_jax.models.config import ONLY, TextConfig, read_dataclass, read_text

_DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: layers in the checkpoint; the model may use fewer (`LlavaConfig.vision_layers`).
        num_heads: attention heads.
        image_size: side of the square tile, in pixels.
        patch_size: side of a square patch, in pixels.
        layer_norm_eps: epsilon of every LayerNorm.
        activation: "quick_gelu" (OpenAI CLIP) or "gelu".
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    activation: str = "quick_gelu"

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one tile, P: the visual tokens it becomes."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA-style vision-language model.

    Attributes:
        family: "llava" (1.5: one tile per image) or "llava_next" (1.6: anyres tiles).
        vision: the vision tower.
        text: the decoder.
        image_token_id: the id that stands for one visual token in a prompt.
        vision_layers: how many layers of the tower are run (Hugging Face's feature layer -2 of a
            24-layer tower is 23).
        projector_bias: whether the projector's linear layers have a bias.
        grid_pinpoints: (height, width) resolutions that anyres chooses from; NeXT only.
    """

    family: str
    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 32000
    vision_layers: int = 23
    projector_bias: bool = True
    grid_pinpoints: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        name, pairs = "grid_pinpoints", self.grid_pinpoints
        if not isinstance(pairs, Iterable) or any(
            not isinstance(p, Sized) or len(p) != 2 for p in pairs
        ):
            raise ValueError(f"{name}={short(pairs)} must be a list of pairs (height, width)")
        pairs = tuple(whole_numbers(pair, f"{name}[{i}]", 1) for i, pair in enumerate(pairs))
        object.__setattr__(self, name, pairs)

    @classmethod
    def from_file(cls, path: str | Path) -> "LlavaConfig":
        """Read a `config.json`, or the one inside a model directory.

        Args:
            path: the file or the directory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a JSON object, or a value in it is impossible.
            NotImplementedError: it describes a model that this library does not implement.
        """
        path = local_path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"no config.json at {short(path)}: is this a model directory?")
        return cls.from_hf(read_json(path))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "LlavaConfig":
        """Read the content of a Hugging Face `config.json`.

        Args:
            data: its fields.

        Raises:
            ValueError: a value is impossible, or the file asks for remote code.
            NotImplementedError: an unknown architecture, quantised weights, or a field that changes
                the mathematics.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"config.json must hold an object, not {shown(data)}")
        _refuse_formats(data)
        family = read_field(data, "model_type", one_of("llava", "llava_next"))
        for name, only in (_ONLY | ONLY).items():
            read_field(data, name, one_of(only), only)
        vision = _read_vision(data)
        layer = read_field(data, "vision_feature_layer", _LAYER, -2)
        vision_layers = layer if layer >= 0 else vision.num_layers + 1 + layer
        if not 0 <= vision_layers <= vision.num_layers:
            raise ValueError(
                f"config.json: vision_feature_layer={shown(layer)} of {vision.num_layers} layers"
            )
        pinpoints = ()
        if family == "llava_next":
            pinpoints = read_field(data, "image_grid_pinpoints", PAIRS, _DEFAULT_PINPOINTS)
        for pair in pinpoints:
            if any(side % vision.image_size for side in pair):
                raise ValueError(
                    f"config.json: image_grid_pinpoints entry {pair} must be multiples of the "
                    f"vision tower's image_size {vision.image_size}"
                )
        token = read_field(data, "image_token_id", ID, 32000)
        return cls(
            family=family,
            vision=vision,
            text=read_text(data),
            image_token_id=read_field(data, "image_token_index", ID, token),
            vision_layers=vision_layers,
            projector_bias=read_field(data, "multimodal_projector_bias", FLAG, True),
            grid_pinpoints=pinpoints,
        )


_LAYER = Kind(
    "a whole number (features of several layers are not supported)",
    lambda x: type(x[0] if isinstance(x, list) and len(x) == 1 else x) is int,
    lambda x: x if isinstance(x, int) else x[0],
    NotImplementedError,
)

# Every field that changes the mathematics, with the one value that is implemented.
_ONLY = {
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "use_image_newline_parameter": True,
    "vision_config.model_type": "clip_vision_model",
    "vision_config.num_channels": 3,
}

# The tower of a config.json without vision_config.
_LLAVA_TOWER = VisionConfig(1024, 4096, num_layers=24, num_heads=16, image_size=336, patch_size=14)


def _refuse_formats(data: Mapping[str, Any]) -> None:
    """Refuse files of which no field means what it says, or that describe other weights."""
    if "auto_map" in data:
        raise ValueError(f"config.json {REMOTE_CODE}")
    marks = [name for name in data if str(name).startswith("mm_")]
    own = data.get("model_type") in ("llava_llama", "llava_mistral")
    if own or (marks and data.get("text_config") is None):
        mark = "model_type" if own else marks[0]
        raise NotImplementedError(
            f"config.json: {short(mark)}={shown(data[mark])} is the LLaVA authors' own format, "
            "which is not supported: use the llava-hf conversion of the same model from the hub, "
            "such as llava-hf/llava-v1.6-vicuna-13b-hf"
        )
    for section in ("", "text_config.", "vision_config."):
        for name in (f"{section}quantization_config", f"{section}compression_config"):
            config = read_field(data, name, SECTION, None)
            if config is None:
                continue
            bits = any(config.get(f"load_in_{bits}bit") for bits in (4, 8))
            method = "bitsandbytes" if bits else "an unnamed method"
            method = read_field(data, f"{name}.quant_method", TEXT, method)
            raise NotImplementedError(
                f"config.json: {name} says that the weights are quantised by {short(method)}, "
                "which is not supported: use the checkpoint that was quantised"
            )


def _read_vision(data: Mapping[str, Any]) -> VisionConfig:
    if data.get("vision_config") is None:
        return _LLAVA_TOWER
    config = VisionConfig(**read_dataclass(data, "vision_config", VisionConfig, {}))
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"config.json: vision_config.hidden_size={config.hidden_size} must be a multiple of "
            f"num_attention_heads={config.num_heads}"
        )
    if config.patch_size > config.image_size:
        raise ValueError(
            f"config.json: vision_config.patch_size={config.patch_size} must not exceed "
            f"image_size={config.image_size}"
        )
    return config
