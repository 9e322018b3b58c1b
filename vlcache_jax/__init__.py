"""LLaVA-style vision-language models in JAX with a compressed key/value cache (VL-Cache)."""

from vlcache_jax.buckets import Buckets
from vlcache_jax.cache.methods import FullCache
from vlcache_jax.config import LlavaConfig
from vlcache_jax.generate import Generate, GenerateOutput
from vlcache_jax.loading import load
from vlcache_jax.processing import ModelInputs, Processor
from vlcache_jax.report import CacheReport
from vlcache_jax.sampling import Sampling
from vlcache_jax.vlm import VLM, Answer, Stream, Timings

__all__ = [
    "VLM",
    "Answer",
    "Buckets",
    "CacheReport",
    "FullCache",
    "Generate",
    "GenerateOutput",
    "LlavaConfig",
    "ModelInputs",
    "Processor",
    "Sampling",
    "Stream",
    "Timings",
    "load",
]
