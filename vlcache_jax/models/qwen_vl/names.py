"""Names and layouts of Qwen2.5-VL's weights; see `vlcache_jax.models.names`."""

import numpy as np

from vlcache_jax.models.names import (
    HUB,
    Names,
    Parts,
    convolution,
    decoder_table,
    modules,
)


def fused(x: np.ndarray) -> Parts:
    """[in, n, out ...]: [n * out, in]."""
    return [(np.moveaxis(x, 0, -1), (-1, x.shape[0]))]


def fused_bias(x: np.ndarray) -> Parts:
    """[n, out ...]: [n * out]."""
    return [(x, (-1,))]


_LAYER = "visual.blocks.{}."

QWEN_VL = Names(
    {
        "vision.patch_embedding": (convolution, "visual.patch_embed.proj.weight"),
        "vision.layers.{}.qkv": (fused, _LAYER + "attn.qkv.weight"),
        "vision.layers.{}.qkv_bias": (fused_bias, _LAYER + "attn.qkv.bias"),
        **modules(
            {
                "vision.layers.{}.attention_norm": _LAYER + "norm1",
                "vision.layers.{}.out": _LAYER + "attn.proj",
                "vision.layers.{}.mlp_norm": _LAYER + "norm2",
                "vision.layers.{}.gate": _LAYER + "mlp.gate_proj",
                "vision.layers.{}.up": _LAYER + "mlp.up_proj",
                "vision.layers.{}.down": _LAYER + "mlp.down_proj",
                "projector.norm": "visual.merger.ln_q",
                "projector.linear_1": "visual.merger.mlp.0",
                "projector.linear_2": "visual.merger.mlp.2",
            }
        ),
        **decoder_table(HUB),
    },
    ((r"^model\.(?=visual\.)", ""), (r"^model\.language_model\.", "model.")),
)
"""As on the hub (`visual.blocks.0...`, `model.layers.0...`). Read is also the spelling of
transformers 5 in memory (`model.visual.blocks.0...`, `model.language_model.layers.0...`)."""
