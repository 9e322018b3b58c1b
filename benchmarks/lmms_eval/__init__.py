"""The plug-in for lmms-eval: `python -m lmms_eval --model vlcache --model_args pretrained=...`.

lmms-eval finds `manifest` by the entry point in pyproject.toml and calls it at every start,
whatever model is asked for: so jax is not imported here, nor lmms-eval itself.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]


def manifest() -> "ModelManifest":
    """What lmms-eval is told of the model: its name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("vlcache", simple_class_path="benchmarks.lmms_eval.model.VLCacheModel")
