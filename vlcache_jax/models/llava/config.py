"""Model configurations: frozen dataclasses, read from a Hugging Face `config.json`.

Old and new spellings of a field are both read; a field left out of the file takes the default of
the Hugging Face class. A value that would change the mathematics and is not implemented raises
`NotImplementedError` naming the field, so that no model is ever run almost right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlcache_jax.errors import short
from vlcache_jax.fields import (
    COUNT,
    FLAG,
    ID,
    NUMBER,
    PAIRS,
    SECTION,
    SIZE,
    TEXT,
    Kind,
    local_path,
    one_of,
    read_field,
    read_json,
    shown,
    token_ids,
    whole,
)

REMOTE_CODE = (
    "asks for remote code (auto_map), which is never run: use a checkpoint of the plain "
    "architecture"
)
"""What is said of a file that is refused for it."""

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
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        kind: "default", "linear" (positions divided by `factor`) or "llama3" (low frequencies
            divided by `factor`, a smooth ramp between; Llama 3.1 model card).
        factor: the scaling factor of "linear" and "llama3".
        low_freq_factor, high_freq_factor: llama3 only.
        original_max_positions: llama3 only: context length before scaling.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class TextConfig:
    """A Llama-family decoder (Llama, Vicuna, Mistral, Yi).

    Attributes:
        vocab_size: V, rows of the embedding.
        hidden_size: D, width of the residual stream.
        intermediate_size: F, width of the gated MLP.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of it.
        head_dim: H.
        rms_norm_eps: epsilon of every RMSNorm.
        max_positions: longest sequence the model was made for, prompt and answer together.
        rope: rotary position embedding.
        tie_embeddings: the output projection is the transposed embedding.
        eos_token_ids: ids that end an answer, where generation_config.json names none; empty
            where the file leaves it to the tokenizer.
        kind: "llama" (Vicuna and Yi too) or "mistral": the same mathematics, other defaults.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    max_positions: int = 2048
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    kind: str = "llama"

    @property
    def group_size(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


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
        for name, only in _ONLY.items():
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
            text=_read_text(data),
            image_token_id=read_field(data, "image_token_index", ID, token),
            vision_layers=vision_layers,
            projector_bias=read_field(data, "multimodal_projector_bias", FLAG, True),
            grid_pinpoints=pinpoints,
        )


# Every field that changes the mathematics, with the one value that is implemented.
_ONLY = {
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "use_image_newline_parameter": True,
    "vision_config.model_type": "clip_vision_model",
    "vision_config.num_channels": 3,
    "text_config.hidden_act": "silu",
    "text_config.attention_bias": False,
    "text_config.mlp_bias": False,
    "text_config.partial_rotary_factor": 1.0,
    "text_config.attn_logit_softcapping": None,
    "text_config.final_logit_softcapping": None,
    "text_config.query_pre_attn_scalar": None,
    "text_config.embedding_multiplier": 1.0,
    "text_config.residual_multiplier": 1.0,
    "text_config.attention_multiplier": None,
    "text_config.logits_scaling": 1.0,
    "text_config.logit_scale": None,
    "text_config.use_qk_norm": False,
    "text_config.num_local_experts": None,
}

# Fields whose names in config.json are not those of the dataclasses.
_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "kind": "model_type",
    "tie_embeddings": "tie_word_embeddings",
}

# What a field may hold, by its name in config.json or else by its type in the dataclass.
_KINDS: dict[Any, Kind] = {
    "num_hidden_layers": whole(1, 512),
    "max_position_embeddings": COUNT,
    "hidden_act": one_of("quick_gelu", "gelu"),
    "model_type": one_of("llama", "mistral"),
    int: SIZE,
    float: NUMBER,
    bool: FLAG,
}
_ROPE = one_of("default", "linear", "llama3")
_LAYER = Kind(
    "a whole number (features of several layers are not supported)",
    lambda x: type(x[0] if isinstance(x, list) and len(x) == 1 else x) is int,
    lambda x: x if isinstance(x, int) else x[0],
    NotImplementedError,
)

# Where a config.json leaves fields out: the tower of a file without vision_config, and what of
# Mistral's defaults are not Llama's. Else they are those of the dataclasses above.
_LLAVA_TOWER = VisionConfig(1024, 4096, num_layers=24, num_heads=16, image_size=336, patch_size=14)
_MISTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


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


def _fields(
    data: Mapping[str, Any], section: str, kind: type, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a dataclass, read from a section; defaults go by their names there."""
    found = {}
    for each in fields(kind):
        name = _NAMES.get(each.name, each.name)
        wanted = _KINDS.get(name) or _KINDS.get(each.type)
        if wanted is not None:
            default = defaults.get(name, each.default)
            found[each.name] = read_field(data, f"{section}.{name}", wanted, default)
    return found


def _read_vision(data: Mapping[str, Any]) -> VisionConfig:
    if data.get("vision_config") is None:
        return _LLAVA_TOWER
    config = VisionConfig(**_fields(data, "vision_config", VisionConfig, {}))
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


def _read_text(data: Mapping[str, Any]) -> TextConfig:
    text = read_field(data, "text_config", SECTION, {})
    heads = read_field(data, "text_config.num_attention_heads", SIZE, TextConfig.num_heads)
    hidden = read_field(data, "text_config.hidden_size", SIZE, TextConfig.hidden_size)
    # Of these null is a value of its own, not the default of the class.
    null = {"num_key_value_heads": heads, "sliding_window": None}
    defaults = {
        "head_dim": hidden // heads,
        **null,
        **(_MISTRAL if text.get("model_type") == "mistral" else {}),
        **{name: value for name, value in null.items() if name in text},
    }
    if text.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"config.json: text_config.hidden_size={hidden} must be a multiple of {heads} heads"
        )
    values = _fields(data, "text_config", TextConfig, defaults)
    values["tie_embeddings"] |= read_field(data, "tie_word_embeddings", FLAG, False)
    ids = token_ids(values["vocab_size"])
    config = TextConfig(
        **values,
        rope=_read_rope(data, values["max_positions"]),
        eos_token_ids=read_field(data, "text_config.eos_token_id", ids, ()),
    )
    window = read_field(data, "text_config.sliding_window", COUNT, defaults["sliding_window"])
    if window is not None and window < config.max_positions:
        raise NotImplementedError(
            f"config.json: text_config.sliding_window={window} binds below {config.max_positions} "
            "positions and is not supported: set it to null if the model was not trained with it"
        )
    if heads % config.num_kv_heads:
        raise ValueError(
            f"config.json: text_config.num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"config.json: text_config.head_dim={config.head_dim} must be even for rotary positions"
        )
    return config


def _read_rope(data: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Rope fields: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    old = read_field(data, "text_config.rope_scaling", SECTION, {})
    at = "text_config.rope_scaling" if old else "text_config.rope_parameters"
    kind = read_field(
        data, f"{at}.rope_type", _ROPE, read_field(data, f"{at}.type", _ROPE, "default")
    )
    read_field(data, f"{at}.partial_rotary_factor", one_of(1.0), 1.0)
    theta = read_field(data, "text_config.rope_theta", NUMBER, RopeConfig.theta)
    theta = read_field(data, f"{at}.rope_theta", NUMBER, theta)
    if kind == "default":
        return RopeConfig(theta)
    factor = read_field(data, f"{at}.factor", NUMBER)
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    rope = RopeConfig(
        theta,
        kind,
        factor,
        read_field(data, f"{at}.low_freq_factor", NUMBER, RopeConfig.low_freq_factor),
        read_field(data, f"{at}.high_freq_factor", NUMBER, RopeConfig.high_freq_factor),
        read_field(data, f"{at}.original_max_position_embeddings", COUNT, max_positions),
    )
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise ValueError(
            f"config.json: {at}.low_freq_factor={rope.low_freq_factor} must be below "
            f"high_freq_factor={rope.high_freq_factor}"
        )
    return rope
