"""Configuration of a LLaVA model; see `vlcache_jax.models.config`."""

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from vlcache_jax.errors import short, whole_numbers
from vlcache_jax.fields import FLAG, ID, PAIRS, Kind, one_of, read_field, shown
from vlcache_jax.models.config import (
    ModelConfig,
    TextConfig,
    read_dataclass,
    read_text,
    refuse_formats,
)

_DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: layers in the checkpoint; the model may use fewer (`LlavaConfig.vision_layers`).
        num_heads: attention heads.
        image_size: side of the square tile, in pixels.
        patch_size: side of a square patch, in pixels.
        layer_norm_eps: epsilon of every LayerNorm.
        activation: "quick_gelu" (OpenAI CLIP), "gelu" or "gelu_pytorch_tanh" (SigLIP).
        tower: "clip" or "siglip".
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    tower: str = "clip"

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
class LlavaConfig(ModelConfig):
    """A LLaVA-style vision-language model.

    Attributes:
        family: "llava" (1.5: one tile per image) or "llava_next" (1.6: anyres tiles).
        text: the decoder.
        vision: the vision tower.
        image_token_id: the id that stands for one visual token in a prompt.
        vision_layers: how many layers of the tower are run (Hugging Face's feature layer -2 of a
            24-layer tower is 23).
        projector_bias: whether the projector's linear layers have a bias.
        grid_pinpoints: (height, width) resolutions that anyres chooses from; none for 1.5.
    """

    vision: VisionConfig
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

    @property
    def max_tiles(self) -> int:
        """The most tiles that one image of any size can become."""
        side = self.vision.image_size
        return 1 + max((h // side * (w // side) for h, w in self.grid_pinpoints), default=0)

    @property
    def tile_side(self) -> int:
        """Side of a square tile, in pixels."""
        return self.vision.image_size

    @property
    def tile_tokens(self) -> int:
        """P: the visual tokens that a tile becomes."""
        return self.vision.num_patches

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read the content of a Hugging Face `config.json`; see `ModelConfig.from_hf`."""
        refuse_formats(data)
        family = read_field(data, "model_type", one_of("llava", "llava_next"))
        return cls(**read_llava(data, _USUAL[family]))


def with_vision(config: ModelConfig) -> LlavaConfig:
    """The configuration, of a model that takes pictures.

    Raises:
        ValueError: it takes none.
    """
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"a {config.family} decoder reads text alone: take a model with a vision tower"
        )
    return config


_LAYER = Kind(
    "a whole number (features of several layers are not supported)",
    lambda x: type(x[0] if isinstance(x, list) and len(x) == 1 else x) is int,
    lambda x: x if isinstance(x, int) else x[0],
    NotImplementedError,
)


class Usual(NamedTuple):
    """What the config.json of a family says where it says nothing.

    Attributes:
        only: every field that changes the mathematics, with the one value that is implemented.
        tower: the whole tower, of a file without vision_config.
        image_token: the id of the image token.
        layer: the tower's feature layer.
        pinpoints: resolutions of anyres; none where there is no anyres.
        decoder: the kind of the decoder.
        vision: fields of vision_config by their names, where they are not `VisionConfig`'s.
    """

    only: Mapping[str, Any]
    tower: VisionConfig
    image_token: int
    layer: int
    pinpoints: tuple[tuple[int, int], ...] = ()
    decoder: str = TextConfig.kind
    vision: Mapping[str, Any] = {}


_LLAVA = Usual(
    only={
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "use_image_newline_parameter": True,
        "vision_config.model_type": "clip_vision_model",
        "vision_config.num_channels": 3,
    },
    tower=VisionConfig(1024, 4096, num_layers=24, num_heads=16, image_size=336, patch_size=14),
    image_token=32000,
    layer=-2,
)
_USUAL = {"llava": _LLAVA, "llava_next": _LLAVA._replace(pinpoints=_DEFAULT_PINPOINTS)}


def read_llava(data: Mapping[str, Any], usual: Usual) -> dict[str, Any]:
    """The fields of a `LlavaConfig` of any family, read from a config.json; see `from_hf`."""
    for name, only in usual.only.items():
        read_field(data, name, one_of(only), only)
    vision = _read_vision(data, usual)
    layer = read_field(data, "vision_feature_layer", _LAYER, usual.layer)
    vision_layers = layer if layer >= 0 else vision.num_layers + 1 + layer
    if not 0 <= vision_layers <= vision.num_layers:
        raise ValueError(
            f"config.json: vision_feature_layer={shown(layer)} of {vision.num_layers} layers"
        )
    pinpoints = usual.pinpoints
    if pinpoints:
        pinpoints = read_field(data, "image_grid_pinpoints", PAIRS, pinpoints)
    for pair in pinpoints:
        if any(side % vision.image_size for side in pair):
            raise ValueError(
                f"config.json: image_grid_pinpoints entry {pair} must be multiples of the "
                f"vision tower's image_size {vision.image_size}"
            )
    token = read_field(data, "image_token_id", ID, usual.image_token)
    return {
        "family": data["model_type"],
        "vision": vision,
        "text": read_text(data, "text_config.", usual.decoder),
        "image_token_id": read_field(data, "image_token_index", ID, token),
        "vision_layers": vision_layers,
        "projector_bias": read_field(data, "multimodal_projector_bias", FLAG, True),
        "grid_pinpoints": pinpoints,
    }


def _read_vision(data: Mapping[str, Any], usual: Usual) -> VisionConfig:
    if data.get("vision_config") is None:
        return usual.tower
    values = read_dataclass(data, "vision_config.", VisionConfig, usual.vision)
    config = VisionConfig(**values, tower=usual.tower.tower)
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
