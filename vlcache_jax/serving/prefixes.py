"""What requests have in common in front, kept between them: blocks of rows, and what was seen.

    prompt   | block 0 | block 1 | block 2 | rest      each block has a key that depends on all
    key        h(pictures, tokens 0..)  h(key 0, ..)   tokens in front of it, and on the pictures

Keys and values of a row depend on nothing behind it. So a prompt that begins with blocks that are
kept is run from there on, and scored over everything: the choice of rows is made anew.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.rows import readable, writable, write_rows
from vlcache_jax.errors import whole_number
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.prompting import Tables
from vlcache_jax.running.state import Buffers
from vlcache_jax.running.stores import tree_bytes

BLOCK = 64
"""Rows of a block: what two prompts have in common is found to so many."""

STORES = ("device", "host")
"""Where the blocks lie."""


class Keys(NamedTuple):
    """What a prompt is known by.

    Attributes:
        pictures: of all that it shows, None without pictures.
        blocks: of its whole blocks of rows, in their order.
    """

    pictures: bytes | None
    blocks: list[bytes]


NO_KEYS = Keys(None, [])
"""Of a prompt that has nothing in common with any."""


def keys_of(inputs: ModelInputs) -> Keys:
    """The keys of one prompt, arrays on the host."""
    pictures, length = None, int(inputs.length[0])
    if len(inputs.tiles):
        shown = inputs.tiles, inputs.layout, inputs.interpolation
        pictures = _digest(*jax.tree.leaves(shown))
    key, blocks = b"", []
    for first in range(0, length - BLOCK + 1, BLOCK):
        rows = slice(first, first + BLOCK)
        visual = inputs.visual_index[0, rows]
        positions = () if inputs.positions is None else (inputs.positions[:, 0, rows],)
        own = key + (pictures or b"") if np.any(visual >= 0) else key
        key = _digest(own, inputs.tokens[0, rows], visual, *positions)
        blocks.append(key)
    return Keys(pictures, blocks)


class Prefixes:
    """Blocks of prompts that were run, the ones used longest ago given up first.

    Args:
        programs: what was compiled so far.
        layers: of the model, L.
        rows: the prompts' bucket, T.
        most_bytes: that they may take; 0 for none.
        store: "device" or "host".

    Attributes:
        most_bytes: as given.
        bytes: what they take.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self, programs: Programs, layers: int, rows: int, most_bytes: int, store: str = "device"
    ):
        if store not in STORES:
            raise ValueError(f"prefix_store={store!r:.60} must be one of {', '.join(STORES)}")
        self._programs, self._layers, self._rows = programs, layers, rows
        self.most_bytes, self._store = whole_number(most_bytes, "prefix_bytes", 0), store
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def tables(self, keys: Keys) -> Tables | None:
        """What was seen of a prompt's pictures, if it is kept."""
        found = None if keys.pictures is None else self._find(keys.pictures)
        return None if found is None else jax.device_put(found)

    def fill(self, buffers: Buffers, keys: Keys, most: int) -> tuple[Buffers, int]:
        """Write the blocks that are kept of a prompt's beginning.

        Args:
            buffers: given up.
            keys: the prompt's.
            most: rows of it that are wanted.

        Returns:
            The buffers, and how many rows they have of the prompt.
        """
        first = 0
        for key in keys.blocks[: most // BLOCK]:
            block = self._find(key)
            if block is None:
                break
            args = buffers, jax.device_put(block), np.int32(first)
            buffers = self._run("fill", self._write, args, (0,))
            first += BLOCK
        return buffers, first

    def keep(self, buffers: Buffers, tables: Tables, keys: Keys) -> None:
        """Keep what a prompt has left, as far as there is room for it."""
        if not self.most_bytes:
            return
        size = BLOCK * tree_bytes(buffers) // buffers.k.shape[2] * self._layers
        # The first ones last: they are of no use without those in front of them.
        for number, key in reversed([*enumerate(keys.blocks[: self.most_bytes // size])]):
            args = buffers, np.int32(number * BLOCK)
            self._add(key, lambda args=args: self._run("copy", self._read, args))
        if keys.pictures is not None:
            self._add(keys.pictures, lambda: tables)

    def warm_up(self, buffers: Buffers) -> None:
        """Compile what copies blocks; `buffers` may be shapes."""
        first = np.int32(0)
        block = self._programs.shapes("copy", self._read, buffers, first)
        self._programs.shapes("fill", self._write, buffers, block, first, donate=(0,))

    def _find(self, key: Hashable) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _add(self, key: Hashable, make: Callable[[], Any]) -> None:
        """Keep something that is made only where it is not kept already."""
        if self._find(key) is not None:
            return
        made = make()
        if self._store == "host":
            made = jax.device_get(made)
        self._kept[key] = made
        self.bytes += tree_bytes(made)
        while self.bytes > self.most_bytes:
            self.bytes -= tree_bytes(self._kept.popitem(last=False)[1])

    def _run(
        self, name: str, function: Callable, args: tuple[Any, ...], donate: Sequence[int] = ()
    ) -> Any:
        return self._programs.ready(name, function, *args, donate=tuple(donate))[0](*args)

    def _read(self, buffers: Buffers, first: jax.Array) -> Buffers:
        """A block of all layers: [L, K, BLOCK, H] each."""

        def copied(buffer: jax.Array) -> jax.Array:
            starts = [(0, 0, layer * self._rows + first, 0) for layer in range(self._layers)]
            size = (1, buffer.shape[1], BLOCK, buffer.shape[3])
            return jnp.concatenate([lax.dynamic_slice(buffer, at, size) for at in starts])

        return Buffers(*map(copied, buffers))

    def _write(self, buffers: Buffers, block: Buffers, first: jax.Array) -> Buffers:
        def written(buffer: jax.Array, part: jax.Array) -> jax.Array:
            buffer = writable(buffer)
            for layer in range(self._layers):
                at = (0, 0, layer * self._rows + first, 0)
                buffer = write_rows(buffer, part[layer : layer + 1], at)
            return readable(buffer)

        return Buffers(*map(written, buffers, block))


def _digest(*parts: bytes | np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(f"{part.shape} {part.dtype}".encode())
            digest.update(np.ascontiguousarray(part).data)
    return digest.digest()
