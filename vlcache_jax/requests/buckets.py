"""Buckets: the few sizes that array shapes are padded up to.

Every new shape compiles a new program, so prompt length and tile count are rounded up to one of a
short, geometric list of sizes: the coarser it is, the fewer the programs and the more the padding.
The default prompt sizes, {1, 1.5} * 2^k, were chosen by drawing 100 pictures with sides uniform or
log-uniform in 32..2000 pixels and 8 to 80 tokens of question, many times over (means; the padding
is the share of all prompt rows):

| sizes                          | NeXT: programs, padding | LLaVA-1.5: programs, padding |
|--------------------------------|-------------------------|------------------------------|
| {1} * 2^k                      | 3, 31-33 %              | 1, 39 %                      |
| {1, 1.5} * 2^k                 | 4-5, 17 %               | 1, 19 %                      |
| {1, 1.25, 1.5, 1.75} * 2^k     | 8-9, 9 %                | 2, 7-8 %                     |

Where each tile is one token of a prompt, as in Qwen2.5-VL, there are as many numbers of tiles as
sizes of pictures. Then one list serves both: a prompt of T rows has T - 96 for tiles, and is of the
first size with room for its tokens and for its tiles. For the same pictures, with 30 to 110 tokens
of text, at the published limits:

| sizes                           | programs, most | padding of prompts | padding of tiles |
|---------------------------------|----------------|--------------------|------------------|
| 128 * 1.5^k                     | 11             | 20-25 %            | 20-24 %          |
| 128 * 1.7^k                     | 8              | 26-29 %            | 26-30 %          |
| 128 * 2^k                       | 7              | 32-35 %            | 32-37 %          |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from vlcache_jax.errors import whole_numbers
from vlcache_jax.models.config import ModelConfig

WORDS = 96
"""Rows of a prompt that hold no tiles, where each tile is one token."""

FEW_TILES = 256
"""Tiles of one token each that are not worth a program of their own for fewer."""


@dataclass(frozen=True)
class Buckets:
    """The sizes that shapes are padded up to, each list in increasing order.

    Beyond the end of a list the sizes go on by doubling the last one (`bucket_for`).

    Attributes:
        prompt: T, prompt tokens.
        tiles: S, image tiles of a whole batch; 0 first, so that text alone runs no vision tower,
            and nothing else where there is none. None where each tile is one token of a prompt:
            then as many as there are prompt rows but for `WORDS` of each prompt, or a quarter, a
            quarter of that, ... of them.
    """

    prompt: tuple[int, ...]
    tiles: tuple[int, ...] | None

    def __post_init__(self) -> None:
        for name, lowest in (("prompt", 1), ("tiles", 0)):
            if name == "tiles" and self.tiles is None:
                continue
            sizes = whole_numbers(getattr(self, name), f"buckets for {name}", least=None)
            object.__setattr__(self, name, sizes)
            rising = all(a < b for a, b in pairwise(sizes))
            if not sizes or sizes[0] < lowest or not rising:
                raise ValueError(
                    f"buckets for {name} must be increasing whole numbers from {lowest} on, "
                    f"at least one of them, not {sizes}"
                )

    def rows_for(self, tokens: int, tiles: int) -> int:
        """T of a prompt with so many tokens and tiles."""
        if self.tiles is None and tiles:  # else one T had several S
            tokens = max(tokens, min(tiles + WORDS, self.prompt[-1]))
        return bucket_for(tokens, self.prompt)

    def tiles_for(self, count: int, rows: int, prompts: int = 1) -> int:
        """S of a batch with so many tiles in prompts of T rows."""
        if self.tiles is not None:
            return bucket_for(count, self.tiles)
        size = prompts * (rows - WORDS)
        if count > size:  # in the last bucket
            size = prompts * rows
        while size // 4 >= max(count, FEW_TILES):
            size //= 4
        return size if count else 0

    def tile_sizes(self, rows: int, config: ModelConfig) -> list[int]:
        """S of one prompt with pictures, in buckets of up to T rows.

        Where a tile is several tokens, what is cropped of a picture's tiles leaves room for others:
        for as many as one picture has, more are not counted.
        """
        if self.tiles is not None:
            most = rows // config.tile_tokens + config.max_tiles
            return sorted({self.tiles_for(count, rows) for count in range(1, most + 1)})
        sizes = [*(size for size in self.prompt if size < rows), rows]
        most = {size: size if size >= self.prompt[-1] else size - WORDS for size in sizes}
        found = (self.tiles_for(count, t) for t in sizes for count in range(1, most[t] + 1))
        return sorted(set(found))


def default_buckets(config: ModelConfig) -> Buckets:
    """The buckets for a model.

    Prompts: 64, 96, 128, 192, ... below the model's positions, which are the last size.
    Tiles: none, then the most that one image becomes (5 for the usual NeXT, 1 for LLaVA-1.5), or
    half of it and half again where that is more than 8 (5 of OneVision's 37), doubled and doubled
    again; of a model that takes no pictures, none.

    Where each tile is one token, prompts are of as many lengths as pictures of sizes: fewer sizes
    then, 128, 224, 384, 640, 1056, 1824, ..., and those of the tiles follow from them.
    """
    last, most = config.text.max_positions, config.max_tiles
    if config.tile_tokens == 1:
        sizes = (32 * round(4 * 1.7**k) for k in range(40))
        return Buckets((*(size for size in sizes if size < last), last), None)
    sizes = (size for k in range(last.bit_length()) for size in (64 << k, 96 << k) if size < last)
    least = most
    while least > 8:
        least = -(-least // 2)
    doubled = (least << k for k in range(32))
    tiles = takewhile(lambda size: size < 16 * most, doubled) if most else ()
    return Buckets(prompt=(*sizes, last), tiles=(0, *tiles))


def bucket_for(n: int, sizes: Sequence[int]) -> int:
    """The smallest size >= n; beyond the last size, the last one doubled until it is."""
    size = next((size for size in sizes if size >= n), sizes[-1])
    while size < n:
        size = max(1, 2 * size)
    return size


def padding_shares(sizes: Sequence[int]) -> tuple[float, ...]:
    """What each size costs: the mean share of padding, 0 to 1, in arrays padded up to it.

    Every length that goes into the size counts alike: for the sizes (64, 96), 1..64 and 65..96.
    """
    # Lengths previous + 1 .. size leave size - previous - 1 .. 0 padding.
    return tuple(
        (size - previous - 1) / (2 * size) if size else 0.0
        for previous, size in pairwise((0, *sizes))
    )
