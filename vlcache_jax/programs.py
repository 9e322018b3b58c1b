"""Where compiled programs are kept from one run to the next."""

import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder.

    A folder that JAX was told of already (JAX_COMPILATION_CACHE_DIR) stays.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(folder / "vlcache-jax" / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
