"""Prompts of all lengths and with any pictures, run in parts by the same few programs.

They have one bucket, and what is seen of their pictures lies in tables of one size. So a program is
made for each part of a prompt and each method, and for each number of tiles; a short prompt costs
its rows alone.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.models.families import Params
from vlcache_jax.requests.buckets import bucket_for
from vlcache_jax.requests.inputs import Interpolation, ModelInputs
from vlcache_jax.running.parts import Rows, Runner, reach
from vlcache_jax.running.prompting import Tables
from vlcache_jax.running.settings import Settings
from vlcache_jax.running.state import Buffers, Prefill
from vlcache_jax.serving.prefixes import NO_KEYS, Keys, Prefixes
from vlcache_jax.vlm import VLM

FEW = 128
"""Rows of the smallest part of a prompt: those behind what is kept of it, or all of a short one."""

Into = Callable[[Prefill, jax.Array], Any]
"""Takes what a prompt leaves behind, and the first token, int32 [1]."""


class Prompts:
    """Runs one prompt at a time.

    Args:
        vlm: the model.
        params: parameters.
        rows: the prompts' bucket, T.
        chunk: rows that are run at a time.
        prefixes: what prompts have in common.

    Attributes:
        rows, prefixes: as given.
        text: a prompt of text alone, in the bucket.
        pictures: one of each number of tiles that a prompt may have, without pixels.
    """

    def __init__(self, vlm: VLM, params: Params, rows: int, chunk: int, prefixes: Prefixes):
        self._params, self.rows, self._chunk = params, rows, min(chunk, rows)
        self.prefixes, self._widths = prefixes, tuple(sorted({min(FEW, self._chunk), self._chunk}))
        self._layers = vlm.config.text.num_layers
        self._dtype = params["embed"]["embedding"].dtype
        self._buffers: Buffers | None = None
        self.pictures = [*_pictures(vlm, rows)]
        request = vlm.request(text="a", raw_prompt=True)
        self.text = self.fit(request.groups[0])
        self._tables: Tables = ()
        if self.pictures:
            see = partial(request.generate.stages.see, params)
            shapes = jax.eval_shape(see, self.pictures[-1])
            self._tables = tuple(jnp.zeros(table.shape, table.dtype) for table in shapes)

    def fit(self, inputs: ModelInputs) -> ModelInputs:
        """A prompt in the bucket, of the same structure with pictures and without.

        Raises:
            ValueError: it is too long, or its pictures take too many tiles.
            NotImplementedError: it has a video.
        """
        if (length := int(inputs.length[0])) > self.rows:
            raise ValueError(f"{length} prompt tokens: this engine takes at most {self.rows}")
        if count := len(inputs.tiles):
            known = [example.tiles.shape for example in self.pictures]
            if inputs.tiles.shape[1:] != known[-1][1:]:
                raise NotImplementedError("videos in the engine: use vlm.generate")
            if inputs.tiles.shape not in known:
                raise ValueError(f"the pictures take {count} tiles, of {known[-1][0]} at most")
        inputs = inputs.padded(self.rows)
        like = self.pictures[0].interpolation if self.pictures else None
        if like is not None and inputs.interpolation is None:
            none = Interpolation(*(np.zeros_like(array) for array in like))
            inputs = replace(inputs, interpolation=none)
        return inputs

    def see(self, runner: Runner, inputs: ModelInputs) -> Tables:
        """What is seen of a prompt's pictures, in tables of one size."""
        rows = len(self._tables[0])
        return runner.do("see", self.rows, self._params, inputs, rows=rows)

    def empty_buffers(self, runner: Runner) -> Buffers:
        """Room for the keys and values of one prompt."""
        empty = partial(runner.stages.empty_buffers, 1, self.rows, self._dtype)
        return jax.eval_shape(empty) if runner.dry else runner.programs.zeros(empty)

    def run(
        self,
        runner: Runner,
        inputs: ModelInputs,
        settings: Settings,
        into: Into,
        together: int | None = None,
        keys: Keys = NO_KEYS,
    ) -> Generator[None, None, tuple[jax.Array, int]]:
        """Run a prompt. It stops behind each part but the last.

        Args:
            runner: of the request's stages.
            inputs: of `fit`.
            settings: what is asked.
            into: called with the last part.
            together: how many last rows have to be run together; by default what the method needs.
            keys: of the prompt's blocks.

        Returns:
            The first token, int32 [1], and how many rows were not run, as they were kept.
        """
        tables, buffers, self._buffers = self._tables, self._buffers, None
        if len(inputs.tiles):
            tables = self.prefixes.tables(keys)
            if tables is None:
                tables = self.see(runner, inputs)
                yield
        if buffers is None:
            buffers = self.empty_buffers(runner)
        inputs, cache = inputs.without_tiles, runner.stages.cache
        together, kept, memory = together or reach(cache, inputs) or self.rows, 0, None
        pivots = cache.quantize is not None and cache.quantize.pivots
        if together < self.rows and not (cache.continued or pivots):
            # These methods remember nothing of earlier rows beside their keys and values.
            buffers, kept = self.prefixes.fill(buffers, keys, int(inputs.length[0]) - 1)
            salience = np.zeros((1, self._layers, self.rows), np.float32)
            memory = {"length": np.array([kept], np.int32), "salience": salience}
        rows = Rows(tables, self._dtype, buffers=buffers, memory=memory)
        own = self._params, inputs, settings, self._chunk, together, self._widths
        prefilled, token = yield from rows.finishing(runner, *own)
        into(prefilled, token)
        if not runner.dry:
            self._buffers = Buffers(prefilled.k, prefilled.v)  # for the next prompt
            self.prefixes.keep(self._buffers, tables, keys)
        return token, min(kept, int(inputs.length[0]) - together)

    def widths(self, method: CacheMethod) -> list[int]:
        """Rows that the last part of a prompt can have with a method."""
        reaches = {method.reach(self.rows, last) or self.rows for last in range(-1, self.rows)}
        least = {bucket_for(each, self._widths) for each in reaches}
        own = [width for width in self._widths if width > min(least)]
        return sorted({min(width, self.rows) for width in (*least, *own)})


def _pictures(vlm: VLM, rows: int) -> Iterator[ModelInputs]:
    if not vlm.config.max_tiles:
        return
    blank = Image.new("RGB", (64, 64))
    [inputs] = vlm.request(blank, "<image>a", raw_prompt=True).groups
    for size in vlm.processor.buckets.tile_sizes(rows, vlm.config):
        tiles = np.broadcast_to(np.float32(0), (size, *inputs.tiles.shape[1:]))
        layout = None if inputs.layout is None else np.full((size, 4), -1, np.int32)
        yield replace(inputs.padded(rows), tiles=tiles, layout=layout)
