"""Configuration of a LLaVA-OneVision model; see `vlcache_jax.models.config`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vlcache_jax.fields import ID, Kind, one_of, read_field
from vlcache_jax.models.config import refuse_formats
from vlcache_jax.models.llava.config import LlavaConfig, Usual, VisionConfig, read_llava

_SIDES = range(384, 2305, 384)

_ONEVISION = Usual(
    only={
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "full",
        "use_image_newline_parameter": True,
        "vision_config.model_type": "siglip_vision_model",
        "vision_config.num_channels": 3,
        "vision_config.vision_use_head": False,
    },
    tower=VisionConfig(1152, 4304, 26, 16, 384, 14, 1e-6, "gelu_pytorch_tanh", "siglip"),
    image_token=151646,
    layer=-1,
    pinpoints=tuple((height, width) for height in _SIDES for width in _SIDES),
    decoder="qwen2",
    vision={"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
)

_ASPECT = re.compile(r"anyres_max_([1-9]\d{0,3})")
_ANYRES_MAX = Kind(
    '"anyres_max_9", or another whole number from 1 to 9999 at its end',
    lambda x: isinstance(x, str) and _ASPECT.fullmatch(x) is not None,
    lambda x: int(x.removeprefix("anyres_max_")),
    NotImplementedError,
)


@dataclass(frozen=True)
class OnevisionConfig(LlavaConfig):
    """A LLaVA-OneVision model.

    Attributes:
        anyres_max: a grid of more patches than so many tiles have is scaled down to them.
        video_token_id: the id that stands for one visual token of a video in a prompt.
    """

    anyres_max: int = 9
    video_token_id: int = 151647

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read the content of a Hugging Face `config.json`; see `ModelConfig.from_hf`."""
        refuse_formats(data)
        read_field(data, "model_type", one_of("llava_onevision"))
        most = read_field(data, "vision_aspect_ratio", _ANYRES_MAX, cls.anyres_max)
        token = read_field(data, "video_token_id", ID, cls.video_token_id)
        video = read_field(data, "video_token_index", ID, token)
        return cls(**read_llava(data, _ONEVISION), anyres_max=most, video_token_id=video)
