"""Our side, in a process of its own."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import device as devices
from benchmarks import measure
from benchmarks.accuracy import network
from benchmarks.peers.model import make_files, make_prompt, random_params
from benchmarks.peers.process import serve
from vlcache_jax.cache.methods import FullCache, VLCache
from vlcache_jax.models.families import Params
from vlcache_jax.models.llava.anyres import num_tiles
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.buckets import Buckets
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.requests.processing import Processor
from vlcache_jax.running.driver import Run
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.programs import Programs
from vlcache_jax.running.stages import Stages

FULL = "full"
"""The cache that keeps everything; others are named by their budget."""


class Ours:
    """Makes the model, writes it for the other side, and answers the prompt.

    Args:
        config: the `config.json`.
        folder: where the checkpoint is written.
        context: tokens of the prompt.
        batch: how many times it is answered at once.
        dtype: of weights, activations and cache.
        compiled: seconds of each program that was compiled; grows by itself.
    """

    def __init__(
        self,
        config: dict[str, Any],
        folder: str,
        context: int,
        batch: int,
        dtype: str,
        compiled: list[float],
    ):
        self.config = LlavaConfig.from_hf(config)
        self.params = random_params(self.config, dtype)
        files = make_files(self.config)
        network.export(Path(folder), config, files, self.params, dtype)
        pictures, text = make_prompt(self.config, context)
        # One bucket, of the prompt's own size: neither side pads.
        tiles = sum(num_tiles((p.height, p.width), self.config) for p in pictures)
        buckets = Buckets(prompt=(context,), tiles=(tiles * batch,))
        processor = Processor(self.config, files, buckets)
        inputs = processor([pictures] * batch, [text] * batch, raw_prompt=True)
        self._tokens, self._visual = int(inputs.length[0]), int((inputs.visual_index[0] >= 0).sum())
        self._inputs, self._batch = jax.device_put(inputs), batch
        self._compiled, self._programs = compiled, Programs()

    def about(self) -> dict[str, Any]:
        """What this runs on, and what the prompt is."""
        return {
            "gpu": jax.default_backend() == "gpu",
            "device": devices.describe(need_gpu=False),
            "prompt_tokens": self._tokens,
            "visual_tokens": self._visual,
        }

    def seconds(self, cache: str, tokens: int) -> float:
        """From the inputs on the device to the tokens on the host."""
        began = time.perf_counter()
        self._run(cache, tokens)
        return time.perf_counter() - began

    def answer(self, cache: str, tokens: int, logits: str) -> dict[str, Any]:
        """The tokens, and in a file the logits of the first one, float32 [B, 1, V]."""
        drawn, run = self._run(cache, tokens)
        np.save(logits, np.asarray(self._first_logits())[:, None])
        kept = float(np.asarray(run.pool.length).mean()) / self._tokens
        return {"tokens": drawn.tolist(), "kept_share": kept}

    def programs(self) -> int:
        """Programs that were compiled so far."""
        return len(self._compiled)

    def _run(self, cache: str, tokens: int) -> tuple[np.ndarray, Run]:
        """The tokens, int32 [B, n], and the run that drew them."""
        method = FullCache() if cache == FULL else VLCache(cache)
        generate = Generate(self.config, method, tokens)  # without stop ids
        settings = generate.settings(self._batch)
        run = Run(self._programs, self.params, generate.stages, [self._inputs], settings)
        return np.concatenate(list(run), axis=1)[:, :tokens], run

    def _first_logits(self) -> jax.Array:
        """Float32 [B, V]."""
        stages, row = Stages(self.config), np.arange(self._batch)

        @jax.jit
        def logits(params: Params, inputs: ModelInputs) -> jax.Array:
            return stages.prompt_logits(params, inputs)[row, inputs.length - 1]

        return logits(self.params, self._inputs)


if __name__ == "__main__":
    with measure.compilations() as seen:
        serve(functools.partial(Ours, compiled=seen))
