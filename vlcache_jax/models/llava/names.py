"""Names and layouts of LLaVA's weights; see `vlcache_jax.models.names`."""

import numpy as np

from vlcache_jax.models.names import (
    HUB,
    Names,
    Parts,
    convolution,
    decoder_table,
    kernel,
    modules,
    same,
    stacked,
)


def _stacked_bias(x: np.ndarray) -> Parts:
    """[n, out ...]: n times [out]."""
    return [(x[i], (-1,)) for i in range(x.shape[0])]


_TOWER = "vision_tower.vision_model."
_LAYER = _TOWER + "encoder.layers.{}."


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_LAYER}self_attn.{name}_proj.{kind}" for name in "qkv")


LLAVA = Names(
    {
        "vision.patch_embedding": (convolution, _TOWER + "embeddings.patch_embedding.weight"),
        "vision.patch_bias": (same, _TOWER + "embeddings.patch_embedding.bias"),
        "vision.class_embedding": (same, _TOWER + "embeddings.class_embedding"),
        "vision.position_embedding": (same, _TOWER + "embeddings.position_embedding.weight"),
        "vision.layers.{}.qkv": (stacked, *_qkv("weight")),
        "vision.layers.{}.qkv_bias": (_stacked_bias, *_qkv("bias")),
        "vision.layers.{}.out": (kernel, _LAYER + "self_attn.out_proj.weight"),
        "vision.layers.{}.out_bias": (same, _LAYER + "self_attn.out_proj.bias"),
        "projector.newline": (same, "image_newline"),
        **modules(
            {
                "vision.pre_norm": _TOWER + "pre_layrnorm",
                "vision.post_norm": _TOWER + "post_layernorm",
                "vision.layers.{}.attention_norm": _LAYER + "layer_norm1",
                "vision.layers.{}.mlp_norm": _LAYER + "layer_norm2",
                "vision.layers.{}.up": _LAYER + "mlp.fc1",
                "vision.layers.{}.down": _LAYER + "mlp.fc2",
                "projector.linear_1": "multi_modal_projector.linear_1",
                "projector.linear_2": "multi_modal_projector.linear_2",
            }
        ),
        **decoder_table(HUB, "language_model."),
    },
    (
        (r"^model\.(?=(?:language_model|vision_tower|multi_modal_projector)\.|image_newline$)", ""),
        (r"^vision_tower\.(?!vision_model\.)", _TOWER),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    ),
)
"""As on the hub (`language_model.model.layers.0...`, `vision_tower.vision_model...`). Read are also
the same behind `model.`, and the spelling of transformers 5 (`model.language_model.layers.0...`,
`lm_head.weight`, no `vision_model.`), in any mixture."""
