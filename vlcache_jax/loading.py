"""`load`: a model directory or hub id to a `VLM`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.backends import check_backend
from pallas_kernels.prefill_attention.cudnn import require_gpu
from vlcache_jax import demo
from vlcache_jax.cache.method import CacheMethod
from vlcache_jax.cache.methods import CacheLike, FullCache, as_method
from vlcache_jax.calibration import KV_LAYERS, Calibration
from vlcache_jax.checkpoints.checkpoint import (
    Progress,
    open_checkpoint,
    read_model,
)
from vlcache_jax.checkpoints.find import resolve
from vlcache_jax.checkpoints.weights import DTYPE, parse_dtype
from vlcache_jax.distributed.mesh import DeviceMesh, MeshLike
from vlcache_jax.fields import read_field, read_json, token_ids
from vlcache_jax.models.config import ModelConfig
from vlcache_jax.requests.buckets import Buckets, bucket_for, default_buckets, padding_shares
from vlcache_jax.requests.processing import Processor
from vlcache_jax.results.report import count_parameters, kv_bits, memory_need, token_bytes
from vlcache_jax.vlm import VLM


def load(
    model: str | Path,
    dtype: str | Any | None = None,
    *,
    buckets: Buckets | None = None,
    backend: str | None = None,
    transform: bool = False,
    cache: CacheLike = None,
    revision: str | None = None,
    lazy: bool = False,
    mesh: MeshLike = None,
    progress: Progress | None = None,
) -> VLM:
    """Open a checkpoint: a model ready to answer, on the default device.

    Where `calibrate` has left its file beside the weights, it says which layers `AKVQ` takes for
    text-salient.

    Args:
        model: a directory in Hugging Face format, a directory made by `python -m convert`, a GGUF
            file of a Llama, a hub id such as "llava-hf/llava-v1.6-mistral-7b-hf", or "demo" or
            "demo-small" for one of this package.
        dtype: "float32", "bfloat16" or "float16" for parameters, activations and cache; the type
            that the checkpoint is stored in by default, float32 for a quantised GGUF file.
        buckets: sizes that prompts and tiles are padded to.
        backend: "triton", "cudnn" (prefill's attention only) or "xla"; by default what the
            environment variable VLCACHE_BACKEND names, else the best that supports the case.
        transform: fold the Walsh-Hadamard transform of the values into each layer as it is read,
            for a quantized cache with the transform (`AKVQ`), whose first use else makes folded
            copies of the attention's weights. Every method runs on folded parameters. What `cache`
            asks for is folded all the same.
        cache: what is kept of the prompts where a call does not say; everything by default. What
            the model cannot take is refused before its weights are read, or fetched from the hub.
        revision: branch, tag or commit of a hub id; its main branch by default.
        lazy: read the parameters when they are first needed, not now; everything that can be
            checked without reading them is checked now all the same.
        mesh: devices that run the model together, "model=4,data=2" (docs/distributed.md); one by
            default.
        progress: called after each parameter with its piece, the bytes done and those in all.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing, or the package with the demo's
            decoder.
        ConnectionError: the hub cannot be reached.
        ValueError: a file is damaged, `dtype` or `backend` is unknown, the model cannot take the
            `cache`, a `revision` is given for what is not on the hub, or the `mesh` cannot hold
            the model.
        NotImplementedError: the checkpoint describes a model that is not implemented, or the
            backend is "cudnn" and there is no GPU.
    """
    backend, method = check_backend(backend), as_method(cache)
    if backend == "cudnn":
        require_gpu()
    path = resolve(model, weights=False, revision=revision)
    config, _ = read_model(path)
    method.for_model(config.text, _tsa_layers(path, config))
    devices = DeviceMesh.of(mesh, config.text)
    transform = transform or method.transforms
    path = resolve(model, revision=revision, progress=progress)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config  # what the weights fit: a branch of the hub may have moved meanwhile
    kind = checkpoint.target_dtype(dtype)
    processor = Processor(config, checkpoint.processor(), buckets)
    vlm = VLM(
        config,
        lambda: checkpoint.load(kind, progress, transform=transform, mesh=devices),
        processor,
        stop_ids=_stop_ids(path, config, processor),
        name=str(model),
        backend=backend,
        transformed=transform,
        cache=method,
        tsa_layers=_tsa_layers(path, config),
        mesh=devices,
    )
    if not lazy:
        vlm.params  # noqa: B018  reads them
    return vlm


def _stop_ids(path: Path, config: ModelConfig, processor: Processor) -> tuple[int, ...]:
    """Tokens that end an answer, of generation_config.json, config.json or the tokenizer."""
    file, ids = path / "generation_config.json", token_ids(config.text.vocab_size)
    given = read_json(file) if file.is_file() else {}
    own = {"eos_token_id": processor.eos_token_id}
    return (
        read_field(given, "eos_token_id", ids, (), file=file.name)
        or config.text.eos_token_ids
        or read_field(own, "eos_token_id", ids, (), file="the tokenizer")
    )


def read_config(
    model: str | Path, dtype: str | None = None, revision: str | None = None
) -> tuple[ModelConfig, jnp.dtype]:
    """A model's configuration and the type of its parameters; no weights are read.

    The arguments, and what is raised, are those of `describe`.
    """
    return _read_config(resolve(model, weights=False, revision=revision), dtype)


def _read_config(path: Path, dtype: str | None) -> tuple[ModelConfig, jnp.dtype]:
    config, stored = read_model(path)
    if dtype is None:
        old = read_field(stored, "torch_dtype", DTYPE, "float32")
        dtype = read_field(stored, "dtype", DTYPE, old)
    return config, parse_dtype(dtype)


def describe(
    model: str | Path,
    dtype: str | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    new_tokens: int = 128,
    cache: CacheMethod | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Facts about a model from its configuration alone, as plain values for JSON; of the model in
    this package, the pictures that come with it too.

    Args:
        model: a directory in Hugging Face format, a directory made by `python -m convert`, a GGUF
            file, a hub id, or "demo" or "demo-small" for one of this package.
        dtype: "float32", "bfloat16" or "float16"; the type named by config.json by default.
        context: prompt tokens of one sequence; 4096 or what the model can hold by default.
        batch: sequences.
        new_tokens: tokens of an answer.
        cache: what is kept of a prompt; everything by default.
        revision: branch, tag or commit of a hub id; its main branch by default.

    Raises:
        ValueError: more tokens than the model has positions for, a file is damaged, `dtype` is
            unknown, or a `revision` is given for what is not on the hub.
        FileNotFoundError: there is no such model, or a file of it is missing.
        ConnectionError: the hub cannot be reached.
        NotImplementedError: the checkpoint describes a model that is not implemented.
    """
    path = resolve(model, weights=False, revision=revision)
    config, kind = _read_config(path, dtype)
    limit = config.text.max_positions
    if context is None:
        context = max(1, min(4096, limit + 1 - new_tokens))
    if context + new_tokens - 1 > limit:
        raise ValueError(f"{context=} and {new_tokens=} exceed the model's {limit} positions")
    buckets = default_buckets(config)
    rows = bucket_for(context, buckets.prompt)
    cache = (cache or FullCache()).for_model(config.text, _tsa_layers(path, config))
    need = memory_need(config, kind, cache, rows=rows, batch=batch, new_tokens=new_tokens)
    shown = demo.pictures(str(model)) if path in demo.MODELS.values() else ()
    pictures = [dataclasses.asdict(picture) | {"file": str(picture.file)} for picture in shown]
    return {
        "model": str(model),
        "revision": revision,
        "family": config.family,
        "dtype": kind.name,
        "parameters": count_parameters(config),
        "kv_bytes_per_token": token_bytes(config.text, kind),
        "max_positions": limit,
        "tile_tokens": config.tile_tokens,
        "buckets": {
            name: [
                {"size": size, "padding": share}
                for size, share in zip(sizes, padding_shares(sizes), strict=True)
            ]
            for name, sizes in (("prompt", buckets.prompt), ("tiles", buckets.tiles or (0,)))
        },
        "memory": {
            "context": context,
            "bucket": rows,
            "batch": batch,
            "new_tokens": new_tokens,
            "method": cache.name,
            "label": cache.label,
            "kv_bits": kv_bits(cache.quantize),
            "budget_requested": str(cache.limit),
            **need,
        },
        **({"pictures": pictures} if pictures else {}),
    }


def _tsa_layers(path: Path, config: ModelConfig) -> tuple[int, ...] | None:
    """The text-salient layers that were calibrated for a checkpoint, if any were."""
    file = path / KV_LAYERS
    return Calibration.read(file, config.text.num_layers).tsa_layers if file.exists() else None
