"""Names and layouts of Qwen3-VL's weights; see `vlcache_jax.models.names`."""

from vlcache_jax.models.names import HUB, Names, convolution, decoder_table, modules, same
from vlcache_jax.models.qwen_vl.names import fused, fused_bias

_TOWER = "model.visual."
_LAYER = _TOWER + "blocks.{}."
_DEEP = _TOWER + "deepstack_merger_list.{}."
_DECODER = {ours: theirs.replace("model.", "model.language_model.") for ours, theirs in HUB.items()}

QWEN3_VL = Names(
    {
        "vision.patch_embedding": (convolution, _TOWER + "patch_embed.proj.weight"),
        "vision.patch_bias": (same, _TOWER + "patch_embed.proj.bias"),
        "vision.position_embedding": (same, _TOWER + "pos_embed.weight"),
        "vision.layers.{}.qkv": (fused, _LAYER + "attn.qkv.weight"),
        "vision.layers.{}.qkv_bias": (fused_bias, _LAYER + "attn.qkv.bias"),
        **modules(
            {
                "vision.layers.{}.attention_norm": _LAYER + "norm1",
                "vision.layers.{}.out": _LAYER + "attn.proj",
                "vision.layers.{}.mlp_norm": _LAYER + "norm2",
                "vision.layers.{}.up": _LAYER + "mlp.linear_fc1",
                "vision.layers.{}.down": _LAYER + "mlp.linear_fc2",
                "projector.norm": _TOWER + "merger.norm",
                "projector.linear_1": _TOWER + "merger.linear_fc1",
                "projector.linear_2": _TOWER + "merger.linear_fc2",
                "projector.deep_layers.{}.norm": _DEEP + "norm",
                "projector.deep_layers.{}.linear_1": _DEEP + "linear_fc1",
                "projector.deep_layers.{}.linear_2": _DEEP + "linear_fc2",
            }
        ),
        **decoder_table(_DECODER),
    },
    (
        (r"^visual\.", _TOWER),
        (r"^model\.(?=(?:embed_tokens|layers|norm)\.)", "model.language_model."),
    ),
)
"""As on the hub (`model.visual.blocks.0...`, `model.language_model.layers.0...`). Read is also
Qwen2.5-VL's spelling there (`visual.blocks.0...`, `model.layers.0...`)."""
