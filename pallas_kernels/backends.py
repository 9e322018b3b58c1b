"""The choice of a backend, the same for every operation.

Each operation has its backends in the order of preference. The first one that supports the case is
taken: a backend says that it does not by raising NotImplementedError. On a GPU it is also compiled
alone before it is chosen; where that fails, the operation warns once and goes on with the next one.
"""

import functools
import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

BACKENDS = ("triton", "cudnn", "xla")
"""All backends; not every operation has every one."""

VARIABLE = "VLCACHE_BACKEND"
"""Environment variable with the name of the backend to use where none is asked for."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Device:
    """What a program is traced for.

    Attributes:
        platform: "gpu", "cpu".
        kind: the device's name, as in "NVIDIA H200".
        capability: CUDA compute capability in tenths (90 for 9.0), None where there is none.
        present: the device is here, so that a kernel can be compiled for it to see whether it can.
    """

    platform: str
    kind: str
    capability: int | None
    present: bool


_CAPABILITIES = {"A100": 80, "A30": 80, "H100": 90, "H200": 90, "GH200": 90, "H20": 90}
"""Of GPUs that programs are compiled for without having one."""


def current_device() -> Device:
    """The device of the program being traced: of the mesh, if it names one, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract, devices = mesh.abstract_device, []
    if abstract is not None and mesh.manual_axes:  # of several devices, which may be these
        devices = [each for each in jax.devices() if each.device_kind == abstract.device_kind]
    if abstract is not None and not devices:
        words = abstract.device_kind.replace("-", " ").split()
        capability = next((_CAPABILITIES[word] for word in words if word in _CAPABILITIES), None)
        return Device(abstract.platform or "gpu", abstract.device_kind, capability, present=False)
    default: Any = jax.config.values["jax_default_device"]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    device: Any = devices[0] if devices else default or jax.devices()[0]
    capability = None
    if device.platform == "gpu" and "NVIDIA" in device.device_kind:
        capability = int(device.compute_capability.replace(".", ""))
    return Device(device.platform, device.device_kind, capability, present=True)


def check_backend(name: str | None) -> str | None:
    """A backend's name, or that of the environment where it is None.

    Raises:
        ValueError: there is no backend of that name.
    """
    source = "backend"
    if name is None:
        name, source = os.environ.get(VARIABLE) or None, VARIABLE
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is no backend: use one of {', '.join(BACKENDS)}")
    return name


def choose(
    operation: str,
    requested: str | None,
    backends: Mapping[str, Callable[..., Result]],
    *arrays: Any,
    **static: Hashable,
) -> Result:
    """Run an operation on the backend that is asked for, or the first that supports the case.

    Args:
        operation: its name, for messages.
        requested: a backend's name, or None for the first one that does it.
        backends: name to implementation, in the order of preference.
        arrays: arguments of the implementations, pytrees of arrays.
        static: their compile-time arguments.

    Raises:
        NotImplementedError: the operation has no such backend, or the backend asked for does not
            support the case.
    """
    if requested is not None:
        if requested not in backends:
            known = ", ".join(backends)
            raise NotImplementedError(
                f"{operation} has no backend {requested!r}: use one of {known}, or None"
            )
        return backends[requested](*arrays, **static)
    device = current_device()
    *preferred, last = backends
    # What an interpreted kernel gives, the last backend gives faster.
    for name in preferred if device.platform == "gpu" else ():
        try:
            if device.present:
                leaves, tree = jax.tree.flatten(arrays)
                shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
                case = name, device, shapes, tree, tuple(static.items())
                if _failure(operation, backends[name], *case) is not None:
                    continue
            return backends[name](*arrays, **static)
        except NotImplementedError:
            continue
    return backends[last](*arrays, **static)


@functools.lru_cache(maxsize=1024)
def _failure(
    operation: str,
    function: Callable[..., Any],
    name: str,
    device: Device,
    shapes: tuple[tuple[tuple[int, ...], Any], ...],
    tree: Any,
    static: tuple[tuple[str, Hashable], ...],
) -> str | None:
    """Why a backend's program does not compile on the device, after one warning; None if it does.

    Compiled alone, once per case, so that a kernel that the GPU cannot run (too much shared memory,
    an old architecture) costs a warning and not the whole program.

    Raises:
        NotImplementedError: the backend does not support the case, or a lack of memory that may
            pass keeps it from compiling: what is raised is not remembered.
    """
    arrays = tree.unflatten(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    try:
        # By itself, whatever mesh the program around it is for.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jax.jit(functools.partial(function, **dict(static))).lower(*arrays).compile()
    except NotImplementedError:
        raise
    except Exception as error:  # whatever the compiler and the driver may raise
        cause = (str(error).strip() or repr(error)).splitlines()[0]
        sizes = ", ".join(f"{jax.numpy.dtype(dtype)}{list(shape)}" for shape, dtype in shapes)
        warnings.warn(
            f"{operation}: the {name} backend does not compile for {sizes} on {device.kind} "
            f"({cause}); going on with the next one",
            RuntimeWarning,
            stacklevel=4,
        )
        if _passes(error):
            raise NotImplementedError(cause) from error
        return cause
    return None


def _passes(error: Exception) -> bool:
    """Whether it is the device's or the host's memory that was used up for now.

    Shared memory is another matter, whose error has the same code: a kernel has too much of it at
    any time.
    """
    text = str(error).lower().replace("_", " ")
    exhausted = "resource exhausted" in text and "shared memory" not in text
    return exhausted or "out of memory" in text or isinstance(error, MemoryError)
