"""Compile a whole program for a named GPU on a machine that has none.

`compile_for("h200", function, *args)` gives the executable that a machine with that GPU would run:
its byte counts and its optimised code, of models that no laptop could hold, since arguments are
shapes alone. Autotuning needs the GPU and is left out.

It needs the CUDA plugin, `pip install 'vlcache-jax[cuda]'`. Without a GPU the plugin starts only
where nobody asks it for one: with `JAX_PLATFORMS=cpu` in the environment.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a GPU.

    Attributes:
        name: as the driver spells it; JAX's `device_kind`.
        capability: compute capability, (major, minor).
        features: "ACCELERATED_FEATURES" for code of this architecture alone (sm_90a), or "NONE".
        memory: bytes of device memory.
        bandwidth: of that memory, in bytes per second.
        l2_cache: bytes.
        cores: streaming multiprocessors.
        lanes: float32 units of one core.
        clock_ghz: highest clock.
        shared_memory: bytes of shared memory of one core.
        block_shared_memory: the most of it that one block may ask for, in bytes.
    """

    name: str
    capability: tuple[int, int]
    features: str
    memory: int
    bandwidth: int
    l2_cache: int
    cores: int
    lanes: int
    clock_ghz: float
    shared_memory: int
    block_shared_memory: int

    def target_config(self) -> str:
        """The description as XLA reads it: a GpuTargetConfigProto in text form."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.block_shared_memory}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache}
              device_memory_size: {self.memory}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: {self.features}
              }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


_H200 = Gpu(
    name="NVIDIA H200",
    capability=(9, 0),
    features="ACCELERATED_FEATURES",
    memory=150_754_820_096,
    bandwidth=4_800_000_000_000,
    l2_cache=62_914_560,
    cores=132,
    lanes=128,
    clock_ghz=1.98,
    shared_memory=233_472,
    block_shared_memory=232_448,
)

GPUS: Mapping[str, Gpu] = {
    "h200": _H200,
    "h100": replace(
        _H200,
        name="NVIDIA H100 80GB HBM3",
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        l2_cache=52_428_800,
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        features="NONE",
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2_cache=41_943_040,
        cores=108,
        lanes=64,
        clock_ghz=1.41,
        shared_memory=167_936,
        block_shared_memory=166_912,
    ),
}
"""The GPUs that can be named. Memory and caches as the driver reports them."""


def compile_for(
    gpu: str, function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compile `jax.jit(function)` for a GPU that need not be there.

    Args:
        gpu: a name of `GPUS`.
        function: the program.
        args: its arguments: pytrees of `jax.ShapeDtypeStruct`, or of arrays, of which only shape
            and type are used.
        donate_argnums: arguments whose memory the program may use, as in `jax.jit`.

    Raises:
        ValueError: no such GPU is described here.
        RuntimeError: the CUDA plugin is not installed, or did not start.
    """
    sharding = _sharding(gpu)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    jitted = jax.jit(function, donate_argnums=donate_argnums)
    with jax.sharding.use_abstract_mesh(abstract_mesh(GPUS[gpu])), warnings.catch_warnings():
        # Where compiled programs are kept, those for a GPU that is not there cannot be read back.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
        return jitted.lower(*jax.tree.map(place, args)).compile()


def abstract_mesh(gpu: Gpu) -> jax.sharding.AbstractMesh:
    """No mesh, on this GPU: what Pallas asks for the device, since jax sees none."""
    device = jax.sharding.AbstractDevice(device_kind=gpu.name, num_cores=gpu.cores, platform="gpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def _sharding(gpu: str) -> jax.sharding.Sharding:
    """Of arrays that lie on the GPU."""
    if gpu not in GPUS:
        raise ValueError(f"{gpu=} is not known: use one of {', '.join(GPUS)}")
    try:
        topology = topologies.get_topology_desc(
            "", "cuda", target_config=GPUS[gpu].target_config(), topology="1x1x1"
        )
    except NotImplementedError:  # no plugin has registered
        raise RuntimeError(_missing_plugin()) from None
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def plugin_version() -> str | None:
    """Version of the installed CUDA plugin, None where there is none."""
    plugin = re.compile(r"jax[-_]cuda\d+[-_]plugin")
    found = (item.version for item in metadata.distributions() if plugin.fullmatch(item.name or ""))
    return next(found, None)


def _missing_plugin() -> str:
    version = plugin_version()
    if version is None:
        return "compiling for a GPU needs the CUDA plugin: pip install 'vlcache-jax[cuda]'"
    return (
        f"the CUDA plugin {version} is installed and did not start: without a GPU it does so only "
        "with JAX_PLATFORMS=cpu in the environment before jax is imported"
    )
