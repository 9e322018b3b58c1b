"""Names and layouts of LLaVA's weights: which of Hugging Face's tensors each parameter holds.

One table says for each parameter which tensors it holds and where they lie in it.
"""

import re
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Shape = tuple[int, ...]

LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"

Parts: TypeAlias = list[tuple[np.ndarray, Shape]]
"""The tensors inside a parameter: of each its view, and its own shape, which merges axes of that
(-1 for what is left)."""


def _same(x: np.ndarray) -> Parts:
    return [(x, x.shape)]


def _kernel(x: np.ndarray) -> Parts:
    """[in ..., out]: [out, in]."""
    return [(np.moveaxis(x, -1, 0), (x.shape[-1], -1))]


def _stacked(x: np.ndarray) -> Parts:
    """[in, n, out ...]: n times [out, in]."""
    return [(np.moveaxis(x[:, i], 0, -1), (-1, x.shape[0])) for i in range(x.shape[1])]


def _stacked_bias(x: np.ndarray) -> Parts:
    """[n, out ...]: n times [out]."""
    return [(x[i], (-1,)) for i in range(x.shape[0])]


def _grouped_qkv(x: np.ndarray) -> Parts:
    """[D, K, G + 2, H]: q [K * G * H, D] (query head n = k * G + g), k and v [K * H, D]."""
    heads = np.moveaxis(x, 0, -1)  # [K, G + 2, H, D]
    return [(heads[:, rows], (-1, x.shape[0])) for rows in (slice(-2), -2, -1)]


def _patches(x: np.ndarray) -> Parts:
    """[3, p, p, D]: the kernel of a convolution, [D, 3, p, p]."""
    return _same(np.moveaxis(x, -1, 0))


_TOWER = "vision_tower.vision_model."
_TOWER_LAYER = _TOWER + "encoder.layers.{}."
_LAYER = "language_model.model.layers.{}."


def _qkv_names(layer: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{layer}self_attn.{name}_proj.{kind}" for name in "qkv")


# Parameters, the layout of each and its tensors; `{}` stands for the layer.
_TABLE: dict[str, tuple[Callable[[np.ndarray], Parts], *tuple[str, ...]]] = {
    "vision.patch_embedding": (_patches, _TOWER + "embeddings.patch_embedding.weight"),
    "vision.class_embedding": (_same, _TOWER + "embeddings.class_embedding"),
    "vision.position_embedding": (_same, _TOWER + "embeddings.position_embedding.weight"),
    "vision.layers.{}.qkv": (_stacked, *_qkv_names(_TOWER_LAYER, "weight")),
    "vision.layers.{}.qkv_bias": (_stacked_bias, *_qkv_names(_TOWER_LAYER, "bias")),
    "vision.layers.{}.out": (_kernel, _TOWER_LAYER + "self_attn.out_proj.weight"),
    "vision.layers.{}.out_bias": (_same, _TOWER_LAYER + "self_attn.out_proj.bias"),
    "projector.newline": (_same, "image_newline"),
    "embed.embedding": (_same, EMBEDDING),
    "layers.{}.qkv": (_grouped_qkv, *_qkv_names(_LAYER, "weight")),
    "layers.{}.out": (_kernel, _LAYER + "self_attn.o_proj.weight"),
    "layers.{}.gate_up": (_stacked, _LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    "layers.{}.down": (_kernel, _LAYER + "mlp.down_proj.weight"),
}
# Norms (scale and bias) and linear layers (kernel and bias).
_MODULES = {
    "vision.pre_norm": _TOWER + "pre_layrnorm",
    "vision.post_norm": _TOWER + "post_layernorm",
    "vision.layers.{}.attention_norm": _TOWER_LAYER + "layer_norm1",
    "vision.layers.{}.mlp_norm": _TOWER_LAYER + "layer_norm2",
    "vision.layers.{}.up": _TOWER_LAYER + "mlp.fc1",
    "vision.layers.{}.down": _TOWER_LAYER + "mlp.fc2",
    "projector.linear_1": "multi_modal_projector.linear_1",
    "projector.linear_2": "multi_modal_projector.linear_2",
    "layers.{}.attention_norm": _LAYER + "input_layernorm",
    "layers.{}.mlp_norm": _LAYER + "post_attention_layernorm",
    "head.norm": "language_model.model.norm",
    "head": "language_model.lm_head",
}
for _ours, _theirs in _MODULES.items():
    _TABLE[f"{_ours}.scale"] = _same, f"{_theirs}.weight"
    _TABLE[f"{_ours}.kernel"] = _kernel, f"{_theirs}.weight"
    _TABLE[f"{_ours}.bias"] = _same, f"{_theirs}.bias"

# Applied in this order; each leaves the hub's spelling as it is.
_SPELLINGS = (
    (r"^model\.(?=(?:language_model|vision_tower|multi_modal_projector)\.|image_newline$)", ""),
    (r"^vision_tower\.(?!vision_model\.)", _TOWER),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
)

IGNORED = re.compile(r".*\.(?:rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Buffers that older versions of transformers saved: constants, not weights."""


def hub_name(name: str) -> str:
    """A tensor's name in the hub's spelling, from any spelling that transformers has written.

    Those are the hub's own (`language_model.model.layers.0...`, `vision_tower.vision_model...`),
    the same behind `model.`, and that of transformers 5 (`model.language_model.layers.0...`,
    `lm_head.weight`, no `vision_model.`), in any mixture.
    """
    for pattern, spelling in _SPELLINGS:
        name = re.sub(pattern, spelling, name)
    return name


def parts_of(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray, Shape]]:
    """The tensors inside a parameter: hub name of each, its view and its own shape."""
    layer = r"(?<=layers\.)\d+"
    layout, *tensors = _TABLE[re.sub(layer, "{}", name)]
    names = [tensor.format(*re.findall(layer, name)) for tensor in tensors]
    return [(tensor, *part) for tensor, part in zip(names, layout(array), strict=True)]
