"""Names and layouts of Qwen3-VL's weights; see `vlcache_jax.models.names`."""

from vlcache_jax.models.names import HUB, Names, decoder_table, same
from vlcache_jax.models.qwen_vl.names import tower_table

_TOWER = "model.visual."
_DECODER = {ours: theirs.replace("model.", "model.language_model.") for ours, theirs in HUB.items()}

QWEN3_VL = Names(
    {
        "vision.patch_bias": (same, f"{_TOWER}patch_embed.proj.bias"),
        "vision.position_embedding": (same, f"{_TOWER}pos_embed.weight"),
        **tower_table(
            _TOWER,
            {
                "vision.layers.{}.up": "blocks.{}.mlp.linear_fc1",
                "vision.layers.{}.down": "blocks.{}.mlp.linear_fc2",
                "projector.norm": "merger.norm",
                "projector.linear_1": "merger.linear_fc1",
                "projector.linear_2": "merger.linear_fc2",
                "projector.deep_layers.{}.norm": "deepstack_merger_list.{}.norm",
                "projector.deep_layers.{}.linear_1": "deepstack_merger_list.{}.linear_fc1",
                "projector.deep_layers.{}.linear_2": "deepstack_merger_list.{}.linear_fc2",
            },
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
