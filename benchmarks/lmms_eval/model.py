"""The model class of the lmms-eval plug-in."""

from lmms_eval.api.instance import (  # pyright: ignore[reportMissingImports]
    GenerationResult,
    Instance,
    TokenCounts,
)
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils import gen_metrics  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

import vlcache_jax
from benchmarks.lmms_eval.requests import Request, answer_all, batch_size_of, check_machine
from vlcache_jax.cache.methods import VLCache, make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.running.programs import keep_programs


class VLCacheModel(lmms):
    """A model with a compressed cache, for lmms-eval's tasks of images, videos and text.

    All arguments but the first have defaults; lmms-eval's `--model_args` gives them by name.

    Args:
        pretrained: a model directory, a hub id, or "demo-small"; see `vlcache_jax.load`.
        method: what the cache keeps of a prompt: "vl-cache", "h2o", ..., "full".
        kv_budget: how much of it, a share or tokens per layer ("256tok"); the method's own default
            where it is None.
        kv_bits: bits of what is kept, 2, 4 or 8, or "akvq" or "kivi"; None for full width.
        dtype: "float32", "bfloat16" or "float16"; the checkpoint's own by default.
        backend: attention kernels; see `vlcache_jax.load`.
        batch_size: prompts that are answered at a time.
        max_batch_size: an upper bound of it.
        prefill_batch: prompts of a batch that are prefilled at a time, all by default. Fewer take
            less memory.
        frames: frames of each video that the model is shown, evenly chosen; by default what the
            checkpoint's processor says. A video with fewer is refused.
        device: None, or the name of the device that JAX takes anyway.
        seed: of the draws where a task asks for sampling.

    Raises:
        ValueError: an argument is out of range, or as `vlcache_jax.load`.
        FileNotFoundError: a file of the checkpoint is missing.
        NotImplementedError: several processes, or a model that is not implemented.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str = VLCache.name,
        kv_budget: float | str | None = None,
        kv_bits: int | str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        prefill_batch: int | None = None,
        frames: int | None = None,
        device: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        check_machine(device)
        self.batch_size = batch_size_of(batch_size, max_batch_size)
        self.prefill_batch, self.frames, self.seed = prefill_batch, frames, seed
        quantizer = make_quantizer(None if kv_bits is None else str(kv_bits))
        self.cache = make_method(method, kv_budget, quantizer)
        keep_programs()
        self.vlm = vlcache_jax.load(
            pretrained, dtype, backend=backend, transform=self.cache.transforms
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests, in their order.

        The share of the cache that was kept is logged, and lmms-eval writes its mean beside the
        speed (`throughput`). The time counted is the model's alone: without compilation and
        without the processing of images and videos.

        Raises:
            ValueError: a prompt does not fit the model; the message names what would.
            NotImplementedError: audio, or a generation setting that is not supported.
        """
        results: list[GenerationResult] = [GenerationResult("")] * len(requests)
        prompts = [Request.of(request.args, self.task_dict) for request in requests]
        kept, full, tokens, seconds, compile_s = 0, 0, 0, 0.0, 0.0
        with tqdm(total=len(prompts), desc="Answering") as bar:
            for places, answers in answer_all(
                self.vlm, prompts, cache=self.cache, batch_size=self.batch_size,
                prefill_batch=self.prefill_batch, frames=self.frames, seed=self.seed,
            ):  # fmt: skip
                for place, answer in zip(places, answers, strict=True):
                    counts = TokenCounts(answer.prompt_tokens, len(answer.tokens))
                    results[place] = GenerationResult(answer.text, counts)
                    kept += answer.cache.kept_bytes
                    full += answer.cache.full_bytes
                    tokens += len(answer.tokens)
                seconds += answers[0].timings.total_s  # of the whole batch
                compile_s += answers[0].timings.compile_s
                bar.update(len(places))
        if results:
            more = {
                "num_requests": len(results),
                "cache_share_kept": kept / full,
                "compile_s": compile_s,
            }
            gen_metrics.log_metrics(seconds, tokens, tokens / seconds, more)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not implemented: answers are generated, given ones are not rated."""
        raise NotImplementedError(
            "vlcache generates answers and does not rate given ones (loglikelihood, "
            "multiple_choice): choose a task whose output_type is generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not implemented: what a method keeps depends on the question."""
        raise NotImplementedError(
            "vlcache answers one question at a time: what it keeps of a picture depends on the "
            "question, so a later round (generate_until_multi_round) would need a new prefill"
        )

    def clean(self) -> None:
        """Give the model's memory back: lmms-eval calls this before it rates the answers."""
        super().clean()
        del self.vlm
