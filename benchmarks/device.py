"""What the results ran on."""

import os
import re
import subprocess
from typing import Any

import jax


class NoGpu(RuntimeError):
    """There is no GPU, and none but a GPU will do."""


def slug(name: str) -> str:
    """A device's kind as a folder's name: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(*, need_gpu: bool) -> dict[str, Any]:
    """What the results ran on.

    Raises:
        NoGpu: JAX sees no GPU, and one is needed.
    """
    try:
        found: Any = jax.devices()[0]
    except RuntimeError as error:
        raise NoGpu(_no_gpu(str(error).splitlines()[0])) from None
    if found.platform != "gpu" and need_gpu:
        raise NoGpu(_no_gpu(f"JAX sees {found.platform} alone"))
    return {
        "device": found.device_kind,
        "driver": _driver(),
        "platform_version": found.client.platform_version,
        "memory_limit_bytes": memory_limit(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ""),
    }


def memory_limit() -> int | None:
    """Bytes that JAX may use of the device's memory; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _no_gpu(reason: str) -> str:
    return (
        f"no GPU here ({reason}): run this on a machine with an NVIDIA GPU, with vlcache-jax[cuda] "
        "installed and JAX_PLATFORMS unset"
    )


def _driver() -> str | None:
    """Version of the GPU's driver; None where `nvidia-smi` does not tell."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None
