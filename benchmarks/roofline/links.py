"""The limit of a decode step on several devices: what each reads, and what crosses between them.

A device of `model=n` reads its share of the weights and of the caches, and takes part in two
all-reduces of the residual stream for each layer, one for the embedding, and the gathering of the
logits (docs/distributed.md). As bytes alone: what a collective costs to begin is no part of the
floor, and is counted instead. An all-reduce sends 2 (n - 1) / n of its array from each device, as a
reduce-scatter and an all-gather do (Thakur et al. 2005, section 4.5).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.documents import table
from benchmarks.roofline import (
    BFLOAT16,
    TAIL_ROWS,
    WORKSPACE,
    Device,
    decode_step,
    language_bytes,
    sequence_bytes,
    vision_bytes,
)
from benchmarks.roofline.packed import Caches
from vlcache_jax.distributed.mesh import check_fits
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.results.report import human_bytes


@dataclass(frozen=True)
class Link:
    """What connects devices.

    Attributes:
        name: for people.
        bandwidth: bytes per second that each device sends, while it receives as many.
        source: where the number comes from.
    """

    name: str
    bandwidth: float
    source: str


LINKS: Mapping[str, Link] = {
    "nvlink": Link(
        "NVLink 4", 450e9, "NVIDIA H100 and H200 data sheets: 900 GB/s, both directions together"
    ),
    "infiniband": Link(
        "InfiniBand NDR", 50e9, "NVIDIA DGX H100 data sheet: a ConnectX-7 of 400 Gb/s for each GPU"
    ),
}
"""The links that can be named; peaks of data sheets, which no program reaches."""


@dataclass(frozen=True)
class Split:
    """A decoder on the devices of a `model` axis.

    Attributes:
        config: the model.
        devices: how many.
        link: between them.

    Raises:
        ValueError: they cannot share the heads.
    """

    config: ModelConfig
    devices: int
    link: Link

    def __post_init__(self):
        check_fits(self.config.text, self.devices, self.devices)

    @property
    def cache_parts(self) -> int:
        """Parts of a cache that differ: more devices hold copies of kv heads."""
        return math.gcd(self.config.text.num_kv_heads, self.devices)

    @property
    def collectives(self) -> int:
        """Exchanges of a step that come one after the other."""
        return 2 * self.config.text.num_layers + 2 if self.devices > 1 else 0

    def sent(self, batch: int) -> float:
        """Bytes that a device sends in a step."""
        text, others = self.config.text, (self.devices - 1) / self.devices
        residual = batch * text.hidden_size * BFLOAT16.itemsize
        reduced = (2 * text.num_layers + 1) * 2 * others * residual
        return reduced + others * batch * text.vocab_size * 4

    def read(
        self, context: int, batch: int, budget: float, bits: float, *, tail: int = 0
    ) -> dict[str, float]:
        """Bytes that a device reads in a step: of weights, and of caches."""
        each = sequence_bytes(self.config, context, budget, bits, tail=tail)
        weights = language_bytes(self.config) / self.devices
        return {"weights": weights, "caches": batch * each / self.cache_parts}

    def floor(
        self, device: Device, context: int, batch: int, budget: float, bits: float, tail: int = 0
    ) -> float:
        """Seconds of a step that nothing can beat: exchanges wait for what is exchanged."""
        step = decode_step(self.config, context, batch, budget, bits, tail=tail)
        moved = sum(self.read(context, batch, budget, bits, tail=tail).values())
        own = max(moved / device.bandwidth, step.operations / self.devices / device.flops)
        return own + self.sent(batch) / self.link.bandwidth

    def largest_batch(self, device: Device, context: int, budget: float, bits: float) -> int:
        """`roofline.largest_batch` of all devices together; each has the whole tower."""
        weights = language_bytes(self.config) / self.devices + vision_bytes(self.config)
        each = sequence_bytes(self.config, context, budget, bits, tail=TAIL_ROWS)
        room = device.memory - weights - WORKSPACE
        return max(0, math.floor(room / (each / self.cache_parts)))


def split_rows(
    split: Split, device: Device, context: int, batch: int, compared: Caches
) -> list[dict[str, Any]]:
    """A step of every cache on several devices, and how many sequences fit."""
    found = []
    for name, cache in compared.items():
        kept = cache.kept(split.config, context)
        most = split.largest_batch(device, context, *kept)
        step = split.floor(device, context, most, *kept, tail=TAIL_ROWS)
        found.append(
            {
                "cache": name,
                "read_bytes": {
                    part: round(size) for part, size in split.read(context, batch, *kept).items()
                },
                "sent_bytes": round(split.sent(batch)),
                "collectives": split.collectives,
                "floor_s": split.floor(device, context, batch, *kept),
                "largest_batch": most,
                "tokens_per_s": most / step if most else 0.0,
            }
        )
    return found


def split_table(split: Split, rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = [f"on each of {split.devices}", "reads", "of it caches", "sends", "exchanges"]
    head += ["step, at least", "largest batch", "tokens/s then"]
    cells = [
        [
            row["cache"],
            human_bytes(sum(row["read_bytes"].values())),
            human_bytes(row["read_bytes"]["caches"]),
            human_bytes(row["sent_bytes"]),
            str(row["collectives"]),
            f"{row['floor_s'] * 1e3:,.3f} ms",
            f"{row['largest_batch']:,}",
            f"{row['tokens_per_s']:,.0f}",
        ]
        for row in rows
    ]
    link = split.link
    words = f"Over {link.name}, {link.bandwidth / 1e9:.4g} GB/s each way ({link.source}):"
    return f"{words}\n\n{table(head, cells)}"
