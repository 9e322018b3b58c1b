"""The limit: bytes that must move and operations that must run, and what they cost on a device.

Pure arithmetic on a model's shapes; nothing is compiled and nothing is allocated. A context may be
longer than the model has positions for. Of the model only the decoder counts: the floors are those
of the language model, from embedded prompts on, in bfloat16.

    prefill ─► scoring, selection, compaction ─► decode step ─► decode step ...

What counts, everywhere: all weights of the language model once (its embedding table too, though a
step reads one row of it for each token), keys and values once, products at two operations for each
weight and token, causal attention at the entries that the mask leaves. What a program stores and
reads again in between is no part of the limit, and no rows are padded.

Everywhere `context` are the tokens of a prompt, m, `batch` are prompts or their sequences, `budget`
is the share of their cache that is kept (1 keeps all), and `bits` are those of a value of the pool
with its scales: 16, or 2.5 rather than 2.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from benchmarks.ahead_of_time import GPUS
from benchmarks.models import WINDOW
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.results.report import count_parameters, token_bytes

BFLOAT16 = jnp.dtype(jnp.bfloat16)
SCORE_BYTES = INDEX_BYTES = 4  # float32 and int32

TAIL_ROWS = 128
"""Rows for new tokens that every sequence is given room for."""

WORKSPACE = 2 * 10**9
"""Bytes of device memory left to temporaries where the largest batch is asked for."""


@dataclass(frozen=True)
class Device:
    """What a device can do.

    Attributes:
        name: for people.
        bandwidth: bytes per second that its memory moves, reads and writes together.
        flops: bfloat16 operations of matrix products per second.
        memory: bytes that a program may use.
        source: where the numbers come from: "measured" or "vendor peak".
    """

    name: str
    bandwidth: float
    flops: float
    memory: float
    source: str


def _vendor_peak(gpu: str, flops: float) -> Device:
    found = GPUS[gpu]
    return Device(found.name, found.bandwidth, flops, found.memory, "vendor peak")


DEVICES: Mapping[str, Device] = {
    "h200": Device(GPUS["h200"].name, 4.3e12, 790e12, 139 * 2**30, "measured"),
    "h100": _vendor_peak("h100", 989.4e12),
    "a100": _vendor_peak("a100", 312e12),
}
"""The devices that can be named. Measured: a copy and a product of large arrays. Peaks: of data
sheets, products without sparsity; no program reaches them. Their memory is all that the driver
shows."""


@dataclass(frozen=True)
class Work:
    """What must be done at least.

    Attributes:
        bytes: moved from and to the device's memory.
        operations: of matrix products; a multiplication and an addition are two.
    """

    bytes: float
    operations: float = 0.0

    def floor(self, device: Device) -> float:
        """Seconds that nothing can beat, with bytes and operations side by side."""
        return max(self.bytes / device.bandwidth, self.operations / device.flops)


@dataclass(frozen=True)
class Stage:
    """Works by name that come one after the other, each needing what the one before it made."""

    parts: Mapping[str, Work]

    @property
    def bytes(self) -> float:
        """Of all parts."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def operations(self) -> float:
        """Of all parts."""
        return sum(part.operations for part in self.parts.values())

    def floor(self, device: Device) -> float:
        """Seconds that nothing can beat: one part after the other."""
        return sum(part.floor(device) for part in self.parts.values())


def prefill(config: ModelConfig, context: int, batch: int = 1, *, rows: int | None = None) -> Stage:
    """Run prompts of `context` tokens through the decoder; the head multiplies their last rows.

    All of their rows, or the last `rows` of each, behind the others' keys and values.
    """
    text, own = config.text, context if rows is None else rows
    layers, head = _multiplied(config)
    kept, read = (batch * count * token_bytes(text, BFLOAT16) for count in (own, context))
    entries = batch * _window_entries(context, own)
    operations = 2 * batch * (own * layers + head)
    return Stage(
        {
            "products": Work(language_bytes(config) + kept, operations),
            "attention": Work(read, 4 * entries * _heads_width(config)),
        }
    )


def scoring(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    budget: float = 0.1,
    bits: float = 16,
    *,
    window: int = WINDOW,
) -> Stage:
    """What a method adds to the prefill: score by the prompt's last rows, select, compact.

    The score watches `window` rows, 50 in the paper's table of speeds.
    """
    text, window = config.text, min(window, context)
    heads = batch * text.num_layers * text.num_kv_heads
    cache = batch * context * token_bytes(text, BFLOAT16)
    queries = batch * window * _heads_width(config) * BFLOAT16.itemsize
    scores, order = heads * context * SCORE_BYTES, heads * budget * context * INDEX_BYTES
    entries = batch * _window_entries(context, window)
    return Stage(
        {
            "scores": Work(cache / 2 + queries + scores, 2 * entries * _heads_width(config)),
            "selection": Work(scores + order),
            "compaction": Work(order + cache * budget * (1 + bits / 16)),
        }
    )


def packing(config: ModelConfig, context: int, batch: int = 1, bits: float = 16) -> Stage:
    """What a quantizer adds to the prefill where nothing is evicted: it reads and writes it all."""
    cache = batch * context * token_bytes(config.text, BFLOAT16)
    return Stage({"packing": Work(cache * (1 + bits / 16))})


def decode_step(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    budget: float = 1.0,
    bits: float = 16,
    *,
    tail: int = 0,
) -> Stage:
    """One token for every sequence, which has `tail` rows of new tokens by now, in bfloat16."""
    layers, head = _multiplied(config)
    entries = batch * (context * budget + tail)
    return Stage(
        {
            "products": Work(language_bytes(config), 2 * batch * (layers + head)),
            "attention": Work(
                batch * sequence_bytes(config, context, budget, bits, tail=tail),
                4 * entries * _heads_width(config),
            ),
        }
    )


def sequence_bytes(
    config: ModelConfig, context: int, budget: float = 1.0, bits: float = 16, *, tail: int = 0
) -> float:
    """Bytes of one sequence's cache: its share of the prompt, and a tail in bfloat16."""
    return (context * budget * bits / 16 + tail) * token_bytes(config.text, BFLOAT16)


def largest_batch(
    device: Device, config: ModelConfig, context: int, budget: float = 1.0, bits: float = 16
) -> int:
    """Most sequences whose caches fit beside the whole model; 0 where not even the model fits.

    `WORKSPACE` is left to temporaries, and every sequence has a tail of `TAIL_ROWS`. The prefill of
    such a batch runs a few sequences at a time.
    """
    room = device.memory - language_bytes(config) - vision_bytes(config) - WORKSPACE
    each = sequence_bytes(config, context, budget, bits, tail=TAIL_ROWS)
    return max(0, math.floor(room / each))


def tokens_per_second(
    device: Device,
    config: ModelConfig,
    context: int,
    batch: int,
    budget: float = 1.0,
    bits: float = 16,
) -> float:
    """Tokens of all sequences together, at most, with `TAIL_ROWS` new ones of each in the cache."""
    step = decode_step(config, context, batch, budget, bits, tail=TAIL_ROWS)
    return batch / step.floor(device)


def language_bytes(config: ModelConfig) -> int:
    """Bytes of the decoder's weights: embedding, layers and head."""
    count = _parameters(config)
    return BFLOAT16.itemsize * (count["embed"] + count["layers"] + count["head"])


def vision_bytes(config: ModelConfig) -> int:
    """Bytes of the weights that only a prompt's images need: tower and projector."""
    count = _parameters(config)
    return BFLOAT16.itemsize * (count.get("vision", 0) + count.get("projector", 0))


_parameters = functools.cache(count_parameters)


def _multiplied(config: ModelConfig) -> tuple[int, int]:
    """Weights that a token is multiplied with: of the layers, and of the head."""
    count = _parameters(config)
    return count["layers"], count["embed" if config.text.tie_embeddings else "head"]


def _heads_width(config: ModelConfig) -> int:
    """Width of the query heads of all layers, L * N * H."""
    text = config.text
    return text.num_layers * text.num_heads * text.head_dim


def _window_entries(context: int, window: int) -> float:
    """Entries of the attention of a prompt's last `window` rows that the causal mask leaves."""
    return window * (context - (window - 1) / 2)
