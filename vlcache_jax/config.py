"""Model configurations: frozen dataclasses, read from a Hugging Face `config.json`.

Old and new spellings of a field are both read; a field left out of the file takes the default of
the Hugging Face class. A value that would change the mathematics and is not implemented raises
`NotImplementedError` naming the field, so that no model is ever run almost right.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
        if not isinstance(data, dict):
            raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}")
        return cls.from_hf(data)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "LlavaConfig":
        """Read the content of a Hugging Face `config.json`.

        Raises:
            ValueError: a value is impossible, or the file asks for remote code.
            NotImplementedError: an unknown architecture, or a field that changes the mathematics.
        """
        if "auto_map" in data:
            raise ValueError(
                "config.json asks for remote code (auto_map), which is never run: "
                "use a checkpoint of the plain architecture"
            )
        family = data.get("model_type")
        if family not in ("llava", "llava_next"):
            raise NotImplementedError(
                f"model_type={family!r} is not supported: expected 'llava' or 'llava_next'"
            )
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
        pinpoints = data.get("image_grid_pinpoints") or _DEFAULT_PINPOINTS
        if family == "llava_next":
            for height, width in pinpoints:
                if height % vision.image_size or width % vision.image_size:
                    raise ValueError(
                        f"image_grid_pinpoints entry {(height, width)} must be multiples of the "
                        f"vision tower's image_size {vision.image_size}"
                    )
        return cls(
            family=family,
            vision=vision,
            text=text,
            image_token_id=_first(data, "image_token_index", "image_token_id", default=32000),
            vision_layers=vision_layers,
            projector_bias=data.get("multimodal_projector_bias", True),
            grid_pinpoints=tuple((h, w) for h, w in pinpoints) if family == "llava_next" else (),
        )


# Defaults of Hugging Face's classes for fields that a config.json may leave out.
_VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT_DEFAULTS = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


def _read_vision(given: Mapping[str, Any] | None) -> VisionConfig:
    """`vision_config`: where there is none, the tower is LLaVA-1.5's, as in Hugging Face."""
    data = _VISION_DEFAULTS if given is None else {**_CLIP_DEFAULTS, **given}
    kind = data.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise NotImplementedError(f"vision_config.model_type={kind!r}: only CLIP is supported")
    _refuse(data, "vision_config.", num_channels=3)
    activation = data.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise NotImplementedError(f"vision_config.hidden_act={activation!r} is not supported")
    config = VisionConfig(
        hidden_size=_size(data, "hidden_size"),
        intermediate_size=_size(data, "intermediate_size"),
        num_layers=_size(data, "num_hidden_layers"),
        num_heads=_size(data, "num_attention_heads"),
        image_size=_size(data, "image_size"),
        patch_size=_size(data, "patch_size"),
        layer_norm_eps=data.get("layer_norm_eps", 1e-5),
        activation=activation,
    )
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"vision hidden_size={config.hidden_size} must be a multiple of {config.num_heads=}"
        )
    if config.patch_size > config.image_size:
        raise ValueError(f"{config.patch_size=} must not exceed {config.image_size=}")
    return config


def _read_text(data: Mapping[str, Any], tied: bool | None) -> TextConfig:
    kind = data.get("model_type", "llama")
    if kind not in _TEXT_DEFAULTS:
        raise NotImplementedError(
            f"text_config.model_type={kind!r} is not supported: expected 'llama' or 'mistral'"
        )
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
    data = {**_TEXT_DEFAULTS[kind], **data}
    max_positions = _size(data, "max_position_embeddings")
    window = data.get("sliding_window")
    if window is not None and window < max_positions:
        raise NotImplementedError(
            f"text_config.sliding_window={window} binds below {max_positions} positions and is "
            "not supported: set it to null if the model was not trained with it"
        )
    heads = _size(data, "num_attention_heads", 32)
    hidden = _size(data, "hidden_size", 4096)
    if data.get("num_key_value_heads") is None:
        data = {**data, "num_key_value_heads": heads}
    kv_heads = _size(data, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} must be a multiple of {kv_heads} kv heads")
    if data.get("head_dim") is None:
        if hidden % heads:
            raise ValueError(f"hidden_size={hidden} must be a multiple of {heads} heads")
        data = {**data, "head_dim": hidden // heads}
    head_dim = _size(data, "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even for rotary positions")
    return TextConfig(
        vocab_size=_size(data, "vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=_size(data, "intermediate_size"),
        num_layers=_size(data, "num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=data.get("rms_norm_eps", 1e-6),
        max_positions=max_positions,
        rope=_read_rope(data, max_positions),
        tie_embeddings=bool(tied or data.get("tie_word_embeddings", False)),
        eos_token_ids=token_ids(data.get("eos_token_id")),
        kind=kind,
    )


def _read_rope(data: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Rope fields: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = dict(data.get("rope_scaling") or {}) | dict(data.get("rope_parameters") or {})
    kind = _first(rope, "rope_type", "type", default="default")
    if kind not in ("default", "linear", "llama3"):
        raise NotImplementedError(
            f"text_config rope type {kind!r} is not supported: expected default, linear or llama3"
        )
    _refuse(rope, "rope_parameters.", partial_rotary_factor=1.0)
    theta = float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if not rope.get("factor"):
        raise ValueError(f"rope type {kind!r} needs a factor")
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=float(rope["factor"]))
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(rope["factor"]),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_positions=int(rope.get("original_max_position_embeddings") or max_positions),
    )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of a Hugging Face file: one id, a list of them, or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _refuse(data: Mapping[str, Any], prefix: str, **supported: Any) -> None:
    for name, only in supported.items():
        value = data.get(name)
        if value is not None and value != only:
            raise NotImplementedError(f"{prefix}{name}={value!r} is not supported (only {only!r})")


def _first(data: Mapping[str, Any], *names: str, default: Any) -> Any:
    for name in names:
        if data.get(name) is not None:
            return data[name]
    return default


def _size(data: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = data.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name}={value!r} must be a positive whole number")
    return value
