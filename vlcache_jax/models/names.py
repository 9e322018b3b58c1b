"""Names and layouts of weights: which tensors of a checkpoint each parameter holds.

One table says for each parameter which tensors it holds and where they lie in it; reading and
writing use the same row. The decoder's part of it is shared by the families.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Shape = tuple[int, ...]

Parts: TypeAlias = list[tuple[np.ndarray, Shape]]
"""The tensors inside a parameter: of each its view, and its own shape, which merges axes of that
(-1 for what is left)."""

Table: TypeAlias = dict[str, tuple[Callable[[np.ndarray], Parts], *tuple[str, ...]]]
"""Parameters, the layout of each and its tensors; `{}` stands for the layer."""


def same(x: np.ndarray) -> Parts:
    """The tensor as it is."""
    return [(x, x.shape)]


def kernel(x: np.ndarray) -> Parts:
    """[in ..., out]: [out, in]."""
    return [(np.moveaxis(x, -1, 0), (x.shape[-1], -1))]


def convolution(x: np.ndarray) -> Parts:
    """[in, sides ..., out]: the kernel of a convolution, [out, in, sides ...]."""
    return same(np.moveaxis(x, -1, 0))


def stacked(x: np.ndarray) -> Parts:
    """[in, n, out ...]: n times [out, in]."""
    return [(np.moveaxis(x[:, i], 0, -1), (-1, x.shape[0])) for i in range(x.shape[1])]


def _grouped_qkv(x: np.ndarray) -> Parts:
    """[D, K, G + 2, H]: q [K * G * H, D] (query head n = k * G + g), k and v [K * H, D]."""
    heads = np.moveaxis(x, 0, -1)  # [K, G + 2, H, D]
    return [(heads[:, rows], (-1, x.shape[0])) for rows in (slice(-2), -2, -1)]


def _grouped_bias(x: np.ndarray) -> Parts:
    """[K, G + 2, H]: q [K * G * H], k and v [K * H]."""
    return [(x[:, rows], (-1,)) for rows in (slice(-2), -2, -1)]


def modules(names: Mapping[str, str]) -> Table:
    """Rows for norms (scale and bias) and linear layers (kernel and bias), by their modules."""
    table: Table = {}
    for ours, theirs in names.items():
        table[f"{ours}.scale"] = same, f"{theirs}.weight"
        table[f"{ours}.kernel"] = kernel, f"{theirs}.weight"
        table[f"{ours}.bias"] = same, f"{theirs}.bias"
    return table


HUB = {
    "embed": "model.embed_tokens",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "out": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""A decoder's modules as Hugging Face calls them."""


_HEAD_NORMS = ("q_norm", "k_norm")


def decoder_table(names: Mapping[str, str], prefix: str = "") -> Table:
    """The table of a decoder.

    Args:
        names: its modules, by the keys of `HUB`.
        prefix: in front of each.
    """
    tensor = {ours: f"{prefix}{theirs}.weight" for ours, theirs in names.items()}
    module = {ours: f"{prefix}{theirs}" for ours, theirs in names.items()}
    return {
        "embed.embedding": (same, tensor["embed"]),
        "layers.{}.qkv": (_grouped_qkv, tensor["q"], tensor["k"], tensor["v"]),
        "layers.{}.qkv_bias": (_grouped_bias, *(f"{module[name]}.bias" for name in "qkv")),
        "layers.{}.out": (kernel, tensor["out"]),
        "layers.{}.gate_up": (stacked, tensor["gate"], tensor["up"]),
        "layers.{}.down": (kernel, tensor["down"]),
        **modules(
            {
                **{f"layers.{{}}.{name}": module[name] for name in _HEAD_NORMS if name in module},
                "layers.{}.attention_norm": module["attention_norm"],
                "layers.{}.mlp_norm": module["mlp_norm"],
                "head.norm": module["norm"],
                "head": module["head"],
            }
        ),
    }


IGNORED = re.compile(r".*\.(?:rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Buffers that older versions of transformers saved: constants, not weights."""


@dataclass(frozen=True, eq=False)
class Names:
    """The names of a family's weights.

    Attributes:
        table: which tensors each parameter holds.
        spellings: patterns and what stands in their place, applied in this order; each leaves the
            table's own spelling as it is.
    """

    table: Table
    spellings: tuple[tuple[str, str], ...] = ()

    @property
    def embedding(self) -> str:
        """The tensor of the embedding."""
        return str(self.table["embed.embedding"][1])

    @property
    def head(self) -> str:
        """The tensor of the output projection."""
        return str(self.table["head.kernel"][1])

    def own(self, name: str) -> str:
        """A tensor's name as the table has it, from any spelling of it."""
        for pattern, spelling in self.spellings:
            name = re.sub(pattern, spelling, name)
        return name

    def parts_of(self, name: str, array: np.ndarray) -> list[tuple[str, np.ndarray, Shape]]:
        """The tensors inside a parameter: name of each, its view and its own shape."""
        layer = r"(?<=layers\.)\d+"
        layout, *tensors = self.table[re.sub(layer, "{}", name)]
        names = [tensor.format(*re.findall(layer, name)) for tensor in tensors]
        return [(tensor, *part) for tensor, part in zip(names, layout(array), strict=True)]


DECODER = Names(decoder_table(HUB))
"""A decoder alone."""
