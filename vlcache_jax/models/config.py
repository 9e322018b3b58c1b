"""Configuration of a model: frozen dataclasses, read from a Hugging Face `config.json`.

Old and new spellings of a field are both read; a field left out of the file takes the default of
the Hugging Face class. A value that would change the mathematics and is not implemented raises
`NotImplementedError` naming the field, so that no model is ever run almost right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from vlcache_jax.errors import short, whole_numbers
from vlcache_jax.fields import (
    COUNT,
    FLAG,
    NUMBER,
    REMOTE_CODE,
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
        axes: of each rotated pair which of the three axes of a position turns it (M-RoPE: Qwen2-VL,
            section 2.1); empty where positions have one axis.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextConfig:
    """A decoder of Llama's kind (Llama, Vicuna, Mistral, Yi, Qwen2, Qwen3).

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
        kind: "llama" (Vicuna and Yi too), "mistral" (the same mathematics, other defaults), "qwen2"
            or "qwen3".
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

    def __post_init__(self):
        ids = whole_numbers(self.eos_token_ids, "eos_token_ids")
        object.__setattr__(self, "eos_token_ids", ids)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.kind == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head of queries and keys is normalised in front of its rotation."""
        return self.kind == "qwen3"

    @property
    def group_size(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class ModelConfig:
    """A decoder alone; a family that takes pictures adds what it makes of them.

    Attributes:
        family: `model_type` of its config.json, of a decoder one of `DECODERS`.
        text: the decoder.
    """

    family: str
    text: TextConfig

    @property
    def max_tiles(self) -> int:
        """The most tiles that one image of any size can become; 0 where none are taken."""
        return 0

    @property
    def tile_side(self) -> int:
        """Side of a square tile, in pixels."""
        return 0

    @property
    def tile_tokens(self) -> int:
        """P: the visual tokens that a tile becomes."""
        return 0

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `config.json`, or the one inside a model directory.

        Args:
            path: the file or the directory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a JSON object, or a value in it is impossible.
            NotImplementedError: it describes a model that this library does not implement.
        """
        return cls.from_hf(read_config_json(path))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Read the content of a Hugging Face `config.json`.

        Args:
            data: its fields.

        Raises:
            ValueError: a value is impossible, or the file asks for remote code.
            NotImplementedError: an unknown architecture, quantised weights, or a field that changes
                the mathematics.
        """
        refuse_formats(data)
        return cls(read_field(data, "model_type", one_of(*DECODERS)), read_text(data, ""))


DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Kinds of decoders, by their `model_type`."""

ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "logits_scaling": 1.0,
    "logit_scale": None,
    "use_qk_norm": False,
    "use_sliding_window": False,
    "num_local_experts": None,
}
"""Fields that change a decoder's mathematics, each with the one value that is implemented."""

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
    "hidden_act": one_of("quick_gelu", "gelu", "gelu_pytorch_tanh"),
    "model_type": one_of(*DECODERS),
    int: SIZE,
    float: NUMBER,
    bool: FLAG,
}
_ROPE = one_of("default", "linear", "llama3")

_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
# What of a kind's defaults are not Llama's, which are those of the dataclasses above.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}


def read_dataclass(
    data: Mapping[str, Any], section: str, kind: type, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a dataclass, read from a section; defaults go by their names there.

    The section stands as it does in front of a name: "text_config.", or nothing.
    """
    found = {}
    for each in fields(kind):
        name = _NAMES.get(each.name, each.name)
        wanted = _KINDS.get(name) or _KINDS.get(each.type)
        if wanted is not None:
            default = defaults.get(name, each.default)
            found[each.name] = read_field(data, f"{section}{name}", wanted, default)
    return found


def read_text(data: Mapping[str, Any], section: str, usual: str = TextConfig.kind) -> TextConfig:
    """Read the decoder's section of a `config.json`.

    Args:
        data: the whole file.
        section: in front of the decoder's fields, "text_config."; nothing where it is the model.
        usual: its kind where the section names none.

    Raises:
        ValueError: a value is impossible.
        NotImplementedError: a value asks for what is not implemented.
    """
    text = read_field(data, section[:-1], SECTION, {}) if section else data
    for name, only in ONLY.items():
        read_field(data, section + name, one_of(only), only)
    kind = read_field(data, f"{section}model_type", one_of(*DECODERS), usual)
    heads = read_field(data, f"{section}num_attention_heads", SIZE, TextConfig.num_heads)
    hidden = read_field(data, f"{section}hidden_size", SIZE, TextConfig.hidden_size)
    # Of these null is a value of its own, not the default of the class.
    null = {"num_key_value_heads": heads, "sliding_window": None}
    defaults = {
        "head_dim": hidden // heads,
        "model_type": kind,
        **null,
        **_DEFAULTS[kind],
        **{name: value for name, value in null.items() if name in text},
    }
    if "head_dim" not in _DEFAULTS[kind] and text.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"config.json: {section}hidden_size={hidden} must be a multiple of {heads} heads"
        )
    values = read_dataclass(data, section, TextConfig, defaults)
    values["tie_embeddings"] |= read_field(data, "tie_word_embeddings", FLAG, False)
    ids = token_ids(values["vocab_size"])
    config = TextConfig(
        **values,
        rope=_read_rope(data, section, values["max_positions"]),
        eos_token_ids=read_field(data, f"{section}eos_token_id", ids, ()),
    )
    window = read_field(data, f"{section}sliding_window", COUNT, defaults["sliding_window"])
    if kind.startswith("qwen"):  # means something with use_sliding_window alone, refused above
        window = None
    if window is not None and window < config.max_positions:
        raise NotImplementedError(
            f"config.json: {section}sliding_window={window} binds below {config.max_positions} "
            "positions and is not supported: set it to null if the model was not trained with it"
        )
    if heads % config.num_kv_heads:
        raise ValueError(
            f"config.json: {section}num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"config.json: {section}head_dim={config.head_dim} must be even for rotary positions"
        )
    return config


def _read_rope(data: Mapping[str, Any], section: str, max_positions: int) -> RopeConfig:
    """Rope fields: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    old = read_field(data, f"{section}rope_scaling", SECTION, {})
    at = f"{section}rope_scaling" if old else f"{section}rope_parameters"
    kind = read_field(
        data, f"{at}.rope_type", _ROPE, read_field(data, f"{at}.type", _ROPE, "default")
    )
    read_field(data, f"{at}.partial_rotary_factor", one_of(1.0), 1.0)
    theta = read_field(data, f"{section}rope_theta", NUMBER, RopeConfig.theta)
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


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The fields of a `config.json`, given by itself or by its directory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    path = local_path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json at {short(path)}: is this a model directory?")
    return read_json(path)


def refuse_formats(data: Mapping[str, Any]) -> None:
    """Refuse files of which no field means what it says, or that describe other weights.

    Raises:
        ValueError: it is no object, or asks for remote code.
        NotImplementedError: it is of another format, or the weights are quantised.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config.json must hold an object, not {shown(data)}")
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
