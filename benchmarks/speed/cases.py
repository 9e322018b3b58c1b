"""What is timed: a model at one size, and the ways to keep its cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import (
    MODELS,
    SMALL_TOWER,
    WINDOW,
    most_tiles,
    with_places,
    with_positions,
)
from benchmarks.roofline.packed import bits_of, rows_by_width
from vlcache_jax import demo
from vlcache_jax.cache.allocate import allocate
from vlcache_jax.cache.budget import Prompt
from vlcache_jax.cache.method import AnyPool, CacheMethod
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.models.config import ModelConfig, TextConfig
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.results.report import kv_bits
from vlcache_jax.running.generate import CHUNK, Generate

PAGES = Path(demo.__file__).parent / "pages" / "checkpoint" / "config.json"
"""Of the model that reads pages; its decoder's weights are another package's."""

_SMALL = TextConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_positions=8192,
)


@cache
def models() -> Mapping[str, ModelConfig]:
    """All shapes by name: the shipped models', two that a CPU can run, the published ones."""
    mha = LlavaConfig(family="llava", vision=SMALL_TOWER, text=_SMALL, vision_layers=2)
    wide = replace(_SMALL, hidden_size=1024, intermediate_size=2816, num_heads=16)
    return {
        "demo-small": LlavaConfig.from_file(demo.MODELS["demo-small"] / "config.json"),
        "pages": LlavaConfig.from_file(PAGES),
        "small-mha": mha,
        "small-gqa": replace(mha, text=wide),
        **MODELS,
    }


Variants = Sequence[CacheMethod]
"""Ways to keep the cache."""


def name_of(cache: CacheMethod) -> str:
    """For tables and files: the method, the bits as the command line says them, and the budget."""
    bits = kv_bits(cache.quantize)
    words = cache.name + ("" if bits is None else f"+{bits}")
    return words if cache.limit.keeps_all else f"{words} {cache.limit}"


@dataclass(frozen=True)
class Case:
    """One model at one size.

    Attributes:
        model: a name of `models`.
        context: tokens of each prompt, which is also the bucket.
        batch: sequences.
        dtype: of weights and cache.
        images: each prompt comes with the most tiles that one image becomes; without, visual tokens
            are ordinary ones that only the method takes for visual, and no tower runs.
        new_tokens: of a whole answer.
        chunk: most decode steps of one program.
        text: tokens of each prompt behind its picture.
    """

    model: str
    context: int
    batch: int = 1
    dtype: str = "float32"
    images: bool = False
    new_tokens: int = 100
    chunk: int = CHUNK
    text: int = WINDOW

    @cached_property
    def config(self) -> ModelConfig:
        """The model, with positions for the tokens of a prompt and its answer."""
        return with_positions(models()[self.model], self.context + self.new_tokens)

    @property
    def synthetic_positions(self) -> bool:
        """The model was not made for so many positions."""
        return self.config != models()[self.model]

    def generate(self, variant: CacheMethod, new_tokens: int) -> Generate:
        """How a variant answers with so many tokens."""
        return Generate(self.config, variant, new_tokens, chunk=self.chunk)

    def lengths(self, variant: CacheMethod, seed: int = 0) -> jax.Array:
        """Rows of each layer in the cache, int32 [B, L]; another seed is another batch of prompts.

        The sizes are those of the method's own division, by the sparsities that the paper reports.
        """
        shape = self.batch, self.config.text.num_layers
        if variant.limit.keeps_all:
            return jnp.full(shape, self.context, jnp.int32)
        return layer_rows(variant, paper_sparsity(*shape, seed), self.context)

    def rows_by_width(self, variant: CacheMethod, seed: int = 0) -> np.ndarray:
        """The same rows by their width: full width, then the quantizer's; int [B, L, 1 + widths].

        All text of `inputs` and all pivots are among them, see `roofline.packed`.
        """
        lengths = np.asarray(self.lengths(variant, seed))
        quantizer = variant.for_model(self.config.text).quantize
        if quantizer is None:
            return lengths[..., None]
        return rows_by_width(quantizer, lengths, evicts=not variant.limit.keeps_all)

    def stored_bits(self, variant: CacheMethod, rows: np.ndarray | None = None) -> float:
        """Bits of a value of the cache, with the scales that belong to it.

        Args:
            variant: how the cache is kept.
            rows: by their width; those of `rows_by_width` by default.
        """
        quantizer = variant.for_model(self.config.text).quantize
        if quantizer is None:
            return 16.0
        rows = self.rows_by_width(variant) if rows is None else rows
        return bits_of(self.config.text, quantizer, rows, jnp.dtype(self.dtype))

    def kept(self, variant: CacheMethod, pool: AnyPool) -> dict[str, float]:
        """Rows in a pool as a share of all, bits of a value of it, and its bytes as a share."""
        share = float(pool.length.mean()) / self.context
        bits = self.stored_bits(variant, np.asarray(pool.counts))
        return {"kept_share": share, "stored_bits": bits, "kept_bytes_share": share * bits / 16}

    def inputs(self, seed: int = 0, length: int | None = None) -> ModelInputs:
        """Random prompts: a picture's tokens, then those of text.

        Args:
            seed: of the tokens.
            length: of each prompt, the whole context by default; the rest of the bucket is padding.
        """
        config, rows = self.config, self.context
        rng = np.random.default_rng(seed)
        length = rows if length is None else length
        lengths = np.full((self.batch,), length, np.int32)
        visible = np.arange(rows) < lengths[:, None]
        tokens = np.where(visible, rng.integers(5, config.text.vocab_size, visible.shape), 0)
        visual = np.arange(rows) < np.maximum(lengths - self.text, 0)[:, None]
        tiles = most_tiles(config, rows) if self.images else 0
        side, patches = config.tile_side, config.tile_tokens
        table = np.arange(rows)[None] % max(1, tiles * patches)
        table = table + np.arange(self.batch)[:, None] * tiles * patches
        inputs = ModelInputs(
            tokens=tokens.astype(np.int32),
            length=lengths,
            visual_index=np.where(visual, table, -1).astype(np.int32),
            tiles=rng.standard_normal((self.batch * tiles, 3, side, side), np.float32),
        )
        return with_places(config, inputs)


def layer_rows(cache: CacheMethod, sparsity: np.ndarray, context: int) -> jax.Array:
    """Rows of each layer as a method divides its budget by sparsities [B, L], int32 [B, L].

    A rule by scores is shown ones that fall off the faster, the sparser a layer is (a choice).
    """
    batch, layers = sparsity.shape
    m, visual = jnp.full((batch,), context, jnp.int32), jnp.zeros((batch, context), bool)
    prompt = Prompt(m, visual, layers, cache.limit.data)
    rule, shown = cache.rules()[1], jnp.asarray(sparsity, jnp.float32)
    if rule.by_scores:
        place = jnp.arange(context, dtype=jnp.float32) / context
        shown = jnp.exp(-place / (1 - shown)[:, :, None, None])
    return allocate(rule.sizes(prompt, shown), prompt.budget, m)


def paper_sparsity(batch: int, layers: int, seed: int = 0) -> np.ndarray:
    """Layer sparsities such as VL-Cache reports (sections 3 and 5), float32 [B, L].

    The paper says that they are from 70 to 99 % and that the first two layers are densest. A choice
    of this benchmark: 70 and 75 %, then evenly from 85 to 99 %, and each prompt's densities up to a
    tenth above or below.
    """
    sparsity = np.concatenate([[0.70, 0.75], np.linspace(0.85, 0.99, max(layers - 2, 1))])[:layers]
    spread = np.random.default_rng(seed).uniform(0.9, 1.1, (batch, layers))
    return np.clip(1 - (1 - sparsity) * spread, 0.70, 0.99).astype(np.float32)


FULL = FullCache()
