"""Hugging Face's side, in a process of its own: transformers and PyTorch."""

import os
import time
from typing import Any

import numpy as np

from benchmarks.peers.model import make_prompt
from benchmarks.peers.process import serve
from vlcache_jax.models.llava.config import LlavaConfig


class HuggingFace:
    """The checkpoint in transformers, with SDPA, on the prompt from its own processor.

    Args:
        config: the `config.json`.
        folder: the checkpoint.
        context: tokens of the prompt.
        batch: how many times it is answered at once.
        dtype: of weights, activations and cache.
        gpu: run on the GPU.

    Raises:
        RuntimeError: PyTorch sees no GPU, and is to use one.
    """

    def __init__(
        self,
        config: dict[str, Any],
        folder: str,
        context: int,
        batch: int,
        dtype: str,
        gpu: bool,
    ):
        import torch
        import transformers

        if gpu and not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} sees no GPU")
        torch.set_num_threads(os.cpu_count() or 1)
        self._torch, self._transformers = torch, transformers
        device, kind = "cuda" if gpu else "cpu", getattr(torch, dtype)
        model: Any = transformers.LlavaNextForConditionalGeneration.from_pretrained(
            folder, dtype=kind, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.to(device).eval()
        # Without stop tokens, answers run to their full length.
        for holder in (model.generation_config, model.config.text_config):
            holder.eos_token_id = None
        processor: Any = transformers.LlavaNextProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True
        )
        pictures, text = make_prompt(LlavaConfig.from_hf(config), context)
        inputs = processor(images=pictures * batch, text=[text] * batch, return_tensors="pt")
        self._inputs = inputs.to(device, kind)

    def about(self) -> dict[str, Any]:
        """What this runs on."""
        cuda = self._torch.cuda
        return {
            "torch": self._torch.__version__,
            "transformers": self._transformers.__version__,
            "threads": self._torch.get_num_threads(),
            "device": cuda.get_device_name() if self.model.device.type == "cuda" else "cpu",
            "prompt_tokens": self._inputs["input_ids"].shape[1],
        }

    def seconds(self, cache: str, tokens: int) -> float:
        """From the inputs on the device to the tokens on the host."""
        self._wait()
        began = time.perf_counter()
        self._generate(cache, tokens).cpu()
        return time.perf_counter() - began

    def answer(self, cache: str, tokens: int, logits: str) -> dict[str, Any]:
        """The tokens, and in a file the logits of all of them, float32 [B, tokens, V].

        Raises:
            RuntimeError: nothing was compiled, where it should be.
        """
        out = self._generate(cache, tokens, return_dict_in_generate=True, output_logits=True)
        if cache == "static" and not self.programs():
            raise RuntimeError("transformers did not compile the decode step")
        np.save(logits, self._torch.stack(out.logits, 1).float().cpu().numpy())
        return {"tokens": self._new(out.sequences, tokens).tolist()}

    def programs(self) -> int:
        """Graphs that torch.compile made so far."""
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def _generate(self, cache: str, tokens: int, **more: Any) -> Any:
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, **more}
        if cache == "static":
            how = self._transformers.CompileConfig()
            how._compile_all_devices = True  # else a CPU is left out
            options |= {"cache_implementation": "static", "compile_config": how}
        out = self.model.generate(**self._inputs, pad_token_id=3, **options)
        self._new(getattr(out, "sequences", out), tokens)
        return out

    def _new(self, sequences: Any, tokens: int) -> Any:
        """The tokens behind the prompt."""
        new = sequences[:, self._inputs["input_ids"].shape[1] :]
        if new.shape[1] != tokens:
            raise RuntimeError(f"{new.shape[1]} new tokens instead of {tokens}")
        return new

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            self._torch.cuda.synchronize()


if __name__ == "__main__":
    serve(HuggingFace)
