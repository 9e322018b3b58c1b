"""Vision-language models and text decoders in JAX with a compressed key/value cache (VL-Cache)."""

from vlcache_jax.cache.aircache import AirCache
from vlcache_jax.cache.budget import Budget, Prompt
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import (
    DEFAULT_METHOD,
    H2O,
    AdaReTaKe,
    Consensus,
    Custom,
    FullCache,
    MixKV,
    PyramidKV,
    RandomKV,
    SnapKV,
    StreamingLLM,
    VLCache,
)
from vlcache_jax.cache.quantizers import AKVQ, KIVI, RTN
from vlcache_jax.cache.score import Layer
from vlcache_jax.cache.tgvkv import TGVKV
from vlcache_jax.cache.trace import Trace, attention_mass_recall, cache_hit_rate
from vlcache_jax.calibration import Calibration, calibrate
from vlcache_jax.evaluation import Evaluation, evaluate
from vlcache_jax.loading import load
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.buckets import Buckets
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.requests.processing import Processor
from vlcache_jax.requests.videos import Video
from vlcache_jax.results.answer import Answer
from vlcache_jax.results.inspection import Inspection, inspect
from vlcache_jax.results.report import CacheReport
from vlcache_jax.running.driver import Timings
from vlcache_jax.running.generate import Generate, GenerateOutput
from vlcache_jax.running.sampling import Sampling
from vlcache_jax.sessions.session import Session
from vlcache_jax.streaming import Stream
from vlcache_jax.vlm import VLM

__all__ = [
    "AKVQ",
    "DEFAULT_METHOD",
    "H2O",
    "KIVI",
    "RTN",
    "TGVKV",
    "VLM",
    "AdaReTaKe",
    "AirCache",
    "Answer",
    "Buckets",
    "Budget",
    "CacheMethod",
    "CacheReport",
    "Calibration",
    "Consensus",
    "Custom",
    "Evaluation",
    "FullCache",
    "Generate",
    "GenerateOutput",
    "Inspection",
    "Layer",
    "LlavaConfig",
    "MixKV",
    "ModelConfig",
    "ModelInputs",
    "Processor",
    "Prompt",
    "PyramidKV",
    "RandomKV",
    "Sampling",
    "Session",
    "SnapKV",
    "Stream",
    "StreamingLLM",
    "Timings",
    "Trace",
    "VLCache",
    "Video",
    "attention_mass_recall",
    "cache_hit_rate",
    "calibrate",
    "evaluate",
    "inspect",
    "load",
]
