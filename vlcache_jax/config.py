"""Model configurations: frozen dataclasses, read from a Hugging Face `config.json`.

Old and new spellings of a field are both read; a field left out of the file takes the default of
the Hugging Face class. A value that would change the mathematics and is not implemented raises
`NotImplementedError` naming the field, so that no model is ever run almost right.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

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

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a JSON object, or a value in it is impossible.
            NotImplementedError: it describes a model that this library does not implement.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"no config.json at {path}: is this a model directory?")
        return cls.from_hf(read_json(path))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "LlavaConfig":
        """Read the content of a Hugging Face `config.json`.

        Raises:
            ValueError: a value is impossible, or the file asks for remote code.
            NotImplementedError: an unknown architecture, or a field that changes the mathematics.
        """
        if "auto_map" in data:
            raise ValueError(f"config.json {REMOTE_CODE}")
        family = _one_of("model_type", data.get("model_type"), "llava", "llava_next")
        _refuse(
            data,
            "",
            projector_hidden_act="gelu",
            vision_feature_select_strategy="default",
            use_image_newline_parameter=True,
        )
        vision = _read_vision(data.get("vision_config"))
        text = _read_text(data.get("text_config") or {}, tied=data.get("tie_word_embeddings"))
        layer = data.get("vision_feature_layer", -2)
        if isinstance(layer, list) and len(layer) == 1:
            layer = layer[0]
        if not isinstance(layer, int):
            raise NotImplementedError(
                f"vision_feature_layer={layer!r}: features of several layers are not supported"
            )
        vision_layers = layer if layer >= 0 else vision.num_layers + 1 + layer
        if not 0 <= vision_layers <= vision.num_layers:
            raise ValueError(f"vision_feature_layer={layer} of {vision.num_layers} vision layers")
        given = data.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS
        pinpoints = tuple((h, w) for h, w in given) if family == "llava_next" else ()
        for pair in pinpoints:
            if any(side % vision.image_size for side in pair):
                raise ValueError(
                    f"image_grid_pinpoints entry {pair} must be multiples of the vision tower's "
                    f"image_size {vision.image_size}"
                )
        return cls(
            family=family,
            vision=vision,
            text=text,
            image_token_id=_first(data, "image_token_index", "image_token_id", default=32000),
            vision_layers=vision_layers,
            projector_bias=data.get("multimodal_projector_bias", True),
            grid_pinpoints=pinpoints,
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

# Sizes whose names in config.json are not those of the dataclasses.
_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
}


def _read_vision(data: Mapping[str, Any] | None) -> VisionConfig:
    if data is None:
        return _LLAVA_TOWER
    clip = "clip_vision_model"
    _one_of("vision_config.model_type", data.get("model_type", clip), clip)
    _refuse(data, "vision_config.", num_channels=3)
    activation = data.get("hidden_act", "quick_gelu")
    config = VisionConfig(
        **_sizes(data, VisionConfig),
        layer_norm_eps=data.get("layer_norm_eps", 1e-5),
        activation=_one_of("vision_config.hidden_act", activation, "quick_gelu", "gelu"),
    )
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"vision hidden_size={config.hidden_size} must be a multiple of {config.num_heads=}"
        )
    if config.patch_size > config.image_size:
        raise ValueError(f"{config.patch_size=} must not exceed {config.image_size=}")
    return config


def _read_text(data: Mapping[str, Any], tied: bool | None) -> TextConfig:
    kind = _one_of("text_config.model_type", data.get("model_type", "llama"), "llama", "mistral")
    # Every field that changes the mathematics, with the one value that is implemented.
    _refuse(
        data,
        "text_config.",
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        partial_rotary_factor=1.0,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=None,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        attention_multiplier=None,
        logits_scaling=1.0,
        logit_scale=None,
        use_qk_norm=False,
        num_local_experts=None,
        quantization_config=None,
    )
    data = {**(_MISTRAL if kind == "mistral" else {}), **data}
    heads = _size(data, "num_attention_heads", TextConfig.num_heads)
    hidden = _size(data, "hidden_size", TextConfig.hidden_size)
    if data.get("num_key_value_heads") is None:
        data["num_key_value_heads"] = heads
    if data.get("head_dim") is None:
        if hidden % heads:
            raise ValueError(f"hidden_size={hidden} must be a multiple of {heads} heads")
        data["head_dim"] = hidden // heads
    config = TextConfig(
        **_sizes(data, TextConfig),
        rms_norm_eps=data.get("rms_norm_eps", 1e-6),
        rope=_read_rope(data),
        tie_embeddings=bool(tied or data.get("tie_word_embeddings", False)),
        eos_token_ids=token_ids(data.get("eos_token_id")),
        kind=kind,
    )
    window = data.get("sliding_window")
    if window is not None and window < config.max_positions:
        raise NotImplementedError(
            f"text_config.sliding_window={window} binds below {config.max_positions} positions and "
            "is not supported: set it to null if the model was not trained with it"
        )
    if heads % config.num_kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} must be a multiple of {config.num_kv_heads} kv heads"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim={config.head_dim} must be even for rotary positions")
    return config


def _read_rope(data: Mapping[str, Any]) -> RopeConfig:
    """Rope fields: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
    kind = _first(rope, "rope_type", "type", default="default")
    _one_of("text_config.rope_type", kind, "default", "linear", "llama3")
    _refuse(rope, "rope_parameters.", partial_rotary_factor=1.0)
    theta = float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta)
    if not rope.get("factor"):
        raise ValueError(f"rope type {kind!r} needs a factor")
    factor = float(rope["factor"])
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    known = _size(data, "max_position_embeddings", TextConfig.max_positions)
    return RopeConfig(
        theta,
        kind,
        factor,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_positions=int(rope.get("original_max_position_embeddings") or known),
    )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of a Hugging Face file: one id, a list of them, or null."""
    return (value,) if isinstance(value, int) else tuple(value or ())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get the file again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def first_line(error: Exception) -> str:
    """The first line of what an error says, or what it is where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _one_of(name: str, value: Any, *known: Any) -> Any:
    """The value, if it is one of those that are implemented."""
    if value not in known:
        expected = " or ".join(map(repr, known))
        raise NotImplementedError(f"{name}={value!r} is not supported: expected {expected}")
    return value


def _refuse(data: Mapping[str, Any], prefix: str, **supported: Any) -> None:
    """Refuse fields that have another value than the one that is implemented, or null."""
    for name, only in supported.items():
        if data.get(name) is not None:
            _one_of(prefix + name, data[name], only)


def _first(data: Mapping[str, Any], *names: str, default: Any) -> Any:
    return next((data[name] for name in names if data.get(name) is not None), default)


def _sizes(data: Mapping[str, Any], section: type[VisionConfig | TextConfig]) -> dict[str, int]:
    """The whole numbers among the fields of a section; those left out have their defaults."""
    names = {f.name: _NAMES.get(f.name, f.name) for f in fields(section) if f.type is int}
    return {ours: _size(data, theirs) for ours, theirs in names.items() if theirs in data}


def _size(data: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = data.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name}={value!r} must be a positive whole number")
    return value
