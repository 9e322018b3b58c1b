"""Names and layouts of Qwen2.5-VL's weights; see `vlcache_jax.models.names`."""

from collections.abc import Mapping

import numpy as np

from vlcache_jax.models.names import (
    HUB,
    Names,
    Parts,
    Table,
    convolution,
    decoder_table,
    modules,
)


def _fused(x: np.ndarray) -> Parts:
    """[in, n, out ...]: [n * out, in]."""
    return [(np.moveaxis(x, 0, -1), (-1, x.shape[0]))]


def _fused_bias(x: np.ndarray) -> Parts:
    """[n, out ...]: [n * out]."""
    return [(x, (-1,))]


def tower_table(prefix: str, own: Mapping[str, str]) -> Table:
    """The table of a tower and of what stands between it and the decoder.

    Args:
        prefix: in front of each tensor.
        own: the modules that not every tower of the line has under the same name.
    """
    shared = {
        "vision.layers.{}.attention_norm": "blocks.{}.norm1",
        "vision.layers.{}.out": "blocks.{}.attn.proj",
        "vision.layers.{}.mlp_norm": "blocks.{}.norm2",
    }
    return {
        "vision.patch_embedding": (convolution, f"{prefix}patch_embed.proj.weight"),
        "vision.layers.{}.qkv": (_fused, f"{prefix}blocks.{{}}.attn.qkv.weight"),
        "vision.layers.{}.qkv_bias": (_fused_bias, f"{prefix}blocks.{{}}.attn.qkv.bias"),
        **modules({ours: prefix + theirs for ours, theirs in {**shared, **own}.items()}),
    }


QWEN_VL = Names(
    {
        **tower_table(
            "visual.",
            {
                "vision.layers.{}.gate": "blocks.{}.mlp.gate_proj",
                "vision.layers.{}.up": "blocks.{}.mlp.up_proj",
                "vision.layers.{}.down": "blocks.{}.mlp.down_proj",
                "projector.norm": "merger.ln_q",
                "projector.linear_1": "merger.mlp.0",
                "projector.linear_2": "merger.mlp.2",
            },
        ),
        **decoder_table(HUB),
    },
    ((r"^model\.(?=visual\.)", ""), (r"^model\.language_model\.", "model.")),
)
"""As on the hub (`visual.blocks.0...`, `model.layers.0...`). Read is also the spelling of
transformers 5 in memory (`model.visual.blocks.0...`, `model.language_model.layers.0...`)."""
