"""Configuration of a decoder, shared by the families: a frozen dataclass, read from `config.json`.

A field left out of the file takes the default of the Hugging Face class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vlcache_jax.errors import whole_numbers
from vlcache_jax.fields import (
    COUNT,
    FLAG,
    NUMBER,
    SECTION,
    SIZE,
    Kind,
    one_of,
    read_field,
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

    def __post_init__(self):
        ids = whole_numbers(self.eos_token_ids, "eos_token_ids")
        object.__setattr__(self, "eos_token_ids", ids)

    @property
    def group_size(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


ONLY = {
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
    "hidden_act": one_of("quick_gelu", "gelu"),
    "model_type": one_of("llama", "mistral"),
    int: SIZE,
    float: NUMBER,
    bool: FLAG,
}
_ROPE = one_of("default", "linear", "llama3")

# What of Mistral's defaults are not Llama's, which are those of the dataclasses above.
_MISTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def read_dataclass(
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


def read_text(data: Mapping[str, Any]) -> TextConfig:
    """Read the decoder's section of a `config.json`.

    Args:
        data: the whole file.

    Raises:
        ValueError: a value is impossible.
        NotImplementedError: a value asks for what is not implemented.
    """
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
    values = read_dataclass(data, "text_config", TextConfig, defaults)
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
